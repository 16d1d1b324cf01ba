"""The run command."""

from __future__ import annotations

import hashlib
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from ..core.backend import BACKENDS, ENGINE_BACKENDS
from ..core.model import ModelInfo
from ..core.plan import parse_plan
from ..core.scheduler_config import SOLVERS
from ..errors import BackendUnavailable, RecipeError
from ..progress import progress
from . import common as options
from . import farm
from .common import common, engine_notes, say, show

if TYPE_CHECKING:
    from ..bundle import Bundle
    from ..core.engine import Array
    from ..runtime import Runtime

AUTO, LATENTS = "auto", "latents"
NUM_SAMPLES = 16


@click.command()
@click.argument("bundle_dir", metavar="BUNDLE", type=click.Path(path_type=Path))
@click.option("--out", type=click.Path(path_type=Path), required=True, help="Folder of the pictures.")
@click.option(
    "--num-samples", type=click.IntRange(min=1), help="16 if left out, or one per prompt of --prompts-file."
)
@click.option(
    "--class-labels", help="Classes in turn, such as 3 or 0,1,2 or 0-9; all classes in turn if left out."
)
@options.condition
@options.prompts
@click.option(
    "--plan",
    "plan_text",
    help="Another plan over the bundle's precisions, such as fp32*3,w8a8*17; the bundle's own if left out.",
)
@click.option("--seed", type=click.IntRange(0, 2**64 - 1), default=0, show_default=True)
@options.batch_size
@options.workers
@click.option(
    "--backend",
    type=click.Choice([AUTO, *BACKENDS]),
    default=AUTO,
    show_default=True,
    help="auto: the best that works here; on the CPU the fastest, which is measured once per bundle.",
)
@options.device
@click.option(
    "--swap-weights",
    is_flag=True,
    help="Keep in the GPU's memory the weights of the engine in use alone (tensorrt-rtx).",
)
@click.option(
    "--rebuild",
    is_flag=True,
    help="First build engines for this machine, from the bundle's own graphs; the bundle keeps them.",
)
@click.option(
    "--model",
    type=click.Path(path_type=Path),
    help="The recipe or model the bundle was built from (for --backend torch).",
)
@click.option(
    "--format",
    "file_format",
    type=click.Choice(["png", "npy", LATENTS, *farm.FORMATS]),
    help="Pictures (the default), their values in one array, or, of a latent model, what its decoder was not "
    "yet given. With --ray: parquet (the default) or webdataset, a tar.",
)
@farm.options
@click.option("--n-steps", type=int, help="Checked against the bundle.")
@click.option("--eta", type=float, help="Checked against the bundle.")
@click.option("--guidance-scale", type=float, help="Checked against the bundle.")
@click.option("--solver", type=click.Choice(SOLVERS), help="Checked against the bundle.")
@common
def run(
    bundle_dir: Path,
    out: Path,
    num_samples: int | None,
    class_labels: str | None,
    conditions: tuple[str, ...],
    prompts: tuple[str, ...],
    prompts_file: Path | None,
    negative_prompt: str | None,
    plan_text: str | None,
    seed: int,
    batch_size: int | None,
    workers: int,
    backend: str,
    device: int,
    swap_weights: bool,
    rebuild: bool,
    model: Path | None,
    file_format: str | None,
    ray: str | None,
    content: str | None,
    shard_size: int | None,
    dataset: Path | None,
    as_json: bool,
    **asked: Any,
) -> None:
    """Draw samples from BUNDLE: single images and a grid, or an array and a grid."""
    from .. import pictures
    from ..bundle import Bundle
    from ..runtime import check_settings, encode_prompts, versions
    from ..runtime import run as run_bundle

    shards = farm.Asked(ray, content, shard_size, dataset)
    wanted = shards.check_format(file_format)
    texts = options.read_texts(prompts, prompts_file, None if dataset else negative_prompt)
    farm.check_alone(shards, rebuild, device, conditions, class_labels is not None or bool(texts))

    # Engines that will be built anew may be damaged: that may be the reason for the rebuild.
    bundle = Bundle.open(bundle_dir, without=backend if rebuild else None)
    check_settings(bundle, **asked)
    info = bundle.manifest.sampling.model
    plan = bundle.manifest.plan
    if plan_text is not None:
        plan = parse_plan(plan_text, len(bundle.manifest.sampling))
        bundle.manifest.check_plan(plan)
    are_pictures = _check_format(bundle, wanted, "--format" if ray is None else "--content")
    if num_samples is None:
        num_samples = NUM_SAMPLES if prompts_file is None else len(texts)
    in_turn = None if class_labels is None else parse_labels(class_labels, info)
    if ray is not None:
        farm.sample_on_ray(
            bundle,
            shards,
            out,
            num_samples,
            tuple(in_turn or ()),
            encode_prompts(bundle, texts, negative_prompt) if texts else None,
            negative_prompt,
            plan,
            file_format,
            workers,
            as_json,
            seed=seed,
            batch_size=batch_size,
            backend=None if backend == AUTO else backend,
            model=model,
            resident=not swap_weights,
            content=wanted,
        )
        return
    labels = in_turn and [in_turn[i % len(in_turn)] for i in range(num_samples)]
    tensors = read_tensors(conditions)
    folder = pictures.check_folder(out)
    if rebuild:
        bundle = _rebuild(bundle, backend)
    prompted = encode_prompts(bundle, texts, negative_prompt) if texts else None
    m = bundle.manifest
    used: list[Runtime] = []
    sizes: list[int] = []
    passed_over: dict[str, str] = {}
    captures: dict[str, str] = {}
    started = time.monotonic()
    with progress(num_samples * len(m.sampling), f"sampling {plan}", "step") as bar:

        def advance(steps: int) -> None:
            bar.update(steps)
            for runtime in used:
                captures.update(runtime.capture_notes)

        x = run_bundle(
            bundle,
            num_samples,
            labels,
            seed=seed,
            batch_size=batch_size,
            workers=workers,
            backend=None if backend == AUTO else backend,
            plan=plan,
            model=model,
            tensors=tensors,
            prompts=prompted,
            latents=wanted == LATENTS,
            device=device,
            resident=not swap_weights,
            advance=advance,
            opened=used.append,
            batched=sizes.append,
        )
    seconds = time.monotonic() - started
    why = ""
    for runtime in used:
        backend, passed_over, why = runtime.backend, runtime.passed_over, runtime.why
    if why:
        click.echo(f"backend: {why}", err=True)
    files = pictures.encode_images(x) if wanted == "png" else {"samples.npy": pictures.encode_array(x)}
    grid = {}
    if are_pictures:
        columns = _columns(info, num_samples, labels, 0 if prompted is None else len(prompted.prompts))
        grid["grid.png"] = pictures.encode_png(pictures.image_grid(x, columns))
    about = {
        "bundle": bundle.seal,
        "seed": seed,
        "plan": str(plan),
        "backend": backend,
        "batch_size": sizes[0],
        "labels": info.labels_in_turn(range(num_samples)) if labels is None else labels,
        "conditions": {name: _sha256(value) for name, value in tensors.items()},
        "prompts": None if prompted is None else prompted.prompts,
        "negative_prompt": None if prompted is None else prompted.negative,
        "versions": versions(bundle, backend),
    }
    pictures.write_pictures(folder, files | grid, about)
    result = {
        "out": str(out),
        "files": list(files),
        "grid": next(iter(grid), None),
        "plan": str(plan),
        "backend": backend,
        "batch_size": sizes[0],
        "passed_over": passed_over,
        "why": why,
        "state": BACKENDS[backend].state,
        "captures": captures,
        "seed": seed,
        "seconds": round(seconds, 3),
        "seconds_per_sample": round(seconds / num_samples, 4),
        "largest_value": float(abs(x).max()),
    }
    notes = engine_notes(engine for engine in m.engines if rebuild and engine.backend == backend)
    notes += [] if prompted is None else prompted.notes
    if bundle.manifest.pipeline.encoders and prompted is None and not tensors:
        without = "without text" if bundle.manifest.pipeline.force_zeros else "of the empty prompt"
        notes.append(f"no prompt was given: these are samples {without}")
    # Only backends that the bundle was built for are worth a note.
    notes += [f"not on {name}: {why}" for name, why in passed_over.items() if name in m.backends]
    notes += [f"{name}: {note}" for name, note in captures.items()]
    look = f" (look at {out / 'grid.png'})" if grid else ""
    text = (
        f"{num_samples} samples in {out}{look}, {seconds:.1f} s, {seconds / num_samples:.3f} s each, on "
        f"{backend}"
    )
    show(result, as_json, text + "".join(f"\nnote: {note}" for note in notes))


