"""What a build will do and take, without doing it: no weight is read, nothing is written.

Evaluations are counted as the stages make them. Times, sizes and memory are estimates.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from ..bundle.bundle import check_target
from ..calibrate import Network, open_source
from ..calibrate.layer_noise import SENSITIVITY_SAMPLES, SENSITIVITY_STEPS, given_layers
from ..calibrate.memory import LIVE_LAYERS, largest_layer_bytes
from ..calibrate.observe import (
    GPTQ_BITS,
    HESSIAN_ROWS,
    MAX_HESSIAN_SIZE,
    OBSERVED_TRAJECTORIES,
    SMOOTHED_SHARE,
    Outline,
    observed_stride,
    outline,
)
from ..calibrate.quantize import layer_precisions
from ..calibrate.reconstruct import BATCH
from ..calibrate.sequential import STAGES, STRIDE
from ..calibrate.sizes import part_elements
from ..calibrate.speed import Speed, measure_speed
from ..core.backend import Emission
from ..core.bits import most_operations, to_measure
from ..core.estimate import Estimate, PrecisionEstimate
from ..core.memory import available_bytes
from ..core.precision import FLOAT_BITS, HALF_BITS, Precision
from ..core.quant import bit_operations
from ..core.sampling import Sampling
from ..core.sensitivity import step_groups
from ..core.timing import rounds_within
from ..parity.judgement import judged_steps
from ..recipe import Recipe
from .choose import check_plan
from .engines import check_builder
from .timing import ENOUGH

COPIES = 4
"""Float32 copies of the weights when there is most: the network, a simulated one or the gate's engine, and
what that engine's attention and exposed layers take: of a large model about as much as two more."""
LIBRARIES = 1_200_000_000
"""Bytes that Python and the libraries take, and the export while it runs."""
GRAPH_BYTES = 4000
"""Bytes of a layer in a graph, and of its scales."""
SIMULATED = 1.5
"""Time of an evaluation of a simulated network, or of a graph that is run as it is written, relative to that
of the network itself."""
LAYER_SECONDS = 0.1
"""Time that a layer takes in a build beside evaluations, at one precision: export, rewriting, checks."""


@dataclass(frozen=True)
class Shape:
    """A layer as its weights are stored and multiplied.

    Attributes:
        elements: of its weight.
        groups, k: matrices of its Hessian, and their size.
        shifted: elements of its output for one sample if it is a conv that pads, else 0.
    """

    elements: int
    groups: int
    k: int
    shifted: int


def estimate(recipe: Recipe, out: Path) -> Estimate:
    """What building a recipe at `out` will do and take.

    Raises:
        PTQDError: the build would be refused for its target, its backends, its plan or its model's files.
    """
    check_target(out)
    for backend in recipe.backends:
        check_builder(backend, recipe.tensorrt.settings(branches=1))
    source = open_source(recipe, weights=False)
    network = source.network
    sampling = Sampling.of(network.info, network.scheduler_config, **asdict(recipe.sampler))
    check_plan(recipe, len(sampling))
    counted = outline(network)
    given = {p: layer_precisions(network, counted, p, recipe) for p in recipe.precisions}
    for p, found in given.items():
        if p.mixed:
            chosen = given_layers(recipe, [name for name, used in found.items() if used])
            given[p] = layer_precisions(network, counted, p, recipe, chosen)
    speed = measure_speed(network, counted)
    shapes = {name: _shape(network, name, counted) for name in counted.layers}
    parameters = sum(value.numel() for value in network.module.parameters())
    parts = part_elements(recipe, source)
    evaluations = count_evaluations(recipe, sampling, given, speed.evaluation)
    codes = _codes(given, shapes)
    bundle = _bundle_bytes(recipe, given, shapes, parameters, codes)
    each = 1 if recipe.pipeline.weights == "w8a16" else 4
    bundle |= {name: n * each for name, n in parts.items()}
    per_sample = largest_layer_bytes(network) * LIVE_LAYERS * sampling.branches
    memory = {
        "libraries": LIBRARIES,
        "weights": COPIES * 4 * parameters + codes,
        "activations": per_sample * min(recipe.calibration.batch_size, recipe.calibration.size),
        "Hessians": sum(4 * s.groups * s.k**2 for s in shapes.values()) if _with_hessians(recipe) else 0,
        "text encoder and decoder": 4 * sum(parts.values()),
    }
    return Estimate(
        model=network.info.name,
        sampler=sampling.summary,
        parameters=parameters,
        macs=_macs(counted),
        precisions=tuple(_of_precision(p, found, counted, recipe) for p, found in given.items()),
        bundle_bytes=bundle,
        memory_bytes=memory,
        free_bytes=available_bytes(),
        evaluations=evaluations,
        evaluation_seconds=speed.evaluation,
        seconds=_seconds(recipe, sampling, evaluations, speed, shapes, given),
    )


