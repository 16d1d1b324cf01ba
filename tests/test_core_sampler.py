"""The sampler over engines made of numpy."""

from __future__ import annotations

import numpy as np
import pytest

from ptqd_export.conditioning import ModelInfo
from ptqd_export.engine import EPSILON, SAMPLE, STEP, TIMESTEP, Array, FakeEngine, Feeds
from ptqd_export.noise import Correction
from ptqd_export.sampler import NoiseSource, predict_epsilon, sample
from ptqd_export.schedule import NoiseSchedule

PLAIN = ModelInfo("plain", (2, 4, 4), (), "")


def _labelled(feeds: Feeds) -> Array:
    """Elementwise, non-linear, and different for each label, time and step."""
    x, t, y = feeds[SAMPLE], feeds[TIMESTEP][:, None, None, None] / 1000, feeds["class_labels"][:, None, None, None]
    return np.asarray(np.tanh(x * (1 + t) - 0.3 * y) + 0.01 * feeds[STEP][0], np.float32)


def test_noise_source_depends_on_seed_and_index_alone() -> None:
    a, b = NoiseSource(7, range(5), (2, 3)), NoiseSource(7, [3, 1], (2, 3))
    for _ in range(3):
        wide, narrow = a.draw(), b.draw()
        assert wide.dtype == np.float64
        np.testing.assert_array_equal(narrow, wide[[3, 1]])
    assert not np.array_equal(NoiseSource(8, [0], (9,)).draw(), NoiseSource(7, [0], (9,)).draw())


def test_noise_source_is_standard_normal_and_independent() -> None:
    x = NoiseSource(0, range(400), (500,)).draw()
    assert abs(x.mean()) < 5 / np.sqrt(x.size) and abs(x.var() - 1) < 5 * np.sqrt(2 / x.size)
    assert abs(np.mean(x[:-1] * x[1:])) < 5 / np.sqrt(x.size)  # neighbouring indices
    y = NoiseSource(1, range(400), (500,)).draw()
    assert abs(np.mean(x * y)) < 5 / np.sqrt(x.size)  # neighbouring seeds


@pytest.mark.parametrize("scale", [0.5, 3.0])
def test_guided_step_is_guidance_on_two_single_calls(class_info: ModelInfo, schedule: NoiseSchedule, rng: np.random.Generator, scale: float) -> None:
    engine = FakeEngine(_labelled)
    x = rng.standard_normal((3, 1, 4, 4))
    conditions = class_info.conditions([0, 1, 2], 3)
    guided = predict_epsilon(engine, x, 4, schedule, class_info, conditions, scale)
    assert engine.calls == 1
    single = {SAMPLE: x.astype(np.float32), TIMESTEP: np.full(3, schedule.timesteps[4]), STEP: np.array([4])}
    e_cond = engine({**single, **conditions})[EPSILON].astype(np.float64)
    e_null = engine({**single, **class_info.null_conditions(3)})[EPSILON].astype(np.float64)
    np.testing.assert_array_equal(guided, e_null + scale * (e_cond - e_null))
    assert np.abs(guided - e_cond).max() > 0.1


@pytest.mark.parametrize(("scale", "label"), [(1.0, 2), (0.0, 3)])
def test_scales_one_and_zero_need_one_branch(class_info: ModelInfo, schedule: NoiseSchedule, scale: float, label: int) -> None:
    seen: list[Feeds] = []

    def run(feeds: Feeds) -> Array:
        seen.append(feeds)
        return feeds[SAMPLE]

    predict_epsilon(FakeEngine(run), np.zeros((2, 1, 4, 4)), 0, schedule, class_info, class_info.conditions([2, 2], 2), scale)
    assert seen[0]["class_labels"].tolist() == [label, label]
    assert seen[0][SAMPLE].dtype == np.float32 and seen[0][TIMESTEP].dtype == np.int64 and seen[0][STEP].shape == (1,)


@pytest.mark.parametrize("batch", [1, 7, 16])
def test_sample_i_is_the_same_at_every_batch_size(class_info: ModelInfo, schedule: NoiseSchedule, batch: int) -> None:
    def run(indices: range) -> np.ndarray:
        labels = [i % 3 for i in indices]
        engine = FakeEngine(_labelled)
        conditions = class_info.conditions(labels, len(labels))
        return sample(lambda _: engine, schedule, class_info, conditions, indices, seed=3, guidance_scale=2.0)

    whole = run(range(16))
    parts = np.concatenate([run(range(i, min(i + batch, 16))) for i in range(0, 16, batch)])
    np.testing.assert_array_equal(parts, whole)
    assert len(np.unique(whole.reshape(16, -1), axis=0)) == 16


