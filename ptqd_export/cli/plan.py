"""The plan command."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any, get_args

import click

from ..core.plan import Rule
from ..errors import RecipeError
from ..typed import to_plain
from .common import common, show

if TYPE_CHECKING:
    from ..bundle import Bundle
    from ..core.plan import Plan

RULES = tuple(rule for rule in get_args(Rule) if rule != "fixed")


@click.command()
@click.argument("bundle_dir", metavar="BUNDLE", type=click.Path(path_type=Path))
@click.option(
    "--budget",
    type=float,
    help="Mean cost per step, a fraction of full precision's; the bundle's own if left out.",
)
@click.option("--rule", type=click.Choice(RULES), help="The bundle's own if left out.")
@click.option(
    "--objective",
    type=click.Choice(["paired", "distribution"]),
    help="What is to be kept: each picture, or the distribution of all. The bundle's own if left out.",
)
@click.option(
    "--cost",
    type=click.Choice(["time", "bops"]),
    help="What the budget counts; the bundle's own if left out.",
)
@click.option("--plan", "by_hand", help="A plan by hand, such as w4a8*12,w8a8*8.")
@click.option(
    "--import",
    "imported",
    type=click.Path(path_type=Path),
    help="A plan by a diffusion_step_policy: its JSON, or a config.json that holds it.",
)
@click.option("--export", type=click.Path(path_type=Path), help="Write the plan as a diffusion_step_policy.")
@click.option("--out", type=click.Path(path_type=Path), help="Write a bundle with the plan to this folder.")
@click.option("--write", is_flag=True, help="Give BUNDLE itself the plan, in one step.")
@common
def plan(
    bundle_dir: Path,
    by_hand: str | None,
    imported: Path | None,
    export: Path | None,
    out: Path | None,
    write: bool,
    as_json: bool,
    **options: Any,
) -> None:
    """Plan BUNDLE anew from the figures that it holds: nothing is calibrated or measured again."""
    from ..assemble.replan import replan, spec_of, write_plan
    from ..bundle import Bundle, check_target
    from ..core.step_policy import write_policy
    from ..evaluate.inspect import plan_lines
    from ..files import write_file

    if write and out is not None:
        raise RecipeError("--write changes the bundle itself, --out makes another one: give one of the two")
    if sum(value is not None for value in (by_hand, imported, options["rule"])) > 1:
        raise RecipeError("--rule, --plan and --import each give a plan: give one of them")
    bundle = Bundle.open(bundle_dir)
    target = bundle_dir if write else out
    if target is not None:
        target = check_target(target)
    if imported is not None:
        by_hand = str(_imported(bundle, imported))
    if by_hand is not None:
        options |= {"rule": "fixed", "steps": (by_hand,)}
    chosen, choice = replan(bundle, spec_of(bundle.manifest, **options))
    policy = None if export is None else write_policy(chosen)
    if target is not None:
        write_plan(bundle, chosen, choice, target)
    if export is not None and policy is not None:
        write_file(export, policy.encode())
    result = {
        "bundle": str(bundle_dir),
        "plan": str(chosen),
        "rule": choice.rule,
        "objective": choice.objective,
        "cost": choice.cost,
        "budget": choice.budget,
        "bops_of_fp32": choice.bops_share,
        "compared": to_plain(choice.compared),
        "own": str(bundle.manifest.plan),
        "front": to_plain(choice.front),
        "notes": list(choice.notes),
        "written": None if target is None else str(target),
        "exported": None if export is None else str(export),
    }
    lines = [*plan_lines(choice, chosen), f"the bundle's own: {bundle.manifest.plan}"]
    lines += [f"written to {target}"] if target is not None else []
    show(result, as_json, "\n".join([*lines, *(f"note: {note}" for note in choice.notes)]))


def _imported(bundle: Bundle, file: Path) -> Plan:
    """The plan of a diffusion_step_policy for the bundle's steps and precisions.

    Raises:
        RecipeError: the file cannot be read, or holds no policy that fits.
    """
    from ..core.step_policy import modes, read_policy

    try:
        text = file.read_bytes()
    except OSError as error:
        raise RecipeError(f"{file} cannot be read ({error.strerror}): give a JSON file") from error
    native, a16 = modes(bundle.manifest.bops)
    return read_policy(text).plan(len(bundle.manifest.sampling), native, a16)
