"""The runtime on real bundles: engines switched by plan, guidance, and samples that do not depend on how they
were batched."""

from __future__ import annotations

import dataclasses
import itertools
import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
from helpers import Built
from safetensors.numpy import load_file, save_file

from ptqd_export.backends import OrtEngine, open_engine
from ptqd_export.bundle import Bundle, write_manifest
from ptqd_export.bundle.bundle import WEIGHTS
from ptqd_export.bundle.tables import QUANTIZATION
from ptqd_export.core.backend import Emission
from ptqd_export.core.engine import EPSILON, SAMPLE, STEP, TIMESTEP, Array, Engine, FakeEngine, Feeds
from ptqd_export.core.noise import Correction
from ptqd_export.core.plan import Plan, fixed
from ptqd_export.core.precision import FP32, Precision
from ptqd_export.core.sampling import NoiseSource
from ptqd_export.errors import BundleError, ModelError, ParityError, RecipeError
from ptqd_export.runtime import Runtime, check_probe, check_settings, probe, run

W8A8 = Precision(8, 8)
FLOAT_BOUND = 1e-5
"""Of float kernels that add up in another order for another batch, relative to the largest value; measured
here: 1e-7 and less."""
FLIP_BOUND = 0.5
"""The same in an integer engine, where a float difference may flip a rounding: what flips is a share of the
quantization noise, so its RMS stays below half of that noise's; measured here: 0."""

F64 = npt.NDArray[np.float64]


def rms(x: npt.NDArray[np.floating]) -> float:
    return float(np.sqrt((x**2).mean()))


def with_plan(bundle: Bundle, *runs: str) -> Bundle:
    plan = fixed(runs, len(bundle.manifest.sampling.schedule))
    return dataclasses.replace(bundle, manifest=dataclasses.replace(bundle.manifest, plan=plan))


class Watched:
    """An engine that writes down the steps it was called for."""

    def __init__(self, engine: Engine) -> None:
        self.engine, self.inputs, self.outputs = engine, engine.inputs, engine.outputs
        self.steps: list[int] = []

    def __call__(self, feeds: Feeds) -> dict[str, Array]:
        self.steps.append(int(feeds[STEP][0]))
        return self.engine(feeds)

    def close(self) -> None:
        self.engine.close()


def test_engines_are_switched_by_the_plan(rgb: Built) -> None:
    with Runtime(rgb.bundle) as runtime:
        watched = {p: Watched(engine) for p, engine in runtime.engines.items()}
        runtime.engines.update(watched)
        runtime.sample(range(3))
        assert {str(p): w.steps for p, w in watched.items()} == {
            "w4a4": [0],
            "w4a8": [1],
            "w8a8": [2],
            "fp32": [3],
        }
    plan = fixed(["w8a8*3", "w4a4*1"], 4)
    with Runtime(rgb.bundle, plan=plan) as runtime:
        watched = {p: Watched(engine) for p, engine in runtime.engines.items()}
        runtime.engines.update(watched)
        runtime.sample(range(1))
        assert {str(p): w.steps for p, w in watched.items()} == {"w8a8": [0, 1, 2], "w4a4": [3]}


def test_a_switched_run_is_the_sampler_over_the_engines_of_the_plan(rgb: Built) -> None:
    """And it differs from a run of any one engine."""
    bundle = rgb.bundle
    m = bundle.manifest
    x = run(bundle, 4, seed=5)
    engines = {
        p: open_engine("ort-cpu", bundle.file(m.artifact(p, "ort-cpu").file)) for p in m.plan.precisions
    }
    by_hand = m.sampling.sample(
        lambda i: engines[m.plan.steps[i]], {}, range(4), seed=5, sigmas=bundle.sigmas("ort-cpu")
    )
    np.testing.assert_array_equal(x, by_hand)
    for p in m.plan.precisions:
        assert rms(run(with_plan(bundle, str(p)), 4, seed=5) - x) > 1e-3


def test_recalibrated_variance_is_what_the_plan_s_graphs_left(rgb: Built) -> None:
    bundle = rgb.bundle
    m = bundle.manifest
    sigmas = bundle.sigmas("ort-cpu")
    assert (sigmas <= m.sampling.schedule.sigmas).all() and (sigmas < m.sampling.schedule.sigmas).any()
    w4a4 = bundle.correction(Precision(4, 4), Emission.ORT_CPU)
    assert sigmas[0] == m.sampling.schedule.recalibrated_sigmas(w4a4.var)[0]
    np.testing.assert_array_equal(bundle.sigmas("ort-cpu", Plan((FP32,) * 4)), m.sampling.schedule.sigmas)
    off = dataclasses.replace(bundle, manifest=dataclasses.replace(m, recalibrate_variance=False))
    np.testing.assert_array_equal(off.sigmas("ort-cpu"), m.sampling.schedule.sigmas)


