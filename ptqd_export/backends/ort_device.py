"""ONNX Runtime, on the CPU or on a CUDA GPU.

All sessions of a process share one CPU thread pool: a session's private pool spins between calls and takes
the cores from the others (two warm engines called in turn ran 2.7 times slower on two cores).
"""

from __future__ import annotations

import contextlib
import functools
import importlib.metadata
import io
import os
import re
from collections.abc import Mapping
from typing import Any, Literal

import numpy as np

from ..core.backend import BACKENDS, ORT_CPU, ORT_CUDA, install_hint
from ..core.closing import Closing
from ..core.engine import Array
from ..errors import BackendUnavailable, GraphError

Kind = Literal["cpu", "cuda"]
PROVIDERS: Mapping[Kind, str] = {"cpu": "CPUExecutionProvider", "cuda": "CUDAExecutionProvider"}
NAMES: Mapping[Kind, str] = {"cpu": ORT_CPU, "cuda": ORT_CUDA}
"""The backend of each kind of device."""
DTYPES = {
    "tensor(float)": "float32",
    "tensor(double)": "float64",
    "tensor(float16)": "float16",
    "tensor(int64)": "int64",
    "tensor(int32)": "int32",
    "tensor(int8)": "int8",
    "tensor(uint8)": "uint8",
    "tensor(bool)": "bool",
}
GPU_FAILURE = re.compile(r"\b(CUDA|CUDNN|CUDNN_FE|CUBLAS) failure -?\d+: [^;]*[^; ]")
MAX_TEXT = 400
QUIET = 4
"""Log severity: fatal only. Errors arrive as exceptions, and are told once."""

PRODUCT = (
    b'\x08\x05\x12\x00:>\n\x18\n\x01a\n\x01b\x12\x01y"\rMatMulInteger\x12\x01g'
    b"Z\t\n\x01a\x12\x04\n\x02\x08\x02"
    b"Z\t\n\x01b\x12\x04\n\x02\x08\x03b\t\n\x01y\x12\x04\n\x02\x08\x06B\x04\n\x00\x10\n"
)
"""An ONNX graph: y = MatMulInteger(a, b), of uint8 and int8."""

_threads: int | None = None
_pool_exists = False


def set_threads(n: int) -> None:
    """Set the number of CPU threads that all engines of this process share; by default, its CPUs.

    Raises:
        BackendUnavailable: n < 1, or the first engine was already opened with another number.
    """
    global _threads
    if n < 1:
        raise BackendUnavailable(f"the number of threads is {n}: give at least 1")
    if _pool_exists and n != _threads:
        raise BackendUnavailable(
            f"ONNX Runtime already runs with {_threads} threads, not {n}: set the threads before the first "
            "engine is opened"
        )
    _threads = n


def runtime(kind: Kind = "cpu") -> Any:
    """The onnxruntime module, with a provider for `kind`.

    Raises:
        BackendUnavailable: not installed, installed twice, or without that provider.
    """
    name, hint = NAMES[kind], install_hint(BACKENDS[NAMES[kind]].extra)
    # The CPU's backend runs on either distribution.
    installed = [
        distribution for distribution in BACKENDS[ORT_CPU].distributions if _is_installed(distribution)
    ]
    if len(installed) > 1:
        raise BackendUnavailable(
            f"{' and '.join(installed)} are both installed and overwrite each other's files: pip uninstall "
            f"both, then, {hint}"
        )
    try:
        import onnxruntime
    except ImportError as error:
        raise BackendUnavailable(f"backend {name} needs onnxruntime ({error}); {hint}") from error
    if PROVIDERS[kind] not in onnxruntime.get_available_providers():
        raise BackendUnavailable(
            f"backend {name} needs {PROVIDERS[kind]}, which the installed onnxruntime "
            f"{onnxruntime.__version__} was built without: pip uninstall "
            f"{' '.join(installed) or 'onnxruntime'}, then, {hint}"
        )
    return onnxruntime


def _is_installed(distribution: str) -> bool:
    try:
        importlib.metadata.version(distribution)
    except importlib.metadata.PackageNotFoundError:
        return False
    return True


def _load_cuda(ort: Any, index: int) -> None:
    """Load the CUDA libraries (those from pip packages too) and take a byte of the GPU of this index.

    Raises:
        BackendUnavailable: a library is missing, or there is no GPU or driver.
    """
    ort.set_default_logger_severity(QUIET)  # the libraries are loaded outside of any session
    printed = io.StringIO()
    if hasattr(ort, "preload_dlls"):
        with contextlib.redirect_stdout(printed):
            ort.preload_dlls()
    try:
        ort.OrtValue.ortvalue_from_shape_and_type([1], np.uint8, "cuda", index)
    except Exception as error:  # onnxruntime's own exceptions share no base but Exception
        text = one_line(error)
        if "CUDA Provider not available" in text:  # onnxruntime gives its cause to its log alone
            text = "its CUDA provider does not load: the NVIDIA driver or a library is missing"
        reason = printed.getvalue().partition("\n")[0] or text
        raise BackendUnavailable(
            f"backend {ORT_CUDA} finds no CUDA GPU {index} that works ({reason}): it needs an NVIDIA GPU, "
            f"its driver, and the CUDA libraries that onnxruntime {ort.__version__} was built for; "
            f"{install_hint(BACKENDS[ORT_CUDA].extra)}"
        ) from error


