"""A model from a function: what loads, what is refused and with which line."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import DDIMScheduler
from models import assert_one_line, outputs_of, recipe_of

from ptqd_export.calibrate import open_model
from ptqd_export.errors import RecipeError

SOURCE = """
import torch
from torch import nn

class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(2, 2, 3, padding=1)
    def forward(self, sample, timestep, y):
        out = self.conv(sample) + y[:, None, None, None] + 0.001 * timestep[:, None, None, None]
        return {returned}

def make():
    return Net()

def text():
    return "no module"

def broken():
    raise ValueError("first line\\nsecond line")
"""


def write_function(folder: Path, returned: str) -> dict[str, Any]:
    (folder / "net.py").write_text(SOURCE.replace("{returned}", returned))
    DDIMScheduler().save_pretrained(folder / "scheduler")
    labels = {"name": "y", "num_classes": 5, "null_class": 4}
    return {
        "source": "net.py:make",
        "sample_shape": [2, 6, 4],
        "inputs": [labels],
        "scheduler": "scheduler",
        "null_class": None,
    }


@pytest.mark.parametrize("returned", ["out", "(out, 1)", "type('Output', (), {'sample': out})()"])
def test_function_source(tmp_path: Path, returned: str) -> None:
    recipe = recipe_of(tmp_path, model=write_function(tmp_path, returned))
    first, second = open_model(recipe), open_model(recipe)
    assert (
        first.info.name == "net" and first.info.sha256 == second.info.sha256
    )  # seeded, though its weights are random
    assert "conv" in dict(first.module.named_modules())
    assert torch.equal(outputs_of(first), outputs_of(second)) and outputs_of(first).shape == (2, 2, 6, 4)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"source": "net.py:absent"}, "has no function 'absent'"),
        ({"source": "gone.py:make"}, "does not exist"),
        ({"source": "net.py:text"}, "returned str: expected a torch.nn.Module"),
        ({"source": "net.py:broken"}, "ValueError: first line second line"),
        ({"sample_shape": []}, "model.sample_shape is"),
        ({"sample_shape": [3, 6, 4]}, "does not run on samples of shape"),
        ({"scheduler": ""}, "model.scheduler is not set"),
        ({"inputs": [{"name": "z", "num_classes": 3}]}, "does not run.*unexpected keyword"),
    ],
)
def test_function_errors(tmp_path: Path, change: dict[str, Any], message: str) -> None:
    model = write_function(tmp_path, "out") | change
    assert_one_line(recipe_of(tmp_path, model=model), message)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"inputs": [{"name": "y"}]}, "input 'y' is int64: a class label needs num_classes >= 1"),
        (
            {"inputs": [{"name": "y", "num_classes": 3}], "null_class": 3},
            r"input 'y': null_class is 3: give one of at least two ids below num_classes \(3\)",
        ),
    ],
)
def test_inputs_that_do_not_go_together(tmp_path: Path, change: dict[str, Any], message: str) -> None:
    """Said as what they are: a wrong recipe."""
    model = write_function(tmp_path, "out")
    open_model(recipe_of(tmp_path, model=model))
    with pytest.raises(RecipeError, match=message) as caught:
        open_model(recipe_of(tmp_path, model=model | change))
    assert "\n" not in str(caught.value)
