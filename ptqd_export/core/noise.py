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
Mode = Literal["none", "bias", "ptqd", "affine"]
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

    def only(self, steps: Sequence[int]) -> NoiseStats:
        """These steps' sums; the other steps are zero."""
        rows = np.isin(np.arange(len(self.count)), steps)
        return NoiseStats(*((getattr(self, f.name).T * rows).T for f in fields(self)))

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
        return _ratio(ed - e * d, ee - e**2)

    @property
    def bias(self) -> F64:
        """mu, (T, C): mean of D' = D - k e per channel."""
        return self.mean_noise(self.k)

    def mean_noise(self, k: F64) -> F64:
        """Mean of D - k e per channel, (T, C), with k (T,)."""
        e, d, *_ = self._means()
        return np.asarray(d - k[:, None] * e)

    @property
    def channel_k(self) -> F64:
        """Cov(e, D) / Var(e) within each channel, (T, C), unclamped; 0 where Var(e) is 0."""
        e, d, ee, ed, _ = self._means()
        return _ratio(ed - e * d, ee - e**2)

    @property
    def var(self) -> F64:
        """Residual variance of the `ptqd` correction, (T,): Var(D') / (1 + k)^2."""
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

    def scatter(self, gain: F64) -> F64:
        """Variance that gain eq has about its linear dependence on e, averaged over channels, (T,).

        It is gain^2 (Var(D) - Cov(e, D)^2 / Var(e)) in each channel, with gain (T, C). It is what injected
        noise can stand in for: see `NoiseSchedule.recalibrated_sigmas`.
        """
        e, d, ee, ed, dd = self._means()
        cov = ed - e * d
        return np.asarray((gain**2 * np.maximum(0.0, dd - d**2 - cov * _ratio(cov, ee - e**2))).mean(1))

    def mse(self, gain: F64, offset: F64) -> F64:
        """E (gain eq + offset - e)^2, (T,), with gain and offset (T, C)."""
        e, d, ee, ed, dd = self._means()
        see, sed, sdd = ee - e**2, ed - e * d, dd - d**2
        mean = (gain - 1) * e + gain * d + offset
        about = ((gain - 1) ** 2 * see + 2 * gain * (gain - 1) * sed + gain**2 * sdd).mean(1)
        return np.asarray(np.maximum(0.0, about) + (mean**2).mean(1))


def _ratio(a: F64, b: F64) -> F64:
    return np.asarray(np.where(b > 0, a / np.where(b > 0, b, 1.0), 0.0))


@dataclass(frozen=True)
class Correction:
    """ec = gain[i, c] * eq + offset[i, c], with random error of variance var[i].

    Attributes:
        gain, offset: float64 (T, C).
        var: variance of ec that e does not explain (`NoiseStats.scatter`), float64 (T,).
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
        """The correction of one mode, at every step.

        none:   identity.
        bias:   ec = eq - mu with k = 0: mu is the mean of D per channel.
        ptqd:   ec = (eq - mu) / (1 + k) (PTQD eq. 8-10); `clamp_k` holds k at >= 0 as the paper does. 4-bit
                weights have k < 0.
        affine: best linear estimator of e from eq, per channel (D2-DPM): gain = Cov(e, eq) / Var(eq),
                offset = E e - gain E eq.
        """
        if mode == "affine":
            e, d, ee, ed, dd = stats._means()
            cov, var = ee - e**2 + ed - e * d, (ee + 2 * ed + dd) - (e + d) ** 2
            gain = np.where(var > 0, _ratio(cov, var), 1.0)
            return cls(gain, e - gain * (e + d), stats.scatter(gain))
        every = np.ones(len(stats.count), bool)
        return cls.of_parts(stats, every & (mode == "ptqd"), every & (mode != "none"), clamp_k)

    def after(self, folded: Correction) -> Correction:
        """What to apply to predictions that `folded` has corrected, so that they are corrected by this alone.

        Both are affine in eq, so one is undone and the other applied exactly.
        """
        gain = self.gain / folded.gain
        return Correction(gain, self.offset - gain * folded.offset, self.var)

    @classmethod
    def of_parts(
        cls, stats: NoiseStats, k: npt.NDArray[np.bool_], bias: npt.NDArray[np.bool_], clamp_k: bool = False
    ) -> Correction:
        """ec = (eq - mu) / (1 + k), with k where `k` (T,) says so, else 0, and mu where `bias` (T,) does."""
        least = 0.0 if clamp_k else MIN_GAIN_DENOMINATOR - 1.0
        used = np.where(k, np.maximum(stats.k, least), 0.0)
        gain = np.broadcast_to(1 / (1 + used)[:, None], stats.e.shape).copy()
        offset = np.where(bias[:, None], -stats.mean_noise(used) * gain, 0.0)
        return cls(gain, offset, stats.scatter(gain))

    def at(self, steps: npt.NDArray[np.bool_], other: Correction) -> Correction:
        """This correction at the marked steps, (T,), and `other` at the rest."""
        column = steps[:, None]
        return Correction(
            np.where(column, self.gain, other.gain),
            np.where(column, self.offset, other.offset),
            np.where(steps, self.var, other.var),
        )


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
