"""How whole networks are judged: k, bias, residual variance and error per step, engine against simulation."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

import numpy as np
import numpy.typing as npt

from ..core.figures import NoiseFigures
from ..core.noise import NoiseStats, jackknife
from ..errors import ParityError
from .judgement import FLOAT_TOLERANCE

F64 = npt.NDArray[np.float64]

FALSE_ALARM = 0.0027
"""Probability that a correct engine fails on one statistic over all steps: that of three sigma."""
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
    one trajectory out of both at once.

    Args:
        rounding: relative error of the engine's floats that the simulation does not have (HALF for float16).
            It adds to the noise in the same way in every trajectory. The standard error counts as at least
            the change that it may make to a statistic.
    Raises:
        ParityError: a statistic differs; names the step and the statistic.
    """
    total, reference = NoiseStats.pool(engine), NoiseStats.pool(simulated)
    limit = max_standard_errors(len(engine), len(total.count))
    power = np.sqrt((reference.ee / np.maximum(reference.count, 1.0)[:, None]).mean(1)) * rounding
    worst: dict[str, float] = {}
    for statistic, of in STATISTICS.items():
        a, b = of(total), of(reference)
        difference, error = jackknife(lambda x, y, of=of: of(x) - of(y), engine, simulated)
        # Two executions of one network may differ by float rounding alone, whose spread is close to none.
        moved = _moved(statistic, b, rounding, power[:, None] if b.ndim == 2 else power)
        floor = FLOAT_TOLERANCE * np.abs(b) + 1e-12 + moved
        z = (np.abs(difference) / np.maximum(error, floor)).reshape(len(a), -1).max(1)
        worst[statistic] = round(float(z.max()), 3)
        if not z.max() <= limit:
            step = int(z.argmax())
            raise ParityError(
                f"{name}: {statistic} at step {step} is {np.ravel(a[step])[0]:.4g} on the engine and "
                f"{np.ravel(b[step])[0]:.4g} in the simulation, {z.max():.1f} standard errors apart "
                f"(allowed: {limit:.1f})"
            )
    ratio = _mse(total) / np.maximum(_mse(reference), 1e-30)
    return NoiseFigures(
        worst,
        round(limit, 3) if len(engine) >= FEW else None,
        tuple(ratio.round(4).tolist()),
        tuple(float(value) if np.isfinite(value) else None for value in total.snr),
    )


def _moved(statistic: str, value: F64, rounding: float, size: F64) -> F64 | float:
    """The largest change that an error `rounding` times e, of RMS `size`, makes to a statistic."""
    if statistic == "k":
        return rounding
    return size if statistic == "bias" else 2 * size * np.sqrt(np.abs(value)) + size**2


def max_standard_errors(n: int, n_steps: int) -> float:
    """Most standard errors by which statistics of two correct executions may differ.

    This is Student's t for n trajectories, over n_steps at once.
    """
    from scipy.stats import t

    return float(t.ppf(1 - FALSE_ALARM / 2 / n_steps, n - 1))
