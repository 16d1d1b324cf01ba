"""How whole networks are judged: k, bias, residual variance and error per step, engine against simulation.

Two things let a difference pass: its own standard error, and a margin of equivalence. The standard error
alone is no rule. Where the noise is small and the same in every trajectory, so are the last bits in which two
right executions differ: the paired difference has next to no spread, and -0.0002715 is many standard errors
from -0.0002712. So a difference that moves the end result by less than MARGIN of the noise counts as none.

What a difference does to the end result: T steps move the sample alike. Let the corrected noise of a step be
D = k e + mu + r, in the simulation, with V = E e^2, P = E D^2 and E r^2 = P - k^2 V - mu^2. The r of the
steps are independent, so they add up as powers, to T E r^2; k e and mu are the same in every step at worst,
and add up as amplitudes, to T^2 (k^2 V + mu^2). If a bias is off by d in every step, it adds up to
T (mu + d), and the power at the end changes by T^2 (d^2 + 2 |mu| d) at most. This is MARGIN of the noise
where

    d^2 + 2 |mu| d = MARGIN S,    S = k^2 V + mu^2 + E r^2 / T,    d = sqrt(mu^2 + MARGIN S) - |mu|.

    bias   that d, for each channel; mu^2 in S is the mean over channels
    k      k e has the power k^2 V where the bias has mu^2: d = sqrt(k^2 + MARGIN S / V) - |k|
    var    powers add up as they are: MARGIN var
    mse    MARGIN P

The margin is taken off the difference before its standard errors are counted. This makes the limit the one of
the hypothesis that the true difference lies within the margin.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

import numpy as np
import numpy.typing as npt

from ..core.figures import NoiseFigures
from ..core.noise import NoiseStats, jackknife
from ..errors import ParityError
from .judgement import FLOAT_TOLERANCE

F64 = npt.NDArray[np.float64]

FALSE_ALARM = 1e-3
"""Probability that a right engine fails anywhere, were every difference as large as its margin."""
MARGIN = 0.01
"""Share of the noise's power that a difference may make in the end and count as none."""
FLOAT_NOISE = 2.0**-19
"""What float32 roundings of some hundred operations change in epsilon, relative to its RMS."""
FEW = 8
"""With fewer held-out trajectories the spread between them says little, and the limit is not reported."""


def _mse(stats: NoiseStats) -> F64:
    return stats.mse(np.ones_like(stats.e), np.zeros_like(stats.e))


STATISTICS: Mapping[str, Callable[[NoiseStats], F64]] = {
    "k": lambda stats: stats.k,
    "bias": lambda stats: stats.bias,
    "var": lambda stats: stats.var,
    "mse": _mse,
}


def check_noise(
    name: str, engine: Sequence[NoiseStats], simulated: Sequence[NoiseStats], rounding: float = 0.0
) -> NoiseFigures:
    """Compare the statistics of engine and simulation, both corrected, over the same held-out trajectories.

    Both saw the same inputs, so their difference is judged by its own standard error: a jackknife that leaves
    one trajectory out of both at once. It is counted beyond the margin of equivalence.

    Args:
        engine, simulated: sums per trajectory; those of a step that is not judged are zero in both.
        rounding: relative error of the engine's floats that the simulation does not have (HALF for float16).
            It adds to the noise in the same way in every trajectory. The standard error counts as at least
            the change that it may make to a statistic.
    Raises:
        ParityError: a statistic differs; names the step and the statistic.
    """
    total, reference = NoiseStats.pool(engine), NoiseStats.pool(simulated)
    judged = reference.count > 0
    comparisons = sum(of(reference)[judged].size for of in STATISTICS.values())
    limit = max_standard_errors(len(engine), comparisons)
    # Two executions of one network may differ by float rounding alone, whose spread is close to none.
    rounding = max(rounding, FLOAT_NOISE)
    power = np.sqrt(_power(reference)) * rounding
    worst: dict[str, float] = {}
    for statistic, of in STATISTICS.items():
        a, b = of(total), of(reference)
        difference, error = jackknife(lambda x, y, of=of: of(x) - of(y), engine, simulated)
        moved = _moved(statistic, b, rounding, power[:, None] if b.ndim == 2 else power)
        floor = FLOAT_TOLERANCE * np.abs(b) + 1e-12 + moved
        beyond = np.maximum(np.abs(difference) - margin(statistic, reference), 0.0)
        z = beyond / np.maximum(error, floor)
        worst[statistic] = round(float(z.max()), 3)
        if not z.max() <= limit:
            at = np.unravel_index(int(z.argmax()), z.shape)
            raise ParityError(
                f"{name}: {statistic} at step {at[0]} is {a[at]:.4g} on the engine and {b[at]:.4g} in the "
                f"simulation, {z.max():.1f} standard errors apart beyond what makes no difference "
                f"(allowed: {limit:.1f})"
            )
    ratio = _mse(total) / np.maximum(_mse(reference), 1e-30)
    return NoiseFigures(
        worst,
        round(limit, 3) if len(engine) >= FEW else None,
        tuple(ratio[judged].round(4).tolist()),
        tuple(float(value) if np.isfinite(value) else None for value in total.snr[judged]),
    )


def _moved(statistic: str, value: F64, rounding: float, size: F64) -> F64 | float:
    """The largest change that an error `rounding` times e, of RMS `size`, makes to a statistic."""
    if statistic == "k":
        return rounding
    return size if statistic == "bias" else 2 * size * np.sqrt(np.abs(value)) + size**2


def margin(statistic: str, simulated: NoiseStats) -> F64:
    """Largest difference of a statistic that counts as none; of the statistic's shape.

    The derivation stands at the head of this file.

    Args:
        simulated: sums of the corrected noise of the simulation.
    """
    value = STATISTICS[statistic](simulated)
    if statistic in ("var", "mse"):
        return MARGIN * value
    power = _power(simulated)
    systematic = simulated.k**2 * power + (simulated.bias**2).mean(1)
    rest = np.maximum(_mse(simulated) - systematic, 0.0)
    share = MARGIN * (systematic + rest / len(rest))
    if statistic == "bias":
        share = share[:, None]
    else:
        share = np.divide(share, power, out=np.zeros_like(share), where=power > 0)
    return np.asarray(np.sqrt(value**2 + share) - np.abs(value))


def _power(stats: NoiseStats) -> F64:
    """E e^2 per step, (T,)."""
    return np.asarray((stats.ee / np.maximum(stats.count, 1.0)[:, None]).mean(1))


def max_standard_errors(n: int, comparisons: int) -> float:
    """Most standard errors beyond their margins by which statistics of two right executions may differ.

    This is Student's t for n trajectories, over all comparisons at once (Bonferroni).
    """
    from scipy.stats import t

    return float(t.ppf(1 - FALSE_ALARM / 2 / comparisons, n - 1))
