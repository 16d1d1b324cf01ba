"""The page that inspect prints: a row per step, memory of engines, and no check that is none."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from helpers import Built

from ptqd_export.bundle import Bundle
from ptqd_export.bundle.manifest import GateRecord
from ptqd_export.core.backend import Emission
from ptqd_export.core.figures import QuantizedFigures
from ptqd_export.core.gate import Kept
from ptqd_export.evaluate.inspect import KINDS, _decibels, _memory, per_step, plan_lines, plot_bundle, text


def test_rows_are_those_of_the_tables(rgb: Built) -> None:
    """Of the numerics that the best backend runs; none at full precision."""
    bundle = rgb.bundle
    m = bundle.manifest
    rows = per_step(bundle)
    assert [row.precision for row in rows] == [str(p) for p in m.plan.steps]
    assert [row.timestep for row in rows] == m.sampling.schedule.timesteps.tolist()
    np.testing.assert_allclose([row.snr_f for row in rows], m.sampling.schedule.snr)
    for row, precision in zip(rows, m.plan.steps, strict=True):
        if precision.is_float:
            assert (row.k, row.bias, row.snr_q, row.kept) == (0.0, 0.0, None, "nothing")
            continue
        stats = bundle.stats(precision, Emission.ORT_CPU)
        correction = bundle.correction(precision, Emission.ORT_CPU)
        assert row.k == stats.k[row.step] and row.snr_q == stats.snr[row.step]
        assert row.bias == pytest.approx(np.sqrt((stats.bias[row.step] ** 2).mean()))
        touched = (correction.gain[row.step] != 1).any() or correction.offset[row.step].any()
        assert (row.kept != "nothing") == touched


def test_the_page(rgb: Built, classes: Built) -> None:
    bundle = rgb.bundle
    page = text(bundle, per_step(bundle))
    lines = page.splitlines()
    assert lines[0] == "rgb: 3x16x16, no classes, epsilon prediction"
    assert "recalibrated variance on" in lines[1] and "eta 1" in lines[1]
    assert page.count("\nnote: ") == len(bundle.manifest.choice.notes)
    # Parity of three emissions, SNR_Q, corrections of two numerics, the end of noise in groups, layers.
    assert sum(line.startswith("  w8a8") for line in lines) == 8
    assert len([line for line in lines if line.split()[:1] in (["0"], ["1"], ["2"], ["3"])]) == 4
    assert "5 classes" in text(classes.bundle, per_step(classes.bundle))


def test_plans_stand_beside_their_rivals(rgb: Built) -> None:
    """Predicted and sampled; a plan that was not sampled has a dash."""
    m = rgb.bundle.manifest
    lines = plan_lines(m.choice, m.plan)
    assert lines[0] == f"plan (fixed, paired error, cost in time): {m.plan}"
    assert len(lines) == 3 + 3
    for line, r in zip(lines[3:], m.choice.compared, strict=True):
        assert r.sampled is not None and r.standard_error is not None
        assert line.startswith(f"  {KINDS[r.kind]}") and line.endswith(f"  {r.plan}")
        assert f"{r.predicted:.3g}" in line and f"{r.sampled:.3g} ± {r.standard_error:.0%}" in line
    blank = tuple(replace(r, sampled=None, standard_error=None) for r in m.choice.compared)
    lines = plan_lines(replace(m.choice, compared=blank, cost="bops"), m.plan)
    assert "10^9 BOPs" in lines[2] and all("±" not in line and " - " in line for line in lines[3:])
    quiet = replace(rgb.bundle, manifest=replace(m, choice=replace(m.choice, sensitivity=None)))
    shown = "error at the end (paired) of steps at one precision"
    assert shown in text(rgb.bundle, []) and shown not in text(quiet, [])


def test_what_the_gate_kept_is_said_in_words(rgb: Built) -> None:
    bundle = rgb.bundle
    correction = bundle.manifest.correction
    kept: tuple[Kept, ...] = ("both", "bias", "nothing", "both")
    for limit, why in (
        (3.5, "k and bias kept where |z|, over their errors, is above 3.5"),
        (0.0, "not gated"),
    ):
        record = GateRecord(kept, (-9.0, 1.0, 0.5, 4.0), (4.0, -5.0, 0.1, 7.0), limit)
        changed = replace(correction, steps=dict.fromkeys(correction.steps, record))
        other: Bundle = replace(bundle, manifest=replace(bundle.manifest, correction=changed))
        lines = text(other, per_step(other)).splitlines()
        start = lines.index(f"correction ptqd ({why}):")
        assert lines[start + 1].endswith(
            "k and bias at 2, the bias alone at 1, nothing at 1 of 4 steps; |z|: k 0.5 to 9.0, "
            "bias 0.1 to 7.0"
        )
    rows = [(row.kept, row.precision) for row in per_step(other)]
    assert all(found == ("nothing" if name == "fp32" else kept[i]) for i, (found, name) in enumerate(rows))


def test_a_limit_that_means_nothing_is_not_shown(rgb: Built) -> None:
    """One that does is."""
    bundle = rgb.bundle
    page = text(bundle, per_step(bundle))
    assert (
        "standard errors" not in page and page.count("noise not judged: too few held-out trajectories") == 9
    )
    judged = {
        name: replace(f, noise=replace(f.noise, limit_z=5.25)) if isinstance(f, QuantizedFigures) else f
        for name, f in bundle.manifest.parity.items()
    }
    other: Bundle = replace(bundle, manifest=replace(bundle.manifest, parity=judged))
    page = text(other, per_step(other))
    assert "not judged" not in page and page.count("standard errors (limit 5.2)") == 9


def test_memory_of_several_engines() -> None:
    """Weights add up, scratch is shared; where one is not known, nothing is."""
    assert _memory([(10**6, 5 * 10**6), (2 * 10**6, 3 * 10**6)]) == (
        "3.0 MB of weights in 2 engines, 5.0 MB of shared scratch"
    )
    for unknown in (None, 10**6), (10**6, None):
        assert _memory([(10**6, 10**6), unknown]).startswith("not known: ")


def test_plots_of_a_bundle(rgb: Built, own: Built, tmp_path: Path) -> None:
    """Steps, and the front where there is one."""
    for name, built in (("rgb", rgb), ("own", own)):
        plot_bundle(built.bundle, tmp_path / f"{name}.png")
    assert sorted(path.name for path in tmp_path.iterdir()) == [
        "own-pareto.png",
        "own.png",
        "rgb-pareto.png",
        "rgb.png",
    ]
    choice = replace(rgb.bundle.manifest.choice, front=())
    plot_bundle(
        replace(rgb.bundle, manifest=replace(rgb.bundle.manifest, choice=choice)), tmp_path / "no.png"
    )
    assert (tmp_path / "no.png").is_file() and not (tmp_path / "no-pareto.png").exists()


def test_ratios_of_powers_in_decibels() -> None:
    found = [_decibels(snr) for snr in (None, 100.0, 1.0, 0.5, 0.0)]
    assert found == ["inf", "20.0", "0.0", "-3.0", "-inf"]
