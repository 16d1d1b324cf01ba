"""Half precision between quantized layers: what engines on GPUs run fastest.

What the sample, or another float input, flows through is computed in float16, with float32 where it matters:

    - timesteps and class embeddings, up to where they meet the sample: a timestep of 2049 has no float16;
    - QuantizeLinear and DequantizeLinear, whose scales must stay float32: in float16 a weight scale below 6e-5 is subnormal;
      x -> Cast(float32) -> Q -> DQ -> Cast(float16) has the codes of the float32 graph, and TensorRT still takes it as 8-bit;
    - sums and powers (WIDE), which leave the range of float16, up to where they meet the sample again: a normalisation's variance;
    - inputs that ONNX wants in float32 whatever the rest is (Resize's scales), by the operators' schemas;
    - the network's output and what follows it: the correction tables.

Normalisations keep their stash_type (float32). Inputs and outputs of the graph keep their types and names.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt
import onnx
import onnx_ir as ir
from onnx_ir.convenience import get_const_tensor

from ..errors import GraphError
from .graph import Builder, prune

FLOAT, HALF = ir.DataType.FLOAT, ir.DataType.FLOAT16
WIDE = frozenset(("CumSum", "Exp", "Pow", "ReduceL1", "ReduceL2", "ReduceLogSumExp", "ReduceMean", "ReduceProd", "ReduceSum", "ReduceSumSquare"))
"""Operators whose results are soon too large, or their summands too many, for float16."""


def halve(model: ir.Model) -> ir.Model:
    """A new model that computes in float16 between its float32 inputs and outputs; call it before `fold`.

    Raises:
        GraphError: an operator with a subgraph, or one that ONNX does not define.
    """
    copy = model.clone()
    graph = copy.graph
    halving = _Halving(graph, copy.opset_imports.get("", 0))
    for node in list(graph):
        halving.node(node)
    for i, value in enumerate(graph.outputs):
        if value.dtype is HALF:
            graph.outputs[i] = halving.as_output(value)
    return prune(copy)


class _Halving:
    """`low`: the values, of whatever type, that bring float16 to those who compute with them."""

    def __init__(self, graph: ir.Graph, opset: int) -> None:
        self.build = Builder(graph)
        self.opset = opset
        self.low = {value for value in graph.inputs if value.dtype is FLOAT}
        self.casts: dict[tuple[ir.Value, ir.DataType], ir.Value] = {}

    def node(self, node: ir.Node) -> None:
        """Give a node float16 inputs if one of them brings it."""
        if any(attribute.type in (ir.AttributeType.GRAPH, ir.AttributeType.GRAPHS) for attribute in node.attributes.values()):
            raise GraphError(f"{node.op_type} {node.name} holds a subgraph, which cannot be brought to float16: export a model without control flow")
        if not any(value in self.low for value in node.inputs):
            return
        if node.op_type == "Cast":
            value = node.inputs[0]
            if value is not None and value.dtype in (FLOAT, HALF) and node.attributes["to"].as_int() == FLOAT:
                # It did nothing in the float32 graph; here it would leave all that follows in float32.
                node.attributes["to"] = ir.AttrInt64("to", int(HALF))
                self._lower_outputs(node, [0])
            return
        inputs, outputs, halves = self._variables(node)
        for variable in {inputs[i] for i, value in enumerate(node.inputs) if value in self.low}:
            quantizes = node.op_type in ("QuantizeLinear", "DequantizeLinear")
            float_only = quantizes or node.op_type in WIDE or variable not in halves
            for i, value in enumerate(node.inputs):
                if value is not None and inputs[i] == variable and value.dtype in (FLOAT, HALF):
                    self._cast_input(node, i, value, FLOAT if float_only else HALF)
            if quantizes:
                self.low.update(node.outputs)
            elif not float_only:
                self._lower_outputs(node, [i for i, name in enumerate(outputs) if name == variable])

    def _variables(self, node: ir.Node) -> tuple[list[str], list[str], set[str]]:
        """The type variable of each input and output by the operator's schema, and those variables that may be float16."""
        try:
            schema = onnx.defs.get_schema(node.op_type, self.opset, node.domain)
        except onnx.defs.SchemaError:
            raise GraphError(f"{node.domain}::{node.op_type} {node.name} is not an ONNX operator: lower the portable graph") from None
        inputs, outputs = (
            [formal[min(i, len(formal) - 1)].type_str for i in range(len(actual))]
            for formal, actual in ((schema.inputs, node.inputs), (schema.outputs, node.outputs))
        )
        # An operator that takes any type (Concat, Reshape, Where) passes codes on as well.
        return inputs, outputs, {c.type_param_str for c in schema.type_constraints if "tensor(float16)" in c.allowed_type_strs}

    def _lower_outputs(self, node: ir.Node, indices: list[int]) -> None:
        for i in indices:
            value = node.outputs[i]
            self.low.add(value)
            if value.dtype is FLOAT:
                value.type = ir.TensorType(HALF)  # setting dtype would write to the type that the copy shares with the original

    def _cast_input(self, node: ir.Node, index: int, value: ir.Value, to: ir.DataType) -> None:
        """Take the value in another float type: a constant of its own, or one Cast for all who need it."""
        if value.dtype is to:
            return
        if (value, to) not in self.casts:
            name = f"{value.name}.{'half' if to is HALF else 'float'}"
            constant = get_const_tensor(value) if to is HALF else None
            if constant is not None:
                self.casts[value, to] = self.build.const(name, to_half(constant.numpy()))
            else:
                self.casts[value, to] = self.build.node(node, "Cast", [value], name, to, value.shape, {"to": int(to)})
        node.replace_input_with(index, self.casts[value, to])

    def as_output(self, value: ir.Value) -> ir.Value:
        """`value` cast to float32 under its own name."""
        name = str(value.name)
        new = self.build.node(None, "Cast", [value], f"{name}.float", FLOAT, value.shape, {"to": int(FLOAT)})
        value.name, new.name = self.build.name(f"{name}.half"), name
        return new


def to_half(array: npt.NDArray[np.generic]) -> npt.NDArray[np.float16]:
    """float16, finite where `array` is."""
    limit = np.finfo(np.float16).max
    clipped = np.where(np.isfinite(array.astype(np.float32)), np.clip(array, -float(limit), float(limit)), array)
    return np.asarray(clipped, np.float16)
