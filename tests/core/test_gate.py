"""The gate keeps a correction of nothing no more often than its level says, and keeps what is there."""

from __future__ import annotations

import numpy as np
import pytest

from ptqd_export.core.gate import LEVEL, Gated, gate, t_quantile
from ptqd_export.core.noise import Correction, NoiseStats

N, PIXELS = 12, 60
PARTS = {"nothing": (0.0, 0.0), "bias": (0.0, 0.1), "k": (-0.1, 0.0), "both": (0.1, -0.1)}
"""k and mu of a step that should keep the part of that name."""


def trajectories(
    rng: np.random.Generator,
    k: np.ndarray,
    mu: np.ndarray,
    n: int = N,
    spread: float = 0.02,
) -> list[NoiseStats]:
    """Sums of n trajectories with D = k e + mu + white noise, k (T,) and mu (T, C).

    Each trajectory has a k and a mu of its own besides, of mean 0 and of this spread, as real ones have.
    """
    e = rng.standard_normal((n, *mu.shape, PIXELS)) + 0.3
    own_k, own_mu = spread * rng.standard_normal((2, n, *mu.shape))
    d = (k[:, None] + own_k)[..., None] * e + (mu + own_mu)[..., None] + 0.05 * rng.standard_normal(e.shape)
    count = np.full(len(k), float(PIXELS))
    sums = [v.sum(3) for v in (e, d, e * e, e * d, d * d)]
    return [NoiseStats(count, *(v[i] for v in sums)) for i in range(n)]


def of_parts(rng: np.random.Generator, mode: str = "ptqd", **how: object) -> Gated:
    """Steps that should keep each of PARTS, with two channels of equal mu."""
    k, mu = (np.array(column) for column in zip(*PARTS.values(), strict=True))
    return gate(trajectories(rng, k, np.repeat(mu[:, None], 2, 1), 32), mode, **how)  # type: ignore[arg-type]


@pytest.mark.parametrize("mode", ["ptqd", "affine"])
def test_a_correction_of_nothing_is_kept_at_the_nominal_rate(mode: str) -> None:
    """Of builds with nothing to correct, LEVEL at most keep something anywhere; at another level, another
    share."""
    rng, builds, t, c = np.random.default_rng(3), 150, 4, 2
    kept = {LEVEL: 0, 0.5: 0}
    for _ in range(builds):
        parts = trajectories(rng, np.zeros(t), np.zeros((t, c)))
        for level in kept:
            kept[level] += set(gate(parts, mode, level=level).kept) != {"nothing"}  # type: ignore[arg-type]
    assert kept[LEVEL] / builds < LEVEL + 4 * np.sqrt(LEVEL / builds)
    assert 0.25 < kept[0.5] / builds < 0.55  # 1 - (1 - 0.5 / 12)^12 = 0.4, were the tests independent


def test_each_step_keeps_what_is_there(rng: np.random.Generator) -> None:
    found = of_parts(rng)
    assert found.kept == tuple(PARTS)
    for i, (k, mu) in enumerate(PARTS.values()):
        np.testing.assert_allclose(found.correction.gain[i], 1 / (1 + k), atol=0.02)
        np.testing.assert_allclose(found.correction.offset[i], -mu / (1 + k), atol=0.02)
        assert (abs(found.z_k[i]) > found.limit) == (k != 0) == (found.correction.gain[i] != 1).all()
        assert (abs(found.z_bias[i]) > found.limit) == (mu != 0) == found.correction.offset[i].all()
        if k:
            assert np.sign(found.z_k[i]) == np.sign(k)
        if mu:
            assert np.sign(found.z_bias[i]) == np.sign(mu)
    assert found.limit == t_quantile(LEVEL / 12, 31)


def test_a_gain_that_amplifies_noise_is_kept(rng: np.random.Generator) -> None:
    """k < 0 under much noise: the gain raises the squared error of the step, and is right nevertheless."""
    e = rng.standard_normal((24, 1, 4000))
    eq = 0.8 * e + 2.0 * rng.standard_normal(e.shape)
    parts = [NoiseStats.of_step(0, 1, e[i : i + 1], eq[i : i + 1]) for i in range(24)]
    found, total = gate(parts, "ptqd"), NoiseStats.pool(parts)
    assert found.kept == ("k",)
    one, zero = np.ones((1, 1)), np.zeros((1, 1))
    assert total.mse(found.correction.gain, found.correction.offset) > total.mse(one, zero)


def test_modes(rng: np.random.Generator) -> None:
    assert of_parts(rng, "none").kept == ("nothing",) * 4
    assert of_parts(rng, "affine").kept == ("nothing", "affine", "affine", "affine")
    bias = of_parts(rng, "bias")  # without k the mean of D is 0.3 k + mu
    assert bias.kept == ("nothing", "bias", "bias", "bias") and (bias.correction.gain == 1).all()
    clamped = of_parts(rng, "ptqd", clamp_k=True)
    assert clamped.kept == ("nothing", "bias", "bias", "both")  # k < 0 counts as none


def test_without_a_gate_all_is_kept(rng: np.random.Generator) -> None:
    parts = trajectories(rng, np.zeros(3), np.zeros((3, 2)))
    total = NoiseStats.pool(parts)
    for mode, kept in (("none", "nothing"), ("bias", "bias"), ("ptqd", "both"), ("affine", "affine")):
        found = gate(parts, mode, level=None)  # type: ignore[arg-type]
        whole = Correction.from_stats(total, mode)  # type: ignore[arg-type]
        assert found.kept == (kept,) * 3 and found.limit == 0
        for name in ("gain", "offset", "var"):
            np.testing.assert_array_equal(getattr(found.correction, name), getattr(whole, name))


def test_no_noise_and_no_spread(rng: np.random.Generator) -> None:
    """No noise keeps nothing; noise that is the same in every trajectory is no accident."""
    e = rng.standard_normal((1, 2, 9))
    for eq, kept in ((e, "nothing"), (1.25 * e, "k")):
        found = gate([NoiseStats.of_step(0, 1, e, eq)] * 4, "ptqd")
        assert found.kept == (kept,) and np.isfinite([found.z_k, found.z_bias]).all()


def test_two_trajectories_tell_little(rng: np.random.Generator) -> None:
    k, mu = np.full(2, 0.05), np.full((2, 1), 0.05)
    assert set(gate(trajectories(rng, k, mu, 2), "ptqd").kept) == {"nothing"}
    assert set(gate(trajectories(rng, k, mu, 40), "ptqd").kept) == {"both"}


@pytest.mark.parametrize("dof", [1, 2, 3, 8, 31, 400])
@pytest.mark.parametrize("p", [0.5, 0.05, 1e-4])
def test_quantiles_of_students_t(dof: int, p: float) -> None:
    from scipy.stats import t

    assert t_quantile(p, dof) == pytest.approx(t.ppf(1 - p / 2, dof), rel=1e-6)
