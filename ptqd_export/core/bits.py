"""Bits per layer: which layers of a mixed precision get more bits than the rest.

A few layers carry most of the noise (MixDQ, Zhao et al. 2024). Noise of different layers is uncorrelated to a
good approximation, and so is that of a layer's weights and of its inputs: the noise of a choice is the sum of
what each makes alone. What is left is a knapsack: least noise within a budget, of bit operations where
integers alone are to choose from, of time where float layers are.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np

from ..errors import RecipeError
from .precision import FLOAT_BITS, Precision

FLOAT_TIME = 3.0
"""Time of a float layer beside that of the same layer in 8 bits, about: whole networks take 2.4 to 3.2 times
as long (docs/benchmarks.md). That of fewer bits is the same as of 8. It is not measured for each machine, as
the same recipe has to give the same layers everywhere."""


@dataclass(frozen=True)
class LayerSensitivity:
    """The noise at a network's output when one layer alone is quantized.

    Attributes:
        layers: L module paths.
        macs: multiply-accumulates of each for one sample.
        steps: S steps at which it was measured.
        weights: how much the noise of each of them counts, c_i^2 of the sampler, summed over the steps for
            which it stands.
        noise: E D^2 / E e^2 by the precision of the layer (`to_measure`), (L, S); float layers make none.
    """

    layers: tuple[str, ...]
    macs: tuple[int, ...]
    steps: tuple[int, ...]
    weights: tuple[float, ...]
    noise: Mapping[Precision, tuple[tuple[float, ...], ...]]

    def __post_init__(self) -> None:
        rows = [self.layers, self.macs, *self.noise.values()]
        columns = [self.steps, self.weights, *(row for table in self.noise.values() for row in table)]
        if len({len(r) for r in rows}) > 1 or len({len(c) for c in columns}) > 1:
            raise RecipeError("a table of sensitivities whose rows differ in length")
        numbers = (*self.weights, *(number for row in columns[2:] for number in row))
        if not self.layers or not self.steps or min(self.macs) < 0 or min(numbers) < 0:
            raise RecipeError("a table of sensitivities without layers or steps, or with numbers below 0")

    def total(self, precision: Precision) -> tuple[float, ...]:
        """Noise of each layer, weighted over the steps.

        What was not measured has weights of a bit less than something that was: they add as much as with
        inputs of 8 bits.
        """
        if precision.is_float:
            return (0.0,) * len(self.layers)
        if precision in self.noise:
            return tuple(float(np.dot(row, self.weights)) for row in self.noise[precision])
        wider = replace(precision, weight_bits=precision.weight_bits + 1)
        more, few, many = (
            self.total(p)
            for p in (wider, replace(precision, activation_bits=8), replace(wider, activation_bits=8))
        )
        return tuple(n + max(0.0, a - b) for n, a, b in zip(more, few, many, strict=True))


def to_measure(precision: Precision) -> tuple[Precision, ...]:
    """The quantized levels of a mixed precision whose noise `LayerSensitivity.total` cannot derive."""
    base = precision.base
    return tuple(
        level
        for level in precision.levels
        if not level.is_float and (level.weight_bits >= base.weight_bits or level.activation_bits == 8)
    )


def assign(
    sensitivity: LayerSensitivity,
    levels: Sequence[Precision],
    base: Precision,
    budget: float,
    given: Mapping[str, Precision],
) -> dict[str, Precision]:
    """The precision of each layer, with the least noise that is predicted within a budget.

    Raises layers level by level, from the lowest and along the lower convex hull of (cost, noise) of each, in
    order of noise saved per cost; a step that does not fit is left out. The cost is in bit operations, or in
    estimated time if one of the levels is float.

    Args:
        levels: the least cost first (`Precision.levels`).
        base, budget: cost of all layers, relative to that with `base` everywhere.
        given: layers that are decided; their cost counts.
    """
    cost_of = _time if levels[-1].is_float else _operations
    noise = {level: sensitivity.total(level) for level in levels}
    chosen = {name: given.get(name, levels[0]) for name in sensitivity.layers}
    room = sum(sensitivity.macs) * cost_of(base) * budget
    room -= sum(
        macs * cost_of(chosen[name]) for name, macs in zip(sensitivity.layers, sensitivity.macs, strict=True)
    )
    edges: list[tuple[float, int, int, float, Precision]] = []
    for i, (name, macs) in enumerate(zip(sensitivity.layers, sensitivity.macs, strict=True)):
        hull = [] if name in given else _hull([(macs * cost_of(p), noise[p][i], p) for p in levels])
        for j in range(1, len(hull)):
            (cost, error, _), (more, less, level) = hull[j - 1], hull[j]
            edges.append(((less - error) / (more - cost), i, j, more - cost, level))
    reached = [0] * len(sensitivity.layers)
    for _, i, j, cost, level in sorted(edges, key=lambda edge: edge[:3]):
        if j == reached[i] + 1 and cost <= room:
            chosen[sensitivity.layers[i]] = level
            reached[i], room = j, room - cost
    return chosen


def most_operations(precision: Precision, budget: float, float_bits: int = FLOAT_BITS) -> float:
    """The most bit operations per multiply-accumulate that `assign` may spend on a mixed precision.

    Args:
        float_bits: the width at which float layers are counted.
    """
    operations = precision.base.operations
    if not precision.levels[-1].is_float:
        return operations * budget
    share = min(1.0, (budget - 1) / (FLOAT_TIME - 1))
    return operations + share * (float_bits**2 - operations)


def _operations(precision: Precision) -> float:
    return precision.operations


def _time(precision: Precision) -> float:
    return FLOAT_TIME if precision.is_float else 1.0


Point = tuple[float, float, Precision]


def _hull(points: Sequence[Point]) -> list[Point]:
    """The points of the lower convex hull, from the first on."""
    hull: list[Point] = []
    for point in points:
        if hull and (point[1] >= hull[-1][1] or point[0] <= hull[-1][0]):
            continue
        while len(hull) > 1 and _slope(hull[-1], point) <= _slope(hull[-2], hull[-1]):
            hull.pop()
        hull.append(point)
    return hull


def _slope(a: Point, b: Point) -> float:
    return (b[1] - a[1]) / (b[0] - a[0])
