"""Plans: their text, the rules, equal costs, the Pareto front against brute force."""

from __future__ import annotations

import re
from itertools import pairwise, product

import numpy as np
import pytest

from ptqd_export.core.plan import (
    MAX_STEPS,
    Plan,
    by_budget,
    by_paper,
    by_snr,
    equal_costs,
    first_last,
    fixed,
    pareto_front,
    parse_plan,
    step_weights,
    uniform,
)
from ptqd_export.core.precision import FP32, Precision
from ptqd_export.core.schedule import NoiseSchedule
from ptqd_export.errors import RecipeError

W8A8, W4A8, W4A4 = Precision(8, 8), Precision(4, 8), Precision(4, 4)


def test_runs_are_contiguous() -> None:
    plan = Plan((W4A4, W4A4, W8A8, W4A4))
    assert [(str(p), list(r)) for p, r in plan.runs()] == [("w4a4", [0, 1]), ("w8a8", [2]), ("w4a4", [3])]
    assert str(plan) == "w4a4*2 w8a8*1 w4a4*1"
    assert plan.precisions == (W4A4, W8A8)
    assert plan.total({W4A4: 1.0, W8A8: 4.0}) == 7.0


def test_fixed() -> None:
    assert fixed(["w4a8*3", "w8a8"], 4).steps == (W4A8, W4A8, W4A8, W8A8)
    assert fixed(["w8a8"], 3).steps == (W8A8,) * 3
    assert fixed(["w4a8*2,w8a8", "w4a8"], 4).steps == (W4A8, W4A8, W8A8, W4A8)
    for wrong, message in [
        (["w4a8*3"], "3 steps"),
        (["w4a8*x", "w8a8"], "with a count"),
        (["w4a8*0", "w8a8*4"], "with a count"),
        (["int8*4"], "not known"),
    ]:
        with pytest.raises(RecipeError, match=message):
            fixed(wrong, 4)


@pytest.mark.parametrize("text", ["w4a8*3,w8a8*1", "w4a8*3 w8a8", " w4a8*2,w4a8 , w8a8,"])
def test_plan_text(text: str) -> None:
    assert parse_plan(text, 4).steps == (W4A8, W4A8, W4A8, W8A8)
    with pytest.raises(RecipeError, match="has 4 steps, the sampler 5"):
        parse_plan(text, 5)


@pytest.mark.parametrize("text", ["", " , ", "w8a8*", "w8a8*3*1", "w8a8;w4a8", "w4a8*99999999"])
def test_what_is_no_plan(text: str) -> None:
    with pytest.raises(RecipeError):
        parse_plan(text, 4)


def test_one_precision_is_for_all_steps() -> None:
    assert parse_plan("w8a8", 3) == parse_plan("w8a8*3", 3) == Plan((W8A8,) * 3)


@pytest.mark.parametrize("text", ["w8a8*1", "w4a8*12 w8a8*8", "fp32*3", "w8a8-fp8*2 w4a16*1 fp16*4"])
def test_plain_form_is_the_text(text: str) -> None:
    plan = Plan.from_plain(text)
    assert plan.to_plain() == str(plan) == text
    assert Plan.from_plain(plan.to_plain()) == plan


def test_plain_form_is_read_as_runs() -> None:
    assert Plan.from_plain("w4a8 w8a8*2").steps == (W4A8, W8A8, W8A8)
    assert Plan.from_plain("w8a8*1 w8a8*1") == Plan.from_plain("w8a8*2") != Plan.from_plain("w8a8*3")
    assert len(Plan.from_plain(f"fp32*{MAX_STEPS - 1} w8a8*1")) == MAX_STEPS


@pytest.mark.parametrize(
    ("value", "message"),
    [
        (None, "plan None: expected runs"),
        (["w8a8*2"], "expected runs of precisions"),
        (12, "plan 12: expected runs"),
        ("int8*2", "'int8' is not known"),
        ("w8a8*0", "with a count"),
        ("w8a8*-1", "with a count"),
        ("w8a8*", "with a count"),
        ("w8a8*1.5", "with a count"),
        ("w8a8*²", "with a count"),
        ("w8a8**2", "with a count"),
        ("w8a8*9999999", "with a count"),
        ("w8a8*999999", f"more than {MAX_STEPS} steps"),
        (" ".join(["w8a8*60000"] * 2), f"more than {MAX_STEPS} steps"),
    ],
)
def test_plain_form_refuses(value: object, message: str) -> None:
    with pytest.raises(RecipeError, match=re.escape(message)):
        Plan.from_plain(value)


