"""OrtDevice on the CPU: what is installed, threads, and buffers."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import onnx
import pytest

from ptqd_export.backends import OrtDevice, OrtEngine, set_threads
from ptqd_export.backends.ort_device import DTYPES, PRODUCT
from ptqd_export.core.backend import BACKENDS, ORT_CPU
from ptqd_export.core.engine import Device
from ptqd_export.errors import BackendUnavailable, GraphError


def test_not_installed(affine: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "onnxruntime", None)
    with pytest.raises(BackendUnavailable, match=r"ort-cpu needs onnxruntime .*pip install '\.\[cpu\]'"):
        OrtEngine(affine)
    with pytest.raises(BackendUnavailable, match=r"ort-cuda needs onnxruntime .*pip install '\.\[gpu\]'"):
        OrtDevice("cuda")


def test_both_distributions_installed(tmp_path: Path, affine: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in BACKENDS[ORT_CPU].distributions:
        info = tmp_path / f"{name.replace('-', '_')}-1.0.dist-info"
        info.mkdir()
        (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {name}\nVersion: 1.0\n")
    monkeypatch.syspath_prepend(str(tmp_path))
    both = (
        "onnxruntime and onnxruntime-gpu are both installed and overwrite each other's files: pip uninstall "
        "both, then, in a checkout of ptqd-export: pip install '."
    )
    with pytest.raises(BackendUnavailable, match=re.escape(f"{both}[cpu]'")):
        OrtEngine(affine)
    with pytest.raises(BackendUnavailable, match=re.escape(f"{both}[gpu]'")):
        OrtDevice("cuda")


@pytest.mark.parametrize("dtype", sorted(set(DTYPES.values())))
@pytest.mark.parametrize("shape", [(), (0, 3), (2, 3)])
def test_buffers(dtype: str, shape: tuple[int, ...]) -> None:
    with OrtDevice() as device:
        assert isinstance(device, Device)
        buffer = device.empty(shape, dtype)
        for value in (1, 0):
            wanted = np.full(shape, value, dtype)
            device.write(buffer, wanted)
            device.synchronize()
            got = device.read(buffer)
            assert (got.dtype, got.shape) == (wanted.dtype, shape)
            np.testing.assert_array_equal(got, wanted)


def test_a_buffer_keeps_what_was_written() -> None:
    """Of the arrays that pass in and out, none is the buffer."""
    device = OrtDevice()
    buffer = device.empty((2, 3), "float32")
    x = np.arange(6, dtype=np.float32).reshape(2, 3)
    device.write(buffer, x[:, ::-1])
    first = device.read(buffer)
    np.testing.assert_array_equal(first, x[:, ::-1])
    x[:] = 7
    first[:] = 8
    np.testing.assert_array_equal(device.read(buffer), np.arange(6).reshape(2, 3)[:, ::-1])
    device.write(buffer, x)
    assert np.all(first == 8)


@pytest.mark.parametrize(
    "wrong",
    [np.zeros((2, 3)), np.zeros((3, 2), np.float32), np.zeros((2, 4), np.float32), np.zeros(6, np.float32)],
)
def test_writes_of_another_layout(wrong: np.ndarray) -> None:
    """ONNX Runtime would take the first two, as the bytes that they are."""
    device = OrtDevice()
    buffer = device.empty((2, 3), "float32")
    device.write(buffer, np.ones((2, 3), np.float32))
    with pytest.raises(GraphError, match=re.escape(f"holds float32 (2, 3): got {wrong.dtype} {wrong.shape}")):
        device.write(buffer, wrong)
    assert np.all(device.read(buffer) == 1)


def test_device_memory_runs_out(capfd: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(
        BackendUnavailable,
        match=r"no cpu memory for a buffer float32 \(1000000000000000,\) .*lower the batch size",
    ):
        OrtDevice().empty((10**15,), "float32")
    assert capfd.readouterr().err == ""


def test_a_closed_device(affine: Path) -> None:
    device = OrtDevice()
    buffer = device.empty((2,), "int64")
    device.close()
    device.close()
    with pytest.raises(BackendUnavailable, match="the cpu device is closed"):
        device.empty((2,), "int64")
    with pytest.raises(BackendUnavailable, match="the cpu device is closed"):
        OrtEngine(affine, device=device)
    device.write(buffer, np.array([1, 2]))
    assert device.read(buffer).tolist() == [1, 2]


def _python(code: str) -> str:
    return subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=60
    ).stdout.strip()


def test_one_pool_of_the_given_size(affine: Path) -> None:
    """Four engines of a process add as many threads as one does."""
    code = f"""
import os
from pathlib import Path
from ptqd_export.backends import OrtEngine, set_threads
import onnxruntime
set_threads(4)
before = len(os.listdir("/proc/self/task"))
counts = []
engines = []
for _ in range(4):
    engines.append(OrtEngine(Path({str(affine)!r})))
    counts.append(len(os.listdir("/proc/self/task")) - before)
print(counts)
"""
    assert _python(code) == "[3, 3, 3, 3]"  # the caller is the fourth


def test_threads_are_set_before_the_first_engine(affine: Path) -> None:
    with pytest.raises(BackendUnavailable, match="at least 1"):
        set_threads(0)
    code = f"""
from pathlib import Path
from ptqd_export.backends import OrtEngine, set_threads
from ptqd_export.errors import BackendUnavailable
set_threads(1)
set_threads(2)
OrtEngine(Path({str(affine)!r}))
set_threads(2)
try:
    set_threads(3)
except BackendUnavailable as error:
    print(error)
"""
    told = _python(code)
    assert told.startswith("ONNX Runtime already runs with 2 threads, not 3: ")
    assert told.endswith(": set the threads before the first engine is opened")


def test_the_graph_that_tells_what_saturates() -> None:
    model = onnx.load_from_string(PRODUCT)
    (node,) = model.graph.node
    types = [value.type.tensor_type.elem_type for value in (*model.graph.input, *model.graph.output)]
    assert (node.op_type, *node.input, *node.output) == ("MatMulInteger", "a", "b", "y")
    assert types == [onnx.TensorProto.UINT8, onnx.TensorProto.INT8, onnx.TensorProto.INT32]
