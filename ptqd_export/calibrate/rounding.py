"""Round weights to codes on a grid with one scale per output channel: to the nearest, or by GPTQ."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import Tensor

from ..core.precision import Number
from ..core.quant import F32, I8, U8, qmax, qmin, to_codes, to_e4m3

DAMPING = 0.01
"""Share of the Hessian's mean diagonal that is added to it (GPTQ, section 3.3)."""


BLOCK = 64
"""Columns that are rounded before their errors are spread over the rest, in one product instead of many."""


def per_channel(scale: F32, ndim: int) -> F32:
    """`scale` (O,) as (O, 1, ...), which broadcasts to a weight of `ndim` dimensions."""
    return scale.reshape(-1, *[1] * (ndim - 1))


def smoothed_weight(module: Any, smooth: F32 | None) -> F32:
    """The weight that is rounded, (O, ...): W m for smoothed inputs x / m (`LayerQuant.smooth`)."""
    weight: F32 = np.ascontiguousarray(module.weight.detach().numpy(), np.float32)
    return weight if smooth is None else weight * smooth[:, None, None]


def nearest(weight: F32, scale: F32, bits: int, number: Number = "int") -> I8 | U8:
    """Codes of `weight` (O, ...) with `scale` (O,), rounded half to even and saturated."""
    scales = per_channel(scale, weight.ndim)
    return to_e4m3(weight / scales) if number == "fp8" else to_codes(weight, scales, bits)


def gptq(weight: F32, scale: F32, bits: int, hessians: Tensor) -> I8:
    """Codes that minimise the error of the layer's outputs instead of its weights' (Frantar et al. 2023).

    This is algorithm 1 of the paper. It rounds one column of the (O, I) weight at a time, then spreads the
    error over the columns not yet rounded, by the rows of the Cholesky factor of the inverse Hessian. Columns
    are taken by decreasing Hessian diagonal ("act order").

    Args:
        weight: (O, ...); consecutive groups of output channels share a Hessian.
        hessians: (groups, K, K), sums of x x^T over the inputs x that are multiplied with a flattened weight
            row of K values.
    """
    groups, size, _ = hessians.shape
    rows = torch.from_numpy(weight.astype(np.float64)).reshape(groups, -1, size)
    scales = torch.from_numpy(scale.astype(np.float64)).reshape(groups, -1)
    codes = torch.empty_like(rows)
    for group in range(groups):
        hessian = hessians[group].double()
        diagonal = hessian.diagonal()
        damped = hessian + torch.eye(size, dtype=torch.float64) * max(DAMPING * float(diagonal.mean()), 1e-12)
        order = torch.argsort(diagonal, descending=True, stable=True)
        inverse = torch.cholesky_inverse(torch.linalg.cholesky(damped[order][:, order]))
        factor = torch.linalg.cholesky(inverse, upper=True)
        left, step = rows[group][:, order].clone(), scales[group]
        rounded = torch.empty_like(left)
        for start in range(0, size, BLOCK):
            stop = min(start + BLOCK, size)
            errors = torch.empty_like(left[:, start:stop])
            for column in range(start, stop):
                value = left[:, column]
                rounded[:, column] = (value / step).round().clamp(qmin(bits), qmax(bits))
                error = (value - rounded[:, column] * step) / factor[column, column]
                left[:, column:stop] -= error[:, None] * factor[column, column:stop]
                errors[:, column - start] = error
            left[:, stop:] -= errors @ factor[start:stop, stop:]
        codes[group][:, order] = rounded
    return np.ascontiguousarray(codes.reshape(weight.shape).numpy().astype(np.int8))
