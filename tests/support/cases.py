"""Calibration cases: a model with what was collected and observed of it; single layers, quantized by hand."""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np
import torch
from torch import nn

from ptqd_export.calibrate import Network, Observed, Trajectories
from ptqd_export.calibrate.ranges import weight_scales
from ptqd_export.calibrate.rounding import nearest
from ptqd_export.calibrate.simulate import geometry_of
from ptqd_export.core.backend import Emission
from ptqd_export.core.precision import Precision
from ptqd_export.core.quant import E4M3_MAX, LayerQuant, qmax
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
        solver=s.solver,
    )


def equal(a: LayerQuant, b: LayerQuant) -> bool:
    same = (np.array_equal(getattr(a, f), getattr(b, f)) for f in ("weight", "weight_scale", "bias"))
    return all(same) and (a.input_scale, a.output_scale, a.macs, a.name) == (
        b.input_scale,
        b.output_scale,
        b.macs,
        b.name,
    )


def make_layer(module: nn.Module, precision: Precision, x: np.ndarray, name: str = "layer") -> LayerQuant:
    """A layer quantized from random data, at ranges that clip a little."""
    m: Any = module
    weight = m.weight.detach().numpy()
    bias = None if m.bias is None else m.bias.detach().numpy()
    bits, number = (precision.weight_bits, precision.activation_bits), precision.number
    scale = weight_scales(weight, bits[0], "mse")
    conv = weight.ndim == 4
    with torch.no_grad():
        y = module(torch.from_numpy(x)).numpy()
    if number == "fp8":
        scale = (scale * np.float32(127 / E4M3_MAX)).astype(np.float32)
    top = E4M3_MAX if number == "fp8" else qmax(bits[1])
    input_scale = 1.0 if precision.weight_only else float(np.float32(np.quantile(np.abs(x), 0.99) / top))
    cpu = Emission.ORT_CPU.numerics(precision) is Emission.ORT_CPU
    output_scale = float(np.float32(np.quantile(np.abs(y), 0.995) / 127)) if conv and cpu else None
    codes = nearest(weight, scale, bits[0], number)
    return LayerQuant(
        name,
        "conv" if conv else "linear",
        codes,
        scale,
        bits[0],
        input_scale,
        bits[1],
        output_scale,
        bias,
        1,
        number,
        geometry_of(module),
    )
