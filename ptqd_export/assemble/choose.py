"""Choose the plan of a build: a precision per step by the recipe's rule, and how it and its rivals fare."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

import numpy as np

from .. import backends
from ..bundle.manifest import Choice
from ..bundle.tables import Key
from ..core.backend import BACKENDS, ORT_CPU
from ..core.plan import Plan, by_paper, fixed, step_weights
from ..core.precision import FLOAT_BITS, Precision
from ..core.quant import QuantizedNetwork
from ..core.schedule import NoiseSchedule
from ..core.sensitivity import Sensitivity
from ..errors import RecipeError
from ..parity.noise import FEW
from ..recipe import Recipe
from .closed_loop import ClosedLoop, End
from .decide import Known, decide
from .measure import Measured
from .timing import Times


def choose(
    recipe: Recipe,
    schedule: NoiseSchedule,
    quantized: Mapping[Precision, QuantizedNetwork],
    measured: Mapping[Key, Measured],
    times: Times,
    sensitivity: Sensitivity | None,
) -> tuple[Plan, Choice]:
    """The plan that the recipe's rule gives for the graphs that the timed backend runs.

    Raises:
        RecipeError: a fixed plan uses precisions that are not built, or the paper's plan is not.
    """
    n, emission = len(schedule), BACKENDS[times.backend].emission
    native = {p: measured[p, emission.numerics(p)] for p in quantized if not p.is_float}
    weights = step_weights(schedule)
    macs = next(iter(quantized.values())).macs
    known = Known(
        schedule,
        {p: float(net.bops) for p, net in quantized.items()},
        macs * FLOAT_BITS**2 * n,
        times.backend,
        {p: round(times.seconds[p], 9) for p in quantized},
        {p: round(times.errors[p], 9) for p in quantized},
        {p: native[p].pooled.snr if p in native else np.full(n, np.inf) for p in quantized},
        {p: weights * native[p].error() if p in native else np.zeros(n) for p in quantized},
        sensitivity,
    )
    if recipe.plan.rule == "fixed":
        fixed_plan(recipe, n)
    plan, choice = decide(known, recipe.plan)
    return plan, replace(choice, notes=(*choice.notes, *_notes(recipe, times)))


def sampled(choice: Choice, loop: ClosedLoop) -> Choice:
    """The choice, with its plan and their rivals sampled in closed loop."""
    n, ends = len(loop.sampling), dict[str, End]()
    for record in choice.compared:
        if record.plan not in ends:
            ends[record.plan] = loop.end(fixed(record.plan.split(), n))
    compared = []
    for record in choice.compared:
        end = ends[record.plan]
        if choice.objective == "paired":
            found = replace(record, sampled=end.error, standard_error=end.standard_error)
        else:
            found = replace(record, sampled=end.distribution)
        compared.append(found)
    return replace(choice, compared=tuple(compared))


def check_plan(recipe: Recipe, n_steps: int) -> None:
    """Refuse, before any work, a plan that cannot be.

    Raises:
        RecipeError: as `fixed_plan`, or the paper's plan is not to be had.
    """
    if recipe.plan.rule == "fixed":
        fixed_plan(recipe, n_steps)
    elif recipe.plan.rule == "paper":
        by_paper(recipe.precisions, n_steps)


def fixed_plan(recipe: Recipe, n_steps: int) -> Plan:
    """The plan that a recipe gives by hand, over all steps of the sampler.

    Raises:
        RecipeError: it has another number of steps, or a precision that is not built.
    """
    plan = fixed(recipe.plan.steps, n_steps)
    for precision in plan.precisions:
        if precision not in recipe.precisions:
            raise RecipeError(
                f"the fixed plan uses {precision}, which is not built: add it to quantization.precisions, "
                f"or --precision {precision}"
            )
    return plan


def _notes(recipe: Recipe, times: Times) -> list[str]:
    """What a user should know about a build that succeeded."""
    by = "noise and times" if recipe.plan.cost == "time" else "noise"
    judged = {"fixed": "", "paper": "", "snr": "noise"}.get(recipe.plan.rule, by)
    behind = f"; the plan goes by the {judged} of another backend" if judged else ""
    notes = [why + behind for why in times.notes]
    bits = {p.weight_bits for p in recipe.precisions if p.number == "int" and p.activation_bits <= 8}
    if times.backend == ORT_CPU and bits and backends.saturates():
        without = "this processor has no VNNI instructions: "
        if not backends.exact_integers():
            notes.append(f"{without}before 1.31 onnxruntime computes quantized layers in float32 here")
        elif 8 in bits and 7 not in bits:
            notes.append(
                f"{without}8-bit weights run in slower kernels here than those of 7 bits; --precision w7a8 "
                "is worth a try"
            )
    if recipe.calibration.held_out < FEW:
        notes.append(
            f"{recipe.calibration.held_out} held-out trajectories: the check of the noise and the sampled "
            f"errors see little; give --calib-size {2 * FEW} or more for anything that matters"
        )
    return notes
