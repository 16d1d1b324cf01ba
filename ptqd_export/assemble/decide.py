"""Choose a plan from figures: those of a build, or those that a bundle holds. Needs numpy alone."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

import numpy as np
import numpy.typing as npt

from ..bundle.manifest import Choice, FrontRecord, Manifest, PlanRecord
from ..core.plan import (
    FrontPoint,
    Plan,
    by_budget,
    by_paper,
    by_snr,
    equal_costs,
    first_last,
    fixed,
    pareto_front,
    uniform,
)
from ..core.precision import Precision
from ..core.schedule import NoiseSchedule
from ..core.sensitivity import Objective, Sensitivity
from ..errors import BundleError
from ..recipe import PlanSpec

F64 = npt.NDArray[np.float64]
CLOSE = 1 + 1e-9
"""Costs that differ by less than this factor are equal."""


@dataclass(frozen=True)
class Known:
    """What a plan is chosen from.

    Attributes:
        schedule: of the steps.
        bops: bit operations of one evaluation at each candidate; bops_fp32 of all steps at full precision.
        timed_on: backend of the times, and of the noise.
        seconds: of one evaluation; seconds_error their standard errors.
        snr: SNR_Q (T,) before correction; infinite where there is no noise.
        error: c_i^2 var_i (T,) after correction.
        sensitivity: what that comes to at the end, or None.
    """

    schedule: NoiseSchedule
    bops: Mapping[Precision, float]
    bops_fp32: int
    timed_on: str
    seconds: Mapping[Precision, float]
    seconds_error: Mapping[Precision, float]
    snr: Mapping[Precision, F64]
    error: Mapping[Precision, F64]
    sensitivity: Sensitivity | None

    @classmethod
    def of(cls, m: Manifest) -> Known:
        """The figures of a bundle.

        Raises:
            BundleError: they are not of its steps or precisions.
        """
        c, n, held = m.choice, len(m.sampling), set(m.bops)
        rows = [*c.snr_q.values(), *c.error.values()]
        sizes = {len(row) for row in rows} | ({sum(c.sensitivity.groups)} if c.sensitivity else set())
        tables = (c.seconds_per_evaluation, c.seconds_error, c.snr_q, c.error)
        noisy = {p for p in held if not p.is_float}
        measured = set(c.sensitivity.paired) if c.sensitivity else noisy
        numbers = [*c.seconds_per_evaluation.values(), *(v for row in rows for v in row if v is not None)]
        if sizes != {n} or any(set(table) != held for table in tables) or measured != noisy:
            raise BundleError("the bundle's figures are not of its steps and precisions: rebuild the bundle")
        if min(numbers, default=0.0) < 0 or min(m.bops.values()) < 0:
            raise BundleError("the bundle's figures hold negative costs or errors: rebuild the bundle")
        return cls(
            m.sampling.schedule,
            {p: float(bops) for p, bops in m.bops.items()},
            c.bops_fp32,
            c.timed_on,
            {p: c.seconds_per_evaluation[p] for p in m.bops},
            {p: c.seconds_error[p] for p in m.bops},
            {p: np.array([np.inf if v is None else v for v in c.snr_q[p]], np.float64) for p in m.bops},
            {p: np.array(c.error[p], np.float64) for p in m.bops},
            c.sensitivity,
        )

    def errors(self, objective: Objective) -> Mapping[Precision, F64]:
        """Predicted error (T,) of each precision at each step; a plan's is their sum."""
        return self.error if self.sensitivity is None else self.sensitivity.weigh(self.error, objective)

    def costs(self, unit: str) -> dict[Precision, float]:
        """Cost of one evaluation, "time" or "bops"; what cannot be told apart is one cost."""
        if unit == "bops":
            return equal_costs(self.bops, {})
        return equal_costs(self.seconds, self.seconds_error)


