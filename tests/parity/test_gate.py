"""The gate's verdict on a graph: structure, float engines and folded tables; whatever is wrong stops a
build."""

from __future__ import annotations

from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from ptqd_export.backends import OrtEngine, ort
from ptqd_export.calibrate import TorchEngine, measure, simulate
from ptqd_export.core.backend import Emission
from ptqd_export.core.engine import EPSILON, SAMPLE, STEP, TIMESTEP, Array, Engine, FakeEngine, Feeds
from ptqd_export.core.figures import FloatFigures, QuantizedFigures
from ptqd_export.core.model import ModelInfo
from ptqd_export.core.noise import Correction
from ptqd_export.core.sampling import Sampling
from ptqd_export.core.schedule import NoiseSchedule
from ptqd_export.errors import ParityError
from ptqd_export.parity import gate, judgement
from ptqd_export.parity.gate import FOLD_TOLERANCE, check_float, check_fold, check_structure, judge_graph
from ptqd_export.parity.judgement import MAX_FLOAT_ERROR

Case = Any
"""That of conftest."""

C = 2


def test_structure_is_that_of_integers(case: Case) -> None:
    graph, optimised = case.graph(Emission.ORT_CPU), case.folder / "optimised.onnx"
    OrtEngine(graph, optimised_path=optimised).close()
    check_structure("w4a4", graph, optimised)
    unfused = case.folder / "unfused.onnx"
    OrtEngine(graph, optimise=False, optimised_path=unfused).close()
    with pytest.raises(ParityError, match=r"0 of .* run as QLinearConv"):
        check_structure("w4a4", graph, unfused)


def test_float_engine_is_held_to_the_model(case: Case) -> None:
    with TorchEngine(case.network.module, case.sampling) as reference:

        def check(engine: Engine) -> FloatFigures:
            return check_float("fp32", engine, reference, case.sampling, case.trajectories, MAX_FLOAT_ERROR)

        assert check(reference).largest_relative_error == 0.0
        off = FakeEngine(lambda f: reference(f)[EPSILON] * np.float32(1.001), reference.inputs)
        with pytest.raises(ParityError, match="step 0 differs from the torch model"):
            check(off)


@pytest.mark.parametrize("emission", list(Emission))
def test_a_verdict_per_graph(case: Case, emission: Emission, monkeypatch: pytest.MonkeyPatch) -> None:
    """Figures and the probe's epsilon of a right graph; no file is left; a graph of another correction is
    refused. Of all engines one is open at a time: a large model's take gigabytes."""
    opened, most, start, close = [0], [0], OrtEngine.__init__, OrtEngine.close

    def counted(engine: OrtEngine, *given: Any, **more: Any) -> None:
        start(engine, *given, **more)
        opened[0] += 1
        most[0] = max(most[0], opened[0])

    def closed(engine: OrtEngine) -> None:
        opened[0] -= 1
        close(engine)

    monkeypatch.setattr(OrtEngine, "__init__", counted)
    monkeypatch.setattr(OrtEngine, "close", closed)
    with TorchEngine(simulate(case.network, case.quantized, emission), case.sampling) as engine:
        held_out = measure(engine, case.sampling, case.trajectories, "held_out")
    judged = gate.Case(
        "w4a4",
        case.graph(emission),
        case.quantized.precision,
        emission,
        case.quantized,
        case.correction,
        held_out,
    )
    before = sorted(path.name for path in case.folder.iterdir())
    verdict = judge_graph(judged, case.sampling, case.trajectories, case.network)
    assert isinstance(verdict.figures, QuantizedFigures) and verdict.figures.noise.limit_z is not None
    assert (
        verdict.epsilon.shape == (2, *case.network.info.sample_shape) and np.isfinite(verdict.epsilon).all()
    )
    assert sorted(path.name for path in case.folder.iterdir()) == before
    assert (opened, most) == ([0], [1])
    monkeypatch.setattr(judgement, "JUDGED_STEPS", 2)
    fewer = judge_graph(judged, case.sampling, case.trajectories, case.network).figures
    assert isinstance(fewer, QuantizedFigures)
    assert len(fewer.noise.mse_ratio) == 2 < len(verdict.figures.noise.mse_ratio) == len(case.sampling)
    assert fewer.noise.mse_ratio == tuple(verdict.figures.noise.mse_ratio[i] for i in (0, -1))
    if emission is Emission.ORT_CPU:  # an older ONNX Runtime, where products saturate: right in float
        monkeypatch.setattr(ort, "saturates", lambda: True)
        monkeypatch.setattr(ort, "TAKES_UINT8", (99, 0))
        in_float = judge_graph(judged, case.sampling, case.trajectories, case.network).figures
        assert isinstance(in_float, QuantizedFigures) and in_float.layers == verdict.figures.layers
    float_case = replace(judged, correction=None, held_out=())
    with pytest.raises(ParityError, match="step 0 differs from the torch model"):
        judge_graph(float_case, case.sampling, case.trajectories, case.network)
    assert sorted(path.name for path in case.folder.iterdir()) == before


def test_folded_rows_are_where_they_belong(rng: np.random.Generator) -> None:
    schedule = NoiseSchedule.from_config({"clip_sample": False}, 4, 0.0)
    sampling = Sampling(ModelInfo("toy", (C, 4, 4), (), ""), schedule)
    gain, offset = 1 + 0.1 * rng.standard_normal((4, C)), 0.1 * rng.standard_normal((4, C))
    x = rng.standard_normal((4, 2, C, 4, 4)).astype(np.float32)
    trajectories: Any = SimpleNamespace(first=lambda n: (range(2), x, x, {}))
    table = Correction(gain, offset, np.zeros(4))

    def engine(g: Any, o: Any) -> FakeEngine:
        def run(feeds: Feeds) -> Array:
            i = int(feeds[STEP][0])  # type: ignore[call-overload]
            return np.asarray(g[i][:, None, None] * 0.5 * feeds[SAMPLE] + o[i][:, None, None], np.float32)

        return FakeEngine(run, (SAMPLE, TIMESTEP, STEP))

    assert check_fold("x", engine(gain, offset), table, sampling, trajectories) < FOLD_TOLERANCE
    for wrong in (
        engine(np.roll(gain, 1, 0), np.roll(offset, 1, 0)),
        engine(np.ones_like(gain), np.zeros_like(offset)),
        engine(gain, offset * 1.01),
    ):
        with pytest.raises(ParityError, match="is not its table's"):
            check_fold("x", wrong, table, sampling, trajectories)
