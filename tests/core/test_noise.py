"""NoiseStats and Correction against direct numpy on the raw arrays."""

from __future__ import annotations

import typing
from operator import attrgetter

import numpy as np
import pytest

from ptqd_export.core.noise import MIN_GAIN_DENOMINATOR, Correction, Mode, NoiseStats, jackknife

T, C, SHAPE = 3, 4, (4, 5, 5)
MODES: tuple[Mode, ...] = typing.get_args(Mode)


def _pair(
    rng: np.random.Generator,
    n: int = 6,
    k: float = -0.3,
    bias: float = 0.2,
    std: float = 0.1,
    mean: float = 0.1,
) -> tuple[np.ndarray, np.ndarray]:
    """(e, eq), each (n, *SHAPE), with D = k e + bias per channel + white noise."""
    e = (
        rng.standard_normal((n, *SHAPE)) * (1 + np.arange(C))[:, None, None] / C
        + mean * np.arange(C)[:, None, None]
    )
    noise = bias * np.linspace(-1, 1, C)[:, None, None] + std * rng.standard_normal(e.shape)
    return e, e + k * e + noise


def _steps(rng: np.random.Generator, n: int = 6) -> tuple[NoiseStats, list[tuple[np.ndarray, np.ndarray]]]:
    pairs = [_pair(rng, n, k, 0.2, s) for k, s in ((0.2, 0.05), (-0.3, 0.1), (0.0, 0.3))]
    return NoiseStats.pool([NoiseStats.of_step(i, T, *pair) for i, pair in enumerate(pairs)]), pairs


def _apply(correction: Correction, i: int, eq: np.ndarray) -> np.ndarray:
    return correction.gain[i][:, None, None] * eq + correction.offset[i][:, None, None]


def _unexplained(e: np.ndarray, y: np.ndarray) -> float:
    """Variance that a straight line through (e, y) leaves, mean over channels."""
    pairs = [(e[:, c].ravel(), y[:, c].ravel()) for c in range(C)]
    return float(np.mean([np.mean((b - np.polyval(np.polyfit(a, b, 1), a)) ** 2) for a, b in pairs]))


def test_stats_match_the_raw_arrays(rng: np.random.Generator) -> None:
    stats, pairs = _steps(rng)
    for i, (e, eq) in enumerate(pairs):
        d = eq - e
        k = np.cov(e.ravel(), d.ravel(), bias=True)[0, 1] / e.var()
        residual = d - k * e
        np.testing.assert_allclose(stats.k[i], k, rtol=1e-9)
        np.testing.assert_allclose(stats.bias[i], residual.mean((0, 2, 3)), rtol=1e-9, atol=1e-12)
        np.testing.assert_allclose(stats.var[i], _unexplained(e, d) / (1 + k) ** 2, rtol=1e-9)
        within = [np.polyfit(e[:, c].ravel(), d[:, c].ravel(), 1)[0] for c in range(C)]
        np.testing.assert_allclose(stats.channel_k[i], within, rtol=1e-9)
        np.testing.assert_allclose(stats.snr[i], (e**2).sum() / (d**2).sum(), rtol=1e-9)
        assert stats.count[i] == 6 * 25


@pytest.mark.parametrize("split", [1, 2, 5])
def test_pooling_is_exact(rng: np.random.Generator, split: int) -> None:
    e, eq = _pair(rng)
    whole = NoiseStats.of_step(1, T, e, eq)
    a, b = NoiseStats.of_step(1, T, e[:split], eq[:split]), NoiseStats.of_step(1, T, e[split:], eq[split:])
    for name in ("count", "e", "d", "ee", "ed", "dd"):
        np.testing.assert_allclose(getattr(a + b, name), getattr(whole, name), rtol=1e-12, atol=1e-12)
        np.testing.assert_allclose(getattr(whole - b, name), getattr(a, name), rtol=1e-12, atol=1e-12)
    np.testing.assert_allclose((a + b).var, whole.var, rtol=1e-9)
    assert not np.isclose(
        (a.var + b.var)[1] / 2, whole.var[1], rtol=1e-6
    )  # averaging the parts' variances is something else


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("clamp", [False, True])
def test_var_and_mse_are_those_of_the_corrected_prediction(
    rng: np.random.Generator, mode: Mode, clamp: bool
) -> None:
    """var is what a straight line through (e, ec) leaves, in each channel."""
    stats, pairs = _steps(rng)
    correction = Correction.from_stats(stats, mode, clamp)
    for i, (e, eq) in enumerate(pairs):
        ec = _apply(correction, i, eq)
        error = ec - e
        np.testing.assert_allclose(correction.var[i], _unexplained(e, ec), rtol=1e-9)
        np.testing.assert_allclose(
            stats.mse(correction.gain, correction.offset)[i], (error**2).mean(), rtol=1e-9
        )


