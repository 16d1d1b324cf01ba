"""The check of an ONNX file before any runtime sees it: it computes what the manifest says, from the bundle's
own weights, with operators that this package writes, and in sizes that are known beforehand.

A runtime follows whatever a graph says: it opens files, runs loops, allocates. So nothing is searched for
that would be wrong; the file is read strictly, and everything in it must be as the exporter writes it.

    sizes      of the file and of what is in it, by kind               read_graph, _check
    reading    no byte that two parsers could take for two things      protobuf, graph.onnx_file
    interface  inputs and outputs by the manifest                      _check_interface
    weights    inside the one file of the bundle, of their own size    _check_initializers
    operators  by an allow-list, with the attributes that are written  _check_node
    tables     one row per step                                        _check_step
    shapes     of all values, followed from the inputs                 graph.shapes
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from ..core.backend import Emission
from ..core.engine import (
    EPSILON,
    KEPT,
    NEXT_KEPT,
    NEXT_SAMPLE,
    NEXT_STEP,
    NEXT_TIMESTEP,
    NOISE,
    SAMPLE,
    STEP,
    TIMESTEP,
)
from ..core.sampling import Sampling
from ..errors import BundleError
from ..typed import brief
from .graph.limits import Limits, network_limits, part_limits, update_limits
from .graph.onnx_file import BITS, FLOAT32, INT64, Dims, External, Node, OnnxGraph, Tensor, Value, read_graph
from .graph.operators import DEFAULT, FUSED, MAX_IR_VERSION, MICROSOFT, MIN_IR_VERSION, OPSETS, UPDATE
from .graph.shapes import agrees, check_shapes
from .graph.sizes import Batch, Shape, Untraceable
from .pipeline import Tensors
from .protobuf import Malformed

MAX_BYTES = 1 << 25
"""Of a network's graph, whose weights are elsewhere: large UNets take a few MiB."""
MAX_INLINE = 256
"""Bytes of a tensor inside a network's graph; the exporter puts larger ones into the weights."""
ORT_MARK = slice(4, 8), b"ORTM"
"""Where ONNX Runtime looks for the mark of its own format, which nothing here could check."""
DTYPES = {"float32": FLOAT32, "int64": INT64}
MAX_SHARED = 16
"""How many times the weights' size a graph's tensors may take: equal ones are stored once."""


@dataclass(frozen=True)
class Expected:
    """What a graph file of a bundle must go with.

    Attributes:
        sampling: of the manifest.
        emission: of the graph; None for the sampler's update.
        weights_file: the one file that tensors may lie in; no matter for the update, which holds its own.
        weights_size: its bytes.
        part: inputs and outputs of a graph that is not the network's: a text encoder's, a decoder's.
    """

    sampling: Sampling
    emission: Emission | None
    weights_file: str
    weights_size: int
    part: Tensors | None = None


@dataclass(frozen=True)
class Needs:
    """What a graph needs.

    Attributes:
        weights_end: where the last of its weights ends in the weights file; 0 without any.
        live: elements of the values that are there at one time, per sample.
    """

    weights_end: int
    live: int


def check_graph(data: bytes | memoryview, name: str, expected: Expected) -> Needs:
    """Check one graph file of a bundle.

    Args:
        data: the file.
        name: what messages call it.
    Raises:
        BundleError: one line saying what is wrong.
    """
    shown = name if name.isprintable() and len(name) <= 1000 else brief(name)
    try:
        return _check(bytes(data), expected)
    except _Refused as error:
        raise BundleError(f"{shown} {error}: do not trust it, rebuild the bundle") from None
    except Malformed as error:
        raise BundleError(
            f"{shown} is not an ONNX graph as this package writes them ({error}): copy the bundle again, and "
            "do not trust it if that does not help"
        ) from None
    except Untraceable as error:
        raise BundleError(
            f"{shown} holds a graph that cannot be run safely ({error}): do not trust it, rebuild the bundle"
        ) from None
    except (LookupError, TypeError, ValueError, ArithmeticError, AttributeError, RecursionError) as error:
        # A node with other inputs or attributes than its operator has.
        raise BundleError(
            f"{shown} holds a graph that cannot be followed ({type(error).__name__}): do not trust it, "
            "rebuild the bundle"
        ) from error


class _Refused(ValueError):
    """A rule that is broken; the text goes on from the file's name."""


