"""The gate's verdict on what a runtime compiles of a graph by itself."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from helpers import Built, reseal

pytest.importorskip("openvino")

from ptqd_export.backends import openvino
from ptqd_export.bundle import Bundle
from ptqd_export.calibrate import TorchEngine, measure, simulate
from ptqd_export.core.backend import OPENVINO, OPENVINO_FP32, Emission
from ptqd_export.core.engine import EPSILON
from ptqd_export.core.figures import LayerFigures, NoiseFigures, QuantizedFigures
from ptqd_export.errors import BackendUnavailable, ParityError
from ptqd_export.parity import gate
from ptqd_export.parity.gate import BackendVerdict, judge_compiled
from ptqd_export.parity.machines import verify_engines

Case = Any
"""That of conftest."""


@pytest.fixture(scope="module")
def judged(case: Case) -> gate.Case:
    """The portable graph, and its simulation."""
    with TorchEngine(simulate(case.network, case.quantized, Emission.PORTABLE), case.sampling) as engine:
        held_out = measure(engine, case.sampling, case.trajectories, "held_out")
    graph, net = case.graph(Emission.PORTABLE), case.quantized
    return gate.Case("w4a4", graph, net.precision, Emission.PORTABLE, net, case.correction, held_out)


def judge(case: Case, judged: gate.Case, name: str) -> BackendVerdict:
    layers, noise = LayerFigures(3, 9, 0.0, 0.0), NoiseFigures({}, None, (), ())
    written = gate.Verdict(QuantizedFigures(0.0, layers, noise), np.zeros(1, np.float32))
    meant = dict.fromkeys(case.quantized.layers, "int8")
    return judge_compiled(judged, written, name, meant, case.sampling, case.trajectories, case.network)


@pytest.mark.parametrize("name", [OPENVINO, OPENVINO_FP32])
def test_a_right_graph(case: Case, judged: gate.Case, name: str) -> None:
    """Its tables are in place, its noise is the simulation's, and all of its layers run in 8 bits, where
    their products are exact."""
    found = judge(case, judged, name)
    assert isinstance(found.figures, QuantizedFigures) and found.figures.layers.layers == 3
    assert 0 < found.figures.fold < gate.FOLD_TOLERANCE
    assert set(found.figures.noise.largest_z) == {"k", "bias", "var", "mse"}
    assert found.plan.meant == len(case.quantized.layers)
    assert found.plan.taken == (0 if openvino.saturates() else found.plan.meant)
    narrow = name == OPENVINO and openvino.has_bfloat16()
    assert found.floats == ("bfloat16" if narrow else "float32")


def test_a_wrong_one(case: Case, judged: gate.Case, monkeypatch: pytest.MonkeyPatch) -> None:
    """Another correction, or a runtime that computes something else, stops the build."""
    other = replace(case.correction, gain=case.correction.gain[::-1])
    with pytest.raises(ParityError, match=r"w4a4\.openvino: the correction of step . in the graph is not"):
        judge(case, replace(judged, correction=other), OPENVINO)
    real = openvino.OpenVinoEngine.__call__

    def wrong(self: Any, feeds: Any) -> Any:
        out = real(self, feeds)
        noise = np.random.default_rng(int(1e6 * abs(out[EPSILON][0, 0, 0, 0]))).standard_normal(
            out[EPSILON].shape
        )
        return {EPSILON: (out[EPSILON] + out[EPSILON].std() * noise).astype(np.float32)}

    monkeypatch.setattr(gate, "check_fold", lambda *_: 0.0)
    monkeypatch.setattr(openvino.OpenVinoEngine, "__call__", wrong)
    with pytest.raises(ParityError, match=r"w4a4\.openvino: (k|bias|var|mse) at step . is"):
        judge(case, judged, OPENVINO)


def test_verify_runs_what_the_bundle_was_built_for(
    spoilt: Path, own: Built, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each graph is compared with its probe, its layers in 8 bits are counted; what cannot run is said."""
    assert not any(OPENVINO in name for name in verify_engines(own.bundle)[0])

    def built(data: Any) -> None:
        data["artifacts"] += [
            a | {"backend": OPENVINO, "file": a["file"].replace("ort-cpu", "portable")}
            for a in data["artifacts"]
            if a["precision"] != "fp32"
        ]

    reseal(spoilt, built)
    bundle = Bundle.open(spoilt)
    names, left_out = verify_engines(bundle)
    quantized = [p for p in bundle.manifest.bops if not p.is_float]
    n = len(bundle.manifest.graph(quantized[0], Emission.PORTABLE).quantized)
    taken = 0 if openvino.saturates() else n
    assert {f"{p}.{OPENVINO} ({taken} of {n} layers in 8 bits)" for p in quantized} <= set(names)
    assert f"fp32.{OPENVINO}" in names and left_out == {}

    def fails() -> Any:
        raise BackendUnavailable("not here")

    monkeypatch.setattr(openvino, "runtime", fails)
    names, left_out = verify_engines(bundle)
    assert left_out == {f"{len(bundle.manifest.bops)} graphs on {OPENVINO}": "not here"}
