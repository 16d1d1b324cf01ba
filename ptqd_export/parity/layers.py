"""Compare the quantized layers of a graph with their simulation, on the same inputs."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from ..backends.ort import OrtEngine
from ..calibrate import LayerSimulator, Trajectories
from ..core.backend import Emission
from ..core.engine import Array
from ..core.figures import LayerFigures
from ..core.quant import LayerQuant, QuantizedNetwork
from ..core.sampling import Sampling
from ..errors import ParityError
from ..export import expose_layers
from .judgement import (
    F64,
    FLOAT_TOLERANCE,
    HALF,
    MAX_SHARE_APART,
    ROUNDINGS,
    Apart,
    float_tolerance,
    judge,
)


def check_layers(
    name: str,
    graph: Path,
    quantized: QuantizedNetwork,
    emission: Emission,
    sampling: Sampling,
    trajectories: Trajectories,
) -> LayerFigures:
    """Compare each quantized layer of a graph with its simulation, on the inputs that the engine computed.

    This is done at the first, middle and last step, for two samples. The engine runs a copy of the graph with
    the layers' inputs and outputs exposed. Where an output is not quantized, a step is the largest change
    that one input code makes.

    Raises:
        ParityError: a layer differs; names it.
    """
    debug = graph.with_name(f".layers-{graph.name}")
    try:
        sites = expose_layers(graph, debug)
        missing = sorted(set(quantized.layers) - set(sites))
        if missing:
            raise ParityError(
                f"{name}: layer {missing[0]} is quantized in the simulation but not in the graph"
            )
        total = Apart()
        _, x, _, conditions = trajectories.first(2)
        # The portable graph is an interchange form, so it is judged as written, without a runtime's fusions.
        with OrtEngine(debug, optimise=emission is Emission.ORT_CPU) as engine:
            for step in sorted({0, len(sampling) // 2, len(sampling) - 1}):
                # Computed one at a time, for less memory; judged together, as a channel's largest output is
                # that of both.
                values = [
                    engine(sampling.conditional.feeds(one, step, own))
                    for one, own in sampling.split(x[step], conditions, 1)
                ]
                for layer_name, ends in sites.items():
                    layer = quantized.layers[layer_name]
                    simulator = LayerSimulator(layer, emission)
                    source, target = (np.concatenate([value[end] for value in values]) for end in ends)
                    found = _compare(layer, emission, simulator, source, target)
                    if not found.tolerable:
                        raise ParityError(
                            f"{name}: layer {layer_name} at step {step} differs from its simulation: "
                            f"{found.share:.2%} "
                            f"of outputs, by up to {found.largest_steps:.1f} quantization steps (allowed: "
                            f"{MAX_SHARE_APART:.2%}, 1 step); the backend does not compute what was "
                            "calibrated"
                        )
                    total += found
                del values  # of all layers, before those of the next step
        return LayerFigures(len(sites), total.size, total.share, round(total.largest_steps, 3))
    finally:
        debug.unlink(missing_ok=True)


def _compare(
    layer: LayerQuant, emission: Emission, simulator: LayerSimulator, source: Array, target: Array
) -> Apart:
    simulated = simulator(np.asarray(source, np.float32))
    got = np.asarray(target, np.float32)
    axis = 1 if layer.kind == "conv" else got.ndim - 1
    step = _step(layer, emission, got.ndim, axis)
    # Where the bias cancels the products, the output tells little of what was rounded.
    bias = np.zeros(len(layer.weight)) if layer.bias is None else np.abs(layer.bias).astype(np.float64)
    added = _along(bias, got.ndim, axis)
    if target.dtype == np.float16:
        # Every weight and input is rounded to float16, then the sum, then the bias.
        others = tuple(i for i in range(got.ndim) if i != axis)
        x, moved = np.asarray(source, np.float64), 0.0
        if layer.smooth is not None:
            x = x / layer.smooth[:, None, None]
        if layer.input is not None and layer.number == "int":
            moved = -layer.input.zero_point(np.int8) * layer.input.scale
        # What is added to make up for `moved`: more at borders, where taps that cancel are left out.
        taps = np.abs(layer.weight_values().sum(1)).reshape(len(layer.weight), -1).sum(1) * layer.weight_scale
        added = added + _along(np.abs(moved) * taps.astype(np.float64), got.ndim, axis)
        largest = np.abs(simulated).max(axis=others, keepdims=True) + added
        spread = _spread(layer, x - moved, got.ndim, axis)
        return judge(got, simulated, step, np.asarray(2 * HALF * largest + ROUNDINGS * HALF * spread))
    return judge(got, simulated, step, float_tolerance(simulated, step, FLOAT_TOLERANCE, added))


def _step(layer: LayerQuant, emission: Emission, ndim: int, axis: int) -> F64:
    """One quantization step of a layer's output.

    For FP8 it is the step at the largest numbers; where only weights are quantized, the step of a weight.
    """
    if emission is Emission.ORT_CPU and layer.output is not None:
        steps = layer.output.scale.astype(np.float64)
    else:
        codes = np.abs(layer.weight_values().reshape(len(layer.weight), -1).astype(np.float64)).max(1)
        step = 1.0 if layer.weight_only else layer.input_scale * (32 if layer.number == "fp8" else 1)
        largest = 1.0 if layer.weight_only else np.maximum(codes, 1.0)
        steps = largest * layer.weight_scale.astype(np.float64) * step
    return _along(steps, ndim, axis)


def _spread(layer: LayerQuant, x: F64, ndim: int, axis: int) -> F64:
    """Root of the sum of squares of a layer's products, per output channel: the size of their roundings.

    It is taken at the position and sample where the input is largest.
    """
    scale = layer.weight_scale[:, None].astype(np.float64)
    weight = layer.weight_values().reshape(len(layer.weight), -1).astype(np.float64) * scale
    largest = np.square(x).mean(axis=1 if layer.kind == "conv" else -1).max()
    return _along(np.sqrt(2 * np.square(weight).sum(1) * largest), ndim, axis)


def _along(values: F64, ndim: int, axis: int) -> F64:
    shape = [1] * ndim
    shape[axis] = -1
    return values.reshape(shape)
