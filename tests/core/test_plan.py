"""Plans: their text, the three rules, the Pareto front against brute force."""

from __future__ import annotations

import re
from itertools import pairwise, product

import numpy as np
import pytest

from ptqd_export.core.plan import (
    MAX_STEPS,
    Plan,
    by_budget,
    by_snr,
    fixed,
    pareto_front,
    parse_plan,
    step_weights,
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


def test_weights_favour_early_steps_for_pairs_and_late_ones_for_distribution() -> None:
    schedule = NoiseSchedule.from_config({"clip_sample": False}, 20, 0.0)
    c2 = schedule.epsilon_gains**2
    paired, distribution = (step_weights(schedule, o) / c2 for o in ("paired", "distribution"))
    assert (np.diff(paired) < 0).all()
    assert (np.diff(distribution) > 0).all()
