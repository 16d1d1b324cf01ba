"""Variance recalibration (PTQD eq. 12) in the sampler, on Gaussian data whose every marginal is known."""

from __future__ import annotations

import typing

import numpy as np
import pytest

from ptqd_export.core.engine import SAMPLE, STEP, Array, FakeEngine, Feeds
from ptqd_export.core.model import ModelInfo
from ptqd_export.core.noise import Correction, Mode, NoiseStats
from ptqd_export.core.sampling import NoiseSource, Sampling, State
from ptqd_export.core.schedule import NoiseSchedule

PLAIN = ModelInfo("plain", (2, 4, 4), (), "")


def test_recalibration_keeps_the_noise_stream(schedule: NoiseSchedule) -> None:
    """sigma' = 0 at one step must not shift what later steps draw."""
    engine = FakeEngine(lambda f: np.zeros_like(f[SAMPLE]))
    sigmas = schedule.sigmas.copy()
    sigmas[3] = 0
    sampling = Sampling(PLAIN, schedule)
    a = sampling.sample(lambda _: engine, {}, [0], seed=0)
    b = sampling.sample(lambda _: engine, {}, [0], seed=0, sigmas=sigmas)
    source = NoiseSource(0, [0], (2, 4, 4))
    z3 = [source.draw() for _ in range(5)][4]  # x_T, then steps 0 to 3
    scale = schedule.sigmas[3] / np.sqrt(
        schedule.alphas_cumprod_prev[3]
    )  # with e = 0 every later step multiplies by sqrt(abar_prev / abar)
    np.testing.assert_allclose(a - b, scale * z3, rtol=1e-9, atol=1e-9)


DATA_VAR = 0.25
N, PIXELS = 3000, 32


def _gaussian_engine(schedule: NoiseSchedule, var: np.ndarray | None, seed: int) -> FakeEngine:
    """The exact E[e | x_t] of Gaussian data, plus white noise of variance var[i]: a residual quantization
    noise that is known."""
    rng = np.random.default_rng(seed)

    def run(feeds: Feeds) -> Array:
        i, x = int(feeds[STEP][0]), feeds[SAMPLE]
        a = schedule.alphas_cumprod[i]
        e = np.sqrt(1 - a) / (a * DATA_VAR + 1 - a) * x
        return np.asarray(e if var is None else e + np.sqrt(var[i]) * rng.standard_normal(x.shape))

    return FakeEngine(run)


def _marginals(schedule: NoiseSchedule, var: np.ndarray | None, sigmas: np.ndarray | None) -> np.ndarray:
    """Var(x_t) entering each step, and of x_0: (T + 1,)."""
    out: list[float] = []
    engine = _gaussian_engine(schedule, var, 1)
    x = Sampling(PLAIN, schedule).sample(
        lambda _: engine,
        {},
        range(N),
        seed=0,
        sigmas=sigmas,
        on_step=lambda i, x, e: out.append(float(x.var())),
    )
    return np.array([*out, x.var()])


def _official_marginals(schedule: NoiseSchedule, var: np.ndarray, sigmas: np.ndarray) -> np.ndarray:
    """The official code's update: the reduced sigma stands in the direction term as well."""
    engine, source = _gaussian_engine(schedule, var, 1), NoiseSource(0, range(N), PLAIN.sample_shape)
    x, out = source.draw(), []
    for i in range(len(schedule)):
        out.append(float(x.var()))
        e = Sampling(PLAIN, schedule).predict(engine, x, i, {})
        a, p = schedule.alphas_cumprod[i], schedule.alphas_cumprod_prev[i]
        x = np.sqrt(p) * (x - np.sqrt(1 - a) * e) / np.sqrt(a) + np.sqrt(max(0.0, 1 - p - sigmas[i] ** 2)) * e
        x = x + sigmas[i] * source.draw() if schedule.sigmas[i] > 0 else x
    return np.array([*out, x.var()])


def test_recalibrated_variance_absorbs_the_residual(schedule: NoiseSchedule) -> None:
    """PTQD eq. 12: white noise of known variance on epsilon, half of sigma^2 / c^2; with sigma' every
    marginal is the noise-free one."""
    var = 0.5 * schedule.sigmas**2 / schedule.epsilon_gains**2
    sigmas = schedule.recalibrated_sigmas(var)
    np.testing.assert_allclose(sigmas**2, 0.5 * schedule.sigmas**2, atol=1e-15)
    tolerance = 6 * np.sqrt(2 / (N * PIXELS))  # six standard errors of a variance, relative
    clean = _marginals(schedule, None, None)
    absorbed = _marginals(schedule, var, sigmas) / clean - 1
    assert np.abs(absorbed).max() < tolerance
    assert (_marginals(schedule, var, None) / clean - 1).max() > 5 * tolerance  # nothing taken off
    assert np.abs(_official_marginals(schedule, var, sigmas) / clean - 1).max() > 5 * tolerance


MODES: tuple[Mode, ...] = typing.get_args(Mode)


@pytest.mark.parametrize("k", [-0.4, 0.3])
@pytest.mark.parametrize("mode", MODES)
def test_what_is_random_is_absorbed_whatever_the_correction(
    schedule: NoiseSchedule, mode: Mode, k: float
) -> None:
    """One step on Gaussian data, with D = k e + mu + white noise: about its mean at each x_t, x_prev has the
    variance of the full-precision step, sigma^2; where ec is right in the mean, also that over all x_t. The
    variance of ec - e, taken off instead, is too much for all but `ptqd`."""
    i, n, rng = 4, 400_000, np.random.default_rng(7)
    a = schedule.alphas_cumprod[i]
    x = np.sqrt(a * DATA_VAR + 1 - a) * rng.standard_normal((n, 1, 1, 1))
    e = np.sqrt(1 - a) / (a * DATA_VAR + 1 - a) * x
    white = 0.6 * schedule.sigmas[i] / -schedule.epsilon_gains[i] * (1 + k)
    eq = (1 + k) * e + 0.2 + white * rng.standard_normal(x.shape)
    stats = NoiseStats.of_step(i, len(schedule), e, eq)
    correction = Correction.from_stats(stats, mode)
    ec = correction.gain[i, 0] * eq + correction.offset[i, 0]
    sampling, z = Sampling(PLAIN, schedule), rng.standard_normal(x.shape)

    def about_the_mean(epsilon: np.ndarray, var: float) -> tuple[float, float]:
        """Variance of x_prev about its linear dependence on x_t, over sigma^2; variance of x_prev."""
        sigma = schedule.recalibrated_sigmas(np.full(len(schedule), var))[i]
        after = sampling.advance(State(x), epsilon, i, float(sigma), z).x.ravel()
        left = after - np.polyval(np.polyfit(x.ravel(), after, 1), x.ravel())
        return float(left.var() / schedule.sigmas[i] ** 2), float(after.var())

    tolerance = 6 * np.sqrt(2 / n)
    full, new = about_the_mean(e, 0.0), about_the_mean(ec, float(correction.var[i]))
    assert abs(full[0] - 1) < tolerance and abs(new[0] - 1) < tolerance
    assert abs(about_the_mean(ec, 0.0)[0] - 1) > 5 * tolerance
    off = about_the_mean(ec, float(np.var(ec - e)))[0] - 1
    if mode == "ptqd":
        assert abs(new[1] / full[1] - 1) < tolerance and abs(off) < tolerance
    else:
        assert off < -3 * tolerance
