"""Another plan for a bundle, from the figures that it holds: nothing is calibrated or measured again."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

from ..bundle.bundle import Bundle, check_target, in_the_way, write_manifest
from ..bundle.manifest import Choice, Manifest
from ..core.plan import Plan, fixed
from ..errors import BundleError, RecipeError
from ..files import link_or_copy, replacing, work_folder
from ..recipe import PlanSpec, Recipe
from .decide import Known, decide

SAME_PLAN = ("built but not used", "no plan fits the budget")
"""How notes begin that are of the plan, and not of the build."""


def spec_of(m: Manifest, **changes: object) -> PlanSpec:
    """What the bundle's own plan was chosen by, with changes; a plan by hand, or of the paper, asks for a
    budget from then on.

    Args:
        changes: of PlanSpec; None changes nothing.
    Raises:
        RecipeError: a value is out of range, or the budget is to count something else and none is given.
    """
    given = {name: value for name, value in changes.items() if value is not None}
    c = m.choice
    own: dict[str, object] = {"rule": c.rule, "objective": c.objective, "cost": c.cost}
    if c.rule in ("fixed", "paper") and "rule" not in given:
        own["rule"] = "budget"
    if given.get("cost", c.cost) == c.cost:
        own["budget"] = _share(m)
    elif (given | own).get("rule") in ("budget", "first-last") and "budget" not in given:
        raise RecipeError(
            f"the bundle's budget counts {c.cost}: with --cost {given['cost']}, give --budget too, as a "
            "fraction of full precision's"
        )
    return Recipe().override(plan=own | given).plan


def _share(m: Manifest) -> float:
    """The bundle's budget as a fraction, at most 1, of full precision's cost, or of the dearest's."""
    cost = Known.of(m).costs(m.choice.cost)
    dearest = max([cost[p] for p in cost if p.is_float] or cost.values()) * len(m.sampling)
    return min(1.0, round(m.choice.budget / dearest, 9)) if dearest > 0 and m.choice.budget > 0 else 1.0


def replan(bundle: Bundle, spec: PlanSpec) -> tuple[Plan, Choice]:
    """The plan that a rule gives for a bundle. What was sampled of the same plans is kept beside it.

    Raises:
        RecipeError: the rule does not fit the bundle's steps or precisions.
        BundleError: the bundle's figures do not.
    """
    m = bundle.manifest
    if spec.rule == "fixed":
        m.check_plan(fixed(spec.steps, len(m.sampling)))
    plan, choice = decide(Known.of(m), spec)
    known = {r.plan: r for r in m.choice.compared if m.choice.objective == choice.objective}
    compared = tuple(
        replace(r, sampled=known[r.plan].sampled, standard_error=known[r.plan].standard_error)
        if r.plan in known
        else r
        for r in choice.compared
    )
    kept = [note for note in m.choice.notes if not note.startswith(SAME_PLAN) and note not in choice.notes]
    return plan, replace(choice, compared=compared, notes=(*choice.notes, *kept))


def write_plan(bundle: Bundle, plan: Plan, choice: Choice, out: Path) -> Bundle:
    """Write the bundle with another plan at `out`, in one step; its files are links to the old ones, or
    copies.

    Args:
        out: where an older bundle is replaced: the bundle's own folder too.
    Raises:
        BundleError: the bundle was changed meanwhile.
        RecipeError: something else than a bundle stands at `out`.
    """
    m = bundle.manifest
    lacking = [str(p) for p in plan.precisions for b in m.backends if not _runs(m, p, b)]
    if lacking:
        raise BundleError(
            f"the bundle has no finished engines of {', '.join(dict.fromkeys(lacking))}: rebuild it"
        )
    out = check_target(out)
    with work_folder(out), replacing(out, in_the_way) as tmp:
        for name in m.files:
            (tmp / name).parent.mkdir(parents=True, exist_ok=True)
            link_or_copy((bundle.path / name).resolve(), tmp / name)
        write_manifest(tmp, replace(m, plan=plan, choice=choice))
        if Bundle.open(tmp).manifest.files != m.files:
            raise BundleError(f"{bundle.path} was changed while it was being read: run the command again")
    return Bundle.open(out)


def _runs(m: Manifest, precision: object, backend: str) -> bool:
    """Whether a backend that the bundle was built for has what it needs at a precision."""
    return any(a.backend == backend and a.precision == precision for a in m.artifacts)
