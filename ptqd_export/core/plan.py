"""Plan: a precision per denoising step, and the three rules that choose it: snr, budget, fixed."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import groupby, pairwise

import numpy as np
import numpy.typing as npt

from ..errors import RecipeError
from ..typed import brief
from .precision import Precision
from .schedule import NoiseSchedule

F64 = npt.NDArray[np.float64]

MAX_STEPS = 100_000
"""Most steps of a plan: far above any sampler's, so that no file can exhaust memory."""
ONE_PIXEL_STEP_VAR = (2 / 255) ** 2 / 12
"""Variance of rounding to 8-bit pixels for data in [-1, 1]: noise below it cannot be seen."""


@dataclass(frozen=True)
class Plan:
    """Precision per step, in sampling order: row 0 is the noisiest step."""

    steps: tuple[Precision, ...]

    def __len__(self) -> int:
        return len(self.steps)

    @property
    def precisions(self) -> tuple[Precision, ...]:
        """The distinct precisions, in order of first use."""
        return tuple(dict.fromkeys(self.steps))

    def runs(self) -> Iterator[tuple[Precision, range]]:
        """Contiguous runs of one precision: (precision, range of steps)."""
        start = 0
        for precision, group in groupby(self.steps):
            n = len(list(group))
            yield precision, range(start, start + n)
            start += n

    def __str__(self) -> str:
        return " ".join(f"{precision}*{len(steps)}" for precision, steps in self.runs())

    @classmethod
    def from_plain(cls, value: object) -> Plan:
        """From the text that `str` gives, such as "w4a8*12 w8a8*8".

        Raises:
            RecipeError: not such text, or more than MAX_STEPS steps.
        """
        if not isinstance(value, str):
            raise RecipeError(f"plan {brief(value)}: expected runs of precisions, such as w4a8*12 w8a8*8")
        return cls(tuple(_steps(value.split())))

    def to_plain(self) -> str:
        return str(self)

    def residual_var(self, var: Mapping[Precision, F64]) -> F64:
        """Residual variance of each step at its own precision, (T,); 0 at float precisions.

        Args:
            var: residual variance (T,) of each precision of the plan that is not float.
        """
        return np.array([0.0 if p.is_float else var[p][step] for step, p in enumerate(self.steps)])

    def total(self, cost: Mapping[Precision, float]) -> float:
        """Sum of a per-evaluation cost (seconds, BOPs) over the steps."""
        return float(sum(cost[p] for p in self.steps))


@dataclass(frozen=True)
class FrontPoint:
    """One plan of the Pareto front: no plan of the sweep is cheaper at this error."""

    cost: float
    error: float
    plan: Plan


def fixed(runs: Sequence[str], n_steps: int) -> Plan:
    """A plan given by hand, such as ["w4a8*12", "w8a8*8"]; an entry may hold several, after commas or spaces.

    A precision without a count stands for one step, or for all steps if it is the only one.

    Raises:
        RecipeError: not a precision, or not n_steps steps.
    """
    runs = [run for entry in runs for run in entry.replace(",", " ").split()]
    if len(runs) == 1 and "*" not in runs[0]:
        runs = [f"{runs[0]}*{n_steps}"]
    steps = _steps(runs)
    if len(steps) != n_steps:
        raise RecipeError(
            f"the fixed plan has {len(steps)} steps, the sampler {n_steps}: give a precision for each by "
            f"--plan or plan.steps, such as w4a8*{n_steps}"
        )
    return Plan(tuple(steps))


def parse_plan(text: str, n_steps: int) -> Plan:
    """A plan from text with commas or spaces, such as "w4a8*12,w8a8*8" or "w8a8"; see `fixed`.

    Raises:
        RecipeError: not a precision, or not n_steps steps.
    """
    return fixed([text], n_steps)


def _steps(runs: Sequence[str]) -> list[Precision]:
    """The precision of each step, from runs such as "w4a8*12"."""
    steps: list[Precision] = []
    for text in runs:
        name, star, times = text.partition("*")
        if star and not re.fullmatch(r"[1-9][0-9]{0,5}", times):
            raise RecipeError(f"plan step {brief(text)}: expected a precision with a count, such as w4a8*12")
        steps += [Precision.parse(name)] * int(times or 1)
        if len(steps) > MAX_STEPS:
            raise RecipeError(f"a plan of more than {MAX_STEPS} steps: give one per denoising step")
    return steps


