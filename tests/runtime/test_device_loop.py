"""The loop with the state on a device, on the one device that is always here: ONNX Runtime's host memory."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import ExitStack
from typing import Any

import numpy as np
import pytest
from helpers import Built, cuda_on_the_cpu

from ptqd_export.backends import OrtDevice, OrtEngine
from ptqd_export.backends import registry as base
from ptqd_export.bundle.bundle import Bundle
from ptqd_export.core.engine import Array
from ptqd_export.core.plan import Plan
from ptqd_export.core.precision import FP32, Precision
from ptqd_export.core.sampling import NoiseSource, Sampling
from ptqd_export.runtime import Runtime, run
from ptqd_export.runtime.device_loop import DeviceSampler

MODELS = ("rgb", "classes", "guided", "own")


class Watched:
    """An engine that notes its launches, by the identity of the sample's buffer."""

    def __init__(self, engine: OrtEngine) -> None:
        self.engine, self.inputs, self.outputs, self.samples = (
            engine,
            engine.inputs,
            engine.outputs,
            list[int](),
        )

    def launch(self, buffers: Mapping[str, Any]) -> None:
        assert set(buffers) == {*self.inputs, *self.outputs}
        self.samples.append(id(buffers["sample"]))
        self.engine.launch(buffers)


class Case:
    """A device sampler over the ORT CPU graphs of a plan."""

    def __init__(self, bundle: Bundle, plan: Plan, opened: ExitStack) -> None:
        m = bundle.manifest
        device = OrtDevice("cpu")
        self.engines = {
            p: Watched(
                opened.enter_context(OrtEngine(bundle.file(m.artifact(p, "ort-cpu").file), device=device))
            )
            for p in plan.precisions
        }
        self.update = Watched(opened.enter_context(OrtEngine(bundle.file(m.update.file), device=device)))
        sigmas = bundle.sigmas("ort-cpu", plan)
        self.sampler = DeviceSampler(device, self.update, m.sampling, sigmas)  # type: ignore[arg-type]
        self.bundle, self.plan = bundle, plan

    def sample(self, indices: range, seed: int = 0) -> Any:
        m = self.bundle.manifest
        tensors = conditions_of(self.bundle, indices)
        conditions = m.sampling.model.conditions(
            m.sampling.model.labels_in_turn(indices), len(indices), tensors
        )
        return self.sampler.sample(
            lambda step: self.engines[self.plan.steps[step]], conditions, indices, seed=seed
        )  # type: ignore[arg-type,return-value]


def conditions_of(bundle: Bundle, indices: range) -> dict[str, Array]:
    floats = [spec for spec in bundle.manifest.sampling.model.inputs if spec.num_classes is None]
    return {spec.name: NoiseSource(9, indices, spec.shape).draw().astype(np.float32) for spec in floats}


@pytest.fixture
def opened() -> Iterator[ExitStack]:
    with ExitStack() as stack:
        yield stack


@pytest.mark.parametrize("name", MODELS)
def test_full_precision_is_the_host_s(name: str, request: pytest.FixtureRequest, opened: ExitStack) -> None:
    """The same samples in float32: guidance, clipping, injected noise and labels are where they should be."""
    built: Built = request.getfixturevalue(name)
    plan = Plan((FP32,) * len(built.bundle.manifest.sampling.schedule))
    case = Case(built.bundle, plan, opened)
    with Runtime(built.bundle, "ort-cpu", plan) as host:
        expected = host.sample(range(3, 8), seed=5, tensors=conditions_of(built.bundle, range(3, 8)))
        other = host.sample(range(3, 8), seed=6, tensors=conditions_of(built.bundle, range(3, 8)))
    got = case.sample(range(3, 8), seed=5)
    assert got.dtype == np.float64 and got.shape == expected.shape
    # Roundings of 2^-24, which each step multiplies by up to A + B |de/dx|: a few hundred of them.
    assert np.abs(got - expected).max() < 1e-4 * np.abs(expected).max()
    assert np.abs(got - other).max() > 0.1


