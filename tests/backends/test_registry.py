"""The registry of backends."""

from __future__ import annotations

import sys
from pathlib import Path

import numpy as np
import pytest
from fake_cuda import FakeCuda
from fake_tensorrt import FakeTensorRT
from onnx_text import save_text

from ptqd_export.backends import (
    OrtEngine,
    available,
    check,
    open_device,
    open_engine,
    openvino,
    registry,
    trt,
)
from ptqd_export.backends.cuda import CudaDevice
from ptqd_export.core.backend import ENGINE_BACKENDS, ORT_CPU, RUNNABLE, TENSORRT_RTX, TORCH
from ptqd_export.core.engine import Engine
from ptqd_export.errors import BackendUnavailable, BundleError


@pytest.fixture
def double(tmp_path: Path) -> Path:
    """epsilon = 2 sample, over (B, 2)."""
    text = "g (float[B, 2] sample) => (float[B, 2] epsilon) { epsilon = Add(sample, sample) }"
    return save_text(tmp_path / "double.onnx", text)


def test_the_registry_opens_what_runs_files() -> None:
    """All but the simulation, best first."""
    assert tuple(registry.OPENERS) == RUNNABLE


def test_available_says_why_not(capfd: pytest.CaptureFixture[str]) -> None:
    found = available()
    assert list(found) == list(registry.OPENERS) and found["ort-cpu"] == "ok"
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
    openvino.runtime.cache_clear()
    for module in ("onnxruntime", "openvino", "tensorrt", "tensorrt_rtx"):
        monkeypatch.setitem(sys.modules, module, None)
    found = available()
    assert {name: reason.rpartition("pip install ")[2] for name, reason in found.items()} == {
        "tensorrt": "'.[tensorrt]'",
        "tensorrt-rtx": "'.[tensorrt-rtx]'",
        "ort-cuda": "'.[gpu]'",
        "openvino": "'.[openvino]'",
        "openvino-fp32": "'.[openvino]'",
        "ort-cpu": "'.[cpu]'",
    }
    assert all("in a checkout of ptqd-export: pip install" in reason for reason in found.values())


def test_unknown_backend(double: Path) -> None:
    known = "expected one of tensorrt, tensorrt-rtx, ort-cuda, openvino, openvino-fp32, ort-cpu"
    for use in (check, open_device, lambda name: open_engine(name, double)):
        with pytest.raises(BackendUnavailable, match=f"'ort-gpu' does not run graph files: {known}"):
            use("ort-gpu")
    with pytest.raises(BackendUnavailable, match="'torch' does not run graph files"):
        check(TORCH)


def test_a_device_of_an_index(monkeypatch: pytest.MonkeyPatch) -> None:
    """Handed on to what has several; the host is one."""
    cuda = FakeCuda()
    cuda.devices = 2
    monkeypatch.setattr("ptqd_export.backends.cuda.runtime", lambda: cuda)
    for name in ENGINE_BACKENDS:
        with open_device(name, 1) as device:
            assert isinstance(device, CudaDevice) and device.index == 1
    with open_device(ORT_CPU, 0):
        pass
    with pytest.raises(BackendUnavailable, match="ort-cpu has one device, the host: got index 1, expected 0"):
        open_device(ORT_CPU, 1)


@pytest.mark.parametrize("resident", [True, False])
def test_a_finished_engine(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, resident: bool) -> None:
    """What is known of it reaches the engine."""
    cuda = FakeCuda()
    fake = FakeTensorRT(cuda)
    monkeypatch.setattr(trt, "load", lambda name: fake)
    path = tmp_path / "e.engine"
    with CudaDevice(cudart=cuda) as device:
        path.write_bytes(b"old")
        with pytest.raises(BundleError, match="it was built by X for Y"):
            open_engine(TENSORRT_RTX, path, device, built="X for Y")
        path.write_bytes(b"good")
        about = {"cache": tmp_path / "kernels", "resident": resident}
        with open_engine(TENSORRT_RTX, path, device, **about) as engine:  # type: ignore[arg-type]
            assert isinstance(engine, registry.DeviceEngine) and engine.capture_note is not None
            (context,) = fake.contexts
            assert context.engine.weights_loaded == resident
            del context
    assert (tmp_path / "kernels").exists() and cuda.live() == {} and fake.faults == []


def test_open(double: Path) -> None:
    x = np.arange(6, dtype=np.float32).reshape(3, 2)
    with open_engine("ort-cpu", double) as engine:
        assert isinstance(engine, Engine) and isinstance(engine, OrtEngine)
        np.testing.assert_array_equal(engine({"sample": x})["epsilon"], 2 * x)
    with open_device("ort-cpu") as device:
        assert isinstance(device, registry.Device)
        with open_engine("ort-cpu", double, device) as engine:
            assert isinstance(engine, registry.DeviceEngine) and engine.capture_note is None
            buffers = {"sample": device.empty((3, 2), "float32"), "epsilon": device.empty((3, 2), "float32")}
            device.write(buffers["sample"], x)
            engine.launch(buffers)
            np.testing.assert_array_equal(device.read(buffers["epsilon"]), 2 * x)
