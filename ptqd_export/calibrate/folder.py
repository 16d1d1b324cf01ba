"""Read a diffusers folder (config and safetensors) as a Network: offline, quietly and without pickle."""

from __future__ import annotations

import contextlib
import dataclasses
import json
import math
from collections.abc import Iterator, Mapping
from logging import CRITICAL
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn

from ..core.model import MAX_ELEMENTS, InputSpec, ModelInfo
from ..core.schedule import NoiseSchedule
from ..errors import ModelError, PTQDError
from ..recipe import ModelSpec, Recipe
from ..typed import brief
from .network import Network, bare, check_finite, one_line, weights_sha256

CONFIG = "config.json"
SCHEDULER_CONFIG = "scheduler_config.json"
MAX_SIZE, MAX_LAYERS, MAX_LIST = 1_000_000, 100, 64
"""Bounds on numbers in a config, layers of a block and items of a list: far above any model's."""
WEIGHTS = ("diffusion_pytorch_model.safetensors", "diffusion_pytorch_model.fp16.safetensors")
CLASSES = ("UNet2DModel", "UNet2DConditionModel")
PICKLES = (".bin", ".pt", ".pth", ".ckpt", ".pkl")
OLD_ATTENTION = {".query.": ".to_q.", ".key.": ".to_k.", ".value.": ".to_v.", ".proj_attn.": ".to_out.0."}
"""Names of attention weights in models saved before diffusers 0.15."""


def from_folder(recipe: Recipe, folder: Path) -> Network:
    spec = recipe.model
    if not folder.is_dir():
        raise ModelError(
            f"model folder {folder} does not exist: give a diffusers folder on disk (nothing is downloaded)"
        )
    unet = next((f for f in (folder / "unet", folder) if (f / CONFIG).is_file()), None)
    if unet is None:
        raise ModelError(
            f"{folder} holds neither unet/{CONFIG} nor {CONFIG}: give a diffusers pipeline folder or a UNet "
            "folder"
        )
    config = read_json(unet / CONFIG)
    if config.get("_class_name") not in CLASSES:
        raise ModelError(
            f"{unet / CONFIG} says _class_name {config.get('_class_name')!r}: expected one of "
            f"{', '.join(CLASSES)}, or load it by file.py:function"
        )
    check_sizes(config, unet / CONFIG)
    scheduler = scheduler_config(recipe, folder)
    shape = _sample_shape(spec, config, unet / CONFIG)
    inputs = _unet_inputs(spec, config, unet / CONFIG)
    module = load_module(config, unet)
    kept = {key: value for key, value in config.items() if not key.startswith("_") or key == "_class_name"}
    name = spec.name or folder.name
    return Network(bare(module), ModelInfo(name, shape, inputs, weights_sha256(kept, module)), scheduler)


def load_module(config: dict[str, Any], folder: Path) -> nn.Module:
    """The UNet of a config, with its weights.

    diffusers builds it from the config; the weights are filled in here, so that every mismatch is named. It
    is first built on the meta device, without memory, and compared with the weights, so that a config cannot
    ask for more memory than the weights take.
    """
    state = _read_weights(folder)
    with torch.device("meta"):
        expected = _construct(config, folder).state_dict()
    for key in [key for key in state if key not in expected]:
        for old, new in OLD_ATTENTION.items():
            if old in key and key.replace(old, new) in expected:
                state[key.replace(old, new)] = state.pop(key)
    missing, unexpected = expected.keys() - state.keys(), state.keys() - expected.keys()
    for what, keys in (("lack", missing), ("hold unexpected", unexpected)):
        if keys:
            raise ModelError(
                f"the weights in {folder} {what} {len(keys)} tensors, such as {brief(min(keys))}: config and "
                "weights "
                "are of different models"
            )
    for key, value in sorted(state.items()):
        if value.shape != expected[key].shape:
            raise ModelError(
                f"weight {key!r} in {folder} has shape {tuple(value.shape)}: the config expects "
                f"{tuple(expected[key].shape)}"
            )
        check_finite(key, value, str(folder))
    module = _construct(config, folder)
    module.load_state_dict({key: value.to(expected[key].dtype) for key, value in state.items()}, strict=True)
    return module.float().eval().requires_grad_(False)


def _construct(config: dict[str, Any], folder: Path) -> nn.Module:
    class_name = config["_class_name"]
    with _quiet_diffusers(), torch.random.fork_rng(devices=[]):
        import diffusers

        try:
            module = getattr(diffusers, class_name).from_config(config)
        except Exception as error:  # the constructor trusts its arguments and fails in many ways
            raise ModelError(
                f"{folder / CONFIG} does not describe a {class_name}: {one_line(error)}"
            ) from error
    if not isinstance(module, nn.Module):
        raise ModelError(f"{folder / CONFIG} does not describe a {class_name}")
    return module


def check_sizes(config: Any, file: Path, key: str = "") -> None:
    """Refuse numbers that no UNet has: they would keep the constructor busy for ever.

    Raises:
        ModelError: a number is out of bounds; names the key.
    """
    if isinstance(config, dict):
        for name, value in config.items():
            check_sizes(value, file, str(name))
    elif isinstance(config, list):
        if len(config) > MAX_LIST:
            raise ModelError(f"{file} says {brief(key)} of {len(config)} items: expected at most {MAX_LIST}")
        for value in config:
            check_sizes(value, file, key)
    elif isinstance(config, int):
        most = MAX_LAYERS if "layers" in key else MAX_SIZE
        if not -1 <= config <= most:
            raise ModelError(f"{file} says {brief(key)} is {brief(config)}: expected at most {most}")


