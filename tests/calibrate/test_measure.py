"""Noise of an engine on stored trajectories."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import replace

import numpy as np
import pytest
from cases import Case

from ptqd_export.calibrate import TorchEngine, measure, measure_own
from ptqd_export.calibrate.measure import Subset
from ptqd_export.calibrate.trajectories import CALIBRATION_STREAM
from ptqd_export.core.engine import Engine, FakeEngine
from ptqd_export.core.noise import Correction, Mode, NoiseStats
from ptqd_export.errors import ParityError


def test_measure(case: Case) -> None:
    _, network, sampling, trajectories, _ = case

    def run(engine: Engine, subset: Subset = "all") -> list[NoiseStats]:
        return measure(engine, sampling, trajectories, subset)

    with TorchEngine(network.module, sampling) as engine:
        exact = run(engine)
        biased = FakeEngine(lambda f: 1.1 * engine(f)["epsilon"] + 0.5, engine.inputs)
        stats = run(biased)
        assert [len(run(biased, s)) for s in ("calibration", "held_out")] == [4, 2]
        np.testing.assert_array_equal(stats[4].d, run(biased, "held_out")[0].d)
    assert len(exact) == 6 and NoiseStats.pool(exact).snr.min() > 1e8
    pooled = NoiseStats.pool(stats)
    np.testing.assert_allclose(pooled.count, 6 * 64)
    np.testing.assert_allclose(pooled.k, 0.1, atol=1e-4)
    np.testing.assert_allclose(pooled.bias, 0.5, atol=1e-4)
    with TorchEngine(network.module, sampling) as engine:
        biased = FakeEngine(lambda f: 1.1 * engine(f)["epsilon"] + 0.5, engine.inputs)
        some = measure(biased, sampling, trajectories, "held_out", steps=[1])
        assert biased.calls == 1
    for part, whole in zip(some, stats[4:], strict=True):
        np.testing.assert_array_equal(part.dd, whole.only([1]).dd)
        assert part.count[1] > 0 and not np.delete(part.count, 1).any()
    with pytest.raises(ParityError, match="NaN or infinite values at step 0"):
        run(FakeEngine(lambda f: f["sample"] * np.nan, ("sample", "timestep", "class_labels")))


def test_large_samples_are_taken_in_parts(case: Case, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whose attention would take too much memory at once; the sums are the same."""
    _, network, sampling, trajectories, _ = case
    with TorchEngine(network.module, sampling) as engine:
        counted = FakeEngine(lambda f: 1.1 * engine(f)["epsilon"], engine.inputs)
        whole = measure(counted, sampling, trajectories)
        batches, counted.calls = counted.calls, 0
        per_sample = 32 * (8 * 8) ** 2 * sampling.branches
        for fits, calls in (
            (1000, batches),
            (1, len(whole) * len(sampling)),
            (0, len(whole) * len(sampling)),
        ):
            monkeypatch.setattr(sys.modules[measure.__module__], "ATTENTION", fits * per_sample)
            counted.calls = 0
            parts = measure(counted, sampling, trajectories)
            assert counted.calls == calls
            for one, other in zip(whole, parts, strict=True):
                np.testing.assert_allclose(one.dd, other.dd, rtol=1e-4)


@pytest.mark.parametrize("eta", [0.0, 1.0])
def test_own_trajectory(case: Case, eta: float) -> None:
    """A network that its correction makes right stays on the full-precision trajectory, noise and all: there
    the sums are those of that. Without the correction it leaves, and the sums are of other states."""
    recipe, network, sampling, trajectories, _ = case
    sampling = replace(sampling, schedule=replace(sampling.schedule, eta=eta))
    visited: list[np.ndarray] = []
    with TorchEngine(network.module, sampling) as engine:
        loud = FakeEngine(lambda f: 1.1 * engine(f)["epsilon"] + 0.5, engine.inputs)

        def run(mode: Mode) -> NoiseStats:
            def correct(parts: Sequence[NoiseStats]) -> Correction:
                assert len(parts) == 4 and all((p.count == parts[0].count).all() for p in parts)
                steps.append(int((parts[0].count > 0).sum()))
                return Correction.from_stats(NoiseStats.pool(parts), mode)

            steps: list[int] = []
            seed = recipe.calibration.seed
            found = measure_own(loud, engine, sampling, trajectories, seed, correct)
            assert steps == list(range(1, len(sampling) + 1))
            return NoiseStats.pool(found)

        streams = [CALIBRATION_STREAM + i for i in trajectories.calibration]
        conditions = trajectories.first(4).conditions
        sampling.sample(
            lambda _: engine,
            conditions,
            streams,
            seed=recipe.calibration.seed,
            on_step=lambda i, x, e: visited.append(e),
        )
        right, left = run("ptqd"), run("none")
        with pytest.raises(ParityError, match="NaN or infinite values at step 0"):
            broken = FakeEngine(lambda f: f["sample"] * np.nan, engine.inputs)
            measure_own(broken, engine, sampling, trajectories, 0, lambda parts: Correction.identity(1, 1))
    ee = np.stack([(e**2).sum((0, 2, 3)) for e in visited])
    np.testing.assert_allclose(right.ee, ee, rtol=1e-3)
    np.testing.assert_allclose(right.k, 0.1, atol=1e-4)
    np.testing.assert_allclose(right.bias, 0.5, atol=1e-4)
    np.testing.assert_allclose(left.ee[0], ee[0], rtol=1e-3)
    assert (np.abs(left.ee[-1] / ee[-1] - 1) > 0.01).all()
