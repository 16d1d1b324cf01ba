"""The registry of backends."""

from __future__ import annotations

import dataclasses
import sys
from functools import partial
from pathlib import Path

import numpy as np
import onnx
import pytest

from ptqd_export.backends import OrtEngine, available, base, check, open_device, open_engine
from ptqd_export.engine import Engine
from ptqd_export.errors import BackendUnavailable
from ptqd_export.quant import BACKENDS


@pytest.fixture
def double(tmp_path: Path) -> Path:
    """epsilon = 2 sample, over (B, 2)."""
    text = '<ir_version: 10, opset_import: ["": 21]> g (float[B, 2] sample) => (float[B, 2] epsilon) { epsilon = Add(sample, sample) }'
    onnx.save(onnx.parser.parse_model(text), tmp_path / "double.onnx")
    return tmp_path / "double.onnx"


def _works(monkeypatch: pytest.MonkeyPatch, **reasons: str | None) -> None:
    """Backends as on another machine: each works (None) or says why not."""

    def check_of(name: str) -> None:
        reason = reasons[name.replace("-", "_")]
        if reason is not None:
            raise BackendUnavailable(reason)

    table = {name: dataclasses.replace(backend, check=partial(check_of, name)) for name, backend in base.BACKENDS.items()}
    monkeypatch.setattr(base, "BACKENDS", table)


def test_the_registry_is_what_recipes_name() -> None:
    """All but the simulation, fastest first."""
    assert list(base.BACKENDS) == [name for name in BACKENDS if name != "torch"]


def test_available_says_why_not(capfd: pytest.CaptureFixture[str]) -> None:
    found = available()
    assert list(found) == list(base.BACKENDS) and found["ort-cpu"] == "ok"
    for name, reason in found.items():
        assert reason and "\n" not in reason
        if reason == "ok":
            check(name)
        else:
            with pytest.raises(BackendUnavailable) as caught:
                check(name)
            assert str(caught.value) == reason
    out = capfd.readouterr()
    assert (out.out, out.err) == ("", "")


def test_no_runtime_installed(monkeypatch: pytest.MonkeyPatch) -> None:
    for module in ("onnxruntime", "tensorrt", "tensorrt_rtx"):
        monkeypatch.setitem(sys.modules, module, None)
    assert {name: reason.rpartition("pip install ")[2] for name, reason in available().items()} == {
        "tensorrt": "'ptqd-export[tensorrt]'",
        "tensorrt-rtx": "'ptqd-export[tensorrt-rtx]'",
        "ort-cuda": "'ptqd-export[gpu]'",
        "ort-cpu": "'ptqd-export[cpu]'",
    }


def test_unknown_backend(double: Path) -> None:
    for use in (check, open_device, lambda name: open_engine(name, double)):
        with pytest.raises(BackendUnavailable, match="'ort-gpu' does not run graph files: expected one of tensorrt, tensorrt-rtx, ort-cuda, ort-cpu"):
            use("ort-gpu")
    with pytest.raises(BackendUnavailable, match="'torch' does not run graph files"):
        check("torch")


def test_open(double: Path) -> None:
    x = np.arange(6, dtype=np.float32).reshape(3, 2)
    with open_engine("ort-cpu", double) as engine:
        assert isinstance(engine, Engine) and isinstance(engine, OrtEngine)
        np.testing.assert_array_equal(engine({"sample": x})["epsilon"], 2 * x)
    with open_device("ort-cpu") as device:
        assert isinstance(device, base.Device)
        with open_engine("ort-cpu", double, device) as engine:
            assert isinstance(engine, base.DeviceEngine)
            buffers = {"sample": device.empty((3, 2), "float32"), "epsilon": device.empty((3, 2), "float32")}
            device.write(buffers["sample"], x)
            engine.launch(buffers)
            np.testing.assert_array_equal(device.read(buffers["epsilon"]), 2 * x)
