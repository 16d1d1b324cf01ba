"""What the passes share: names of metadata, a small builder, and the sites of quantized layers."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

import numpy as np
import numpy.typing as npt
import onnx_ir as ir
from onnx_ir.passes.common import RemoveUnusedNodesPass

from ..errors import GraphError

LAYER = "ptqd.layer"
"""Node metadata: path of the torch module (Conv2d or Linear) that a Conv, MatMul or Gemm, or the Add of its bias, comes from."""
LAYER_INPUT = "ptqd.layer_input"
"""Node metadata in quantized graphs: the node is part of the quantization of a layer's input."""
LAYER_OUTPUT = "ptqd.layer_output"
"""Node metadata in quantized graphs: module path of the layer whose float result this node yields."""
ATTENTION = "ptqd.attention"
"""Node metadata: the node is part of torch's scaled_dot_product_attention."""

OUTPUT = "output"
"""Name of the raw network output, before `fold`."""


class Builder:
    """Inserts nodes and constants into a graph under names that are unique and depend on the graph alone."""

    def __init__(self, graph: ir.Graph) -> None:
        self.graph = graph
        values = [*graph.inputs, *graph.initializers.values(), *(v for node in graph for v in node.outputs)]
        self._names = {value.name for value in values}
        self._node_names = {node.name for node in graph}

    def name(self, wanted: str) -> str:
        """A value's name: `wanted`, or with the first free number behind it."""
        return _free(wanted, self._names)

    def rename(self, node: ir.Node, wanted: str) -> None:
        """Call a node `wanted`, or with the first free number behind it ("conv.2")."""
        self._node_names.discard(node.name)
        node.name = _free(wanted, self._node_names)

    def const(self, name: str, array: npt.NDArray[np.generic]) -> ir.Value:
        """A new initializer."""
        name = self.name(name)
        value = ir.Value(name=name, const_value=ir.tensor(np.ascontiguousarray(array).reshape(array.shape), name=name))
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
        """A new node in front of `before`, or at the end; returns its only output, called `name`."""
        name = self.name(name)
        node = ir.node(op, list(inputs), dict(sorted((attributes or {}).items())), domain=domain, name=_free(f"{op}_{name}", self._node_names))
        out = node.outputs[0]
        out.name, out.dtype, out.shape = name, dtype, None if shape is None else shape.copy()
        if before is None:
            self.graph.append(node)
        else:
            self.graph.insert_before(before, node)
        return out


def _free(wanted: str, taken: set[str | None]) -> str:
    """`wanted`, or with the first number behind it that is not taken; taken from then on."""
    name, n = wanted, 1
    while name in taken:
        n += 1
        name = f"{wanted}.{n}"
    taken.add(name)
    return name


def take_over(old: ir.Value, new: ir.Value) -> None:
    """`new` replaces `old` everywhere, name and role as graph output included; the nodes that only `old` needed are left to `prune`."""
    name = old.name
    old.replace_all_uses_with(new, replace_graph_outputs=True)
    old.name, new.name = f"{name}.replaced", name


def prune(model: ir.Model) -> ir.Model:
    """Drop nodes and initializers that no output needs."""
    RemoveUnusedNodesPass()(model)
    return model


def is_const(value: ir.Value | None) -> bool:
    """Whether the value is an initializer."""
    return value is not None and value.is_initializer()


def static_dims(value: ir.Value | None) -> list[int | None]:
    """Dimensions of a value, None where not known; empty for an unknown rank."""
    if value is None or value.shape is None:
        return []
    return [dim if isinstance(dim, int) else None for dim in value.shape]


def exported_layers(model: ir.Model) -> set[str]:
    """Module paths of the Conv2d and Linear layers that the exported graph holds as themselves."""
    return {node.metadata_props[LAYER] for node in model.graph if LAYER in node.metadata_props and node.op_type != "Add"}