def _check_format(bundle: Bundle, file_format: str, option: str) -> bool:
    """Whether what the run yields are pictures, of which a grid can be made.

    Raises:
        RecipeError: they are none, and are to be written as such; or latents are asked of a model without.
    """
    pipeline, info = bundle.manifest.pipeline, bundle.manifest.sampling.model
    if file_format == LATENTS and not pipeline.latent:
        raise RecipeError(f"{info.name} samples no latents: give {option} png or npy")
    if pipeline.latent and pipeline.decoder is None and file_format != LATENTS:
        raise RecipeError(
            f"{info.name} samples latents, and the bundle has no decoder that makes pictures of them: give "
            f"{option} latents, or rebuild from a folder with its first stage (vae or vqvae)"
        )
    channels = info.channels if file_format == LATENTS else bundle.picture_shape[0]
    if file_format == "png" and channels not in (1, 3):
        raise RecipeError(f"samples of {channels} channels are no pictures: give {option} npy")
    return file_format != LATENTS and channels in (1, 3)


def _columns(info: ModelInfo, num_samples: int, labels: Sequence[int] | None, prompts: int) -> int:
    """Columns of the grid: one per class or prompt where all go in turn, else about as many as rows."""
    in_turn = prompts or (len(info.labels) if labels is None else 0)
    return in_turn if 1 < in_turn <= 20 else round(num_samples**0.5)


