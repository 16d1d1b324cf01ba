"""Calibration cases: a model with what was collected and observed of it; single layers, quantized by hand."""

from __future__ import annotations

from dataclasses import replace
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import nn

from ptqd_export.calibrate import Network, Observed, Trajectories
from ptqd_export.calibrate.ranges import weight_scales
from ptqd_export.calibrate.rounding import nearest
from ptqd_export.calibrate.simulate import geometry_of
from ptqd_export.core.precision import Precision
from ptqd_export.core.quant import E4M3_MAX, F32, Grid, LayerQuant, OutputGrid
from ptqd_export.core.sampling import Sampling
from ptqd_export.recipe import Recipe

W8A8, W4A8, W4A4, FP8, W4A16 = (Precision.parse(p) for p in ("w8a8", "w4a8", "w4a4", "w8a8-fp8", "w4a16"))


class Case(NamedTuple):
    recipe: Recipe
    network: Network
    sampling: Sampling
    trajectories: Trajectories
    observed: Observed


def sampling_of(network: Network, recipe: Recipe) -> Sampling:
    """As the recipe says."""
    s = recipe.sampler
    return Sampling.of(
        network.info,
        network.scheduler_config,
        n_steps=s.n_steps,
        eta=s.eta,
        guidance_scale=s.guidance_scale,
        guidance_rescale=s.guidance_rescale,
        solver=s.solver,
    )


def equal(a: LayerQuant, b: LayerQuant) -> bool:
    """In what decides their numbers."""
    arrays = [
        (
            x.weight,
            x.weight_scale,
            x.bias,
            x.smooth,
            *((x.output.scale, x.output.zero_point) if x.output else ()),
        )
        for x in (a, b)
    ]
    same = len(arrays[0]) == len(arrays[1]) and all(map(np.array_equal, *arrays))
    return same and (a.input, a.macs, a.name) == (b.input, b.macs, b.name)


def rescaled(layer: LayerQuant, factor: float) -> LayerQuant:
    """With another scale of its input."""
    assert layer.input is not None
    return replace(layer, input=replace(layer.input, scale=float(np.float32(layer.input.scale * factor))))


def smoothed(module: nn.Module, layer: LayerQuant) -> F32:
    """The weight that the codes of `layer` stand for."""
    weight: F32 = module.weight.detach().numpy()  # type: ignore[union-attr, operator]
    return weight if layer.smooth is None else weight * layer.smooth[:, None, None]


def make_layer(module: nn.Module, precision: Precision, x: np.ndarray, name: str = "layer") -> LayerQuant:
    """A layer quantized from random data, at ranges that clip a little: integers between two ends that are
    not opposite, outputs of a conv per channel, and inputs of a conv without groups smoothed."""
    m: Any = module
    weight = m.weight.detach().numpy()
    bias = None if m.bias is None else m.bias.detach().numpy()
    bits, number = (precision.weight_bits, precision.activation_bits), precision.number
    integers = number == "int" and not precision.weight_only
    conv, smooth, grid, output = weight.ndim == 4, None, None, None
    with torch.no_grad():
        y = module(torch.from_numpy(x)).numpy()
    if conv and integers:
        output = OutputGrid.window(*(np.quantile(y, q, (0, 2, 3)).astype(np.float32) for q in (0.002, 0.995)))
        if m.groups == 1:
            smooth = np.geomspace(0.5, 2, weight.shape[1]).astype(np.float32)
            weight, x = weight * smooth[:, None, None], x / smooth[:, None, None]
    scale = weight_scales(weight, bits[0], "mse")
    if number == "fp8":
        scale = (scale * np.float32(127 / E4M3_MAX)).astype(np.float32)
        top = int(E4M3_MAX)
        grid = Grid(float(np.float32(np.quantile(np.abs(x), 0.99) / top)), -top, top)
    elif integers:
        grid = Grid.window(float(np.quantile(x, 0.002)), float(np.quantile(x, 0.98)), bits[1])
    codes = nearest(weight, scale, bits[0], number)
    kind = "conv" if conv else "linear"
    geometry = geometry_of(module)
    return LayerQuant(
        name, kind, codes, scale, bits[0], grid, bits[1], output, bias, 1, number, smooth, geometry
    )
