"""A fake of the CUDA runtime, for tests of the logic around it on machines with no GPU.

Its "GPU memory" is the host's, so that addresses can be read with ctypes. Its one stream only queues: work
runs when the host waits, as late as a real GPU may be. New, freed and used-up memory is poisoned, with NaN as
float32. Each call first goes to the real bindings, where they are installed and there is no driver: they take
the arguments or raise TypeError, and then answer with an error.
"""

from __future__ import annotations

import ctypes
import functools
import gc
import threading
from collections.abc import Callable
from dataclasses import dataclass, field
from enum import IntEnum
from types import ModuleType, SimpleNamespace
from typing import Any

import numpy as np

try:
    from cuda.bindings import runtime as _bindings
except ImportError:
    REAL: ModuleType | None = None
else:
    REAL = _bindings if _bindings.cudaGetDeviceCount()[0] else None  # a GPU would act on these addresses


class _Error(IntEnum):
    cudaSuccess = 0
    cudaErrorMemoryAllocation = 2
    cudaErrorNoDevice = 100
    cudaErrorNotReady = 600
    cudaErrorIllegalAddress = 700
    cudaErrorStreamCaptureUnsupported = 900


class _Kind(IntEnum):
    cudaMemcpyHostToDevice = 1
    cudaMemcpyDeviceToHost = 2


class _Mode(IntEnum):
    cudaStreamCaptureModeThreadLocal = 1


OK = _Error.cudaSuccess
ALIGNMENT = 256
POISON = 0xFF
"""Of every byte: NaN as a float, -1 as an integer."""
Work = Callable[[], object]


@dataclass
class _Block:
    """A piece of memory: what holds it, its size, whether it is pinned memory of the host, and its device."""

    array: np.ndarray
    size: int
    pinned: bool
    device: int

    def poison(self) -> None:
        self.array.fill(POISON)


@dataclass
class _Handles:
    """What there is of one kind: number of the handle to its content. No number is given out twice."""

    kind: str
    live: dict[int, Any] = field(default_factory=dict)

    def find(self, handle: Any) -> Any:
        assert int(handle) in self.live, f"{handle} is no {self.kind} that is there"
        return self.live[int(handle)]


def _checked(name: str, method: Callable[..., Any]) -> Callable[..., Any]:
    """The method, once the real function has taken the same arguments."""

    @functools.wraps(method)
    def call(self: FakeCuda, *arguments: Any) -> Any:
        if REAL is not None:
            getattr(REAL, name)(*arguments)
        self.calls.append(name)
        if self.fail != name:
            return method(self, *arguments)
        if name == "cudaStreamEndCapture":  # it ends, and there is nothing
            self._captured = None
        return (self.fail_with, *(None,) * (name in RETURNING))

    return call


RETURNING = frozenset(
    ("cudaMalloc", "cudaMallocHost", "cudaStreamEndCapture", "cudaGraphInstantiate", "cudaGetDevice")
)
"""Functions that return a value besides the error."""


