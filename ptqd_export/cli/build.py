"""The build command."""

from __future__ import annotations

import functools
import shlex
import time
from pathlib import Path
from typing import Any, get_args

import click

from ..core.backend import RUNNABLE
from ..core.plan import Rule
from ..core.scheduler_config import SOLVERS
from ..errors import RecipeError, need
from ..recipe import Recipe
from ..typed import brief, to_plain
from .common import common, engine_notes, say, show
from .estimate import estimate_text
from .farm import on_ray, ray_option

ENGINES = Path("engines")
"""Folder of bundles that are built without --out."""


@click.command()
@click.argument("recipe_or_model", required=False)
@click.option(
    "--checkpoint",
    type=click.Path(path_type=Path),
    help="A latent diffusion model in one file of CompVis' layout, .safetensors or .ckpt.",
)
@click.option(
    "--ldm-config",
    type=click.Path(path_type=Path),
    help="Its configuration, a .yaml file; not needed for Stable Diffusion 1.",
)
@click.option(
    "--out",
    type=click.Path(path_type=Path),
    help="Folder of the bundle, engines/NAME of the model if left out; an older bundle there is replaced.",
)
@click.option(
    "--precision",
    "precisions",
    multiple=True,
    help="fp32, fp16, w8a8, w4a8, w4a4, w8a8-fp8, w4a16, w4a4+ (bits dealt out among layers by the noise "
    "that each makes), w8a8+ (the noisiest stay float), ...; repeat for several.",
)
@click.option("--solver", type=click.Choice(SOLVERS), help="Default: what the scheduler config names.")
@click.option("--n-steps", type=int, help="Denoising steps.")
@click.option("--eta", type=float, help="Of solver ddim: 0 is deterministic, 1 as noisy as DDPM.")
@click.option("--guidance-scale", type=float)
@click.option("--guidance-rescale", type=float, help="0 to 1; for models with zero terminal SNR.")
@click.option(
    "--calib-size", type=int, help="Calibration trajectories; half as many more are held out to judge by."
)
@click.option("--batch-size", type=int, help="Trajectories per batch in calibration.")
@click.option("--seed", type=int)
@click.option(
    "--plan", "plan", help="budget, snr, first-last, paper, or a plan by hand such as w4a8*12,w8a8*8."
)
@click.option(
    "--budget",
    type=float,
    help="Mean cost per step (--plan budget): a fraction of full precision's, or of the dearest's.",
)
@click.option("--cost", type=click.Choice(["time", "bops"]), help="What the budget counts.")
@click.option(
    "--rounding",
    type=click.Choice(["gptq", "gptq-sequential", "adaround", "nearest"]),
    help="How weights are rounded; adaround takes hours.",
)
@click.option("--iterations", type=int, help="Steps per block of --rounding adaround.")
@click.option("--correction", type=click.Choice(["ptqd", "bias", "affine", "none"]))
@click.option(
    "--recalibrate-variance/--no-recalibrate-variance",
    default=None,
    help="Take the variance that stays random off the injected noise (eta > 0).",
)
@click.option(
    "--backend",
    "backends",
    multiple=True,
    type=click.Choice(RUNNABLE),
    help="What the bundle gets engines and times for; repeat for several.",
)
@click.option(
    "--compute-capability",
    "compute_capabilities",
    multiple=True,
    help="GPUs of tensorrt-rtx engines, such as 8.9; all it knows but 7.5 if left out.",
)
@click.option(
    "--resume/--no-resume",
    default=True,
    show_default=True,
    help="Take up the intermediate results of a build that was stopped.",
)
@ray_option("Sample the trajectories, and measure the noise,")
@click.option("--workers", type=click.IntRange(min=1), help="Of --ray.")
@click.option(
    "--dry-run",
    is_flag=True,
    help="Only say what the build would do and take: layers, operations, sizes, memory, time.",
)
@common
def build(
    recipe_or_model: str | None,
    out: Path | None,
    as_json: bool,
    resume: bool,
    ray: str | None,
    workers: int | None,
    dry_run: bool,
    **options: Any,
) -> None:
    """Calibrate, correct, export and pack RECIPE_OR_MODEL.

    RECIPE_OR_MODEL is a recipe, a folder with one, a diffusers folder, or a checkpoint in one file;
    --checkpoint takes its place, or that of the model in the recipe.
    """
    from ..assemble import build as build_bundle
    from ..assemble import estimate
    from ..bundle import check_target

    need(ray is not None or workers is None, f"--workers {workers} is of --ray: give it too")
    if recipe_or_model is None and options["checkpoint"] is None:
        raise RecipeError("nothing to build: give a recipe, a model's folder, or --checkpoint")
    start = Recipe(folder=Path.cwd()) if recipe_or_model is None else Recipe.load(Path(recipe_or_model))
    recipe = override(start, **options)
    out = default_out(recipe) if out is None else out
    if dry_run:
        expected = estimate(recipe, out)
        show(to_plain(expected), as_json, estimate_text(expected))
        return
    started = time.monotonic()
    connect = None if ray is None else functools.partial(on_ray, ray, workers)
    bundle = build_bundle(recipe, check_target(out), resume=resume, say=say, connect=connect)
    m = bundle.manifest
    size = sum(entry.size for entry in m.files.values())
    result = {
        "bundle": str(out),
        "plan": str(m.plan),
        "bops_of_fp32": m.choice.bops_share,
        "engines": to_plain(m.artifacts),
        "update_engines": to_plain(m.update_engines),
        "parity": to_plain(m.parity),
        "bytes": size,
        "seconds": round(time.monotonic() - started, 1),
        "notes": [*m.choice.notes, *engine_notes(m.engines)],
    }
    notes = "".join(f"\nnote: {note}" for note in result["notes"])
    text = f"{out}: plan {m.plan}, {size / 1e6:.1f} MB, {result['seconds']:.0f} s"
    words = ["--prompt", "a photo of a cat"] if m.pipeline.encoders else []
    command = shlex.join(["ptqd-export", "run", str(out), "--out", "DIR", *words])
    show(result, as_json, f"{text}; sample with `{command}`{notes}")