def _read_weights(folder: Path) -> dict[str, Tensor]:
    file = next((folder / name for name in WEIGHTS if (folder / name).is_file()), None)
    if file is None:
        pickled = sorted(f.name for f in folder.iterdir() if f.suffix in PICKLES)
        if pickled:
            raise ModelError(
                f"{folder} holds {pickled[0]}, a pickle, which is never loaded: save the model with "
                "safe_serialization=True"
            )
        raise ModelError(f"{folder} has no weights: expected {WEIGHTS[0]} in one piece")
    try:
        return load_file(file)
    except (SafetensorError, OSError, ValueError) as error:
        raise ModelError(f"{file} is damaged or not safetensors: {one_line(error)}: copy it again") from error


def scheduler_config(recipe: Recipe, folder: Path) -> dict[str, Any]:
    if recipe.model.scheduler:
        given = recipe.path(recipe.model.scheduler)
        places = [given, given / SCHEDULER_CONFIG]
    else:
        places = [folder / "scheduler" / SCHEDULER_CONFIG, folder / SCHEDULER_CONFIG]
    file = next((f for f in places if f.is_file()), None)
    if file is None:
        raise ModelError(
            f"no scheduler config at {' or '.join(map(str, places))}: put one there, or set model.scheduler "
            "in the recipe"
        )
    config = read_json(file)
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
        raise ModelError(
            f"{file} has no sample_size: set model.sample_shape = [channels, height, width] in the recipe"
        )
    else:
        shape = (
            (channels, size, size)
            if isinstance(size, int)
            else (channels, *size)
            if isinstance(size, list)
            else (channels, size)
        )
    if len(shape) != 3 or not all(isinstance(v, int) and v > 0 for v in shape) or shape[0] != channels:
        raise ModelError(
            f"the sample shape is {list(shape)}: expected [{channels}, height, width], from in_channels and "
            f"sample_size in {file}"
        )
    if math.prod(shape) > MAX_ELEMENTS:
        raise ModelError(
            f"the sample shape is {brief(list(shape))}: expected at most {MAX_ELEMENTS} elements, from "
            f"sample_size in {file}"
        )
    return int(shape[0]), int(shape[1]), int(shape[2])


def _unet_inputs(spec: ModelSpec, config: Mapping[str, Any], file: Path) -> tuple[InputSpec, ...]:
    """The conditioning inputs of a diffusers UNet: the recipe's, and class labels from the config."""
    declared = {s.name: s for s in spec.inputs}
    if config.get("class_embed_type") is not None or config.get("addition_embed_type") is not None:
        raise ModelError(
            f"{file} sets class_embed_type or addition_embed_type, which is not supported: load the model by "
            "file.py:function"
        )
    inputs: list[InputSpec] = []
    if config["_class_name"] == "UNet2DConditionModel":
        text, width = declared.pop("encoder_hidden_states", None), config.get("cross_attention_dim", 1280)
        if text is None or text.dtype != "float32" or len(text.shape) != 2 or text.shape[1] != width:
            got = "is not declared" if text is None else f"is declared as {text.dtype} {list(text.shape)}"
            raise ModelError(
                f"input encoder_hidden_states {got}: a UNet2DConditionModel needs it under model.inputs as "
                f"float32 with shape [tokens, {width}]"
            )
        inputs.append(text)
    classes = config.get("num_class_embeds")
    if classes is not None:
        if not isinstance(classes, int):
            raise ModelError(f"{file} says num_class_embeds {classes!r}: expected an integer")
        labels = InputSpec("class_labels", "int64", (), classes)
        given = declared.pop("class_labels", labels)
        if dataclasses.replace(given, null_class=None) != labels:
            raise ModelError(
                f"model.inputs declares class_labels otherwise than {file}: num_class_embeds is "
                f"{labels.num_classes}; leave it out"
            )
        inputs.append(with_null(spec, given))
    elif spec.null_class is not None:
        raise ModelError(
            f"model.null_class is {spec.null_class}, but {file} has no num_class_embeds: leave null_class out"
        )
    if declared:
        raise ModelError(
            f"model.inputs declares {min(declared)!r}, which {config['_class_name']} of {file} does not "
            "take: leave it out"
        )
    return tuple(inputs)


def with_null(spec: ModelSpec, given: InputSpec) -> InputSpec:
    if given.num_classes is None or given.null_class is not None:
        return given
    return dataclasses.replace(given, null_class=spec.null_class)


def read_json(file: Path) -> dict[str, Any]:
    try:
        data = json.loads(file.read_text("utf-8"))
    except OSError as error:
        raise ModelError(f"{file} cannot be read: {one_line(error)}") from error
    except (ValueError, RecursionError) as error:  # JSONDecodeError and UnicodeDecodeError are ValueErrors
        raise ModelError(f"{file} is not valid JSON: {one_line(error)}") from error
    if not isinstance(data, dict):
        raise ModelError(f"{file} holds a JSON {type(data).__name__}: expected an object")
    return data


@contextlib.contextmanager
def _quiet_diffusers() -> Iterator[None]:
    from diffusers.utils import logging

    level = logging.get_verbosity()
    logging.set_verbosity(CRITICAL)
    try:
        yield
    finally:
        logging.set_verbosity(level)
