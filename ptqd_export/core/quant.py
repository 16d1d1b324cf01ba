"""Values of a quantized network: what calibration hands to the exporters and to the simulation.

Quantization is symmetric throughout: real = code * scale, zero_point 0. Codes are integers in
[qmin(bits), qmax(bits)], or FP8 numbers in [-448, 448].
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass, field, replace

import numpy as np
import numpy.typing as npt

from .precision import FLOAT_BITS, HALF_BITS, Number, Precision

F32 = npt.NDArray[np.float32]
I8 = npt.NDArray[np.int8]
U8 = npt.NDArray[np.uint8]

OUTPUT_BITS = 8
"""Bits of the quantized conv outputs in the ORT CPU emission, at every precision: QLinearConv has them."""


def qmin(bits: int) -> int:
    """Lowest code of the signed grid: -128 for 8 bits, -8 for 4."""
    return -(1 << (bits - 1))


def qmax(bits: int) -> int:
    """Highest code of the signed grid: 127 for 8 bits, 7 for 4."""
    return (1 << (bits - 1)) - 1


def to_codes(x: npt.NDArray[np.floating], scale: npt.NDArray[np.floating] | float, bits: int) -> I8:
    """Codes of `x`: x / scale, rounded half to even and saturated.

    `scale` broadcasts against `x`; the division is in float32.
    """
    ratio = np.asarray(x, np.float32) / np.asarray(scale, np.float32)
    return np.clip(np.rint(ratio), qmin(bits), qmax(bits)).astype(np.int8)


E4M3_MAX = 448.0


def _e4m3_values() -> F32:
    """The 127 values of E4M3 from 0 up, by bit pattern 0x00 to 0x7e (0x7f is NaN)."""
    code = np.arange(127)
    exponent, mantissa = code >> 3, code & 7
    return np.asarray(
        np.where(exponent == 0, mantissa * 2.0**-9, (8 + mantissa) * 2.0 ** (exponent - 10.0)), np.float32
    )


_E4M3 = _e4m3_values()


def to_e4m3(x: npt.NDArray[np.floating]) -> U8:
    """FP8 E4M3 bit patterns of `x`, rounded half to even and saturated at 448. NaN is not allowed."""
    magnitude = np.abs(np.asarray(x, np.float32))
    middles = (_E4M3[:-1] + _E4M3[1:]) / 2
    index = np.searchsorted(middles, magnitude)
    tie = magnitude == middles[np.minimum(index, len(middles) - 1)]
    index += tie & (index % 2 == 1) & (index < len(middles))
    return np.asarray(np.where(np.signbit(x), index + 128, index), np.uint8)


def from_e4m3(codes: U8) -> F32:
    """float32 values of FP8 E4M3 bit patterns."""
    return np.asarray(np.where(codes >= 128, -_E4M3[codes & 127], _E4M3[codes & 127]), np.float32)


@dataclass(frozen=True)
class Geometry:
    """How a conv moves over its input.

    Attributes:
        stride, dilation: along (height, width).
        padding: zeros before and after: (top, left, bottom, right), as in an ONNX Conv.
        groups: of channels.
    """

    stride: tuple[int, int]
    padding: tuple[int, int, int, int]
    dilation: tuple[int, int]
    groups: int


@dataclass(frozen=True)
class LayerQuant:
    """One quantized Conv2d or Linear.

    Attributes:
        name: path of the torch module, e.g. "down_blocks.0.resnets.0.conv1".
        kind: "conv" or "linear".
        weight: codes in torch's layout, (O, I/groups, kh, kw) or (O, I): int8, or uint8 bit patterns of FP8
            E4M3.
        weight_scale: float32 (O,), one per output channel (all equal where one scale serves the whole
            tensor).
        weight_bits: bits of the weight grid.
        input_scale: scale of the input, per tensor; meaningless where the input is not quantized.
        activation_bits: bits of the input grid; 16 where the input is not quantized.
        output_scale: scale of the 8-bit output in the ORT CPU emission; None for "linear", and where that
            emission has no numerics of its own.
        bias: float32 (O,) or None.
        macs: multiply-accumulates for one sample.
        number: how the codes of weights and input represent numbers.
        geometry: of the layer where it stands alone; None for "linear", and where it is not known. A graph's
            conv may hold padding that the network does in front of the module, which then has less.
    """

    name: str
    kind: str
    weight: I8 | U8
    weight_scale: F32
    weight_bits: int
    input_scale: float
    activation_bits: int
    output_scale: float | None
    bias: F32 | None
    macs: int
    number: Number = "int"
    geometry: Geometry | None = None

    @property
    def weight_only(self) -> bool:
        """The input is not quantized."""
        return self.activation_bits == HALF_BITS

    def weight_values(self) -> F32:
        """The weight codes as float32 numbers, not scaled."""
        return (
            from_e4m3(self.weight.view(np.uint8)) if self.number == "fp8" else self.weight.astype(np.float32)
        )

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
        """The scale of the accumulator, float32 (O,): input_scale * weight_scale."""
        return np.asarray(np.float32(self.input_scale) * self.weight_scale, np.float32)


@dataclass(frozen=True)
class QuantizedNetwork:
    """A network at one precision.

    Attributes:
        precision: nominal precision; individual layers may differ (edge layers at 8 bits).
        layers: quantized layers by module path, in call order.
        float_macs: multiply-accumulates per sample of the Conv2d and Linear layers that stay float, by
            module path.
    """

    precision: Precision
    layers: Mapping[str, LayerQuant]
    float_macs: Mapping[str, int] = field(default_factory=dict)

    def only(self, names: Collection[str]) -> QuantizedNetwork:
        """The network with every other layer left in float."""
        dropped = {name: layer.macs for name, layer in self.layers.items() if name not in names}
        return QuantizedNetwork(
            self.precision,
            {n: v for n, v in self.layers.items() if n in names},
            {**self.float_macs, **dropped},
        )

    def exported(self, layers: Mapping[str, Geometry | None]) -> QuantizedNetwork:
        """The network with the layers that an exported graph holds, in their geometry there.

        Args:
            layers: of the graph, by module path; all others are left in float.
        """
        net = self.only(layers)
        placed = {name: replace(layer, geometry=layers[name]) for name, layer in net.layers.items()}
        return replace(net, layers=placed)

    @property
    def macs(self) -> int:
        """Multiply-accumulates of one network evaluation for one sample, in Conv2d and Linear layers.

        The products of attention itself are not counted.
        """
        return sum(layer.macs for layer in self.layers.values()) + sum(self.float_macs.values())

    @property
    def bops(self) -> int:
        """Bit operations of one network evaluation for one sample, over the layers that `macs` counts.

        Float layers count 32 x 32 bits, at fp16 16 x 16.
        """
        bits = self.precision.weight_bits if self.precision.is_float else FLOAT_BITS
        return sum(layer.bops for layer in self.layers.values()) + sum(self.float_macs.values()) * bits**2
