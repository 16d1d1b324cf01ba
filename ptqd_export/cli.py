"""The command line: build, run, inspect, verify. Composes; holds no numerics. Heavy parts are imported inside the commands."""

from __future__ import annotations

import contextlib
import json
import re
import sys
import time
import traceback
from collections.abc import Callable, Sequence
from dataclasses import asdict
from importlib import metadata
from pathlib import Path
from typing import Any

import click

from . import __version__
from .errors import BackendUnavailable, PTQDError, RecipeError
from .quant import BACKENDS, BUILDERS
from .recipe import BUILT, Recipe

DISTRIBUTIONS = {
    "tensorrt": ("tensorrt",),
    "tensorrt-rtx": ("tensorrt-rtx-cu13",),
    "ort-cuda": ("onnxruntime-gpu",),
    "ort-cpu": ("onnxruntime", "onnxruntime-gpu"),
    "torch": ("torch", "diffusers"),
}
"""Packages that decide what a backend computes."""
RUN = "run.json"
"""Beside the pictures: what they were made with, and their names."""


def common(command: Callable[..., Any]) -> Callable[..., Any]:
    """Options that every command has."""
    command = click.option("--debug", is_flag=True, expose_value=False, help="Show the traceback of an error.")(command)
    return click.option("--json", "as_json", is_flag=True, help="Print one machine-readable JSON object on stdout.")(command)


class _Group(click.Group):
    """Ctrl-C as click.Abort, without the empty line that click prints before it."""

    def invoke(self, ctx: click.Context) -> Any:
        try:
            return super().invoke(ctx)
        except KeyboardInterrupt as error:
            raise click.Abort from error


