"""ONNX Runtime, on the CPU or on a CUDA GPU.

All sessions of a process share one CPU thread pool: a session's private pool spins between calls and takes the cores from
the others (two warm engines called in turn ran 2.7 times slower on two cores).
"""

from __future__ import annotations

import contextlib
import importlib.metadata
import io
import os
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any, Literal, Self

import numpy as np

from ..engine import Array, Feeds, TensorSpec
from ..errors import BackendUnavailable, GraphError, PTQDError

Kind = Literal["cpu", "cuda"]
PROVIDERS: Mapping[Kind, str] = {"cpu": "CPUExecutionProvider", "cuda": "CUDAExecutionProvider"}
EXTRAS: Mapping[Kind, str] = {"cpu": "cpu", "cuda": "gpu"}
DISTRIBUTIONS = ("onnxruntime", "onnxruntime-gpu")
CUDA_OPTIONS = {"cudnn_conv_algo_search": "HEURISTIC", "use_tf32": "0"}
"""No algorithm search at the first run of a shape, and float32 that is float32: TF32 has 10 bits of mantissa."""
GRAPH_ID, NO_GRAPH = "gpu_graph_id", "-1"
"""Run option: the CUDA graph to capture or replay."""
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
MEMORY = ("allocate memory", "bad_alloc", "CUDA failure 2: ", "out of memory")
"""What onnxruntime, C++ and CUDA say where memory runs out."""
QUIET = 4
"""Log severity: fatal only. Errors arrive as exceptions, and are told once."""

_threads: int | None = None
_pool_exists = False


def set_threads(n: int) -> None:
    """Set the number of CPU threads that all engines of this process share; the default is the CPUs this process may use.

    Raises:
        BackendUnavailable: n < 1, or the first engine was already opened with another number.
    """
    global _threads
    if n < 1:
        raise BackendUnavailable(f"the number of threads is {n}: give at least 1")
    if _pool_exists and n != _threads:
        raise BackendUnavailable(f"ONNX Runtime already runs with {_threads} threads, not {n}: set the threads before the first engine is opened")
    _threads = n


def runtime(kind: Kind = "cpu") -> Any:
    """The onnxruntime module, with a provider for `kind`.

    Raises:
        BackendUnavailable: not installed, installed twice, or without that provider.
    """
    extra = f"pip install 'ptqd-export[{EXTRAS[kind]}]'"
    installed = [name for name in DISTRIBUTIONS if _is_installed(name)]
    if len(installed) > 1:
        raise BackendUnavailable(f"{' and '.join(installed)} are both installed and overwrite each other's files: pip uninstall both, then {extra}")
    try:
        import onnxruntime
    except ImportError as error:
        raise BackendUnavailable(f"backend ort-{kind} needs onnxruntime ({error}): {extra}") from error
    if PROVIDERS[kind] not in onnxruntime.get_available_providers():
        raise BackendUnavailable(
            f"backend ort-{kind} needs {PROVIDERS[kind]}, which the installed onnxruntime {onnxruntime.__version__} was built without: "
            f"pip uninstall {' '.join(installed) or 'onnxruntime'}, then {extra}"
        )
    return onnxruntime


def _is_installed(distribution: str) -> bool:
    try:
        importlib.metadata.version(distribution)
    except importlib.metadata.PackageNotFoundError:
        return False
    return True


def _load_cuda(ort: Any) -> None:
    """Load the CUDA libraries (those from pip packages too) and take a byte of the GPU.

    Raises:
        BackendUnavailable: a library is missing, or there is no GPU or driver.
    """
    ort.set_default_logger_severity(QUIET)  # the libraries are loaded outside of any session
    printed = io.StringIO()
    if hasattr(ort, "preload_dlls"):
        with contextlib.redirect_stdout(printed):
            ort.preload_dlls()
    try:
        ort.OrtValue.ortvalue_from_shape_and_type([1], np.uint8, "cuda", 0)
    except Exception as error:  # onnxruntime's own exceptions share no base but Exception
        text = _one_line(error)
        if "CUDA Provider not available" in text:  # onnxruntime gives its cause to its log alone
            text = "its CUDA provider does not load: the NVIDIA driver or a library is missing"
        reason = printed.getvalue().partition("\n")[0] or text
        raise BackendUnavailable(
            f"backend ort-cuda finds no CUDA GPU that works ({reason}): it needs an NVIDIA GPU, its driver, and the CUDA libraries that "
            f"onnxruntime {ort.__version__} was built for (pip install 'ptqd-export[gpu]')"
        ) from error


