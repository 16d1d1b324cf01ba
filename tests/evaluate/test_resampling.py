"""Intervals and distances of sets: known values, right coverage, paired differences."""

from __future__ import annotations

from itertools import permutations

import numpy as np
import pytest
from scipy.linalg import sqrtm

from ptqd_export.errors import RecipeError
from ptqd_export.evaluate.metrics import feature_stats
from ptqd_export.evaluate.resampling import (
    F64,
    Resampled,
    frechet_to,
    kernel,
    kernel_to_pair,
    kernel_to_set,
    mean_of,
    resample,
    share,
)

NONE = np.zeros((0, 5), np.int64)


def features(n: int, d: int = 3, seed: int = 0, shift: float = 0.0) -> F64:
    return np.random.default_rng(seed).standard_normal((n, d)) + shift


def test_resamples_are_counts_and_repeat() -> None:
    counts = resample(40, 50, seed=1)
    assert counts.shape == (50, 40) and (counts.sum(1) == 40).all() and counts.max() > 1
    np.testing.assert_array_equal(counts, resample(40, 50, seed=1))
    assert (counts != resample(40, 50, seed=2)).any()


def test_share_is_wilson_s() -> None:
    hits = np.arange(200) < 4
    found, z = share(hits), 1.959963984540054
    centre = (0.02 + z**2 / 400) / (1 + z**2 / 200)
    half = z / (1 + z**2 / 200) * np.sqrt(0.02 * 0.98 / 200 + z**2 / (4 * 200**2))
    assert (found.value, found.low, found.high) == pytest.approx((0.02, centre - half, centre + half))
    none = share(hits & False)
    assert none.value == 0 and none.low == 0 and none.high is not None and 0.01 < none.high < 0.03


def test_the_interval_of_a_mean_is_that_of_theory() -> None:
    values = np.random.default_rng(0).standard_normal(400) * 3 + 7
    found = mean_of(values, resample(400, 2000)).estimate()
    half = 1.96 * values.std() / 20
    assert found.value == values.mean() and found.low is not None and found.high is not None
    np.testing.assert_allclose((found.low, found.high), (found.value - half, found.value + half), atol=0.03)
    alone = mean_of(values, resample(400, 0)).estimate()
    assert (alone.value, alone.low, alone.high) == (values.mean(), None, None)


def test_a_paired_difference_is_known_better_than_its_parts() -> None:
    hard = np.random.default_rng(0).standard_normal(300) * 10
    a, b = (mean_of(hard + step, resample(300, 500)) for step in (1.0, 0.0))
    found = (a - b).estimate()
    assert found.low == pytest.approx(1.0) and found.high == pytest.approx(1.0)
    unpaired = (a - mean_of(hard, resample(300, 500, seed=9))).estimate()
    assert unpaired.low is not None and unpaired.high is not None and unpaired.high - unpaired.low > 1


def test_the_centre_of_an_interval_is_the_figure() -> None:
    """Resampled distances are larger on average: that is no uncertainty."""
    found = Resampled(1.0, np.array([3.0, 4.0, 5.0])).estimate()
    assert found.low is not None and found.high is not None and found.low < 1 < found.high < 2.1
    assert Resampled(1.0, np.array([3.0, 9.0])).estimate().low == pytest.approx(-1.85)
    assert Resampled(1.0, np.array([3.0, 9.0])).estimate(lowest=0.0).low == 0


def test_frechet_distance_is_that_of_the_root_of_matrices() -> None:
    x, y = features(200), features(200, seed=1, shift=0.5) * 2
    (m1, c1), (m2, c2) = feature_stats(x), feature_stats(y)
    expected = ((m1 - m2) ** 2).sum() + np.trace(c1 + c2 - 2 * np.real(sqrtm(c1 @ c2)))
    assert frechet_to((m1, c1), y, NONE).value == pytest.approx(expected)
    assert frechet_to(x, y, NONE).value == pytest.approx(expected)


def test_frechet_resamples_are_distances_of_the_resampled_sets() -> None:
    x, y = features(30), features(30, seed=1, shift=1.0)
    counts = resample(30, 3)
    rows = [np.repeat(np.arange(30), row) for row in counts]
    pairs = [frechet_to(x[i], y[i], NONE).value for i in rows]
    np.testing.assert_allclose(frechet_to(x, y, counts).draws, pairs, rtol=1e-9)
    fixed = feature_stats(x)
    alone = [frechet_to(fixed, y[i], NONE).value for i in rows]
    np.testing.assert_allclose(frechet_to(fixed, y, counts).draws, alone, rtol=1e-9)
    assert (np.abs(np.array(pairs) - alone) > 1e-6).all()


def test_kernel_distance_by_its_definition() -> None:
    x, y = features(6), features(6, seed=1, shift=0.7)
    k = lambda a, b: (a @ b / 3 + 1) ** 3  # noqa: E731
    pairs = [
        k(x[i], x[j]) + k(y[i], y[j]) - k(x[i], y[j]) - k(x[j], y[i]) for i, j in permutations(range(6), 2)
    ]
    counts = np.zeros((0, 6), np.int64)
    assert kernel_to_pair(x, y, counts).value == pytest.approx(np.mean(pairs))
    z = features(9, seed=2)
    own = np.mean([k(y[i], y[j]) for i, j in permutations(range(6), 2)])
    there = np.mean([k(z[i], z[j]) for i, j in permutations(range(9), 2)])
    expected = own + there - 2 * kernel(y, z).mean()
    assert kernel_to_set(z, y, counts).value == pytest.approx(expected)


def test_kernel_distance_has_no_bias() -> None:
    """Of sets from one distribution it is 0 on average; of dependent pairs too; of others it is not."""
    none = np.zeros((0, 40), np.int64)
    sets = [(features(40, seed=2 * i), features(40, seed=2 * i + 1)) for i in range(200)]
    apart = np.array([kernel_to_set(x, y, none).value for x, y in sets])
    assert abs(apart.mean()) < 3 * apart.std() / np.sqrt(200)
    pairs = np.array([kernel_to_pair(x, 0.8 * x + 0.6 * y, none).value for x, y in sets])
    assert abs(pairs.mean()) < 3 * pairs.std() / np.sqrt(200)
    moved = np.array([kernel_to_pair(x, y + 0.5, none).value for x, y in sets])
    assert moved.mean() > 10 * moved.std() / np.sqrt(200)


def test_kernel_resamples_and_blocks() -> None:
    """More rows than a block; spread over resamples as over fresh sets; equal sets stay at 0."""
    x, y = features(700), features(700, seed=1, shift=0.3)
    counts = resample(700, 100)
    found = kernel_to_pair(x, y, counts)
    matrix = kernel(x, x) + kernel(y, y) - kernel(x, y) - kernel(y, x)
    np.fill_diagonal(matrix, 0)
    assert found.value == pytest.approx(matrix.sum() / (700 * 699))
    np.testing.assert_allclose(found.draws, [w @ matrix @ w / 699**2 for w in counts])
    fresh = [
        kernel_to_pair(features(700, seed=i), features(700, seed=i + 500, shift=0.3), counts[:0]).value
        for i in range(2, 22)
    ]
    assert 0.5 < found.draws.std() / np.std(fresh) < 2
    assert abs(kernel_to_pair(x, x, counts).draws).max() < 1e-9


def test_too_few_samples() -> None:
    for distance in (frechet_to, kernel_to_pair, kernel_to_set):
        with pytest.raises(RecipeError, match="at least 2"):
            distance(features(1), features(1), np.zeros((0, 1), np.int64))
