"""The plan is that of the recipe's rule, and the record of the choice says how it came about."""

from __future__ import annotations

from dataclasses import replace
from typing import Any, ClassVar

import numpy as np
import pytest

from ptqd_export import backends
from ptqd_export.assemble.choose import choose, fixed_plan, sampled
from ptqd_export.assemble.closed_loop import End
from ptqd_export.assemble.measure import Measured
from ptqd_export.assemble.timing import Times
from ptqd_export.core.backend import Emission
from ptqd_export.core.gate import Gated
from ptqd_export.core.noise import Correction, NoiseStats
from ptqd_export.core.plan import Plan
from ptqd_export.core.precision import FP32, Precision
from ptqd_export.core.quant import Grid, LayerQuant, QuantizedNetwork
from ptqd_export.core.schedule import NoiseSchedule
from ptqd_export.core.sensitivity import Sensitivity
from ptqd_export.errors import RecipeError
from ptqd_export.recipe import Recipe

W8A8, W4A8 = Precision(8, 8), Precision(4, 8)
STEPS = 10


@pytest.fixture(autouse=True)
def exact(monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever processor the tests run on."""
    monkeypatch.setattr(backends, "saturates", lambda: False)


def network(precision: Precision) -> QuantizedNetwork:
    """One layer of 100 multiplications."""
    weight = np.ones((1, 1), np.int8)
    layer = LayerQuant(
        "a",
        "linear",
        weight,
        np.ones(1, np.float32),
        precision.weight_bits,
        Grid.symmetric(1.0, precision.activation_bits),
        precision.activation_bits,
        None,
        None,
        100,
    )
    return QuantizedNetwork(precision, {"a": layer})


def measured(noise: float) -> Measured:
    """The same noise at every step, of a signal of power 1; no correction."""
    rng = np.random.default_rng(0)
    parts = []
    for _ in range(2):
        total = NoiseStats.zeros(STEPS, 1)
        for step in range(STEPS):
            e = rng.standard_normal((1, 1, 1000))
            total += NoiseStats.of_step(step, STEPS, e, e + noise * rng.standard_normal(e.shape))
        parts.append(total)
    zeros = np.zeros(STEPS)
    gated = Gated(Correction.identity(STEPS, 1), ("nothing",) * STEPS, zeros, zeros, 0.0)
    return Measured(parts, parts, gated)


def chosen(
    times: dict[Precision, float],
    backend: str = "ort-cpu",
    errors: float = 0.0,
    sensitivity: Sensitivity | None = None,
    snr_forward: float | None = None,
    **plan: Any,
) -> Any:
    recipe = Recipe().override(
        plan=plan, sampler={"n_steps": STEPS}, quantization={"precisions": tuple(map(str, times))}
    )
    noise = {W8A8: 0.01, W4A8: 0.1}
    known = {(p, e): measured(noise[p]) for p in times if not p.is_float for e in Emission}
    schedule = NoiseSchedule.from_config({"clip_sample": False}, STEPS, 0.0)
    if snr_forward is not None:
        alphas = schedule.alphas_cumprod.copy()
        alphas[-1] = snr_forward / (1 + snr_forward)
        schedule = replace(schedule, alphas_cumprod=alphas)
    found = Times(backend, times, dict.fromkeys(times, errors), ("why not",))
    return choose(recipe, schedule, {p: network(p) for p in times}, known, found, sensitivity)


ALL = {FP32: 4.0, W8A8: 2.0, W4A8: 1.0}


def test_a_budget_in_time_is_kept() -> None:
    plan, choice = chosen(ALL, rule="budget", cost="time", budget=0.4)
    assert choice.budget == pytest.approx(0.4 * 4.0 * STEPS)
    assert plan.total(ALL) <= choice.budget < plan.total(ALL) + 1.0
    assert W4A8 in plan.precisions and len(plan.precisions) > 1 and choice.timed_on == "ort-cpu"
    assert [p.cost for p in choice.front] == sorted(p.cost for p in choice.front)
    assert choice.bops == plan.total({W8A8: 6400.0, W4A8: 3200.0, FP32: 102400.0})
    assert choice.bops_fp32 == 100 * 32 * 32 * STEPS and choice.seconds_per_evaluation == ALL
    assert choice.snr_q[FP32] == (None,) * STEPS and choice.error[FP32] == (0.0,) * STEPS
    for high, low in zip(choice.snr_q[W8A8], choice.snr_q[W4A8], strict=True):
        assert high is not None and low is not None and high > 10 * low
    assert "why not; the plan goes by the noise and times of another backend" in choice.notes


def test_a_budget_that_nothing_keeps_is_said() -> None:
    plan, choice = chosen({W8A8: 2.0, W4A8: 1.0}, rule="budget", cost="time", budget=0.1)
    assert plan.precisions == (W4A8,)
    note = "no plan fits the budget of 0.1 of the dearest precision's time: the cheapest one is taken"
    assert note in choice.notes and "built but not used by this plan: w8a8" in choice.notes
    plan, choice = chosen({W8A8: 2.0, W4A8: 1.0}, rule="budget", cost="time", budget=1.0)
    assert plan.precisions == (W8A8,) and not any("budget" in note for note in choice.notes)


def test_times_that_are_one_within_their_noise() -> None:
    """w4a8 came out a hair faster; w8a8 has less error and is taken, and a note says why."""
    times = {FP32: 4.0, W8A8: 2.0, W4A8: 1.99}
    plan, choice = chosen(times, errors=0.02, rule="budget", cost="time", budget=0.5)
    assert plan.precisions == (W8A8,) and choice.front[0].plan == f"w8a8*{STEPS}"
    assert "w8a8, w4a8 take equally long within the noise of their times: the error decides" in choice.notes
    assert choice.seconds_per_evaluation == times and set(choice.seconds_error.values()) == {0.02}
    plan, choice = chosen(times, errors=0.001, rule="budget", cost="time", budget=0.5)
    assert W4A8 not in plan.precisions and choice.front[0].plan == f"w4a8*{STEPS}"
    assert not any("equally long" in note for note in choice.notes)


def test_what_was_measured_decides_where_bits_go() -> None:
    """The same noise, which matters late or early."""
    late = {"groups": (5, 5), "samples": 2, "evaluations": 9}
    kept = {}
    for name, ends in (("late", (1e-6, 1.0)), ("early", (1.0, 1e-6))):
        table = {W8A8: tuple(e / 100 for e in ends), W4A8: ends}
        found = Sensitivity(**late, paired=table, distribution={p: e[::-1] for p, e in table.items()})
        for objective in ("paired", "distribution"):
            plan, choice = chosen(
                {W8A8: 2.0, W4A8: 1.0}, sensitivity=found, rule="budget", budget=0.75, objective=objective
            )
            assert choice.sensitivity == found
            assert choice.compared[0].predicted == pytest.approx(plan.error(found.weigh(
                {p: np.array(e) for p, e in choice.error.items()}, objective)))  # fmt: skip
            kept[name, objective] = str(plan)
    assert kept["late", "paired"] == kept["early", "distribution"] == "w4a8*5 w8a8*5"
    assert kept["early", "paired"] == kept["late", "distribution"] == "w8a8*5 w4a8*5"


def test_the_plan_stands_beside_what_others_ship() -> None:
    plan, choice = chosen(ALL, rule="budget", cost="time", budget=0.6)
    own, uniform, ends = choice.compared
    assert [r.kind for r in choice.compared] == ["chosen", "uniform", "first-last"]
    assert own.plan == str(plan) and own.cost == pytest.approx(plan.total(ALL))
    assert uniform.plan == ends.plan == f"w8a8*{STEPS}"  # two steps more would cost more than the plan
    assert plan.total(ALL) < 24.0
    assert uniform.cost <= own.cost and ends.cost <= own.cost
    assert own.predicted <= min(uniform.predicted, ends.predicted)
    assert all(r.sampled is None and r.standard_error is None for r in choice.compared)


@pytest.mark.parametrize("rule", ["first-last", "paper", "snr"])
def test_presets(rule: str) -> None:
    times = {FP32: 4.0, W8A8: 2.0, W4A8: 1.0}
    if rule == "paper":
        with pytest.raises(RecipeError, match="the paper's plan is of w4a4 and w4a8, but there are fp32"):
            chosen(times, rule=rule)
        return
    plan, choice = chosen(times, rule=rule, budget=0.6)
    assert choice.rule == rule
    if rule == "first-last":
        assert str(plan) == "fp32*1 w8a8*8 fp32*1" == choice.compared[2].plan


def test_a_last_step_that_nothing_satisfies_is_a_note() -> None:
    line = "last step: no quantized precision has an SNR_Q above SNR_F there (w8a8: 40.1 of 45.0 dB)"
    _, choice = chosen(ALL, snr_forward=10**4.5)
    assert [note for note in choice.notes if note.startswith("last step")] == [line]
    _, choice = chosen(ALL, snr_forward=10**3.5)  # w8a8 passes
    assert not any(note.startswith("last step") for note in choice.notes)
    _, choice = chosen({FP32: 4.0}, snr_forward=10**4.5)
    assert not any(note.startswith("last step") for note in choice.notes)


def test_a_plan_by_hand_is_taken_as_it_is() -> None:
    plan, choice = chosen(ALL, rule="fixed", steps=("w4a8*4", "fp32*6"))
    assert str(plan) == "w4a8*4 fp32*6" and choice.rule == "fixed"
    assert "why not" in choice.notes  # nothing of the choice went by it
    for steps, message in (
        (("w4a4",), "the fixed plan uses w4a4, which is not built: add it to quantization.precisions"),
        (("w4a8*4",), "the fixed plan has 4 steps, the sampler 10"),
    ):
        recipe = Recipe().override(
            plan={"rule": "fixed", "steps": steps},
            sampler={"n_steps": STEPS},
            quantization={"precisions": ("w4a8",)},
        )
        with pytest.raises(RecipeError, match=message):
            fixed_plan(recipe, STEPS)


@pytest.mark.parametrize(("held_out", "noted"), [(7, True), (8, False)])
def test_few_held_out_trajectories_are_noted(held_out: int, noted: bool) -> None:
    from ptqd_export.assemble.choose import _notes

    recipe = Recipe().override(calibration={"held_out": held_out})
    notes = _notes(recipe, Times("ort-cpu", {}, {}))
    assert bool(notes) is noted
    if noted:
        assert notes[0].startswith("7 held-out trajectories: the check of the noise and the sampled errors")


@pytest.mark.parametrize(
    ("saturates", "backend", "precisions", "noted"),
    [
        (True, "ort-cpu", ["fp32", "w8a8"], True),
        (True, "ort-cpu", ["fp32", "w8a8+", "w4a8"], True),
        (True, "ort-cpu", ["fp32", "w8a8", "w7a8"], False),
        (True, "ort-cpu", ["fp32", "w4a8", "w8a8-fp8", "w8a16"], False),
        (True, "tensorrt", ["fp32", "w8a8"], False),
        (False, "ort-cpu", ["fp32", "w8a8"], False),
    ],
)
def test_slow_products_are_noted(
    saturates: bool, backend: str, precisions: list[str], noted: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    from ptqd_export.assemble.choose import _notes

    monkeypatch.setattr(backends, "saturates", lambda: saturates)
    recipe = Recipe().override(quantization={"precisions": tuple(precisions)})
    notes = _notes(recipe, Times(backend, {}, {}))
    assert ["--precision w7a8" in note for note in notes] == [True] * noted
    monkeypatch.setattr(backends, "exact_integers", lambda: False)
    older = _notes(recipe, Times(backend, {}, {}))
    assert ["before 1.31" in note for note in older] == [True] * (saturates and backend == "ort-cpu")


def test_a_plan_and_its_rivals_are_sampled_once_each() -> None:
    """What came out stands beside what was predicted, by the objective."""

    class Loop:
        sampling = range(STEPS)
        asked: ClassVar[list[str]] = []

        def end(self, plan: Plan) -> End:
            self.asked.append(str(plan))
            return End(np.array([0.1, 0.1]) * len(self.asked), 7.0)

    _, choice = chosen(ALL, rule="budget", cost="time", budget=0.6)
    found = sampled(choice, Loop())  # type: ignore[arg-type]
    assert Loop.asked == list(dict.fromkeys(r.plan for r in choice.compared))
    assert found.compared[0].sampled == pytest.approx(0.1) and found.compared[0].standard_error == 0
    assert found.compared[1].sampled == found.compared[2].sampled == pytest.approx(0.2)  # one plan
    assert [replace(r, sampled=None, standard_error=None) for r in found.compared] == list(choice.compared)
    other = sampled(replace(choice, objective="distribution"), Loop())  # type: ignore[arg-type]
    assert all((r.sampled, r.standard_error) == (7.0, None) for r in other.compared)
