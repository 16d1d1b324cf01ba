"""Models that nothing can be built from: one line that names what is wrong, and nothing changed."""

from __future__ import annotations

import json
import os
import re
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from helpers import SMALL, Built
from safetensors.numpy import load_file, save_file

UNET = "unet/diffusion_pytorch_model.safetensors"


@pytest.fixture
def model(tmp_path: Path, rgb: Built) -> Path:
    """A copy of a sound model folder, to be spoilt."""
    shutil.copytree(rgb.recipe, tmp_path / "model")
    return tmp_path / "model"


def _config(**changes: object) -> Callable[[Path], None]:
    def spoil(model: Path) -> None:
        file = model / "unet" / "config.json"
        file.write_text(json.dumps(json.loads(file.read_text()) | changes))

    return spoil


def _scheduler(**changes: object) -> Callable[[Path], None]:
    def spoil(model: Path) -> None:
        file = model / "scheduler" / "scheduler_config.json"
        file.write_text(json.dumps(json.loads(file.read_text()) | changes))

    return spoil


def _nan(model: Path) -> None:
    weights = load_file(model / UNET)
    weights["conv_in.weight"][0, 0, 0, 0] = np.nan
    save_file(weights, model / UNET)


def _huge(model: Path) -> None:
    weights = load_file(model / UNET)
    weights["conv_out.weight"][:] = 1e38
    save_file(weights, model / UNET)


def _lacking(model: Path) -> None:
    weights = load_file(model / UNET)
    del weights["conv_in.bias"]
    save_file(weights, model / UNET)


def _truncated(model: Path) -> None:
    os.truncate(model / UNET, (model / UNET).stat().st_size - 100)


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (lambda model: shutil.rmtree(model), "does not exist"),
        (
            lambda model: (model / "unet" / "config.json").unlink(),
            "holds neither unet/config.json nor config.json",
        ),
        (lambda model: (model / "unet" / "config.json").write_text("{"), "config.json is not valid JSON"),
        (
            lambda model: (model / "unet" / "config.json").write_text("[]"),
            "config.json holds a JSON list: expected an object",
        ),
        (
            _config(_class_name="FluxTransformer2DModel"),
            "says _class_name 'FluxTransformer2DModel': expected one of UNet2DModel",
        ),
        (_config(block_out_channels=[8]), "does not describe a UNet2DModel"),
        (_config(block_out_channels=[8, 24]), "has shape|lack|have beyond"),
        (_config(in_channels=4), "has shape .*: the config expects"),
        (_config(sample_size=None), "has no sample_size: set model.sample_shape"),
        (lambda model: shutil.rmtree(model / "scheduler"), "no scheduler config at"),
        (_scheduler(beta_schedule="cubic"), "says beta_schedule 'cubic': expected linear"),
        (
            _scheduler(_class_name="FlowMatchEulerDiscreteScheduler"),
            "is of 'FlowMatchEulerDiscreteScheduler', which is not of the discrete diffusion process",
        ),
        (_scheduler(prediction_type="flow"), "says prediction_type 'flow'"),
        (
            _scheduler(variance_type="learned_range", _class_name="DDPMScheduler"),
            "says a learned variance, which solver ddpm does not know: give another --solver, such as ddim",
        ),
        (_scheduler(num_train_timesteps="many"), "is not a usable scheduler config"),
        (
            lambda model: (model / UNET).unlink(),
            "has no weights: expected diffusion_pytorch_model.safetensors",
        ),
        (_truncated, "is damaged or not safetensors"),
        (_lacking, "lack 1 tensor, such as 'conv_in.bias'"),
        (_nan, "weight 'conv_in.weight' of .* holds NaN or infinite values"),
        (_huge, "returns NaN or infinite values|runs into NaN or infinite values"),
    ],
)
def test_models(
    model: Path, place: Path, refused: Callable[..., str], spoil: Callable[[Path], object], message: str
) -> None:
    spoil(model)
    line = refused("build", model, "--out", place / "bundle", *SMALL)
    assert re.search(message, line), line


@pytest.mark.parametrize(
    ("code", "message"),
    [
        ("def make(:\n", "net.py:make failed: SyntaxError"),
        ("import nothing_of_this_name\n", "net.py:make failed: ModuleNotFoundError"),
        ("x = 1\n", "has no function 'make'"),
        ("def make():\n    return 3\n", "returned int: expected a torch.nn.Module"),
        (
            "from torch import nn\ndef make():\n    return nn.Conv2d(1, 1, 1)\n",
            "does not run on samples of shape \\(2, 8, 8\\)",
        ),
    ],
)
def test_modules(
    tmp_path: Path, place: Path, refused: Callable[..., str], own: Built, code: str, message: str
) -> None:
    folder = tmp_path / "module"
    shutil.copytree(own.recipe, folder)
    (folder / "net.py").write_text(code)
    line = refused("build", folder, "--out", place / "bundle", *SMALL)
    assert re.search(message, line), line
