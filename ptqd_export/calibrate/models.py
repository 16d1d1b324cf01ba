"""Model intake: a diffusers folder, or "file.py:function", as a Network. Offline, quiet and without pickle."""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import importlib.util
import json
import sys
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from logging import CRITICAL
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn

from ..conditioning import ModelInfo
from ..engine import Array
from ..errors import ModelError, PTQDError
from ..recipe import InputSpec, ModelSpec, Recipe
from ..schedule import NoiseSchedule

CONFIG = "config.json"
SCHEDULER_CONFIG = "scheduler_config.json"
WEIGHTS = ("diffusion_pytorch_model.safetensors", "diffusion_pytorch_model.fp16.safetensors")
CLASSES = ("UNet2DModel", "UNet2DConditionModel")
PICKLES = (".bin", ".pt", ".pth", ".ckpt", ".pkl")
OLD_ATTENTION = {".query.": ".to_q.", ".key.": ".to_k.", ".value.": ".to_v.", ".proj_attn.": ".to_out.0."}
"""Names of attention weights in models saved before diffusers 0.15."""


@dataclass(frozen=True)
class Network:
    """A full-precision denoising network.

    Attributes:
        module: the model in eval mode, float32, no gradients; module(sample f32 (B, C, H, W), timestep int64 (B,), **conditions)
            returns the raw output, f32 (B, C, H, W). Its submodule paths are the model's own ("down_blocks.0.resnets.0.conv1").
        info: shapes, conditions and hash.
        scheduler_config: the diffusers scheduler config, for NoiseSchedule.from_config.
    """

    module: nn.Module
    info: ModelInfo
    scheduler_config: dict[str, Any]


def open_model(recipe: Recipe) -> Network:
    """The network of `recipe.model` (sources: see ModelSpec), checked by one trial forward.

    Raises:
        ModelError: the files are missing or damaged, the config or the weights do not fit, or the network computes nonsense.
    """
    file, separator, function = recipe.model.source.rpartition(":")
    if separator and file.endswith(".py"):
        network = _from_function(recipe, recipe.path(file), function)
    else:
        network = _from_folder(recipe, recipe.path(recipe.model.source))
    _try_forward(network)
    return network


def _from_folder(recipe: Recipe, folder: Path) -> Network:
    spec = recipe.model
    if not folder.is_dir():
        raise ModelError(f"model folder {folder} does not exist: give a diffusers folder on disk (nothing is downloaded)")
    unet = next((f for f in (folder / "unet", folder) if (f / CONFIG).is_file()), None)
    if unet is None:
        raise ModelError(f"{folder} holds neither unet/{CONFIG} nor {CONFIG}: give a diffusers pipeline folder or a UNet folder")
    config = _read_json(unet / CONFIG)
    if config.get("_class_name") not in CLASSES:
        raise ModelError(
            f"{unet / CONFIG} says _class_name {config.get('_class_name')!r}: expected one of {', '.join(CLASSES)}, or load it by file.py:function"
        )
    scheduler_config = _scheduler_config(recipe, folder)
    shape = _sample_shape(spec, config, unet / CONFIG)
    inputs = _unet_inputs(spec, config, unet / CONFIG)
    module = _load_unet(config, unet)
    kept = {key: value for key, value in config.items() if not key.startswith("_") or key == "_class_name"}
    name = spec.name or folder.name
    return Network(_bare(module), ModelInfo(name, shape, inputs, _sha256(kept, module)), scheduler_config)


