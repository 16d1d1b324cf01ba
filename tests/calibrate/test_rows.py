"""What calibration shows to the network: every class, all steps, each weighted."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest
from cases import Case

from ptqd_export.calibrate.rows import calls, error_weights, seen_trajectories
from ptqd_export.core.model import InputSpec, ModelInfo


def classes(n: int) -> ModelInfo:
    inputs = (InputSpec("class_labels", num_classes=n + 1, null_class=n),) if n else ()
    return ModelInfo("toy", (1, 4, 4), inputs, "0" * 64)


@pytest.mark.parametrize(("n", "size"), [(10, 32), (3, 32), (20, 32), (10, 10)])
def test_every_class_is_seen(n: int, size: int) -> None:
    info = classes(n)
    labels = info.labels_in_turn(range(size))
    assert labels is not None
    seen = seen_trajectories(info, size, 8)
    assert {labels[i] for i in seen} == set(info.labels) and len(seen) == max(n, 8)


def test_evenly_spaced_trajectories_missed_classes() -> None:
    """Eight of 32, as they were chosen once: two of ten classes are not among them."""
    labels = classes(10).labels_in_turn(range(32))
    assert labels is not None
    spaced = np.linspace(0, 31, 8).round().astype(int)
    assert len({labels[i] for i in spaced}) == 8


def test_without_classes_and_with_few_trajectories() -> None:
    assert seen_trajectories(classes(0), 32, 8) == range(8)
    assert seen_trajectories(classes(10), 4, 8) == range(4)


def test_weights_are_those_of_the_sampler(case: Case) -> None:
    schedule = case.sampling.schedule
    weights = error_weights(case.sampling)
    assert weights.mean() == pytest.approx(1)
    np.testing.assert_allclose(
        weights / weights[0], (schedule.epsilon_gains / schedule.epsilon_gains[0]) ** 2
    )
    # epsilon = sqrt(abar) v + ...: an error of v counts less where abar is small.
    v = dataclasses.replace(schedule, prediction_type="v_prediction")
    of_v = error_weights(dataclasses.replace(case.sampling, schedule=v))
    ratio = of_v / weights
    np.testing.assert_allclose(ratio / ratio[0], schedule.alphas_cumprod / schedule.alphas_cumprod[0])


@pytest.mark.parametrize("stride", [1, 2, 3])
def test_calls_show_every_step(case: Case, stride: int) -> None:
    n_steps = len(case.sampling)
    found = list(calls(case.sampling, case.trajectories, range(4), stride))
    timesteps = np.concatenate([call.feeds["timestep"].numpy() for call in found])
    assert set(timesteps) == set(case.sampling.schedule.timesteps)
    assert len(timesteps) == 4 * 2 * -(-n_steps // stride)
    weights = dict(zip(case.sampling.schedule.timesteps.tolist(), error_weights(case.sampling), strict=True))
    for call in found:
        expected = [weights[t] for t in call.feeds["timestep"].tolist()]
        np.testing.assert_allclose(call.weights.numpy(), expected, rtol=1e-6)


def test_calls_repeat_the_trajectories(case: Case) -> None:
    """A row is x_t of its trajectory at its step, with its own condition, after the row without one."""
    batch = case.trajectories.first(4)
    steps = {int(t): i for i, t in enumerate(case.sampling.schedule.timesteps)}
    (call, *_) = calls(case.sampling, case.trajectories, range(2))
    null, own = call.feeds["class_labels"].reshape(2, -1).tolist()
    assert null == [3, 3] and own == batch.conditions["class_labels"][:2].tolist()
    for row, (x, t) in enumerate(zip(call.feeds["sample"], call.feeds["timestep"], strict=True)):
        np.testing.assert_array_equal(x.numpy(), batch.x[steps[int(t)], row % 2])
