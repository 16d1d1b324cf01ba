"""OpenVINO: a portable ONNX graph on the CPU, its layers in 8 bits, bfloat16 in between where it has it.

OpenVINO runs a graph of fixed shapes a quarter faster than one whose batch is open, so an engine compiles the
graph anew for each shape that it is called with, and keeps what it used last.

With bfloat16 in between, timesteps lose their last digits (999 becomes 1000) before a network takes their
sines. OpenVINO keeps in float32 what leads to an output without passing a layer; so what a network makes of
its timestep, up to its first layer, becomes an output of the model, which nobody reads.
"""

from __future__ import annotations

import contextlib
import sys
from collections import Counter, OrderedDict
from collections.abc import Iterator, Mapping
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np

from ..core.backend import BACKENDS, FLOAT_ERROR, OPENVINO, Floats
from ..core.closing import Closing
from ..core.engine import Array, Feeds, TensorSpec
from ..core.engine_build import NOT_FOUND, PlanReport
from ..errors import BackendUnavailable, GraphError
from .openvino_model import (
    followers,
    made_of_timesteps,
    part_concatenations,
    part_normalizations,
    widen_weights,
)
from .ort_device import one_line, saturates, threads
from .tensors import check, find, out_of_memory

CPU = "CPU"
TYPES: Mapping[Floats, str] = {"float32": "f32", "bfloat16": "bf16"}
NARROW = frozenset({"i8", "u8", "i4", "u4", "f8e4m3"})
FLOATS = frozenset({"f32", "bf16", "f16"})
COMPUTING = frozenset({"Convolution", "FullyConnected", "MatMul"})
"""Those of a compiled model."""
KEPT = 2
"""Compiled models that an engine keeps: of the usual batch, and of a smaller last one."""
MEMORY = ("bad_alloc", "allocate", "out of memory")


@cache
def runtime() -> Any:
    """The openvino module.

    Raises:
        BackendUnavailable: it is not installed, or finds no CPU that it knows.
    """
    try:
        with _without_converter():
            import openvino
    except ImportError as error:
        raise BACKENDS[OPENVINO].missing(error) from error
    if CPU not in _core(openvino).available_devices:
        raise BackendUnavailable(
            f"OpenVINO {openvino.__version__} does not run on this machine's processor: take another backend"
        )
    return openvino


@contextlib.contextmanager
def _without_converter() -> Iterator[None]:
    """Import openvino without its converter of models: that one reports each import to its maker."""
    name = "openvino.tools.ovc"
    if name in sys.modules:
        yield
        return
    sys.modules[name] = None  # type: ignore[assignment]
    try:
        yield
    finally:
        del sys.modules[name]


@cache
def _core(openvino: Any) -> Any:
    return openvino.Core()


def has_bfloat16() -> bool:
    """Whether this CPU computes in bfloat16; where it does not, OpenVINO would emulate it, slowly.

    Raises:
        BackendUnavailable: OpenVINO is not installed.
    """
    return "BF16" in _core(runtime()).get_property(CPU, "OPTIMIZATION_CAPABILITIES")


class HostDevice(Closing):
    """The host's memory, as a `Device`: buffers are numpy arrays."""

    def __init__(self, index: int = 0) -> None:
        """Check that OpenVINO works here.

        Raises:
            BackendUnavailable: it does not, or another device than the host is asked for.
        """
        runtime()
        if index:
            raise BackendUnavailable(
                f"backend {OPENVINO} has one device, the host: got index {index}, expected 0"
            )

    def empty(self, shape: tuple[int, ...], dtype: str) -> Any:
        try:
            return np.empty(shape, dtype)
        except MemoryError as error:
            raise BackendUnavailable(
                f"no memory for a buffer {dtype} {shape}: lower the batch size"
            ) from error

    def write(self, buffer: Any, array: Array) -> None:
        """Copy `array` into `buffer`.

        Raises:
            GraphError: another dtype or shape.
        """
        if (array.dtype, array.shape) != (buffer.dtype, buffer.shape):
            raise GraphError(
                f"the buffer holds {buffer.dtype} {buffer.shape}: got {array.dtype} {array.shape}"
            )
        buffer[...] = array

    def read(self, buffer: Any) -> Array:
        """A fresh copy of `buffer`."""
        return np.array(buffer)

    def synchronize(self) -> None:
        """Nothing to wait for: `launch` returns when it is done."""

    def close(self) -> None:
        """Nothing to free."""


