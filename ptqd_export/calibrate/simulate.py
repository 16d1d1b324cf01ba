"""The simulated quantized network: torch computes, in float32, what the emitted graphs compute.

The float32 numbers hold codes. Products and sums of integer codes are exact in float32 while they stay below
2^24, so an accumulator equals the integer one; what follows it repeats the graph's operations in their order
and precision. Sums of FP8 products (8 significant bits each, from 2^-18 to 448^2) and of products of float
inputs are rounded, and their last bits depend on the order of summation: two correct executions differ there.

Input, all emissions: codes = clamp(round_half_even(x / input scale), lo, hi), float32 division, rounded to
    integers or to FP8 E4M3; x itself where weights alone are quantized. Padding is code 0, value 0. Smoothed
    inputs (`LayerQuant.smooth`): x * (1 / m) takes the place of x, on ORT_CPU input scale * m that of the
    input scale.
PORTABLE, and FP8 and weights alone in every emission (Emission.numerics): conv or matmul of dequantized
    values + float bias. (Here the scales are multiplied into the weight codes.)
ORT_CPU conv (QLinearConv; `LayerQuant.fused`, `OutputGrid`):
    accumulator = conv(codes, weight codes) + bias codes
    output code = clamp(round_half_even(float32(accumulator) * (input scale * weight scale / common))) + 128
    value = (output code - zero point) * output scale, per channel
ORT_CPU linear (MatMulIntegerToFloat): accumulator * (input scale * weight_scale) + float bias; the output is
    not quantized.
"""

from __future__ import annotations

import copy
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..core.backend import Emission
from ..core.engine import Array
from ..core.precision import Precision
from ..core.quant import E4M3_MAX, F32, OUTPUT_MIDDLE, Geometry, LayerQuant, QuantizedNetwork
from .network import Network
from .rounding import per_channel
from .torch_engine import as_tensor


class SimulatedLayer:
    """One quantized layer as a torch function, float32 to float32, with the shapes of the layer it replaces.

    Args:
        layer: codes and scales.
        emission: the emission whose arithmetic is simulated.
        geometry: of the conv: that of the module inside the network, the layer's own where it stands alone.
    """

    def __init__(self, layer: LayerQuant, emission: Emission, geometry: Geometry | None) -> None:
        self._layer = layer
        self._portable = (
            emission.numerics(Precision(layer.weight_bits, layer.activation_bits, layer.number))
            is Emission.PORTABLE
        )
        assert (geometry is None) is (layer.kind == "linear")
        self._geometry = geometry
        scale = layer.accumulator_scale()
        weight = layer.weight_values()
        grid = layer.input
        self._bias = None if layer.bias is None else torch.from_numpy(layer.bias.copy())
        self._scale = torch.from_numpy(scale)
        self._divisor: Tensor | float = 1.0 if grid is None else float(np.float32(grid.scale))
        self._smooth: Tensor | None = None
        if layer.smooth is not None and self._portable:
            self._smooth = _channels(torch.from_numpy(np.float32(1) / layer.smooth))
        elif layer.smooth is not None:
            self._divisor = _channels(torch.from_numpy(layer.smooth * np.float32(layer.input_scale)))
        # In the half emission the zero point becomes 0 by moving the input (`export.insert_qdq`).
        self._zero = (
            grid.zero_point(np.int8) if grid and emission is Emission.HALF and layer.number == "int" else 0
        )
        if self._portable:
            weight = weight * per_channel(scale, weight.ndim)
        elif layer.output is not None:
            out, fused = layer.output, layer.fused()
            factor = np.float32(layer.input_scale) * fused.weight_scale / out.common
            self._scale = _channels(torch.from_numpy(factor))
            self._bias = _channels(torch.from_numpy(fused.bias.astype(np.float32)))
            self._middle = _channels(torch.from_numpy(OUTPUT_MIDDLE - out.zero_point.astype(np.float32)))
            self._output_scale = _channels(torch.from_numpy(out.scale.copy()))
        self._weight = torch.from_numpy(weight)
        if layer.kind == "conv":
            self._weight = self._weight.to(memory_format=torch.channels_last)

    def __call__(
        self, input: Tensor
    ) -> Tensor:  # `input` as in Conv2d.forward: some models call layers by keyword
        codes = self._codes(input)
        if self._portable:
            return self._multiply(codes, self._bias)
        acc = self._multiply(codes, None)
        if self._geometry is None:
            acc = acc.mul_(self._scale)
            return acc if self._bias is None else acc.add_(self._bias)
        assert self._bias is not None  # of every conv with an output grid
        acc = acc.add_(self._bias).mul_(self._scale).round_()
        return acc.clamp_(-OUTPUT_MIDDLE, 255 - OUTPUT_MIDDLE).add_(self._middle).mul_(self._output_scale)

    def input_values(self, x: Tensor) -> Tensor:
        """`x` as the weights see it: smoothed, rounded to codes, and scaled back."""
        codes = self._codes(x)
        return codes if self._layer.weight_only else codes * self._layer.input_scale

    def _codes(self, x: Tensor) -> Tensor:
        """What the weight codes are multiplied with: codes of the input, or `x` where it is not quantized."""
        grid = self._layer.input
        if grid is None:
            return x
        if self._smooth is not None:
            x = x * self._smooth
        if self._zero:
            x = x - float(np.float32(-self._zero * grid.scale))
        ratio = x / self._divisor
        if self._layer.number == "fp8":
            return ratio.clamp_(-E4M3_MAX, E4M3_MAX).to(torch.float8_e4m3fn).float()
        codes = ratio.round_().clamp_(grid.lo + self._zero, grid.hi + self._zero)
        return codes.sub_(self._zero) if self._zero else codes

    def _multiply(self, codes: Tensor, bias: Tensor | None) -> Tensor:
        if self._geometry is None:
            return F.linear(codes, self._weight, bias)
        g = self._geometry
        top, left, bottom, right = g.padding
        even = (top, left) == (bottom, right)
        if not even:
            codes = F.pad(codes, (left, right, top, bottom))
        return F.conv2d(codes, self._weight, bias, g.stride, (top, left) if even else 0, g.dilation, g.groups)


