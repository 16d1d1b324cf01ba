"""What the passes share: a small graph builder, and queries on a graph."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

import numpy as np
import numpy.typing as npt
import onnx_ir as ir
from onnx_ir.passes.common import RemoveUnusedNodesPass

from ..errors import GraphError
from .dialect import CODES


class Builder:
    """Inserts nodes and constants into a graph under names that are unique and depend on the graph alone."""

    def __init__(self, graph: ir.Graph) -> None:
        self.graph = graph
        values = [*graph.inputs, *graph.initializers.values(), *(v for node in graph for v in node.outputs)]
        self._names = {value.name for value in values}
        self._node_names = {node.name for node in graph}

    def name(self, wanted: str) -> str:
        """A free name for a value: `wanted`, or `wanted` followed by the first free number."""
        return _free(wanted, self._names)

    def rename(self, node: ir.Node, wanted: str) -> None:
        """Name a node `wanted`, or `wanted` followed by the first free number ("conv.2")."""
        self._node_names.discard(node.name)
        node.name = _free(wanted, self._node_names)

    def const(self, name: str, array: npt.NDArray[np.generic]) -> ir.Value:
        """A new initializer."""
        name = self.name(name)
        value = ir.Value(
            name=name, const_value=ir.tensor(np.ascontiguousarray(array).reshape(array.shape), name=name)
        )
        value.dtype, value.shape = value.const_value.dtype, ir.Shape(array.shape)  # type: ignore[union-attr]
        self.graph.register_initializer(value)
        return value

    def node(
        self,
        before: ir.Node | None,
        op: str,
        inputs: Iterable[ir.Value | None],
        name: str,
        dtype: ir.DataType,
        shape: ir.Shape | None,
        attributes: Mapping[str, ir.Attr | int | float | str | Sequence[int]] | None = None,
        domain: str = "",
    ) -> ir.Value:
        """Insert a node before `before`, or at the end; returns its only output, called `name`."""
        name = self.name(name)
        node = ir.node(
            op,
            list(inputs),
            dict(sorted((attributes or {}).items())),
            domain=domain,
            name=_free(f"{op}_{name}", self._node_names),
        )
        out = node.outputs[0]
        out.name, out.dtype, out.shape = name, dtype, None if shape is None else shape.copy()
        if before is None:
            self.graph.append(node)
        else:
            self.graph.insert_before(before, node)
        return out


def _free(wanted: str, taken: set[str | None]) -> str:
    """`wanted`, or `wanted` followed by the first number that is not taken; the result is taken then."""
    name, n = wanted, 1
    while name in taken:
        n += 1
        name = f"{wanted}.{n}"
    taken.add(name)
    return name


def take_over(old: ir.Value, new: ir.Value) -> None:
    """Replace `old` by `new` everywhere, including its name and its role as a graph output.

    `prune` removes the nodes that only `old` needed.
    """
    name = old.name
    old.replace_all_uses_with(new, replace_graph_outputs=True)
    old.name, new.name = f"{name}.replaced", name


def prune(model: ir.Model) -> ir.Model:
    """Remove nodes and initializers that no output needs."""
    RemoveUnusedNodesPass()(model)
    return model


def is_const(value: ir.Value | None) -> bool:
    """Whether the value is an initializer."""
    return value is not None and value.is_initializer()


def static_dims(value: ir.Value | None) -> list[int | None]:
    """Dimensions of a value: None where one is unknown, empty for an unknown rank."""
    if value is None or value.shape is None:
        return []
    return [dim if isinstance(dim, int) else None for dim in value.shape]


def producer(value: ir.Value | None, *ops: str) -> ir.Node | None:
    """The node that yields a value, if its operator is one of `ops`; without `ops`, any."""
    node = None if value is None else value.producer()
    return node if node is not None and (not ops or node.op_type in ops) else None


def uncast(value: ir.Value | None) -> ir.Value | None:
    """The value in front of any Casts."""
    while (node := producer(value, "Cast")) is not None:
        value = node.inputs[0]
    return value


def dequantizer(value: ir.Value | None) -> ir.Node | None:
    """The DequantizeLinear that a value comes from, with or without Casts in between."""
    return producer(uncast(value), "DequantizeLinear")


def code_of(node: ir.Node) -> str:
    """The codes of a DequantizeLinear: "int4", "int8" or "fp8", otherwise the name of their type."""
    dtype = None if node.inputs[0] is None else node.inputs[0].dtype
    return CODES.get(dtype, dtype.name) if dtype is not None else "unknown"


def load(path: Path) -> ir.Model:
    """Load a saved graph; its weights stay in their file.

    Raises:
        GraphError: the file is missing, or is not an ONNX graph.
    """
    try:
        return ir.load(path)
    except Exception as error:  # an OSError or protobuf's DecodeError, depending on the protobuf build
        raise GraphError(f"{path} cannot be read as an ONNX graph: {first_line(error)}") from error


def with_outputs(model: ir.Model, names: Iterable[str]) -> ir.Model:
    """A copy of the model with these values as further outputs; existing outputs stay as they are.

    Raises:
        GraphError: the graph has no value of that name.
    """
    copy = model.clone()
    values = {
        value.name: value for value in (*copy.graph.inputs, *(v for node in copy.graph for v in node.outputs))
    }
    present = {value.name for value in copy.graph.outputs}
    for name in names:
        if name not in values:
            raise GraphError(f"the graph has no value {name!r}: give a name that layer_sites reports")
        if name not in present:
            present.add(name)
            copy.graph.outputs.append(values[name])
    return copy


def first_line(error: BaseException) -> str:
    """Type and first line of the innermost cause; a line that ends in a colon also gets the next line."""
    while error.__cause__ is not None:
        error = error.__cause__
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    if not lines:
        return type(error).__name__
    text = " ".join(lines[:2]) if lines[0].endswith(":") else lines[0]
    return f"{type(error).__name__}: {text}"
