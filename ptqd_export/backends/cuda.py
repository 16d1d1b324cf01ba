"""One NVIDIA GPU: memory, a stream and CUDA graphs, through cuda-bindings (which bring the CUDA runtime along); no torch."""

from __future__ import annotations

import contextlib
import ctypes
import importlib
import math
from collections.abc import Callable
from dataclasses import dataclass
from types import TracebackType
from typing import Any, Self

import numpy as np

from ..engine import Array
from ..errors import BackendUnavailable, GraphError

BINDINGS = "cuda.bindings.runtime"
STAGING_BLOCKS = 64
"""Most pinned blocks of copies that may be under way; the next copy waits for all of them."""
STAGING_BYTES = 4096
"""Smallest pinned block."""


def runtime() -> Any:
    """The CUDA runtime's bindings.

    Raises:
        BackendUnavailable: not installed, or they do not load.
    """
    try:
        return importlib.import_module(BINDINGS)
    except ImportError as error:
        raise BackendUnavailable(
            f"a GPU needs cuda-bindings ({error}): pip install 'ptqd-export[tensorrt]' or 'ptqd-export[tensorrt-rtx]'"
        ) from error


@dataclass(frozen=True)
class Gpu:
    """A GPU's product name and compute capability, such as "8.9"."""

    name: str
    capability: str

    def __str__(self) -> str:
        return f"{self.name} ({self.capability})"


def gpu(cudart: Any = None) -> Gpu:
    """The first GPU that CUDA shows (CUDA_VISIBLE_DEVICES chooses it).

    Raises:
        BackendUnavailable: the bindings, the driver or the GPU is missing.
    """
    cudart = cudart or runtime()
    error, count = cudart.cudaGetDeviceCount()
    if error or not count:
        told = _told(cudart, error) if error else "CUDA counts 0 of them"
        _, driver = cudart.cudaDriverGetVersion()
        driven = f"the driver serves CUDA {driver // 1000}.{driver % 1000 // 10}" if driver else "there is no NVIDIA driver"
        raise BackendUnavailable(f"no NVIDIA GPU that CUDA can use here ({told}; {driven}): choose another backend, or install a driver and a GPU")
    error, properties = cudart.cudaGetDeviceProperties(0)
    if error:
        raise BackendUnavailable(f"the GPU does not answer ({_told(cudart, error)}): see whether nvidia-smi does")
    return Gpu(properties.name.split(b"\0")[0].decode(errors="replace"), f"{properties.major}.{properties.minor}")


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


@dataclass
class _Block:
    """Pinned host memory, and the event after the last copy from it."""

    ptr: int
    size: int
    event: Any


