"""Small models on disk, recipes for them, and damage to them."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import DDIMScheduler, UNet2DModel
from safetensors.torch import load_file, save_file

from ptqd_export.calibrate import Network, open_model
from ptqd_export.errors import ModelError, PTQDError
from ptqd_export.recipe import Recipe

WEIGHTS = "diffusion_pytorch_model.safetensors"


def tiny_unet(**changes: Any) -> UNet2DModel:
    """A seeded 8x8 UNet with attention, 3 classes and a null class."""
    settings: dict[str, Any] = {
        "sample_size": 8,
        "in_channels": 1,
        "out_channels": 1,
        "block_out_channels": (16, 32),
        "layers_per_block": 1,
        "down_block_types": ("DownBlock2D", "AttnDownBlock2D"),
        "up_block_types": ("AttnUpBlock2D", "UpBlock2D"),
        "attention_head_dim": 8,
        "norm_num_groups": 8,
        "num_class_embeds": 4,
    }
    torch.manual_seed(7)
    return UNet2DModel(**(settings | changes))


def save_pipeline(folder: Path, unet: torch.nn.Module | None = None, **scheduler: Any) -> Path:
    """A pipeline folder: unet/ and scheduler/."""
    (unet or tiny_unet()).save_pretrained(folder / "unet", safe_serialization=True)
    DDIMScheduler(clip_sample=False, **scheduler).save_pretrained(folder / "scheduler")
    return folder


def recipe_of(folder: Path, **sections: Any) -> Recipe:
    model = {"source": ".", "null_class": 3} | sections.pop("model", {})
    calibration = {"size": 4, "held_out": 2, "batch_size": 3} | sections.pop("calibration", {})
    sampler = {"n_steps": 4, "eta": 1.0, "guidance_scale": 2.0} | sections.pop("sampler", {})
    return Recipe.from_dict(
        {"model": model, "calibration": calibration, "sampler": sampler, **sections}, folder
    )


def edit_weights(folder: Path, change: Callable[[dict[str, torch.Tensor]], None]) -> None:
    state = load_file(folder / "unet" / WEIGHTS)
    change(state)
    save_file(state, folder / "unet" / WEIGHTS)


def edit_config(folder: Path, **changes: Any) -> None:
    file = folder / "unet" / "config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | changes))


def outputs_of(network: Network, n: int = 2) -> torch.Tensor:
    torch.manual_seed(0)
    conditions = {name: torch.from_numpy(value) for name, value in network.info.conditions(None, n).items()}
    with torch.inference_mode():
        output: torch.Tensor = network.module(
            torch.randn(n, *network.info.sample_shape), torch.full((n,), 500), **conditions
        )
    return output


NET = """
import torch
from torch import nn


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        {init}

    def forward(self, {takes}):
        return {returns}


def make():
    return Net()
"""


def own_model(
    folder: Path,
    shape: list[int],
    init: str,
    returns: str,
    inputs: tuple[dict[str, Any], ...] = (),
    **sections: Any,
) -> Recipe:
    """A recipe for a model from a function, without guidance.

    Args:
        init: statements of its __init__, a line each.
        returns: expression in `self`, sample, timestep and the names of `inputs`.
    """
    takes = ", ".join(("sample", "timestep", *(spec["name"] for spec in inputs)))
    lines = "\n        ".join(line.strip() for line in init.strip().splitlines())
    (folder / "net.py").write_text(NET.format(init=lines or "pass", takes=takes, returns=returns))
    (folder / "scheduler_config.json").write_text("{}")
    model = {
        "source": "net.py:make",
        "sample_shape": shape,
        "scheduler": "scheduler_config.json",
        "inputs": list(inputs),
        "null_class": None,
    }
    sampler = {"guidance_scale": 1.0} | sections.pop("sampler", {})
    return recipe_of(folder, model=model, sampler=sampler, **sections)


def assert_one_line(recipe: Recipe, message: str, kind: type[PTQDError] = ModelError) -> None:
    """Opening the model fails with one line."""
    with pytest.raises(kind, match=message) as caught:
        open_model(recipe)
    assert "\n" not in str(caught.value)