def _check(data: bytes, expected: Expected) -> Needs:
    sampling, update = expected.sampling, expected.emission is None
    steps = len(sampling)
    inline = max(MAX_INLINE, 8 * steps) if update else MAX_INLINE
    tables = 64 + 4 * (1 + sampling.schedule.kept) * (4 + sampling.schedule.kept)
    limit = (1 << 16) + tables * steps if update else MAX_BYTES
    if len(data) > limit:
        raise _Refused(f"has {len(data)} bytes, expected {limit} at most")
    if data[ORT_MARK[0]] == ORT_MARK[1]:
        raise _Refused("is marked as ONNX Runtime's own format, expected an ONNX graph")
    graph = read_graph(data, inline)
    _check_versions(graph, expected.emission)
    part, constants = expected.part, graph.initializers.values()
    if part is not None:
        (inputs, outputs), limits = _part_interface(part), part_limits(part.positions, constants)
    elif update:
        (inputs, outputs), limits = _update_interface(sampling), update_limits(sampling)
    else:
        (inputs, outputs), limits = _network_interface(graph, sampling), network_limits(sampling, constants)
    _check_interface(graph, inputs, outputs)
    end = _check_initializers(graph, expected)
    operators = {op: DEFAULT[op] for op in UPDATE} if update else DEFAULT
    for node in graph.nodes:
        _check_node(node, operators, FUSED if expected.emission is Emission.ORT_CPU else {})
        if STEP in node.inputs and part is None:
            _check_step(node, graph, steps, 1 if update else sampling.model.channels)
    if update:
        _check_timesteps(graph, sampling)
    return Needs(end, _check_values(graph, inputs, outputs, limits))


Interface = Mapping[str, tuple[int, Shape]]
"""Data types and shapes by name, in order."""


def _network_interface(graph: OnnxGraph, sampling: Sampling) -> tuple[Interface, Interface]:
    batch, model = Batch(1), sampling.model
    rows = (batch, *model.sample_shape)
    timestep = DTYPES[sampling.schedule.timesteps.dtype.name], (batch,)
    inputs: dict[str, tuple[int, Shape]] = {SAMPLE: (FLOAT32, rows), TIMESTEP: timestep}
    for spec in model.inputs:
        inputs[spec.name] = DTYPES[spec.dtype], (batch, *spec.shape)
    if len(graph.inputs) > len(inputs):  # where nothing is folded in, there is none
        inputs[STEP] = INT64, (1,)
    return inputs, {EPSILON: (FLOAT32, rows)}


def _update_interface(sampling: Sampling) -> tuple[Interface, Interface]:
    rows = FLOAT32, (Batch(1), *sampling.model.sample_shape)
    step = INT64, (1,)
    schedule = sampling.schedule
    inputs: dict[str, tuple[int, Shape]] = {SAMPLE: rows, EPSILON: rows, STEP: step}
    inputs |= {f"{KEPT}{i}": rows for i in range(schedule.kept)}
    if (schedule.sigmas > 0).any():
        inputs[NOISE] = rows
    timestep = DTYPES[schedule.timesteps.dtype.name], (Batch(1),)
    outputs: dict[str, tuple[int, Shape]] = {NEXT_SAMPLE: rows, NEXT_TIMESTEP: timestep, NEXT_STEP: step}
    return inputs, outputs | {f"{NEXT_KEPT}{i}": rows for i in range(schedule.kept)}


def _part_interface(part: Tensors) -> tuple[Interface, Interface]:
    def declared(tensors: Mapping[str, tuple[str, tuple[int, ...]]]) -> Interface:
        return {name: (DTYPES[dtype], (Batch(1), *shape)) for name, (dtype, shape) in tensors.items()}

    return declared(part.inputs), declared(part.outputs)


def _check_versions(graph: OnnxGraph, emission: Emission | None) -> None:
    if not MIN_IR_VERSION <= graph.ir_version <= MAX_IR_VERSION:
        raise _Refused(f"has ir_version {graph.ir_version}, expected {MIN_IR_VERSION} to {MAX_IR_VERSION}")
    allowed = dict(OPSETS)
    if emission is not Emission.ORT_CPU:
        del allowed[MICROSOFT]
    for domain, version in graph.opsets.items():
        if allowed.get(domain) != version:
            raise _Refused(
                f"takes operators of {brief(domain)} in version {version}, expected "
                + " and ".join(f"{brief(d)} in {v}" for d, v in allowed.items())
            )
    if "" not in graph.opsets:
        raise _Refused("does not say which version of ONNX's operators it takes")


def _check_interface(graph: OnnxGraph, inputs: Interface, outputs: Interface) -> None:
    symbols: set[str] = set()
    for what, found, wanted in (("inputs", graph.inputs, inputs), ("outputs", graph.outputs, outputs)):
        names = [value.name for value in found]
        if names != list(wanted):
            raise _Refused(f"has {len(names)} {what}, {brief(names[:8])}, expected {brief(list(wanted))}")
        for value in found:
            dtype, shape = wanted[value.name]
            if value.dtype != dtype or not _declares(value, shape, symbols if what == "inputs" else None):
                raise _Refused(
                    f"has {brief(value.name)} of type {value.dtype} and shape {brief(_dims(value.dims))}, "
                    f"expected {dtype} and {brief(_dims(shape))} by the manifest"
                )
    if len(symbols) > 1:
        raise _Refused(f"has {len(symbols)} symbols for the batch, expected one")