@pytest.mark.parametrize("name", MODELS)
def test_engines_take_their_turns_and_buffers_recur(
    name: str, request: pytest.FixtureRequest, opened: ExitStack
) -> None:
    built: Built = request.getfixturevalue(name)
    m = built.bundle.manifest
    steps = tuple((FP32, Precision(8, 8))[i % 2] for i in range(len(m.sampling.schedule)))
    case = Case(built.bundle, Plan(steps), opened)
    first = case.sample(range(4))
    for _ in range(2):
        np.testing.assert_array_equal(case.sample(range(4)), first)
    assert {p: len(e.samples) for p, e in case.engines.items()} == {
        p: 3 * steps.count(p) for p in case.engines
    }
    assert len(case.update.samples) == 3 * len(steps) and len(set(case.update.samples)) == 2
    case.sample(range(2))
    assert len(set(case.update.samples)) == 4  # a batch of another size has buffers of its own


def test_a_sample_depends_on_seed_and_index_alone(own: Built, opened: ExitStack) -> None:
    case = Case(own.bundle, Plan((FP32,) * 4), opened)
    whole = case.sample(range(6), seed=3)
    parts = np.concatenate([case.sample(range(0, 1), seed=3), case.sample(range(1, 6), seed=3)])
    assert (
        np.abs(whole - parts).max() < 1e-5 * np.abs(whole).max()
    )  # float kernels sum in another order per batch


def test_the_injected_noise_is_that_of_the_plan(rgb: Built, opened: ExitStack) -> None:
    """One update graph for every plan: any sigma' up to sigma comes with the noise."""
    m = rgb.bundle.manifest
    case = Case(rgb.bundle, Plan((FP32,) * 4), opened)
    sigmas = np.array([0.0, 0.5, 1.0, 0.25]) * m.sampling.schedule.sigmas
    loop = DeviceSampler(OrtDevice("cpu"), case.update, m.sampling, sigmas)  # type: ignore[arg-type]
    engine = case.engines[FP32]
    got = loop.sample(lambda step: engine, {}, range(3), seed=2)  # type: ignore[arg-type,return-value]
    expected = m.sampling.sample(lambda step: engine.engine, {}, range(3), seed=2, sigmas=sigmas)
    assert np.abs(got - expected).max() < 1e-4 * np.abs(expected).max()
    assert np.abs(got - case.sample(range(3), seed=2)).max() > 0.1


@pytest.mark.parametrize("name", MODELS)
def test_a_whole_run_on_a_device(
    name: str, request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What `run --backend ort-cuda` does, half-precision graphs and the bundle's own update included, with
    the host as the device."""
    built: Built = request.getfixturevalue(name)
    bundle = built.bundle
    monkeypatch.setattr(base, "OPENERS", cuda_on_the_cpu())
    tensors = conditions_of(bundle, range(5))
    with (
        Runtime(bundle, "ort-cuda") as runtime,
        Runtime(bundle, "ort-cuda", Plan((FP32,) * len(bundle.manifest.sampling.schedule))) as full,
    ):
        monkeypatch.setattr(Sampling, "sample", None)  # nothing of this is on the host
        x = runtime.sample(range(5), seed=3, tensors=tensors)
        np.testing.assert_array_equal(runtime.sample(range(5), seed=3, tensors=tensors), x)
        other = runtime.sample(range(5), seed=4, tensors=tensors)
        exact = full.sample(range(5), seed=3, tensors=tensors)
    monkeypatch.undo()
    monkeypatch.setattr(base, "OPENERS", cuda_on_the_cpu())
    with Runtime(bundle, "ort-cpu") as host:
        expected = host.sample(range(5), seed=3, tensors=tensors)
    assert np.square(x - expected).mean() < 0.1 * np.square(x - other).mean()
    assert np.square(x - exact).mean() < 0.1 * np.square(x - other).mean()
    counted: list[int] = []
    run(bundle, 5, batch_size=2, backend="ort-cuda", tensors=tensors, advance=counted.append)
    assert sum(counted) == 5 * len(bundle.manifest.sampling.schedule)