@pytest.mark.parametrize("precision", ["fp32", "w8a8", "w4a8", "w4a4"])
@pytest.mark.parametrize("name", ["guided", "own"])
def test_a_guided_step_is_guidance_of_two_single_calls(
    name: str, precision: str, request: pytest.FixtureRequest, rng: np.random.Generator
) -> None:
    """One doubled batch against two calls of the same engine on the same input."""
    built: Built = request.getfixturevalue(name)
    bundle, p = built.bundle, Precision.parse(precision)
    m = bundle.manifest
    x = NoiseSource(0, range(5), m.sampling.model.sample_shape).draw()
    tensors: dict[str, Array] = {
        s.name: rng.standard_normal((5, *s.shape)).astype(np.float32)
        for s in m.sampling.model.inputs
        if s.num_classes is None
    }
    conditions = m.sampling.model.conditions(None, 5, tensors)

    def call(engine: Engine, branch: dict[str, Array], step: int) -> F64:
        feeds: dict[str, Array] = {
            SAMPLE: x.astype(np.float32),
            TIMESTEP: np.full(5, m.sampling.schedule.timesteps[step]),
            STEP: np.array([step]),
            **branch,
        }
        return np.asarray(engine(feeds)[EPSILON], np.float64)

    with (
        open_engine("ort-cpu", bundle.file(m.artifact(p, "ort-cpu").file)) as engine,
        Runtime(bundle, plan=Plan((FP32,) * len(m.sampling.schedule))) as full,
    ):
        for step in range(len(m.sampling.schedule)):
            null, conditional = (
                call(engine, m.sampling.model.null_conditions(5), step),
                call(engine, conditions, step),
            )
            guided = m.sampling.predict(engine, x, step, conditions)
            assert rms(conditional - null) > 1e-4  # the condition counts
            difference = guided - (null + m.sampling.guidance_scale * (conditional - null))
            exact = m.sampling.predict(full.engines[FP32], x, step, conditions)
            if p.is_float:
                assert abs(difference).max() <= FLOAT_BOUND * abs(exact).max()
            else:
                assert rms(difference) <= FLIP_BOUND * rms(guided - exact)


@pytest.mark.parametrize("name", ["rgb", "classes", "own"])
def test_a_sample_depends_on_seed_and_index_alone(name: str, request: pytest.FixtureRequest) -> None:
    """At batch sizes 1, 7 and 16, and split between two processes of one thread each."""
    built: Built = request.getfixturevalue(name)
    bundle = built.bundle
    n = 16
    tensors: dict[str, Array] = {
        s.name: NoiseSource(9, range(n), s.shape).draw().astype(np.float32)
        for s in bundle.manifest.sampling.model.inputs
        if s.num_classes is None
    }
    found: dict[str, list[F64]] = {}
    for precision in ("fp32", "w8a8"):
        at = with_plan(bundle, precision)
        found[precision] = [run(at, n, seed=3, batch_size=size, tensors=tensors) for size in (16, 7, 1)]
    scale = abs(found["fp32"][0]).max()
    noise = rms(found["w8a8"][0] - found["fp32"][0])
    for other in found["fp32"][1:]:
        assert abs(other - found["fp32"][0]).max() <= FLOAT_BOUND * scale
    for other in found["w8a8"][1:]:
        assert rms(other - found["w8a8"][0]) <= FLIP_BOUND * noise
    # The bundle's own plan: workers open it from disk.
    alone, split = (
        run(bundle, n, seed=3, tensors=tensors),
        run(bundle, n, seed=3, batch_size=4, workers=2, tensors=tensors),
    )
    assert rms(split - alone) <= FLIP_BOUND * noise
    # One batch must not pass for another: samples differ by far more than that.
    assert min(rms(alone[i] - alone[j]) for i in range(n) for j in range(i)) > 10 * FLIP_BOUND * noise


def test_part_of_the_indices_gives_the_same_samples(classes: Built) -> None:
    with Runtime(classes.bundle) as runtime:
        every, some = runtime.sample(range(8), seed=4), runtime.sample([6, 1], seed=4)
        np.testing.assert_allclose(some, every[[6, 1]], atol=FLOAT_BOUND * abs(every).max())
        assert rms(runtime.sample([6, 1], seed=5) - some) > 0.1


