"""CudaDevice: what it says where there is no GPU, and its logic over a fake CUDA whose memory is the host's."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Iterator

import numpy as np
import pytest
from fake_cuda import FakeCuda

from ptqd_export.backends import cuda
from ptqd_export.backends.base import Device
from ptqd_export.backends.cuda import Buffer, CudaDevice, Gpu
from ptqd_export.errors import BackendUnavailable, GraphError


@pytest.fixture
def fake() -> FakeCuda:
    return FakeCuda()


@pytest.fixture
def device(fake: FakeCuda) -> Iterator[CudaDevice]:
    with CudaDevice(fake) as device:
        yield device
    assert fake.live() == {}


def test_no_gpu() -> None:
    """The real CUDA runtime, in an environment that hides every GPU."""
    pytest.importorskip("cuda.bindings.runtime")
    code = "from ptqd_export.backends.cuda import CudaDevice\ntry: CudaDevice()\nexcept Exception as e: print(type(e).__name__, e)"
    run = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, env={"CUDA_VISIBLE_DEVICES": "", "PYTHONPATH": ":".join(sys.path)}
    )
    assert run.stderr == ""
    assert run.stdout.startswith("BackendUnavailable no NVIDIA GPU that CUDA can use here (cudaError"), run.stdout
    assert run.stdout.count("\n") == 1 and "choose another backend" in run.stdout


def test_no_bindings(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cuda, "BINDINGS", "cuda.bindings.nothing")
    with pytest.raises(BackendUnavailable, match=r"pip install 'ptqd-export\[tensorrt\]'"):
        CudaDevice()


def test_the_fake_has_only_what_the_real_one_has() -> None:
    real = pytest.importorskip("cuda.bindings.runtime")
    names = {name for name in vars(FakeCuda) if name.startswith("cuda")}
    assert len(names) > 20 and {name for name in names if not hasattr(real, name)} == set()
    for kind in ("cudaMemcpyKind", "cudaStreamCaptureMode", "cudaError_t"):
        assert set(getattr(FakeCuda, kind).__members__) <= set(getattr(real, kind).__members__)
        assert all(int(member) == int(getattr(getattr(real, kind), name)) for name, member in getattr(FakeCuda, kind).__members__.items())


def test_the_real_one_takes_these_arguments() -> None:
    """Where there is no GPU, every call answers with an error; arguments of a wrong type or number would raise."""
    real = pytest.importorskip("cuda.bindings.runtime")
    if not real.cudaGetDeviceCount()[0]:
        pytest.skip("there is a GPU: these would act")
    copy, capture = real.cudaMemcpyKind.cudaMemcpyHostToDevice, real.cudaStreamCaptureMode.cudaStreamCaptureModeThreadLocal
    calls: dict[str, tuple[object, ...]] = {
        "cudaSetDevice": (0,),
        "cudaGetDeviceProperties": (0,),
        "cudaStreamCreateWithFlags": (real.cudaStreamNonBlocking,),
        "cudaStreamSynchronize": (real.cudaStream_t(0),),
        "cudaMalloc": (1,),
        "cudaMallocHost": (1,),
        "cudaMemcpyAsync": (1, 1, 0, copy, real.cudaStream_t(0)),
        "cudaEventCreateWithFlags": (real.cudaEventDisableTiming,),
        "cudaStreamBeginCapture": (real.cudaStream_t(0), capture),
        "cudaStreamEndCapture": (real.cudaStream_t(0),),
        "cudaFree": (1,),
        "cudaFreeHost": (1,),
    }
    assert {name: str(getattr(real, name)(*given)[0].name) for name, given in calls.items() if not getattr(real, name)(*given)[0]} == {}


def test_gpu(fake: FakeCuda) -> None:
    assert cuda.gpu(fake) == Gpu("Fake GPU", "8.9") and str(cuda.gpu(fake)) == "Fake GPU (8.9)"
    fake.devices = 0
    with pytest.raises(BackendUnavailable, match=r"cudaErrorNoDevice.*the driver serves CUDA 13\.0"):
        cuda.gpu(fake)


def test_round_trip(device: CudaDevice, rng: np.random.Generator) -> None:
    assert isinstance(device, Device)
    for value in (rng.standard_normal((2, 3, 4)).astype(np.float32), np.array([7]), np.zeros((0, 3), np.float16), np.array(True)):
        buffer = device.empty(value.shape, value.dtype.name)
        assert buffer.nbytes == value.nbytes
        device.write(buffer, value)
        read = device.read(buffer)
        np.testing.assert_array_equal(read, value)
        assert read.dtype == value.dtype and read.shape == value.shape


def test_the_source_may_change_at_once(device: CudaDevice, fake: FakeCuda) -> None:
    buffers = [device.empty((4,), "float32") for _ in range(5)]
    source = np.empty(8, np.float32)[::2]
    for i, buffer in enumerate(buffers):
        source[:] = i
        device.write(buffer, source)
        source[:] = -1
    assert fake.queued >= 5, "the copies ran at once: this shows nothing"
    assert [device.read(buffer)[0] for buffer in buffers] == [0, 1, 2, 3, 4]


def test_staging_is_reused_and_bounded(device: CudaDevice, fake: FakeCuda) -> None:
    buffer = device.empty((4,), "float32")
    for _ in range(10):
        device.write(buffer, np.ones(4, np.float32))
        device.synchronize()
    assert fake.pinned() == 1
    for i in range(3 * cuda.STAGING_BLOCKS):
        device.write(buffer, np.full(4, i, np.float32))
    assert fake.pinned() <= cuda.STAGING_BLOCKS
    assert device.read(buffer)[0] == 3 * cuda.STAGING_BLOCKS - 1


@pytest.mark.parametrize("value", [np.zeros(4), np.zeros(5, np.float32), np.zeros((4, 1), np.float32)])
def test_wrong_array(device: CudaDevice, value: np.ndarray) -> None:
    with pytest.raises(GraphError, match=r"a buffer holds float32 \(4,\): got"):
        device.write(device.empty((4,), "float32"), value)


def test_memory_runs_out(device: CudaDevice, fake: FakeCuda) -> None:
    fake.limit = 1 << 20
    device.empty((1 << 10,), "int8")
    with pytest.raises(BackendUnavailable, match=r"memory ran out on Fake GPU.*lower the batch size"):
        device.empty((1 << 21,), "int8")
    device.reserve(1 << 19)
    before = device.scratch
    with pytest.raises(BackendUnavailable, match="memory ran out"):
        device.reserve(1 << 21)
    assert device.scratch == before and fake.live()[before[0]] == before[1]


def test_free(device: CudaDevice, fake: FakeCuda) -> None:
    buffer = device.empty((4,), "float32")
    device.write(buffer, np.ones(4, np.float32))
    device.free(buffer)
    assert buffer.ptr not in fake.live()


def test_scratch_grows_and_never_shrinks(device: CudaDevice, fake: FakeCuda) -> None:
    device.reserve(0)
    assert device.scratch == (0, 0)
    device.reserve(1000)
    first = device.scratch
    assert first[1] == 1000 and first[0] % 256 == 0
    device.reserve(10)
    assert device.scratch == first
    fake.enqueue(lambda: fake.array(first[0], (1000,), "uint8").fill(1))  # still to run in the old one
    device.reserve(5000)
    assert device.scratch[1] == 5000 and first[0] not in fake.live()


def test_graphs(device: CudaDevice, fake: FakeCuda) -> None:
    count: list[int] = []
    graph = device.capture(lambda: fake.enqueue(lambda: count.append(1)))
    device.synchronize()
    assert count == []
    for _ in range(3):
        device.replay(graph)
    device.synchronize()
    assert len(count) == 3
    device.drop(graph)
    assert fake.graphs == 0


@pytest.mark.parametrize("fault", ["work", "end", "instantiate", "raises"])
def test_what_cannot_be_captured(device: CudaDevice, fake: FakeCuda, fault: str) -> None:
    """No graph, and a stream that works on."""

    def work() -> bool:
        if fault == "raises":
            raise GraphError("no")
        return fault != "work"

    fake.fail = {"end": "cudaStreamEndCapture", "instantiate": "cudaGraphInstantiate"}.get(fault, "")
    if fault == "raises":
        with pytest.raises(GraphError):
            device.capture(work)
    else:
        assert device.capture(work) is None
    fake.fail = ""
    buffer = device.empty((1,), "int64")
    device.write(buffer, np.array([3]))
    assert device.read(buffer)[0] == 3
    assert fake.graphs == 0


def test_a_failing_gpu(fake: FakeCuda) -> None:
    device = CudaDevice(fake)
    fake.fail = "cudaStreamSynchronize"
    with pytest.raises(BackendUnavailable, match=r"Fake GPU .* failed in cudaStreamSynchronize .*cudaErrorIllegalAddress.*start the program again"):
        device.synchronize()
    device.close()
    device.close()


def test_buffer_is_a_value() -> None:
    assert Buffer(1, (2,), "int8") == Buffer(1, (2,), "int8") and len({Buffer(1, (2,), "int8"), Buffer(1, (3,), "int8")}) == 2