def test_what_a_plan_refuses_is_quoted_in_a_bounded_line() -> None:
    for value in ("w8a8*" + "9" * 100_000, "\x1b[2J\n" * 1000, ["w8a8"] * 100_000):
        with pytest.raises(RecipeError) as caught:
            Plan.from_plain(value)
        message = str(caught.value)
        assert len(message) < 400 and message.isprintable()


def test_residual_variance_of_each_step_is_that_of_its_own_precision() -> None:
    var = {W4A8: np.array([0.1, 0.2, 0.3, 0.4]), W8A8: np.array([0.01, 0.02, 0.03, 0.04])}
    plan = Plan((W4A8, FP32, W8A8, W4A8))
    assert plan.residual_var(var).tolist() == [0.1, 0.0, 0.03, 0.4]
    assert plan.residual_var({**var, FP32: np.ones(4)}).tolist() == [0.1, 0.0, 0.03, 0.4]  # float has none
    assert not Plan((FP32, Precision.parse("fp16"))).residual_var({}).any()
    assert Plan((W8A8,) * 4).residual_var(var).tolist() != plan.residual_var(var).tolist()
    with pytest.raises(KeyError):
        plan.residual_var({W4A8: var[W4A8]})


def test_snr_rule_takes_the_cheapest_that_passes_else_the_best(schedule: NoiseSchedule) -> None:
    n = len(schedule)
    above, below = schedule.snr * 2, schedule.snr / 2
    late = np.arange(n) >= n // 2
    snr = {W4A4: np.where(late, below, above), W8A8: np.where(np.arange(n) == n - 1, below, above)}
    plan = by_snr(snr, {W4A4: 1.0, W8A8: 4.0}, schedule)
    assert plan.steps == (W4A4,) * (n // 2) + (W8A8,) * (n - n // 2)


def test_front_is_the_lower_hull_of_all_plans(rng: np.random.Generator) -> None:
    costs = {W4A4: 1.0, W8A8: 2.5, FP32: 6.0}
    errors = {W4A4: rng.uniform(5, 9, 4), W8A8: rng.uniform(1, 6, 4), FP32: np.zeros(4)}
    every = [
        (sum(costs[p] for p in steps), sum(errors[p][i] for i, p in enumerate(steps)))
        for steps in product(costs, repeat=4)
    ]
    front = pareto_front(errors, costs)
    assert (front[0].cost, front[-1].cost) == (min(c for c, _ in every), 24.0)
    for point in front:
        assert point.error == pytest.approx(sum(errors[p][i] for i, p in enumerate(point.plan.steps)))
        assert not any(c <= point.cost + 1e-9 and e < point.error - 1e-9 for c, e in every), (
            "a plan of all is cheaper and better"
        )
    for a, b in pairwise(front):
        assert b.cost > a.cost
        assert b.error < a.error
    for lam in (0.01, 0.3, 1.0, 3.0, 30.0):
        best = min(e + lam * c for c, e in every)
        assert min(p.error + lam * p.cost for p in front) == pytest.approx(best)


def test_front_drops_a_precision_that_is_dearer_and_worse() -> None:
    front = pareto_front({W8A8: np.array([1.0]), W4A8: np.array([2.0])}, {W8A8: 1.0, W4A8: 1.0})
    assert [p.plan.steps for p in front] == [(W8A8,)]


def test_budget_picks_the_best_that_fits_and_falls_back_to_the_cheapest() -> None:
    front = pareto_front({W4A4: np.array([4.0, 2.0]), W8A8: np.array([1.0, 1.0])}, {W4A4: 1.0, W8A8: 2.0})
    assert by_budget(front, 3.0).plan.steps == (W8A8, W4A4)
    assert by_budget(front, 4.0).plan.steps == (W8A8, W8A8)
    assert by_budget(front, 0.5).plan.steps == (W4A4, W4A4)


def test_without_a_measurement_noise_counts_as_it_enters_x() -> None:
    """Neither early steps count more, as an unhindered way to x_0 would have it, nor late ones."""
    for eta in (0.0, 1.0):
        schedule = NoiseSchedule.from_config({"clip_sample": False}, 20, eta)
        np.testing.assert_allclose(step_weights(schedule), schedule.epsilon_gains**2)


def test_costs_within_their_noise_are_one() -> None:
    costs = {FP32: 55.0, W8A8: 27.5, W4A8: 27.4, W4A4: 28.1}
    found = equal_costs(costs, {p: 0.3 for p in costs})
    assert found[W8A8] == found[W4A8] == found[W4A4] == pytest.approx(27.6667, abs=1e-3)
    assert found[FP32] == 55.0 and list(found) == list(costs)
    assert equal_costs(costs, {}) == costs  # exact ones are told apart
    assert equal_costs({W8A8: 2.0, W4A8: 2.0, FP32: 3.0}, {}) == {W8A8: 2.0, W4A8: 2.0, FP32: 3.0}
    found = equal_costs(costs, {W4A4: 0.1, W4A8: 0.1, W8A8: 0.1})
    assert found[W8A8] == found[W4A8] == pytest.approx(27.45) and found[W4A4] == 28.1
    # A chain does not pull apart ones together: groups are held to their cheapest.
    chain = equal_costs({W4A4: 1.0, W4A8: 1.25, W8A8: 1.5}, {p: 0.1 for p in (W4A4, W4A8, W8A8)})
    assert chain[W4A4] == chain[W4A8] == pytest.approx(1.125) and chain[W8A8] == 1.5


def test_among_equal_costs_the_least_error_wins() -> None:
    """Whichever of the times came out a hair lower."""
    errors = {W4A4: np.array([4.0, 1.0]), W4A8: np.array([2.0, 2.0]), W8A8: np.array([1.0, 1.5])}
    for times in ((27.4, 27.5, 27.6), (27.6, 27.5, 27.4)):
        costs = dict(zip(errors, times, strict=True))
        pooled = equal_costs(costs, {p: 0.3 for p in costs})
        front = pareto_front(errors, pooled)
        assert [point.plan.steps for point in front] == [(W8A8, W4A4)]
        apart = [point.plan for point in pareto_front(errors, costs)]
        assert len(apart) > 1 or times[0] > times[2]  # what noise made of it before


def test_one_precision_throughout() -> None:
    errors = {W4A4: np.full(4, 9.0), W4A8: np.full(4, 2.0), FP32: np.zeros(4)}
    costs = {W4A4: 1.0, W4A8: 2.0, FP32: 4.0}
    for budget, best in ((16.0, FP32), (15.0, W4A8), (8.0, W4A8), (7.9, W4A4), (1.0, W4A4)):
        assert uniform(errors, costs, budget).steps == (best,) * 4


def test_first_and_last_steps_precise() -> None:
    n = 10
    errors = {W4A4: np.full(n, 9.0), W8A8: np.ones(n), FP32: np.zeros(n)}
    costs = {W4A4: 1.0, W8A8: 2.0, FP32: 6.0}
    assert str(first_last(errors, costs, 36.0)) == "fp32*2 w8a8*6 fp32*2"
    assert str(first_last(errors, costs, 35.9)) == "fp32*1 w8a8*8 fp32*1"
    assert str(first_last(errors, costs, 14.0)) == "w8a8*2 w4a4*6 w8a8*2"
    assert str(first_last(errors, costs, 60.0)) == "fp32*10"
    assert str(first_last(errors, costs, 5.0)) == "w4a4*10"  # nothing fits: the cheapest
    mixed = Precision.parse("w8a8+")
    same_bits = first_last({W8A8: np.full(10, 1.0), mixed: np.full(10, 0.1)}, {W8A8: 1.0, mixed: 1.2}, 11.0)
    assert str(same_bits) == "w8a8+*2 w8a8*6 w8a8+*2"
    for budget in np.linspace(10, 60, 23):
        plan = first_last(errors, costs, budget)
        assert plan.total(costs) <= budget + 1e-6 and plan.steps == plan.steps[::-1]
    same = {p: 1.0 for p in costs}
    assert str(first_last(errors, same, 10.0)) == "fp32*10"
    assert str(first_last({W8A8: np.ones(n)}, {W8A8: 1.0}, 10.0)) == "w8a8*10"  # there is no pair


@pytest.mark.parametrize(("n", "first"), [(250, 48), (20, 4), (1, 0)])
def test_the_plan_of_the_paper(n: int, first: int) -> None:
    plan = by_paper((FP32, W8A8, W4A8, W4A4), n)
    assert plan.steps == (W4A4,) * first + (W4A8,) * (n - first)
    for lacking in ((W8A8, W4A8), (W4A4, FP32)):
        with pytest.raises(RecipeError, match="the paper's plan is of w4a4 and w4a8, but there are "):
            by_paper(lacking, n)