class CudaDevice:
    """The first GPU, with one stream on which everything runs in the order of the calls.

    `scratch` is the memory that all engines of this device share: they run one after the other. Closing frees everything;
    buffers and engines must not be used afterwards.
    """

    def __init__(self, cudart: Any = None) -> None:
        """Args: cudart: bindings to use instead of cuda-bindings' own.

        Raises:
            BackendUnavailable: there is no GPU that works.
        """
        self._cudart = cudart or runtime()
        self.gpu = gpu(self._cudart)
        self._buffers: dict[int, int] = {}
        self._blocks: list[_Block] = []
        self._graphs: set[Any] = set()
        self.scratch: tuple[int, int] = (0, 0)
        """Address and bytes."""
        self._call("cudaSetDevice", 0)
        self._stream: Any = self._call("cudaStreamCreateWithFlags", self._cudart.cudaStreamNonBlocking)

    @property
    def stream(self) -> int:
        """The stream's handle."""
        return int(self._stream)

    def _call(self, name: str, *arguments: Any) -> Any:
        error, *values = getattr(self._cudart, name)(*arguments)
        if error:
            self._cudart.cudaGetLastError()  # reading it clears it, where it can be cleared
            if error.name == "cudaErrorMemoryAllocation":
                raise BackendUnavailable(f"memory ran out on {self.gpu} in {name}{arguments}: lower the batch size, or end other programs on it")
            raise BackendUnavailable(f"{self.gpu} failed in {name} ({_told(self._cudart, error)}): start the program again")
        return values[0] if values else None

    def empty(self, shape: tuple[int, ...], dtype: str) -> Buffer:
        """Memory for an array, contents undefined.

        Raises:
            BackendUnavailable: memory ran out.
        """
        buffer = Buffer(0, shape, dtype)
        ptr = int(self._call("cudaMalloc", max(buffer.nbytes, 1)))
        self._buffers[ptr] = buffer.nbytes
        return Buffer(ptr, shape, dtype)

    def free(self, buffer: Buffer) -> None:
        """Give the memory back, once all that uses it has run."""
        del self._buffers[buffer.ptr]
        self.synchronize()
        self._call("cudaFree", buffer.ptr)

    def write(self, buffer: Buffer, array: Array) -> None:
        """Copy an array to the GPU, in turn on the stream; `array` may be changed as soon as this returns.

        Raises:
            GraphError: dtype or shape is not the buffer's.
            BackendUnavailable: memory ran out, or the GPU failed.
        """
        if array.dtype.name != buffer.dtype or array.shape != buffer.shape:
            raise GraphError(f"a buffer holds {buffer.dtype} {buffer.shape}: got {array.dtype.name} {array.shape}")
        source = np.ascontiguousarray(array)
        block = self._block(source.nbytes)
        ctypes.memmove(block.ptr, source.ctypes.data, source.nbytes)
        self._call("cudaMemcpyAsync", buffer.ptr, block.ptr, source.nbytes, self._cudart.cudaMemcpyKind.cudaMemcpyHostToDevice, self._stream)
        self._call("cudaEventRecord", block.event, self._stream)

    def _block(self, size: int) -> _Block:
        """A pinned block of at least `size` bytes from which no copy is under way: waiting for one would wait for all work queued before it."""
        for block in self._blocks:
            if block.size >= size and self._cudart.cudaEventQuery(block.event)[0] == self._cudart.cudaError_t.cudaSuccess:
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

    def read(self, buffer: Buffer) -> Array:
        """A fresh copy of what the buffer holds after everything queued so far.

        Raises:
            BackendUnavailable: the GPU failed.
        """
        array: Array = np.empty(buffer.shape, buffer.dtype)
        self._call("cudaMemcpyAsync", array.ctypes.data, buffer.ptr, array.nbytes, self._cudart.cudaMemcpyKind.cudaMemcpyDeviceToHost, self._stream)
        self.synchronize()
        return array

    def synchronize(self) -> None:
        """Wait for everything queued so far.

        Raises:
            BackendUnavailable: some of it failed.
        """
        self._call("cudaStreamSynchronize", self._stream)

    def reserve(self, size: int) -> None:
        """Make `scratch` hold at least `size` bytes; it may move, so engines look at its address before each run.

        Raises:
            BackendUnavailable: memory ran out; the scratch is what it was.
        """
        if size <= self.scratch[1]:
            return
        # Before the old one is freed, which engines that are open go on with if there is no memory for this one.
        ptr = int(self._call("cudaMalloc", size))  # aligned to 256 bytes at least
        old, self.scratch = self.scratch, (ptr, size)
        if old[0]:
            self.synchronize()
            self._call("cudaFree", old[0])

    def capture(self, work: Callable[[], bool]) -> Any:
        """A CUDA graph of what `work` queues, not run; None where `work` says False or it cannot be captured."""
        mode = self._cudart.cudaStreamCaptureMode.cudaStreamCaptureModeThreadLocal
        self._call("cudaStreamBeginCapture", self._stream, mode)
        done = False
        try:
            done = work()
        finally:
            # Ended in any case: a stream left capturing can do nothing else.
            error, graph = self._cudart.cudaStreamEndCapture(self._stream)
            self._cudart.cudaGetLastError()
        if error:
            return None
        executable = None
        if done:
            error, executable = self._cudart.cudaGraphInstantiate(graph, 0)
            self._cudart.cudaGetLastError()
        self._call("cudaGraphDestroy", graph)
        if not done or error:
            return None
        self._graphs.add(executable)
        return executable

    def replay(self, graph: Any) -> None:
        """Queue a captured graph.

        Raises:
            BackendUnavailable: the GPU failed.
        """
        self._call("cudaGraphLaunch", graph, self._stream)

    def drop(self, graph: Any) -> None:
        """Destroy a captured graph, once all that uses it has run."""
        self._graphs.discard(graph)
        self.synchronize()
        self._call("cudaGraphExecDestroy", graph)

    def close(self) -> None:
        """Free everything; a second call does nothing. After a failure of the GPU nothing can be freed: that is no further error."""
        if self._stream is None:
            return
        graphs, self._graphs = self._graphs, set()
        buffers, self._buffers = self._buffers, {}
        scratch, self.scratch = self.scratch, (0, 0)
        with contextlib.suppress(BackendUnavailable):
            self.synchronize()
            for graph in graphs:
                self._call("cudaGraphExecDestroy", graph)
            for ptr in (*buffers, *([scratch[0]] if scratch[0] else [])):
                self._call("cudaFree", ptr)
            self._drop_blocks()
            self._call("cudaStreamDestroy", self._stream)
        self._stream = None

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self.close()