Given = Mapping[Precision, Mapping[str, Precision | None]]
"""What each layer gets, by precision; None for float."""


def count_evaluations(
    recipe: Recipe, sampling: Sampling, given: Given, seconds: float = 0.0
) -> dict[str, int]:
    """Evaluations for one sample in one branch, by stage; that of AdaRound counts three per gradient step.

    Args:
        seconds: of one evaluation.
    """
    spec, plan, steps, branches = recipe.calibration, recipe.plan, len(sampling), sampling.branches
    every = (spec.size + spec.held_out) * steps
    stride = observed_stride(spec.size, steps)
    smoothed = spec.size * steps // (stride * SMOOTHED_SHARE) if recipe.quantization.smoothing else 0
    calibration = every + spec.size * steps // stride + smoothed
    noisy = [p for p in given if not p.is_float]
    for p in noisy:
        if p.mixed:
            layers = sum(used is not None for used in given[p].values())
            looks = min(SENSITIVITY_STEPS, steps) * min(SENSITIVITY_SAMPLES, spec.size)
            calibration += layers * len(to_measure(p)) * looks
        calibration += _rounding(recipe, p, steps, len(sampling.model.labels))
    own = spec.trajectory == "own"
    once = every + spec.size * steps if own else every
    measuring = sum(once * len({e.numerics(p) for e in Emission}) for p in noisy)
    parity, judged = 0, len(judged_steps(steps))
    for p in given:
        graphs = 2 if p.weight_bits == FLOAT_BITS else 3
        looks = 4 * judged if p.is_float else spec.held_out * judged + 2 * (steps + 1) + 6
        parity += graphs * looks
    samples = min(plan.sensitivity_samples, spec.held_out)
    groups = step_groups(steps, plan.sensitivity_groups)
    ends = 3 * steps
    if plan.sensitivity == "measured":
        ends += len(noisy) * sum(steps - group.start for group in groups)
    rows = len(given) * plan.batch_size
    timed = rows * sum(rounds_within(ENOUGH, rows * branches * seconds))
    counts = {
        "calibration": calibration,
        "measuring": measuring,
        "parity": parity,
        "plan": ends * samples + timed,
    }
    return {name: count * branches for name, count in counts.items()}


def _rounding(recipe: Recipe, precision: Precision, steps: int, classes: int) -> int:
    """Evaluations of rounding that looks at the quantized network; see `calibrate.refine`."""
    spec = recipe.quantization
    if precision.number == "fp8" or spec.rounding in ("gptq", "nearest"):
        return 0
    seen = min(recipe.calibration.size, max(OBSERVED_TRAJECTORIES, classes))
    if spec.rounding == "adaround":
        return 3 * BATCH * spec.iterations
    return seen * math.ceil(steps / STRIDE) * (STAGES + 1) // 2


def _macs(counted: Outline) -> int:
    return sum(layer.macs for layer in counted.layers.values()) + counted.product_macs


def _of_precision(
    precision: Precision, given: Mapping[str, Precision | None], counted: Outline, recipe: Recipe
) -> PrecisionEstimate:
    """Layers and bit operations; of a mixed precision, what `core.bits.assign` may spend."""
    rows = [
        (counted.layers[name].macs, used.weight_bits, used.activation_bits)
        for name, used in given.items()
        if used is not None
    ]
    inside = sum(macs for macs, _, _ in rows)
    undecided = precision.mixed and precision.base in given.values()

    def count(float_bits: int) -> int:
        """Bit operations, with those that a choice may add."""
        spent, room = bit_operations(precision, rows, _macs(counted) - inside, float_bits), 0.0
        if undecided:
            most = most_operations(precision, recipe.quantization.layer_budget, float_bits)
            room = sum(macs * max(0.0, most - wide * high) for macs, wide, high in rows)
        return spent + int(room)

    layers = Counter("float" if used is None else str(used) for used in given.values())
    return PrecisionEstimate(precision, dict(layers), count(FLOAT_BITS), count(HALF_BITS), undecided)


