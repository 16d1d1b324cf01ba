"""Values of a quantized network: what calibration hands to the exporters and to the simulation.

real = code * scale throughout, so zero always has a code of its own, 0. Codes of weights are integers in
[qmin(bits), qmax(bits)], or FP8 numbers in [-448, 448]; those of an input lie in a window [lo, hi] that need
not be symmetric: after SiLU a tensor lives in [-0.28, max], and a symmetric grid of 4 bits would use 9 of its
16 codes there. ONNX's zero_point is where a container of 8 bits puts code 0.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass, field, replace

import numpy as np
import numpy.typing as npt

from .precision import FLOAT_BITS, Number, Precision

F32 = npt.NDArray[np.float32]
I8 = npt.NDArray[np.int8]
U8 = npt.NDArray[np.uint8]

OUTPUT_MIDDLE = 128
"""Zero point that QLinearConv works with; those of single channels go into its bias (`OutputGrid`)."""


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


LEAST_SCALE = 2.0**-126
"""Of a grid: the smallest normal float32 number."""


@dataclass(frozen=True)
class Grid:
    """The codes of an input: real = code * scale, code in [lo, hi], lo <= 0 <= hi.

    Attributes:
        scale: a float32 value.
        lo, hi: integers; -448 and 448 for FP8.
    """

    scale: float
    lo: int
    hi: int

    @classmethod
    def symmetric(cls, scale: float, bits: int) -> Grid:
        """The signed grid of `bits` bits."""
        return cls(scale, qmin(bits), qmax(bits))

    @classmethod
    def window(cls, low: float, high: float, bits: int) -> Grid:
        """2^bits codes over [low, high], moved by less than a step so that zero is one of them."""
        low, high = min(low, 0.0), max(high, 0.0)
        last = (1 << bits) - 1
        scale = float(np.float32(max((high - low) / last, LEAST_SCALE)))
        lo = max(-last, min(0, round(low / scale)))
        return cls(scale, lo, lo + last)

    def zero_point(self, container: npt.DTypeLike) -> int:
        """The code 0 in a container: int8 holds the codes as they are where they fit."""
        info = np.iinfo(np.dtype(container))
        return 0 if info.min <= self.lo and self.hi <= info.max else int(info.min) - self.lo


@dataclass(frozen=True)
class OutputGrid:
    """The 8-bit codes of a conv's output on ORT CPU, per channel: real = (code - zero_point) * scale.

    Attributes:
        scale: float32 (O,).
        zero_point: uint8 (O,).
    """

    scale: F32
    zero_point: U8

    @classmethod
    def window(cls, low: F32, high: F32) -> OutputGrid:
        """256 codes over [low, high] of each channel, both (O,).

        Where more would fit, the zero point is as near to OUTPUT_MIDDLE as it can be: a channel that hardly
        moves may have no accumulator that could hold what moves its codes.
        """
        low64, high64 = np.minimum(low, 0).astype(np.float64), np.maximum(high, 0).astype(np.float64)
        scale = (high64 - low64) / 255
        scale = np.maximum(scale, max(scale.max(initial=0.0), 1e-30) * LEAST_OUTPUT_SCALE)
        zero = np.clip(OUTPUT_MIDDLE, -low64 / scale, 255 - high64 / scale)
        return cls(scale.astype(np.float32), np.rint(zero).clip(0, 255).astype(np.uint8))

    @property
    def common(self) -> np.float32:
        """The one scale that QLinearConv quantizes with: the largest."""
        return np.float32(self.scale.max())

    @property
    def shift(self) -> npt.NDArray[np.float64]:
        """What is added to an output so that its codes lie about OUTPUT_MIDDLE, float64 (O,)."""
        return (self.zero_point.astype(np.float64) - OUTPUT_MIDDLE) * self.scale.astype(np.float64)


LEAST_OUTPUT_SCALE = 2.0**-12
"""Least scale of an output channel, relative to the largest."""


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
        input: grid of the input, one per tensor; None where the input is not quantized.
        activation_bits: bits of the input grid; 16 where the input is not quantized.
        output: grid of the 8-bit output in the ORT CPU emission; None for "linear", and where that emission
            has no numerics of its own.
        bias: float32 (O,) or None.
        macs: multiply-accumulates for one sample.
        number: how the codes of weights and input represent numbers.
        smooth: factors m per input channel, float32 (I,): the codes are those of x / m and of W m
            (SmoothQuant, Xiao et al. 2023, eq. 4); None for 1.
        geometry: of the layer where it stands alone; None for "linear", and where it is not known. A graph's
            conv may hold padding that the network does in front of the module, which then has less.
    """

    name: str
    kind: str
    weight: I8 | U8
    weight_scale: F32
    weight_bits: int
    input: Grid | None
    activation_bits: int
    output: OutputGrid | None
    bias: F32 | None
    macs: int
    number: Number = "int"
    smooth: F32 | None = None
    geometry: Geometry | None = None

    @property
    def weight_only(self) -> bool:
        """The input is not quantized."""
        return self.input is None

    @property
    def input_scale(self) -> float:
        """Scale of the input; 1 where it is not quantized."""
        return 1.0 if self.input is None else self.input.scale

    def weight_values(self) -> F32:
        """The weight codes as float32 numbers, not scaled."""
        return (
            from_e4m3(self.weight.view(np.uint8)) if self.number == "fp8" else self.weight.astype(np.float32)
        )

    @property
    def bops(self) -> int:
        """Bit operations for one sample: macs * weight_bits * activation_bits."""
        return self.macs * self.weight_bits * self.activation_bits

    def accumulator_scale(self) -> F32:
        """The scale of sums of products of codes, float32 (O,): input scale * weight_scale."""
        return np.asarray(np.float32(self.input_scale) * self.weight_scale, np.float32)

    def fused(self) -> FusedConv:
        """The numbers that QLinearConv takes on ORT CPU, where the layer has an output grid.

        It quantizes outputs with one scale Y and one zero point. Channel c gets its own scale s_c and zero
        point z_c all the same: with weight scale w_c Y / s_c and the bias moved by (z_c - 128) s_c, the code
        is that of the channel's own grid, which DequantizeLinear then reads with vectors.
        """
        assert self.output is not None
        scale = (self.weight_scale * (self.output.common / self.output.scale)).astype(np.float32)
        bias = self.output.shift + (0.0 if self.bias is None else self.bias.astype(np.float64))
        codes = np.rint(bias / self.accumulator_scale().astype(np.float64))
        return FusedConv(scale, np.clip(codes, -(2**31) + 1, 2**31 - 1).astype(np.int32))


