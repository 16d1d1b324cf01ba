"""Corrections are fitted on some trajectories, judged on others, and their sums are kept for a stopped
build."""

from __future__ import annotations

from dataclasses import fields
from pathlib import Path

import numpy as np
import pytest

from ptqd_export.assemble import measure
from ptqd_export.assemble.measure import conclude, key_of
from ptqd_export.core.noise import NoiseStats
from ptqd_export.recipe import QuantizationSpec, Recipe

T, C = 3, 2


def stats(rng: np.random.Generator, n: int, gain: float) -> list[NoiseStats]:
    """Trajectories whose engine predicts `gain` times the right thing, and a little noise."""
    parts = []
    for _ in range(n):
        total = NoiseStats.zeros(T, C)
        for step in range(T):
            e = rng.standard_normal((1, C, 400))
            total += NoiseStats.of_step(step, T, e, gain * e + 0.01 * rng.standard_normal(e.shape))
        parts.append(total)
    return parts


def test_what_is_there_is_kept_and_what_is_not_is_not(rng: np.random.Generator) -> None:
    """A network that is a tenth too loud is turned down; one that is right is left alone. The held-out
    trajectories judge the error, and decide nothing."""
    found = conclude(QuantizationSpec(), stats(rng, 8, 1.1), stats(rng, 8, 1.1))
    np.testing.assert_allclose(found.correction.gain, 1 / 1.1, rtol=0.01)
    plain = NoiseStats.pool(found.held_out).mse(np.ones((T, C)), np.zeros((T, C)))
    assert (found.error() < 0.1 * plain).all()
    record = found.record()
    assert record.kept == ("k",) * T and all(z > record.limit > 3 for z in record.z_k)
    right = conclude(QuantizationSpec(), stats(rng, 8, 1.0), stats(rng, 8, 1.1))
    assert right.record().kept == ("nothing",) * T
    assert (right.correction.gain == 1).all() and not right.correction.offset.any()


def test_without_a_gate_and_without_a_correction(rng: np.random.Generator) -> None:
    calibration, held_out = stats(rng, 4, 1.1), stats(rng, 4, 0.9)
    for mode, kept in (("ptqd", "both"), ("bias", "bias"), ("affine", "affine"), ("none", "nothing")):
        spec = QuantizationSpec(correction=mode, gate=False)  # type: ignore[arg-type]
        record = conclude(spec, calibration, held_out).record()
        assert record.kept == (kept,) * T and record.limit == 0
    none = conclude(QuantizationSpec(correction="none"), calibration, held_out)
    assert (none.correction.gain == 1).all() and none.record().kept == ("nothing",) * T


def test_the_noise_of_the_first_step(rng: np.random.Generator) -> None:
    """RMS of D = 0.1 e + 0.01 z, of unit variance both."""
    found = conclude(QuantizationSpec(), stats(rng, 8, 1.1), stats(rng, 8, 1.1))
    assert found.first_step_rms() == pytest.approx(np.sqrt(0.1**2 + 0.01**2), rel=0.05)


def test_sums_come_back_and_damaged_ones_do_not(rng: np.random.Generator, tmp_path: Path) -> None:
    parts, file = stats(rng, 3, 1.1), tmp_path / "stats.safetensors"
    assert measure._load_stats(file) is None
    measure._save_stats(file, parts)
    read = measure._load_stats(file)
    assert read is not None and len(read) == 3
    for got, expected in zip(read, parts, strict=True):
        for field in fields(NoiseStats):
            np.testing.assert_array_equal(getattr(got, field.name), getattr(expected, field.name))
    whole = file.read_bytes()
    for damaged in (b"", whole[:-8], b"\xff" + whole[1:]):
        file.write_bytes(damaged)
        assert measure._load_stats(file) is None


def test_keys_tell_values_apart() -> None:
    assert key_of({"a": 1, "b": 2}) == key_of({"b": 2, "a": 1})
    assert len({key_of(1, 2), key_of(2, 1), key_of([1, 2]), key_of("1", 2), key_of(1)}) == 5


def test_where_the_noise_is_measured(rng: np.random.Generator, monkeypatch: pytest.MonkeyPatch) -> None:
    """On its own trajectory a network is led by the correction that the build will fold in; the held-out
    trajectories stay those of full precision, on which the graphs are judged."""
    parts, held_out = stats(rng, 8, 1.1), stats(rng, 2, 1.1)
    asked: list[object] = []

    def on_stored(engine: str, sampling: str, paths: str, subset: str, what: str) -> list[NoiseStats]:
        asked.append((engine, subset))
        return [*parts, *held_out] if subset == "all" else held_out

    def on_own(*args: object) -> list[NoiseStats]:
        engine, reference, _, _, seed, correct, recalibrate, _ = args
        asked.append((engine, reference, seed, recalibrate))
        folded = conclude(QuantizationSpec(), parts, ()).correction
        np.testing.assert_array_equal(correct(parts).gain, folded.gain)  # type: ignore[operator]
        return parts

    monkeypatch.setattr(measure, "measure", on_stored)
    monkeypatch.setattr(measure, "measure_own", on_own)
    recipe = Recipe().override(calibration={"seed": 5})
    for trajectory in ("full_precision", "own"):
        recipe = recipe.override(calibration={"trajectory": trajectory})
        found = measure._measure(recipe, "q", "fp", "s", "paths", "noise")  # type: ignore[arg-type]
        assert found == [*parts, *held_out]
    assert asked == [("q", "all"), ("q", "fp", 5, True), ("q", "held_out")]
