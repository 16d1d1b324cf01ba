"""The parity gate: does an engine compute what was simulated? In the sense of the only thing that can be asked of it.

Two correct executions of one quantized network drift apart: a float difference of 1e-7 flips a rounding, and more follow.
So engines are judged layer by layer on the same inputs (outputs equal, or one quantization step apart in rare ties, never
two), and end to end by statistics: k, bias and residual variance per step within their standard errors.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from ..conditioning import ModelInfo
from ..engine import EPSILON, SAMPLE, STEP, TIMESTEP, Array, Engine
from ..errors import ParityError
from ..noise import Correction, NoiseStats, jackknife
from ..quant import Emission, LayerQuant, QuantizedNetwork
from ..sampler import predict_epsilon
from ..schedule import NoiseSchedule

F64 = npt.NDArray[np.float64]

MAX_SHARE_APART = 1e-3
"""Share of a layer's outputs that may lie one quantization step from the simulation: rounding ties."""
FLOAT_TOLERANCE = 2e-5
"""Relative to a channel's largest output: what float32 accumulation of one layer may differ by; a quantization step is far above."""
FALSE_ALARM = 0.0027
"""Chance that a right engine fails on one statistic over all steps: that of three standard deviations."""
FOLD_TOLERANCE = 1e-5
"""Relative to the largest |epsilon|: a multiplication and an addition in float32, and the division that undoes them."""
MAX_FLOAT_ERROR = 1e-4
"""RMS difference of an fp32 engine to the torch model, relative to the RMS of epsilon."""
HALF = 2.0**-11
"""Largest relative error of one rounding to float16."""
ROUNDINGS = 6.0
"""Standard deviations of a sum of roundings that are let pass."""
MAX_HALF_ERROR = 1e-2
"""As MAX_FLOAT_ERROR, for fp16: roundings of 2^-11 that some hundred operations add up."""