def _from_function(recipe: Recipe, file: Path, function: str) -> Network:
    spec = recipe.model
    if not file.is_file():
        raise ModelError(f"model file {file} does not exist: give source as file.py:function, relative to the recipe")
    if len(spec.sample_shape) != 3:
        raise ModelError(f"model.sample_shape is {list(spec.sample_shape)}: a model from a function needs [channels, height, width] in the recipe")
    if not spec.scheduler:
        raise ModelError("model.scheduler is not set: a model from a function needs the path of a diffusers scheduler config in the recipe")
    loader = importlib.util.spec_from_file_location(f"_ptqd_model_{file.stem}", file)
    assert loader is not None and loader.loader is not None  # a .py file always has a loader
    code = importlib.util.module_from_spec(loader)
    sys.path.insert(0, str(file.parent))
    try:
        # Seeded, so that a function that draws its weights draws the same ones in every build.
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
        _check_finite(key, value, str(file))
    channels, height, width = spec.sample_shape
    inputs = tuple(_with_null(spec, s) for s in spec.inputs)
    _check_inputs(inputs)
    # The weights do not say what the function computes with them; its file does, as far as it goes.
    code_hash = hashlib.sha256(file.read_bytes()).hexdigest()
    info = ModelInfo(spec.name or file.stem, (channels, height, width), inputs, _sha256({"code": code_hash}, module))
    return Network(_bare(module), info, _scheduler_config(recipe, file.parent))


def _load_unet(config: dict[str, Any], folder: Path) -> nn.Module:
    """The UNet of config and weights: built by diffusers from the config, filled here so that every mismatch is named."""
    class_name = config["_class_name"]
    state = _read_weights(folder)
    with _quiet_diffusers(), torch.random.fork_rng(devices=[]):
        import diffusers

        try:
            module = getattr(diffusers, class_name).from_config(config)
        except Exception as error:  # the constructor trusts its arguments and fails in many ways
            raise ModelError(f"{folder / CONFIG} does not describe a {class_name}: {one_line(error)}") from error
    if not isinstance(module, nn.Module):
        raise ModelError(f"{folder / CONFIG} does not describe a {class_name}")
    expected = module.state_dict()
    for key in [key for key in state if key not in expected]:
        for old, new in OLD_ATTENTION.items():
            if old in key and key.replace(old, new) in expected:
                state[key.replace(old, new)] = state.pop(key)
    for what, keys in (("lack", expected.keys() - state.keys()), ("hold unexpected", state.keys() - expected.keys())):
        if keys:
            raise ModelError(f"the weights in {folder} {what} {len(keys)} tensors, such as {min(keys)!r}: config and weights are of different models")
    for key, value in sorted(state.items()):
        if value.shape != expected[key].shape:
            raise ModelError(f"weight {key!r} in {folder} has shape {tuple(value.shape)}: the config expects {tuple(expected[key].shape)}")
        _check_finite(key, value, str(folder))
    module.load_state_dict({key: value.to(expected[key].dtype) for key, value in state.items()}, strict=True)
    return module.float().eval().requires_grad_(False)


def _read_weights(folder: Path) -> dict[str, Tensor]:
    file = next((folder / name for name in WEIGHTS if (folder / name).is_file()), None)
    if file is None:
        pickled = sorted(f.name for f in folder.iterdir() if f.suffix in PICKLES)
        if pickled:
            raise ModelError(f"{folder} holds {pickled[0]}, a pickle, which is never loaded: save the model with safe_serialization=True")
        raise ModelError(f"{folder} has no weights: expected {WEIGHTS[0]} in one piece")
    try:
        return load_file(file)
    except (SafetensorError, OSError, ValueError) as error:
        raise ModelError(f"{file} is damaged or not safetensors: {one_line(error)}: copy it again") from error


def _scheduler_config(recipe: Recipe, folder: Path) -> dict[str, Any]:
    if recipe.model.scheduler:
        given = recipe.path(recipe.model.scheduler)
        places = [given, given / SCHEDULER_CONFIG]
    else:
        places = [folder / "scheduler" / SCHEDULER_CONFIG, folder / SCHEDULER_CONFIG]
    file = next((f for f in places if f.is_file()), None)
    if file is None:
        raise ModelError(f"no scheduler config at {' or '.join(map(str, places))}: put one there, or set model.scheduler in the recipe")
    config = _read_json(file)
    try:
        NoiseSchedule.from_config(config, 1, 0.0)
    except PTQDError:
        raise
    except (TypeError, ValueError, OverflowError) as error:
        raise ModelError(f"{file} is not a usable scheduler config: {one_line(error)}") from error
    return config


