"""ONNX Runtime on the CPU.

All sessions of a process share one thread pool: a session's private pool spins between calls and takes the cores from
the others (two warm engines called in turn ran 2.7 times slower on two cores).
"""

from __future__ import annotations

import importlib.metadata
import os
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import numpy as np

from ..engine import Array, Feeds, TensorSpec
from ..errors import BackendUnavailable, GraphError

PROVIDER = "CPUExecutionProvider"
DISTRIBUTIONS = ("onnxruntime", "onnxruntime-gpu")
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
QUIET = 4
"""Log severity: fatal only. Errors arrive as exceptions, and are told once."""

_threads: int | None = None
_pool_exists = False


def set_threads(n: int) -> None:
    """Set the number of threads that all engines of this process share; the default is the CPUs this process may use.

    Raises:
        BackendUnavailable: n < 1, or the first engine was already opened with another number.
    """
    global _threads
    if n < 1:
        raise BackendUnavailable(f"the number of threads is {n}: give at least 1")
    if _pool_exists and n != _threads:
        raise BackendUnavailable(f"ONNX Runtime already runs with {_threads} threads, not {n}: set the threads before the first engine is opened")
    _threads = n


def runtime() -> Any:
    """The onnxruntime module.

    Raises:
        BackendUnavailable: not installed, or installed twice.
    """
    installed = [name for name in DISTRIBUTIONS if _is_installed(name)]
    if len(installed) > 1:
        raise BackendUnavailable(
            f"{' and '.join(installed)} are both installed and overwrite each other's files: "
            "pip uninstall both, then pip install 'ptqd-export[cpu]' or 'ptqd-export[gpu]'"
        )
    try:
        import onnxruntime
    except ImportError as error:
        raise BackendUnavailable(f"backend ort-cpu needs onnxruntime ({error}): pip install 'ptqd-export[cpu]'") from error
    return onnxruntime


def _is_installed(distribution: str) -> bool:
    try:
        importlib.metadata.version(distribution)
    except importlib.metadata.PackageNotFoundError:
        return False
    return True


def _share_pool(ort: Any) -> None:
    """Create the one thread pool before the first session."""
    global _threads, _pool_exists
    if _pool_exists:
        return
    if _threads is None:
        _threads = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    try:
        ort.set_global_thread_pool_sizes(_threads, 1)
    except Exception as error:  # onnxruntime's own exceptions share no base but Exception
        raise BackendUnavailable(f"ONNX Runtime's thread pool cannot be set ({_one_line(error)}): open no other global-pool session first") from error
    _pool_exists = True


def _one_line(error: Exception) -> str:
    return " ".join(str(error).split())


class OrtEngine:
    """An ONNX file on ONNX Runtime's CPU provider, as an `Engine`.

    Outputs are fresh arrays that the caller owns. The same file, version and number of threads repeats itself exactly.
    """

    def __init__(self, path: Path, *, optimised_path: Path | None = None, optimise: bool = True) -> None:
        """Load `path` (its external weights beside it).

        Args:
            optimised_path: also save the graph as ONNX Runtime runs it, weights inside.
            optimise: False runs the graph node by node as it stands in the file: the reference for fused kernels.
        Raises:
            BackendUnavailable: onnxruntime is missing, or has no kernel for an operator.
            GraphError: the file, or its weights, is missing or not valid.
        """
        self.path, self._optimise = path, optimise
        self._session: Any = self._load(optimised_path)
        self.specs = tuple(
            TensorSpec(i.name, DTYPES.get(i.type, i.type), tuple(d if isinstance(d, int) else None for d in i.shape))
            for i in self._session.get_inputs()
        )
        self._outputs = tuple(o.name for o in self._session.get_outputs())

    @property
    def inputs(self) -> tuple[str, ...]:
        return tuple(spec.name for spec in self.specs)

    @property
    def outputs(self) -> tuple[str, ...]:
        return self._outputs

    def _load(self, optimised_path: Path | None) -> Any:
        ort = runtime()
        if not self.path.is_file():
            raise GraphError(f"{self.path} does not exist: give an ONNX file")
        if optimised_path is not None and not optimised_path.parent.is_dir():
            raise GraphError(f"{optimised_path.parent} does not exist: give a folder for the optimised graph")
        _share_pool(ort)
        options = ort.SessionOptions()
        options.use_per_session_threads = False
        options.log_severity_level = QUIET
        level = ort.GraphOptimizationLevel
        options.graph_optimization_level = level.ORT_ENABLE_ALL if self._optimise else level.ORT_DISABLE_ALL
        if optimised_path is not None:
            options.optimized_model_filepath = str(optimised_path)
        try:
            return ort.InferenceSession(str(self.path), options, providers=[PROVIDER])
        except Exception as error:
            text = _one_line(error)
            if isinstance(error, ort.capi.onnxruntime_pybind11_state.NotImplemented) or "not a registered function/op" in text:
                raise BackendUnavailable(f"ONNX Runtime {ort.__version__} has no kernel for an operator of {self.path}: {text}") from error
            saved = "" if optimised_path is None else f" or its optimised form not saved as {optimised_path.name}, for which space must be free"
            raise GraphError(f"{self.path} cannot be loaded by ONNX Runtime {ort.__version__}{saved}: {text}") from error

    def __call__(self, feeds: Feeds) -> dict[str, Array]:
        """Run on `feeds`, which hold at least `inputs`.

        Raises:
            GraphError: an input is missing, or has the wrong dtype or shape; or the run failed.
            BackendUnavailable: the engine is closed, or memory ran out.
        """
        if self._session is None:
            raise BackendUnavailable(f"the engine of {self.path} is closed: open it again")
        for spec in self.specs:
            self._check(spec, feeds)
        try:
            values = self._session.run(None, {name: np.ascontiguousarray(feeds[name]) for name in self.inputs})
        except Exception as error:
            text = _one_line(error)
            if "allocate memory" in text or "bad_alloc" in text:
                shapes = ", ".join(f"{name} {feeds[name].shape}" for name in self.inputs)
                raise BackendUnavailable(f"memory ran out in {self.path} on {shapes}: lower the batch size") from error
            raise GraphError(f"{self.path} failed to run: {text}") from error
        return dict(zip(self._outputs, values, strict=True))

    def _check(self, spec: TensorSpec, feeds: Feeds) -> None:
        value = feeds.get(spec.name)
        if value is None:
            raise GraphError(f"{self.path} needs the input {spec.name!r}: got {', '.join(feeds) or 'none'}")
        fits = len(value.shape) == len(spec.shape) and all(want in (None, got) for want, got in zip(spec.shape, value.shape, strict=True))
        if value.dtype.name != spec.dtype or not fits:
            shape = "(" + ", ".join("any" if d is None else str(d) for d in spec.shape) + ")"
            raise GraphError(f"{self.path} takes {spec.name!r} as {spec.dtype} {shape}: got {value.dtype.name} {value.shape}")

    def close(self) -> None:
        """Free the session; a second call does nothing."""
        self._session = None

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self.close()
