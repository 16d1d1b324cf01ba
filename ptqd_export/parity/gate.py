"""The parity gate: does a graph compute what was simulated?

It gives one Verdict per distinct graph; a wrong graph stops the build.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import numpy.typing as npt

from ..backends import open_engine
from ..backends.ort import OrtEngine
from ..calibrate import Network, TorchEngine, Trajectories, measure
from ..core.backend import Emission, Floats
from ..core.engine import EPSILON, STEP, Engine
from ..core.engine_build import Compiled, PlanReport
from ..core.figures import Figures, FloatFigures, NoiseFigures, QuantizedFigures
from ..core.noise import Correction, NoiseStats
from ..core.precision import Precision
from ..core.quant import QuantizedNetwork
from ..core.sampling import Sampling
from ..errors import ParityError
from ..export import calls, float_convs, op_counts
from ..runtime.probe import probe
from .judgement import HALF, ROUNDING, judged_steps, max_float_error
from .layers import check_layers
from .noise import check_noise

FOLD_TOLERANCE = 1e-5
"""Largest allowed error of a folded table, relative to the largest |epsilon|.

It covers a multiplication and an addition in float32, and the division that undoes them.
"""


@dataclass(frozen=True)
class Case:
    """A graph, and the simulation that it is judged by.

    Attributes:
        name: the graph's name, for messages.
        file: the graph's file.
        quantized: the layers that the graph was made from.
        correction: the correction folded into it; None at float precisions.
        held_out: the simulation's sums per held-out trajectory, before correction; empty at float precisions.
    """

    name: str
    file: Path
    precision: Precision
    emission: Emission
    quantized: QuantizedNetwork
    correction: Correction | None
    held_out: Sequence[NoiseStats]


@dataclass(frozen=True)
class Verdict:
    """What was found about one distinct graph.

    Attributes:
        figures: what was measured.
        epsilon: its prediction for the probe's inputs (`runtime.probe`), float32 (2, C, H, W).
    """

    figures: Figures
    epsilon: npt.NDArray[np.float32]


def judge_graph(case: Case, sampling: Sampling, trajectories: Trajectories, network: Network) -> Verdict:
    """Run a graph on ONNX Runtime's CPU provider, and compare it with its simulation.

    The provider optimises graphs of its own emission; the others run as they are written.

    Raises:
        ParityError: the graph does not compute what was simulated; the message says where.
    """
    native = case.emission is Emission.ORT_CPU
    integer = (
        case.correction is not None and native and case.emission.numerics(case.precision) is case.emission
    )
    optimised = case.file.with_name(".optimised.onnx")
    # First, as this takes an engine of its own: of a large model two at a time are too much memory.
    layers = None
    if case.correction is not None:
        layers = check_layers(case.name, case.file, case.quantized, case.emission, sampling, trajectories)
    try:
        with OrtEngine(case.file, optimise=native, optimised_path=optimised if integer else None) as engine:
            if case.correction is None or layers is None:
                figures: Figures = _check_float_case(case, engine, sampling, trajectories, network)
            else:
                if integer and engine.integers:
                    check_structure(case.name, case.file, optimised)
                fold = check_fold(case.name, engine, case.correction, sampling, trajectories)
                rounding = HALF if case.emission is Emission.HALF else 0.0
                noise = _noise_of(case, case.correction, engine, sampling, trajectories, rounding)
                figures = QuantizedFigures(fold, layers, noise)
            return Verdict(figures, probe(engine, sampling))
    finally:
        for leftover in case.file.parent.glob(".optimised*"):
            leftover.unlink()


@dataclass(frozen=True)
class BackendVerdict:
    """What was found about a graph in the runtime that compiles it.

    Attributes:
        figures: what was measured; those of the layers are of the graph as it is written.
        plan: which of its layers run in 8 bits.
        floats: what it is computed in between them on this machine.
    """

    figures: Figures
    plan: PlanReport
    floats: Floats


def judge_compiled(
    case: Case,
    verdict: Verdict,
    backend: str,
    quantized: Mapping[str, str],
    sampling: Sampling,
    trajectories: Trajectories,
    network: Network,
) -> BackendVerdict:
    """Judge a graph once more, in a runtime that compiles it itself and tells what it made of its layers.

    Args:
        verdict: of the graph as it is written.
        quantized: nodes meant to run in 8 bits.
    Raises:
        ParityError: it does not compute there what was simulated; the message says where.
        BackendUnavailable, GraphError: it does not run there.
    """
    _, x, _, conditions = trajectories.first(2)
    with open_engine(backend, case.file) as engine:
        if not isinstance(engine, Compiled):
            raise TypeError(f"{backend} does not tell what it compiles")
        case = replace(case, name=f"{case.precision}.{backend}")
        if case.correction is None:
            figures: Figures = _check_float_case(case, engine, sampling, trajectories, network)
        else:
            fold = check_fold(case.name, engine, case.correction, sampling, trajectories)
            noise = _noise_of(case, case.correction, engine, sampling, trajectories, ROUNDING[engine.floats])
            assert isinstance(verdict.figures, QuantizedFigures)
            figures = replace(verdict.figures, fold=fold, noise=noise)
        plan = engine.report(quantized, sampling.conditional.feeds(x[0], 0, conditions))
        return BackendVerdict(figures, plan, engine.floats)


def _check_float_case(
    case: Case, engine: Engine, sampling: Sampling, trajectories: Trajectories, network: Network
) -> FloatFigures:
    allowed = max_float_error(case.precision, case.emission)
    with TorchEngine(network.module, sampling) as reference:
        return check_float(case.name, engine, reference, sampling, trajectories, allowed)


def _noise_of(
    case: Case,
    correction: Correction,
    engine: Engine,
    sampling: Sampling,
    trajectories: Trajectories,
    rounding: float,
) -> NoiseFigures:
    steps = judged_steps(len(sampling))
    measured = measure(engine, sampling, trajectories, "held_out", f"parity of {case.name}", steps)
    simulated = [part.corrected(correction).only(steps) for part in case.held_out]
    return check_noise(case.name, measured, simulated, rounding)


def check_fold(
    name: str, engine: Engine, correction: Correction, sampling: Sampling, trajectories: Trajectories
) -> float:
    """Check that every row of the folded tables is in its place, exactly up to float rounding.

    The noise plays no part: at one x and timestep only the tables depend on the input `step`, not the
    network's raw output, so epsilon_i = gain_i raw + offset_i for all i must follow from row 0. (Prediction
    types other than epsilon fold a term in x with the same gain; it depends on the row as well and is left to
    the statistics.)

    Returns:
        the largest difference relative to the largest |epsilon|.
    Raises:
        ParityError: a row is wrong; names the step.
    """
    if STEP not in engine.inputs or sampling.schedule.prediction_type != "epsilon":
        return 0.0
    _, x, _, conditions = trajectories.first(2)
    feeds = sampling.conditional.feeds(x[0], 0, conditions)
    gain, offset = (table[:, :, None, None] for table in (correction.gain, correction.offset))
    raw = (engine(feeds)[EPSILON].astype(np.float64) - offset[0]) / gain[0]
    worst = 0.0
    for step in range(len(sampling)):
        got = engine({**feeds, STEP: np.array([step], np.int64)})[EPSILON].astype(np.float64)
        expected = gain[step] * raw + offset[step]
        error = float(np.abs(got - expected).max() / np.abs(expected).max())
        if not error <= FOLD_TOLERANCE:
            raise ParityError(
                f"{name}: the correction of step {step} in the graph is not its table's: "
                f"epsilon is off by {error:.2g} of its largest value"
            )
        worst = max(worst, error)
    return worst


def check_float(
    name: str,
    engine: Engine,
    reference: Engine,
    sampling: Sampling,
    trajectories: Trajectories,
    allowed: float,
) -> FloatFigures:
    """Compare a float engine with the torch model, per judged step, on two trajectories.

    Args:
        allowed: largest RMS difference, relative to the RMS of epsilon.
    Raises:
        ParityError: a step differs by more; names it.
    """
    _, x, _, conditions = trajectories.first(2)
    worst = 0.0
    for step in judged_steps(len(sampling)):
        # One sample at a time: as it is written, a large graph's attention takes gigabytes for each.
        got, expected = (sampling.predict_singly(e, x[step], step, conditions) for e in (engine, reference))
        error = float(np.sqrt(((got - expected) ** 2).mean() / (expected**2).mean()))
        if not error <= allowed:
            raise ParityError(
                f"{name}: step {step} differs from the torch model by {error:.2g} of its RMS (allowed: "
                f"{allowed:g})"
            )
        worst = max(worst, error)
    return FloatFigures(worst)


def check_structure(name: str, emitted: Path, optimised: Path) -> None:
    """Check that every call of a layer that was meant to run in integers does.

    Convs must run as QLinearConv, linear layers as MatMulIntegerToFloat.

    Args:
        emitted: the graph as written.
        optimised: the graph as ONNX Runtime runs it.
    Raises:
        ParityError: a call runs in float; gives the counts.
    """
    ops, meant = op_counts(optimised), calls(emitted)
    advice = "this onnxruntime fuses the graph differently; install the pinned version"
    convs, left = ops["QLinearConv"], len(float_convs(optimised)) - meant.float_convs
    if convs != meant.integer_convs or left > 0:
        raise ParityError(
            f"{name}: {convs} of {meant.integer_convs} calls of quantized convs run as QLinearConv, {left} "
            f"run in float that were not meant to: {advice}"
        )
    linears = ops["MatMulIntegerToFloat"]
    if linears != meant.integer_linears:
        raise ParityError(
            f"{name}: {linears} of {meant.integer_linears} calls of quantized linear layers run as "
            f"MatMulIntegerToFloat: {advice}"
        )
