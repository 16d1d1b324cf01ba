"""What the passes share: names of metadata, a small builder, and the sites of quantized layers."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path

import numpy as np
import numpy.typing as npt
import onnx
import onnx_ir as ir
from onnx_ir.passes.common import RemoveUnusedNodesPass

from ..errors import GraphError

LAYER = "ptqd.layer"
"""Node metadata: path of the torch module (Conv2d or Linear) that a Conv, MatMul or Gemm, or the Add of its bias, comes from."""
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

    def name(self, wanted: str) -> str:
        """`wanted`, or with the first free number behind it."""
        name, n = wanted, 1
        while name in self._names:
            n += 1
            name = f"{wanted}.{n}"
        self._names.add(name)
        return name

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
        attributes: Mapping[str, ir.Attr | int | float | str] | None = None,
        domain: str = "",
    ) -> ir.Value:
        """A new node in front of `before`, or at the end; returns its only output, called `name`."""
        name = self.name(name)
        node = ir.node(op, list(inputs), dict(sorted((attributes or {}).items())), domain=domain, name=f"{op}_{name}")
        out = node.outputs[0]
        out.name, out.dtype, out.shape = name, dtype, None if shape is None else shape.copy()
        if before is None:
            self.graph.append(node)
        else:
            self.graph.insert_before(before, node)
        return out


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
    """Where each quantized layer begins and ends: module path -> (name of its float input, name of its float output).

    The input is the value before QuantizeLinear; the output is the value after the output's DequantizeLinear (convs of the
    ORT CPU emission), the Conv itself (portable emission), or the bias Add of a linear layer. A module that is called more
    than once is reported at its first call.
    """
    sites: dict[str, tuple[str, str]] = {}
    for node in model.graph:
        path = node.metadata_props.get(LAYER)
        quantized = path is not None and node.op_type in ("Conv", "MatMul") and _producer(node.inputs[0], "DequantizeLinear") is not None
        if path is None or path in sites or not quantized:
            continue
        before = node.inputs[0]
        while (producer := _producer(before, "DequantizeLinear", "Clip", "QuantizeLinear")) is not None:
            before = producer.inputs[0]
            if producer.op_type == "QuantizeLinear":
                break
        after = node
        while LAYER_OUTPUT not in after.metadata_props:
            after = after.outputs[0].consumers()[0]
        sites[path] = (str(before.name if before else None), str(after.outputs[0].name))
    return sites


def _producer(value: ir.Value | None, *ops: str) -> ir.Node | None:
    node = None if value is None else value.producer()
    return node if node is not None and node.op_type in ops else None


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


def lint(model: ir.Model | Path) -> None:
    """Structural checks: onnx.checker with full checks passes, and every quantization scale is a constant, finite and above zero.

    Args:
        model: a model that holds its weights (below 2 GB), or the path of a saved one.
    Raises:
        GraphError: a check fails.
    """
    try:
        if isinstance(model, Path):
            onnx.checker.check_model(str(model), full_check=True)
            model = ir.load(model)
        else:
            onnx.checker.check_model(ir.to_proto(model), full_check=True)
    except Exception as error:  # the checker raises its own types as well as ValueError and protobuf's
        raise GraphError(f"the graph does not pass onnx.checker: {first_line(error)}") from error
    for node in model.graph:
        if node.op_type not in ("QuantizeLinear", "DequantizeLinear"):
            continue
        scale = node.inputs[1]
        if scale is None or scale.const_value is None:
            raise GraphError(f"the scale of {node.op_type} {node.name} is not a constant: engines need scales that are known when they are built")
        values = scale.const_value.numpy()
        if not (np.isfinite(values).all() and (values > 0).all()):
            raise GraphError(f"the scale of {node.op_type} {node.name} is {values.min()}: expected finite values above 0")


def first_line(error: BaseException) -> str:
    """Type and first line of the innermost cause; a line that ends in a colon with the one that it announces."""
    while error.__cause__ is not None:
        error = error.__cause__
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    if not lines:
        return type(error).__name__
    text = " ".join(lines[:2]) if lines[0].endswith(":") else lines[0]
    return f"{type(error).__name__}: {text}"
