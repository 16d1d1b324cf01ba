"""The loop with the state on a GPU: the real `DeviceSampler`, `CudaDevice` and `TrtEngine` over stand-ins for
CUDA and TensorRT.

The stand-ins (`fake_cuda`) run each engine's ONNX graph on ONNX Runtime's CPU when its turn in the stream
comes. What is tested is the order of things, addresses, shapes, CUDA graphs, contexts and scratch memory;
nothing here says what TensorRT or a GPU computes.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path

import numpy as np
import pytest
from fake_cuda import FakeCuda
from fake_tensorrt import FakeTensorRT
from helpers import RTX, Built

from ptqd_export.backends import OrtDevice, OrtEngine
from ptqd_export.backends.cuda import CudaDevice
from ptqd_export.backends.trt import TrtEngine
from ptqd_export.bundle.bundle import Bundle
from ptqd_export.core.backend import Emission
from ptqd_export.core.engine import Device, DeviceEngine
from ptqd_export.core.plan import Plan
from ptqd_export.core.precision import FP32, Precision
from ptqd_export.core.sampling import F64
from ptqd_export.runtime import Runtime
from ptqd_export.runtime.device_loop import DeviceSampler

MODELS = ("rgb", "guided")
SIZES = (3, 2)
"""Batch sizes in turn; with guidance, of twice the rows: a stand-in takes 8 of them."""
SCRATCH = 1000


def _file(bundle: Bundle, precision: Precision | None) -> Path:
    """The half-precision graph that TensorRT builds from, or the update graph."""
    m = bundle.manifest
    return bundle.file(m.update.file if precision is None else m.graph(precision, Emission.HALF).file)


class Case:
    """The loop over all engines of a plan, on a device."""

    def __init__(
        self,
        bundle: Bundle,
        plan: Plan,
        device: Device,
        update: DeviceEngine,
        engines: dict[Precision, DeviceEngine],
    ) -> None:
        m = bundle.manifest
        self.bundle, self.plan, self.engines, self.update = bundle, plan, engines, update
        self.sampler = DeviceSampler(device, update, m.sampling, bundle.sigmas(RTX, plan))

    def sample(self, n: int, seed: int) -> F64:
        model = self.bundle.manifest.sampling.model
        conditions = model.conditions(model.labels_in_turn(range(n)), n)
        return self.sampler.sample(
            lambda step: self.engines[self.plan.steps[step]], conditions, range(n), seed=seed
        )


def _on_ort(bundle: Bundle, plan: Plan, opened: ExitStack) -> Case:
    """Graphs as they are written: so do the stand-ins run them."""
    device = OrtDevice()
    update, *engines = [
        opened.enter_context(OrtEngine(_file(bundle, p), device=device, optimise=False))
        for p in (None, *plan.precisions)
    ]
    return Case(bundle, plan, device, update, dict(zip(plan.precisions, engines, strict=True)))


class Faked(Case):
    """As TensorRT's engines on the fake GPU, each with a little more scratch memory than the one before."""

    def __init__(
        self,
        bundle: Bundle,
        plan: Plan,
        folder: Path,
        cuda: FakeCuda,
        opened: ExitStack,
    ) -> None:
        self.device = opened.enter_context(CudaDevice(cudart=cuda))
        self.modules: list[FakeTensorRT] = []
        engines = []
        for i, precision in enumerate((None, *plan.precisions)):
            path = folder / f"{precision}.engine"
            path.write_bytes(b"graph " + str(_file(bundle, precision)).encode())
            self.modules.append(FakeTensorRT(cuda, scratch=SCRATCH * (i + 1)))
            engines.append(opened.enter_context(TrtEngine(self.modules[-1], path, self.device)))
        super().__init__(
            bundle, plan, self.device, engines[0], dict(zip(plan.precisions, engines[1:], strict=True))
        )


@pytest.fixture
def cuda() -> FakeCuda:
    return FakeCuda()


@pytest.fixture
def opened(cuda: FakeCuda) -> Iterator[ExitStack]:
    with ExitStack() as stack:
        yield stack
    assert cuda.live() == {}


@pytest.mark.parametrize("name", MODELS)
def test_two_batch_sizes_in_turn(
    name: str, request: pytest.FixtureRequest, tmp_path: Path, cuda: FakeCuda, opened: ExitStack
) -> None:
    """What ONNX Runtime's loop gives, while runs become captures and captures are replayed."""
    bundle = request.getfixturevalue(name).bundle
    plan = bundle.manifest.plan
    faked, expected = Faked(bundle, plan, tmp_path, cuda, opened), _on_ort(bundle, plan, opened)
    enqueued = []
    for run in range(4):
        for n in SIZES:
            # The same kernels on the same float32 numbers: nothing to round differently.
            np.testing.assert_array_equal(faked.sample(n, run), expected.sample(n, run))
        enqueued.append(sum(module.enqueued for module in faked.modules))
    assert enqueued[3] == enqueued[2] > enqueued[0], "the last runs were not replays"
    steps = len(plan)
    # Two sets of state buffers per batch size: the update sees both, and each engine those of its steps.
    states = {p: len({step % 2 for step in range(steps) if plan.steps[step] == p}) for p in plan.precisions}
    graphs = [len(SIZES) * k for k in (min(2, steps), *states.values())]
    assert [len(module.contexts) for module in faked.modules] == [k + 1 for k in graphs]
    assert cuda.graphs == sum(graphs) and all(module.configs == 1 for module in faked.modules)
    assert cuda.launches > steps * len(SIZES)


def test_the_host_s_samples(guided: Built, tmp_path: Path, cuda: FakeCuda, opened: ExitStack) -> None:
    """In full precision, those of the loop on the host, in which the state is float64."""
    m = guided.bundle.manifest
    plan = Plan((FP32,) * len(m.sampling.schedule))
    assert m.sampling.branches == 2
    faked = Faked(guided.bundle, plan, tmp_path, cuda, opened)
    host = opened.enter_context(Runtime(guided.bundle, "ort-cpu", plan))
    for run in range(3):
        for n in SIZES:
            expected, got = host.sample(range(n), seed=run), faked.sample(n, run)
            # Roundings of 2^-24, which each step multiplies by up to A + B |de/dx|: a few hundred of them.
            assert np.abs(got - expected).max() < 1e-4 * np.abs(expected).max()
            assert np.abs(got - host.sample(range(n), seed=run + 1)).max() > 0.1
    assert cuda.launches > 0


def test_an_engine_that_needs_more_scratch_comes_later(
    rgb: Built, tmp_path: Path, cuda: FakeCuda, opened: ExitStack
) -> None:
    """The scratch moves under graphs that hold its address: they are made anew."""
    bundle, plan = rgb.bundle, rgb.bundle.manifest.plan
    faked = Faked(bundle, plan, tmp_path, cuda, opened)
    before = [faked.sample(n, 0) for _ in range(3) for n in SIZES]
    graphs, scratch = cuda.graphs, faked.device.scratch
    path = tmp_path / "larger.engine"
    path.write_bytes(b"good")
    opened.enter_context(TrtEngine(FakeTensorRT(cuda, scratch=100 * SCRATCH), path, faked.device))
    assert graphs > 0 and faked.device.scratch[0] != scratch[0]
    np.testing.assert_array_equal(
        np.concatenate([faked.sample(n, 0) for _ in range(3) for n in SIZES]), np.concatenate(before)
    )
    assert cuda.graphs == graphs