def _shape(network: Network, name: str, counted: Outline) -> Shape:
    module: Any = network.module.get_submodule(name)
    weight = module.weight
    k = weight[0].numel()
    padded = counted.layers[name].kind == "conv" and any(module._reversed_padding_repeated_twice)
    groups = getattr(module, "groups", 1)
    hessian = k <= MAX_HESSIAN_SIZE and not counted.layers[name].vector
    return Shape(weight.numel(), groups if hessian else 0, k, counted.layers[name].macs // k if padded else 0)


def _stored(given: Given, shapes: Mapping[str, Shape]) -> Iterator[tuple[str, Precision, Shape]]:
    """Each quantized layer at each precision."""
    for found in given.values():
        for name, used in found.items():
            if used is not None:
                yield name, used, shapes[name]


def _codes(given: Given, shapes: Mapping[str, Shape]) -> int:
    """Bytes of weight codes, each distinct kind once; codes that fit are packed where weights are alone."""
    kinds = {
        (name, used.number, used.weight_bits, used.weight_only and used.weight_bits <= 4): shape.elements
        for name, used, shape in _stored(given, shapes)
    }
    for precision, found in given.items():
        if precision.mixed:  # what is not decided yet may get fewer bits
            fewest = min(level.weight_bits for level in precision.levels)
            kinds |= {
                (name, used.number, fewest, False): shapes[name].elements
                for name, used in found.items()
                if used == precision.base
            }
    return sum(-(-n // 2) if packed else n for (*_, packed), n in kinds.items())


def _bundle_bytes(
    recipe: Recipe, given: Given, shapes: Mapping[str, Shape], parameters: int, codes: int
) -> dict[str, int]:
    noisy = [found for p, found in given.items() if not p.is_float]
    inside = {n for n in shapes if noisy and all(found[n] is not None for found in noisy)}
    rest = parameters - sum(shapes[n].elements for n in inside)
    floats = any(p.is_float for p in given)
    half = parameters if any(p.weight_bits == HALF_BITS for p in given) else rest if noisy else 0
    # What the half emission adds to convs with moved zero points (`export.insert_qdq`).
    shifts = {
        (name, used.weight_bits): shape.shifted
        for name, used, shape in _stored(given, shapes)
        if used.number == "int" and used.activation_bits == 8
    }
    if recipe.quantization.input_grids == "symmetric":
        shifts = {}
    return {
        "float32 weights": 4 * (parameters if floats else rest),
        "float16 weights": 2 * (half + sum(shifts.values())),
        "codes": codes,
        "graphs and tables": GRAPH_BYTES * len(shapes) * len(Emission) * len(given),
    }


def _with_hessians(recipe: Recipe) -> bool:
    rounded = any(p.weight_bits < GPTQ_BITS for p in recipe.precisions)
    return recipe.quantization.rounding == "gptq" and rounded


def _seconds(
    recipe: Recipe,
    sampling: Sampling,
    evaluations: Mapping[str, int],
    speed: Speed,
    shapes: Mapping[str, Shape],
    given: Given,
) -> float:
    """Evaluations, GPTQ's products of inputs and its K^3 per layer, and a time per layer and precision."""
    spec = recipe.calibration
    plain = evaluations["calibration"] * speed.evaluation
    simulated = sum(n for name, n in evaluations.items() if name != "calibration")
    seconds = plain + simulated * speed.evaluation * SIMULATED
    if _with_hessians(recipe):
        calls = math.ceil(spec.size / spec.batch_size) * len(sampling)
        macs = sum(s.groups * s.k**2 * (calls * HESSIAN_ROWS + s.k) for s in shapes.values())
        seconds += macs * speed.mac
    return seconds + LAYER_SECONDS * len(shapes) * len(given)
