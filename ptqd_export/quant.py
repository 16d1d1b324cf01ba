"""Values of a quantized network: what calibration hands to the exporters and to the simulation.

Everything is symmetric: real = code * scale, codes in [qmin(bits), qmax(bits)], zero_point 0.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass, field
from enum import StrEnum

import numpy as np
import numpy.typing as npt

from .precision import Precision

F32 = npt.NDArray[np.float32]
I8 = npt.NDArray[np.int8]

OUTPUT_BITS = 8
"""Bits of the quantized conv outputs in the ORT CPU emission, whatever the precision: they come with QLinearConv."""


class Emission(StrEnum):
    """Two graphs of the same weights and input scales.

    PORTABLE: S8 activations at layer inputs only, float bias: what TensorRT takes.
    ORT_CPU: the same values as U8 with zero_point 128, conv outputs quantized too and an int32 bias, so that
    ONNX Runtime fuses every such Conv into a QLinearConv. The quantized outputs are a noise of their own.
    """

    PORTABLE = "portable"
    ORT_CPU = "ort-cpu"


def qmin(bits: int) -> int:
    """Lowest code of the signed grid: -128 for 8 bits, -8 for 4."""
    return -(1 << (bits - 1))


def qmax(bits: int) -> int:
    """Highest code of the signed grid: 127 for 8 bits, 7 for 4."""
    return (1 << (bits - 1)) - 1


def quantize(x: npt.NDArray[np.floating], scale: npt.NDArray[np.floating] | float, bits: int) -> I8:
    """Codes of `x`: round half to even of x / scale, saturated. `scale` broadcasts against `x`; division in float32."""
    ratio = np.asarray(x, np.float32) / np.asarray(scale, np.float32)
    return np.clip(np.rint(ratio), qmin(bits), qmax(bits)).astype(np.int8)


@dataclass(frozen=True)
class LayerQuant:
    """One quantized Conv2d or Linear.

    Attributes:
        name: path of the torch module, e.g. "down_blocks.0.resnets.0.conv1".
        kind: "conv" or "linear".
        weight: codes, int8, in torch's layout: (O, I/groups, kh, kw) or (O, I).
        weight_scale: float32 (O,), one per output channel.
        weight_bits: bits of the weight grid.
        input_scale: scale of the input, per tensor.
        activation_bits: bits of the input grid.
        output_scale: scale of the 8-bit output in the ORT CPU emission; None for "linear".
        bias: float32 (O,) or None.
        macs: multiply-accumulates for one sample.
    """

    name: str
    kind: str
    weight: I8
    weight_scale: F32
    weight_bits: int
    input_scale: float
    activation_bits: int
    output_scale: float | None
    bias: F32 | None
    macs: int

    @property
    def bops(self) -> int:
        """Bit operations for one sample: macs * weight_bits * activation_bits."""
        return self.macs * self.weight_bits * self.activation_bits

    def bias_codes(self) -> npt.NDArray[np.int32] | None:
        """The int32 bias of the ORT CPU emission: round(bias / (input_scale * weight_scale)), saturated."""
        if self.bias is None:
            return None
        codes = np.rint(self.bias.astype(np.float64) / self.bias_scale().astype(np.float64))
        return np.clip(codes, -(2**31) + 1, 2**31 - 1).astype(np.int32)

    def bias_scale(self) -> F32:
        """float32 (O,): input_scale * weight_scale, the scale of the accumulator."""
        return np.asarray(np.float32(self.input_scale) * self.weight_scale, np.float32)


@dataclass(frozen=True)
class QuantizedNetwork:
    """A network at one precision.

    Attributes:
        precision: nominal precision; single layers may differ (edge layers at 8 bits).
        layers: quantized layers by module path, in call order.
        float_macs: multiply-accumulates per sample of the Conv2d and Linear layers that stay float, by module path.
    """

    precision: Precision
    layers: Mapping[str, LayerQuant]
    float_macs: Mapping[str, int] = field(default_factory=dict)

    def only(self, names: Collection[str]) -> QuantizedNetwork:
        """The network with every other layer left in float."""
        dropped = {name: layer.macs for name, layer in self.layers.items() if name not in names}
        return QuantizedNetwork(self.precision, {n: v for n, v in self.layers.items() if n in names}, {**self.float_macs, **dropped})

    @property
    def macs(self) -> int:
        """Multiply-accumulates of one network evaluation for one sample, in Conv2d and Linear layers (attention's own products are not counted)."""
        return sum(layer.macs for layer in self.layers.values()) + sum(self.float_macs.values())

    @property
    def bops(self) -> int:
        """Bit operations of one network evaluation for one sample, over what `macs` counts; layers left in float count 32 x 32 bits."""
        return sum(layer.bops for layer in self.layers.values()) + sum(self.float_macs.values()) * 32 * 32
