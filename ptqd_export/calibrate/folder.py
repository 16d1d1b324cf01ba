"""Read a diffusers folder (config and safetensors) as a Source: offline, quietly and without pickle."""

from __future__ import annotations

import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import nn

from ..core.model import MAX_ELEMENTS, ModelInfo
from ..core.schedule import NoiseSchedule
from ..core.scheduler_config import learns_variance
from ..errors import ModelError, PTQDError
from ..recipe import ModelSpec, Recipe
from ..typed import brief
from .conditions import CONDITION_UNET, POOLED, Around, adapted, declare
from .construct import check_sizes, construct, fill
from .network import Network, bare, one_line, weights_sha256
from .source import Source
from .weights import read_folder, read_json

CONFIG, MODEL_INDEX = "config.json", "model_index.json"
FORCE_ZEROS = "force_zeros_for_empty_prompt"
SCHEDULER_CONFIG = "scheduler_config.json"
CLASSES = ("UNet2DModel", CONDITION_UNET)
AUTOENCODERS = ("AutoencoderKL", "VQModel")
FIRST_STAGES = ("vae", "vqvae")
OTHER_NETWORKS, CONTROL = ("transformer", "dit", "prior", "unet_2"), "controlnet"
"""Folders of networks that are no UNet, and of one that works on a UNet."""
PRECONDITIONED = ("StableDiffusionLatentUpscalePipeline",)
"""Pipelines that scale what their UNet takes and gives by the noise level, and give it that as a timestep."""
MAX_TOKENS = 4096
"""More tokens than any text encoder takes; a tokenizer that says more says nothing."""
OLD_ATTENTION = {".query.": ".to_q.", ".key.": ".to_k.", ".value.": ".to_v.", ".proj_attn.": ".to_out.0."}
"""Names of attention weights in models saved before diffusers 0.15."""


def from_folder(recipe: Recipe, folder: Path, weights: bool = True) -> Source:
    """A pipeline folder, or a bare UNet's.

    Args:
        weights: see `open_source`.
    Raises:
        ModelError: it holds no UNet that is supported, or its files are damaged or do not fit.
    """
    spec = recipe.model
    if not folder.is_dir():
        raise ModelError(
            f"model folder {folder} does not exist: give a diffusers folder on disk (nothing is downloaded)"
        )
    unet = next((f for f in (folder / "unet", folder) if (f / CONFIG).is_file()), None)
    if unet is None:
        raise ModelError(_without_unet(folder))
    if (folder / CONTROL / CONFIG).is_file():
        raise ModelError(
            f"{folder} holds {CONTROL}/, which steers the UNet and is not supported: give the folder of the "
            "UNet alone, or load both by file.py:function"
        )
    pipeline = _pipeline(folder)
    if pipeline in PRECONDITIONED:
        raise ModelError(
            f"{folder} is a {pipeline}, which scales its UNet's inputs and outputs by the noise level: that "
            "is not supported; wrap the UNet in that and load it by file.py:function"
        )
    config = read_json(unet / CONFIG)
    if config.get("_class_name") not in CLASSES:
        raise ModelError(
            f"{unet / CONFIG} says _class_name {config.get('_class_name')!r}: expected one of "
            f"{', '.join(CLASSES)}, or load it by file.py:function"
        )
    where = str(unet / CONFIG)
    check_sizes(config, where)
    scheduler = scheduler_config(recipe, folder)
    shape = sample_shape(spec, config, where, learns_variance(scheduler))
    first = next((folder / name for name in FIRST_STAGES if (folder / name / CONFIG).is_file()), None)
    about = {} if first is None else read_json(first / CONFIG)
    inputs = declare(spec, config, shape, where, _around(folder, about))
    module = bare(adapted(_load(config, unet, weights), channels=shape[0]))
    kept = {key: value for key, value in config.items() if not key.startswith("_") or key == "_class_name"}
    info = ModelInfo(recipe.model_name, shape, inputs, weights_sha256(kept, module))
    return Source(
        Network(module, info, scheduler),
        None if first is None else lambda: _first_stage(about, first, weights),
        *_scales(about),
        text_encoders=_folders(folder, "text_encoder"),
        tokenizers=_folders(folder, "tokenizer"),
        force_zeros=any(spec.name == POOLED for spec in inputs) and _force_zeros(folder / MODEL_INDEX),
    )


def _pipeline(folder: Path) -> Any:
    """The class that the folder's index names, or None."""
    index = folder / MODEL_INDEX
    return read_json(index).get("_class_name") if index.is_file() else None


def _without_unet(folder: Path) -> str:
    """Why a folder cannot be read, by what it holds instead of a UNet."""
    pipeline = _pipeline(folder)
    other = next((name for name in OTHER_NETWORKS if (folder / name / CONFIG).is_file()), None)
    if other is not None or pipeline is not None:
        network = read_json(folder / other / CONFIG).get("_class_name") if other else None
        what = f"{other}/ ({brief(network)})" if other else "no unet/"
        return (
            f"{folder} is a pipeline {brief(pipeline)} with {what}: supported are pipelines with a UNet "
            f"({', '.join(CLASSES)}); load another network by file.py:function"
        )
    return (
        f"{folder} holds neither unet/{CONFIG} nor {CONFIG}: give a diffusers pipeline folder or a UNet "
        "folder"
    )


