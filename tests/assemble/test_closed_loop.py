"""Held-out trajectories sampled again: with full precision nothing changes, and a group's noise shows."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from ptqd_export.assemble.closed_loop import ClosedLoop, End, held_out, measure_sensitivity
from ptqd_export.calibrate import Batch
from ptqd_export.calibrate.trajectories import CALIBRATION_STREAM
from ptqd_export.core.engine import EPSILON, SAMPLE, FakeEngine
from ptqd_export.core.model import ModelInfo
from ptqd_export.core.plan import Plan, fixed
from ptqd_export.core.precision import FP32, Precision
from ptqd_export.core.sampling import Sampling
from ptqd_export.core.schedule import NoiseSchedule

W8A8, W4A8 = Precision(8, 8), Precision(4, 8)
SEED, STEPS = 3, 6


def network(error: float) -> FakeEngine:
    """Predicts a linear function of x, wrong by a constant pattern."""

    def predict(feeds: dict[str, np.ndarray]) -> np.ndarray:
        x = feeds[SAMPLE]
        pattern = np.where(np.indices(x.shape).sum(0) % 2 == 0, 1.0, -1.0)
        return (0.6 * x + error * pattern).astype(np.float32)

    return FakeEngine(predict, ("sample", "timestep", "class_labels"))


def trajectories(sampling: Sampling, indices: range) -> Batch:
    """Sampled as calibration does."""
    x, e = [], []

    def on_step(step: int, state: np.ndarray, epsilon: np.ndarray) -> None:
        x.append(state.astype(np.float32))
        e.append(epsilon.astype(np.float32))

    conditions = sampling.model.conditions(sampling.model.labels_in_turn(indices), len(indices))
    streams = [CALIBRATION_STREAM + i for i in indices]
    sampling.sample(lambda step: network(0.0), conditions, streams, seed=SEED, on_step=on_step)
    return Batch(indices, np.stack(x), np.stack(e), conditions)


@pytest.fixture(params=[0.0, 1.0], ids=["eta 0", "eta 1"])
def loop(request: pytest.FixtureRequest, class_info: ModelInfo) -> ClosedLoop:
    schedule = NoiseSchedule.from_config({"clip_sample": False}, STEPS, request.param)
    sampling = Sampling(class_info, schedule, 2.0)
    batches = [trajectories(sampling, range(4, 7)), trajectories(sampling, range(7, 8))]
    engines = {FP32: network(0.0), W8A8: network(0.01), W4A8: network(0.1)}
    return ClosedLoop(sampling, batches, SEED, engines, lambda plan: schedule.sigmas)


@pytest.mark.parametrize("first", [0, 2, STEPS - 1])
def test_full_precision_ends_where_it_ended(loop: ClosedLoop, first: int) -> None:
    """Only the rounding of what is kept of trajectories is between them; the same noise is drawn again."""
    end = loop.end(fixed(["fp32"], STEPS), first)
    assert end.paired.shape == (4,) and end.paired.max() < 1e-10 and end.distribution < 1e-5  # a root
    assert loop.evaluations == 4 * (STEPS - first)


def test_another_seed_ends_elsewhere(loop: ClosedLoop) -> None:
    """The test above can fail, where noise is injected."""
    loop.seed += 1
    moved = loop.end(fixed(["fp32"], STEPS)).paired.min() > 1e-6
    assert moved == bool(loop.sampling.schedule.sigmas.any())


def test_ten_times_the_error_ends_a_hundred_times_as_far(loop: ClosedLoop) -> None:
    near, far = (loop.end(Plan((p,) * 2 + (FP32,) * 4)) for p in (W8A8, W4A8))
    assert far.error == pytest.approx(100 * near.error, rel=1e-2)
    assert far.distribution > near.distribution > 0


def test_only_the_steps_from_the_first_one_on_are_sampled(loop: ClosedLoop) -> None:
    """What is before comes from the trajectories: a plan's own steps there would not be seen."""
    plan = Plan((FP32, FP32, FP32, W4A8, FP32, FP32))
    assert loop.end(plan, 3).error == pytest.approx(loop.end(plan).error, rel=1e-3)
    engines = {p: engine.calls for p, engine in loop.engines.items()}  # type: ignore[attr-defined]
    loop.end(plan, 3)
    after = {p: engine.calls for p, engine in loop.engines.items()}  # type: ignore[attr-defined]
    assert (after[W4A8] - engines[W4A8], after[FP32] - engines[FP32]) == (2, 4)


