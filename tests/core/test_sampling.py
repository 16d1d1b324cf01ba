"""Sampling: rows, feeds and guidance of an engine call, and the sampler over engines made of numpy."""

from __future__ import annotations

import math
import re

import numpy as np
import pytest

from ptqd_export.core.engine import EPSILON, SAMPLE, STEP, TIMESTEP, Array, FakeEngine, Feeds
from ptqd_export.core.model import InputSpec, ModelInfo
from ptqd_export.core.sampling import NoiseSource, Sampling, State
from ptqd_export.core.schedule import NoiseSchedule
from ptqd_export.errors import ModelError, RecipeError

PLAIN = ModelInfo("plain", (2, 4, 4), (), "")


def _labelled(feeds: Feeds) -> Array:
    """Elementwise, non-linear, and different for each label, time and step."""
    x, t, y = (
        feeds[SAMPLE],
        feeds[TIMESTEP][:, None, None, None] / 1000,
        feeds["class_labels"][:, None, None, None],
    )
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
def test_guided_step_is_guidance_on_two_single_calls(
    class_info: ModelInfo, schedule: NoiseSchedule, rng: np.random.Generator, scale: float
) -> None:
    engine = FakeEngine(_labelled)
    x = rng.standard_normal((3, 1, 4, 4))
    conditions = class_info.conditions([0, 1, 2], 3)
    guided = Sampling(class_info, schedule, scale).predict(engine, x, 4, conditions)
    assert engine.calls == 1
    single = {SAMPLE: x.astype(np.float32), TIMESTEP: np.full(3, schedule.timesteps[4]), STEP: np.array([4])}
    e_cond = engine({**single, **conditions})[EPSILON].astype(np.float64)
    e_null = engine({**single, **class_info.null_conditions(3)})[EPSILON].astype(np.float64)
    np.testing.assert_array_equal(guided, e_null + scale * (e_cond - e_null))
    assert np.abs(guided - e_cond).max() > 0.1


@pytest.mark.parametrize(("scale", "label"), [(1.0, 2), (0.0, 3)])
def test_scales_one_and_zero_need_one_branch(
    class_info: ModelInfo, schedule: NoiseSchedule, scale: float, label: int
) -> None:
    seen: list[Feeds] = []

    def run(feeds: Feeds) -> Array:
        seen.append(feeds)
        return feeds[SAMPLE]

    sampling = Sampling(class_info, schedule, scale)
    sampling.predict(FakeEngine(run), np.zeros((2, 1, 4, 4)), 0, class_info.conditions([2, 2], 2))
    assert seen[0]["class_labels"].tolist() == [label, label]
    assert (
        seen[0][SAMPLE].dtype == np.float32
        and seen[0][TIMESTEP].dtype == np.int64
        and seen[0][STEP].shape == (1,)
    )


@pytest.mark.parametrize("batch", [1, 7, 16])
def test_sample_i_is_the_same_at_every_batch_size(
    class_info: ModelInfo, schedule: NoiseSchedule, batch: int
) -> None:
    def run(indices: range) -> np.ndarray:
        labels = [i % 3 for i in indices]
        engine = FakeEngine(_labelled)
        conditions = class_info.conditions(labels, len(labels))
        return Sampling(class_info, schedule, 2.0).sample(lambda _: engine, conditions, indices, seed=3)

    whole = run(range(16))
    parts = np.concatenate([run(range(i, min(i + batch, 16))) for i in range(0, 16, batch)])
    np.testing.assert_array_equal(parts, whole)
    assert len(np.unique(whole.reshape(16, -1), axis=0)) == 16


def test_engines_follow_the_steps_and_on_step_sees_them(schedule: NoiseSchedule) -> None:
    engines = [FakeEngine(lambda f, i=i: np.full_like(f[SAMPLE], i)) for i in range(2)]  # type: ignore[misc]
    seen: list[tuple[int, float]] = []
    Sampling(PLAIN, schedule).sample(
        lambda i: engines[i >= 4], {}, [0], seed=0, on_step=lambda i, x, e: seen.append((i, float(e.flat[0])))
    )
    assert seen == [(i, float(i >= 4)) for i in range(10)]
    assert [e.calls for e in engines] == [4, 6]


TEXT = ModelInfo(
    "text", (2, 4, 4), (InputSpec("text", "float32", (3,)), InputSpec("more", "float32", ())), ""
)


