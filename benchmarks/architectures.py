"""Models that benchmarks measure: the reference model, and diffusers UNets with seeded random weights."""

from __future__ import annotations

import contextlib
import json
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from report import REFERENCE_MODEL

from ptqd_export import Recipe, build
from ptqd_export.bundle.bundle import Bundle
from ptqd_export.core.bits import to_measure
from ptqd_export.errors import PTQDError

REFERENCE = "reference"
FEW = {"size": 2, "held_out": 2, "batch_size": 2, "activation_range": "minmax", "weight_range": "minmax"}
"""A minimal calibration: random weights teach nothing."""


@dataclass(frozen=True)
class Architecture:
    """A diffusers UNet with random weights.

    Attributes:
        title: what the tables call it.
        parameters: how many it must have.
        config: of the diffusers class, as far as it is not the default.
        inputs: float32 inputs besides sample and timestep, as in a recipe.
        rows: fewest, usual and most rows of one engine call.
    """

    title: str
    class_name: str
    parameters: int
    config: dict[str, Any]
    inputs: tuple[dict[str, Any], ...]
    precisions: tuple[str, ...]
    rows: tuple[int, int, int]


def _stable_diffusion(
    title: str, parameters: int, size: int, channels: tuple[int, ...], *precisions: str
) -> Architecture:
    """Of Stable Diffusion 1.5's shape."""
    config = {"sample_size": size, "cross_attention_dim": 768, "attention_head_dim": 8}
    text = {"name": "encoder_hidden_states", "dtype": "float32", "shape": [77, 768]}
    return Architecture(
        f"{title}, random weights",
        "UNet2DConditionModel",
        parameters,
        {**config, "block_out_channels": channels},
        (text,),
        precisions,
        (2, 2, 4),
    )


ARCHITECTURES = {
    "cifar": Architecture(
        "google/ddpm-cifar10-32, random weights",
        "UNet2DModel",
        35_746_307,
        {
            "sample_size": 32,
            "in_channels": 3,
            "out_channels": 3,
            "layers_per_block": 2,
            "block_out_channels": (128, 256, 256, 256),
            "down_block_types": ("DownBlock2D", "AttnDownBlock2D", "DownBlock2D", "DownBlock2D"),
            "up_block_types": ("UpBlock2D", "UpBlock2D", "AttnUpBlock2D", "UpBlock2D"),
            "norm_eps": 1e-6,
            "act_fn": "silu",
            "downsample_padding": 0,
            "flip_sin_to_cos": False,
            "freq_shift": 1,
            "dropout": 0.0,
            "center_input_sample": False,
            "mid_block_scale_factor": 1,
        },
        (),
        ("fp16", "w8a8", "w4a8", "w4a4", "w8a8-fp8"),
        (1, 8, 32),
    ),
    "cross": Architecture(
        "a small network with cross-attention, random weights",
        "UNet2DConditionModel",
        3_173_124,
        {
            "sample_size": 32,
            "cross_attention_dim": 96,
            "attention_head_dim": 4,
            "layers_per_block": 1,
            "block_out_channels": (64, 128),
            "down_block_types": ("CrossAttnDownBlock2D", "DownBlock2D"),
            "up_block_types": ("UpBlock2D", "CrossAttnUpBlock2D"),
        },
        ({"name": "encoder_hidden_states", "dtype": "float32", "shape": [77, 96]},),
        ("w8a8", "w4a4"),
        (2, 2, 4),
    ),
    "unet": Architecture(
        "a small UNet2DModel, random weights",
        "UNet2DModel",
        6_472_195,
        {
            "sample_size": 32,
            "layers_per_block": 2,
            "block_out_channels": (64, 128, 128),
            "down_block_types": ("DownBlock2D", "AttnDownBlock2D", "DownBlock2D"),
            "up_block_types": ("UpBlock2D", "AttnUpBlock2D", "UpBlock2D"),
        },
        (),
        ("w8a8",),
        (1, 4, 16),
    ),
    "condition": _stable_diffusion(
        "Stable Diffusion 1.5 with 0.4 of its channels", 142_236_036, 32, (128, 256, 512, 512), "w8a8"
    ),
    "sd": _stable_diffusion(
        "size of Stable Diffusion 1.5", 859_520_964, 64, (320, 640, 1280, 1280), "fp16", "w8a8", "w8a8-fp8"
    ),
}


def say(text: str) -> None:
    print(text, file=sys.stderr)


def write_model(key: str, folder: Path) -> Path:
    """Write the model, and a recipe for it, to `folder`; what to open. The reference model is where it is."""
    if key == REFERENCE:
        return REFERENCE_MODEL
    import diffusers
    import torch

    a = ARCHITECTURES[key]
    torch.manual_seed(0)
    module = getattr(diffusers, a.class_name)(**a.config)
    assert (found := sum(p.numel() for p in module.parameters())) == a.parameters, found
    module.save_pretrained(folder / "model" / "unet")
    diffusers.DDIMScheduler().save_pretrained(folder / "model" / "scheduler")
    lines = ["[model]", 'source = "model"', f"name = {json.dumps(a.title)}"]
    for one in a.inputs:
        lines += ["[[model.inputs]]", *(f"{name} = {json.dumps(value)}" for name, value in one.items())]
    (folder / "recipe.toml").write_text("\n".join([*lines, ""]), "utf-8")
    return folder


def quickly(model: Path, n_steps: int = 1, **quantization: object) -> Recipe:
    """The recipe of a model with a minimal calibration."""
    about: dict[str, Any] = {
        "sampler": {"n_steps": n_steps},
        "calibration": FEW,
        "quantization": quantization,
    }
    return Recipe.load(model).override(**about)


def recipe_of(key: str, folder: Path, **quantization: object) -> Recipe:
    """A recipe with a minimal calibration; random weights are written to `folder`."""
    return quickly(write_model(key, folder), **quantization)


def kept_bundle(recipe: Recipe, path: Path) -> Bundle:
    """The bundle of a recipe at `path`, built unless it is there."""
    with contextlib.suppress(PTQDError):
        bundle = Bundle.open(path)
        m = bundle.manifest
        measured = m.layer_sensitivity.items()
        known = all(set(found.noise) == set(to_measure(p)) for p, found in measured)
        if m.provenance.recipe == recipe.to_dict() and known:  # else of an older version
            return bundle
    say(f"building {path.name}")
    return build(recipe, path, say=say)
