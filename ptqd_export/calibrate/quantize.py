"""From observed activations to quantized layers, at any precision."""

from __future__ import annotations

import fnmatch
from collections.abc import Mapping
from typing import Any

import numpy as np
import torch

from ..core.precision import Precision
from ..core.quant import E4M3_MAX, F32, Grid, LayerQuant, OutputGrid, QuantizedNetwork
from ..errors import ModelError
from ..recipe import Recipe
from .network import Network
from .observe import GPTQ_BITS, Observed, ObservedLayer
from .ranges import ChannelRanges, weight_scales
from .rounding import gptq, nearest, smoothed_weight
from .simulate import geometry_of

EDGE_BITS = 8
OUTPUT_MARGIN = 1.2
"""How far grids of conv outputs reach beyond what was seen.

Other samples have larger values, and one that is cut off can make its sample run away. On the reference model
the wider steps cost 0.1 dB.
"""
MAX_BIAS_CODE = 1 << 30
"""Largest int32 bias code allowed; channels with tiny weights get a scale that keeps their bias below it."""


def quantize(
    network: Network,
    observed: Observed,
    precision: Precision,
    recipe: Recipe,
    assigned: Mapping[str, Precision] | None = None,
) -> QuantizedNetwork:
    """The network's layers at one precision: scales and weight codes.

    These layers stay in float: embedding layers (see ObservedLayer.vector), convs with a padding mode other
    than zeros, layers that match quantization.skip, and the first and last conv where
    quantization.edge_layers says so. Otherwise those two convs get 8-bit weights and activations, FP8 at FP8,
    and 8-bit weights alone where weights alone are quantized. fp32 and fp16 quantize nothing.

    8-bit weights are rounded to the nearest whatever the recipe says: GPTQ gains nothing there.
    An FP8 grid reaches to the largest value whatever the recipe says. The steps of a floating-point grid grow
    with the value, so clipping only costs: 0.9 dB of an input's signal-to-noise ratio at the 99.99th
    percentile, while the best scale of the octave below gains less than 0.2 dB.

    Args:
        assigned: precisions of single layers, where they differ.
    Raises:
        ModelError: nothing is left to quantize.
    """
    layers: dict[str, LayerQuant] = {}
    float_macs: dict[str, int] = {}
    for name, used in layer_precisions(network, observed, precision, recipe, assigned).items():
        seen = observed.layers[name]
        if used is None:
            float_macs[name] = seen.macs
        else:
            layers[name] = _quantize_layer(name, network.module.get_submodule(name), seen, used, recipe)
    return QuantizedNetwork(precision, layers, float_macs, observed.product_macs)


def layer_precisions(
    network: Network,
    observed: Observed,
    precision: Precision,
    recipe: Recipe,
    assigned: Mapping[str, Precision] | None = None,
) -> dict[str, Precision | None]:
    """What each layer gets at a precision, in call order; None for a layer that stays in float.

    `quantize` says which do. It needs no numbers of the network (`outline`).

    Raises:
        ModelError: nothing is left to quantize.
    """
    convs = [name for name, layer in observed.layers.items() if layer.kind == "conv"]
    edges = {convs[0], convs[-1]} if convs else set()
    given: dict[str, Precision | None] = {}
    for name, seen in observed.layers.items():
        module: Any = network.module.get_submodule(name)
        stays = (
            precision.is_float
            or seen.vector
            or (seen.kind == "conv" and module.padding_mode != "zeros")
            or any(fnmatch.fnmatchcase(name, glob) for glob in recipe.quantization.skip)
            or (name in edges and recipe.quantization.edge_layers == "float")
        )
        usual = (assigned or {}).get(name, precision.base)
        if name in edges and not usual.is_float:
            usual = _edge(precision)
        given[name] = None if stays or usual.is_float else usual
    if not precision.is_float and not any(given.values()):
        raise ModelError(
            f"{network.info.name} has no layer left to quantize at {precision}: check quantization.skip and "
            "edge_layers, or ask for fp32 or fp16"
        )
    return given