def by_snr(snr: Mapping[Precision, F64], bops: Mapping[Precision, float], schedule: NoiseSchedule) -> Plan:
    """The paper's rule (PTQD, section 3.4): the cheapest precision with SNR_Q > SNR_F at each step.

    Where no candidate passes, the step gets the most precise one.

    Args:
        snr: SNR_Q (T,) of each candidate, of the noise D = eq - e before any correction.
        bops: bit operations of each candidate; they order the candidates.
    """
    order = sorted(snr, key=lambda p: bops[p])
    best = max(order, key=lambda p: (p.weight_bits + p.activation_bits, bops[p]))
    return Plan(
        tuple(next((p for p in order if snr[p][i] > schedule.snr[i]), best) for i in range(len(schedule)))
    )


def step_weights(schedule: NoiseSchedule, objective: str) -> F64:
    """w_i c_i^2, (T,): the cost of a unit of residual variance at step i.

    paired:       w_i = 1 / abar_prev_i, the scale with which an error at step i reaches x_0.
    distribution: w_i = 1 / max(1 - abar_prev_i, one 8-bit pixel step), the added noise relative to the noise
                  that is still in x.
    """
    prev = schedule.alphas_cumprod_prev
    w = 1 / prev if objective == "paired" else 1 / np.maximum(1 - prev, ONE_PIXEL_STEP_VAR)
    return np.asarray(w * schedule.epsilon_gains**2)


def pareto_front(errors: Mapping[Precision, F64], costs: Mapping[Precision, float]) -> list[FrontPoint]:
    """Every optimum of sum_i error_i + lambda * cost over lambda in [0, inf], cheapest first.

    Steps are independent. So only the candidates on the lower convex hull of (cost, error) matter at each
    step, and sweeping the Lagrange multiplier down takes the edges of all hulls in order of error saved per
    unit of cost.

    Args:
        errors: weighted error (T,) of each precision.
        costs: cost of one evaluation of each precision.
    """
    n_steps = len(next(iter(errors.values())))
    order = sorted(errors, key=lambda p: (costs[p], p))
    choice: list[Precision] = []
    edges: list[tuple[float, int, int, Precision, Precision]] = []
    for i in range(n_steps):
        hull: list[Precision] = []
        for p in order:
            if hull and errors[p][i] >= errors[hull[-1]][i]:
                continue
            if hull and costs[p] == costs[hull[-1]]:
                hull.pop()
            while len(hull) > 1 and _slope(hull[-1], p, i, errors, costs) >= _slope(
                hull[-2], hull[-1], i, errors, costs
            ):
                hull.pop()
            hull.append(p)
        choice.append(hull[0])
        edges += [(-_slope(a, b, i, errors, costs), i, j, a, b) for j, (a, b) in enumerate(pairwise(hull))]
    front = [_point(choice, errors, costs)]
    for *_, i, _, _, b in sorted(edges):
        choice[i] = b
        front.append(_point(choice, errors, costs))
    return front


def _slope(
    a: Precision, b: Precision, i: int, errors: Mapping[Precision, F64], costs: Mapping[Precision, float]
) -> float:
    """Error saved per unit of cost by taking b instead of a at step i."""
    return float((errors[a][i] - errors[b][i]) / (costs[b] - costs[a]))


def _point(
    choice: Sequence[Precision], errors: Mapping[Precision, F64], costs: Mapping[Precision, float]
) -> FrontPoint:
    plan = Plan(tuple(choice))
    return FrontPoint(plan.total(costs), float(sum(errors[p][i] for i, p in enumerate(choice))), plan)


def by_budget(front: Sequence[FrontPoint], budget: float) -> FrontPoint:
    """The point of least error whose cost fits the budget; the cheapest point if none does.

    Args:
        budget: total cost over all steps, in the front's unit.
    """
    fitting = [point for point in front if point.cost <= budget * (1 + 1e-9)]
    return min(fitting, key=lambda point: point.error) if fitting else front[0]
