"""The ONNX that this package writes: opset, names, and the marks that its passes leave for each other."""

from __future__ import annotations

import onnx_ir as ir

OPSET = 21
"""Opset of every graph: from 23 on torch emits `Attention`, which TensorRT does not take."""
BATCH = "batch"
PRODUCER = "ptqd-export"
IR_VERSION = 10

LAYER = "ptqd.layer"
"""Node metadata: path of the torch Conv2d or Linear that a Conv, MatMul, Gemm or bias Add comes from."""
LAYER_INPUT = "ptqd.layer_input"
"""Node metadata in quantized graphs: the node is part of the quantization of a layer's input."""
LAYER_OUTPUT = "ptqd.layer_output"
"""Node metadata in quantized graphs: module path of the layer whose float result this node yields."""
ATTENTION = "ptqd.attention"
"""Node metadata: the node is part of torch's scaled_dot_product_attention."""

OUTPUT = "output"
"""Name of the raw network output, before `fold`."""

CODES = {
    ir.DataType.INT4: "int4",
    ir.DataType.UINT4: "int4",
    ir.DataType.INT8: "int8",
    ir.DataType.UINT8: "int8",
    ir.DataType.FLOAT8E4M3FN: "fp8",
}
"""Names for the types of codes that DequantizeLinear takes."""
MACS = ("Conv", "MatMul", "Gemm")
"""Operators whose inputs are worth quantizing."""