def threads() -> int:
    """The number of CPU threads that engines of this process use."""
    if _threads is not None:
        return _threads
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def share_pool(ort: Any) -> None:
    """Create the one thread pool before the first session."""
    global _threads, _pool_exists
    if _pool_exists:
        return
    _threads = threads()
    try:
        ort.set_global_thread_pool_sizes(_threads, 1)
    except Exception as error:
        raise BackendUnavailable(
            f"ONNX Runtime's thread pool cannot be set ({one_line(error)}): open no other global-pool "
            "session first"
        ) from error
    _pool_exists = True


@functools.cache
def saturates() -> bool:
    """Whether ONNX Runtime's products of uint8 and int8 are wrong here where both are large.

    They are on x86 without VNNI instructions, which adds pairs of them in 16 bits
    (microsoft/onnxruntime#14642).

    Raises:
        BackendUnavailable: as `runtime`.
    """
    ort = runtime()
    share_pool(ort)
    options = ort.SessionOptions()
    options.use_per_session_threads = False
    options.log_severity_level = QUIET
    a, b = np.full((1, 16), 255, np.uint8), np.full((16, 16), 127, np.int8)
    session = ort.InferenceSession(PRODUCT, options, providers=[PROVIDERS["cpu"]])
    (y,) = session.run(None, {"a": a, "b": b})
    return not np.array_equal(y, a.astype(np.int32) @ b.astype(np.int32))


def one_line(error: Exception) -> str:
    """An error's text, at most MAX_TEXT characters, as it may quote a whole file.

    Of a failure of the GPU what CUDA said, without onnxruntime's source locations.
    """
    text = " ".join(str(error).split())
    told = GPU_FAILURE.search(text)
    text = told[0] if told else text
    return text if len(text) <= MAX_TEXT else text[:MAX_TEXT] + "..."


class OrtDevice(Closing):
    """The memory that engines of one kind run in, as a `Device`: buffers are `onnxruntime.OrtValue`.

    Attributes:
        kind, index: the host's memory, or that of a CUDA GPU by its place among those that CUDA shows.
    """

    def __init__(self, kind: Kind = "cpu", index: int = 0) -> None:
        """Check that `kind` works here.

        Raises:
            BackendUnavailable: onnxruntime or its provider is missing, or there is no such GPU that works.
        """
        self.kind, self.index = kind, index
        self._ort: Any = runtime(kind)
        if kind == "cuda":
            _load_cuda(self._ort, index)
        elif index:
            raise BackendUnavailable(
                f"backend {ORT_CPU} has one device, the host: got index {index}, expected 0"
            )

    @property
    def ort(self) -> Any:
        """The onnxruntime module.

        Raises:
            BackendUnavailable: the device is closed.
        """
        if self._ort is None:
            raise BackendUnavailable(f"the {self.kind} device is closed: open it again")
        return self._ort

    def empty(self, shape: tuple[int, ...], dtype: str) -> Any:
        """A buffer of arbitrary content, which lives as long as it is referred to, past `close` too.

        Raises:
            BackendUnavailable: memory ran out, or the device is closed.
        """
        try:
            return self.ort.OrtValue.ortvalue_from_shape_and_type(
                list(shape), np.dtype(dtype).type, self.kind, self.index
            )
        except (MemoryError, RuntimeError) as error:
            raise BackendUnavailable(
                f"no {self.kind} memory for a buffer {dtype} {shape} ({one_line(error)}): lower the batch "
                "size"
            ) from error

    def write(self, buffer: Any, array: Array) -> None:
        """Copy `array` into `buffer`, of the same dtype and shape; `array` is free again on return.

        Raises:
            GraphError: another dtype or shape, which ONNX Runtime would reinterpret.
        """
        dtype, shape = layout(buffer)
        if (array.dtype.name, array.shape) != (dtype, shape):
            raise GraphError(f"the buffer holds {dtype} {shape}: got {array.dtype.name} {array.shape}")
        buffer.update_inplace(np.ascontiguousarray(array).reshape(shape))

    def read(self, buffer: Any) -> Array:
        """A fresh copy of `buffer`."""
        return np.array(buffer.numpy())  # on the host, numpy() is a view of the buffer

    def synchronize(self) -> None:
        """Nothing to wait for: `launch`, `write` and `read` return when they are done."""

    def close(self) -> None:
        """Give no more buffers; a second call does nothing."""
        self._ort = None


def layout(buffer: Any) -> tuple[str, tuple[int, ...]]:
    """(numpy dtype name, shape) of an OrtValue."""
    return DTYPES.get(buffer.data_type(), buffer.data_type()), tuple(buffer.shape())
