"""ONNX Runtime: an ONNX file on the CPU or on a CUDA GPU."""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from ..bundle.graph.onnx_file import INT8, UINT8, Node, read_graph
from ..bundle.protobuf import Malformed
from ..core.closing import Closing
from ..core.engine import Array, Feeds, TensorSpec
from ..errors import BackendUnavailable, GraphError, PTQDError
from .ort_device import (
    DTYPES,
    GPU_FAILURE,
    PROVIDERS,
    QUIET,
    Kind,
    OrtDevice,
    layout,
    one_line,
    runtime,
    saturates,
    set_threads,
    share_pool,
)
from .tensors import check, find, out_of_memory

__all__ = ["Kind", "OrtDevice", "OrtEngine", "runtime", "set_threads"]

CUDA_OPTIONS = {"cudnn_conv_algo_search": "HEURISTIC", "use_tf32": "0"}
"""No search of algorithms at the first run of a shape, and no TF32, which has 10 bits of mantissa."""
EXTERNAL = "session.optimized_model_external_initializers_file_name"
"""Session option: where the weights of a saved graph go, in its folder."""
TAKES_UINT8 = (1, 31)
"""ONNX Runtime's version that is known to make uint8 of weights without a zero point: 1.23 aborts."""
LARGEST_INLINE = 1 << 31
"""Bytes of a tensor in a graph file."""
GRAPH_ID, NO_GRAPH = "gpu_graph_id", "-1"
"""Run option: the CUDA graph to capture or replay."""
MEMORY = ("allocate memory", "bad_alloc", "CUDA failure 2: ", "out of memory")
"""What onnxruntime, C++ and CUDA say where memory runs out."""


def _specs(values: Any) -> tuple[TensorSpec, ...]:
    return tuple(
        TensorSpec(
            v.name, DTYPES.get(v.type, v.type), tuple(d if isinstance(d, int) else None for d in v.shape)
        )
        for v in values
    )


def _takes_uint8(path: Path) -> bool:
    """Whether ONNX Runtime can make uint8 of a graph's weights, as of those of the ORT CPU emission.

    There each belongs to one product with uint8 values, into which its DequantizeLinear is fused. What is not
    fused would be spoilt, or end the process: foreign graphs must not get that far.
    """
    try:
        graph = read_graph(path.read_bytes(), LARGEST_INLINE)
    except (OSError, Malformed):
        return False
    dtypes = {name: tensor.dtype for name, tensor in graph.initializers.items()}
    results = {value.name for value in graph.outputs}
    readers: dict[str, list[tuple[Node, int]]] = defaultdict(list)
    for node in graph.nodes:
        for place, name in enumerate(node.inputs):
            readers[name].append((node, place))
    dequantized = [n for n in graph.nodes if n.op == "DequantizeLinear" and len(n.inputs) > 1 and n.outputs]
    unsigned = {n.outputs[0] for n in dequantized if len(n.inputs) > 2 and dtypes.get(n.inputs[2]) == UINT8}

    def fused(weight: Node) -> bool:
        codes, value = readers[weight.inputs[0]], readers[weight.outputs[0]]
        if len(codes) != 1 or len(value) != 1 or weight.outputs[0] in results:
            return False
        ((product, place),) = value
        behind = {node.op for name in product.outputs for node, _ in readers[name]}
        integer = product.op == "MatMul" or (
            product.op == "Conv" and behind == {"QuantizeLinear"} and results.isdisjoint(product.outputs)
        )
        return integer and place == 1 and product.inputs[0] in unsigned

    weights = [node for node in dequantized if dtypes.get(node.inputs[0]) == INT8]
    return bool(weights) and all(map(fused, weights))


def session_options(ort: Any, path: Path, kind: Kind = "cpu", exact: bool = False) -> tuple[Any, bool]:
    """Options of every session, and whether quantized layers may run in integer kernels.

    Args:
        exact: those saturate here, and must not.
    """
    share_pool(ort)
    options = ort.SessionOptions()
    options.use_per_session_threads = False
    options.log_severity_level = QUIET
    # Values in buffers of older ones cost the CPU time and even memory (docs/benchmarks.md).
    options.enable_mem_reuse = kind != "cpu"
    # Else weights that alone are quantized make ONNX Runtime quantize their inputs to 8 bits too.
    options.add_session_config_entry("session.qdq_matmulnbits_accuracy_level", "1")
    integers = not exact or (exact_integers() and _takes_uint8(path))
    if exact and integers:  # large weights are taken as uint8: exact, and slower
        options.add_session_config_entry("session.x64quantprecision", "1")
    elif exact:
        options.add_session_config_entry("session.disable_quant_qdq", "1")
    return options, integers


