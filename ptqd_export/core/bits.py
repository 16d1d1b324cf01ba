"""Bits per layer: which layers of a mixed precision get more bits than the rest.

A few layers carry most of the noise (MixDQ, Zhao et al. 2024). Noise of different layers is uncorrelated to a
good approximation, so the noise of a choice is the sum over layers of what each makes alone; what is left is
a knapsack: least noise within a budget of bit operations.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from ..errors import RecipeError
from .precision import Precision


@dataclass(frozen=True)
class LayerSensitivity:
    """The noise at a network's output when one layer alone is quantized.

    Attributes:
        layers: L module paths.
        macs: multiply-accumulates of each for one sample.
        steps: S steps at which it was measured.
        weights: how much the noise of each of them counts, c_i^2 of the sampler.
        noise: E D^2 / E e^2 by the precision of the layer, (L, S).
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
        """Noise of each layer, weighted over the steps."""
        return tuple(float(np.dot(row, self.weights)) for row in self.noise[precision])


def assign(
    sensitivity: LayerSensitivity, levels: Sequence[Precision], budget: float, given: Mapping[str, Precision]
) -> dict[str, Precision]:
    """The precision of each layer, with the least noise that is predicted within a budget.

    Raises layers level by level, along the lower convex hull of (bit operations, noise) of each, in order of
    noise saved per bit operation; a step that does not fit is left out.

    Args:
        levels: fewest bits first (`Precision.levels`).
        budget: bit operations of all layers, relative to those with the lowest level everywhere.
        given: layers that are decided; their bit operations count.
    """
    base = levels[0]
    noise = {level: sensitivity.total(level) for level in levels}
    chosen = {name: given.get(name, base) for name in sensitivity.layers}
    room = sum(sensitivity.macs) * _bits(base) * budget
    room -= sum(
        macs * _bits(chosen[name]) for name, macs in zip(sensitivity.layers, sensitivity.macs, strict=True)
    )
    edges: list[tuple[float, int, int, float, Precision]] = []
    for i, (name, macs) in enumerate(zip(sensitivity.layers, sensitivity.macs, strict=True)):
        hull = [] if name in given else _hull([(macs * _bits(p), noise[p][i], p) for p in levels])
        for j in range(1, len(hull)):
            (cost, error, _), (more, less, level) = hull[j - 1], hull[j]
            edges.append(((less - error) / (more - cost), i, j, more - cost, level))
    reached = [0] * len(sensitivity.layers)
    for _, i, j, cost, level in sorted(edges, key=lambda edge: edge[:3]):
        if j == reached[i] + 1 and cost <= room:
            chosen[sensitivity.layers[i]] = level
            reached[i], room = j, room - cost
    return chosen


def _bits(precision: Precision) -> int:
    return precision.weight_bits * precision.activation_bits


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
