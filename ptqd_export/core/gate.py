"""The gate: how much of a correction each step keeps, by the significance of what it corrects.

The parts are nested: nothing, the bias mu alone, k alone, or both. They are judged by themselves and not by
the squared error of single steps. A gain 1 / (1 + k) is unbiased, not of least squares: with k < 0 it
amplifies what is random. What is random partly averages out over the steps of a run, while what k and mu
stand for adds up.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
import numpy.typing as npt

from .noise import Correction, Mode, NoiseStats, jackknife

F64 = npt.NDArray[np.float64]
Bools = npt.NDArray[np.bool_]
Kept = Literal["nothing", "bias", "k", "both", "affine"]
LEVEL = 0.05
"""Probability that a network without k and mu is corrected anywhere: over all steps, channels and tests."""
LARGEST_Z = 1e6


@dataclass(frozen=True)
class Gated:
    """A correction after the gate.

    Attributes:
        correction: what is kept of it.
        kept: per step, (T,).
        z_k, z_bias: k and mu over their standard errors, (T,); mu's, and for "affine" also k's, are those of
            the channel where they are largest.
        limit: |z| above which k or mu is kept; 0 without a gate.
    """

    correction: Correction
    kept: tuple[Kept, ...]
    z_k: F64
    z_bias: F64
    limit: float


def gate(
    parts: Sequence[NoiseStats], mode: Mode, clamp_k: bool = False, level: float | None = LEVEL
) -> Gated:
    """Fit the correction of a mode, and keep at each step what is significant.

    A step keeps k where it differs from 0, and mu where the mean of D - k e does in any channel, with k as
    kept. Standard errors are those of a jackknife over trajectories. `affine` has no parts: a step keeps all
    of it where k or mu of any channel is significant.

    Args:
        parts: sums of single trajectories, at least two.
        level: probability that anything is kept of a correction of nothing, by Bonferroni over the steps and
            over the tests of each; None keeps all.
    """
    total = NoiseStats.pool(parts)
    n_steps, channels = total.e.shape
    per_channel = mode == "affine"
    tests = n_steps * ((channels if per_channel else 1) + channels)
    limit = 0.0 if level is None else t_quantile(level / tests, len(parts) - 1)
    every = np.ones(n_steps, bool)
    z_k = _largest_z(parts, lambda s: s.channel_k if per_channel else s.k[:, None])
    has_k = (every if level is None else np.abs(z_k) > limit) & (mode in ("ptqd", "affine"))
    if clamp_k and mode == "ptqd":
        has_k &= (total.k > 0) | (level is None)

    def mean_of_rest(stats: NoiseStats) -> F64:
        return stats.mean_noise(np.where(has_k, stats.k, 0.0))

    z_bias = _largest_z(parts, mean_of_rest)
    has_bias = (every if level is None else np.abs(z_bias) > limit) & (mode != "none")
    if mode == "affine":
        has = has_k | has_bias
        names = np.where(has, "affine", "nothing")
        correction = Correction.from_stats(total, mode).at(has, Correction.from_stats(total, "none"))
    else:
        names = np.select([has_k & has_bias, has_k, has_bias], ["both", "k", "bias"], "nothing")
        correction = Correction.of_parts(total, has_k, has_bias, clamp_k)
    return Gated(correction, tuple(names.tolist()), z_k, z_bias, limit)


def _largest_z(parts: Sequence[NoiseStats], statistic: Callable[[NoiseStats], F64]) -> F64:
    """Of a statistic (T, C): the estimate over its standard error in the channel where that is largest, (T,).

    It is 0 where the estimate is, and at most LARGEST_Z, as where there is no spread.
    """
    value, error = jackknife(statistic, parts)
    least = np.maximum(error, np.abs(value) / LARGEST_Z)
    z = np.where(least > 0, value / np.where(least > 0, least, 1.0), 0.0)
    return np.take_along_axis(z, np.abs(z).argmax(1)[:, None], 1)[:, 0]


def t_quantile(p: float, dof: int) -> float:
    """t with P(|T| > t) = p, for Student's T of `dof` degrees of freedom."""
    low, high = 0.0, 1.0
    while _two_sided(high, dof) > p:
        low, high = high, 2 * high
    for _ in range(60):
        middle = (low + high) / 2
        low, high = (middle, high) if _two_sided(middle, dof) > p else (low, middle)
    return high


def _two_sided(t: float, dof: int) -> float:
    """P(|T| > t) (Abramowitz & Stegun 26.7.3 and 26.7.4)."""
    angle = math.atan(t / math.sqrt(dof))
    sine, cosine = math.sin(angle), math.cos(angle)
    odd = dof % 2
    term, total = (cosine, 0.0) if odd else (1.0, 0.0)
    for i in range(1 + odd, dof, 2):
        total += term
        term *= i / (i + 1) * cosine**2
    return 1 - (2 / math.pi * (angle + sine * total) if odd else sine * total)
