"""Checks of a finished graph, for faults that onnx.checker accepts.

A runtime takes such a graph without a message and computes wrongly, or crashes. Most rules are TensorRT's,
found by building such graphs.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx
import onnx_ir as ir
from onnx_ir.convenience import get_const_tensor

from ..core.backend import Emission
from ..errors import GraphError
from .dialect import MACS, OPSET
from .graph import code_of, dequantizer, first_line

Q, DQ = "QuantizeLinear", "DequantizeLinear"
UNSIGNED = (ir.DataType.UINT8, ir.DataType.UINT4, ir.DataType.UINT16, ir.DataType.UINT2)
PASSING = ("Clip", "Reshape", "Transpose", "Flatten", "Squeeze", "Unsqueeze", "Identity", "Cast")
"""Operators that pass codes, or the values that they stand for, on to a layer."""


def lint(model: ir.Model | Path, emission: Emission) -> None:
    """Check a graph by onnx.checker, and by rules of our own and TensorRT's.

    onnx.checker must pass with full checks, and scales must be constant, finite and above zero. All emissions
    except ORT_CPU must also keep TensorRT's rules, but for zero points, which it computes with at 0 alone:
    portable graphs, which other tools read, have what the codes need.

        - opset 21 at most, no `Attention` and no operator of another domain;
        - signed codes, zero points constant and, in the HALF emission, 0;
        - activations with one scale and 8 bits, weights with one scale or one per output channel;
        - both inputs of a layer in the same codes, INT4 only where weights alone are quantized;
        - a float bias;
        - nothing quantized that no Conv, MatMul or Gemm takes.

    Args:
        model: a model that holds its weights (below 2 GB), or the path of a saved model.
    Raises:
        GraphError: a check fails; the message names the node and says what to do.
    """
    try:
        if isinstance(model, Path):
            onnx.checker.check_model(str(model), full_check=True)
            model = ir.load(model)
        else:
            onnx.checker.check_model(ir.to_proto(model), full_check=True)
    except Exception as error:  # the checker raises types of its own, ValueError and protobuf's
        raise GraphError(f"the graph does not pass onnx.checker: {first_line(error)}") from error
    for problem in _problems(model, emission):
        raise GraphError(problem)


def _problems(model: ir.Model, emission: Emission) -> Iterator[str]:
    strict = emission is not Emission.ORT_CPU
    opset = model.opset_imports.get("", 0)
    if strict and opset > OPSET:
        yield f"the graph has opset {opset}: TensorRT takes {OPSET} at most; export it at {OPSET}"
    for node in model.graph:
        where = f"{node.op_type} {node.name}"
        if strict and node.domain not in ("", "ai.onnx"):
            yield (
                f"{where} is of domain {node.domain}, which TensorRT does not know: lower the graph for this "
                "emission"
            )
        if strict and node.op_type == "Attention":
            yield f"{where}: TensorRT does not take Attention; export at opset {OPSET}, which has none"
        if node.op_type in (Q, DQ):
            yield from _scale(node, where)
            if strict:
                yield from _codes(node, where, centred=emission is Emission.HALF)
        elif strict and node.op_type in MACS:
            yield from _layer(node, where)


def _scale(node: ir.Node, where: str) -> Iterator[str]:
    scale = _constant(node.inputs[1])
    if scale is None:
        yield (
            f"the scale of {where} is not a constant: engines need scales that are known when they are "
            "built; TensorRT crashes on others"
        )
    elif not (np.isfinite(scale).all() and (scale > 0).all()):
        yield f"the scale of {where} is {scale.min()}: expected finite values above 0"


def _codes(node: ir.Node, where: str, centred: bool) -> Iterator[str]:
    """Rules for one QuantizeLinear or DequantizeLinear; `centred`: its zero point must be 0."""
    codes = node.outputs[0] if node.op_type == Q else node.inputs[0]
    dtype = None if codes is None else codes.dtype
    if dtype in UNSIGNED:
        yield f"{where} has {dtype} codes, which TensorRT reads as signed: quantize to INT8"
    elif dtype is ir.DataType.INT32:
        yield f"{where} dequantizes INT32, which TensorRT does not take: keep the bias in float"
    elif dtype not in (ir.DataType.INT8, ir.DataType.INT4, ir.DataType.FLOAT8E4M3FN):
        yield f"{where} has {dtype} codes: expected INT8, FLOAT8E4M3FN, or INT4 weights"
    if len(node.inputs) > 2 and node.inputs[2] is not None:
        zero = _constant(node.inputs[2])
        if zero is None:
            yield f"the zero point of {where} is not a constant: give a constant"
        elif centred and (zero.astype(np.float32) != 0).any():
            yield (
                f"{where} has a zero point other than 0, which TensorRT does not compute with: move "
                "the value, and quantize with zero point 0"
            )
    if _is_constant(codes):
        return  # weights: their axis is checked where they are used
    scale = _constant(node.inputs[1])
    if scale is not None and scale.size > 1:
        yield (
            f"{where} has {scale.size} scales for an activation, with which TensorRT drops the layer to "
            "float: give one scale per tensor"
        )
    if dtype is ir.DataType.INT4:
        yield (
            f"{where} makes an activation INT4, which TensorRT knows for weights alone: use INT8 codes and "
            "Clip them"
        )
    if node.op_type == Q and not _feeds_layer(node.outputs[0]):
        yield (
            f"{where} quantizes a value that no Conv, MatMul or Gemm takes, which costs a pass over it: "
            "quantize the inputs of layers only"
        )


def _feeds_layer(value: ir.Value) -> bool:
    """Whether a Conv, MatMul or Gemm takes the value, or what is dequantized from it."""
    takers = value.consumers()
    return any(
        node.op_type in MACS or (node.op_type in (DQ, *PASSING) and any(map(_feeds_layer, node.outputs)))
        for node in takers
    )


def _layer(node: ir.Node, where: str) -> Iterator[str]:
    """Rules for one Conv, MatMul or Gemm."""
    x, weight = (dequantizer(value) for value in node.inputs[:2])
    if weight is not None and _is_constant(weight.inputs[0]):
        yield from _weight_axis(node, weight, where)
    if x is None or weight is None:
        return
    kinds = [code_of(x), code_of(weight)]
    if "int4" in kinds:
        yield (
            f"{where} has INT4 weights and a quantized input, which TensorRT refuses: store the weights' "
            "codes as INT8"
        )
    elif kinds[0] != kinds[1]:
        yield f"{where} has an input in {kinds[0]} and weights in {kinds[1]}: quantize both in the same codes"


def _weight_axis(node: ir.Node, weight: ir.Node, where: str) -> Iterator[str]:
    scale, codes = _constant(weight.inputs[1]), weight.inputs[0]
    if scale is None or scale.size == 1 or codes is None or codes.shape is None:
        return
    rank = len(codes.shape)
    axis = weight.attributes.get_int("axis", 1) % rank
    output = {"Conv": 0, "MatMul": rank - 1, "Gemm": 0 if node.attributes.get_int("transB", 0) else 1}[
        node.op_type
    ]
    if axis != output or scale.ndim != 1:
        yield (
            f"the weight scales of {where} lie along axis {axis} ({DQ} {weight.name}), with which TensorRT "
            "drops the layer to float: "
            f"give one per output channel, axis {output}"
        )


def _is_constant(value: ir.Value | None) -> bool:
    return value is not None and get_const_tensor(value) is not None


def _constant(value: ir.Value | None) -> npt.NDArray[Any] | None:
    tensor = None if value is None else get_const_tensor(value)
    return None if tensor is None else tensor.numpy()
