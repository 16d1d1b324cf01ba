"""One NVIDIA GPU through cuda-bindings, which bring the CUDA runtime along: memory, a stream, CUDA graphs."""

from __future__ import annotations

import contextlib
import ctypes
import functools
import gc
import importlib
import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, TypeVar, cast

import numpy as np

from ..core.backend import BACKENDS, TENSORRT, TENSORRT_RTX, install_hint
from ..core.closing import Closing
from ..core.engine import Array
from ..errors import BackendUnavailable, GraphError

BINDINGS = "cuda.bindings.runtime"
STAGING_BLOCKS = 64
"""Most pinned blocks of copies that may be under way; the next copy waits for all of them."""
STAGING_BYTES = 4096
"""Smallest pinned block."""

F = TypeVar("F", bound=Callable[..., Any])


def runtime() -> Any:
    """The CUDA runtime's bindings.

    Raises:
        BackendUnavailable: not installed, or they do not load.
    """
    try:
        return importlib.import_module(BINDINGS)
    except ImportError as error:
        hint, other = install_hint(BACKENDS[TENSORRT].extra), BACKENDS[TENSORRT_RTX].extra
        raise BackendUnavailable(f"a GPU needs cuda-bindings ({error}); {hint}, or '.[{other}]'") from error


@dataclass(frozen=True)
class Gpu:
    """A GPU's product name and compute capability, such as "8.9"."""

    name: str
    capability: str

    def __str__(self) -> str:
        return f"{self.name} ({self.capability})"


def gpu(index: int = 0, cudart: Any = None) -> Gpu:
    """A GPU by its place among those that CUDA shows (CUDA_VISIBLE_DEVICES chooses them).

    Raises:
        BackendUnavailable: the bindings, a driver that serves them, or the GPU is missing.
    """
    cudart = cudart or runtime()
    _, driver = cudart.cudaDriverGetVersion()
    _check_driver(driver, cudart.cudaRuntimeGetVersion()[1])
    error, count = cudart.cudaGetDeviceCount()
    if error or not count:
        told = _told(cudart, error) if error else "CUDA counts 0 of them"
        driven = f"the driver serves CUDA {_version(driver)}" if driver else "there is no NVIDIA driver"
        raise BackendUnavailable(
            f"no NVIDIA GPU that CUDA can use here ({told}; {driven}): choose another backend, or install a "
            "driver and a GPU"
        )
    if not 0 <= index < count:
        raise BackendUnavailable(
            f"there is no GPU {index}: CUDA shows {count} here, counted from 0; choose one of them"
        )
    error, properties = cudart.cudaGetDeviceProperties(index)
    if error:
        raise BackendUnavailable(
            f"the GPU does not answer ({_told(cudart, error)}): see whether nvidia-smi does"
        )
    name = properties.name.split(b"\0")[0].decode(errors="replace")
    return Gpu(name, f"{properties.major}.{properties.minor}")


def _check_driver(driver: int, bindings: int) -> None:
    """That a driver serves a CUDA runtime of these bindings: 12040 is CUDA 12.4, and 0 is no driver.

    Raises:
        BackendUnavailable: it does not; says which cuda-bindings it serves.
    """
    served, needed = driver // 1000, bindings // 1000
    if driver and served < needed:
        raise BackendUnavailable(
            f"the installed cuda-bindings need a driver for CUDA {needed}, and this one serves CUDA "
            f"{_version(driver)}: update the driver, or pip install 'cuda-bindings>={served},<{served + 1}'"
        )


def _version(number: int) -> str:
    return f"{number // 1000}.{number % 1000 // 10}"


def _told(cudart: Any, error: Any) -> str:
    return f"{error.name}: {cudart.cudaGetErrorString(error)[1].decode()}"


@dataclass(frozen=True)
class Buffer:
    """A dense row-major array in the GPU's memory: address, shape and numpy dtype name."""

    ptr: int
    shape: tuple[int, ...]
    dtype: str

    @property
    def nbytes(self) -> int:
        return math.prod(self.shape) * np.dtype(self.dtype).itemsize


class CaptureFailed(Exception):
    """No CUDA graph was made, and why."""


@dataclass
class _Block:
    """Pinned host memory, and the event after the last copy from it."""

    ptr: int
    size: int
    event: Any


def _on_device(method: F) -> F:
    """The method, with the device current while it runs."""

    @functools.wraps(method)
    def guarded(self: CudaDevice, *args: Any, **kwargs: Any) -> Any:
        with self.current():
            return method(self, *args, **kwargs)

    return cast(F, guarded)


