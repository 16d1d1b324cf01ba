"""NoiseStats and Correction: the algebra of PTQD.

D = eq - e is the quantization noise of one precision and emission at the same x_t, after guidance: e is the
full-precision prediction, eq the quantized one. PTQD splits it as D = k e + D' (He et al. 2023, section 3.2).
All statistics are per step; axis T is sampling order.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields
from functools import reduce
from operator import add
from typing import Literal

import numpy as np
import numpy.typing as npt

F64 = npt.NDArray[np.float64]
Mode = Literal["none", "ptqd", "affine"]
MIN_GAIN_DENOMINATOR = 0.1
"""Lower bound of 1 + k: a k below -0.9, which would amplify more than tenfold, is held at -0.9."""


@dataclass(frozen=True)
class NoiseStats:
    """Streaming sums over samples and pixels, per step and channel; `a + b` pools two sets exactly.

    Attributes:
        count: elements summed per channel, float64 (T,).
        e, d, ee, ed, dd: sums of e, D, e^2, e D, D^2, float64 (T, C).
    """

    count: F64
    e: F64
    d: F64
    ee: F64
    ed: F64
    dd: F64

    @classmethod
    def zeros(cls, n_steps: int, channels: int) -> NoiseStats:
        z = np.zeros((n_steps, channels))
        return cls(np.zeros(n_steps), z, z, z, z, z)

    @classmethod
    def of_step(
        cls, step: int, n_steps: int, e: npt.NDArray[np.floating], eq: npt.NDArray[np.floating]
    ) -> NoiseStats:
        """Sums of one step from e and eq, each (B, C, ...); the other steps are zero."""
        e64 = np.moveaxis(np.asarray(e, np.float64), 1, 0).reshape(e.shape[1], -1)
        d64 = np.moveaxis(np.asarray(eq, np.float64), 1, 0).reshape(e.shape[1], -1) - e64
        row = np.zeros(n_steps)
        row[step] = 1.0

        def at(values: F64) -> F64:
            return row[:, None] * values

        return cls(
            row * e64.shape[1],
            at(e64.sum(1)),
            at(d64.sum(1)),
            at((e64**2).sum(1)),
            at((e64 * d64).sum(1)),
            at((d64**2).sum(1)),
        )

    def __add__(self, other: NoiseStats) -> NoiseStats:
        return NoiseStats(*(getattr(self, f.name) + getattr(other, f.name) for f in fields(self)))

    def __sub__(self, other: NoiseStats) -> NoiseStats:
        return NoiseStats(*(getattr(self, f.name) - getattr(other, f.name) for f in fields(self)))

    @classmethod
    def pool(cls, parts: Sequence[NoiseStats]) -> NoiseStats:
        """The exact sum of at least one set."""
        return reduce(add, parts)

    def _means(self) -> tuple[F64, F64, F64, F64, F64]:
        n = np.maximum(self.count, 1.0)[:, None]
        return self.e / n, self.d / n, self.ee / n, self.ed / n, self.dd / n

    @property
    def k(self) -> F64:
        """k = Cov(e, D) / Var(e), (T,), unclamped (PTQD eq. 7).

        It is pooled over samples, channels and pixels, and 0 where Var(e) is 0.
        """
        e, d, ee, ed, _ = (m.mean(1) for m in self._means())
        var = ee - e**2
        return np.asarray(np.where(var > 0, (ed - e * d) / np.where(var > 0, var, 1.0), 0.0))

    @property
    def bias(self) -> F64:
        """mu, (T, C): mean of D' = D - k e per channel."""
        e, d, *_ = self._means()
        return np.asarray(d - self.k[:, None] * e)

    @property
    def var(self) -> F64:
        """Residual variance, (T,): Var(D' about its channel mean) / (1 + k)^2."""
        return Correction.from_stats(self, "ptqd").var

    @property
    def snr(self) -> F64:
        """SNR_Q, (T,): E||e||^2 / E||D||^2, a ratio of powers (PTQD, section 3.4).

        It is infinite where there is no noise.
        """
        dd = self.dd.sum(1)
        return np.asarray(np.where(dd > 0, self.ee.sum(1) / np.where(dd > 0, dd, 1.0), np.inf))

    def corrected(self, correction: Correction) -> NoiseStats:
        """The sums that the corrected output, gain eq + offset, would have given.

        They are exact, and nothing is run again.
        """
        g, o, n = correction.gain, correction.offset, self.count[:, None]
        h = g - 1
        return NoiseStats(
            self.count,
            self.e,
            h * self.e + g * self.d + o * n,
            self.ee,
            h * self.ee + g * self.ed + o * self.e,
            h**2 * self.ee
            + g**2 * self.dd
            + o**2 * n
            + 2 * h * g * self.ed
            + 2 * h * o * self.e
            + 2 * g * o * self.d,
        )

    def residual_var(self, gain: F64, offset: F64) -> F64:
        """Variance of gain eq + offset - e about its channel mean, averaged over channels, (T,).

        gain and offset are (T, C).
        """
        e, d, ee, ed, dd = self._means()
        see, sed, sdd = ee - e**2, ed - e * d, dd - d**2
        return np.asarray(
            np.maximum(0.0, ((gain - 1) ** 2 * see + 2 * gain * (gain - 1) * sed + gain**2 * sdd).mean(1))
        )

    def mse(self, gain: F64, offset: F64) -> F64:
        """E (gain eq + offset - e)^2, (T,), with gain and offset (T, C)."""
        e, d, *_ = self._means()
        mean = (gain - 1) * e + gain * d + offset
        return np.asarray(self.residual_var(gain, offset) + (mean**2).mean(1))