class OpenVinoEngine(Closing):
    """A portable ONNX file on OpenVINO, as a `DeviceEngine`.

    Outputs of a call are fresh arrays that the caller owns. The same file, version, processor, batch and
    number of threads repeats itself exactly.

    Attributes:
        specs, output_specs: of the inputs and of the outputs.
        floats: what it computes in between quantized layers. float32 in graphs without any, and on CPUs
            without bfloat16.
    """

    def __init__(self, path: Path, *, floats: Floats = "bfloat16") -> None:
        """Read `path` (its external weights beside it); it is compiled when it is called.

        Args:
            floats: "bfloat16" or "float32".
        Raises:
            BackendUnavailable: openvino is missing, or has no kernel for an operator.
            GraphError: the file, or its weights, is missing or not valid.
        """
        ov = runtime()
        self.path = path
        if not path.is_file():
            raise GraphError(f"{path} does not exist: give an ONNX file")
        try:
            # As ONNX alone: `Core.read_model` tries the formats of other libraries too.
            frontend = ov.frontend.FrontEndManager().load_by_framework("onnx")
            self._model: Any = frontend.convert(frontend.load(str(path)))
        except Exception as error:  # OpenVINO's own exceptions share no base but Exception
            raise self._unreadable(error) from error
        if not self._model.outputs:
            raise GraphError(f"{path} holds no graph: give an ONNX file")
        # Their names before compilation: it gives inputs more of them.
        self.specs = tuple(_spec(value) for value in self._model.inputs)
        self.output_specs = tuple(_spec(value) for value in self._model.outputs)
        quantized = any(
            op.get_element_type().get_type_name() in NARROW
            for op in self._model.get_ops()
            if op.get_type_name() == "Constant"
        )
        if quantized and saturates():
            widen_weights(self._model)
        self.floats: Floats = floats if quantized and has_bfloat16() else "float32"
        if self.floats != "float32":
            timed = made_of_timesteps(self._model)
            if timed:
                self._model.add_outputs(timed)
        self._compiled: OrderedDict[tuple[tuple[int, ...], ...], Any] = OrderedDict()

    @property
    def inputs(self) -> tuple[str, ...]:
        return tuple(spec.name for spec in self.specs)

    @property
    def outputs(self) -> tuple[str, ...]:
        return tuple(spec.name for spec in self.output_specs)

    @property
    def capture_note(self) -> None:
        """A CPU has no CUDA graphs."""

    @property
    def float_error(self) -> float:
        """Largest RMS error of what it computes in between, relative to the RMS of epsilon; 0 in float32."""
        return 0.0 if self.floats == "float32" else FLOAT_ERROR[self.floats]

    def _unreadable(self, error: Exception) -> Exception:
        text, version = one_line(error), runtime().__version__
        if (
            "not supported" in text
            or "OpConversionFailure" in type(error).__name__
            or "No conversion" in text
        ):
            return BackendUnavailable(f"OpenVINO {version} cannot run {self.path}: {text}")
        return GraphError(f"{self.path} cannot be loaded by OpenVINO {version}: {text}")

    def _request(self, shapes: tuple[tuple[int, ...], ...]) -> Any:
        """What runs the graph at these shapes of its inputs, compiled at the first call with them.

        Raises:
            BackendUnavailable: the engine is closed, memory ran out, or there is no kernel.
        """
        if self._model is None:
            raise BackendUnavailable(f"the engine of {self.path} is closed: open it again")
        if shapes in self._compiled:
            self._compiled.move_to_end(shapes)
            return self._compiled[shapes]
        while len(self._compiled) >= KEPT:
            self._compiled.popitem(last=False)
        ov = runtime()
        settings = {
            "INFERENCE_PRECISION_HINT": TYPES[self.floats],
            "INFERENCE_NUM_THREADS": threads(),
            "NUM_STREAMS": 1,
            "ENABLE_CPU_PINNING": False,
            # Else weights that alone are quantized make OpenVINO quantize their inputs to 8 bits too.
            "DYNAMIC_QUANTIZATION_GROUP_SIZE": 0,
        }
        try:
            model = self._model.clone()
            model.reshape({i: ov.PartialShape(list(shape)) for i, shape in enumerate(shapes)})
            part_concatenations(model)
            if self.floats == "float32":
                part_normalizations(model)
            request = _core(ov).compile_model(model, CPU, settings).create_infer_request()
        except Exception as error:
            raise self._failure(error, shapes) from error
        self._compiled[shapes] = request
        return request

    def __call__(self, feeds: Feeds) -> dict[str, Array]:
        """Run on `feeds`, which hold at least `inputs`.

        Raises:
            GraphError: an input is missing, or has the wrong dtype or shape; or the run failed.
            BackendUnavailable: the engine is closed, or memory ran out.
        """
        buffers: dict[str, Any] = {}
        for spec in self.specs:
            value = find(self.path, spec, feeds, "input")
            check(self.path, spec, value.dtype.name, value.shape)
            buffers[spec.name] = np.ascontiguousarray(value)
        request = self._request(tuple(buffers[name].shape for name in self.inputs))
        for i, spec in enumerate(self.output_specs):
            buffers[spec.name] = np.empty(tuple(request.model_outputs[i].get_shape()), np.dtype(spec.dtype))
        self._run(request, buffers)
        return {name: buffers[name] for name in self.outputs}

    def launch(self, buffers: Mapping[str, Any]) -> None:
        """Run on numpy arrays, with no copies; returns when the outputs are there.

        Raises:
            GraphError: a buffer is missing, or has the wrong dtype or shape; or the run failed.
            BackendUnavailable: the engine is closed, or memory ran out.
        """
        for spec in (*self.specs, *self.output_specs):
            value = find(self.path, spec, buffers, "buffer")
            check(self.path, spec, value.dtype.name, value.shape)
        self._run(self._request(tuple(buffers[name].shape for name in self.inputs)), buffers)

    def _run(self, request: Any, buffers: Mapping[str, Any]) -> None:
        tensor = runtime().Tensor
        try:
            for i, name in enumerate(self.inputs):
                request.set_input_tensor(i, tensor(buffers[name], shared_memory=True))
            for i, name in enumerate(self.outputs):
                request.set_output_tensor(i, tensor(buffers[name], shared_memory=True))
            request.infer()
        except Exception as error:
            raise self._failure(error, tuple(buffers[name].shape for name in self.inputs)) from error

    def _failure(self, error: Exception, shapes: tuple[tuple[int, ...], ...]) -> Exception:
        text = one_line(error)
        if isinstance(error, MemoryError) or any(sign in text for sign in MEMORY):
            return out_of_memory(self.path, dict(zip(self.inputs, shapes, strict=True)))
        return GraphError(f"{self.path} failed to run on OpenVINO: {text}")

    def report(self, meant: Mapping[str, str], feeds: Feeds) -> PlanReport:
        """Which of the layers that are meant to run in 8-bit integers do, compiled for the shapes of `feeds`.

        Args:
            meant: names of nodes of the graph, "int8" or "fp8", which is emulated.
        Raises:
            BackendUnavailable, GraphError: as a call.
        """
        request = self._request(tuple(np.shape(feeds[name]) for name in self.inputs))
        known: dict[str, set[str]] = {}
        types: Counter[str] = Counter()
        for op in request.get_compiled_model().get_runtime_model().get_ordered_ops():
            kind, number, names, kernel = (
                op.get_rt_info()[key].astype(str)
                for key in ("layerType", "runtimePrecision", "originalLayersNames", "primitiveType")
            )
            # The number may be that of the weights; kernels are called such as brgconv_avx512_I8.
            suffix = kernel.rpartition("_")[2].lower()
            number = suffix if suffix in FLOATS else number
            types[kind] += 1
            if kind in COMPUTING:
                for name in names.split(","):
                    known.setdefault(name, set()).add(number)
        layers = followers(self._model)
        fell_back = {}
        integers = [name for name, number in meant.items() if number == "int8"]
        for name in integers:
            found = next((known[n] for n in layers.get(name, (name,)) if n in known), {NOT_FOUND})
            if not found <= {"i8", "u8"}:
                fell_back[name] = ", ".join(sorted(found - {"i8", "u8"}))
        return PlanReport(
            len(integers), len(integers) - len(fell_back), fell_back, types.total(), dict(types)
        )

    def close(self) -> None:
        """Free the models; a second call does nothing."""
        self._compiled.clear()
        self._model = None


def _spec(value: Any) -> TensorSpec:
    """Of an input or output of a model as it is read."""
    shape = tuple(d.get_length() if d.is_static else None for d in value.partial_shape)
    return TensorSpec(value.any_name, np.dtype(value.get_element_type().to_dtype()).name, shape)