def _channels(values: Tensor) -> Tensor:
    return values[:, None, None]


def geometry_of(module: Any) -> Geometry | None:
    """The geometry of a Conv2d; None of a Linear."""
    if isinstance(module, nn.Linear):
        return None
    left, right, top, bottom = module._reversed_padding_repeated_twice
    return Geometry(module.stride, (top, left, bottom, right), module.dilation, module.groups)


class LayerSimulator:
    """A layer alone, as a SimulatedLayer on numpy arrays, for callers that do not import torch."""

    def __init__(self, layer: LayerQuant, emission: Emission) -> None:
        self._simulated = SimulatedLayer(layer, emission, layer.geometry)

    def __call__(self, x: Array) -> F32:
        with torch.inference_mode():
            return np.ascontiguousarray(
                self._simulated(as_tensor(np.ascontiguousarray(x, np.float32))).numpy()
            )


def simulate(network: Network, quantized: QuantizedNetwork, emission: Emission) -> nn.Module:
    """A copy of the network whose quantized layers compute what the graphs of an emission compute.

    Args:
        quantized: layers of `network` at one precision.
        emission: the emission whose arithmetic is simulated.
    """
    # Weights that the simulation replaces are not copied: they are most of a large network.
    replaced, kept = dict[int, Any](), set[int]()
    for name, weight in network.module.named_parameters(remove_duplicate=False):
        if name.removesuffix(".weight") in quantized.layers:
            replaced[id(weight)] = nn.Parameter(torch.empty(0))
        else:
            kept.add(id(weight))
    module = copy.deepcopy(network.module, {i: p for i, p in replaced.items() if i not in kept})
    # channels_last is some 7 % faster here; the original keeps its layout, because this is a copy.
    module.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    for name, layer in quantized.layers.items():
        target: Any = module.get_submodule(name)
        own: Any = network.module.get_submodule(name).weight
        if id(own) not in kept:  # the shape stays, for who looks at it
            target.weight = nn.Parameter(own.new_zeros(1).expand_as(own))
        target.forward = SimulatedLayer(layer, emission, geometry_of(target))
    return module