def decide(known: Known, spec: PlanSpec) -> tuple[Plan, Choice]:
    """The plan that a rule gives, and the record of the choice; nothing of it is sampled yet.

    Raises:
        RecipeError: the rule needs precisions that there are not, or a fixed plan has other steps.
    """
    n, candidates = len(known.schedule), list(known.bops)
    errors, cost = known.errors(spec.objective), known.costs(spec.cost)
    front = pareto_front(errors, cost)
    full = [cost[p] for p in candidates if p.is_float]
    budget = spec.budget * max(full or cost.values()) * n
    plan = _by_rule(known, spec, errors, cost, front, budget)
    notes = []
    if spec.rule in ("budget", "first-last") and plan.total(cost) > budget * CLOSE:
        whose = "full precision's" if full else "the dearest precision's"
        notes.append(
            f"no plan fits the budget of {spec.budget:g} of {whose} {spec.cost}: the cheapest one is taken"
        )
    if unused := [str(p) for p in candidates if p not in plan.precisions]:
        notes.append(f"built but not used by this plan: {', '.join(unused)}")
    choice = Choice(
        rule=spec.rule,
        objective=spec.objective,
        cost=spec.cost,
        budget=float(budget),
        timed_on=known.timed_on,
        bops=int(plan.total(known.bops)),
        bops_fp32=known.bops_fp32,
        seconds_per_evaluation=dict(known.seconds),
        seconds_error=dict(known.seconds_error),
        snr_q={p: _finite(value) for p, value in known.snr.items()},
        error={p: tuple(value.tolist()) for p, value in known.error.items()},
        sensitivity=known.sensitivity,
        front=tuple(FrontRecord(point.cost, point.error, str(point.plan)) for point in front),
        compared=_compared(plan, errors, cost),
        notes=(*notes, *_last_step(known), *_same_cost(cost, spec)),
    )
    return plan, choice


def _by_rule(
    known: Known,
    spec: PlanSpec,
    errors: Mapping[Precision, F64],
    cost: Mapping[Precision, float],
    front: list[FrontPoint],
    budget: float,
) -> Plan:
    if spec.rule == "snr":
        return by_snr(known.snr, known.bops, known.schedule)
    if spec.rule == "paper":
        return by_paper(list(known.bops), len(known.schedule))
    if spec.rule == "first-last":
        return first_last(errors, cost, budget)
    if spec.rule == "fixed":
        return fixed(spec.steps, len(known.schedule))
    return by_budget(front, budget).plan


def _compared(
    plan: Plan, errors: Mapping[Precision, F64], cost: Mapping[Precision, float]
) -> tuple[PlanRecord, ...]:
    """The plan, and what others ship at most at its cost."""
    total = plan.total(cost)
    rivals: tuple[tuple[Literal["chosen", "uniform", "first-last"], Plan], ...] = (
        ("chosen", plan),
        ("uniform", uniform(errors, cost, total)),
        ("first-last", first_last(errors, cost, total)),
    )
    return tuple(
        PlanRecord(kind, str(rival), rival.total(cost), rival.error(errors), None, None)
        for kind, rival in rivals
    )


def _last_step(known: Known) -> list[str]:
    """A note where no quantized precision passes the paper's rule at the last step."""
    noisy = [p for p in known.snr if np.isfinite(known.snr[p][-1])]
    forward = float(known.schedule.snr[-1])
    if not noisy or any(known.snr[p][-1] > forward for p in noisy):
        return []
    best = max(noisy, key=lambda p: known.snr[p][-1])
    return [
        f"last step: no quantized precision has an SNR_Q above SNR_F there ({best}: "
        f"{_decibels(known.snr[best][-1])} of {_decibels(forward)} dB)"
    ]


def _decibels(power: float) -> str:
    return f"{10 * np.log10(max(power, 1e-20)):.1f}"


def _same_cost(cost: Mapping[Precision, float], spec: PlanSpec) -> list[str]:
    """A note on precisions whose times do not differ by more than their noise."""
    groups: dict[float, list[str]] = {}
    for p, value in cost.items():
        groups.setdefault(value, []).append(str(p))
    if spec.cost != "time" or spec.rule not in ("budget", "first-last"):
        return []
    return [
        f"{', '.join(names)} take equally long within the noise of their times: the error decides"
        for names in groups.values()
        if len(names) > 1
    ]


def _finite(values: F64) -> tuple[float | None, ...]:
    return tuple(float(value) if np.isfinite(value) else None for value in values)
