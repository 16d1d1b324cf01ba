"""benchmarks/plan_ranking.py: which plans it ranks, by what, and what it makes of it."""

from __future__ import annotations

import argparse
import importlib
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest
from helpers import Built

from ptqd_export.core.precision import FP32, Precision
from ptqd_export.core.schedule import NoiseSchedule

W8A8 = Precision(8, 8)


@pytest.fixture
def script(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    monkeypatch.syspath_prepend(Path(__file__).parents[1] / "benchmarks")
    return importlib.import_module("plan_ranking")


def test_random_plans_repeat_themselves(script: ModuleType) -> None:
    plans = script.at_random(7, 20)
    assert plans == script.at_random(7, 20) != script.at_random(7, 20, seed=1)
    assert next(iter(plans)) == "random 1" and all(len(plan) == 20 for plan in plans.values())
    assert len({str(plan) for plan in plans.values()}) == 7
    assert all(1 <= len(list(plan.runs())) <= 4 for plan in plans.values())


def test_the_old_weights_favour_early_steps_for_pairs_and_late_ones_for_distribution(
    script: ModuleType,
) -> None:
    schedule = NoiseSchedule.from_config({"clip_sample": False}, 20, 0.0)
    paired, distribution = (script.old_weights(schedule, o) for o in script.OBJECTIVES)
    assert (np.diff(paired) < 0).all() and (np.diff(distribution) > 0).all()


def test_what_it_writes(script: ModuleType, rgb: Built) -> None:
    """A prediction that ranks like the samples has correlation 1, one that ranks the other way -1."""
    bundle = rgb.bundle
    plans = script.seven(bundle)
    assert len(plans) == 7 and str(plans["by hand: fp32 late"]) == "w8a8*1 fp32*3"
    kinds = script.predictions(bundle, "paired")
    assert list(kinds)[1:] == ["w = 1", "measured sensitivity"]
    errors = {p: np.array(e) for p, e in bundle.manifest.choice.error.items()}
    np.testing.assert_array_equal(kinds["w = 1"][W8A8], errors[W8A8])
    np.testing.assert_allclose(
        next(iter(kinds.values()))[W8A8], errors[W8A8] / bundle.manifest.sampling.schedule.alphas_cumprod_prev
    )
    assert all(not table[FP32].any() for table in kinds.values())
    measured = {
        objective: [plan.error(script.predictions(bundle, objective)["measured sensitivity"])
                    for plan in plans.values()]
        for objective in script.OBJECTIVES
    }  # fmt: skip
    sampled = {"paired": measured["paired"], "distribution": [-v for v in measured["distribution"]]}
    args = argparse.Namespace(samples=3, seed=5)
    lines = script.report(bundle, plans, sampled, args).splitlines()
    assert "| measured sensitivity | 1.000 | -1.000 |" in lines
    assert sum(line.startswith("| by hand") for line in lines) == 4
    assert "3 samples of seed 5 per plan" in lines[-1]
    quiet = {o: list(range(7)) for o in script.OBJECTIVES}
    assert script.rank_correlation(quiet["paired"], [2 * v for v in quiet["paired"]]) == pytest.approx(1.0)