def _sample_shape(spec: ModelSpec, config: Mapping[str, Any], file: Path) -> tuple[int, int, int]:
    channels, size = config.get("in_channels"), config.get("sample_size")
    shape: tuple[Any, ...]
    if spec.sample_shape:
        shape = spec.sample_shape
    elif size is None:
        raise ModelError(f"{file} has no sample_size: set model.sample_shape = [channels, height, width] in the recipe")
    else:
        shape = (channels, size, size) if isinstance(size, int) else (channels, *size) if isinstance(size, list) else (channels, size)
    if len(shape) != 3 or not all(isinstance(v, int) and v > 0 for v in shape) or shape[0] != channels:
        raise ModelError(f"the sample shape is {list(shape)}: expected [{channels}, height, width], from in_channels and sample_size in {file}")
    return int(shape[0]), int(shape[1]), int(shape[2])


def _unet_inputs(spec: ModelSpec, config: Mapping[str, Any], file: Path) -> tuple[InputSpec, ...]:
    """The conditioning inputs of a diffusers UNet: the recipe's, and class labels from the config."""
    declared = {s.name: s for s in spec.inputs}
    if config.get("class_embed_type") is not None or config.get("addition_embed_type") is not None:
        raise ModelError(f"{file} sets class_embed_type or addition_embed_type, which is not supported: load the model by file.py:function")
    inputs: list[InputSpec] = []
    if config["_class_name"] == "UNet2DConditionModel":
        text, width = declared.pop("encoder_hidden_states", None), config.get("cross_attention_dim", 1280)
        if text is None or text.dtype != "float32" or len(text.shape) != 2 or text.shape[1] != width:
            got = "is not declared" if text is None else f"is declared as {text.dtype} {list(text.shape)}"
            raise ModelError(
                f"input encoder_hidden_states {got}: a UNet2DConditionModel needs it under model.inputs as float32 with shape [tokens, {width}]"
            )
        inputs.append(text)
    classes = config.get("num_class_embeds")
    if classes is not None:
        if not isinstance(classes, int):
            raise ModelError(f"{file} says num_class_embeds {classes!r}: expected an integer")
        labels = InputSpec("class_labels", "int64", (), classes)
        given = declared.pop("class_labels", labels)
        if dataclasses.replace(given, null_class=None) != labels:
            raise ModelError(f"model.inputs declares class_labels otherwise than {file}: num_class_embeds is {labels.num_classes}; leave it out")
        inputs.append(_with_null(spec, given))
    elif spec.null_class is not None:
        raise ModelError(f"model.null_class is {spec.null_class}, but {file} has no num_class_embeds: leave null_class out")
    if declared:
        raise ModelError(f"model.inputs declares {min(declared)!r}, which {config['_class_name']} of {file} does not take: leave it out")
    _check_inputs(tuple(inputs))
    return tuple(inputs)


def _with_null(spec: ModelSpec, given: InputSpec) -> InputSpec:
    if given.num_classes is None or given.null_class is not None:
        return given
    return dataclasses.replace(given, null_class=spec.null_class)


def _check_inputs(inputs: tuple[InputSpec, ...]) -> None:
    for spec in inputs:
        if spec.dtype == "int64" and (spec.num_classes is None or spec.num_classes < 1 or spec.shape):
            raise ModelError(f"input {spec.name!r} is int64: a class label needs num_classes >= 1 and shape []")
        if spec.dtype == "float32" and spec.num_classes is not None:
            raise ModelError(f"input {spec.name!r} is float32 and has num_classes: only int64 class labels have classes")
        if spec.null_class is not None and not 0 <= spec.null_class < (spec.num_classes or 0):
            raise ModelError(f"the null class of {spec.name!r} is {spec.null_class}: expected 0 to {(spec.num_classes or 0) - 1}")
    if sum(spec.num_classes is not None for spec in inputs) > 1:
        raise ModelError("the model declares two class-label inputs: at most one is supported")