@dataclass(frozen=True)
class FusedConv:
    """See `LayerQuant.fused`.

    Attributes:
        weight_scale: float32 (O,).
        bias: int32 (O,), in units of the accumulator.
    """

    weight_scale: F32
    bias: npt.NDArray[np.int32]


@dataclass(frozen=True)
class QuantizedNetwork:
    """A network at one precision.

    Attributes:
        precision: nominal precision; single layers may differ (edge layers at 8 bits, those of mixed
            precisions).
        layers: quantized layers by module path, in call order.
        float_macs: multiply-accumulates per sample of the Conv2d and Linear layers that stay float, by
            module path.
        product_macs: multiply-accumulates per sample outside such layers, which stay float: Q K^T and
            softmax(..) V of attention.
    """

    precision: Precision
    layers: Mapping[str, LayerQuant]
    float_macs: Mapping[str, int] = field(default_factory=dict)
    product_macs: int = 0

    def only(self, names: Collection[str]) -> QuantizedNetwork:
        """The network with every other layer left in float."""
        dropped = {name: layer.macs for name, layer in self.layers.items() if name not in names}
        return replace(
            self,
            layers={n: v for n, v in self.layers.items() if n in names},
            float_macs={**self.float_macs, **dropped},
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
        """Multiply-accumulates of one network evaluation for one sample."""
        layers = sum(layer.macs for layer in self.layers.values())
        return layers + sum(self.float_macs.values()) + self.product_macs

    @property
    def bops(self) -> int:
        """`bops_at` 32 bits."""
        return self.bops_at(FLOAT_BITS)

    def bops_at(self, float_bits: int) -> int:
        """Bit operations of one network evaluation for one sample: a product counts its factors' widths.

        Args:
            float_bits: width of the float parts, 32 or 16; fp16 counts 16 whatever is given.
        """
        layers = ((v.macs, v.weight_bits, v.activation_bits) for v in self.layers.values())
        floats = sum(self.float_macs.values()) + self.product_macs
        return bit_operations(self.precision, layers, floats, float_bits)


def bit_operations(
    precision: Precision, layers: Iterable[tuple[int, int, int]], float_macs: int, float_bits: int
) -> int:
    """Bit operations of a network: each multiply-accumulate counts the widths of its factors, multiplied.

    Args:
        layers: (macs, weight bits, activation bits) of the quantized layers.
        float_macs: of everything else.
        float_bits: width of that; fp16 counts 16 whatever is given.
    """
    bits = min(float_bits, precision.weight_bits) if precision.is_float else float_bits
    return sum(macs * wide * high for macs, wide, high in layers) + float_macs * bits**2
