"""Plan: a precision per denoising step, and the rules for it: budget, snr, first-last, paper, fixed."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import groupby, pairwise, permutations
from typing import Literal

import numpy as np
import numpy.typing as npt

from ..errors import RecipeError
from ..typed import brief
from .precision import Precision
from .schedule import NoiseSchedule

F64 = npt.NDArray[np.float64]

MAX_STEPS = 100_000
"""Most steps of a plan: far above any sampler's, so that no file can exhaust memory."""
Rule = Literal["budget", "snr", "first-last", "paper", "fixed"]
PAPER_SHARE, PAPER_PRECISIONS = 0.192, (Precision(4, 4), Precision(4, 8))
"""The paper's plan on LDM-4, 250 steps: w4a4 for the first 48 of them, the noisiest, then w4a8."""
SAME_COST = 2.0
"""Two costs that differ by at most this many standard errors of their difference are one."""


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

    def sigmas(self, schedule: NoiseSchedule, var: Mapping[Precision, F64], recalibrate: bool = True) -> F64:
        """Standard deviation of the noise that each step injects under this plan, (T,).

        Args:
            var: as of `residual_var`.
            recalibrate: sigma' (`NoiseSchedule.recalibrated_sigmas`); else the schedule's own sigma.
        """
        return schedule.recalibrated_sigmas(self.residual_var(var)) if recalibrate else schedule.sigmas

    def total(self, cost: Mapping[Precision, float]) -> float:
        """Sum of a per-evaluation cost (seconds, BOPs) over the steps."""
        return float(sum(cost[p] for p in self.steps))

    def error(self, errors: Mapping[Precision, F64]) -> float:
        """Sum of the errors (T,) of each step at its own precision."""
        return float(sum(errors[p][step] for step, p in enumerate(self.steps)))


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
    best = max(order, key=lambda p: (_fineness(p), bops[p]))
    return Plan(
        tuple(next((p for p in order if snr[p][i] > schedule.snr[i]), best) for i in range(len(schedule)))
    )


def first_last(errors: Mapping[Precision, F64], costs: Mapping[Precision, float], budget: float) -> Plan:
    """First N and last N steps at a precise choice, those between at a cheaper one: what others ship.

    N is the largest that fits the budget. Of all pairs of precisions, the one of least error is taken; where
    none fits, the cheapest precision throughout.

    Args:
        errors, costs: as of `pareto_front`.
        budget: total cost over all steps.
    """
    n = len(next(iter(errors.values())))
    plans = [uniform(errors, costs, budget)]
    for precise, cheap in permutations(errors, 2):
        left = budget * (1 + 1e-9) - n * costs[cheap]
        more = costs[precise] - costs[cheap]
        if _fineness(precise) > _fineness(cheap) and left >= 0 and more >= 0:
            edge = n // 2 if more == 0 else min(n // 2, int(left / (2 * more)))
            inside = n - 2 * edge
            plans.append(Plan((precise,) * edge + (cheap,) * inside + (precise,) * edge))
    return min(plans[1:] or plans, key=lambda plan: plan.error(errors))


def uniform(errors: Mapping[Precision, F64], costs: Mapping[Precision, float], budget: float) -> Plan:
    """One precision at all steps: the one of least error that fits the budget, else the cheapest."""
    n = len(next(iter(errors.values())))
    fitting = [p for p in errors if n * costs[p] <= budget * (1 + 1e-9)]
    best = min(fitting, key=lambda p: errors[p].sum()) if fitting else min(errors, key=lambda p: costs[p])
    return Plan((best,) * n)


def by_paper(precisions: Sequence[Precision], n_steps: int) -> Plan:
    """The plan of the paper's experiments: w4a4 for the noisiest 19.2 % of the steps, then w4a8.

    Raises:
        RecipeError: one of the two is not among `precisions`.
    """
    for needed in PAPER_PRECISIONS:
        if needed not in precisions:
            held = ", ".join(map(str, precisions))
            raise RecipeError(
                f"the paper's plan is of {' and '.join(map(str, PAPER_PRECISIONS))}, but there are {held}: "
                f"build with --precision {needed}"
            )
    first = round(PAPER_SHARE * n_steps)
    return Plan((PAPER_PRECISIONS[0],) * first + (PAPER_PRECISIONS[1],) * (n_steps - first))


def _fineness(precision: Precision) -> tuple[int, bool]:
    """By bits; of equal ones, that which gives single layers more."""
    return precision.weight_bits + precision.activation_bits, precision.mixed


def step_weights(schedule: NoiseSchedule) -> F64:
    """c_i^2, (T,): what a unit of squared error in epsilon at step i adds to the squared error of x.

    How much of that is left at the end of sampling is measured (`core.sensitivity`). Without a measurement it
    counts as it is: later steps denoise an early error again, so it does not reach x_0 scaled up by
    1 / abar_prev.
    """
    return np.asarray(schedule.epsilon_gains**2)


def equal_costs(costs: Mapping[Precision, float], noise: Mapping[Precision, float]) -> dict[Precision, float]:
    """Costs of which those that differ by less than their noise are one: their mean.

    Each group starts at the cheapest cost that is in no other one.

    Args:
        noise: standard error of each cost; one that is not named is exact.
    """
    groups: list[list[Precision]] = []
    for p in sorted(costs, key=lambda p: (costs[p], p)):
        if groups:
            first = groups[-1][0]
            apart = float(np.hypot(noise.get(p, 0.0), noise.get(first, 0.0)))
            if costs[p] - costs[first] <= SAME_COST * apart:
                groups[-1].append(p)
                continue
        groups.append([p])
    pooled = {p: float(np.mean([costs[q] for q in group])) for group in groups for p in group}
    return {p: pooled[p] for p in costs}


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
    return FrontPoint(plan.total(costs), plan.error(errors), plan)


def by_budget(front: Sequence[FrontPoint], budget: float) -> FrontPoint:
    """The point of least error whose cost fits the budget; the cheapest point if none does.

    Args:
        budget: total cost over all steps, in the front's unit.
    """
    fitting = [point for point in front if point.cost <= budget * (1 + 1e-9)]
    return min(fitting, key=lambda point: point.error) if fitting else front[0]
