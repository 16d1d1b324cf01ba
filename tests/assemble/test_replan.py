"""Another plan for a bundle: from its own figures, in one step, and nothing else of it changes."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from helpers import Built, copied, listing

from ptqd_export.assemble.decide import Known
from ptqd_export.assemble.replan import replan, spec_of, write_plan
from ptqd_export.bundle import Bundle, Manifest
from ptqd_export.core.plan import by_snr, fixed, pareto_front
from ptqd_export.core.precision import FP32, Precision
from ptqd_export.errors import BundleError, RecipeError
from ptqd_export.runtime import Runtime

W8A8, W4A8, W4A4 = Precision(8, 8), Precision(4, 8), Precision(4, 4)


def changed(bundle: Bundle, **changes: Any) -> Bundle:
    m = bundle.manifest
    return replace(bundle, manifest=replace(m, choice=replace(m.choice, **changes)))


def test_the_same_rule_gives_the_same_plan(guided: Built) -> None:
    """A bundle holds all that its plan was chosen by, and what was sampled of it."""
    m = guided.bundle.manifest
    spec = spec_of(m)
    assert (spec.rule, spec.objective, spec.cost) == ("budget", "paired", "bops")
    assert spec.budget == pytest.approx(0.3)
    plan, choice = replan(guided.bundle, spec)
    assert plan == m.plan and choice.front == m.choice.front and choice.compared == m.choice.compared
    same = replace(m.choice, notes=choice.notes, budget=choice.budget)
    assert (
        choice == same
        and choice.budget == pytest.approx(m.choice.budget)
        and set(choice.notes) == set(m.choice.notes)
    )


def test_other_rules(guided: Built) -> None:
    bundle, m = guided.bundle, guided.bundle.manifest
    bops = {p: float(v) for p, v in m.bops.items()}
    costs = []
    for budget in (0.05, 0.2, 0.6, 1.0):
        plan, choice = replan(bundle, spec_of(m, budget=budget))
        assert plan.total(bops) <= max(budget * bops[FP32] * len(plan), bops[W4A4] * len(plan)) * (1 + 1e-9)
        assert choice.budget == pytest.approx(budget * bops[FP32] * len(plan))
        costs.append(plan.total(bops))
    assert costs == sorted(costs) and costs[0] < costs[-1] and plan.precisions == (FP32,)
    known = Known.of(m)
    assert replan(bundle, spec_of(m, rule="snr"))[0] == by_snr(known.snr, bops, m.sampling.schedule)
    assert str(replan(bundle, spec_of(m, rule="paper"))[0]) == "w4a4*1 w4a8*2"
    ends = replan(bundle, spec_of(m, rule="first-last", budget=0.9))[0]
    assert ends.steps[0] == ends.steps[-1] == FP32 and ends.steps[1] != FP32
    by_hand, choice = replan(bundle, spec_of(m, rule="fixed", steps=("w4a8,w8a8*2",)))
    assert str(by_hand) == "w4a8*1 w8a8*2" and choice.rule == "fixed"
    assert spec_of(m, rule="fixed", steps=("w8a8",)).budget == pytest.approx(0.3)
    timed, choice = replan(bundle, spec_of(m, cost="time", budget=1.0))
    assert choice.cost == "time" and choice.bops == timed.total(bops)


def test_what_was_sampled_belongs_to_a_plan_and_an_objective(guided: Built) -> None:
    bundle, m = guided.bundle, guided.bundle.manifest
    own = m.choice.compared[0]
    assert own.sampled is not None
    by_hand = spec_of(m, rule="fixed", steps=tuple(own.plan.split()))
    assert replan(bundle, by_hand)[1].compared[0].sampled == own.sampled
    other = spec_of(m, rule="fixed", steps=("w4a8*1 w4a4*1 w8a8*1",))
    assert replan(bundle, other)[1].compared[0].sampled is None
    apart = replan(bundle, replace(by_hand, objective="distribution"))[1]
    assert all(r.sampled is None for r in apart.compared)
    assert apart.compared[0].predicted != own.predicted


def test_a_plan_by_hand_leaves_a_budget_to_be_asked_for(own: Built) -> None:
    m = own.bundle.manifest
    assert m.choice.rule == "fixed" and m.choice.cost == "time"
    spec = spec_of(m)
    assert (spec.rule, spec.budget) == ("budget", 1.0)
    with pytest.raises(RecipeError, match="counts time: with --cost bops, give --budget too"):
        spec_of(m, cost="bops")
    assert spec_of(m, cost="bops", budget=0.5).budget == 0.5
    assert spec_of(m, cost="bops", rule="snr").rule == "snr"
    for wrong in (0.0, -1.0, 1.5, float("nan")):
        with pytest.raises(RecipeError, match=r"plan.budget|finite"):
            spec_of(m, budget=wrong)


@pytest.mark.parametrize(
    ("steps", "message"),
    [
        ("w8a8*2", "steps"),
        ("w2a2", "w2a2"),
        ("int8", "not known"),
    ],
)
def test_plans_that_do_not_fit(own: Built, steps: str, message: str) -> None:
    with pytest.raises(RecipeError, match=message):
        replan(own.bundle, spec_of(own.bundle.manifest, rule="fixed", steps=(steps,)))


def test_figures_of_other_steps_or_precisions(own: Built) -> None:
    """A manifest may come from anywhere."""
    c = own.bundle.manifest.choice
    assert c.sensitivity is not None
    short = {p: row[:-1] for p, row in c.error.items()}
    for wrong in (
        {"error": short},
        {"error": {}},
        {"snr_q": {p: (*row, 1.0) for p, row in c.snr_q.items()}},
        {"seconds_error": {W8A8: 1.0}},
        {"seconds_per_evaluation": {**c.seconds_per_evaluation, Precision(2, 2): 1.0}},
        {"sensitivity": replace(c.sensitivity, groups=(5, *c.sensitivity.groups[1:]))},
        {"sensitivity": replace(c.sensitivity, paired={}, distribution={})},
    ):
        bundle = changed(own.bundle, **wrong)
        with pytest.raises(BundleError, match="figures are not of its steps and precisions"):
            replan(bundle, spec_of(own.bundle.manifest))
    for negative in (
        {"error": {p: tuple(-1.0 for _ in row) for p, row in c.error.items()}},
        {"seconds_per_evaluation": {p: -1.0 for p in c.seconds_per_evaluation}},
    ):
        with pytest.raises(BundleError, match="negative costs or errors"):
            replan(changed(own.bundle, **negative), spec_of(own.bundle.manifest))
    assert replan(changed(own.bundle, sensitivity=None), spec_of(own.bundle.manifest))


def test_without_a_measurement_noise_is_what_it_is(own: Built) -> None:
    bundle = changed(own.bundle, sensitivity=None)
    known = Known.of(bundle.manifest)
    _, choice = replan(bundle, spec_of(bundle.manifest, cost="bops", budget=0.3))
    front = pareto_front(known.error, known.bops)
    assert [(p.error, p.plan) for p in choice.front] == [(p.error, str(p.plan)) for p in front]


def written(built: Built, tmp_path: Path, out: str) -> tuple[Bundle, Bundle]:
    path = copied(built, tmp_path)
    old = Bundle.open(path)
    plan, choice = replan(old, spec_of(old.manifest, rule="fixed", steps=("w4a8*1 w8a8*2",)))
    return old, write_plan(old, plan, choice, path.parent / out)


@pytest.mark.parametrize("out", ["bundle", "other"])
def test_a_bundle_with_another_plan(guided: Built, tmp_path: Path, out: str) -> None:
    """Its files are the same; the old one stands, unless it is replaced."""
    old, new = written(guided, tmp_path, out)
    assert str(new.manifest.plan) == "w4a8*1 w8a8*2" and new.seal != old.seal
    assert new.manifest.files == old.manifest.files
    same = replace(new.manifest, plan=old.manifest.plan, choice=old.manifest.choice)
    assert Manifest.to_dict(same) == Manifest.to_dict(old.manifest)
    place = old.path.parent
    assert sorted(p.name for p in place.iterdir()) == sorted({"bundle", out})
    if out == "other":
        assert Bundle.open(old.path).seal == old.seal
        inodes = [(place / name / "weights.safetensors").stat().st_ino for name in ("bundle", "other")]
        assert inodes[0] == inodes[1]
    with Runtime(new, "ort-cpu") as runtime, Runtime(old, "ort-cpu", plan=new.manifest.plan) as told:
        assert set(runtime.engines) == {W4A8, W8A8}
        np.testing.assert_array_equal(runtime.sample(range(2)), told.sample(range(2)))
    sigmas = new.sigmas("ort-cpu")
    assert (sigmas != old.sigmas("ort-cpu")).any() == (new.manifest.plan != old.manifest.plan)


def test_a_bundle_that_changed_meanwhile_is_not_passed_on(own: Built, tmp_path: Path) -> None:
    path = copied(own, tmp_path)
    old = Bundle.open(path)
    plan, choice = replan(old, spec_of(old.manifest, rule="snr"))
    (path / "quantization.safetensors").write_bytes(b"something else")
    before = listing(path.parent)
    with pytest.raises(BundleError):
        write_plan(old, plan, choice, path.parent / "other")
    assert listing(path.parent) == before


def test_a_precision_without_its_finished_engine(own: Built, tmp_path: Path) -> None:
    old = own.bundle
    m = old.manifest
    fewer = replace(old, manifest=replace(m, artifacts=tuple(a for a in m.artifacts if a.precision != W8A8)))
    _, choice = replan(old, spec_of(m, rule="snr"))
    with pytest.raises(BundleError, match="no finished engines of w8a8: rebuild it"):
        write_plan(fewer, fixed(["w8a8"], len(m.plan)), choice, tmp_path / "other")
    assert list(tmp_path.iterdir()) == []
