"""Constants of a quantized layer: weights, bias, and what moving its input takes off its result."""

from __future__ import annotations

import ml_dtypes
import numpy as np
import numpy.typing as npt
import onnx_ir as ir

from ..core.quant import F32, LayerQuant
from ..errors import GraphError
from .graph import static_dims
from .half import to_half

PACKED_BITS = 4
"""Where weights alone are quantized, they are stored as INT4 up to this many bits."""


def stored_codes(layer: LayerQuant) -> npt.NDArray[np.generic]:
    """The weight codes in the type in which they are stored."""
    if layer.number == "fp8":
        return layer.weight.view(ml_dtypes.float8_e4m3fn)
    return (
        layer.weight.astype(ml_dtypes.int4)
        if layer.weight_only and layer.weight_bits <= PACKED_BITS
        else layer.weight
    )


def float_bias(bias: F32 | None, shift: npt.NDArray[np.float64] | None) -> F32:
    """A layer's bias and `moved_part`, as far as there are any: their sum, in float32."""
    return np.asarray((0.0 if bias is None else bias) + (0.0 if shift is None else shift), np.float32)


def lost_in_half(shift: npt.NDArray[np.generic]) -> npt.NDArray[np.float64]:
    """What float16 takes off a constant map (1, O, H, W), its mean by channel, float64 (O,).

    A map of 30 is off by up to 0.008, the same everywhere and at every step. Added to the products, which
    differ from place to place, the lost part survives their rounding on average, as far as the layer's own
    bias is smaller than the map.
    """
    return np.asarray((shift.astype(np.float64) - to_half(shift)).mean((0, 2, 3)))


def moved_part(node: ir.Node, layer: LayerQuant, moved: float) -> npt.NDArray[np.float64]:
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