def exact_integers() -> bool:
    """Whether the installed ONNX Runtime has integer kernels that do not saturate, on any processor.

    Raises:
        BackendUnavailable: as `runtime`.
    """
    return tuple(map(int, re.findall(r"\d+", runtime().__version__)[:2])) >= TAKES_UINT8


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


class OrtEngine(Closing):
    """An ONNX file on ONNX Runtime, as a `DeviceEngine`.

    Outputs of a call are fresh arrays that the caller owns. The same file, version and number of threads
    repeats itself exactly.

    Attributes:
        specs, output_specs: of the inputs and of the outputs.
        integers: quantized layers may run in integer kernels: not where those would be wrong.
        captures: `launch` replays a CUDA graph per set of buffers. Never on the CPU, nor where ONNX Runtime
            leaves a part of the graph to the CPU. Captures belong to the thread that launches.
    """

    def __init__(
        self,
        path: Path,
        *,
        device: OrtDevice | None = None,
        optimised_path: Path | None = None,
        optimise: bool = True,
        exact: bool = True,
        profile: Path | None = None,
    ) -> None:
        """Load `path` (its external weights beside it).

        Args:
            device: where to run; the CPU if None.
            optimised_path: also save the graph as ONNX Runtime runs it, its weights in a file beside it.
            profile: begin of the name of a file of times, which `session.end_profiling` writes.
            exact: have 8-bit products that saturate here (`ort_device.saturates`) computed exactly; False for
                graphs of other tools, as their users have them.
            optimise: False runs the graph node by node as it stands in the file: the reference for fused
                kernels.
        Raises:
            BackendUnavailable: onnxruntime is missing, has no kernel for an operator, or does not run on the
                device.
            GraphError: the file, or its weights, is missing or not valid.
        """
        device = OrtDevice() if device is None else device
        self.path, self.kind, self.index, self._optimise = path, device.kind, device.index, optimise
        self.captures = False
        exact = exact and optimise and self.kind == "cpu" and saturates()  # integer kernels are fused ones
        self._session: Any = self._load(device.ort, optimised_path, profile, exact)
        self.specs, self.output_specs = (
            _specs(self._session.get_inputs()),
            _specs(self._session.get_outputs()),
        )
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
    def capture_note(self) -> str | None:
        """How many CUDA graphs its launches replay, or why none; None on the CPU, which has none."""
        if self.kind == "cpu":
            return None
        if not self.captures:
            return "no CUDA graph: ONNX Runtime leaves a part of the graph to the CPU"
        count = len(self._bound)
        return (
            f"{count} CUDA graph{'s' * (count > 1)} captured"
            if count
            else "no CUDA graph: nothing was launched"
        )

    @property
    def session(self) -> Any:
        """The onnxruntime.InferenceSession.

        Raises:
            BackendUnavailable: the engine is closed.
        """
        if self._session is None:
            raise BackendUnavailable(f"the engine of {self.path} is closed: open it again")
        return self._session

    def _load(self, ort: Any, optimised_path: Path | None, profile: Path | None, exact: bool) -> Any:
        if not self.path.is_file():
            raise GraphError(f"{self.path} does not exist: give an ONNX file")
        if optimised_path is not None and not optimised_path.parent.is_dir():
            raise GraphError(f"{optimised_path.parent} does not exist: give a folder for the optimised graph")
        options, self.integers = session_options(ort, self.path, self.kind, exact)
        level = ort.GraphOptimizationLevel
        options.graph_optimization_level = level.ORT_ENABLE_ALL if self._optimise else level.ORT_DISABLE_ALL
        if optimised_path is not None:
            options.optimized_model_filepath = str(optimised_path)
            # Protobuf ends at 2 GB.
            options.add_session_config_entry(EXTERNAL, f"{optimised_path.name}.data")
        if profile is not None:
            options.enable_profiling, options.profile_file_prefix = True, str(profile)
        try:
            session = self._open(ort, options)
        except Exception as error:
            text = one_line(error)
            if GPU_FAILURE.match(text):
                raise self._failure(error, {}) from error
            if isinstance(
                error, ort.capi.onnxruntime_pybind11_state.NotImplemented
            ) or "not a registered function/op" in str(error):
                raise BackendUnavailable(
                    f"ONNX Runtime {ort.__version__} has no kernel for an operator of {self.path}: {text}"
                ) from error
            saved = ""
            if optimised_path is not None:
                saved = f" or not saved as {optimised_path.name}, for which there must be free space"
            raise GraphError(
                f"{self.path} cannot be loaded by ONNX Runtime {ort.__version__}{saved}: {text}"
            ) from error
        if session.get_providers()[0] != PROVIDERS[self.kind]:
            raise BackendUnavailable(
                f"{self.path} fell back to {session.get_providers()[0]}: {PROVIDERS[self.kind]} did not "
                "start; see whether nvidia-smi shows a GPU with free memory, and that the CUDA libraries are "
                "those that onnxruntime was built for"
            )
        return session

    def _open(self, ort: Any, options: Any) -> Any:
        """A session that does not fall back by itself, with CUDA graphs where ONNX Runtime takes them."""
        if self.kind == "cpu":
            return ort.InferenceSession(
                str(self.path), options, providers=[PROVIDERS["cpu"]], enable_fallback=0
            )
        about = {**CUDA_OPTIONS, "device_id": str(self.index)}
        fixed = [(PROVIDERS["cuda"], {**about, "enable_cuda_graph": "1"}), PROVIDERS["cpu"]]
        try:
            session = ort.InferenceSession(str(self.path), options, providers=fixed, enable_fallback=0)
        except Exception as error:
            if "graph capture" not in str(error):
                raise
            free = [(PROVIDERS["cuda"], about), PROVIDERS["cpu"]]
            return ort.InferenceSession(str(self.path), options, providers=free, enable_fallback=0)
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
            value = find(self.path, spec, feeds, "input")
            check(self.path, spec, value.dtype.name, value.shape)
        try:
            values = session.run(
                None, {name: np.ascontiguousarray(feeds[name]) for name in self.inputs}, self._run_options
            )
        except Exception as error:
            raise self._failure(error, {name: feeds[name].shape for name in self.inputs}) from error
        return dict(zip(self.outputs, values, strict=True))

    def launch(self, buffers: Mapping[str, Any]) -> None:
        """Run on `buffers` of the engine's device, with no copies; returns when the outputs are there.

        What is known of a set of buffers (the binding, and the CUDA graph that its first launch captures) and
        the buffers themselves are kept until the engine is closed: launch on few sets, many times.

        Raises:
            GraphError: a buffer is missing, has the wrong dtype or shape, is on another device, or takes two
                tensors; or the run failed.
            BackendUnavailable: the engine is closed, or memory ran out.
        """
        session = self.session
        tensors = [find(self.path, spec, buffers, "buffer") for spec in (*self.specs, *self.output_specs)]
        key = tuple(map(id, tensors))
        bound = self._bound.get(key)
        if bound is None:
            bound = self._bound[key] = self._bind(session, tensors)
        try:
            session.run_with_iobinding(bound.binding, bound.options)
        except Exception as error:
            raise self._failure(
                error,
                {spec.name: layout(tensor)[1] for spec, tensor in zip(self.specs, tensors, strict=False)},
            ) from error

    def _bind(self, session: Any, tensors: list[Any]) -> _Bound:
        binding = session.io_binding()
        for i, (spec, tensor) in enumerate(zip((*self.specs, *self.output_specs), tensors, strict=True)):
            check(self.path, spec, *layout(tensor))
            if tensor.device_name() != self.kind:
                raise GraphError(
                    f"{self.path} runs on {self.kind}: the buffer of {spec.name!r} is on "
                    f"{tensor.device_name()}"
                )
            if i < len(self.specs):
                binding.bind_ortvalue_input(spec.name, tensor)
            else:
                if any(tensor is other for other in tensors[:i]):
                    raise GraphError(
                        f"{self.path} writes {spec.name!r} into a buffer that it reads or writes otherwise: "
                        "give it its own"
                    )
                binding.bind_ortvalue_output(spec.name, tensor)
        return _Bound(
            binding, _run_options(self._ort, str(len(self._bound) + 1)) if self.captures else None, tensors
        )

    def _failure(self, error: Exception, shapes: Mapping[str, tuple[int, ...]]) -> PTQDError:
        text = one_line(error)
        if any(sign in text for sign in MEMORY):
            return out_of_memory(self.path, shapes)
        if GPU_FAILURE.match(text):
            return BackendUnavailable(
                f"the GPU failed in {self.path} ({text}): see whether nvidia-smi answers, and start the "
                "program again"
            )
        return GraphError(f"{self.path} failed to run: {text}")

    def close(self) -> None:
        """Free the session; a second call does nothing."""
        self._bound.clear()
        self._session = None
