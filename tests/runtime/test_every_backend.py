"""One body over every backend: what works here runs, what does not says why."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from helpers import Built, Invoke

from ptqd_export.backends import OrtEngine, check
from ptqd_export.bundle.bundle import Bundle
from ptqd_export.calibrate import collect, measure, open_model
from ptqd_export.core.backend import BACKENDS, ENGINE_BACKENDS, RUNNABLE
from ptqd_export.core.noise import Correction
from ptqd_export.errors import BackendUnavailable, ParityError
from ptqd_export.parity.judgement import ROUNDING
from ptqd_export.parity.noise import check_noise, max_standard_errors
from ptqd_export.recipe import Recipe
from ptqd_export.runtime import Runtime, run
from ptqd_export.runtime.open import open_artifact

EVERY = [pytest.param(name, marks=pytest.mark.gpu if BACKENDS[name].on_device else ()) for name in RUNNABLE]


@pytest.fixture
def bundle(request: pytest.FixtureRequest, rgb: Built, tmp_path: Path, invoke: Invoke) -> Bundle:
    """The RGB bundle, with engines of the backend where it builds them; skips where the backend does not
    work."""
    backend = request.getfixturevalue("backend")
    try:
        check(backend)
    except BackendUnavailable as error:
        pytest.skip(str(error))
    if backend not in ENGINE_BACKENDS:
        return rgb.bundle
    result = invoke("build", rgb.recipe, "--out", tmp_path / "bundle", *rgb.options, "--backend", backend)
    assert result.code == 0, result
    return Bundle.open(tmp_path / "bundle")


@pytest.mark.parametrize("backend", EVERY)
def test_noise_is_that_of_the_graph_as_written(
    backend: str, bundle: Bundle, rgb: Built, tmp_path: Path
) -> None:
    """k, bias, variance and error per step, against ONNX Runtime's CPU provider without optimisations; a
    wrong table is caught."""
    m = bundle.manifest
    recipe = Recipe.load(rgb.recipe).override(
        sampler={"n_steps": 4, "eta": 1.0}, calibration={"size": 2, "held_out": 6}
    )
    network = open_model(recipe)
    trajectories = collect(network, m.sampling, recipe, tmp_path / "trajectories")
    rounding = ROUNDING[BACKENDS[backend].floats]
    for precision in m.plan.precisions:
        if precision.is_float:
            continue
        with OrtEngine(
            bundle.file(m.graph(precision, BACKENDS[backend].emission).file), optimise=False
        ) as written:
            expected = measure(written, m.sampling, trajectories, "held_out")
        with open_artifact(bundle, m.artifact(precision, backend), None) as engine:
            got = measure(engine, m.sampling, trajectories, "held_out")
        figures = check_noise(str(precision), got, expected, rounding)
        n, channels = len(m.sampling.schedule), m.sampling.model.channels
        assert max(figures.largest_z.values()) <= max_standard_errors(6, n * (3 + channels))
        off = Correction(np.full((n, channels), 1.2), np.zeros((n, channels)), np.zeros(n))
        with pytest.raises(ParityError):
            check_noise(str(precision), [part.corrected(off) for part in got], expected, rounding)


@pytest.mark.parametrize("backend", EVERY)
def test_samples_are_those_of_the_cpu(backend: str, bundle: Bundle) -> None:
    """Alike as two right executions are, unlike another seed's; the same twice; and whatever the batch."""
    x = run(bundle, 5, seed=3, batch_size=5, backend=backend)
    with Runtime(bundle, backend) as runtime:
        np.testing.assert_array_equal(x, runtime.sample(range(5), seed=3))
        pairs = [runtime.sample(range(start, min(start + 2, 5)), seed=3) for start in (0, 2, 4)]
    with Runtime(bundle, "ort-cpu") as runtime:
        cpu, other = (runtime.sample(range(5), seed=seed) for seed in (3, 4))
    assert np.square(x - cpu).mean() < 0.1 * np.square(x - other).mean()
    assert np.square(x - np.concatenate(pairs)).mean() < 0.1 * np.square(x - other).mean()


@pytest.mark.parametrize("backend", EVERY)
def test_engines_stay_warm_across_runs(backend: str, bundle: Bundle) -> None:
    with Runtime(bundle, backend) as runtime:
        first, second = runtime.sample(range(3), seed=1), runtime.sample(range(3), seed=2)
        np.testing.assert_array_equal(runtime.sample(range(3), seed=1), first)
        assert np.abs(first - second).max() > 0.1
