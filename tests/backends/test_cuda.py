"""CudaDevice: what it says where there is no GPU, and its logic over a fake CUDA in the host's memory."""

from __future__ import annotations

import subprocess
import sys
import threading
from collections.abc import Callable, Iterator

import numpy as np
import pytest
from fake_cuda import FakeCuda

from ptqd_export.backends import cuda
from ptqd_export.backends.cuda import Buffer, CaptureFailed, CudaDevice, Gpu
from ptqd_export.core.engine import Device
from ptqd_export.errors import BackendUnavailable, GraphError


@pytest.fixture
def fake() -> FakeCuda:
    return FakeCuda()


@pytest.fixture
def device(fake: FakeCuda) -> Iterator[CudaDevice]:
    with CudaDevice(cudart=fake) as device:
        yield device
    assert fake.live() == {}


def test_no_gpu() -> None:
    """The real CUDA runtime, in an environment that hides every GPU."""
    pytest.importorskip("cuda.bindings.runtime")
    code = """
from ptqd_export.backends.cuda import CudaDevice
try: CudaDevice()
except Exception as e: print(type(e).__name__, e)
"""
    run = subprocess.run(
        [sys.executable, "-c", code],
        capture_output=True,
        text=True,
        env={"CUDA_VISIBLE_DEVICES": "", "PYTHONPATH": ":".join(sys.path)},
    )
    assert run.stderr == ""
    assert run.stdout.startswith("BackendUnavailable no NVIDIA GPU that CUDA can use here (cudaError"), (
        run.stdout
    )
    assert run.stdout.count("\n") == 1 and "choose another backend" in run.stdout


def test_no_bindings(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cuda, "BINDINGS", "cuda.bindings.nothing")
    with pytest.raises(BackendUnavailable, match=r"pip install '\.\[tensorrt\]', or '\.\[tensorrt-rtx\]'"):
        CudaDevice()


def test_the_fake_has_only_what_the_real_one_has() -> None:
    real = pytest.importorskip("cuda.bindings.runtime")
    names = {name for name in vars(FakeCuda) if name.startswith("cuda")}
    assert len(names) > 20 and {name for name in names if not hasattr(real, name)} == set()
    for kind in ("cudaMemcpyKind", "cudaStreamCaptureMode", "cudaError_t"):
        fake_kind, real_kind = getattr(FakeCuda, kind), getattr(real, kind)
        assert set(fake_kind.__members__) <= set(real_kind.__members__)
        assert all(
            int(member) == int(getattr(real_kind, name)) for name, member in fake_kind.__members__.items()
        )


def test_the_real_one_takes_these_arguments() -> None:
    """Without a GPU every call answers with an error; arguments of a wrong type or number would raise."""
    real = pytest.importorskip("cuda.bindings.runtime")
    if not real.cudaGetDeviceCount()[0]:
        pytest.skip("there is a GPU: these would act")
    copy = real.cudaMemcpyKind.cudaMemcpyHostToDevice
    capture = real.cudaStreamCaptureMode.cudaStreamCaptureModeThreadLocal
    calls: dict[str, tuple[object, ...]] = {
        "cudaGetDevice": (),
        "cudaSetDevice": (0,),
        "cudaGetDeviceProperties": (0,),
        "cudaStreamCreateWithFlags": (real.cudaStreamNonBlocking,),
        "cudaStreamDestroy": (real.cudaStream_t(0),),
        "cudaStreamSynchronize": (real.cudaStream_t(0),),
        "cudaMalloc": (1,),
        "cudaMallocHost": (1,),
        "cudaMemcpyAsync": (1, 1, 0, copy, real.cudaStream_t(0)),
        "cudaEventCreateWithFlags": (real.cudaEventDisableTiming,),
        "cudaEventQuery": (real.cudaEvent_t(0),),
        "cudaStreamBeginCapture": (real.cudaStream_t(0), capture),
        "cudaStreamEndCapture": (real.cudaStream_t(0),),
        "cudaGraphInstantiate": (real.cudaGraph_t(0), 0),
        "cudaGraphLaunch": (real.cudaGraphExec_t(0), real.cudaStream_t(0)),
        "cudaFree": (1,),
        "cudaFreeHost": (1,),
    }
    answers = {name: getattr(real, name)(*given)[0] for name, given in calls.items()}
    assert {name: answer.name for name, answer in answers.items() if not answer} == {}


def test_gpu(fake: FakeCuda) -> None:
    assert cuda.gpu(0, fake) == Gpu("Fake GPU", "8.9") and str(cuda.gpu(0, fake)) == "Fake GPU (8.9)"
    fake.devices = 0
    with pytest.raises(BackendUnavailable, match=r"cudaErrorNoDevice.*the driver serves CUDA 13\.0"):
        cuda.gpu(0, fake)


def test_round_trip(device: CudaDevice, rng: np.random.Generator) -> None:
    assert isinstance(device, Device)
    for value in (
        rng.standard_normal((2, 3, 4)).astype(np.float32),
        np.array([7]),
        np.zeros((0, 3), np.float16),
        np.array(True),
    ):
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


WHY = {
    "work": "the run was refused while it was captured",
    "end": "the capture did not end well: cudaErrorIllegalAddress: told by the fake",
    "instantiate": "what was captured cannot be made ready: cudaErrorIllegalAddress: told by the fake",
}


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
        with pytest.raises(CaptureFailed, match=WHY[fault]):
            device.capture(work)
    fake.fail = ""
    buffer = device.empty((1,), "int64")
    device.write(buffer, np.array([3]))
    assert device.read(buffer)[0] == 3
    assert fake.graphs == 0