def test_sigma_prime_is_that_of_the_plan(loop: ClosedLoop) -> None:
    asked: list[Plan] = []
    quiet = np.zeros(STEPS)
    loop.sigmas = lambda plan: asked.append(plan) or quiet
    plan = fixed(["fp32"], STEPS)
    end = loop.end(plan)
    assert asked == [plan] * 2
    assert (end.error > 1e-6) == bool(loop.sampling.schedule.sigmas.any())


def test_sensitivity_is_measured_once_and_taken_up(loop: ClosedLoop, tmp_path: Path) -> None:
    keys = {W8A8: "a", W4A8: "b"}

    def measure() -> tuple[object, int]:
        before = loop.evaluations
        return measure_sensitivity(loop, [W8A8, W4A8], 3, tmp_path, keys), loop.evaluations - before

    found, evaluations = measure()
    assert found.groups == (2, 2, 2) and found.samples == 4  # type: ignore[attr-defined]
    # samples * precisions * steps * (groups + 1) / 2
    assert found.evaluations == evaluations == 4 * 2 * STEPS * (3 + 1) // 2  # type: ignore[attr-defined]
    for g in range(3):
        plan = Plan(tuple(W4A8 if step // 2 == g else FP32 for step in range(STEPS)))
        assert found.paired[W4A8][g] == pytest.approx(loop.end(plan).error, rel=1e-3)  # type: ignore
    assert measure() == (found, 0)
    files = sorted(tmp_path.iterdir())
    assert len(files) == 6
    files[0].write_text("[1.0]")
    files[1].unlink()
    again, evaluations = measure()
    assert again == found and 0 < evaluations < 40
    keys[W4A8] = "c"  # other engines
    assert measure()[1] == 4 * STEPS * (3 + 1) // 2
    loop.batches = loop.batches[:1]  # other samples
    assert measure()[1] == 3 * 2 * STEPS * (3 + 1) // 2


def test_a_kept_result_is_used(loop: ClosedLoop, tmp_path: Path) -> None:
    measure_sensitivity(loop, [W8A8], 1, tmp_path, {W8A8: "a"})
    (file,) = tmp_path.iterdir()
    file.write_text(json.dumps([7.0, 8.0]))
    found = measure_sensitivity(loop, [W8A8], 1, tmp_path, {W8A8: "a"})
    assert found.paired == {W8A8: (7.0,)} and found.distribution == {W8A8: (8.0,)}


def test_the_mean_of_errors_is_that_of_decibels() -> None:
    end = End(np.array([1e-4, 1e-4, 1e-2, 1e-6]), 0.0)
    assert end.error == pytest.approx(1e-4)
    assert end.standard_error == pytest.approx(np.log([1e-4, 1e-4, 1e-2, 1e-6]).std(ddof=1) / 2)
    assert End(np.array([0.0]), 0.0).error < 1e-20 and End(np.array([1.0]), 0.0).standard_error == 0


class Kept:
    """Trajectories: calibration 0 to 3, held out 4 to 8, two batches."""

    held_out = range(4, 9)

    def __iter__(self) -> object:
        for indices in (range(0, 4), range(4, 7), range(7, 9)):
            x = np.arange(indices.start, indices.stop, dtype=np.float32) * np.ones((2, 1), np.float32)
            yield Batch(indices, x, -x, {"class_labels": np.arange(indices.start, indices.stop)})


@pytest.mark.parametrize(
    ("n", "rows", "expected"),
    [
        (5, 3, [[4, 5, 6], [7, 8]]),
        (99, 2, [[4, 5], [6], [7, 8]]),
        (4, 2, [[4, 5], [6], [7]]),
        (2, 8, [[4, 5]]),
        (1, 1, [[4]]),
    ],
)
def test_held_out_trajectories_in_batches(
    n: int, rows: int, expected: list[list[int]], keep: Callable[[], Kept] = Kept
) -> None:
    found = held_out(keep(), n, rows)  # type: ignore[arg-type]
    assert [list(batch.indices) for batch in found] == expected
    for batch in found:
        assert batch.x[0].tolist() == list(batch.indices) and batch.e[1].tolist() == [
            -i for i in batch.indices
        ]
        assert batch.conditions["class_labels"].tolist() == list(batch.indices)


def test_calls_have_epsilon(loop: ClosedLoop) -> None:
    """The fake network answers as a network does."""
    feeds = loop.sampling.feeds(np.zeros((1, 1, 4, 4)), 0, loop.sampling.model.conditions([0], 1))
    assert loop.engines[FP32](feeds)[EPSILON].shape == (2, 1, 4, 4)
