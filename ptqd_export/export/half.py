"""Half precision between quantized layers: the form that engines on GPUs run fastest.

Everything that depends on the sample, or on another float input, is computed in float16. These parts stay in
float32:

    - timesteps and class embeddings, up to where they join the sample: float16 cannot hold a timestep of
      2049;
    - QuantizeLinear and DequantizeLinear, whose scales must stay float32: in float16 a weight scale below
      6e-5 is subnormal. x -> Cast(float32) -> Q -> DQ -> Cast(float16) has the codes of the float32 graph,
      and TensorRT still runs it in 8 bits;
    - what prepares an input for QuantizeLinear (smoothing, moving): a rounding there would change codes;
    - sums and powers (WIDE), which leave the range of float16, up to where they join the sample again: a
      normalisation's variance;
    - inputs that the operators' schemas want in float32 whatever the rest is (Resize's scales);
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
from .dialect import LAYER_INPUT
from .graph import Builder, prune

FLOAT, HALF = ir.DataType.FLOAT, ir.DataType.FLOAT16
WIDE = frozenset(
    (
        "CumSum",
        "Exp",
        "Pow",
        "ReduceL1",
        "ReduceL2",
        "ReduceLogSumExp",
        "ReduceMean",
        "ReduceProd",
        "ReduceSum",
        "ReduceSumSquare",
    )
)
"""Operators whose results easily become too large, or whose summands too many, for float16."""


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
    """The state of one conversion to float16.

    `low` holds the values, of whatever type, whose consumers compute in float16.
    """

    def __init__(self, graph: ir.Graph, opset: int) -> None:
        self.build = Builder(graph)
        self.opset = opset
        self.low = {value for value in graph.inputs if value.dtype is FLOAT}
        self.casts: dict[tuple[ir.Value, ir.DataType], ir.Value] = {}

    def node(self, node: ir.Node) -> None:
        """Give a node float16 inputs if one of its inputs is in `low`."""
        if any(
            attribute.type in (ir.AttributeType.GRAPH, ir.AttributeType.GRAPHS)
            for attribute in node.attributes.values()
        ):
            raise GraphError(
                f"{node.op_type} {node.name} holds a subgraph, which cannot be brought to float16: export a "
                "model without control flow"
            )
        if not any(value in self.low for value in node.inputs):
            return
        if node.op_type == "Cast":
            value = node.inputs[0]
            if value is not None and value.dtype in (FLOAT, HALF) and node.attributes["to"].as_int() == FLOAT:
                # A Cast to float32 did nothing in the float32 graph; here it would keep what follows float32.
                node.attributes["to"] = ir.AttrInt64("to", int(HALF))
                self._lower_outputs(node, [0])
            return
        inputs, outputs, halves = self._variables(node)
        for variable in {inputs[i] for i, value in enumerate(node.inputs) if value in self.low}:
            quantizes = node.op_type in ("QuantizeLinear", "DequantizeLinear")
            prepares = LAYER_INPUT in node.metadata_props and node.op_type in ("Mul", "Sub")
            float_only = quantizes or prepares or node.op_type in WIDE or variable not in halves
            for i, value in enumerate(node.inputs):
                if value is not None and inputs[i] == variable and value.dtype in (FLOAT, HALF):
                    self._cast_input(node, i, value, FLOAT if float_only else HALF)
            if quantizes or prepares:
                self.low.update(node.outputs)
            elif not float_only:
                self._lower_outputs(node, [i for i, name in enumerate(outputs) if name == variable])

    def _variables(self, node: ir.Node) -> tuple[list[str], list[str], set[str]]:
        """The type variables of the inputs and of the outputs in the operator's schema.

        The third item is the set of those variables that may be float16.
        """
        try:
            schema = onnx.defs.get_schema(node.op_type, self.opset, node.domain)
        except onnx.defs.SchemaError:
            raise GraphError(
                f"{node.domain}::{node.op_type} {node.name} is not an ONNX operator: lower the portable graph"
            ) from None
        inputs, outputs = (
            [formal[min(i, len(formal) - 1)].type_str for i in range(len(actual))]
            for formal, actual in ((schema.inputs, node.inputs), (schema.outputs, node.outputs))
        )
        # An operator that takes any type (Concat, Reshape, Where) also passes codes on.
        return (
            inputs,
            outputs,
            {c.type_param_str for c in schema.type_constraints if "tensor(float16)" in c.allowed_type_strs},
        )

    def _lower_outputs(self, node: ir.Node, indices: list[int]) -> None:
        for i in indices:
            value = node.outputs[i]
            self.low.add(value)
            if value.dtype is FLOAT:
                value.type = ir.TensorType(
                    HALF
                )  # setting dtype would change the type object that the copy shares with the original

    def _cast_input(self, node: ir.Node, index: int, value: ir.Value, to: ir.DataType) -> None:
        """Feed the value in another float type: as a new constant, or by one Cast that consumers share."""
        if value.dtype is to:
            return
        if (value, to) not in self.casts:
            name = f"{value.name}.{'half' if to is HALF else 'float'}"
            constant = get_const_tensor(value) if to is HALF else None
            if constant is not None:
                self.casts[value, to] = self.build.const(name, to_half(constant.numpy()))
            else:
                self.casts[value, to] = self.build.node(
                    node, "Cast", [value], name, to, value.shape, {"to": int(to)}
                )
        node.replace_input_with(index, self.casts[value, to])

    def as_output(self, value: ir.Value) -> ir.Value:
        """`value` cast to float32 under its own name."""
        name = str(value.name)
        new = self.build.node(None, "Cast", [value], f"{name}.float", FLOAT, value.shape, {"to": int(FLOAT)})
        value.name, new.name = self.build.name(f"{name}.half"), name
        return new


def to_half(array: npt.NDArray[np.generic]) -> npt.NDArray[np.float16]:
    """`array` in float16; finite values stay finite."""
    limit = np.finfo(np.float16).max
    clipped = np.where(
        np.isfinite(array.astype(np.float32)), np.clip(array, -float(limit), float(limit)), array
    )
    return np.asarray(clipped, np.float16)
