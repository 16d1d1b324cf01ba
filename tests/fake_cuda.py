"""A fake of the CUDA runtime and of TensorRT's runtime side, for tests of the logic around them on machines with no GPU.

Its "GPU memory" is the host's, so that addresses can be read with ctypes. Its one stream only queues: work runs when the host waits,
as late as a real GPU may be. What an engine computes is a numpy function or an ONNX graph on ONNX Runtime's CPU: a stand-in for the
order of things, for addresses and for lifetimes. Of TensorRT's numbers, kernels and speed it says nothing.
"""

from __future__ import annotations

import ctypes
import weakref
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from enum import Enum, IntEnum
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np

from ptqd_export.backends import OrtEngine


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
    FLOAT = "float32"
    INT64 = "int64"


class _IOMode(Enum):
    INPUT = 1
    OUTPUT = 2


class _Diagnostics(IntEnum):
    VERSION_MISMATCH = 1
    UNSUPPORTED_CC = 2
    OLD_CUDA_DRIVER = 4
    MALFORMED_ENGINE = 32


@dataclass(frozen=True)
class FakeGraph:
    """What an engine computes.

    Attributes:
        tensors: {name: (numpy dtype name, shape, -1 for the rows, of which all have the same number)}, outputs included.
        compute: {input: array} -> {output: array}.
    """

    tensors: Mapping[str, tuple[str, tuple[int, ...]]]
    outputs: tuple[str, ...]
    compute: Callable[[dict[str, np.ndarray]], Mapping[str, np.ndarray]]

    @property
    def inputs(self) -> tuple[str, ...]:
        return tuple(name for name in self.tensors if name not in self.outputs)


TOY = FakeGraph(
    {"timestep": ("int64", (-1,)), "epsilon": ("float32", (-1, 4)), "sample": ("float32", (-1, 4))},
    ("epsilon",),
    lambda feeds: {"epsilon": 2 * feeds["sample"] + feeds["timestep"][:, None]},
)
"""epsilon = 2 sample + timestep, over (B, 4)."""


def onnx_graph(path: Path) -> FakeGraph:
    """An ONNX file, by ONNX Runtime on the CPU when its turn comes."""
    engine = OrtEngine(path)
    specs = (*engine.specs, *engine.output_specs)
    return FakeGraph({s.name: (s.dtype, tuple(-1 if d is None else d for d in s.shape)) for s in specs}, engine.outputs, engine)


class FakeContext:
    """An execution context, which takes 1 to 8 rows. Like a real one it must be alive when its work runs, and as it was when a graph of it runs."""

    def __init__(self, trt: FakeTensorRT, graph: FakeGraph, capturable: bool) -> None:
        self.trt, self.graph, self.shapes, self.addresses, self.scratch, self._flushed = trt, graph, {}, {}, (0, 0), None
        trt.contexts.add(self)
        if trt.rtx:
            self.is_stream_capturable = lambda stream: capturable

    def set_input_shape(self, name: str, shape: tuple[int, ...]) -> bool:
        self.shapes[name] = tuple(shape)
        return True

    def get_tensor_shape(self, name: str) -> tuple[int, ...]:
        rows = max((shape[0] for shape in self.shapes.values()), default=-1)
        return self.shapes.get(name) or tuple(rows if d < 0 else d for d in self.graph.tensors[name][1])

    def set_tensor_address(self, name: str, address: int) -> bool:
        self.addresses[name] = address
        return True

    def set_device_memory(self, ptr: int, size: int) -> None:
        assert ptr % 256 == 0 and size >= self.trt.scratch
        self.scratch = (ptr, size)

    def _state(self) -> tuple[object, ...]:
        return dict(self.shapes), dict(self.addresses), self.scratch

    def execute_async_v3(self, stream: int) -> bool:
        trt, graph, me, state = self.trt, self.graph, weakref.ref(self), self._state()
        cuda, captured = trt.cuda, trt.cuda._captured is not None
        shapes = {name: self.get_tensor_shape(name) for name in graph.tensors}
        addresses, scratch = dict(self.addresses), self.scratch
        trt.enqueued += 1
        if trt.broken or len({shapes[n][0] for n in self.shapes}) > 1:
            trt.logger.log(SimpleNamespace(name="ERROR"), "the fake\nbroke")
            return False
        if captured:
            assert self._flushed == shapes, "captured with no run of these shapes before"
        self._flushed = shapes

        def run() -> None:
            context = me()
            assert context is not None, "the context is gone, and its work is not done"
            assert not captured or context._state() == state, "the context was changed since its graph was captured"
            cuda.array(scratch[0], (trt.scratch,), "uint8")[:] = 1
            arrays = {name: cuda.array(addresses[name], shapes[name], dtype) for name, (dtype, _) in graph.tensors.items()}
            for name, value in graph.compute({n: arrays[n].copy() for n in graph.inputs}).items():
                arrays[name][:] = value

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
    """Stands for the module tensorrt_rtx (`rtx`) or tensorrt.

    Engine files hold b"good" for `TOY`, b"graph " and the path of an ONNX graph, b"old", b"foreign" or b"driver"; all else is damaged.
    """

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
        self.enqueued, self.broken, self.logger, self.config, self.configs = 0, False, None, None, 0
        self.contexts: weakref.WeakSet[FakeContext] = weakref.WeakSet()
        self.most_contexts = 1 << 10

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
                return self._engine(TOY)
            if blob.startswith(b"graph "):
                return self._engine(onnx_graph(Path(blob[6:].decode())))
            logger.log(SimpleNamespace(name="ERROR"), told.get(blob, "Magic tag does not match"))
            return None

        if self.rtx:
            return SimpleNamespace(deserialize_cuda_engine=load, get_engine_validity=lambda blob: ("validity", answers.get(blob, 32)))
        return SimpleNamespace(deserialize_cuda_engine=load)

    def _engine(self, graph: FakeGraph) -> Any:
        shapes = {name: shape for name, (_, shape) in graph.tensors.items()}
        engine = SimpleNamespace(
            num_io_tensors=len(graph.tensors),
            device_memory_size_v2=self.scratch,
            get_tensor_name=list(graph.tensors).__getitem__,
            get_tensor_dtype=lambda name: _DataType(graph.tensors[name][0]),
            get_tensor_shape=shapes.__getitem__,
            get_tensor_mode=lambda name: _IOMode.OUTPUT if name in graph.outputs else _IOMode.INPUT,
            get_tensor_profile_shape=lambda name, profile: [(n, *shapes[name][1:]) for n in (1, 4, 8)],
            create_execution_context=lambda how: self._context(graph, how),
        )
        if self.rtx:
            engine.create_runtime_config = self._make_config
        return engine

    def _make_config(self) -> Any:
        self.configs += 1
        self.config = SimpleNamespace(create_runtime_cache=FakeCache)
        self.config.set_execution_context_allocation_strategy = lambda strategy: setattr(self.config, "strategy", strategy)
        self.config.set_runtime_cache = lambda cache: setattr(self.config, "cache", cache)
        return self.config

    def _context(self, graph: FakeGraph, how: Any) -> FakeContext | None:
        assert (how.strategy if self.rtx else how) == "user"
        if len(self.contexts) >= self.most_contexts:
            self.logger.log(SimpleNamespace(name="ERROR"), "no memory for a context")
            return None
        return FakeContext(self, graph, self.capturable)
