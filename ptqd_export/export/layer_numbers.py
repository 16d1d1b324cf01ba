"""What a quantized layer's graph holds of its numbers: codes as they are stored, biases, and shifts."""

from __future__ import annotations

import ml_dtypes
import numpy as np
import numpy.typing as npt
import onnx_ir as ir

from ..core.quant import F32, LayerQuant
from ..errors import GraphError
from .graph import static_dims

PACKED_BITS = 4
"""Where weights alone are quantized, they are stored as INT4 up to this many bits."""


def check_layer(node: ir.Node, layer: LayerQuant, kind: str, shape: list[int]) -> None:
    """Check that a node of the graph is the layer that was quantized.

    Raises:
        GraphError: it is another kind of layer, or has another shape.
    """
    if layer.kind != kind:
        raise GraphError(
            f"layer {layer.name!r} is a {layer.kind} in the quantized network but a {node.op_type} in "
            "the graph: export what was calibrated"
        )
    dims: list[int | None] = static_dims(node.inputs[1])
    if dims not in (shape, shape[::-1] if kind == "linear" else shape):
        raise GraphError(
            f"layer {layer.name!r} has weight codes of shape {shape} but a weight of shape {dims} in the "
            "graph: export what was calibrated"
        )
    plain = {"alpha": 1, "beta": 1, "transA": 0}
    if any(
        attribute.value != plain.get(name, attribute.value) for name, attribute in node.attributes.items()
    ):
        raise GraphError(
            f"layer {layer.name!r} is a Gemm with factors of its own: only a plain Linear can be quantized"
        )


def stored_codes(layer: LayerQuant) -> npt.NDArray[np.generic]:
    """The weight codes in the type in which they are stored."""
    if layer.number == "fp8":
        return layer.weight.view(ml_dtypes.float8_e4m3fn)
    return (
        layer.weight.astype(ml_dtypes.int4)
        if layer.weight_only and layer.weight_bits <= PACKED_BITS
        else layer.weight
    )


def total_bias(bias: npt.NDArray[np.float32] | None, shift: npt.NDArray[np.float64] | None) -> F32:
    """The sum of what there is, in float32."""
    return np.asarray((0.0 if bias is None else bias) + (0.0 if shift is None else shift), np.float32)


def shift_of(node: ir.Node, layer: LayerQuant, moved: float) -> npt.NDArray[np.float64]:
    """W (moved * 1), what a layer's result lacks if `moved` was taken off its input.

    Float64 (O,), or float32 (1, O, H, W) for a Conv that pads with zeros, which were not moved.
    """
    scale = layer.weight_scale.astype(np.float64).reshape(-1, *[1] * (layer.weight.ndim - 1))
    weight = layer.weight_values() * scale * moved
    if layer.kind == "linear":
        return np.asarray(weight.sum(1))
    taps = weight.sum(1)  # (O, kh, kw)
    pads = node.attributes.get_ints("pads", [0, 0, 0, 0])
    if not any(pads):
        return np.asarray(taps.sum((1, 2)))
    strides, dilations = (node.attributes.get_ints(key, [1, 1]) for key in ("strides", "dilations"))
    sizes, results = static_dims(node.inputs[0])[2:], static_dims(node.outputs[0])[2:]
    inside = []
    for axis, (size, count) in enumerate(zip(sizes, results, strict=True)):
        if size is None or count is None:
            raise GraphError(f"conv {layer.name!r} has an input of unknown size: export it with a fixed size")
        at = np.arange(count)[:, None] * strides[axis] - pads[axis]
        at = at + np.arange(taps.shape[1 + axis])[None, :] * dilations[axis]
        inside.append(((at >= 0) & (at < size)).astype(np.float64))
    return np.asarray(np.einsum("okl,hk,wl->ohw", taps, *inside)[None], np.float32)