def test_correction_in_the_sampler_equals_a_corrected_engine(schedule: NoiseSchedule, rng: np.random.Generator) -> None:
    gain, offset = 1 + 0.1 * rng.standard_normal((10, 2)), 0.1 * rng.standard_normal((10, 2))
    plain = FakeEngine(lambda f: np.tanh(f[SAMPLE].astype(np.float64)))
    folded = FakeEngine(lambda f: gain[f[STEP][0]][:, None, None] * np.tanh(f[SAMPLE].astype(np.float64)) + offset[f[STEP][0]][:, None, None])
    a = sample(lambda _: plain, schedule, PLAIN, {}, range(3), seed=0, guidance_scale=1.0, correction=Correction(gain, offset, np.zeros(10)))
    b = sample(lambda _: folded, schedule, PLAIN, {}, range(3), seed=0, guidance_scale=1.0)
    np.testing.assert_allclose(a, b, rtol=1e-12, atol=1e-12)


def test_engines_follow_the_steps_and_on_step_sees_them(schedule: NoiseSchedule) -> None:
    engines = [FakeEngine(lambda f, i=i: np.full_like(f[SAMPLE], i)) for i in range(2)]  # type: ignore[misc]
    seen: list[tuple[int, float]] = []
    sample(
        lambda i: engines[i >= 4], schedule, PLAIN, {}, [0], seed=0, guidance_scale=1.0, on_step=lambda i, x, e: seen.append((i, float(e.flat[0])))
    )
    assert seen == [(i, float(i >= 4)) for i in range(10)]
    assert [e.calls for e in engines] == [4, 6]


def test_recalibration_keeps_the_noise_stream(schedule: NoiseSchedule) -> None:
    """sigma' = 0 at one step must not shift what later steps draw."""
    engine = FakeEngine(lambda f: np.zeros_like(f[SAMPLE]))
    sigmas = schedule.sigmas.copy()
    sigmas[3] = 0
    a = sample(lambda _: engine, schedule, PLAIN, {}, [0], seed=0, guidance_scale=1.0)
    b = sample(lambda _: engine, schedule, PLAIN, {}, [0], seed=0, guidance_scale=1.0, sigmas=sigmas)
    source = NoiseSource(0, [0], (2, 4, 4))
    z3 = [source.draw() for _ in range(5)][4]  # x_T, then steps 0 to 3
    scale = schedule.sigmas[3] / np.sqrt(schedule.alphas_cumprod_prev[3])  # with e = 0 every later step multiplies by sqrt(abar_prev / abar)
    np.testing.assert_allclose(a - b, scale * z3, rtol=1e-9, atol=1e-9)


DATA_VAR = 0.25
N, PIXELS = 3000, 32


def _gaussian_engine(schedule: NoiseSchedule, var: np.ndarray | None, seed: int) -> FakeEngine:
    """The exact E[e | x_t] of Gaussian data, plus white noise of variance var[i]: a residual quantization noise that is known."""
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
    x = sample(
        lambda _: engine,
        schedule,
        PLAIN,
        {},
        range(N),
        seed=0,
        guidance_scale=1.0,
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
        e = predict_epsilon(engine, x, i, schedule, PLAIN, {}, 1.0)
        a, p = schedule.alphas_cumprod[i], schedule.alphas_cumprod_prev[i]
        x = np.sqrt(p) * (x - np.sqrt(1 - a) * e) / np.sqrt(a) + np.sqrt(max(0.0, 1 - p - sigmas[i] ** 2)) * e
        x = x + sigmas[i] * source.draw() if schedule.sigmas[i] > 0 else x
    return np.array([*out, x.var()])


def test_recalibrated_variance_absorbs_the_residual(schedule: NoiseSchedule) -> None:
    """PTQD eq. 12: white noise of known variance on epsilon, half of sigma^2 / c^2; with sigma' every marginal is the noise-free one."""
    var = 0.5 * schedule.sigmas**2 / schedule.epsilon_gains**2
    sigmas = schedule.recalibrated_sigmas(var)
    np.testing.assert_allclose(sigmas**2, 0.5 * schedule.sigmas**2, atol=1e-15)
    tolerance = 6 * np.sqrt(2 / (N * PIXELS))  # six standard errors of a variance, relative
    clean = _marginals(schedule, None, None)
    absorbed = _marginals(schedule, var, sigmas) / clean - 1
    assert np.abs(absorbed).max() < tolerance
    assert (_marginals(schedule, var, None) / clean - 1).max() > 5 * tolerance  # nothing taken off
    assert np.abs(_official_marginals(schedule, var, sigmas) / clean - 1).max() > 5 * tolerance