def check_layers(
    name: str,
    graph: Path,
    network: QuantizedNetwork,
    emission: Emission,
    info: ModelInfo,
    schedule: NoiseSchedule,
    trajectories: Any,
    torch_network: Any,
) -> dict[str, float]:
    """Each quantized layer of the shipped graph against its simulation, both on the inputs that the engine computed.

    At the first, middle and last step, for two samples. A copy of the graph with the layers' inputs and outputs exposed runs in
    the engine; where the output is not quantized, a step is the largest change that one input code makes.

    Returns:
        {"layers", "outputs", "share_apart", "largest_steps"}.
    Raises:
        ParityError: naming the layer.
    """
    from ..backends.ort import OrtEngine
    from ..calibrate import LayerSimulator
    from ..export import expose_layers

    debug = graph.with_name(f".layers-{graph.name}")
    try:
        sites = expose_layers(graph, debug)
        missing = sorted(set(network.layers) - set(sites))
        if missing:
            raise ParityError(f"{name}: layer {missing[0]} is quantized in the simulation but not in the graph")
        # The portable graph is an interchange form: judged as written, without a runtime's fusions.
        engine = OrtEngine(debug, optimise=emission is Emission.ORT_CPU)
        total, apart, worst = 0, 0, 0.0
        with engine:
            for step in sorted({0, len(schedule) // 2, len(schedule) - 1}):
                values = engine(_feeds(info, schedule, trajectories, step))
                for layer_name, (source, target) in sites.items():
                    layer = network.layers[layer_name]
                    simulated = LayerSimulator(torch_network, layer, emission)(np.asarray(values[source], np.float32))
                    got = np.asarray(values[target], np.float32)
                    axis = 1 if layer.kind == "conv" else got.ndim - 1
                    one = _steps(layer, emission, got.ndim, axis)
                    scale = np.abs(simulated).max(axis=tuple(i for i in range(got.ndim) if i != axis), keepdims=True)
                    difference = np.abs(got - simulated)
                    if values[target].dtype == np.float16:
                        # Sum and bias are rounded one after the other, and before them every weight and input.
                        difference -= 2 * HALF * scale + ROUNDINGS * HALF * _spread(layer, np.asarray(values[source], np.float64), got.ndim, axis)
                    else:
                        difference -= FLOAT_TOLERANCE * np.maximum(scale, one)
                    off = difference > 0
                    largest = float((difference / one).max())
                    share = float(off.mean())
                    if share > MAX_SHARE_APART or largest > 1.5:
                        raise ParityError(
                            f"{name}: layer {layer_name} at step {step} differs from its simulation: {share:.2%} of outputs, by up to {largest:.1f} "
                            f"quantization steps (allowed: {MAX_SHARE_APART:.2%}, 1 step); the backend does not compute what was calibrated"
                        )
                    total, apart, worst = total + off.size, apart + int(off.sum()), max(worst, largest if off.any() else 0.0)
        return {"layers": len(sites), "outputs": total, "share_apart": apart / total, "largest_steps": round(worst, 3)}
    finally:
        debug.unlink(missing_ok=True)


def _steps(layer: LayerQuant, emission: Emission, ndim: int, axis: int) -> F64:
    """One quantization step of a layer's output, broadcastable to it: for FP8 of its largest numbers; of a weight where only they are."""
    if emission is Emission.ORT_CPU and layer.output_scale is not None:
        steps = np.full(len(layer.weight_scale), layer.output_scale, np.float64)
    else:
        codes = np.abs(layer.weight_values().reshape(len(layer.weight), -1).astype(np.float64)).max(1)
        step = 1.0 if layer.weight_only else layer.input_scale * (32 if layer.number == "fp8" else 1)
        steps = (1.0 if layer.weight_only else np.maximum(codes, 1.0)) * layer.weight_scale.astype(np.float64) * step
    return _along(steps, ndim, axis)


def _spread(layer: LayerQuant, x: F64, ndim: int, axis: int) -> F64:
    """Root of the sum of squares of a layer's products, per output channel, broadcastable to its output: what their roundings add up to.

    For the place and sample where the input is largest.
    """
    weight = layer.weight_values().reshape(len(layer.weight), -1).astype(np.float64) * layer.weight_scale[:, None].astype(np.float64)
    largest = np.square(x).mean(axis=1 if layer.kind == "conv" else -1).max()
    return _along(np.sqrt(2 * np.square(weight).sum(1) * largest), ndim, axis)


def _along(values: F64, ndim: int, axis: int) -> F64:
    shape = [1] * ndim
    shape[axis] = -1
    return values.reshape(shape)


def _feeds(info: ModelInfo, schedule: NoiseSchedule, trajectories: Any, step: int) -> dict[str, Array]:
    _, x, _, conditions = trajectories.first(2)
    n = x.shape[1]
    return {
        SAMPLE: np.ascontiguousarray(x[step]),
        TIMESTEP: np.full(n, schedule.timesteps[step], np.int64),
        STEP: np.array([step], np.int64),
        **conditions,
    }


def check_noise(name: str, engine: Sequence[NoiseStats], simulated: Sequence[NoiseStats], rounding: float = 0.0) -> dict[str, Any]:
    """k, bias, residual variance and error per step of engine and simulation, both corrected, over the same held-out trajectories.

    The two saw the same inputs, so their difference is judged by its own standard error: a jackknife that leaves a trajectory
    out of both at once.

    Args:
        rounding: relative error of the engine's floats that the simulation does not have (HALF for float16): an addition to the noise
            that is the same in every trajectory. What it may change a statistic by counts as a standard error at least.
    Returns:
        {"largest_z": {statistic: value}, "limit_z", "mse_ratio": engine / simulation per step, "snr_q_corrected": engine's per step}.
    Raises:
        ParityError: naming the step and the statistic.
    """
    total, reference = NoiseStats.pool(engine), NoiseStats.pool(simulated)
    limit = max_standard_errors(len(engine), len(total.count))
    worst: dict[str, float] = {}
    for statistic, of in STATISTICS.items():
        a, b = of(total), of(reference)
        difference, error = jackknife(lambda x, y, of=of: of(x) - of(y), engine, simulated)
        # Two executions of one network may differ by float rounding alone, which has no spread worth the name.
        power = np.sqrt((reference.ee / np.maximum(reference.count, 1.0)[:, None]).mean(1)) * rounding
        floor = FLOAT_TOLERANCE * np.abs(b) + 1e-12 + _moved(statistic, b, rounding, power[:, None] if b.ndim == 2 else power)
        z = (np.abs(difference) / np.maximum(error, floor)).reshape(len(a), -1).max(1)
        worst[statistic] = round(float(z.max()), 3)
        if not z.max() <= limit:
            step = int(z.argmax())
            raise ParityError(
                f"{name}: {statistic} at step {step} is {np.ravel(a[step])[0]:.4g} on the engine and {np.ravel(b[step])[0]:.4g} in the simulation, "
                f"{z.max():.1f} standard errors apart (allowed: {limit:.1f})"
            )
    ratio = STATISTICS["mse"](total) / np.maximum(STATISTICS["mse"](reference), 1e-30)
    finite = [float(v) if np.isfinite(v) else None for v in total.snr]
    return {"largest_z": worst, "limit_z": round(limit, 3), "mse_ratio": ratio.round(4).tolist(), "snr_q_corrected": finite}


def _moved(statistic: str, value: F64, rounding: float, size: F64) -> F64 | float:
    """By how much an error `rounding` times e, of RMS `size`, moves a statistic of this value, at most."""
    if statistic == "k":
        return rounding
    return size if statistic == "bias" else 2 * size * np.sqrt(np.abs(value)) + size**2


def max_standard_errors(n: int, n_steps: int) -> float:
    """Standard errors that statistics of two right executions may differ by: Student's t for n trajectories, over n_steps at once."""
    from scipy.stats import t

    return float(t.ppf(1 - FALSE_ALARM / 2 / n_steps, n - 1))


STATISTICS: Mapping[str, Callable[[NoiseStats], F64]] = {
    "k": lambda s: s.k,
    "bias": lambda s: s.bias,
    "var": lambda s: s.var,
    "mse": lambda s: s.mse(np.ones_like(s.e), np.zeros_like(s.e)),
}


def check_fold(
    name: str,
    engine: Engine,
    correction: Correction,
    info: ModelInfo,
    schedule: NoiseSchedule,
    trajectories: Any,
) -> float:
    """Every row of the folded tables is where it should be: exact up to float rounding, whatever the noise.

    At one x and timestep the network's raw output does not depend on the input `step`, only the tables do, so
    epsilon_i = gain_i raw + offset_i for all i must follow from row 0. (Prediction types other than epsilon fold a term in x
    with the same gain; it depends on the row as well and is left to the statistics.)

    Returns:
        the largest difference relative to the largest |epsilon|.
    Raises:
        ParityError: naming the step.
    """
    if STEP not in engine.inputs or schedule.prediction_type != "epsilon":
        return 0.0
    feeds = _feeds(info, schedule, trajectories, 0)
    gain, offset = (table[:, :, None, None] for table in (correction.gain, correction.offset))
    raw = (engine(feeds)[EPSILON].astype(np.float64) - offset[0]) / gain[0]
    worst = 0.0
    for step in range(len(schedule)):
        got = engine({**feeds, STEP: np.array([step], np.int64)})[EPSILON].astype(np.float64)
        expected = gain[step] * raw + offset[step]
        error = float(np.abs(got - expected).max() / np.abs(expected).max())
        if not error <= FOLD_TOLERANCE:
            raise ParityError(
                f"{name}: the correction of step {step} in the graph is not its table's: epsilon is off by {error:.2g} of its largest value"
            )
        worst = max(worst, error)
    return worst


def check_float(
    name: str, engine: Engine, reference: Engine, info: ModelInfo, schedule: NoiseSchedule, trajectories: Any, guidance_scale: float, allowed: float
) -> dict[str, float]:
    """A float engine against the torch model, per step, on two trajectories.

    Args:
        allowed: RMS difference relative to the RMS of epsilon: MAX_FLOAT_ERROR or MAX_HALF_ERROR.

    Raises:
        ParityError: naming the step.
    """
    _, x, _, conditions = trajectories.first(2)
    worst = 0.0
    for step in range(len(schedule)):
        got, expected = (predict_epsilon(e, x[step], step, schedule, info, conditions, guidance_scale) for e in (engine, reference))
        error = float(np.sqrt(((got - expected) ** 2).mean() / (expected**2).mean()))
        if not error <= allowed:
            raise ParityError(f"{name}: step {step} differs from the torch model by {error:.2g} of its RMS (allowed: {allowed:g})")
        worst = max(worst, error)
    return {"largest_relative_error": worst}


def check_structure(name: str, emitted: Path, optimised: Path, network: QuantizedNetwork) -> None:
    """Every layer that was to run in integers does in the optimised graph: convs as QLinearConv, linears as MatMulIntegerToFloat.

    Args:
        emitted: the graph as written.
        optimised: the graph as ONNX Runtime runs it.
    Raises:
        ParityError: with the counts.
    """
    from ..export import float_convs, op_counts, quantized_convs

    ops, convs = op_counts(optimised), quantized_convs(emitted)
    left = len(float_convs(optimised)) - (len(float_convs(emitted)) - convs)
    if ops["QLinearConv"] != convs or left:
        raise ParityError(
            f"{name}: {ops['QLinearConv']} of {convs} quantized convs run as QLinearConv, {left} run in float that were not meant to: "
            "this onnxruntime fuses the graph differently; install the pinned version"
        )
    linears = sum(layer.kind == "linear" for layer in network.layers.values())
    if ops["MatMulIntegerToFloat"] < linears:
        raise ParityError(
            f"{name}: {ops['MatMulIntegerToFloat']} of {linears} quantized linear layers run as MatMulIntegerToFloat: "
            "this onnxruntime fuses the graph differently; install the pinned version"
        )


def correct_all(parts: Sequence[NoiseStats], correction: Correction) -> list[NoiseStats]:
    """The simulation's sums as the corrected graph would have given them."""
    return [part.corrected(correction) for part in parts]


def summary(figures: Mapping[str, Any]) -> str:
    """One line for people."""
    if "largest_relative_error" in figures:
        return f"equal to the torch model within {figures['largest_relative_error']:.1g} RMS"
    layers, noise = figures["layers"], figures["noise"]
    apart = f"{layers['layers']} layers, {layers['share_apart']:.1e} of outputs one step apart"
    return f"{apart}; noise within {max(noise['largest_z'].values()):.2f} standard errors (limit {noise['limit_z']:.1f})"