@click.group(cls=_Group, context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(__version__, prog_name="ptqd-export")
def cli() -> None:
    """Quantize a diffusion UNet, correct it (PTQD), and sample from it with an engine per bitwidth."""


@cli.command()
@click.argument("recipe_or_model")
@click.option("--out", type=click.Path(path_type=Path), help="Folder of the bundle, engines/NAME if left out; an older bundle there is replaced.")
@click.option("--precision", "precisions", multiple=True, help="fp32, fp16, w8a8, w4a8, w4a4, w8a8-fp8, w4a16, ...; repeat for several.")
@click.option("--solver", type=click.Choice(["ddim", "ddpm"]))
@click.option("--n-steps", type=int, help="Denoising steps.")
@click.option("--eta", type=float, help="0 is deterministic DDIM, 1 is DDPM.")
@click.option("--guidance-scale", type=float)
@click.option("--calib-size", type=int, help="Calibration trajectories; half as many more are held out for the gate.")
@click.option("--batch-size", type=int, help="Trajectories per batch in calibration.")
@click.option("--seed", type=int)
@click.option("--plan", "plan", help="snr, budget, or a plan by hand such as w4a8*12,w8a8*8.")
@click.option("--budget", type=float, help="Mean cost per step (--plan budget): a fraction of full precision's, if that is built, or the dearest's.")
@click.option("--cost", type=click.Choice(["time", "bops"]), help="What the budget counts.")
@click.option("--correction", type=click.Choice(["ptqd", "affine", "none"]))
@click.option("--recalibrate-variance/--no-recalibrate-variance", default=None, help="Take the residual variance off the injected noise (eta > 0).")
@click.option(
    "--backend", "backends", multiple=True, type=click.Choice(BUILT), help="What the bundle gets engines and times for; repeat for several."
)
@click.option(
    "--compute-capability", "compute_capabilities", multiple=True, help="GPUs of tensorrt-rtx engines, such as 8.9; all it knows if left out."
)
@click.option("--resume/--no-resume", default=True, show_default=True, help="Take up the intermediate results of a build that was stopped.")
@common
def build(recipe_or_model: str, out: Path | None, as_json: bool, resume: bool, **options: Any) -> None:
    """Calibrate, correct, export and pack RECIPE_OR_MODEL (a recipe, a folder with recipe.toml, or a diffusers folder)."""
    from .build import build as build_bundle
    from .bundle import check_target

    recipe = _override(Recipe.load(Path(recipe_or_model)), **options)
    out = Path("engines", recipe.model.name or Path(recipe_or_model).resolve().stem) if out is None else out
    started = time.monotonic()
    bundle = build_bundle(recipe, check_target(out), resume=resume, say=_say)
    m = bundle.manifest
    result = {
        "bundle": str(out),
        "plan": str(m.plan),
        "bops_of_fp32": m.plan_info["bops"] / m.plan_info["bops_fp32"],
        "engines": m.to_dict()["artifacts"],
        "parity": m.parity,
        "bytes": sum(int(f["size"]) for f in m.files.values()),
        "seconds": round(time.monotonic() - started, 1),
        "notes": m.plan_info["notes"],
    }
    notes = "".join(f"\nnote: {note}" for note in m.plan_info["notes"])
    _print(
        result,
        as_json,
        f"{out}: plan {m.plan}, {result['bytes'] / 1e6:.1f} MB, {result['seconds']:.0f} s; sample with `ptqd-export run {out} --out DIR`{notes}",
    )


def _override(recipe: Recipe, **options: Any) -> Recipe:
    sections: dict[str, Any] = {}

    def put(section: str, name: str, value: Any) -> None:
        if value is not None:
            sections.setdefault(section, {})[name] = value

    for name in ("solver", "n_steps", "eta", "guidance_scale"):
        put("sampler", name, options[name])
    if options["solver"] == "ddpm" and options["eta"] is None:
        put("sampler", "eta", 1.0)
    if options["calib_size"] is not None:
        put("calibration", "size", options["calib_size"])
        put("calibration", "held_out", max(2, options["calib_size"] // 2))
    put("calibration", "batch_size", options["batch_size"])
    put("calibration", "seed", options["seed"])
    put("quantization", "precisions", options["precisions"] or None)
    put("quantization", "correction", options["correction"])
    put("quantization", "recalibrate_variance", options["recalibrate_variance"])
    plan = options["plan"]
    if plan in ("snr", "budget"):
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


@cli.command()
@click.argument("bundle_dir", metavar="BUNDLE", type=click.Path(path_type=Path))
@click.option("--out", type=click.Path(path_type=Path), required=True, help="Folder of the pictures.")
@click.option("--num-samples", type=int, default=16, show_default=True)
@click.option("--class-labels", help="Classes in turn, such as 3 or 0,1,2 or 0-9; all classes in turn if left out.")
@click.option("--condition", "conditions", multiple=True, metavar="NAME=FILE.npy", help="A tensor condition (N, ...), e.g. text embeddings.")
@click.option("--seed", type=int, default=0, show_default=True)
@click.option("--batch-size", type=int, default=16, show_default=True)
@click.option("--workers", type=int, default=1, show_default=True, help="Processes of one thread each that split the batches.")
@click.option("--backend", type=click.Choice(["auto", *BACKENDS]), default="auto", show_default=True, help="auto: the best that works here.")
@click.option(
    "--rebuild", is_flag=True, help="Build the backend's engines for this machine first, from the bundle's own graphs; the bundle keeps them."
)
@click.option("--model", type=click.Path(path_type=Path), help="The recipe or model the bundle was built from (for --backend torch).")
@click.option("--format", "file_format", type=click.Choice(["png", "npy"]), default="png", show_default=True)
@click.option("--n-steps", type=int, help="Checked against the bundle.")
@click.option("--eta", type=float, help="Checked against the bundle.")
@click.option("--guidance-scale", type=float, help="Checked against the bundle.")
@click.option("--solver", type=click.Choice(["ddim", "ddpm"]), help="Checked against the bundle.")
@common
def run(
    bundle_dir: Path,
    out: Path,
    num_samples: int,
    class_labels: str | None,
    conditions: tuple[str, ...],
    seed: int,
    batch_size: int,
    workers: int,
    backend: str,
    rebuild: bool,
    model: Path | None,
    file_format: str,
    as_json: bool,
    **asked: Any,
) -> None:
    """Sample from BUNDLE: single images and a grid, or an array and a grid."""
    from . import images
    from .bundle import Bundle
    from .progress import progress
    from .runtime import Asked, choose_backend, state_of
    from .runtime import run as run_bundle

    for name, value in (("num-samples", num_samples), ("batch-size", batch_size), ("workers", workers)):
        if value < 1:
            raise RecipeError(f"--{name} is {value}: give at least 1")
    if not 0 <= seed < 2**64:
        raise RecipeError(f"--seed is {seed}: give a value from 0 to 2^64 - 1")
    # Engines that are to be built anew may be damaged: that may be why.
    bundle = Bundle.open(bundle_dir, without=backend if rebuild else None)
    Asked(**asked).check(bundle)
    labels = None if class_labels is None else _labels(class_labels, num_samples)
    tensors = _tensors(conditions)
    m = bundle.manifest
    pictures = m.model.channels in (1, 3)
    if file_format == "png" and not pictures:
        raise RecipeError(f"samples of {m.model.channels} channels are no pictures: give --format npy")
    _check_out(out)
    if rebuild:
        bundle = _rebuild(bundle, backend)
        m = bundle.manifest
        _check_rebuilt(backend)
    backend, passed_over = choose_backend(bundle) if backend == "auto" else (backend, {})
    started = time.monotonic()
    with images.output_folder(out):
        with progress(num_samples * len(m.schedule), f"sampling {m.plan}", "step") as bar:
            x = run_bundle(
                bundle,
                num_samples,
                labels,
                seed=seed,
                batch_size=batch_size,
                workers=workers,
                backend=backend,
                model=model,
                tensors=tensors,
                advance=bar.update,
            )
        seconds = time.monotonic() - started
        files = images.encode_images(x) if file_format == "png" else {"samples.npy": images.encode_array(x)}
        in_turn = len(m.model.labels) if class_labels is None else 0
        columns = in_turn if 1 < in_turn <= 20 else round(num_samples**0.5)  # a column per class where classes go in turn
        grid = {"grid.png": images.encode_png(images.image_grid(x, columns))} if pictures else {}
        about = {
            "seed": seed,
            "plan": str(m.plan),
            "backend": backend,
            "labels": m.model.labels_in_turn(range(num_samples)) if labels is None else labels,
            "files": [*files, *grid],
            "versions": _versions(backend),
        }
        earlier = _earlier_files(out)
        images.write_files(out, files | grid | {RUN: json.dumps(about, indent=1).encode() + b"\n"})
        for name in earlier - {*files, *grid}:
            with contextlib.suppress(OSError):
                (out / name).unlink()
    result = {
        "out": str(out),
        "files": list(files),
        "grid": next(iter(grid), None),
        "plan": str(m.plan),
        "backend": backend,
        "passed_over": passed_over,
        "state": state_of(backend),
        "seed": seed,
        "seconds": round(seconds, 3),
        "seconds_per_sample": round(seconds / num_samples, 4),
        "largest_value": float(abs(x).max()),
    }
    # Of those that the bundle was built for.
    instead = "".join(f"\nnote: not on {name}: {why}" for name, why in passed_over.items() if name in m.backends)
    look = f" (look at {out / 'grid.png'})" if pictures else ""
    _print(result, as_json, f"{num_samples} samples in {out}{look}, {seconds:.1f} s, {seconds / num_samples:.3f} s each, on {backend}{instead}")


def _check_rebuilt(backend: str) -> None:
    """Engines can be built where they cannot run.

    Raises:
        BackendUnavailable: they cannot run here; says that the bundle has them all the same.
    """
    from .backends import check

    try:
        check(backend)
    except BackendUnavailable as error:
        raise BackendUnavailable(f"the bundle has its engines for {backend} now, but they do not run here: {error}") from error


def _rebuild(bundle: Any, backend: str) -> Any:
    from .engines import rebuild

    if backend == "auto":
        raise RecipeError(f"--rebuild builds engines of one backend: say which, as in --backend {BUILDERS[-1]}")
    return rebuild(bundle, backend, _say)


def _versions(backend: str) -> dict[str, str]:
    """What decides the pictures besides the bundle."""
    found = {"ptqd-export": __version__}
    for name in ("numpy", *DISTRIBUTIONS[backend]):
        with contextlib.suppress(metadata.PackageNotFoundError):
            found[name] = metadata.version(name)
    return found


def _check_out(folder: Path) -> None:
    """Refuse folders that hold something else than pictures of an earlier run: a bundle, a model, pictures of the user's own.

    Raises:
        RecipeError: naming what is in the way.
    """
    for name in ("manifest.json", "recipe.toml", "config.json", "model_index.json", "unet"):
        if (folder / name).exists():
            raise RecipeError(f"{folder} holds {name}: it is the folder of a bundle or a model; give another --out for the pictures")
    own = _earlier_files(folder)
    for name in ("grid.png", "samples.npy", "00000.png"):
        if (folder / name).exists() and name not in own:
            raise RecipeError(f"{folder} holds a {name} that no earlier run wrote (by its {RUN}): give another --out")


def _earlier_files(folder: Path) -> set[str]:
    """Pictures that an earlier run left in a folder and put down in its run.json; those that only look like it are not among them."""
    try:
        files = json.loads((folder / RUN).read_bytes())["files"]
    except (OSError, LookupError, TypeError, ValueError, RecursionError):
        return set()
    listed = files if isinstance(files, list) else []
    return {name for name in listed if isinstance(name, str) and re.fullmatch(r"[0-9]{5,}\.png|grid\.png|samples\.npy", name)}


def _labels(text: str, n: int) -> list[int]:
    labels: list[int] = []
    for part in text.replace(",", " ").split():
        first, dash, last = part.partition("-")
        if not first.isdecimal() or (dash and not last.isdecimal()):
            raise RecipeError(f"--class-labels {text!r}: expected numbers, such as 3 or 0,1,2 or 0-9")
        labels += range(int(first), int(last) + 1) if dash else [int(first)]
    if not labels:
        raise RecipeError(f"--class-labels {text!r} names no class: give numbers, such as 3 or 0,1,2 or 0-9")
    return [labels[i % len(labels)] for i in range(n)]


def _tensors(conditions: Sequence[str]) -> dict[str, Any]:
    import numpy as np

    tensors = {}
    for text in conditions:
        name, _, file = text.partition("=")
        try:
            tensors[name] = np.load(file, allow_pickle=False)
        except (OSError, ValueError) as error:
            raise RecipeError(f"--condition {text}: cannot read {file or 'a file'} as .npy ({error}); give NAME=FILE.npy") from error
    return tensors


@cli.command()
@click.argument("bundle_dir", metavar="BUNDLE", type=click.Path(path_type=Path))
@click.option("--plot", type=click.Path(path_type=Path), help="Draw the per-step figures to this PNG, and the Pareto front to <name>-pareto.png.")
@common
def inspect(bundle_dir: Path, plot: Path | None, as_json: bool) -> None:
    """What BUNDLE holds: engines, and per step precision, k, bias, sigma, sigma', SNR."""
    from .bundle import Bundle
    from .inspect import per_step, plot_bundle, text

    bundle = Bundle.open(bundle_dir)
    rows = per_step(bundle)
    if plot is not None:
        plot_bundle(bundle, plot)
    m = bundle.manifest
    result = {"manifest": {k: v for k, v in m.to_dict().items() if k != "files"}, "steps": [asdict(row) for row in rows]}
    _print(result, as_json, text(bundle, rows))


@cli.command()
@click.argument("bundle_dir", metavar="BUNDLE", type=click.Path(path_type=Path))
@click.option(
    "--against",
    type=click.Choice(["ort-cpu"]),
    help="Also compare every backend that works here with this one, without optimisations, layer by layer.",
)
@common
def verify(bundle_dir: Path, against: str | None, as_json: bool) -> None:
    """Check every hash of BUNDLE; evaluate every graph and engine that can run here, and compare with what it computed where it was built."""
    from . import verify as verifying
    from .bundle import Bundle

    bundle = Bundle.open(bundle_dir)
    if against is not None:
        verifying.check_tools()
    engines, left_out = verifying.verify_engines(bundle)
    result = {"bundle": str(bundle_dir), "files": len(bundle.manifest.files), "engines": engines, "not_evaluated": left_out, "ok": True}
    lines = f"{bundle_dir}: {result['files']} files match their SHA-256; evaluated: {', '.join(engines) or 'nothing'}"
    lines += "".join(f"\nnot evaluated here: {what}: {why}" for what, why in left_out.items())
    if against is not None:
        states, parsed = verifying.backend_states(bundle), verifying.parsers(bundle)
        compared = verifying.compare_backends(bundle, states)
        result |= {"against": against, "backends": states, "parsers": parsed, "compared": [asdict(c) for c in compared]}
        lines += "\n" + verifying.text(states, parsed, compared)
    _print(result, as_json, lines)


def _say(text: str) -> None:
    if sys.stderr.isatty():
        click.echo(text, err=True)


def _print(result: dict[str, Any], as_json: bool, text: str) -> None:
    click.echo(json.dumps(result, indent=1, allow_nan=False) if as_json else text)


def main(argv: Sequence[str] | None = None) -> None:
    """Entry point: every failure is one line on stderr and exit code 1."""
    argv = list(sys.argv[1:] if argv is None else argv) or ["--help"]
    try:
        cli.main(argv, prog_name="ptqd-export", standalone_mode=False)
    except click.Abort:
        _fail("interrupted: nothing was changed; a build takes up where it stopped when the same command is given again", 130)
    except click.ClickException as error:
        _fail(" ".join(error.format_message().split()))
    except Exception as error:  # one line, whatever it is
        if "--debug" in argv:
            traceback.print_exc()
        _fail(_line(error))


def _line(error: BaseException) -> str:
    text = " ".join(str(error).split())
    if isinstance(error, PTQDError):
        return text
    if isinstance(error, OSError):
        return f"{error.strerror or text}{f': {error.filename}' if error.filename else ''}: nothing was changed"
    if isinstance(error, MemoryError) or "allocate memory" in text:
        return f"out of memory ({text[:120]}): lower --batch-size, or the number of samples"
    return f"internal error: {type(error).__name__}: {text[:300]} (run again with --debug for the traceback; please report it)"


def _fail(line: str, code: int = 1) -> None:
    click.echo(f"Error: {line}", err=True)
    raise SystemExit(code)


if __name__ == "__main__":
    main()
