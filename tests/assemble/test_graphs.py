"""The graphs of a bundle: equal ones once, judged once, and what their probes allow."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir
import pytest
from torch import nn
from toy import INFO, calibrated

from ptqd_export.assemble import graphs
from ptqd_export.assemble.graphs import PROBE_FLOOR, emit, emit_update, figures_of, judge, probes_of
from ptqd_export.assemble.measure import Measured
from ptqd_export.core.backend import Emission
from ptqd_export.core.figures import FloatFigures
from ptqd_export.core.gate import Gated
from ptqd_export.core.noise import Correction
from ptqd_export.core.precision import FP32, Precision
from ptqd_export.core.quant import QuantizedNetwork
from ptqd_export.core.sampling import Sampling
from ptqd_export.core.schedule import NoiseSchedule
from ptqd_export.errors import ParityError
from ptqd_export.parity.gate import Verdict

W8A8, W4A16 = Precision(8, 8), Precision(4, 16)
FP16 = Precision(16, 16)
SAMPLING = Sampling(INFO, NoiseSchedule.from_config({"clip_sample": False}, 3, 1.0))


def measured(noise: float = 0.0) -> Measured:
    class Fake(Measured):
        def first_step_rms(self) -> float:
            return noise

    zeros = np.zeros(3)
    return Fake((), (), Gated(Correction.identity(3, 2), ("nothing",) * 3, zeros, zeros, 0.0))


@pytest.fixture
def emitted(toy: nn.Module, base: ir.Model, tmp_path: Path) -> Any:
    quantized = {p: calibrated(toy, p) for p in (W8A8, W4A16)}
    quantized |= {p: QuantizedNetwork(p, {}) for p in (FP32, FP16)}
    known = {(p, e): measured() for p in (W8A8, W4A16) for e in Emission}
    return emit(base, SAMPLING, quantized, known, tmp_path)


def test_graphs_that_are_equal_share_a_file(emitted: Any, tmp_path: Path) -> None:
    """fp32's in all emissions that keep float32, and those of float precisions in ort-cpu, which has no
    half."""
    files = {graph.name: graph.file for graph in emitted}
    assert len(files) == 12 and {*files.values()} == {p.name for p in tmp_path.glob("*.onnx")}
    digests = {graph.file: graph.digest for graph in emitted}
    assert len(set(digests.values())) == len(digests) < 12
    assert files["fp32.half"] == files["fp32.portable"]
    assert files["w8a8.half"] != files["w8a8.portable"] != files["w8a8.ort-cpu"]
    assert all((len(graph.quantized) > 0) == (graph.precision == W8A8) for graph in emitted)


def test_every_distinct_graph_is_judged_once(
    emitted: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[str] = []

    def judge_graph(case: Any, *rest: object) -> Verdict:
        seen.append(case.name)
        return Verdict(FloatFigures(float(len(seen))), np.ones((2, 2, 8, 8), np.float32))

    monkeypatch.setattr(graphs, "judge_graph", judge_graph)
    said: list[str] = []
    quantized = {graph.precision: QuantizedNetwork(graph.precision, {}) for graph in emitted}
    nothing: Any = None
    verdicts = judge(emitted, tmp_path, SAMPLING, nothing, quantized, {}, nothing, said.append)
    distinct = {graph.file for graph in emitted}
    assert len(seen) == len(said) == len(distinct) and set(verdicts) == distinct
    figures = figures_of(emitted, verdicts, {})
    assert set(figures) == {graph.name for graph in emitted}
    assert figures["fp32.half"] == figures["fp32.portable"] != figures["w8a8.portable"]


@pytest.mark.parametrize(
    ("precision", "noise", "allowed"),
    [
        (W8A8, 0.1, 0.2),  # two draws of the noise
        (W8A8, 1e-6, PROBE_FLOOR),  # what float kernels may differ by
        (W8A8, 7.0, 1.0),  # never more than epsilon itself
        (FP32, 0.0, PROBE_FLOOR),
        (FP16, 0.0, 1e-2),  # its probe serves the graph in half precision too
    ],
)
def test_what_a_probe_allows(emitted: Any, precision: Precision, noise: float, allowed: float) -> None:
    """Of an epsilon whose RMS is 1, for every graph with numerics of its own."""
    mine = [graph for graph in emitted if graph.precision == precision]
    verdicts = {g.file: Verdict(FloatFigures(0.0), np.ones((2, 2, 8, 8), np.float32)) for g in mine}
    known = {} if precision.is_float else {(precision, e): measured(noise) for e in Emission}
    probes = probes_of(mine, verdicts, known)
    assert {e for _, e in probes} == {e.numerics(precision) for e in Emission}
    assert all(probe.allowed == pytest.approx(allowed) for probe in probes.values())


def test_an_update_that_does_something_else_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    update = emit_update(SAMPLING, tmp_path)
    assert update.file == "update.onnx" and (tmp_path / "update.onnx").is_file() and len(update.digest) == 64
    other = replace(SAMPLING, schedule=replace(SAMPLING.schedule, eta=0.5))
    assert emit_update(other, tmp_path).digest != update.digest
    real = graphs.sampler_update
    monkeypatch.setattr(graphs, "sampler_update", lambda sampling: real(other))
    with pytest.raises(
        ParityError, match="the sampler's update does not do what the schedule says at step 0"
    ):
        emit_update(SAMPLING, tmp_path)
