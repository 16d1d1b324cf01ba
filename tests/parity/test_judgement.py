"""Outputs of a layer: equal up to rounding, a quantization step apart, or further, in figures that are
known."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest

from ptqd_export.core.backend import Emission
from ptqd_export.core.precision import FP32, Precision
from ptqd_export.parity.judgement import (
    FLOAT_TOLERANCE,
    HALF,
    JUDGED_STEPS,
    MAX_SHARE_APART,
    MAX_STEPS_APART,
    Apart,
    float_tolerance,
    judge,
    judged_steps,
    max_float_error,
)

SCALE = np.array([1, 10, 100]).reshape(1, 3, 1, 1)


def feeds() -> np.ndarray:
    """Channels of largest value 8, 80 and 800."""
    x = np.random.default_rng(0).integers(-7, 8, (2, 3, 4, 4)) * SCALE
    x[0, :, 0, 0] = 8 * SCALE.ravel()
    return x.astype(np.float32)


def found(change: Callable[[np.ndarray], np.ndarray], step: np.ndarray, zero: bool = False) -> Apart:
    """Of two feeds, pooled; rounding may change a channel by 1e-3 of its largest value, or of its step if
    that is larger."""
    total = Apart()
    for _ in range(2):
        expected = 0 * feeds() if zero else feeds()
        total += judge(change(expected), expected, step, float_tolerance(expected, step, 1e-3))
    return total


def off(by: float, steps: int) -> Callable[[np.ndarray], np.ndarray]:
    """All values by a part of a step, and one by whole steps."""

    def change(expected: np.ndarray) -> np.ndarray:
        y = expected + by * SCALE
        y[1, 2, 3, 3] += 100 * steps
        return y

    return change


def test_steps_that_are_judged() -> None:
    """All of a short run; of a long one as many as allowed, from the first to the last, evenly."""
    assert judged_steps(1) == [0] and judged_steps(JUDGED_STEPS) == list(range(JUDGED_STEPS))
    for n in (JUDGED_STEPS + 1, 250, 1000):
        steps = judged_steps(n)
        assert len(set(steps)) == JUDGED_STEPS and (steps[0], steps[-1]) == (0, n - 1)
        apart = np.diff(steps)
        assert apart.min() >= 1 and apart.max() - apart.min() <= 1


def test_quantization_steps_apart() -> None:
    """Steps of 1, 10 and 100: rounding of 1e-3 is 0.008 of a step."""
    step = SCALE.astype(float)
    for by, steps, apart, largest in ((0.005, 1, 2, 1.0), (0.005, 2, 2, 2.0), (0.02, 0, 192, 0.02)):
        got = found(off(by, steps), step)
        assert (got.size, got.apart) == (192, apart)
        assert got.largest_steps == pytest.approx(largest, abs=0.014), (by, steps)
    assert found(lambda x: x, step) == Apart(192, 0, 0.0)


def test_rounding_is_of_the_step_where_that_is_larger_than_the_values() -> None:
    """9e-4 beside zeros: within 1e-3 of a step of 1, and not of a step of 0.5."""
    assert found(lambda x: x + 9e-4, np.ones((1, 3, 1, 1)), zero=True) == Apart(192, 0, 0.0)
    got = found(lambda x: x + 9e-4, np.full((1, 3, 1, 1), 0.5), zero=True)
    assert (got.size, got.apart) == (192, 192)
    assert got.largest_steps == pytest.approx((9e-4 - 5e-4) / 0.5, rel=1e-5)


def test_a_tolerance_per_channel_along_the_last_axis() -> None:
    """Of a linear layer: the step's axis says which are the channels."""
    expected = np.array([[1.0, -4.0], [2.0, 3.0]])
    np.testing.assert_allclose(float_tolerance(expected, np.array([[0.1, 8.0]]), 0.5), [[1.0, 4.0]])


def test_a_tolerance_of_what_was_added() -> None:
    """A bias of 10 that leaves outputs of 1 was added to products of up to 11."""
    expected, added = np.array([[1.0, -4.0], [0.5, 3.0]]), np.array([[10.0, 0.0]])
    np.testing.assert_allclose(float_tolerance(expected, np.full((1, 2), 0.1), 0.5, added), [[5.5, 2.0]])


def test_two_sets_are_pooled() -> None:
    total = Apart(100, 1, 1.0) + Apart(300, 2, 0.5)
    assert total == Apart(400, 3, 1.0) and total.share == 3 / 400
    assert Apart().share == 0.0 and Apart().tolerable


@pytest.mark.parametrize(
    ("apart", "tolerable"),
    [
        (Apart(10_000, 10, 1.0), True),
        (Apart(10_000, 11, 1.0), False),  # more than a share of 1e-3
        (Apart(10, 1, 1.0), True),  # one in a small layer may be a tie
        (Apart(10, 2, 1.0), False),
        (Apart(10_000, 1, MAX_STEPS_APART), True),
        (Apart(10_000, 1, 1.6), False),
    ],
)
def test_ties_are_let_pass_while_they_are_rare(apart: Apart, tolerable: bool) -> None:
    assert apart.tolerable is tolerable and MAX_SHARE_APART == 1e-3


def test_what_a_float_graph_may_differ_by() -> None:
    """Only graphs in half precision may differ by more than float32 does, and fp32 is never one."""
    fp16 = Precision(16, 16)
    assert max_float_error(fp16, Emission.HALF) == 1e-2
    assert {max_float_error(FP32, e) for e in Emission} == {1e-4}
    assert max_float_error(fp16, Emission.ORT_CPU) == max_float_error(fp16, Emission.PORTABLE) == 1e-4
    assert FLOAT_TOLERANCE < 1e-4 < HALF == 2.0**-11