def _edge(precision: Precision) -> Precision:
    """`precision` with EDGE_BITS for its codes; inputs that are not quantized stay float."""
    return Precision(
        EDGE_BITS, precision.activation_bits if precision.weight_only else EDGE_BITS, precision.number
    )


def _quantize_layer(
    name: str, module: Any, seen: ObservedLayer, precision: Precision, recipe: Recipe
) -> LayerQuant:
    spec = recipe.quantization
    integers = not precision.weight_only and precision.number == "int"
    smooth = seen.smooth if integers else None
    weight = smoothed_weight(module, smooth)
    bias: F32 | None = None if module.bias is None else module.bias.detach().numpy().astype(np.float32)
    grid = _input_grid(seen, precision, recipe)
    scale = _weight_scales(weight, precision, recipe)
    if bias is not None and grid is not None and integers:
        smallest = np.abs(bias) / np.float32(grid.scale * MAX_BIAS_CODE)
        scale = np.maximum(scale, smallest if spec.weight_scales == "channel" else smallest.max()).astype(
            np.float32
        )
    scale = np.where(scale > 0, scale, np.float32(1.0)).astype(np.float32)
    key = (spec.rounding, precision.number, precision.weight_bits, scale.tobytes())
    if key not in seen.codes:
        if spec.rounding == "nearest" or seen.hessians is None or precision.weight_bits >= GPTQ_BITS:
            seen.codes[key] = nearest(weight, scale, precision.weight_bits, precision.number)
        else:
            hessians = seen.hessians
            if smooth is None and seen.smooth is not None:  # they are of x / m
                factors = torch.from_numpy(np.repeat(seen.smooth, weight[0, 0].size))
                hessians = hessians * factors * factors[:, None]
            seen.codes[key] = gptq(weight, scale, precision.weight_bits, hessians)
    return LayerQuant(
        name,
        seen.kind,
        seen.codes[key],
        scale,
        precision.weight_bits,
        grid,
        precision.activation_bits,
        _output_grid(seen.output, recipe) if seen.kind == "conv" and integers else None,
        bias,
        seen.macs,
        precision.number,
        smooth,
        geometry_of(module),
    )


def _input_grid(seen: ObservedLayer, precision: Precision, recipe: Recipe) -> Grid | None:
    """The grid of a layer's input; None where weights alone are quantized."""
    spec, bits = recipe.calibration, precision.activation_bits
    if precision.weight_only:
        return None
    if precision.number == "fp8":
        largest = float(seen.channels.largest.max()) or 1.0
        return Grid(float(np.float32(largest / E4M3_MAX)), -int(E4M3_MAX), int(E4M3_MAX))
    asymmetric = recipe.quantization.input_grids == "asymmetric"
    make = seen.input.window if asymmetric else seen.input.symmetric
    return make(spec.activation_range, bits, spec.percentile)


def _output_grid(seen: ChannelRanges, recipe: Recipe) -> OutputGrid:
    """The grid of a conv's output on ORT CPU, where each channel, or the tensor, keeps more than was seen."""
    low, high = seen.low * np.float32(OUTPUT_MARGIN), seen.high * np.float32(OUTPUT_MARGIN)
    if recipe.quantization.conv_outputs == "tensor":
        low, high = np.full_like(low, low.min()), np.full_like(high, high.max())
    return OutputGrid.window(low, high)


def _weight_scales(weight: F32, precision: Precision, recipe: Recipe) -> F32:
    """Scales of `weight` (O, ...), float32 (O,); 0 where there are only zeros.

    They are all equal where quantization.weight_scales is "tensor".
    """
    spec = recipe.calibration
    rows = weight if recipe.quantization.weight_scales == "channel" else weight.reshape(1, -1)
    if precision.number == "fp8":
        scale = (np.abs(rows).reshape(len(rows), -1).max(1) / np.float32(E4M3_MAX)).astype(np.float32)
    else:
        scale = weight_scales(rows, precision.weight_bits, spec.weight_range, spec.percentile)
    return np.ascontiguousarray(np.broadcast_to(scale, len(weight)))