def test_a_failing_gpu(fake: FakeCuda) -> None:
    device = CudaDevice(cudart=fake)
    fake.fail = "cudaStreamSynchronize"
    with pytest.raises(
        BackendUnavailable,
        match=r"Fake GPU .* failed in cudaStreamSynchronize .*cudaErrorIllegalAddress.*start the program",
    ):
        device.synchronize()
    device.close()
    device.close()


def test_buffer_is_a_value() -> None:
    assert (
        Buffer(1, (2,), "int8") == Buffer(1, (2,), "int8")
        and len({Buffer(1, (2,), "int8"), Buffer(1, (3,), "int8")}) == 2
    )


def test_a_device_of_an_index(fake: FakeCuda) -> None:
    fake.devices = 2
    with CudaDevice(1, cudart=fake) as device:
        assert (device.index, str(device.gpu)) == (1, "Fake GPU 1 (8.9)")
        assert fake.device_of(device.empty((4,), "float32").ptr) == 1
    for index in (2, -1):
        with pytest.raises(
            BackendUnavailable, match=f"there is no GPU {index}: CUDA shows 2 here, counted from 0"
        ):
            CudaDevice(index, cudart=fake)


def test_what_was_current_is_so_again(fake: FakeCuda) -> None:
    """In every thread, also after an error: torch, or another device, finds its own GPU."""
    fake.devices = 3
    cudaSetDevice = fake.cudaSetDevice
    cudaSetDevice(2)
    with CudaDevice(1, cudart=fake) as device, CudaDevice(0, cudart=fake) as other:
        uses: list[Callable[[], object]] = [
            lambda: device.write(device.empty((4,), "float32"), np.zeros(4, np.float32)),
            lambda: device.read(device.empty((4,), "float32")),
            lambda: device.free(device.empty((4,), "float32")),
            lambda: device.reserve(100),
            lambda: device.drop(device.capture(lambda: True)),
            lambda: device.write(device.empty((4,), "float32"), np.zeros(4)),
            lambda: device.capture(lambda: False),
            lambda: other.reserve(100),
            device.synchronize,
        ]
        failed = 0

        def work() -> None:
            nonlocal failed
            for use in uses:
                try:
                    use()
                except (GraphError, CaptureFailed):
                    failed += 1

        for before in (2, 1, 0):
            cudaSetDevice(before)
            work()
            assert fake.cudaGetDevice()[1] == before
        thread = threading.Thread(target=work)
        thread.start()
        thread.join()
        assert failed == 8
        assert fake.device_of(device.scratch[0]) == 1 and fake.device_of(other.scratch[0]) == 0
        cudaSetDevice(2)
    assert fake.cudaGetDevice()[1] == 2 and fake.live() == {}


@pytest.mark.parametrize("driver", [12040, 12090])
def test_bindings_that_are_newer_than_the_driver(fake: FakeCuda, driver: int) -> None:
    """CUDA serves programs of its own major version and of older ones."""
    fake.driver, fake.version = driver, 13020
    served = f"{driver // 1000}.{driver % 1000 // 10}"
    with pytest.raises(BackendUnavailable) as caught:
        CudaDevice(cudart=fake)
    text = str(caught.value)
    assert f"need a driver for CUDA 13, and this one serves CUDA {served}: update the driver, or" in text
    assert text.endswith("pip install 'cuda-bindings>=12,<13'") and "\n" not in text


@pytest.mark.parametrize(("driver", "version"), [(13000, 12090), (13000, 13050), (12040, 12090)])
def test_bindings_that_the_driver_serves(fake: FakeCuda, driver: int, version: int) -> None:
    fake.driver, fake.version = driver, version
    CudaDevice(cudart=fake).close()


def test_a_closed_device(fake: FakeCuda) -> None:
    device = CudaDevice(cudart=fake)
    buffer = device.empty((4,), "float32")
    device.close()
    uses = (device.synchronize, lambda: device.read(buffer), lambda: device.stream, lambda: device.replay(1))
    for use in uses:
        with pytest.raises(
            BackendUnavailable, match=r"the device Fake GPU \(8\.9\) is closed: open it again"
        ):
            use()


@pytest.mark.parametrize(
    "function", ["cudaMalloc", "cudaMallocHost", "cudaEventQuery", "cudaStreamSynchronize"]
)
def test_the_fake_refuses_what_would_end_a_capture(device: CudaDevice, fake: FakeCuda, function: str) -> None:
    """What the tests of captures rest on."""
    large, small = device.empty((1 << 16,), "int8"), device.empty((1,), "int8")
    device.write(small, np.zeros(1, np.int8))
    uses: dict[str, Callable[[], object]] = {
        "cudaMalloc": lambda: device.empty((1,), "int8"),
        "cudaMallocHost": lambda: cuda.CudaDevice._call(device, "cudaMallocHost", 4096),
        "cudaEventQuery": lambda: device.write(large, np.zeros(1 << 16, np.int8)),
        "cudaStreamSynchronize": device.synchronize,
    }

    def work() -> bool:
        uses[function]()
        return True

    with pytest.raises(AssertionError, match="inside a capture"):
        device.capture(work)