def _share_pool(ort: Any) -> None:
    """Create the one thread pool before the first session."""
    global _threads, _pool_exists
    if _pool_exists:
        return
    if _threads is None:
        _threads = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    try:
        ort.set_global_thread_pool_sizes(_threads, 1)
    except Exception as error:
        raise BackendUnavailable(f"ONNX Runtime's thread pool cannot be set ({_one_line(error)}): open no other global-pool session first") from error
    _pool_exists = True


def _one_line(error: Exception) -> str:
    """An error's text; of a failure of the GPU, which onnxruntime wraps in source locations, only what CUDA said."""
    text = " ".join(str(error).split())
    told = GPU_FAILURE.search(text)
    return told[0] if told else text


class OrtDevice:
    """The memory that engines of one kind run in, as a `Device`: buffers are `onnxruntime.OrtValue`, on the host or on the first CUDA GPU."""

    def __init__(self, kind: Kind = "cpu") -> None:
        """Check that `kind` works here.

        Raises:
            BackendUnavailable: onnxruntime is missing or has no such provider, or there is no CUDA GPU that works.
        """
        self.kind = kind
        self._ort: Any = runtime(kind)
        if kind == "cuda":
            _load_cuda(self._ort)

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
            return self.ort.OrtValue.ortvalue_from_shape_and_type(list(shape), np.dtype(dtype).type, self.kind, 0)
        except (MemoryError, RuntimeError) as error:
            raise BackendUnavailable(f"no {self.kind} memory for a buffer {dtype} {shape} ({_one_line(error)}): lower the batch size") from error

    def write(self, buffer: Any, array: Array) -> None:
        """Copy `array` into `buffer`, of the same dtype and shape; `array` is free again on return.

        Raises:
            GraphError: another dtype or shape, which ONNX Runtime would reinterpret.
        """
        dtype, shape = _layout(buffer)
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

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self.close()


def _layout(buffer: Any) -> tuple[str, tuple[int, ...]]:
    """(numpy dtype name, shape) of an OrtValue."""
    return DTYPES.get(buffer.data_type(), buffer.data_type()), tuple(buffer.shape())


def _specs(values: Any) -> tuple[TensorSpec, ...]:
    return tuple(TensorSpec(v.name, DTYPES.get(v.type, v.type), tuple(d if isinstance(d, int) else None for d in v.shape)) for v in values)


def _run_options(ort: Any, graph: str) -> Any:
    """Options of a run that captures or replays the CUDA graph `graph`."""
    options = ort.RunOptions()
    options.log_severity_level = QUIET
    options.add_run_config_entry(GRAPH_ID, graph)
    return options


@dataclass(frozen=True)
class _Bound:
    """A set of buffers, ready to run. `tensors` are referred to so that their ids stay theirs."""

    binding: Any
    options: Any
    tensors: list[Any]