def _declares(value: Value, shape: Shape, symbols: set[str] | None) -> bool:
    """Whether a value is declared in a shape: numbers where it has them, a symbol for the batch.

    Args:
        symbols: the symbol is added; None for outputs, whose batch may be unknown, as in a sum of halves.
    """
    if len(value.dims) != len(shape):
        return False
    for dim, size in zip(value.dims, shape, strict=True):
        if isinstance(size, Batch):
            if isinstance(dim, int) or (dim is None and symbols is not None):
                return False
            if isinstance(dim, str) and symbols is not None:
                symbols.add(dim)
        elif dim != size:
            return False
    return True


def _dims(dims: Dims | Shape) -> list[object]:
    return ["batch" if isinstance(dim, Batch) else dim for dim in dims]


def _check_initializers(graph: OnnxGraph, expected: Expected) -> int:
    """Where the last of the weights ends."""
    inputs, total, end = {value.name for value in graph.inputs}, 0, 0
    for tensor in graph.initializers.values():
        if not tensor.name or tensor.name in inputs:
            raise _Refused(f"has a constant in the place of an input, {brief(tensor.name)}")
        if isinstance(tensor.data, External):
            _check_place(tensor, tensor.data, expected)
            total += tensor.data.length
            end = max(end, tensor.data.offset + tensor.data.length)
    if total > max(MAX_SHARED * expected.weights_size, 1 << 26):
        raise _Refused(f"takes {total} bytes of weights from a file of {expected.weights_size}")
    return end


def _check_place(tensor: Tensor, place: External, expected: Expected) -> None:
    if place.location != expected.weights_file or expected.emission is None:
        wanted = "none" if expected.emission is None else f"from {brief(expected.weights_file)} alone"
        raise _Refused(f"takes weights from {brief(place.location)}, expected {wanted}")
    if place.offset + place.length > expected.weights_size:
        raise _Refused(
            f"takes {brief(tensor.name)} from bytes {place.offset} to {place.offset + place.length} of "
            f"{expected.weights_file}, which has {expected.weights_size}"
        )


def _check_node(
    node: Node, default: Mapping[str, Mapping[str, str]], fused: Mapping[str, Mapping[str, str]]
) -> None:
    known = {"": default, MICROSOFT: fused}.get(node.domain, {}).get(node.op)
    if known is None:
        shown = f"{node.domain}.{node.op}" if node.domain else node.op
        raise _Refused(
            f"holds the operator {brief(shown)}, which this package does not write into such a graph"
        )
    for attribute, (field, value) in node.attributes.items():
        if known.get(attribute) != field:
            raise _Refused(
                f"has a {node.op} with an attribute {brief(attribute)} of the kind {field!r}, which this "
                "package does not write"
            )
        if isinstance(value, Tensor) and isinstance(value.data, External):
            raise _Refused(f"has a {node.op} that takes its value from {brief(value.data.location)}")
        if attribute in ("to", "dtype") and value not in BITS:
            raise _Refused(f"has a {node.op} to data type {brief(value)}, which this package does not write")


def _check_step(node: Node, graph: OnnxGraph, steps: int, channels: int) -> None:
    """`step` picks a row of tables, and the update counts it up; nothing else may depend on it."""
    if graph.outputs[0].name == NEXT_SAMPLE and node.op == "Add":
        return
    table = graph.initializers.get(node.inputs[0]) if node.op == "Gather" else None
    if table is None or node.inputs[1:] != (STEP,) or node.attributes.get("axis", ("i", 0))[1] != 0:
        raise _Refused(f"uses {STEP} in a {node.op}, expected a Gather from a table")
    if table.dims != (steps, channels, 1, 1):
        raise _Refused(
            f"has a table {brief(table.name)} of shape {brief(list(table.dims))}, expected "
            f"{[steps, channels, 1, 1]} by the manifest"
        )


def _check_timesteps(graph: OnnxGraph, sampling: Sampling) -> None:
    """The update hands the network its next timestep: it must be one of the manifest's."""
    wanted = sampling.schedule.timesteps
    dtype = DTYPES[wanted.dtype.name]
    for node in graph.nodes:
        table = graph.initializers.get(node.inputs[0]) if node.op == "Gather" else None
        if node.op != "Gather" or STEP in node.inputs:
            continue
        content = None if table is None else table.data
        if table is None or table.dtype != dtype or not isinstance(content, bytes):
            raise _Refused("gathers from something that is no table of timesteps")
        if content != wanted.tobytes():
            raise _Refused("has other timesteps than the manifest")


def _check_values(graph: OnnxGraph, inputs: Interface, outputs: Interface, limits: Limits) -> int:
    """How many elements are there at one time, per sample."""
    shapes, live = check_shapes(graph, {name: shape for name, (_, shape) in inputs.items()}, limits)
    for name, (_, dims) in graph.infos.items():
        if name not in shapes or not agrees(dims, shapes[name]):
            raise _Refused(f"says of {brief(name)} what is not so")
    for name, (_, shape) in outputs.items():
        if shapes.get(name) != shape:
            raise _Refused(f"computes {name} in another shape than {brief(_dims(shape))}")
    return live