def test_ptqd_recovers_the_model_that_made_the_noise(rng: np.random.Generator) -> None:
    """With D = k e + mu + n, ec - e is n / (1 + k): the paper's form, and the error falls to the white
    part."""
    e, eq = _pair(rng, 400, k=-0.3, bias=0.2, std=0.1, mean=0.0)
    stats = NoiseStats.of_step(0, 1, e, eq)
    ptqd = Correction.from_stats(stats, "ptqd")
    np.testing.assert_allclose(ptqd.gain, 1 / 0.7, rtol=1e-2)
    np.testing.assert_allclose(ptqd.offset[0], -0.2 * np.linspace(-1, 1, C) / 0.7, atol=5e-3)
    np.testing.assert_allclose(ptqd.var, (0.1 / 0.7) ** 2, rtol=2e-2)
    np.testing.assert_allclose(((_apply(ptqd, 0, eq) - e) ** 2).mean(), ptqd.var[0], rtol=1e-3)
    clamped = Correction.from_stats(stats, "ptqd", clamp_k=True)
    assert np.all(clamped.gain == 1) and stats.mse(clamped.gain, clamped.offset)[0] > 2 * ptqd.var[0]


def test_k_is_held_away_from_minus_one(rng: np.random.Generator) -> None:
    e, _ = _pair(rng)
    stats = NoiseStats.of_step(0, 1, e, 0.01 * e)
    np.testing.assert_allclose(stats.k, -0.99, rtol=1e-9)
    np.testing.assert_allclose(Correction.from_stats(stats, "ptqd").gain, 1 / MIN_GAIN_DENOMINATOR)


@pytest.mark.parametrize("seed", range(4))
def test_affine_is_optimal(seed: int) -> None:
    rng = np.random.default_rng(seed)
    stats, _ = _steps(rng)
    best = Correction.from_stats(stats, "affine")
    least = stats.mse(best.gain, best.offset)
    for scale in (1e-3, 0.1):
        for _ in range(20):
            dg, do = scale * rng.standard_normal((2, T, C))
            assert np.all(stats.mse(best.gain + dg, best.offset) > least)
            assert np.all(stats.mse(best.gain, best.offset + do) > least)
    for mode in (mode for mode in MODES if mode != "affine"):
        other = Correction.from_stats(stats, mode)
        assert np.all(stats.mse(other.gain, other.offset) > least)


def test_affine_residual_is_one_minus_rho_squared(rng: np.random.Generator) -> None:
    """Of it, rho^2 is random and the rest is shrinkage."""
    stats, pairs = _steps(rng)
    best = Correction.from_stats(stats, "affine")
    mse = stats.mse(best.gain, best.offset)
    for i, (e, eq) in enumerate(pairs):
        channels = [(e[:, c].ravel(), eq[:, c].ravel()) for c in range(C)]
        rho2 = [np.corrcoef(a, b)[0, 1] ** 2 for a, b in channels]
        left = [a.var() * (1 - r) for (a, _), r in zip(channels, rho2, strict=True)]
        np.testing.assert_allclose(mse[i], np.mean(left), rtol=1e-9)
        np.testing.assert_allclose(best.var[i], np.mean(np.multiply(rho2, left)), rtol=1e-9)


