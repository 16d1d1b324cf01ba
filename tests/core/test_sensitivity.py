"""What noise comes to at the end: groups of steps, weights fitted to what was measured, distances."""

from __future__ import annotations

import numpy as np
import pytest

from ptqd_export.core.plan import Plan
from ptqd_export.core.precision import FP32, Precision
from ptqd_export.core.sensitivity import (
    LARGEST,
    Sensitivity,
    paired_error,
    step_groups,
    texture_distance,
)
from ptqd_export.errors import RecipeError

W8A8, W4A8 = Precision(8, 8), Precision(4, 8)


@pytest.mark.parametrize(("n", "k"), [(20, 5), (250, 6), (7, 3), (3, 5), (1, 1), (1000, 7)])
def test_groups_are_all_steps_in_order(n: int, k: int) -> None:
    groups = step_groups(n, k)
    assert [step for group in groups for step in group] == list(range(n))
    sizes = [len(group) for group in groups]
    assert len(groups) == min(n, k) and min(sizes) >= 1 and max(sizes) - min(sizes) <= 1


def measured(**changes: object) -> Sensitivity:
    given = {
        "groups": (2, 1),
        "samples": 4,
        "evaluations": 40,
        "paired": {W8A8: (0.3, 0.01), W4A8: (6.0, 0.0)},
        "distribution": {W8A8: (1e-4, 1e-2), W4A8: (1e-3, 1.0)},
    }
    return Sensitivity(**(given | changes))  # type: ignore[arg-type]


ERRORS = {
    FP32: np.zeros(3),
    W8A8: np.array([1.0, 2.0, 4.0]),
    W4A8: np.array([10.0, 20.0, 0.0]),
}


def test_a_group_shares_what_was_measured_for_it_by_its_steps_noise() -> None:
    weighed = measured().weigh(ERRORS, "paired")
    np.testing.assert_allclose(weighed[W8A8], [0.1, 0.2, 0.01])
    np.testing.assert_allclose(weighed[W4A8], [2.0, 4.0, 0.0])
    assert weighed[FP32].tolist() == [0, 0, 0]
    np.testing.assert_allclose(measured().weigh(ERRORS, "distribution")[W8A8], [1e-4 / 3, 2e-4 / 3, 1e-2])
    assert ERRORS[W8A8].tolist() == [1, 2, 4]  # not changed


def test_the_plan_that_was_measured_is_predicted_exactly() -> None:
    """Its prediction is the measurement; that of two groups is the sum of both."""
    weighed = measured().weigh(ERRORS, "paired")
    assert Plan((W4A8, W4A8, FP32)).error(weighed) == pytest.approx(6.0)
    assert Plan((FP32, FP32, W8A8)).error(weighed) == pytest.approx(0.01)
    assert Plan((W4A8, W4A8, W8A8)).error(weighed) == pytest.approx(6.01)


def test_an_end_without_noise_before_it_is_shared_evenly() -> None:
    weighed = measured(paired={W8A8: (0.3, 0.01)}, distribution={W8A8: (0.0, 0.0)}).weigh(
        {W8A8: np.zeros(3)}, "paired"
    )
    np.testing.assert_allclose(weighed[W8A8], [0.15, 0.15, 0.01])


@pytest.mark.parametrize(
    "changes",
    [
        {"groups": ()},
        {"groups": (3, 0)},
        {"groups": (2, -1)},
        {"paired": {W8A8: (0.3, 0.01)}},
        {"paired": {W8A8: (0.3,), W4A8: (6.0,)}},
        {"paired": {W8A8: (0.3, -0.01), W4A8: (6.0, 0.0)}},
        {"distribution": {W8A8: (1e-4, 1e-2), W4A8: (1e-3, 1.0, 2.0)}},
    ],
)
def test_what_no_measurement_gives(changes: dict[str, object]) -> None:
    with pytest.raises(RecipeError, match="expected"):
        measured(**changes)


def test_paired_errors_of_samples(rng: np.random.Generator) -> None:
    x = rng.standard_normal((3, 2, 4, 4))
    y = x.copy()
    y[1] += 0.5
    y[2, 0, 0, 0] = np.inf
    np.testing.assert_allclose(paired_error(y, x), [0.0, 0.25, LARGEST])
    y[2, 0, 0, 0] = np.nan
    assert paired_error(y, x)[2] == LARGEST


def test_the_distance_of_textures(rng: np.random.Generator) -> None:
    """0 of the same samples in another order, turned by half, or brighter; more for more grain, for blur,
    and for samples that ran away."""
    x = rng.standard_normal((8, 1, 16, 16))
    x = (x + np.roll(x, 1, 2) + np.roll(x, 1, 3)) / 3
    assert texture_distance(x, x) == 0
    assert texture_distance(x[::-1] + 0.5, x) < 1e-12
    grain = [texture_distance(x + a * rng.standard_normal(x.shape), x) for a in (0.1, 0.3, 1.0)]
    blurred = texture_distance((x + np.roll(x, 1, 3)) / 2, x)
    assert 0 < grain[0] < grain[1] < grain[2] and blurred > grain[0]
    other = rng.standard_normal(x.shape)
    other = (other + np.roll(other, 1, 2) + np.roll(other, 1, 3)) / 3
    assert texture_distance(other, x) < 0.1 * np.sqrt(paired_error(other, x).mean())
    # What two sources of a little noise leave adds up.
    little = [x + 0.05 * rng.standard_normal(x.shape), x + 0.1 * rng.standard_normal(x.shape)]
    both = little[0] + 0.1 * rng.standard_normal(x.shape)
    apart = sum(texture_distance(v, x) for v in little)
    assert texture_distance(both, x) == pytest.approx(apart, rel=0.3)
    y = x.copy()
    y[0, 0, 0, 0] = np.inf
    assert texture_distance(y, x) == LARGEST
    assert texture_distance(np.ones((2, 3, 1, 1)), np.zeros((2, 3, 1, 1))) == 0  # no neighbours
