"""The plan is that of the recipe's rule, and the record of the choice says how it came about."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from ptqd_export.assemble.choose import choose, fixed_plan
from ptqd_export.assemble.measure import Measured
from ptqd_export.assemble.timing import Times
from ptqd_export.core.backend import Emission
from ptqd_export.core.noise import Correction, NoiseStats
from ptqd_export.core.precision import FP32, Precision
from ptqd_export.core.quant import Grid, LayerQuant, QuantizedNetwork
from ptqd_export.core.schedule import NoiseSchedule
from ptqd_export.errors import RecipeError
from ptqd_export.recipe import Recipe

W8A8, W4A8 = Precision(8, 8), Precision(4, 8)
STEPS = 10


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
    return Measured(parts, parts, Correction.identity(STEPS, 1), zeros > 0, zeros, zeros)


def chosen(times: dict[Precision, float], backend: str = "ort-cpu", **plan: Any) -> Any:
    recipe = Recipe().override(
        plan=plan, sampler={"n_steps": STEPS}, quantization={"precisions": tuple(map(str, times))}
    )
    noise = {W8A8: 0.01, W4A8: 0.1}
    known = {(p, e): measured(noise[p]) for p in times if not p.is_float for e in Emission}
    schedule = NoiseSchedule.from_config({"clip_sample": False}, STEPS, 0.0)
    return choose(
        recipe, schedule, {p: network(p) for p in times}, known, Times(backend, times, ("why not",))
    )


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
            fixed_plan(recipe)


@pytest.mark.parametrize(("held_out", "noted"), [(7, True), (8, False)])
def test_few_held_out_trajectories_are_noted(held_out: int, noted: bool) -> None:
    from ptqd_export.assemble.choose import _notes

    recipe = Recipe().override(calibration={"held_out": held_out})
    notes = _notes(recipe, ())
    assert bool(notes) is noted
    if noted:
        assert notes[0].startswith("7 held-out trajectories: the gate and the check of the noise see little")
