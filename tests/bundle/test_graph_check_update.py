"""The check of the sampler's update: every kind passes, and each rule has a wrong one."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from graph_edits import FILE, add, place, refused
from onnx import ModelProto, TensorProto
from toy import INFO

from ptqd_export.bundle.graph_check import Expected, check_graph
from ptqd_export.core.sampling import Sampling
from ptqd_export.core.schedule import NoiseSchedule
from ptqd_export.core.solvers import Solver
from ptqd_export.export import sampler_update, save

SETTINGS: dict[str, tuple[dict[str, Any], float, Solver]] = {
    "ddim": ({"clip_sample": False}, 0.0, "ddim"),
    "eta 1": ({"clip_sample": False}, 1.0, "ddim"),
    "clipped": ({"clip_sample": True}, 1.0, "ddim"),
    "ddpm": ({"clip_sample": True}, 1.0, "ddpm"),
    "pndm": ({}, 0.0, "pndm"),
    "sde-dpmsolver++": ({"thresholding": True}, 0.0, "sde-dpmsolver++"),
    "heun": ({}, 0.0, "heun"),
    "v-prediction": ({"clip_sample": False, "prediction_type": "v_prediction"}, 0.5, "ddim"),
}


def update(name: str, scale: float, steps: int, folder: Path) -> tuple[bytes, Expected]:
    config, eta, solver = SETTINGS[name]
    schedule = NoiseSchedule.from_config(config, max(steps, 4), eta, solver)
    sampling = Sampling(INFO, schedule, scale, 0.7 if solver == "heun" else 0.0)
    save({"update": sampler_update(sampling)}, folder, None)
    return (folder / "update.onnx").read_bytes(), Expected(sampling, None, FILE, 1 << 20)


@pytest.mark.parametrize("steps", [7, 500])
@pytest.mark.parametrize("scale", [0.0, 1.0, 2.5])
@pytest.mark.parametrize("name", SETTINGS)
def test_every_update_passes(name: str, scale: float, steps: int, tmp_path: Path) -> None:
    data, expected = update(name, scale, steps, tmp_path)
    check_graph(data, "update.onnx", expected)


def timesteps(m: ModelProto) -> None:
    table = next(t for t in m.graph.initializer if t.name == "timesteps")
    table.raw_data = np.arange(7, dtype=np.int64).tobytes()


WRONG_UPDATES: dict[str, tuple[Callable[[ModelProto], object], str]] = {
    "weights": (
        place(location=FILE, offset="0", length="28"),
        "takes weights from 'weights.safetensors', expected none",
    ),
    "another operator": (lambda m: add(m, "Softmax", ["sample"], ["n"]), "holds the operator 'Softmax'"),
    "other timesteps": (timesteps, "has other timesteps than the manifest"),
    "no noise": (lambda m: m.graph.input.pop(), r"has \d inputs"),
    "growth": (
        lambda m: add(m, "Concat", ["sample"] * 4, ["n"], axis=1),
        "Concat makes a value of 512 elements",
    ),
    "many values": (
        lambda m: [add(m, "Add", ["sample", "noise"], [f"n{i}"]) for i in range(40)],
        "needs more than|work",
    ),
}


@pytest.mark.parametrize("what", WRONG_UPDATES)
def test_each_rule_of_updates(what: str, tmp_path: Path) -> None:
    change, message = WRONG_UPDATES[what]
    data, expected = update("eta 1", 2.5, 7, tmp_path)
    model = ModelProto.FromString(data)
    if what == "weights":
        tensor = next(t for t in model.graph.initializer if len(t.dims) == 4)
        tensor.ClearField("raw_data")
        tensor.data_location = TensorProto.EXTERNAL
        tensor.external_data.add(key="location", value="x")
    change(model)
    refused(model.SerializeToString(), expected, message)


def test_an_update_of_another_schedule(tmp_path: Path) -> None:
    data, _ = update("eta 1", 2.5, 7, tmp_path)
    other, expected = update("eta 1", 2.5, 8, tmp_path)
    refused(data, expected, "of shape \\[7, 1, 1, 1\\], expected \\[8, 1, 1, 1\\]")
    refused(other + bytes(1 << 20), expected, "expected .* at most")