def _rebuild(bundle: Bundle, backend: str) -> Bundle:
    """The bundle, with engines built anew for this machine.

    Raises:
        RecipeError: no backend is named.
        BackendUnavailable: the engines were built, but cannot run here.
    """
    from .. import backends
    from ..assemble import rebuild

    if backend == AUTO:
        raise RecipeError(
            f"--rebuild builds engines of one backend: say which, as in --backend {ENGINE_BACKENDS[-1]}"
        )
    bundle = rebuild(bundle, backend, say)
    try:
        backends.check(backend)
    except BackendUnavailable as error:
        raise BackendUnavailable(
            f"the bundle has its engines for {backend} now, but they do not run here: {error}"
        ) from error
    return bundle


def _sha256(value: Array) -> str:
    return hashlib.sha256(str((value.dtype.str, value.shape)).encode() + value.tobytes()).hexdigest()


def parse_labels(text: str, info: ModelInfo) -> list[int]:
    """The classes that samples get in turn, from text such as "3", "0,1,2" or "0-9".

    Raises:
        RecipeError: the text holds no numbers, or a number that is no class of the model.
    """
    known = set(info.labels)
    if not known:
        raise RecipeError(
            f"class labels were given, but {info.name} has no classes: leave --class-labels out"
        )
    labels: list[int] = []
    for part in text.replace(",", " ").split():
        first, dash, last = part.partition("-")
        if not first.isdecimal() or (dash and not last.isdecimal()):
            raise RecipeError(f"--class-labels {text[:100]!r}: expected numbers, such as 3 or 0,1,2 or 0-9")
        ends = [int(number[:20]) for number in (first, last) if number]
        bad = next((end for end in ends if end not in known), None)
        if bad is not None:
            raise RecipeError(
                f"class label {bad} is out of range: {info.name} has classes {info.labels[0]} to "
                f"{info.labels[-1]}"
            )
        labels += range(ends[0], ends[-1] + 1)
    if not labels:
        raise RecipeError(
            f"--class-labels {text[:100]!r} names no class: give numbers, such as 3 or 0,1,2 or 0-9"
        )
    return labels


def read_tensors(conditions: Sequence[str]) -> Mapping[str, Array]:
    """The tensor conditions named by NAME=FILE.npy.

    Raises:
        RecipeError: a file cannot be read.
    """
    import numpy as np

    tensors = {}
    for text in conditions:
        name, _, file = text.partition("=")
        try:
            tensors[name] = np.load(file, allow_pickle=False)
        except (OSError, ValueError, EOFError) as error:
            why = error.strerror if isinstance(error, OSError) and error.strerror else "it holds no numbers"
            raise RecipeError(
                f"--condition {text}: cannot read {file or 'a file'} as .npy ({why}); give NAME=FILE.npy"
            ) from error
    return tensors