def test_labels_follow_their_samples(classes: Built) -> None:
    bundle = with_plan(classes.bundle, "fp32")
    labels = [4, 0, 0, 3, 1, 2, 4]
    together = run(bundle, 7, labels, seed=1, batch_size=3)
    for i, label in enumerate(labels):
        alone = run(bundle, 7, [label] * 7, seed=1, batch_size=7)[i]
        np.testing.assert_allclose(together[i], alone, atol=FLOAT_BOUND * abs(together).max())
        other = run(bundle, 7, [(label + 1) % 5] * 7, seed=1, batch_size=7)[i]
        assert rms(together[i] - other) > 100 * FLOAT_BOUND * abs(together).max()
    in_turn = run(bundle, 7, seed=1, batch_size=3)
    np.testing.assert_allclose(
        in_turn, run(bundle, 7, [0, 1, 2, 3, 4, 0, 1], seed=1), atol=FLOAT_BOUND * abs(in_turn).max()
    )


def test_tensor_conditions_follow_their_samples(own: Built) -> None:
    bundle = with_plan(own.bundle, "fp32")
    context = NoiseSource(2, range(5), (6,)).draw().astype(np.float32)
    together = run(bundle, 5, seed=1, batch_size=2, tensors={"context": context})
    for i in range(5):
        alone = run(bundle, 5, seed=1, tensors={"context": np.tile(context[i], (5, 1))})[i]
        np.testing.assert_allclose(together[i], alone, atol=FLOAT_BOUND * abs(together).max())
    assert rms(run(bundle, 5, seed=1) - together) > 1e-3  # zeros where none is given
    with pytest.raises(RecipeError, match=r"shape \(4, 6\): expected \(5, 6\)"):
        run(bundle, 5, tensors={"context": context[:4]})


@pytest.mark.parametrize(("name", "bound"), [("rgb", 40.0), ("own", 60.0)])
def test_the_simulation_gives_the_same_pictures(
    name: str, bound: float, request: pytest.FixtureRequest
) -> None:
    """PSNR between the torch backend and ort-cpu at w8a8: above `bound` dB, and 6 dB above what both are away
    from full precision.

    Not equal: a float difference flips a rounding here and there (see parity.judgement). Measured here: 51 dB
    and 158 dB, against 35 dB and 65 dB to full precision.
    """
    built: Built = request.getfixturevalue(name)
    at = with_plan(built.bundle, "w8a8")
    engine, simulated = run(at, 8, seed=2), run(at, 8, seed=2, backend="torch", model=built.recipe)
    full = run(with_plan(built.bundle, "fp32"), 8, seed=2)
    span = full.max() - full.min()

    def psnr(a: F64, b: F64) -> float:
        return float(20 * np.log10(span / max(rms(a - b), 1e-12)))

    assert psnr(engine, simulated) > max(bound, psnr(engine, full) + 6)


def test_the_simulation_holds_the_correction(guided: Built) -> None:
    """The torch backend's table is the one folded into the graph: without it the two backends lie apart."""
    from ptqd_export.calibrate.reference import simulated_engines

    bundle = guided.bundle
    m, p = bundle.manifest, Precision(4, 8)
    x = NoiseSource(0, range(4), m.sampling.model.sample_shape).draw()
    conditions = m.sampling.model.conditions(None, 4)
    correction = bundle.correction(p, Emission.ORT_CPU)
    assert not np.array_equal(correction.gain, Correction.identity(3, 1).gain)
    step = int(abs(correction.offset).max(1).argmax())
    with open_engine("ort-cpu", bundle.file(m.artifact(p, "ort-cpu").file)) as engine:
        got = m.sampling.predict(engine, x, step, conditions)
    simulated = simulated_engines(bundle, [p], guided.recipe)[p]
    expected = m.sampling.predict(simulated, x, step, conditions)
    uncorrected = (expected - correction.offset[step][:, None, None]) / correction.gain[step][:, None, None]
    assert rms(got - expected) < 0.1 * rms(got - uncorrected)


@pytest.mark.parametrize(
    ("asked", "held"),
    [
        ({"n_steps": 5}, "n_steps 5 was asked for.*measured for n_steps 4.*--n-steps 5"),
        ({"eta": 0.0}, "eta 0.0 was asked for.*measured for eta 1.0.*--eta 0.0"),
        ({"guidance_scale": 3.0}, "measured for guidance_scale 1.0.*--guidance-scale 3.0"),
        ({"solver": "ddpm"}, "measured for solver ddim.*--solver ddpm"),
    ],
)
def test_a_bundle_is_valid_for_one_setting(rgb: Built, asked: dict[str, Any], held: str) -> None:
    with pytest.raises(BundleError, match=held):
        check_settings(rgb.bundle, **asked)
    check_settings(rgb.bundle, n_steps=4, eta=1.0, guidance_scale=1.0, solver="ddim")