def test_bias_alone_and_parts(rng: np.random.Generator) -> None:
    """`bias` takes off the mean of D; of parts, each step has what it is said to have."""
    stats, pairs = _steps(rng)
    bias = Correction.from_stats(stats, "bias")
    assert (bias.gain == 1).all()
    for i, (e, eq) in enumerate(pairs):
        np.testing.assert_allclose(bias.offset[i], -(eq - e).mean((0, 2, 3)), rtol=1e-9)
    yes, no = np.ones(T, bool), np.zeros(T, bool)
    for mode, k, mu in (("none", no, no), ("bias", no, yes), ("ptqd", yes, yes)):
        whole, parts = Correction.from_stats(stats, mode), Correction.of_parts(stats, k, mu)
        for name in ("gain", "offset", "var"):
            np.testing.assert_array_equal(getattr(whole, name), getattr(parts, name))
    mixed = Correction.of_parts(stats, np.array([True, False, True]), np.array([False, True, False]))
    np.testing.assert_allclose(mixed.gain[:, 0], [1 / (1 + stats.k[0]), 1, 1 / (1 + stats.k[2])])
    assert not mixed.offset[[0, 2]].any()
    np.testing.assert_array_equal(mixed.offset[1], bias.offset[1])


def test_stats_of_corrected_predictions(rng: np.random.Generator) -> None:
    """`corrected` transforms the sums as if eq had been corrected before it was measured."""
    stats, pairs = _steps(rng)
    correction = Correction.from_stats(stats, "ptqd")
    direct = NoiseStats.pool(
        [NoiseStats.of_step(i, T, e, _apply(correction, i, eq)) for i, (e, eq) in enumerate(pairs)]
    )
    got = stats.corrected(correction)
    for name in ("count", "e", "d", "ee", "ed", "dd"):
        np.testing.assert_allclose(getattr(got, name), getattr(direct, name), rtol=1e-9, atol=1e-9)
    np.testing.assert_allclose(got.d, 0, atol=1e-9)  # no bias is left


def test_no_noise_and_no_signal(rng: np.random.Generator) -> None:
    e, _ = _pair(rng)
    clean = NoiseStats.of_step(0, 1, e, e)
    assert clean.k == 0 and clean.var == 0 and np.isinf(clean.snr) and not clean.bias.any()
    for mode in MODES:
        correction = Correction.from_stats(clean, mode)
        np.testing.assert_allclose(correction.gain, 1, atol=1e-12)
        np.testing.assert_allclose(correction.offset, 0, atol=1e-12)
    silent = NoiseStats.of_step(0, 1, np.zeros((2, 1, 3, 3)), np.ones((2, 1, 3, 3)))
    ptqd = Correction.from_stats(silent, "ptqd")
    assert silent.k == 0 and ptqd.gain == 1 and ptqd.offset == -1 and ptqd.var == 0
    identity = Correction.identity(2, 3)
    assert np.all(identity.gain == 1) and not identity.offset.any() and not identity.var.any()


def test_jackknife_matches_the_spread_of_repetitions() -> None:
    rng = np.random.default_rng(11)
    sets = [[NoiseStats.of_step(0, 1, *_pair(rng, 1, 0.2, 0.1, 0.3)) for _ in range(24)] for _ in range(80)]
    runs = [{name: jackknife(attrgetter(name), parts) for name in ("k", "bias", "var")} for parts in sets]
    for name in ("k", "bias", "var"):
        spread = np.std([np.atleast_1d(run[name][0]) for run in runs], 0, ddof=1).mean()
        told = np.mean([np.atleast_1d(run[name][1]) for run in runs])
        assert 0.8 < told / spread < 1.25, name


def test_one_correction_after_another(rng: np.random.Generator) -> None:
    """What `after` gives undoes the folded one and applies its own: to numbers."""
    one, two = (
        Correction(rng.uniform(0.5, 2, (3, 2)), rng.standard_normal((3, 2)), rng.random(3)) for _ in range(2)
    )
    eq = rng.standard_normal((3, 2))
    folded = one.gain * eq + one.offset
    after = two.after(one)
    np.testing.assert_allclose(after.gain * folded + after.offset, two.gain * eq + two.offset)
    np.testing.assert_array_equal(after.var, two.var)
    same = one.after(one)
    np.testing.assert_allclose(same.gain, 1)
    np.testing.assert_allclose(same.offset, 0, atol=1e-12)
