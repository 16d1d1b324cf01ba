"""Choose the plan: a precision per step by the recipe's rule, with a record of the choice."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
import numpy.typing as npt

from ..bundle.manifest import Choice, FrontRecord
from ..bundle.tables import Key
from ..core.backend import BACKENDS
from ..core.plan import Plan, by_budget, by_snr, fixed, pareto_front, step_weights
from ..core.precision import FLOAT_BITS, Precision
from ..core.quant import QuantizedNetwork
from ..core.schedule import NoiseSchedule
from ..errors import RecipeError
from ..parity.noise import FEW
from ..recipe import Recipe
from .measure import Measured
from .timing import Times

F64 = npt.NDArray[np.float64]


def choose(
    recipe: Recipe,
    schedule: NoiseSchedule,
    quantized: Mapping[Precision, QuantizedNetwork],
    measured: Mapping[Key, Measured],
    times: Times,
) -> tuple[Plan, Choice]:
    """The plan that the recipe's rule gives for the graphs that the timed backend runs.

    Raises:
        RecipeError: a fixed plan uses precisions that are not built.
    """
    spec, n, emission = recipe.plan, len(schedule), BACKENDS[times.backend].emission
    candidates = list(quantized)
    bops = {p: float(net.bops) for p, net in quantized.items()}
    native = {p: measured[p, emission.numerics(p)] for p in candidates if not p.is_float}
    snr = {p: native[p].pooled.snr if p in native else np.full(n, np.inf) for p in candidates}
    weights = step_weights(schedule, spec.objective)
    errors = {p: weights * native[p].error() if p in native else np.zeros(n) for p in candidates}
    cost: Mapping[Precision, float] = times.seconds if spec.cost == "time" else bops
    front = pareto_front(errors, {p: cost[p] for p in candidates})
    full = [cost[p] for p in candidates if p.is_float]
    budget = spec.budget * max(full or [cost[p] for p in candidates]) * n
    if spec.rule == "snr":
        plan = by_snr(snr, bops, schedule)
    elif spec.rule == "fixed":
        plan = fixed_plan(recipe)
    else:
        plan = by_budget(front, budget).plan
    notes = []
    if spec.rule == "budget" and plan.total(cost) > budget * (1 + 1e-9):
        whose = "full precision's" if full else "the dearest precision's"
        notes.append(
            f"no plan fits the budget of {spec.budget:g} of {whose} {spec.cost}: the cheapest one is taken"
        )
    if unused := [str(p) for p in candidates if p not in plan.precisions]:
        notes.append(f"built but not used by this plan: {', '.join(unused)}")
    macs = next(iter(quantized.values())).macs
    return plan, Choice(
        rule=spec.rule,
        objective=spec.objective,
        cost=spec.cost,
        budget=float(budget),
        timed_on=times.backend,
        bops=int(plan.total(bops)),
        bops_fp32=macs * FLOAT_BITS**2 * n,
        seconds_per_evaluation={p: round(value, 6) for p, value in times.seconds.items()},
        snr_q={p: _finite(value) for p, value in snr.items()},
        error={p: tuple(value.tolist()) for p, value in errors.items()},
        front=tuple(FrontRecord(point.cost, point.error, str(point.plan)) for point in front),
        notes=(*notes, *_notes(recipe, times.notes)),
    )


def fixed_plan(recipe: Recipe) -> Plan:
    """The plan that a recipe gives by hand.

    Raises:
        RecipeError: it has another number of steps, or a precision that is not built.
    """
    plan = fixed(recipe.plan.steps, recipe.sampler.n_steps)
    for precision in plan.precisions:
        if precision not in recipe.precisions:
            raise RecipeError(
                f"the fixed plan uses {precision}, which is not built: add it to quantization.precisions, "
                f"or --precision {precision}"
            )
    return plan


def _notes(recipe: Recipe, untimed: Sequence[str]) -> list[str]:
    """What a user should know about a build that succeeded.

    Args:
        untimed: backends that could not be timed, and why.
    """
    by = "noise and times" if recipe.plan.cost == "time" else "noise"
    judged = {"fixed": "", "snr": "noise"}.get(recipe.plan.rule, by)
    notes = [f"{why}; the plan goes by the {judged} of another backend" if judged else why for why in untimed]
    if recipe.calibration.held_out < FEW:
        notes.append(
            f"{recipe.calibration.held_out} held-out trajectories: the gate and the check of the noise see "
            "little; "
            f"give --calib-size {2 * FEW} or more for anything that matters"
        )
    return notes


def _finite(values: F64) -> tuple[float | None, ...]:
    return tuple(float(value) if np.isfinite(value) else None for value in values)