def default_out(recipe: Recipe) -> Path:
    """engines/NAME, where NAME is the model's name in the recipe, or that of its source.

    Raises:
        RecipeError: the bundle of another model is there.
    """
    from ..bundle.bundle import model_of

    name = recipe.model_name
    out = ENGINES / name
    there = model_of(out)
    if there not in (None, name):
        raise RecipeError(
            f"{out} holds the bundle of another model, {brief(there)}: give --out {shlex.quote(str(out))} to "
            "replace it, or another folder"
        )
    return out


def override(recipe: Recipe, **options: Any) -> Recipe:
    """The recipe, overridden by the command line's options.

    Raises:
        RecipeError: a value is out of range.
    """
    sections: dict[str, Any] = {}

    def put(section: str, name: str, value: Any) -> None:
        if value is not None:
            sections.setdefault(section, {})[name] = value

    for name in ("checkpoint", "ldm_config"):
        if options[name] is not None:
            put("model", name, str(options[name].absolute()))
    for name in ("solver", "n_steps", "eta", "guidance_scale", "guidance_rescale"):
        put("sampler", name, options[name])
    if options["calib_size"] is not None:
        put("calibration", "size", options["calib_size"])
        put("calibration", "held_out", max(2, options["calib_size"] // 2))
    put("calibration", "batch_size", options["batch_size"])
    put("calibration", "seed", options["seed"])
    put("quantization", "precisions", options["precisions"] or None)
    put("quantization", "rounding", options["rounding"])
    put("quantization", "iterations", options["iterations"])
    put("quantization", "correction", options["correction"])
    put("quantization", "recalibrate_variance", options["recalibrate_variance"])
    plan = options["plan"]
    if plan in set(get_args(Rule)) - {"fixed"}:
        put("plan", "rule", plan)
    elif plan is not None:
        put("plan", "rule", "fixed")
        put("plan", "steps", tuple(plan.replace(",", " ").split()))
    put("plan", "budget", options["budget"])
    put("plan", "cost", options["cost"])
    put("tensorrt", "compute_capabilities", options["compute_capabilities"] or None)
    if options["backends"]:
        sections["backends"] = options["backends"]
    return recipe.override(**sections)