class CudaDevice(Closing):
    """A GPU, with one stream on which everything runs in the order of the calls.

    Every call makes the GPU current in its thread and puts back what was, so that torch, or another device,
    is not disturbed. It is used by one thread at a time, whichever it is. `scratch` is the memory that all
    engines of this device share: they run one after the other. Closing frees everything; buffers and engines
    must not be used afterwards.
    """

    def __init__(self, index: int = 0, *, cudart: Any = None) -> None:
        """Open a GPU.

        Args:
            index: its place among those that CUDA shows.
            cudart: bindings to use instead of cuda-bindings' own.
        Raises:
            BackendUnavailable: there is no such GPU that works.
        """
        self._cudart = cudart or runtime()
        self.index = index
        self.gpu = gpu(index, self._cudart)
        self._buffers: dict[int, int] = {}
        self._blocks: list[_Block] = []
        self._graphs: set[Any] = set()
        self.scratch: tuple[int, int] = (0, 0)
        """Address and bytes."""
        with self.current():
            self._stream: Any = self._call("cudaStreamCreateWithFlags", self._cudart.cudaStreamNonBlocking)

    @property
    def stream(self) -> int:
        """The stream's handle.

        Raises:
            BackendUnavailable: the device is closed.
        """
        return int(self._open_stream())

    def _open_stream(self) -> Any:
        if self._stream is None:
            raise BackendUnavailable(f"the device {self.gpu} is closed: open it again")
        return self._stream

    @contextlib.contextmanager
    def current(self) -> Iterator[None]:
        """The GPU is current in this thread, and then again the one that was.

        Raises:
            BackendUnavailable: the GPU failed.
        """
        before = self._call("cudaGetDevice")
        if before != self.index:
            self._call("cudaSetDevice", self.index)
        try:
            yield
        finally:
            if before != self.index:
                self._cudart.cudaSetDevice(
                    before
                )  # an error here is one that the next call of its user meets

    def _call(self, name: str, *arguments: Any) -> Any:
        error, *values = getattr(self._cudart, name)(*arguments)
        if error:
            self._cudart.cudaGetLastError()  # reading it clears it, where it can be cleared
            if error.name == "cudaErrorMemoryAllocation":
                raise BackendUnavailable(
                    f"memory ran out on {self.gpu} in {name}{arguments}: lower the batch size, or end other "
                    "programs on it"
                )
            raise BackendUnavailable(
                f"{self.gpu} failed in {name} ({_told(self._cudart, error)}): start the program again"
            )
        return values[0] if values else None

    @_on_device
    def empty(self, shape: tuple[int, ...], dtype: str) -> Buffer:
        """Memory for an array, contents undefined.

        Raises:
            BackendUnavailable: memory ran out.
        """
        buffer = Buffer(0, shape, dtype)
        ptr = int(self._call("cudaMalloc", max(buffer.nbytes, 1)))
        self._buffers[ptr] = buffer.nbytes
        return Buffer(ptr, shape, dtype)

    @_on_device
    def free(self, buffer: Buffer) -> None:
        """Give the memory back, once all that uses it has run."""
        del self._buffers[buffer.ptr]
        self.synchronize()
        self._call("cudaFree", buffer.ptr)

    @_on_device
    def write(self, buffer: Buffer, array: Array) -> None:
        """Copy an array to the GPU, in turn on the stream; `array` may be changed as soon as this returns.

        Raises:
            GraphError: dtype or shape is not the buffer's.
            BackendUnavailable: memory ran out, or the GPU failed.
        """
        if array.dtype.name != buffer.dtype or array.shape != buffer.shape:
            raise GraphError(
                f"a buffer holds {buffer.dtype} {buffer.shape}: got {array.dtype.name} {array.shape}"
            )
        source = np.ascontiguousarray(array)
        block = self._block(source.nbytes)
        ctypes.memmove(block.ptr, source.ctypes.data, source.nbytes)
        to_device = self._cudart.cudaMemcpyKind.cudaMemcpyHostToDevice
        self._call("cudaMemcpyAsync", buffer.ptr, block.ptr, source.nbytes, to_device, self._open_stream())
        self._call("cudaEventRecord", block.event, self._stream)

    def _block(self, size: int) -> _Block:
        """A pinned block of at least `size` bytes from which no copy is under way.

        Waiting for one would wait for all work queued before it.
        """
        success = self._cudart.cudaError_t.cudaSuccess
        for block in self._blocks:
            if block.size >= size and self._cudart.cudaEventQuery(block.event)[0] == success:
                return block
        if len(self._blocks) >= STAGING_BLOCKS:
            self.synchronize()
            self._drop_blocks()
        size = max(STAGING_BYTES, 1 << (size - 1).bit_length())
        ptr = int(self._call("cudaMallocHost", size))
        block = _Block(ptr, size, self._call("cudaEventCreateWithFlags", self._cudart.cudaEventDisableTiming))
        self._blocks.append(block)
        return block

    def _drop_blocks(self) -> None:
        while self._blocks:
            block = self._blocks.pop()
            self._call("cudaEventDestroy", block.event)
            self._call("cudaFreeHost", block.ptr)

    @_on_device
    def read(self, buffer: Buffer) -> Array:
        """A fresh copy of what the buffer holds after everything queued so far.

        Raises:
            BackendUnavailable: the GPU failed.
        """
        array: Array = np.empty(buffer.shape, buffer.dtype)
        to_host = self._cudart.cudaMemcpyKind.cudaMemcpyDeviceToHost
        self._call(
            "cudaMemcpyAsync", array.ctypes.data, buffer.ptr, array.nbytes, to_host, self._open_stream()
        )
        self.synchronize()
        return array

    @_on_device
    def synchronize(self) -> None:
        """Wait for everything queued so far.

        Raises:
            BackendUnavailable: some of it failed.
        """
        self._call("cudaStreamSynchronize", self._open_stream())

    @_on_device
    def reserve(self, size: int) -> None:
        """Make `scratch` hold at least `size` bytes; it may move, and engines look at it before each run.

        Raises:
            BackendUnavailable: memory ran out; the scratch is what it was.
        """
        if size <= self.scratch[1]:
            return
        # Before the old one is freed: if there is no memory for this one, open engines go on with that.
        ptr = int(self._call("cudaMalloc", size))  # aligned to 256 bytes at least
        old, self.scratch = self.scratch, (ptr, size)
        if old[0]:
            self.synchronize()
            self._call("cudaFree", old[0])

    @_on_device
    def capture(self, work: Callable[[], bool]) -> Any:
        """A CUDA graph of what `work` queues, not run.

        Raises:
            CaptureFailed: `work` says False, or it cannot be captured.
        """
        # Not during the capture: a finaliser that frees the GPU's memory would end it.
        gc.collect()
        collecting = gc.isenabled()
        gc.disable()
        try:
            return self._capture(work)
        finally:
            if collecting:
                gc.enable()

    def _capture(self, work: Callable[[], bool]) -> Any:
        mode = self._cudart.cudaStreamCaptureMode.cudaStreamCaptureModeThreadLocal
        stream = self._open_stream()
        self._call("cudaStreamBeginCapture", stream, mode)
        done = False
        try:
            done = work()
        finally:
            # Ended in any case: a stream left capturing can do nothing else.
            error, graph = self._cudart.cudaStreamEndCapture(stream)
            self._cudart.cudaGetLastError()
            if graph is not None and not done:
                self._cudart.cudaGraphDestroy(graph)
        if not done:
            raise CaptureFailed("the run was refused while it was captured")
        if error:
            raise CaptureFailed(f"the capture did not end well: {_told(self._cudart, error)}")
        error, executable = self._cudart.cudaGraphInstantiate(graph, 0)
        self._cudart.cudaGetLastError()
        self._call("cudaGraphDestroy", graph)
        if error:
            raise CaptureFailed(f"what was captured cannot be made ready: {_told(self._cudart, error)}")
        self._graphs.add(executable)
        return executable

    @_on_device
    def replay(self, graph: Any) -> None:
        """Queue a captured graph.

        Raises:
            BackendUnavailable: the GPU failed.
        """
        self._call("cudaGraphLaunch", graph, self._open_stream())

    @_on_device
    def drop(self, graph: Any) -> None:
        """Destroy a captured graph, once all that uses it has run."""
        self.synchronize()
        self._graphs.discard(graph)
        self._call("cudaGraphExecDestroy", graph)

    def close(self) -> None:
        """Free everything, or nothing after a failure of the GPU; a second call does nothing."""
        if self._stream is None:
            return
        with contextlib.suppress(BackendUnavailable), self.current():
            self.synchronize()
            for graph in self._graphs:
                self._call("cudaGraphExecDestroy", graph)
            for ptr in (*self._buffers, *([self.scratch[0]] if self.scratch[0] else [])):
                self._call("cudaFree", ptr)
            self._drop_blocks()
            self._call("cudaStreamDestroy", self._stream)
        self._graphs, self._buffers, self._blocks, self.scratch, self._stream = set(), {}, [], (0, 0), None
