"""Sensitivity: what quantization noise in one group of steps comes to at the end of sampling.

One group of steps runs at a cheaper precision and all others in full precision; the samples are compared
with full precision's own. The noise that the group's steps add to x, sum_i c_i^2 var_i, is known, so the
comparison gives the weight of the group: w = error at x_0 / sum_i c_i^2 var_i. The predicted error of a plan
is sum_i w_i c_i^2 var_i, each step with the weight of its group and precision.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from itertools import pairwise
from typing import Literal

import numpy as np
import numpy.typing as npt

from ..errors import RecipeError
from .precision import Precision

F64 = npt.NDArray[np.float64]
Objective = Literal["paired", "distribution"]
LARGEST = 1e12
"""Errors are held at this; they may be infinite where samples run away."""


def step_groups(n_steps: int, n_groups: int) -> tuple[range, ...]:
    """Consecutive groups of steps, as equal as can be; at most one group per step."""
    edges = np.linspace(0, n_steps, min(n_groups, n_steps) + 1).round().astype(int).tolist()
    return tuple(range(a, b) for a, b in pairwise(edges))


@dataclass(frozen=True)
class Sensitivity:
    """Errors at x_0 of one group of steps at a precision, all other steps in full precision.

    Attributes:
        groups: number of steps of each group, in sampling order.
        samples: trajectories that were sampled again for each group and precision.
        evaluations: network evaluations of one sample that this took in all.
        paired: geometric mean of `paired_error` over the samples, of each precision and group.
        distribution: `texture_distance` of each precision and group.
    Raises:
        RecipeError: a group without steps, or not one error of 0 or more per group.
    """

    groups: tuple[int, ...]
    samples: int
    evaluations: int
    paired: Mapping[Precision, tuple[float, ...]]
    distribution: Mapping[Precision, tuple[float, ...]]

    def __post_init__(self) -> None:
        tables = [*self.paired.values(), *self.distribution.values()]
        if not self.groups or min(self.groups) < 1 or self.paired.keys() != self.distribution.keys():
            raise RecipeError(f"groups of {list(self.groups)[:20]} steps: expected at least one step in each")
        if any(len(row) != len(self.groups) or min(row) < 0 for row in tables):
            raise RecipeError(f"sensitivities: expected {len(self.groups)} errors of 0 or more per precision")

    def of(self, objective: Objective) -> Mapping[Precision, tuple[float, ...]]:
        """The errors that an objective goes by."""
        return self.paired if objective == "paired" else self.distribution

    def weigh(self, errors: Mapping[Precision, F64], objective: Objective) -> dict[Precision, F64]:
        """w_i c_i^2 var_i, (T,) per precision: a group's steps share the error that was measured for it.

        A step's share is that of its noise. Precisions that were not measured, which are float, keep their
        errors.

        Args:
            errors: c_i^2 var_i, (T,), of each precision.
        """
        measured = self.of(objective)
        weighed = {}
        for p, values in errors.items():
            weighed[p] = np.array(values, np.float64)
            start = 0
            for size, end in zip(self.groups, measured.get(p, ()), strict=False):
                part = slice(start, start + size)
                total = float(weighed[p][part].sum())
                weighed[p][part] = weighed[p][part] / total * end if total > 0 else end / size
                start += size
        return weighed


def paired_error(x: F64, reference: F64) -> F64:
    """Mean squared difference of each sample from its full-precision twin, (N,), of (N, C, H, W)."""
    with np.errstate(over="ignore", invalid="ignore"):
        error = ((x - reference) ** 2).reshape(len(x), -1).mean(1)
    return np.asarray(np.where(error < LARGEST, error, LARGEST), np.float64)


def texture_distance(x: F64, reference: F64) -> float:
    """How far the differences of neighbouring values are distributed apart in two sets of samples.

    It is the Wasserstein distance W_2 of the two distributions, over all samples (N, C, H, W), for neighbours
    in a row and in a column together. Few samples are enough, and no network of features is needed. Another
    picture of the same kind counts little; grain and blur that are left in it count. A little noise of
    variance v moves it by v / (2 std) to first order, so what several steps leave adds up.
    """
    with np.errstate(over="ignore", invalid="ignore"):
        ordered = [
            np.sort(np.concatenate([np.diff(v, axis=axis).ravel() for axis in (-1, -2)]))
            for v in (np.asarray(x, np.float64), np.asarray(reference, np.float64))
        ]
        square = float(((ordered[0] - ordered[1]) ** 2).mean()) if ordered[0].size else 0.0
    return float(np.sqrt(square)) if square < LARGEST else LARGEST