def test_progress_counts_every_sample_step(classes: Built) -> None:
    for workers in (1, 2):
        counted: list[int] = []
        run(classes.bundle, 5, batch_size=2, workers=workers, advance=counted.append)
        assert sum(counted) == 5 * 3


@pytest.mark.parametrize("name", ["rgb", "classes", "guided", "own"])
def test_the_probe_tells_right_kernels_from_wrong_ones(name: str, request: pytest.FixtureRequest) -> None:
    """A fused and an unfused execution of a graph are both right, though their roundings differ; another
    precision's engine is wrong."""
    bundle: Bundle = request.getfixturevalue(name).bundle
    m = bundle.manifest
    for p, emission in itertools.product(m.bops, Emission):
        known = bundle.probe(p, emission)
        expected, allowed = known.epsilon, known.allowed
        assert expected.shape == (2, *m.sampling.model.sample_shape) and 0 < allowed < rms(expected) * (
            2 if p.activation_bits == 4 else 0.4
        )
        with OrtEngine(bundle.file(m.graph(p, emission).file), optimise=False) as engine:
            check_probe(bundle, p, emission, engine)
            again = probe(engine, m.sampling)
            np.testing.assert_array_equal(again, probe(engine, m.sampling))
    with open_engine("ort-cpu", bundle.file(m.artifact(Precision(4, 4), "ort-cpu").file)) as engine:
        for p in (FP32, Precision(8, 8)):
            with pytest.raises(ParityError, match=f"{p}.ort-cpu computes something else here"):
                check_probe(bundle, p, Emission.ORT_CPU, engine)


def test_samples_that_are_not_finite_are_refused(classes: Built) -> None:
    """An engine that is right on the probe and wrong later."""
    with Runtime(classes.bundle) as runtime:
        last = len(classes.bundle.manifest.sampling.schedule) - 1
        for p, engine in list(runtime.engines.items()):

            def broken(feeds: Feeds, engine: Engine = engine) -> Array:
                right = engine(feeds)[EPSILON]
                return np.full_like(right, np.nan) if feeds[STEP][0] == last else right

            runtime.engines[p] = FakeEngine(broken, engine.inputs)
        with pytest.raises(ModelError, match="sample 3 holds NaN or infinite values"):
            runtime.sample([3, 4])


def test_quantization_of_another_network_is_refused(own: Built, tmp_path: Path) -> None:
    """The codes of a bundle whose hashes are right, but which are not those of its layers."""
    shutil.copytree(own.path, tmp_path / "bundle")
    bundle = Bundle.open(tmp_path / "bundle")
    file = bundle.file(QUANTIZATION)
    scales = load_file(file)

    def refused(message: str) -> None:
        write_manifest(bundle.path, bundle.manifest)
        with pytest.raises(BundleError, match=message):
            Runtime(Bundle.open(bundle.path), "torch", model=own.recipe)

    def moved(text: bytes) -> dict[str, Array]:
        return scales | {"codes": np.frombuffer(text, np.uint8)}

    text = scales["codes"].tobytes()
    layer, (tensor, layout) = next(iter(json.loads(text)["w8a8"].items()))
    own_place = f'"{layer}":["{tensor}","{layout}"]'.encode()
    floats = next(k for k, v in sorted(load_file(bundle.file(WEIGHTS)).items()) if v.dtype == np.float32)
    assert own_place in text
    for changed in (
        moved(text.replace(own_place, f'"{layer}":["{tensor}","diagonal"]'.encode())),
        moved(text.replace(own_place, b'"nothing":' + own_place.partition(b":")[2])),
        {key: value for key, value in scales.items() if key != "codes"},
        {f"{key}x": value for key, value in scales.items()} | {"w8a8/nothing/bits": np.array([8, 8])},
    ):
        save_file(changed, file)
        refused(r"does not hold the layers of .*rebuild the bundle")
    save_file(moved(text.replace(tensor.encode(), b"nothing")), file)
    refused(r"weights.safetensors has no tensor 'nothing'.*rebuild the bundle")
    save_file(moved(text.replace(tensor.encode(), floats.encode())), file)
    refused(r"weights.safetensors is damaged .*F32.*rebuild the bundle")
    file.write_bytes(b"nothing")
    refused(r"quantization.safetensors is damaged .*rebuild the bundle")


def test_closed_engines_are_gone(rgb: Built, tmp_path: Path) -> None:
    runtime = Runtime(rgb.bundle)
    engines = list(runtime.engines.values())
    runtime.close()
    runtime.close()
    assert runtime.engines == {}
    with pytest.raises(Exception, match="closed"):
        engines[0]({})
