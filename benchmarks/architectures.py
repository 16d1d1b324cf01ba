"""Models that benchmarks measure: the reference model, and diffusers UNets with seeded random weights."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from report import REFERENCE_MODEL

from ptqd_export.recipe import Recipe

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
    "condition": Architecture(
        "Stable Diffusion 1.5 with 0.4 of its channels, random weights",
        "UNet2DConditionModel",
        142_236_036,
        {
            "sample_size": 32,
            "cross_attention_dim": 768,
            "attention_head_dim": 8,
            "block_out_channels": (128, 256, 512, 512),
        },
        ({"name": "encoder_hidden_states", "dtype": "float32", "shape": [77, 768]},),
        ("w8a8",),
        (2, 2, 4),
    ),
    "sd": Architecture(
        "size of Stable Diffusion 1.5, random weights",
        "UNet2DConditionModel",
        859_520_964,
        {
            "sample_size": 64,
            "cross_attention_dim": 768,
            "attention_head_dim": 8,
            "block_out_channels": (320, 640, 1280, 1280),
        },
        ({"name": "encoder_hidden_states", "dtype": "float32", "shape": [77, 768]},),
        ("fp16", "w8a8", "w8a8-fp8"),
        (2, 2, 4),
    ),
}


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


def recipe_of(key: str, folder: Path, n_steps: int = 1, **quantization: object) -> Recipe:
    """A recipe with a minimal calibration; random weights are written to `folder`."""
    about: dict[str, Any] = {
        "sampler": {"n_steps": n_steps},
        "calibration": FEW,
        "quantization": quantization,
    }
    return Recipe.load(write_model(key, folder)).override(**about)