def layer_sites(model: ir.Model) -> dict[str, tuple[str, str]]:
    """Where each quantized layer begins and ends: module path -> (name of its input, name of its output).

    The input is the float32 value that is quantized; where weights alone are, the node's own input. The output is the value after
    the output's DequantizeLinear (convs of the ORT CPU emission), the Conv itself, or the bias Add of a linear layer. In the half
    emission outputs and unquantized inputs are float16 where the layer computes in it. A module that is called more than once is
    reported at its first call.
    """
    quantized = {node.metadata_props.get(LAYER_OUTPUT) for node in model.graph}
    sites: dict[str, tuple[str, str]] = {}
    for node in model.graph:
        path = node.metadata_props.get(LAYER)
        if path is None or path in sites or path not in quantized:
            continue
        before, after = _before_quantization(node.inputs[0]), node
        while LAYER_OUTPUT not in after.metadata_props:
            after = after.outputs[0].consumers()[0]
        sites[path] = (str(before.name if before else None), str(after.outputs[0].name))
    return sites


def _before_quantization(value: ir.Value | None) -> ir.Value | None:
    """The value that a layer's quantized input was made of; the value itself where it is not quantized."""
    node = producer(value, "Cast")
    inner = value if node is None or LAYER_INPUT in node.metadata_props else node.inputs[0]  # the half emission casts what is dequantized
    before = inner
    while (step := producer(before)) is not None and LAYER_INPUT in step.metadata_props:
        before = step.inputs[0]
    return value if before is inner else before


def producer(value: ir.Value | None, *ops: str) -> ir.Node | None:
    """The node that yields a value, if it is one of these operators (any where none is named)."""
    node = None if value is None else value.producer()
    return node if node is not None and (not ops or node.op_type in ops) else None


def uncast(value: ir.Value | None) -> ir.Value | None:
    """The value in front of any Casts."""
    while (node := producer(value, "Cast")) is not None:
        value = node.inputs[0]
    return value


def dequantizer(value: ir.Value | None) -> ir.Node | None:
    """The DequantizeLinear that a value comes from, Casts between them or not."""
    return producer(uncast(value), "DequantizeLinear")


CODES = {
    ir.DataType.INT4: "int4",
    ir.DataType.UINT4: "int4",
    ir.DataType.INT8: "int8",
    ir.DataType.UINT8: "int8",
    ir.DataType.FLOAT8E4M3FN: "fp8",
}
"""What the codes of DequantizeLinear are."""
MACS = ("Conv", "MatMul", "Gemm")
"""Operators whose inputs are worth quantizing."""


def code_of(node: ir.Node) -> str:
    """Codes of a DequantizeLinear: "int4", "int8" or "fp8", else the name of the type."""
    dtype = None if node.inputs[0] is None else node.inputs[0].dtype
    return CODES.get(dtype, dtype.name) if dtype is not None else "unknown"


def quantized_nodes(model: ir.Model | Path) -> dict[str, str]:
    """{node name: "int8" | "fp8"} of every Conv, MatMul and Gemm whose input and weight are both dequantized: meant to run in 8 bits.

    Raises:
        GraphError: the path is not an ONNX graph.
    """
    if isinstance(model, Path):
        model = load(model)
    nodes: dict[str, str] = {}
    for node in model.graph:
        if node.op_type in MACS and (x := dequantizer(node.inputs[0])) is not None and dequantizer(node.inputs[1]) is not None:
            nodes[str(node.name)] = code_of(x)
    return nodes


def load(path: Path) -> ir.Model:
    """A saved graph; its weights stay in their file.

    Raises:
        GraphError: missing, or not an ONNX graph.
    """
    try:
        return ir.load(path)
    except Exception as error:  # an OSError or protobuf's DecodeError, by the protobuf build
        raise GraphError(f"{path} cannot be read as an ONNX graph: {first_line(error)}") from error


def with_outputs(model: ir.Model, names: Iterable[str]) -> ir.Model:
    """A copy of the model with these values as further outputs (those that are outputs already are left as they are).

    Raises:
        GraphError: the graph has no value of that name.
    """
    copy = model.clone()
    values = {value.name: value for value in (*copy.graph.inputs, *(v for node in copy.graph for v in node.outputs))}
    present = {value.name for value in copy.graph.outputs}
    for name in names:
        if name not in values:
            raise GraphError(f"the graph has no value {name!r}: give a name that layer_sites reports")
        if name not in present:
            present.add(name)
            copy.graph.outputs.append(values[name])
    return copy


def first_line(error: BaseException) -> str:
    """Type and first line of the innermost cause; a line that ends in a colon with the one that it announces."""
    while error.__cause__ is not None:
        error = error.__cause__
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    if not lines:
        return type(error).__name__
    text = " ".join(lines[:2]) if lines[0].endswith(":") else lines[0]
    return f"{type(error).__name__}: {text}"