@dataclass(frozen=True)
class Correction:
    """ec = gain[i, c] * eq + offset[i, c]; the residual ec - e has variance var[i].

    Attributes:
        gain, offset: float64 (T, C).
        var: float64 (T,).
    """

    gain: F64
    offset: F64
    var: F64

    @classmethod
    def identity(cls, n_steps: int, channels: int) -> Correction:
        """No correction and no residual: the correction of full precision."""
        return cls(np.ones((n_steps, channels)), np.zeros((n_steps, channels)), np.zeros(n_steps))

    @classmethod
    def from_stats(cls, stats: NoiseStats, mode: Mode, clamp_k: bool = False) -> Correction:
        """The correction of one mode.

        none:   identity; var is the variance of D about its channel mean.
        ptqd:   ec = (eq - mu) / (1 + k) (PTQD eq. 8-10); `clamp_k` holds k at >= 0 as the paper does. 4-bit
                weights have k < 0.
        affine: best linear estimator of e from eq, per channel (D2-DPM): gain = Cov(e, eq) / Var(eq),
                offset = E e - gain E eq.
        """
        e, d, ee, ed, dd = stats._means()
        if mode == "none":
            gain, offset = np.ones_like(e), np.zeros_like(e)
        elif mode == "ptqd":
            k = stats.k
            k = np.maximum(k, 0.0 if clamp_k else MIN_GAIN_DENOMINATOR - 1.0)[:, None]
            gain = np.broadcast_to(1 / (1 + k), e.shape).copy()
            offset = -(d - k * e) * gain
        else:
            cov, var = ee - e**2 + ed - e * d, (ee + 2 * ed + dd) - (e + d) ** 2
            gain = np.where(var > 0, cov / np.where(var > 0, var, 1.0), 1.0)
            offset = e - gain * (e + d)
        return cls(gain, offset, stats.residual_var(gain, offset))

    def after(self, folded: Correction) -> Correction:
        """What to apply to predictions that `folded` has corrected, so that they are corrected by this alone.

        Both are affine in eq, so one is undone and the other applied exactly.
        """
        gain = self.gain / folded.gain
        return Correction(gain, self.offset - gain * folded.offset, self.var)

    def gated(
        self, held_out: Sequence[NoiseStats], fallback: Correction
    ) -> tuple[Correction, npt.NDArray[np.bool_], F64, F64]:
        """The fidelity gate: a step keeps its correction only where held-out trajectories confirm it.

        The correction must lower the error on trajectories that it was not fitted on.

        Args:
            held_out: sums of single held-out trajectories, at least two.
            fallback: the correction of a step that fails, normally mode "none" of the same statistics.
        Returns:
            the gated correction; kept (T,); mean drop of the squared error (T,) and its standard error (T,).
        """
        one, zero = np.ones_like(self.gain), np.zeros_like(self.gain)
        drops = np.stack([s.mse(one, zero) - s.mse(self.gain, self.offset) for s in held_out])
        drop, error = drops.mean(0), drops.std(0, ddof=1) / np.sqrt(len(drops))
        kept = drop > error
        col = kept[:, None]
        gated = Correction(
            np.where(col, self.gain, fallback.gain),
            np.where(col, self.offset, fallback.offset),
            np.where(kept, self.var, fallback.var),
        )
        return gated, kept, drop, error


def jackknife(statistic: Callable[..., F64], *sets: Sequence[NoiseStats]) -> tuple[F64, F64]:
    """(estimate, standard error) of a statistic of the pooled sums of each set, by the jackknife.

    It leaves one trajectory out of all sets at once. With one set it gives the error of a statistic; with two
    sets over the same trajectories, the error of a paired difference.

    Args:
        statistic: a function of as many NoiseStats as there are sets.
        sets: sums of single trajectories, at least two, the same trajectories in each set.
    """
    totals, n = [NoiseStats.pool(parts) for parts in sets], len(sets[0])
    left = np.stack(
        [
            statistic(*(total - part for total, part in zip(totals, row, strict=True)))
            for row in zip(*sets, strict=True)
        ]
    )
    return statistic(*totals), np.sqrt((n - 1) / n * ((left - left.mean(0)) ** 2).sum(0))