@pytest.mark.parametrize(
    ("scale", "branches", "guided"), [(1.0, 1, False), (0.0, 1, False), (0.5, 2, True), (7.5, 2, True)]
)
def test_rows_of_a_sample(
    class_info: ModelInfo, schedule: NoiseSchedule, scale: float, branches: int, guided: bool
) -> None:
    sampling = Sampling(class_info, schedule, scale)
    assert (sampling.branches, sampling.guided, len(sampling)) == (branches, guided, len(schedule))
    x = np.arange(6.0).reshape(2, 3)
    assert sampling.rows(x).tolist() == x.tolist() * branches
    labels = sampling.condition_rows(class_info.conditions([2, 1], 2), 2)["class_labels"].tolist()
    assert labels == {0.0: [3, 3], 1.0: [2, 1]}.get(scale, [3, 3, 2, 1])


@pytest.mark.parametrize("scale", [0.3, 3.0])
def test_guide_is_the_formula(
    class_info: ModelInfo, schedule: NoiseSchedule, rng: np.random.Generator, scale: float
) -> None:
    """Classifier-free guidance of rows without the condition, then rows with it, in float64."""
    null, conditional = rng.standard_normal((2, 3, 1, 4, 4)).astype(np.float32)
    guided = Sampling(class_info, schedule, scale).guide(np.concatenate([null, conditional]), null, 0)
    wanted = null.astype(np.float64) + scale * (conditional.astype(np.float64) - null.astype(np.float64))
    assert guided.dtype == np.float64 and guided.shape == null.shape
    np.testing.assert_array_equal(guided, wanted)
    # The test can fail: the halves in the other order are another prediction.
    swapped = Sampling(class_info, schedule, scale).guide(np.concatenate([conditional, null]), null, 0)
    assert np.abs(swapped - wanted).max() > 0.1


@pytest.mark.parametrize("scale", [0.0, 1.0])
def test_guide_leaves_a_single_branch_alone(
    class_info: ModelInfo, schedule: NoiseSchedule, rng: np.random.Generator, scale: float
) -> None:
    epsilon = rng.standard_normal((3, 1, 4, 4)).astype(np.float32)
    guided = Sampling(class_info, schedule, scale).guide(epsilon, epsilon, 0)
    assert guided.dtype == np.float64
    np.testing.assert_array_equal(guided, epsilon)


@pytest.mark.parametrize("scale", [0.0, 1.0, 2.0])
def test_feeds_of_one_call(
    class_info: ModelInfo, schedule: NoiseSchedule, rng: np.random.Generator, scale: float
) -> None:
    sampling = Sampling(class_info, schedule, scale)
    x = rng.standard_normal((1, 4, 4, 3)).transpose(3, 0, 1, 2)  # not contiguous
    feeds = sampling.feeds(x, 4, class_info.conditions([0, 1, 2], 3))
    n = 3 * sampling.branches
    assert {name: (a.dtype.name, a.shape) for name, a in feeds.items()} == {
        SAMPLE: ("float32", (n, 1, 4, 4)),
        TIMESTEP: ("int64", (n,)),
        STEP: ("int64", (1,)),
        "class_labels": ("int64", (n,)),
    }
    assert feeds[STEP].tolist() == [4] and set(feeds[TIMESTEP]) == {schedule.timesteps[4]}
    assert feeds[TIMESTEP][0] != sampling.feeds(x, 5, class_info.conditions(None, 3))[TIMESTEP][0]
    for half in np.split(feeds[SAMPLE], sampling.branches):
        np.testing.assert_array_equal(half, x.astype(np.float32))
    assert feeds[SAMPLE].flags.c_contiguous


def test_null_of_tensor_conditions_is_zero(schedule: NoiseSchedule, rng: np.random.Generator) -> None:
    given = {
        "text": rng.standard_normal((2, 3)).astype(np.float32),
        "more": rng.standard_normal(2).astype(np.float32),
    }
    rows = Sampling(TEXT, schedule, 2.0).condition_rows(given, 2)
    assert list(rows) == ["text", "more"]
    for name, value in given.items():
        assert rows[name].dtype == np.float32
        np.testing.assert_array_equal(rows[name], np.concatenate([np.zeros_like(value), value]))
    single = Sampling(TEXT, schedule, 0.0).condition_rows(given, 2)
    assert not single["text"].any() and single["text"].shape == (2, 3)


