"""Model intake: open a diffusers folder, a checkpoint or "file.py:function"."""

from __future__ import annotations

import hashlib
import importlib.util
import sys
from pathlib import Path

import torch
from torch import nn

from ..core.model import ModelInfo
from ..errors import ModelError, PTQDError
from ..recipe import Recipe
from .conditions import with_null
from .folder import from_folder, scheduler_config
from .ldm import from_checkpoint
from .network import Network, bare, check_finite, one_line, try_forward, weights_sha256
from .source import Source


def open_model(recipe: Recipe) -> Network:
    """The network of `recipe.model`, checked by one trial forward; see ModelSpec for the sources.

    Raises:
        ModelError: as `open_source`.
    """
    return open_source(recipe).network


def open_source(recipe: Recipe, weights: bool = True) -> Source:
    """The model of `recipe.model`, whose network is checked by one trial forward.

    Args:
        weights: without them, of a folder or a checkpoint only the tensors' names and shapes are read: the
            network is on the meta device and can tell the shapes of what it computes, no numbers.
    Raises:
        ModelError: the files are missing or damaged, the config or the weights do not fit, or the network
            computes NaN, infinite values or a wrong shape.
    """
    file, separator, function = recipe.model.source.rpartition(":")
    if recipe.model.checkpoint:
        source = from_checkpoint(recipe, weights)
    elif separator and file.endswith(".py"):
        source = Source(_from_function(recipe, recipe.path(file), function))
    else:
        source = from_folder(recipe, recipe.path(recipe.model.source), weights)
    try_forward(source.network)
    return source


def _from_function(recipe: Recipe, file: Path, function: str) -> Network:
    spec = recipe.model
    if not file.is_file():
        raise ModelError(
            f"model file {file} does not exist: give source as file.py:function, relative to the recipe"
        )
    if len(spec.sample_shape) != 3:
        raise ModelError(
            f"model.sample_shape is {list(spec.sample_shape)}: a model from a function needs [channels, "
            "height, width] in the recipe"
        )
    if not spec.scheduler:
        raise ModelError(
            "model.scheduler is not set: a model from a function needs the path of a diffusers scheduler "
            "config in the recipe"
        )
    loader = importlib.util.spec_from_file_location(f"_ptqd_model_{file.stem}", file)
    assert loader is not None and loader.loader is not None  # a .py file always has a loader
    code = importlib.util.module_from_spec(loader)
    sys.path.insert(0, str(file.parent))
    try:
        # Seeded: a function that draws its weights at random draws the same ones in every build.
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            loader.loader.exec_module(code)
            make = getattr(code, function, None)
            if not callable(make):
                raise ModelError(f"{file} has no function {function!r}: give source as file.py:function")
            module = make()
    except PTQDError:
        raise
    except Exception as error:
        raise ModelError(f"{file}:{function} failed: {one_line(error)}") from error
    finally:
        sys.path.remove(str(file.parent))
    if not isinstance(module, nn.Module):
        raise ModelError(f"{file}:{function} returned {type(module).__name__}: expected a torch.nn.Module")
    module = module.float().eval().requires_grad_(False)
    for key, value in module.state_dict().items():
        check_finite(key, value, str(file))
    channels, height, width = spec.sample_shape
    inputs = tuple(with_null(spec, s) for s in spec.inputs)
    # The weights do not say what the function computes with them; its file says most of that.
    code_hash = hashlib.sha256(file.read_bytes()).hexdigest()
    info = ModelInfo(
        recipe.model_name, (channels, height, width), inputs, weights_sha256({"code": code_hash}, module)
    )
    return Network(bare(module), info, scheduler_config(recipe, file.parent))
