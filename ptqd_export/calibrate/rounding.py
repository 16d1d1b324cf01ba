"""Rounding of weights to codes on a given grid, a scale per output channel: to the nearest, or GPTQ."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from ..precision import Number
from ..quant import F32, I8, U8, qmax, qmin, to_e4m3
from ..quant import quantize as to_codes

DAMPING = 0.01
"""Share of the Hessian's mean diagonal that is added to it (GPTQ, section 3.3)."""


BLOCK = 64
"""Columns rounded before their errors are spread over all that follow: one matrix product instead of many thin ones."""


def per_channel(scale: F32, ndim: int) -> F32:
    """`scale` (O,) as (O, 1, ...), broadcastable to a weight of `ndim` dimensions."""
    return scale.reshape(-1, *[1] * (ndim - 1))


def nearest(weight: F32, scale: F32, bits: int, number: Number = "int") -> I8 | U8:
    """Codes of `weight` (O, ...) with `scale` (O,): round half to even, saturated."""
    scales = per_channel(scale, weight.ndim)
    return to_e4m3(weight / scales) if number == "fp8" else to_codes(weight, scales, bits)


def gptq(weight: F32, scale: F32, bits: int, hessians: Tensor) -> I8:
    """Codes that minimise the error of the layer's outputs rather than of its weights (Frantar et al. 2023, algorithm 1).

    Column by column of the (O, I) weight: round it, then spread the error over the columns not yet rounded by the rows of the
    Cholesky factor of the inverse Hessian. Columns go by decreasing Hessian diagonal ("act order").

    Args:
        weight: (O, ...); groups of output channels in order share a Hessian.
        hessians: (groups, K, K), sums of x x^T of the inputs that meet a flattened weight row of K values.
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