def _read_json(file: Path) -> dict[str, Any]:
    try:
        data = json.loads(file.read_text("utf-8"))
    except OSError as error:
        raise ModelError(f"{file} cannot be read: {one_line(error)}") from error
    except ValueError as error:  # JSONDecodeError and UnicodeDecodeError
        raise ModelError(f"{file} is not valid JSON: {one_line(error)}") from error
    if not isinstance(data, dict):
        raise ModelError(f"{file} holds a JSON {type(data).__name__}: expected an object")
    return data


def _check_finite(key: str, value: Tensor, where: str) -> None:
    if value.is_floating_point() and not bool(torch.isfinite(value).all()):
        raise ModelError(f"weight {key!r} of {where} holds NaN or infinite values: the file is damaged or training diverged")


def _sha256(config: Mapping[str, Any], module: nn.Module) -> str:
    """SHA-256 of the config and of the tensors by name, as they are computed with (float32)."""
    digest = hashlib.sha256(json.dumps(config, sort_keys=True).encode())
    for key, value in sorted(module.state_dict().items()):
        digest.update(f"{key} {value.dtype} {tuple(value.shape)}".encode())
        digest.update(value.contiguous().numpy().tobytes())
    return digest.hexdigest()


def _bare(module: nn.Module) -> nn.Module:
    """`module` with a forward that returns the bare tensor, of a tuple the first item, of an output object `.sample`.

    The object's class is replaced by a subclass instead of wrapping the module, so that submodule paths stay the model's own.
    """
    base = type(module)

    def forward(self: nn.Module, sample: Tensor, timestep: Tensor, **conditions: Tensor) -> Any:
        output = base.forward(self, sample, timestep, **conditions)
        if isinstance(output, Tensor):
            return output
        return output[0] if isinstance(output, tuple | list) else getattr(output, "sample", output)

    module.__class__ = type(base.__name__, (base,), {"forward": forward, "__module__": base.__module__})
    return module


def trial_feeds(info: ModelInfo, n: int) -> dict[str, Array]:
    """Feeds for a forward that only asks whether and how the network runs: seeded normal samples, classes in turn."""
    generator = np.random.default_rng(0)
    tensors = {s.name: generator.standard_normal((n, *s.shape)).astype(np.float32) for s in info.inputs if s.num_classes is None}
    sample = generator.standard_normal((n, *info.sample_shape)).astype(np.float32)
    return {"sample": sample, "timestep": np.full(n, 1, np.int64), **info.conditions(None, n, tensors)}


def _try_forward(network: Network) -> None:
    feeds = {name: torch.from_numpy(value) for name, value in trial_feeds(network.info, 2).items()}
    spec = network.info.class_input
    if spec is not None and spec.num_classes is not None:  # the first and the last class that an embedding must hold
        feeds[spec.name] = torch.tensor([0, spec.num_classes - 1])
    expected = tuple(feeds["sample"].shape)
    try:
        with torch.inference_mode():
            output = network.module(**feeds)
    except Exception as error:
        raise ModelError(f"{network.info.name} does not run on samples of shape {network.info.sample_shape}: {one_line(error)}") from error
    if not isinstance(output, Tensor):
        raise ModelError(f"{network.info.name} returns {type(output).__name__}: expected a tensor, a tuple, or an object with .sample")
    if tuple(output.shape) == (expected[0], 2 * expected[1], *expected[2:]):
        raise ModelError(
            f"{network.info.name} returns {output.shape[1]} channels for {expected[1]}: a learned variance is not supported, "
            "use a model that predicts the noise alone"
        )
    if tuple(output.shape) != expected:
        raise ModelError(f"{network.info.name} returns shape {tuple(output.shape)} for samples of shape {expected}: expected the same shape")
    if not bool(torch.isfinite(output).all()):
        raise ModelError(f"{network.info.name} returns NaN or infinite values for normal noise: check its weights and config")


def one_line(error: BaseException) -> str:
    """An exception of a library as one line of at most 300 characters."""
    return f"{type(error).__name__}: {' '.join(str(error).split())[:300]}"


@contextlib.contextmanager
def _quiet_diffusers() -> Iterator[None]:
    from diffusers.utils import logging

    level = logging.get_verbosity()
    logging.set_verbosity(CRITICAL)
    try:
        yield
    finally:
        logging.set_verbosity(level)
