"""The operators that a bundle's graphs may hold, each with its attributes: all of ONNX (opset 21) that a
network can export to, whose results depend on their inputs alone and whose result shapes follow from shapes
and constants.

Left out, and why:
    If, Loop, Scan, SequenceMap         subgraphs: control flow, work without bound
    Sequence*, Optional*, SplitToSequence, ConcatFromSequence    values other than tensors
    String*, RegexFullMatch, TfIdfVectorizer, ImageDecoder       text and files as data
    Random*, Bernoulli, Multinomial, Dropout    no functions of their inputs
    RNN, GRU, LSTM                      walks along an axis, with state
    NonZero, Unique, Compress, NonMaxSuppression, MaxUnpool      sizes that follow from data
    DFT, STFT, MelWeightMatrix, *Window, CenterCropPad           sizes in ways that `shapes` does not follow
    QLinear*, *Integer, DynamicQuantizeLinear   this package quantizes by Q and DQ alone
    RoiAlign, MaxRoiPool, DeformConv, Det, AffineGrid, CastLike, *Loss   no network tried exports to them
    Upsample, Scatter                   withdrawn before opset 21
    Attention, RMSNormalization, RotaryEmbedding, Swish, ...     newer than opset 21
"""

from __future__ import annotations

from collections.abc import Mapping

OPSET = 21
"""Of the default domain: what the exporter writes, and what the rules of `shapes` hold for."""
MICROSOFT = "com.microsoft"
OPSETS: Mapping[str, int] = {"": OPSET, MICROSOFT: 1}
MIN_IR_VERSION, MAX_IR_VERSION = 8, 13


def _all(operators: str, attributes: str = "") -> dict[str, str]:
    return dict.fromkeys(operators.split(), attributes)


SAME: Mapping[str, str] = {
    **_all(
        "Abs Acos Acosh Asin Asinh Atan Atanh BitwiseNot Ceil Clip Cos Cosh Erf Exp Floor HardSwish Identity "
        "IsNaN Log Mish Neg Not PRelu Reciprocal Relu Round Sigmoid Sign Sin Sinh Softplus Softsign Sqrt Tan "
        "Tanh"
    ),
    "BatchNormalization": "epsilon:f momentum:f",
    "Cast": "to:i saturate:i",
    "Celu": "alpha:f",
    "CumSum": "exclusive:i reverse:i",
    "DequantizeLinear": "axis:i",
    "Elu": "alpha:f",
    "EyeLike": "dtype:i k:i",
    "Gelu": "approximate:s",
    "GroupNormalization": "epsilon:f num_groups:i stash_type:i",
    "HardSigmoid": "alpha:f beta:f",
    "Hardmax": "axis:i",
    "InstanceNormalization": "epsilon:f",
    "IsInf": "detect_negative:i detect_positive:i",
    "LRN": "alpha:f beta:f bias:f size:i",
    "LayerNormalization": "axis:i epsilon:f stash_type:i",
    "LeakyRelu": "alpha:f",
    "LogSoftmax": "axis:i",
    "LpNormalization": "axis:i p:i",
    "MeanVarianceNormalization": "axes:ints",
    "QuantizeLinear": "axis:i",
    "ReverseSequence": "batch_axis:i time_axis:i",
    "ScatterElements": "axis:i reduction:s",
    "ScatterND": "reduction:s",
    "Selu": "alpha:f gamma:f",
    "Shrink": "bias:f lambd:f",
    "Softmax": "axis:i",
    "ThresholdedRelu": "alpha:f",
    "Trilu": "upper:i",
}
"""The result has the shape of the first input."""
BROADCAST: Mapping[str, str] = {
    **_all(
        "Add And BitwiseAnd BitwiseOr BitwiseXor Div Equal Greater GreaterOrEqual Less LessOrEqual Max Mean "
        "Min Mul Or Pow Sub Sum Where Xor"
    ),
    "BitShift": "direction:s",
    "Mod": "fmod:i",
}
"""The result has the common shape of all inputs."""
REDUCE: Mapping[str, str] = _all(
    "ReduceL1 ReduceL2 ReduceLogSum ReduceLogSumExp ReduceMax ReduceMean ReduceMin ReduceProd ReduceSum "
    "ReduceSumSquare",
    "keepdims:i noop_with_empty_axes:i",
)
ARG: Mapping[str, str] = _all("ArgMax ArgMin", "axis:i keepdims:i select_last_index:i")
GLOBAL: Mapping[str, str] = {"GlobalAveragePool": "", "GlobalLpPool": "p:i", "GlobalMaxPool": ""}
WINDOW = "auto_pad:s dilations:ints kernel_shape:ints pads:ints strides:ints"
POOL: Mapping[str, str] = {
    "AveragePool": f"{WINDOW} ceil_mode:i count_include_pad:i",
    "LpPool": f"{WINDOW} ceil_mode:i p:i",
    "MaxPool": f"{WINDOW} ceil_mode:i storage_order:i",
}
OTHERS: Mapping[str, str] = {
    "Col2Im": "dilations:ints pads:ints strides:ints",
    "Concat": "axis:i",
    "Constant": "value:t value_float:f value_floats:floats value_int:i value_ints:ints",
    "ConstantOfShape": "value:t",
    "Conv": f"{WINDOW} group:i",
    "ConvTranspose": f"{WINDOW} group:i output_padding:ints",
    "DepthToSpace": "blocksize:i mode:s",
    "Einsum": "equation:s",
    "Expand": "",
    "Flatten": "axis:i",
    "Gather": "axis:i",
    "GatherElements": "axis:i",
    "GatherND": "batch_dims:i",
    "Gemm": "alpha:f beta:f transA:i transB:i",
    "GridSample": "align_corners:i mode:s padding_mode:s",
    "MatMul": "",
    "OneHot": "axis:i",
    "Pad": "mode:s",
    "Range": "",
    "Reshape": "allowzero:i",
    "Resize": "antialias:i axes:ints coordinate_transformation_mode:s cubic_coeff_a:f exclude_outside:i "
    "extrapolation_value:f keep_aspect_ratio_policy:s mode:s nearest_mode:s",
    "Shape": "end:i start:i",
    "Size": "",
    "Slice": "",
    "SpaceToDepth": "blocksize:i",
    "Split": "axis:i num_outputs:i",
    "Squeeze": "",
    "Tile": "",
    "TopK": "axis:i largest:i sorted:i",
    "Transpose": "perm:ints",
    "Unsqueeze": "",
}
ATTENTION = "MultiHeadAttention"
"""Of Microsoft's domain: what the lowering for ONNX Runtime's CPU kernels writes."""


def _fields(text: str) -> Mapping[str, str]:
    return dict(pair.split(":") for pair in text.split())


DEFAULT: Mapping[str, Mapping[str, str]] = {
    op: _fields(text)
    for group in (SAME, BROADCAST, REDUCE, ARG, GLOBAL, POOL, OTHERS)
    for op, text in group.items()
}
"""Field that holds each attribute, by operator of the default domain."""
FUSED: Mapping[str, Mapping[str, str]] = {ATTENTION: {"num_heads": "i", "scale": "f"}}
"""Operators of Microsoft's domain."""
UPDATE = {
    *("Gather", "Mul", "Add", "Sub", "Clip", "Concat", "Split", "Min", "Shape", "Expand"),
    *("Abs", "Flatten", "TopK", "Slice", "Unsqueeze", "Neg", "Max", "Div"),  # dynamic thresholding
    *("ReduceMean", "Sqrt"),  # guidance_rescale
}
"""All that the sampler's update is made of."""
