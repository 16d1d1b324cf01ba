"""Bits per layer: how a mixed precision deals them out.

A few layers carry most of the noise (MixDQ, Zhao et al. 2024). Noise of different layers is uncorrelated to a
good approximation, and so is that of a layer's weights and of its inputs: the noise of a choice is the sum of
what each makes alone. What is left is a knapsack: least noise within a budget, of bit operations where
integers alone are to choose from, of time where float layers are.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np

from ..errors import RecipeError
from .precision import FLOAT_BITS, Precision

FLOAT_TIME = 3.0
"""Time of a float layer beside that of the same layer in 8 bits, about: whole networks take 2.4 to 3.2 times
as long (docs/benchmarks.md). That of fewer bits is the same as of 8. It is not measured for each machine, as
the same recipe has to give the same layers everywhere."""


Point = tuple[float, float, Precision]
"""Cost and noise of a layer at a level."""


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
        wider = replace(precision, weight_bits=precision.weight_bits + 1)
        if precision in self.noise or precision.activation_bits == 8 or wider not in self.noise:
            return tuple(float(np.dot(row, self.weights)) for row in self.noise[precision])
        eights = (replace(p, activation_bits=8) for p in (precision, wider))
        more, few, many = (self.total(p) for p in (wider, *eights))
        return tuple(n + max(0.0, a - b) for n, a, b in zip(more, few, many, strict=True))

    def only(self, names: Collection[str]) -> LayerSensitivity:
        """The same of some layers."""
        kept = [i for i, name in enumerate(self.layers) if name in names]
        return replace(
            self,
            layers=tuple(self.layers[i] for i in kept),
            macs=tuple(self.macs[i] for i in kept),
            noise={p: tuple(rows[i] for i in kept) for p, rows in self.noise.items()},
        )


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
    order of noise saved per cost; a step that does not fit is left out. The same is done from the base on,
    and the better one taken: with few layers, steps that do not fit may leave much of the budget. The cost is
    in bit operations, or in estimated time if one of the levels is float.

    Args:
        levels: the least cost first (`Precision.levels`).
        base, budget: cost of all layers, relative to that with `base` everywhere.
        given: layers that are decided. Their cost counts, but takes from no other what it has at `base`.
    """
    cost_of = _time if levels[-1].is_float else _operations
    noise = {level: sensitivity.total(level) for level in levels}
    macs = dict(zip(sensitivity.layers, sensitivity.macs, strict=True))
    room = sum(macs.values()) * cost_of(base) * budget
    room -= sum(macs[name] * cost_of(given[name]) for name in macs.keys() & given.keys())
    room = max(room, sum(macs[name] for name in macs.keys() - given.keys()) * cost_of(base))

    def choose(levels: Sequence[Precision]) -> tuple[float, dict[str, Precision]]:
        points = {
            name: [(macs[name] * cost_of(p), noise[p][i], p) for p in levels]
            for i, name in enumerate(sensitivity.layers)
            if name not in given
        }
        chosen = _raise(points, room)
        error = sum(next(n for _, n, p in points[name] if p == level) for name, level in chosen.items())
        return error, chosen

    lowest, from_base = (
        choose(some) for some in (levels, [p for p in levels if cost_of(p) >= cost_of(base)])
    )
    chosen = lowest[1] if lowest[0] <= from_base[0] else from_base[1]
    return {name: given.get(name) or chosen[name] for name in macs}


def _raise(points: Mapping[str, Sequence[Point]], room: float) -> dict[str, Precision]:
    """A level for each layer, within `room` in all."""
    hulls = {name: _hull(sorted(own, key=lambda point: point[:2])) for name, own in points.items()}
    chosen = {name: hull[0][2] for name, hull in hulls.items()}
    room -= sum(hull[0][0] for hull in hulls.values())
    steps: list[tuple[float, int, int, float, str]] = []
    for i, (name, hull) in enumerate(hulls.items()):
        for j in range(1, len(hull)):
            (cost, error, _), (more, less, _) = hull[j - 1], hull[j]
            steps.append(((less - error) / (more - cost), i, j, more - cost, name))
    reached = dict.fromkeys(hulls, 0)
    for _, _, j, cost, name in sorted(steps):
        if j == reached[name] + 1 and cost <= room:
            chosen[name] = hulls[name][j][2]
            reached[name], room = j, room - cost
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


def _hull(points: Sequence[Point]) -> list[Point]:
    """The points of the lower convex hull, from the first on; `points` by their cost, then noise."""
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
