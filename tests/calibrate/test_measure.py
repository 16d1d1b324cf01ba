"""Noise of an engine on stored trajectories."""

from __future__ import annotations

import numpy as np
import pytest
from cases import Case

from ptqd_export.calibrate import TorchEngine, measure
from ptqd_export.calibrate.measure import Subset
from ptqd_export.core.engine import Engine, FakeEngine
from ptqd_export.core.noise import NoiseStats
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
    with pytest.raises(ParityError, match="NaN or infinite values at step 0"):
        run(FakeEngine(lambda f: f["sample"] * np.nan, ("sample", "timestep", "class_labels")))