class OrtEngine:
    """An ONNX file on ONNX Runtime, as a `DeviceEngine`.

    Outputs of a call are fresh arrays that the caller owns. The same file, version and number of threads repeats itself exactly.

    Attributes:
        specs, output_specs: of the inputs and of the outputs.
        captures: `launch` replays a CUDA graph per set of buffers. Never on the CPU, nor where ONNX Runtime leaves a part of the
            graph to the CPU. Captures belong to the thread that launches.
    """

    def __init__(self, path: Path, *, device: OrtDevice | None = None, optimised_path: Path | None = None, optimise: bool = True) -> None:
        """Load `path` (its external weights beside it).

        Args:
            device: where to run; the CPU if None.
            optimised_path: also save the graph as ONNX Runtime runs it, weights inside.
            optimise: False runs the graph node by node as it stands in the file: the reference for fused kernels.
        Raises:
            BackendUnavailable: onnxruntime is missing, has no kernel for an operator, or does not run on the device.
            GraphError: the file, or its weights, is missing or not valid.
        """
        device = OrtDevice() if device is None else device
        self.path, self.kind, self._optimise = path, device.kind, optimise
        self.captures = False
        self._session: Any = self._load(device.ort, optimised_path)
        self.specs, self.output_specs = _specs(self._session.get_inputs()), _specs(self._session.get_outputs())
        self._run_options = _run_options(device.ort, NO_GRAPH) if self.captures else None
        self._ort = device.ort
        self._bound: dict[tuple[int, ...], _Bound] = {}

    @property
    def inputs(self) -> tuple[str, ...]:
        return tuple(spec.name for spec in self.specs)

    @property
    def outputs(self) -> tuple[str, ...]:
        return tuple(spec.name for spec in self.output_specs)

    @property
    def session(self) -> Any:
        """The onnxruntime.InferenceSession.

        Raises:
            BackendUnavailable: the engine is closed.
        """
        if self._session is None:
            raise BackendUnavailable(f"the engine of {self.path} is closed: open it again")
        return self._session

    def _load(self, ort: Any, optimised_path: Path | None) -> Any:
        if not self.path.is_file():
            raise GraphError(f"{self.path} does not exist: give an ONNX file")
        if optimised_path is not None and not optimised_path.parent.is_dir():
            raise GraphError(f"{optimised_path.parent} does not exist: give a folder for the optimised graph")
        _share_pool(ort)
        options = ort.SessionOptions()
        options.use_per_session_threads = False
        options.log_severity_level = QUIET
        # Else weights that alone are quantized make ONNX Runtime quantize their inputs to 8 bits too.
        options.add_session_config_entry("session.qdq_matmulnbits_accuracy_level", "1")
        level = ort.GraphOptimizationLevel
        options.graph_optimization_level = level.ORT_ENABLE_ALL if self._optimise else level.ORT_DISABLE_ALL
        if optimised_path is not None:
            options.optimized_model_filepath = str(optimised_path)
        try:
            session = self._open(ort, options)
        except Exception as error:
            text = _one_line(error)
            if GPU_FAILURE.match(text):
                raise self._failure(error, {}) from error
            if isinstance(error, ort.capi.onnxruntime_pybind11_state.NotImplemented) or "not a registered function/op" in text:
                raise BackendUnavailable(f"ONNX Runtime {ort.__version__} has no kernel for an operator of {self.path}: {text}") from error
            saved = "" if optimised_path is None else f" or its optimised form not saved as {optimised_path.name}, for which space must be free"
            raise GraphError(f"{self.path} cannot be loaded by ONNX Runtime {ort.__version__}{saved}: {text}") from error
        if session.get_providers()[0] != PROVIDERS[self.kind]:
            raise BackendUnavailable(
                f"{self.path} fell back to {session.get_providers()[0]}: {PROVIDERS[self.kind]} did not start; see whether nvidia-smi shows a GPU "
                "with free memory, and that the CUDA libraries are those that onnxruntime was built for"
            )
        return session

    def _open(self, ort: Any, options: Any) -> Any:
        """A session that never falls back by itself, which prints; with CUDA graphs where ONNX Runtime takes them."""
        if self.kind == "cpu":
            return ort.InferenceSession(str(self.path), options, providers=[PROVIDERS["cpu"]], enable_fallback=0)
        fixed = [(PROVIDERS["cuda"], {**CUDA_OPTIONS, "enable_cuda_graph": "1"}), PROVIDERS["cpu"]]
        try:
            session = ort.InferenceSession(str(self.path), options, providers=fixed, enable_fallback=0)
        except Exception as error:
            if "graph capture" not in str(error):
                raise
            return ort.InferenceSession(str(self.path), options, providers=[(PROVIDERS["cuda"], CUDA_OPTIONS), PROVIDERS["cpu"]], enable_fallback=0)
        self.captures = True
        return session

    def __call__(self, feeds: Feeds) -> dict[str, Array]:
        """Run on `feeds`, which hold at least `inputs`.

        Raises:
            GraphError: an input is missing, or has the wrong dtype or shape; or the run failed.
            BackendUnavailable: the engine is closed, or memory ran out.
        """
        session = self.session
        for spec in self.specs:
            value = self._find(spec, feeds, "input")
            self._check(spec, value.dtype.name, value.shape)
        try:
            values = session.run(None, {name: np.ascontiguousarray(feeds[name]) for name in self.inputs}, self._run_options)
        except Exception as error:
            raise self._failure(error, {name: feeds[name].shape for name in self.inputs}) from error
        return dict(zip(self.outputs, values, strict=True))

    def launch(self, buffers: Mapping[str, Any]) -> None:
        """Run with all inputs and outputs at `buffers` of the engine's device; nothing is copied. Returns when the outputs are there.

        What is known of a set of buffers (the binding, and the CUDA graph that its first launch captures) and the buffers
        themselves are kept until the engine is closed: launch on few sets, many times.

        Raises:
            GraphError: a buffer is missing, has the wrong dtype or shape, is on another device, or takes two tensors; or the run failed.
            BackendUnavailable: the engine is closed, or memory ran out.
        """
        session = self.session
        tensors = [self._find(spec, buffers, "buffer") for spec in (*self.specs, *self.output_specs)]
        key = tuple(map(id, tensors))
        bound = self._bound.get(key)
        if bound is None:
            bound = self._bound[key] = self._bind(session, tensors)
        try:
            session.run_with_iobinding(bound.binding, bound.options)
        except Exception as error:
            raise self._failure(error, {spec.name: _layout(tensor)[1] for spec, tensor in zip(self.specs, tensors, strict=False)}) from error

    def _bind(self, session: Any, tensors: list[Any]) -> _Bound:
        binding = session.io_binding()
        for i, (spec, tensor) in enumerate(zip((*self.specs, *self.output_specs), tensors, strict=True)):
            self._check(spec, *_layout(tensor))
            if tensor.device_name() != self.kind:
                raise GraphError(f"{self.path} runs on {self.kind}: the buffer of {spec.name!r} is on {tensor.device_name()}")
            if i < len(self.specs):
                binding.bind_ortvalue_input(spec.name, tensor)
            else:
                if any(tensor is other for other in tensors[:i]):
                    raise GraphError(f"{self.path} writes {spec.name!r} into a buffer that it reads or writes otherwise: give it its own")
                binding.bind_ortvalue_output(spec.name, tensor)
        return _Bound(binding, _run_options(self._ort, str(len(self._bound) + 1)) if self.captures else None, tensors)

    def _find(self, spec: TensorSpec, values: Mapping[str, Any], what: str) -> Any:
        value = values.get(spec.name)
        if value is None:
            raise GraphError(f"{self.path} needs the {what} {spec.name!r}: got {', '.join(values) or 'none'}")
        return value

    def _check(self, spec: TensorSpec, dtype: str, got: tuple[int, ...]) -> None:
        fits = len(got) == len(spec.shape) and all(want in (None, d) for want, d in zip(spec.shape, got, strict=True))
        if dtype != spec.dtype or not fits:
            shape = "(" + ", ".join("any" if d is None else str(d) for d in spec.shape) + ")"
            raise GraphError(f"{self.path} takes {spec.name!r} as {spec.dtype} {shape}: got {dtype} {got}")

    def _failure(self, error: Exception, shapes: Mapping[str, tuple[int, ...]]) -> PTQDError:
        text = _one_line(error)
        if any(sign in text for sign in MEMORY):
            got = ", ".join(f"{name} {shape}" for name, shape in shapes.items()) or "loading"
            return BackendUnavailable(f"memory ran out in {self.path} on {got}: lower the batch size, or end other programs that hold it")
        if GPU_FAILURE.match(text):
            return BackendUnavailable(f"the GPU failed in {self.path} ({text}): see whether nvidia-smi answers, and start the program again")
        return GraphError(f"{self.path} failed to run: {text}")

    def close(self) -> None:
        """Free the session; a second call does nothing."""
        self._bound.clear()
        self._session = None

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self.close()
