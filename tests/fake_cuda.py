"""A fake of the CUDA runtime and of TensorRT's runtime side, for tests of the logic around them on machines with no GPU.

Its "GPU memory" is the host's, so that addresses can be read with ctypes. Its one stream only queues: work runs when the host waits,
as late as a real GPU may be.
"""

from __future__ import annotations

import ctypes
from collections.abc import Callable
from enum import Enum, IntEnum
from types import SimpleNamespace
from typing import Any

import numpy as np


class _Error(IntEnum):
    cudaSuccess = 0
    cudaErrorMemoryAllocation = 2
    cudaErrorNoDevice = 100
    cudaErrorNotReady = 600
    cudaErrorIllegalAddress = 700


class _Kind(IntEnum):
    cudaMemcpyHostToDevice = 1
    cudaMemcpyDeviceToHost = 2


class _Mode(IntEnum):
    cudaStreamCaptureModeThreadLocal = 1


OK = _Error.cudaSuccess
ALIGNMENT = 256


class FakeCuda:
    """Stands for the module cuda.bindings.runtime. `fail` names a function that fails; `limit` is the memory in bytes."""

    cudaError_t = _Error
    cudaMemcpyKind = _Kind
    cudaStreamCaptureMode = _Mode
    cudaStreamNonBlocking = 1
    cudaEventDisableTiming = 2

    def __init__(self) -> None:
        self.devices, self.limit, self.fail = 1, 1 << 30, ""
        self._memory: dict[int, tuple[np.ndarray, int, bool]] = {}
        self._stream: list[Callable[[], object]] = []
        self._captured: list[Callable[[], object]] | None = None
        self.graphs = 0
        self.launches = 0
        self._events: dict[int, bool] = {}
        self._handles = 0
        self._streams = 0

    def live(self) -> dict[int, int]:
        """Bytes by address of what is allocated, events and streams included as addresses below 0."""
        more = {-i - 1: 0 for i in range(len(self._events) + self._streams + self.graphs)}
        return {**{ptr: size for ptr, (_, size, _) in self._memory.items()}, **more}

    def pinned(self) -> int:
        return sum(pinned for _, _, pinned in self._memory.values())

    @property
    def queued(self) -> int:
        return len(self._stream)

    def array(self, ptr: int, shape: tuple[int, ...], dtype: str) -> np.ndarray:
        """The memory at an address; fails where that is not allocated."""
        nbytes = int(np.prod(shape)) * np.dtype(dtype).itemsize
        assert any(base <= ptr and ptr + nbytes <= base + max(size, 1) for base, (_, size, _) in self._memory.items()), "not allocated"
        return np.frombuffer((ctypes.c_char * nbytes).from_address(ptr), dtype).reshape(shape)

    def enqueue(self, work: Callable[[], object]) -> bool:
        (self._stream if self._captured is None else self._captured).append(work)
        return True

    def _new(self, size: int, pinned: bool) -> tuple[_Error, int | None]:
        if sum(s for _, s, _ in self._memory.values()) + size > self.limit:
            return _Error.cudaErrorMemoryAllocation, None
        block = np.zeros(size + ALIGNMENT, np.uint8)
        ptr = -(-block.ctypes.data // ALIGNMENT) * ALIGNMENT
        self._memory[ptr] = (block, size, pinned)
        return OK, ptr

    def _handle(self) -> int:
        self._handles += 1
        return self._handles

    def cudaGetDeviceCount(self) -> tuple[_Error, int | None]:
        return (OK, self.devices) if self.devices else (_Error.cudaErrorNoDevice, None)

    def cudaDriverGetVersion(self) -> tuple[_Error, int]:
        return OK, 13000

    def cudaGetDeviceProperties(self, device: int) -> tuple[_Error, Any]:
        return OK, SimpleNamespace(name=b"Fake GPU\0\0", major=8, minor=9)

    def cudaGetErrorString(self, error: _Error) -> tuple[_Error, bytes]:
        return OK, b"told by the fake"

    def cudaGetLastError(self) -> tuple[_Error]:
        return (OK,)

    def cudaSetDevice(self, device: int) -> tuple[_Error]:
        return (OK,)

    def cudaStreamCreateWithFlags(self, flags: int) -> tuple[_Error, int]:
        self._streams += 1
        return OK, self._handle()

    def cudaStreamDestroy(self, stream: int) -> tuple[_Error]:
        self._streams -= 1
        return (OK,)

    def cudaStreamSynchronize(self, stream: int) -> tuple[_Error]:
        if self.fail == "cudaStreamSynchronize":
            return (_Error.cudaErrorIllegalAddress,)
        assert self._captured is None, "a wait inside a capture"
        while self._stream:
            self._stream.pop(0)()
        return (OK,)

    def cudaMalloc(self, size: int) -> tuple[_Error, int | None]:
        return self._new(size, False)

    def cudaMallocHost(self, size: int) -> tuple[_Error, int | None]:
        return self._new(size, True)

    def cudaFree(self, ptr: int) -> tuple[_Error]:
        assert not self._stream, "memory freed under queued work"
        assert not self._memory[ptr][2]
        del self._memory[ptr]
        return (OK,)

    def cudaFreeHost(self, ptr: int) -> tuple[_Error]:
        assert not self._stream and self._memory[ptr][2]
        del self._memory[ptr]
        return (OK,)

    def cudaMemcpyAsync(self, target: int, source: int, size: int, kind: _Kind, stream: int) -> tuple[_Error]:
        self.enqueue(lambda: ctypes.memmove(target, source, size))
        return (OK,)

    def cudaEventCreateWithFlags(self, flags: int) -> tuple[_Error, int]:
        handle = self._handle()
        self._events[handle] = True
        return OK, handle

    def cudaEventRecord(self, event: int, stream: int) -> tuple[_Error]:
        self._events[event] = False
        self.enqueue(lambda: self._events.__setitem__(event, True))
        return (OK,)

    def cudaEventQuery(self, event: int) -> tuple[_Error]:
        return (OK if self._events[event] else _Error.cudaErrorNotReady,)

    def cudaEventDestroy(self, event: int) -> tuple[_Error]:
        del self._events[event]
        return (OK,)

    def cudaStreamBeginCapture(self, stream: int, mode: _Mode) -> tuple[_Error]:
        self._captured = []
        return (OK,)

    def cudaStreamEndCapture(self, stream: int) -> tuple[_Error, Any]:
        work, self._captured = self._captured, None
        return (_Error.cudaErrorIllegalAddress, None) if self.fail == "cudaStreamEndCapture" else (OK, work)

    def cudaGraphInstantiate(self, graph: Any, flags: int) -> tuple[_Error, Any]:
        if self.fail == "cudaGraphInstantiate":
            return _Error.cudaErrorIllegalAddress, None
        self.graphs += 1
        return OK, tuple(graph)

    def cudaGraphDestroy(self, graph: Any) -> tuple[_Error]:
        return (OK,)

    def cudaGraphLaunch(self, graph: Any, stream: int) -> tuple[_Error]:
        self.launches += 1
        for work in graph:
            self.enqueue(work)
        return (OK,)

    def cudaGraphExecDestroy(self, graph: Any) -> tuple[_Error]:
        self.graphs -= 1
        return (OK,)


class _DataType(Enum):
    FLOAT = 0
    INT64 = 1


class _IOMode(Enum):
    INPUT = 1
    OUTPUT = 2


class _Diagnostics(IntEnum):
    VERSION_MISMATCH = 1
    UNSUPPORTED_CC = 2
    OLD_CUDA_DRIVER = 4
    MALFORMED_ENGINE = 32


class FakeContext:
    """epsilon = 2 sample + timestep, over (B, 4), B from 1 to 8."""

    def __init__(self, trt: FakeTensorRT, capturable: bool) -> None:
        self.trt, self.shapes, self.addresses, self.scratch, self._flushed = trt, {}, {}, (0, 0), None
        if trt.rtx:
            self.is_stream_capturable = lambda stream: capturable

    def set_input_shape(self, name: str, shape: tuple[int, ...]) -> bool:
        self.shapes[name] = tuple(shape)
        return True

    def get_tensor_shape(self, name: str) -> tuple[int, ...]:
        return self.shapes["sample"] if name == "epsilon" else self.shapes[name]

    def set_tensor_address(self, name: str, address: int) -> bool:
        self.addresses[name] = address
        return True

    def set_device_memory(self, ptr: int, size: int) -> None:
        assert ptr % 256 == 0 and size >= self.trt.scratch
        self.scratch = (ptr, size)

    def execute_async_v3(self, stream: int) -> bool:
        cuda, addresses, shapes, scratch = self.trt.cuda, dict(self.addresses), dict(self.shapes), self.scratch
        self.trt.enqueued += 1
        if self.trt.broken or shapes["sample"][0] != shapes["timestep"][0]:
            self.trt.logger.log(SimpleNamespace(name="ERROR"), "the fake\nbroke")
            return False
        if cuda._captured is not None:
            assert self._flushed == shapes, "captured with no run of these shapes before"
        self._flushed = shapes

        def run() -> None:
            cuda.array(scratch[0], (self.trt.scratch,), "uint8")[:] = 1
            x = cuda.array(addresses["sample"], shapes["sample"], "float32")
            t = cuda.array(addresses["timestep"], shapes["timestep"], "int64")
            cuda.array(addresses["epsilon"], shapes["sample"], "float32")[:] = 2 * x + t[:, None]

        return cuda.enqueue(run)


class FakeCache:
    """A runtime cache: takes only what begins with "cache", and counts."""

    def __init__(self) -> None:
        self.content = b"cache"

    def deserialize(self, blob: bytes) -> bool:
        if blob.startswith(b"cache"):
            self.content = blob
        return blob.startswith(b"cache")

    def serialize(self) -> bytes:
        return self.content + b"+"


class FakeTensorRT:
    """Stands for the module tensorrt_rtx (`rtx`) or tensorrt. Engine files hold b"good", b"old" or b"foreign"; all else is damaged."""

    __name__ = "fake_tensorrt"
    __version__ = "1.0"
    TensorIOMode = _IOMode
    EngineInvalidityDiagnostics = _Diagnostics
    DynamicShapesKernelSpecializationStrategy = SimpleNamespace(EAGER="eager")
    ExecutionContextAllocationStrategy = SimpleNamespace(USER_MANAGED="user")

    class ILogger:
        pass

    def __init__(self, cuda: FakeCuda, *, rtx: bool = True, scratch: int = 1000, capturable: bool = True) -> None:
        self.cuda, self.rtx, self.scratch, self.capturable = cuda, rtx, scratch, capturable
        self.enqueued, self.broken, self.logger, self.config = 0, False, None, None

    def Runtime(self, logger: Any) -> Any:
        self.logger = logger
        answers = {b"good": 0, b"old": 1, b"foreign": 2, b"driver": 4}
        told = {
            b"old": "Version tag does not match. Note: Current Version: 240, Serialized Engine Version: 239",
            b"foreign": "The engine plan file is generated on an incompatible device, expecting compute 8.6 got compute 8.9, please rebuild.",
            b"driver": "cudaError 35: CUDA driver version is insufficient for CUDA runtime version",
        }

        def load(blob: bytes) -> Any:
            if blob == b"good":
                return self._engine()
            logger.log(SimpleNamespace(name="ERROR"), told.get(blob, "Magic tag does not match"))
            return None

        if self.rtx:
            return SimpleNamespace(deserialize_cuda_engine=load, get_engine_validity=lambda blob: ("validity", answers.get(blob, 32)))
        return SimpleNamespace(deserialize_cuda_engine=load)

    def _engine(self) -> Any:
        names = ["timestep", "epsilon", "sample"]
        shapes = {"timestep": (-1,), "epsilon": (-1, 4), "sample": (-1, 4)}
        engine = SimpleNamespace(
            num_io_tensors=3,
            device_memory_size_v2=self.scratch,
            get_tensor_name=names.__getitem__,
            get_tensor_dtype=lambda name: _DataType.INT64 if name == "timestep" else _DataType.FLOAT,
            get_tensor_shape=shapes.__getitem__,
            get_tensor_mode=lambda name: _IOMode.OUTPUT if name == "epsilon" else _IOMode.INPUT,
            get_tensor_profile_shape=lambda name, profile: [(n, *shapes[name][1:]) for n in (1, 4, 8)],
            create_execution_context=self._context,
        )
        if self.rtx:
            engine.create_runtime_config = self._make_config
        return engine

    def _make_config(self) -> Any:
        self.config = SimpleNamespace(create_runtime_cache=FakeCache)
        self.config.set_execution_context_allocation_strategy = lambda strategy: setattr(self.config, "strategy", strategy)
        self.config.set_runtime_cache = lambda cache: setattr(self.config, "cache", cache)
        return self.config

    def _context(self, how: Any) -> FakeContext:
        assert (how.strategy if self.rtx else how) == "user"
        return FakeContext(self, self.capturable)