def _load(config: Mapping[str, Any], folder: Path, weights: bool) -> nn.Module:
    """A model of diffusers with its weights."""
    state = read_folder(folder)
    module = construct(config, str(folder / CONFIG))
    expected = module.state_dict()
    for key in [key for key in state if key not in expected]:
        for old, new in OLD_ATTENTION.items():
            if old in key and key.replace(old, new) in expected:
                state[key.replace(old, new)] = state.pop(key)
    return fill(module, config, state, str(folder), weights)


def _first_stage(config: Mapping[str, Any], folder: Path, weights: bool) -> nn.Module:
    if config.get("_class_name") not in AUTOENCODERS:
        raise ModelError(
            f"{folder / CONFIG} says _class_name {config.get('_class_name')!r}: expected one of "
            f"{', '.join(AUTOENCODERS)}; or set pipeline.decoder = false in the recipe to sample latents"
        )
    return _load(config, folder, weights)


def _scales(config: Mapping[str, Any]) -> tuple[float, float]:
    """(scaling_factor, shift_factor) of an autoencoder's config; the class's defaults where it says nothing.

    For latents of VQ models the factor counts too: diffusers writes it, and its pipelines divide by it.
    """
    default = 0.18215 if config.get("_class_name") in AUTOENCODERS else 1.0
    scale, shift = config.get("scaling_factor"), config.get("shift_factor")
    for name, value in (("scaling_factor", scale), ("shift_factor", shift)):
        number = isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)
        if value is not None and not number:
            raise ModelError(f"the autoencoder's config says {name} is {brief(value)}: expected a number")
    return default if scale is None else float(scale), 0.0 if shift is None else float(shift)


def _folders(folder: Path, name: str) -> tuple[Path, ...]:
    """name, name_2, name_3, as far as they are there."""
    return tuple(f for f in (folder / (name + end) for end in ("", "_2", "_3")) if f.is_dir())


def _force_zeros(index: Path) -> bool:
    """Whether zeros stand for no text, in a pipeline of SDXL."""
    value = read_json(index).get(FORCE_ZEROS, True) if index.is_file() else True  # diffusers' default
    if not isinstance(value, bool):
        raise ModelError(f"{index} says {FORCE_ZEROS} is {brief(value)}: expected true or false")
    return value


def _around(folder: Path, first_stage: Mapping[str, Any]) -> Around:
    """What a pipeline's other configs say of a UNet's inputs."""
    tokens = pooled = None
    for encoder in _folders(folder, "text_encoder"):
        if (encoder / CONFIG).is_file():
            config = read_json(encoder / CONFIG)
            tokens = _count(config.get("max_position_embeddings")) or tokens
            pooled = _count(config.get("projection_dim"))  # the last one gives the pooled text
    for tokenizer in _folders(folder, "tokenizer"):
        file = tokenizer / "tokenizer_config.json"
        most = _count(read_json(file).get("model_max_length")) if file.is_file() else None
        tokens = most if tokens is None else min(tokens, most or tokens)
    levels = first_stage.get("block_out_channels")
    if isinstance(levels, list) and 1 <= len(levels) <= 8:
        return Around(tokens, pooled, 2 ** (len(levels) - 1))
    return Around(tokens, pooled)


def _count(value: Any) -> int | None:
    return value if isinstance(value, int) and 0 < value <= MAX_TOKENS else None


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
        s = recipe.sampler
        NoiseSchedule.from_config(config, s.n_steps, s.eta, s.solver)
    except PTQDError:
        raise
    except (TypeError, ValueError, OverflowError) as error:
        raise ModelError(f"{file} is not a usable scheduler config: {one_line(error)}") from error
    return config


def sample_shape(
    spec: ModelSpec, config: Mapping[str, Any], where: str, learned: bool = False
) -> tuple[int, int, int]:
    """(C, H, W) of the samples.

    A UNet that takes more channels than it predicts takes the rest as a condition. One that learns a variance
    returns it behind its prediction, in as many channels.

    Args:
        learned: the scheduler's config says so; else the channels do, or model.sample_shape.
    """
    takes, returns, size = (config.get(key) for key in ("in_channels", "out_channels", "sample_size"))
    channels = takes
    if isinstance(takes, int) and isinstance(returns, int) and returns > 0:
        given = spec.sample_shape[0] if spec.sample_shape else None
        learned = learned or returns in (2 * takes, 2 * (given or 0))
        predicts = returns // 2 if learned and returns % 2 == 0 else returns
        channels = min(takes, predicts)
    shape: tuple[Any, ...]
    if spec.sample_shape:
        shape = spec.sample_shape
    elif size is None:
        raise ModelError(
            f"{where} has no sample_size: set model.sample_shape = [channels, height, width] in the recipe"
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
            f"the sample shape is {list(shape)}: expected [{channels}, height, width], from the channels and "
            f"the sample_size in {where}"
        )
    if math.prod(shape) > MAX_ELEMENTS:
        raise ModelError(
            f"the sample shape is {brief(list(shape))}: expected at most {MAX_ELEMENTS} elements, from "
            f"sample_size in {where}"
        )
    return int(shape[0]), int(shape[1]), int(shape[2])
