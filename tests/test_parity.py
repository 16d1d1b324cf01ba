"""The parity gate passes what is right and stops what is not: a test for each way in which an engine can be wrong."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from conftest import Built

from ptqd_export.backends import OrtEngine
from ptqd_export.calibrate import Network, TorchEngine, Trajectories, collect, observe, open_model, quantize
from ptqd_export.conditioning import ModelInfo
from ptqd_export.engine import EPSILON, SAMPLE, STEP, TIMESTEP, Array, FakeEngine, Feeds
from ptqd_export.errors import ParityError
from ptqd_export.evaluate import parity
from ptqd_export.export import export_fp, fold, lower, save
from ptqd_export.export import quantize as insert_qdq
from ptqd_export.noise import Correction, NoiseStats
from ptqd_export.precision import Precision
from ptqd_export.quant import Emission, QuantizedNetwork
from ptqd_export.recipe import Recipe
from ptqd_export.schedule import NoiseSchedule

N, C, PIXELS = 16, 2, 400


@dataclasses.dataclass(frozen=True)
class Case:
    network: Network
    schedule: NoiseSchedule
    trajectories: Trajectories
    quantized: QuantizedNetwork
    folder: Path

    def graph(self, emission: Emission) -> Path:
        return self.folder / f"w4a4.{emission}.onnx"


@pytest.fixture(scope="module")
def case(rgb: Built, tmp_path_factory: pytest.TempPathFactory) -> Case:
    """The tiny RGB model at w4a4, as graphs and as values."""
    folder = tmp_path_factory.mktemp("parity")
    recipe = Recipe.load(rgb.recipe).override(
        sampler={"n_steps": 3}, calibration={"size": 2, "held_out": 2}, quantization={"precisions": ("w4a4",), "rounding": "nearest"}
    )
    network = open_model(recipe)
    schedule = NoiseSchedule.from_config(network.scheduler_config, 3, 0.0)
    trajectories = collect(network, schedule, recipe, folder / "t")
    net = quantize(network, observe(network, schedule, recipe, trajectories), Precision(4, 4), recipe)
    base = export_fp(network.module, network.info)
    one, zero = np.ones((3, 3)), np.zeros((3, 3))
    save({f"w4a4.{e}": fold(lower(insert_qdq(base, net, e), e, net.precision), one, zero) for e in Emission}, folder)
    return Case(network, schedule, trajectories, net, folder)


@pytest.mark.parametrize("emission", list(Emission))
def test_layers_agree_and_a_wrong_scale_is_named(case: Case, emission: Emission) -> None:
    def check(net: QuantizedNetwork) -> dict[str, float]:
        return parity.check_layers("w4a4", case.graph(emission), net, emission, case.network.info, case.schedule, case.trajectories, case.network)

    found = check(case.quantized)
    assert found["layers"] == len(case.quantized.layers) and found["share_apart"] <= parity.MAX_SHARE_APART
    name = "down_blocks.1.resnets.0.conv1"
    layer = case.quantized.layers[name]
    wrong = dataclasses.replace(layer, input_scale=float(np.float32(layer.input_scale * 1.05)))
    with pytest.raises(ParityError, match=rf"layer {name} at step 0"):
        check(dataclasses.replace(case.quantized, layers={**case.quantized.layers, name: wrong}))
    with pytest.raises(ParityError, match="not in the graph"):
        check(dataclasses.replace(case.quantized, layers={**case.quantized.layers, "ghost": layer}))
    assert not list(case.folder.glob(".layers*"))


def test_structure_is_that_of_integers(case: Case) -> None:
    graph, optimised = case.graph(Emission.ORT_CPU), case.folder / "optimised.onnx"
    OrtEngine(graph, optimised_path=optimised).close()
    parity.check_structure("w4a4", graph, optimised, case.quantized)
    unfused = case.folder / "unfused.onnx"
    OrtEngine(graph, optimise=False, optimised_path=unfused).close()
    with pytest.raises(ParityError, match=r"0 of .* run as QLinearConv"):
        parity.check_structure("w4a4", graph, unfused, case.quantized)


def test_float_engine_is_held_to_the_model(case: Case) -> None:
    with TorchEngine(case.network, case.schedule) as reference:
        check: Callable[[Any], dict[str, float]] = lambda engine: parity.check_float(  # noqa: E731
            "fp32", engine, reference, case.network.info, case.schedule, case.trajectories, 1.0, parity.MAX_FLOAT_ERROR
        )
        assert check(reference)["largest_relative_error"] == 0.0
        off = FakeEngine(lambda f: reference(f)[EPSILON] * np.float32(1.001), reference.inputs)
        with pytest.raises(ParityError, match="step 0 differs from the torch model"):
            check(off)


def stats(rng: np.random.Generator, t: int, noise: float, bias: float = 0.0, e: list[Array] | None = None) -> list[NoiseStats]:
    """N trajectories of t steps; the same e wherever the same list is given."""
    parts = []
    for n in range(N):
        total = NoiseStats.zeros(t, C)
        for step in range(t):
            x = rng.standard_normal((1, C, PIXELS)) if e is None else np.asarray(e[n * t + step], np.float64)
            total += NoiseStats.of_step(step, t, x, x + noise * rng.standard_normal(x.shape) + bias)
        parts.append(total)
    return parts


def test_noise_of_two_right_executions_agrees_and_of_a_wrong_one_does_not(rng: np.random.Generator) -> None:
    t = 5
    e: list[Array] = [rng.standard_normal((1, C, PIXELS)) for _ in range(N * t)]
    simulated = stats(rng, t, 0.1, e=e)
    good = parity.check_noise("x", stats(rng, t, 0.1, e=e), simulated)
    assert max(good["largest_z"].values()) < good["limit_z"] < 6
    for wrong, what in [(stats(rng, t, 0.12, e=e), "var|mse"), (stats(rng, t, 0.1, bias=0.02, e=e), "bias|mse")]:
        with pytest.raises(ParityError, match=what):
            parity.check_noise("x", wrong, simulated)
    k = Correction(np.full((t, C), 1.02), np.zeros((t, C)), np.zeros(t))
    with pytest.raises(ParityError, match="k at step"):
        parity.check_noise("x", [s.corrected(k) for s in stats(rng, t, 0.1, e=e)], simulated)


def test_float16_in_between_is_let_pass_and_no_more(rng: np.random.Generator) -> None:
    """An error that is a function of e, the same in every trajectory, has next to no spread: rounding to float16 passes only where it is said."""
    t = 5
    e: list[Array] = [rng.standard_normal((1, C, PIXELS)) for _ in range(N * t)]

    def engine(error: Callable[[Array], Array]) -> list[NoiseStats]:
        seeded = np.random.default_rng(1)
        parts = []
        for n in range(N):
            total = NoiseStats.zeros(t, C)
            for step in range(t):
                x = np.asarray(e[n * t + step], np.float64)
                total += NoiseStats.of_step(step, t, x, x + 1e-3 * seeded.standard_normal(x.shape) + error(x))
            parts.append(total)
        return parts

    simulated = engine(lambda x: 0.0 * x)
    halved = engine(lambda x: parity.HALF * np.abs(x))
    with pytest.raises(ParityError, match=r"bias|var|mse|k at"):
        parity.check_noise("x", halved, simulated)
    figures = parity.check_noise("x", halved, simulated, parity.HALF)
    assert max(figures["largest_z"].values()) < figures["limit_z"]
    with pytest.raises(ParityError):
        parity.check_noise("x", engine(lambda x: 20 * parity.HALF * np.abs(x)), simulated, parity.HALF)


def test_a_right_engine_rarely_fails(rng: np.random.Generator) -> None:
    """The limit holds its promise: no failure in 40 pairs of right executions, for each of four statistics over all steps."""
    t = 4
    for _ in range(40):
        e: list[Array] = [rng.standard_normal((1, C, 50)) for _ in range(N * t)]
        parity.check_noise("x", stats(rng, t, 0.1, e=e), stats(rng, t, 0.1, e=e))


def test_folded_rows_are_where_they_belong(rng: np.random.Generator) -> None:
    schedule = NoiseSchedule.from_config({"clip_sample": False}, 4, 0.0)
    info = ModelInfo("toy", (C, 4, 4), (), "")
    gain, offset = 1 + 0.1 * rng.standard_normal((4, C)), 0.1 * rng.standard_normal((4, C))
    x = rng.standard_normal((4, 2, C, 4, 4)).astype(np.float32)
    trajectories = SimpleNamespace(first=lambda n: (range(2), x, x, {}))
    table = Correction(gain, offset, np.zeros(4))

    def engine(g: Any, o: Any) -> FakeEngine:
        def run(feeds: Feeds) -> Array:
            i = int(feeds[STEP][0])  # type: ignore[call-overload]
            return np.asarray(g[i][:, None, None] * 0.5 * feeds[SAMPLE] + o[i][:, None, None], np.float32)

        return FakeEngine(run, (SAMPLE, TIMESTEP, STEP))

    assert parity.check_fold("x", engine(gain, offset), table, info, schedule, trajectories) < parity.FOLD_TOLERANCE
    for wrong in (engine(np.roll(gain, 1, 0), np.roll(offset, 1, 0)), engine(np.ones_like(gain), np.zeros_like(offset)), engine(gain, offset * 1.01)):
        with pytest.raises(ParityError, match="is not its table's"):
            parity.check_fold("x", wrong, table, info, schedule, trajectories)