class FakeCuda:
    """Stands for the module cuda.bindings.runtime.

    Attributes:
        devices, limit: how many GPUs there are, and the memory of all in bytes.
        driver, version: CUDA that the driver serves, and that the bindings are of: 13000 is 13.0.
        fail, fail_with: a function that fails, and its error.
        graphs, launches: CUDA graphs that are ready, and how often one was launched.
        calls: names of the functions called, in order.
        current: `device` is the current one, per thread.
    """

    cudaError_t = _Error
    cudaMemcpyKind = _Kind if REAL is None else REAL.cudaMemcpyKind
    cudaStreamCaptureMode = _Mode if REAL is None else REAL.cudaStreamCaptureMode
    cudaStreamNonBlocking = 1
    cudaEventDisableTiming = 2

    def __init_subclass__(cls) -> None:
        raise TypeError("set its attributes instead")

    def __init__(self) -> None:
        self.devices, self.limit, self.fail, self.driver, self.version = 1, 1 << 30, "", 13000, 13000
        self.fail_with = _Error.cudaErrorIllegalAddress
        self.calls: list[str] = []
        self.launches = 0
        self.current = threading.local()
        self._memory: dict[int, _Block] = {}
        self._queue: list[Work] = []
        self._captured: list[Work] | None = None
        self._handles = 0
        self._streams, self._events = _Handles("stream"), _Handles("event")
        self._graphs, self._ready = _Handles("graph"), _Handles("executable graph")

    # What tests look at

    def live(self) -> dict[int, int]:
        """Bytes by address of what is allocated; events, streams and graphs as numbers below 0."""
        kinds = (self._streams, self._events, self._graphs, self._ready)
        more = {-number: 0 for kind in kinds for number in kind.live}
        return {**{ptr: block.size for ptr, block in self._memory.items()}, **more}

    def pinned(self) -> int:
        return sum(block.pinned for block in self._memory.values())

    def device_of(self, ptr: int) -> int:
        """The device on which an address was allocated."""
        return self._memory[ptr].device

    @property
    def graphs(self) -> int:
        return len(self._ready.live)

    @property
    def queued(self) -> int:
        return len(self._queue)

    @property
    def is_capturing(self) -> bool:
        return self._captured is not None

    def array(self, ptr: int, shape: tuple[int, ...], dtype: str) -> np.ndarray:
        """The memory at an address; fails where that is not allocated."""
        nbytes = int(np.prod(shape)) * np.dtype(dtype).itemsize
        blocks = self._memory.items()
        assert any(base <= ptr and ptr + nbytes <= base + max(b.size, 1) for base, b in blocks), (
            "not allocated"
        )
        return np.frombuffer((ctypes.c_char * nbytes).from_address(ptr), dtype).reshape(shape)

    def enqueue(self, work: Work) -> bool:
        """Put work on the stream, or into the graph that is being captured."""
        (self._queue if self._captured is None else self._captured).append(work)
        return True

    # The runtime

    def _forbid_in_capture(self) -> None:
        assert self._captured is None, f"{self.calls[-1]} inside a capture"

    def _new(self, size: int, pinned: bool) -> tuple[_Error, int | None]:
        self._forbid_in_capture()
        if sum(block.size for block in self._memory.values()) + size > self.limit:
            return _Error.cudaErrorMemoryAllocation, None
        array = np.empty(size + ALIGNMENT, np.uint8)
        ptr = -(-array.ctypes.data // ALIGNMENT) * ALIGNMENT
        self._memory[ptr] = _Block(array, size, pinned, self._device())
        self._memory[ptr].poison()
        return OK, ptr

    def _free(self, ptr: int, pinned: bool) -> tuple[_Error]:
        self._forbid_in_capture()
        assert not self._queue, "memory freed under queued work"
        assert self._memory[ptr].pinned == pinned
        self._memory.pop(ptr).poison()
        return (OK,)

    def _device(self) -> int:
        return int(getattr(self.current, "device", 0))

    def _add(self, handles: _Handles, content: Any, kind: str) -> Any:
        """A handle of the real type, where there is one."""
        self._handles += 1
        handles.live[self._handles] = content
        return self._handles if REAL is None else getattr(REAL, kind)(self._handles)

    def _on(self, stream: Any) -> None:
        """The stream is there, and its device is current."""
        assert self._streams.find(stream) == self._device(), "the stream's device is not current"

    def cudaGetDeviceCount(self) -> tuple[_Error, int | None]:
        return (OK, self.devices) if self.devices else (_Error.cudaErrorNoDevice, None)

    def cudaDriverGetVersion(self) -> tuple[_Error, int]:
        return OK, self.driver

    def cudaRuntimeGetVersion(self) -> tuple[_Error, int]:
        return OK, self.version

    def cudaGetDeviceProperties(self, device: int) -> tuple[_Error, Any]:
        name = b"Fake GPU\0\0" if device == 0 else f"Fake GPU {device}".encode()
        return OK, SimpleNamespace(name=name, major=8, minor=9)

    def cudaGetErrorString(self, error: _Error) -> tuple[_Error, bytes]:
        return OK, b"told by the fake"

    def cudaGetLastError(self) -> tuple[_Error]:
        return (OK,)

    def cudaGetDevice(self) -> tuple[_Error, int]:
        return OK, self._device()

    def cudaSetDevice(self, device: int) -> tuple[_Error]:
        assert 0 <= device < self.devices
        self.current.device = device
        return (OK,)

    def cudaStreamCreateWithFlags(self, flags: int) -> tuple[_Error, Any]:
        self._forbid_in_capture()
        return OK, self._add(self._streams, self._device(), "cudaStream_t")

    def cudaStreamDestroy(self, stream: Any) -> tuple[_Error]:
        self._forbid_in_capture()
        self._on(stream)
        del self._streams.live[int(stream)]
        return (OK,)

    def cudaStreamSynchronize(self, stream: Any) -> tuple[_Error]:
        self._forbid_in_capture()
        self._on(stream)
        while self._queue:
            self._queue.pop(0)()
        return (OK,)

    def cudaMalloc(self, size: int) -> tuple[_Error, int | None]:
        return self._new(size, False)

    def cudaMallocHost(self, size: int) -> tuple[_Error, int | None]:
        return self._new(size, True)

    def cudaFree(self, ptr: int) -> tuple[_Error]:
        return self._free(ptr, False)

    def cudaFreeHost(self, ptr: int) -> tuple[_Error]:
        return self._free(ptr, True)

    def cudaMemcpyAsync(self, target: int, source: int, size: int, kind: Any, stream: Any) -> tuple[_Error]:
        self._on(stream)
        self._forbid_in_capture()

        def copy() -> None:
            ctypes.memmove(target, source, size)
            if source in self._memory and self._memory[source].pinned:
                self._memory[source].poison()  # whoever counts on its content is wrong

        self.enqueue(copy)
        return (OK,)

    def cudaEventCreateWithFlags(self, flags: int) -> tuple[_Error, Any]:
        self._forbid_in_capture()
        return OK, self._add(self._events, True, "cudaEvent_t")

    def cudaEventRecord(self, event: Any, stream: Any) -> tuple[_Error]:
        self._on(stream)
        self._events.find(event)
        number = int(event)
        self._events.live[number] = False
        self.enqueue(lambda: self._events.live.__setitem__(number, True))
        return (OK,)

    def cudaEventQuery(self, event: Any) -> tuple[_Error]:
        self._forbid_in_capture()
        return (OK if self._events.find(event) else _Error.cudaErrorNotReady,)

    def cudaEventDestroy(self, event: Any) -> tuple[_Error]:
        self._forbid_in_capture()
        self._events.find(event)
        del self._events.live[int(event)]
        return (OK,)

    def cudaStreamBeginCapture(self, stream: Any, mode: Any) -> tuple[_Error]:
        self._forbid_in_capture()
        self._on(stream)
        assert not gc.isenabled(), "a finaliser may free memory inside this capture"
        self._captured = []
        return (OK,)

    def cudaStreamEndCapture(self, stream: Any) -> tuple[_Error, Any]:
        self._on(stream)
        work, self._captured = self._captured, None
        assert work is not None and not gc.isenabled()
        return OK, self._add(self._graphs, tuple(work), "cudaGraph_t")

    def cudaGraphInstantiate(self, graph: Any, flags: int) -> tuple[_Error, Any]:
        return OK, self._add(self._ready, self._graphs.find(graph), "cudaGraphExec_t")

    def cudaGraphDestroy(self, graph: Any) -> tuple[_Error]:
        self._graphs.find(graph)
        del self._graphs.live[int(graph)]
        return (OK,)

    def cudaGraphLaunch(self, graph: Any, stream: Any) -> tuple[_Error]:
        self._on(stream)
        self.launches += 1
        for work in self._ready.find(graph):
            self.enqueue(work)
        return (OK,)

    def cudaGraphExecDestroy(self, graph: Any) -> tuple[_Error]:
        self._forbid_in_capture()
        assert not self._queue, "a graph destroyed under queued work"
        self._ready.find(graph)
        del self._ready.live[int(graph)]
        return (OK,)


FUNCTIONS = tuple(
    name
    for name, value in vars(FakeCuda).items()
    if name.startswith("cuda") and callable(value) and not isinstance(value, type)
)
for _name in FUNCTIONS:
    setattr(FakeCuda, _name, _checked(_name, getattr(FakeCuda, _name)))