@pytest.mark.parametrize("scale", [0.0, 1.0, 2.0])
def test_predict_singly_is_predict(
    class_info: ModelInfo, schedule: NoiseSchedule, rng: np.random.Generator, scale: float
) -> None:
    """By calls of one sample each, which is `branches` rows; every sample keeps its own condition."""
    rows: list[int] = []

    def run(feeds: Feeds) -> Array:
        rows.append(len(feeds[SAMPLE]))
        return _labelled(feeds)

    sampling, engine = Sampling(class_info, schedule, scale), FakeEngine(run)
    x, conditions = rng.standard_normal((3, 1, 4, 4)), class_info.conditions([2, 0, 1], 3)
    singly = sampling.predict_singly(engine, x, 4, conditions)
    assert rows == [sampling.branches] * 3
    np.testing.assert_array_equal(singly, sampling.predict(engine, x, 4, conditions))
    other = sampling.predict_singly(engine, x, 4, class_info.conditions([2, 1, 1], 3))
    assert np.array_equal(singly, other) == (scale == 0.0)  # the test can fail: another label is seen
    assert np.array_equal(singly[[0, 2]], other[[0, 2]])


def test_advance_is_deterministic_where_no_noise_is_given(
    class_info: ModelInfo, schedule: NoiseSchedule, rng: np.random.Generator
) -> None:
    sampling = Sampling(class_info, schedule)
    x, e, noise = rng.standard_normal((3, 2, 1, 4, 4))
    still = sampling.advance(State(x), e, 3, 0.5, None).x
    other = sampling.advance(State(x), e, 3, 7.0, None).x
    np.testing.assert_array_equal(still, other)  # sigma' is of the noise alone
    np.testing.assert_allclose(
        sampling.advance(State(x), e, 3, 0.5, noise).x, still + 0.5 * noise, rtol=1e-12
    )


def test_sampling_of_a_scheduler_config(class_info: ModelInfo) -> None:
    sampling = Sampling.of(
        class_info, {"clip_sample": True}, n_steps=7, eta=1.0, guidance_scale=2.0, solver="ddpm"
    )
    wanted = NoiseSchedule.from_config({"clip_sample": True}, 7, 1.0, "ddpm")
    assert sampling.schedule.to_plain() == wanted.to_plain()
    assert (sampling.guidance_scale, sampling.solver, sampling.model) == (2.0, "ddpm", class_info)
    default = Sampling.of(class_info, {}, n_steps=7)
    assert (default.guidance_scale, default.solver, default.schedule.eta) == (1.0, "ddim", 0.0)
    with pytest.raises(RecipeError, match="n_steps is 0"):
        Sampling.of(class_info, {}, n_steps=0)
    with pytest.raises(ModelError, match="use_lu_lambdas"):
        Sampling.of(class_info, {"use_lu_lambdas": True}, n_steps=7)
    for scale in (-1.0, 1001.0, -1e308, math.nan):
        with pytest.raises(RecipeError, match=f"guidance_scale is {re.escape(str(scale))}: give a value"):
            Sampling.of(class_info, {}, n_steps=7, guidance_scale=scale)
    with pytest.raises(RecipeError, match="guidance_rescale is 2"):
        Sampling.of(class_info, {}, n_steps=7, guidance_rescale=2.0)


@pytest.mark.parametrize(
    ("info", "message"),
    [
        (PLAIN, "guidance_scale is 2.0, but plain takes no condition: set it to 1"),
        (
            ModelInfo("labels", (1, 4, 4), (InputSpec("y", num_classes=4),), ""),
            "guidance_scale is 2.0, but labels has no null class: set model.null_class in the recipe",
        ),
    ],
)
def test_guidance_that_the_model_cannot_do_is_refused(
    schedule: NoiseSchedule, info: ModelInfo, message: str
) -> None:
    assert Sampling(info, schedule).branches == 1
    with pytest.raises(RecipeError, match=message):
        Sampling(info, schedule, 2.0)
    with pytest.raises(RecipeError, match=message):
        Sampling.of(info, {}, n_steps=7, guidance_scale=2.0)
    with pytest.raises(RecipeError, match=r"guidance_scale is 0\.0"):
        Sampling(info, schedule, 0.0)
    assert Sampling(TEXT, schedule, 2.0).guided  # zeros stand for no tensor
