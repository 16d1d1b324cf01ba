"""Intervals: of shares, and by the bootstrap of means, Frechet and kernel distances.

One set of resampled indices serves all candidates, so that differences are paired: what a resample has of
easy and hard samples is the same in both.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from ..errors import PTQDError, RecipeError
from .metrics import feature_stats, frechet_distance

F64 = npt.NDArray[np.float64]
Counts = npt.NDArray[np.int64]
LEVEL = 0.95
"""Of all intervals."""
BLOCK = 512
"""Rows of a kernel matrix that are in memory at a time."""


@dataclass(frozen=True)
class Estimate:
    """A figure and its 95 % interval, which is None where nothing was resampled."""

    value: float
    low: float | None = None
    high: float | None = None


@dataclass(frozen=True)
class Resampled:
    """A figure over all samples, and over each resample of them.

    Attributes:
        value: over all.
        draws: (B,); B may be 0.
    """

    value: float
    draws: F64

    def __sub__(self, other: Resampled) -> Resampled:
        """The paired difference: both were resampled with the same indices."""
        return Resampled(self.value - other.value, self.draws - other.draws)

    def estimate(self, lowest: float = -np.inf) -> Estimate:
        """The figure and quantiles of the resamples about it.

        The mean of the resamples stands for the figure: a distance of resampled sets, in which samples recur,
        is larger on average than that of the sets, which is a bias and no uncertainty.

        Args:
            lowest: no such figure is below it.
        """
        if len(self.draws) == 0:
            return Estimate(self.value)
        low, high = np.quantile(self.draws - self.draws.mean(), ((1 - LEVEL) / 2, (1 + LEVEL) / 2))
        return Estimate(self.value, max(lowest, self.value + float(low)), self.value + float(high))


def share(hits: npt.NDArray[np.bool_]) -> Estimate:
    """The share of hits (N,) with Wilson's interval, which also holds at 0 and 1.

    Raises:
        PTQDError: SciPy is not installed.
    """
    try:
        from scipy.stats import binomtest
    except ImportError as error:
        raise PTQDError(f"intervals need SciPy ({error}): install the extra eval") from error
    interval = binomtest(int(hits.sum()), len(hits)).proportion_ci(LEVEL, method="wilson")
    return Estimate(float(hits.mean()), float(interval.low), float(interval.high))


def resample(n: int, resamples: int, seed: int = 0) -> Counts:
    """How often each of n samples is in each resample, (B, n): rows with the sum n."""
    return np.asarray(np.random.default_rng(seed).multinomial(n, np.full(n, 1 / n), resamples), np.int64)


def mean_of(values: F64, counts: Counts) -> Resampled:
    """Mean of values (N,)."""
    return Resampled(float(values.mean()), np.asarray(counts @ values / len(values)))


def frechet_to(reference: tuple[F64, F64] | F64, features: F64, counts: Counts) -> Resampled:
    """Frechet distance of features (N, D) to a set.

    Args:
        reference: mean and covariance of a set that is not resampled, or features (N, D) of the same indices,
            which are.
    """
    fixed = reference if isinstance(reference, tuple) else None

    def distance(rows: Counts | None) -> float:
        other = feature_stats(np.asarray(reference), rows) if fixed is None else fixed
        return frechet_distance(*feature_stats(features, rows), *other)

    return Resampled(distance(None), np.array([distance(rows) for rows in counts], np.float64))


def kernel_to_pair(reference: F64, features: F64, counts: Counts) -> Resampled:
    """Squared kernel distance of two sets of the same indices, features (N, D).

    The unbiased estimate for pairs (Gretton et al. 2012, eq. 4): the mean over i != j of
    k(x_i, x_j) + k(y_i, y_j) - k(x_i, y_j) - k(y_i, x_j), which also holds where x_i and y_i depend on each
    other, as samples from the same noise do. The kernel is KID's (Binkowski et al. 2018).
    """
    _check_enough(features)
    x, y = features, reference

    def rows(i: slice) -> F64:
        return kernel(x[i], x) + kernel(y[i], y) - kernel(x[i], y) - kernel(y[i], x)

    return _quadratic(rows, len(x), counts)


def kernel_to_set(reference: F64, features: F64, counts: Counts) -> Resampled:
    """Squared kernel distance (Gretton et al. 2012, eq. 3), unbiased, of features (N, D) to those of another
    set (M, D), which is not resampled."""
    _check_enough(features)
    _check_enough(reference)
    own = _quadratic(lambda i: kernel(features[i], features), len(features), counts)
    across = np.concatenate([kernel(features[i], reference).mean(1) for i in _blocks(len(features))])
    none = resample(len(reference), 0)
    there = _quadratic(lambda i: kernel(reference[i], reference), len(reference), none).value
    both = mean_of(across, counts)
    return Resampled(own.value - 2 * both.value + there, own.draws - 2 * both.draws + there)


def kernel(x: F64, y: F64) -> F64:
    """(x . y / D + 1)^3 of every two rows, (N, M)."""
    return np.asarray((x @ y.T / x.shape[1] + 1.0) ** 3)


def _quadratic(rows: Callable[[slice], F64], n: int, counts: Counts) -> Resampled:
    """Mean over i != j of a symmetric matrix, and over each resample; `rows` gives some rows of it."""
    total, draws = 0.0, np.zeros(len(counts))
    for i in _blocks(n):
        block = rows(i)
        block[np.arange(i.stop - i.start), np.arange(i.start, i.stop)] = 0.0
        total += float(block.sum())
        # Samples that recur in a resample are not paired with themselves.
        draws += ((counts[:, i] @ block) * counts).sum(1)
    return Resampled(total / (n * (n - 1)), draws / (n - 1) ** 2)


def _blocks(n: int) -> Iterator[slice]:
    return (slice(i, min(i + BLOCK, n)) for i in range(0, n, BLOCK))


def _check_enough(features: F64) -> None:
    if features.ndim != 2 or len(features) < 2:
        raise RecipeError(f"features have shape {features.shape}: expected (N, D) with at least 2 samples")
