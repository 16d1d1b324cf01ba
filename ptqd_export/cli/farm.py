"""--ray: work done by workers on many machines; of `run`, samples as shards."""

from __future__ import annotations

import contextlib
import io
import os
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import click
from click.core import ParameterSource

from ..bundle import Bundle
from ..core.backend import BACKENDS
from ..core.plan import Plan
from ..core.pool import Pool
from ..errors import RecipeError, need
from ..progress import progress
from ..runtime import Prompted
from .common import show

F = TypeVar("F", bound=Callable[..., Any])
FORMATS = ("parquet", "webdataset")
CONTENTS = ("png", "npy", "latents")
LOCAL = "local"


def ray_option(what: str) -> Callable[[F], F]:
    """The option that has something done on Ray."""
    return click.option(
        "--ray",
        is_flag=False,
        flag_value=LOCAL,
        metavar="[ADDRESS]",
        help=f"{what} by workers on Ray: of this machine, or of the cluster at ADDRESS (auto, or HOST:PORT); "
        "--workers is then their number, one per core or GPU if left out.",
    )


_OPTIONS = (
    ray_option("Sample into shards"),
    click.option(
        "--content",
        type=click.Choice(CONTENTS),
        help="What a row of a shard holds: a PNG file (the default), float32 values, or those of latents.",
    ),
    click.option(
        "--shard-size", type=click.IntRange(min=1), help="Samples per shard, a multiple of --batch-size."
    ),
    click.option(
        "--conditions",
        "dataset",
        type=click.Path(path_type=Path),
        help="Parquet, a file or a folder, with a row per sample; its columns are called as the model's "
        "inputs, or prompt.",
    ),
)


def options(command: Any) -> Any:
    """Add the options of sampling into shards."""
    for option in reversed(_OPTIONS):
        command = option(command)
    return command


def given_workers(workers: int) -> int | None:
    """--workers if it was given; on Ray its default is the number of cores, or of GPUs."""
    source = click.get_current_context().get_parameter_source("workers")
    return None if source == ParameterSource.DEFAULT else workers


@contextlib.contextmanager
def on_ray(address: str, workers: int | None, backend: str) -> Iterator[Pool]:
    """A pool of workers on Ray, whose lines do not reach the terminal; see `farm.connect`."""
    from ..farm import connect

    with _alone_on_the_terminal(), connect(address, workers, backend) as pool:
        yield pool


@contextlib.contextmanager
def _alone_on_the_terminal() -> Iterator[None]:
    """Only what this package prints on stderr is seen: Ray's lines are in its own logs.

    Its core prints to the descriptor, its Python side to sys.stdout too.
    """
    kept, shown = os.dup(2), sys.stderr
    ours = shown if shown is not sys.__stderr__ else os.fdopen(os.dup(kept), "w", buffering=1)
    nowhere = os.open(os.devnull, os.O_WRONLY)
    try:
        os.dup2(nowhere, 2)
        sys.stderr = ours
        with contextlib.redirect_stdout(io.StringIO()):
            yield
    finally:
        sys.stderr = shown
        os.dup2(kept, 2)
        for descriptor in (kept, nowhere):
            os.close(descriptor)
        if ours is not shown:
            ours.close()


@dataclass(frozen=True)
class Asked:
    """The options of sampling into shards: `check_format` gives what a sample is written as."""

    ray: str | None
    content: str | None
    shard_size: int | None
    dataset: Path | None

    def check_format(self, file_format: str | None) -> str:
        """What a sample is written as: png, npy or latents.

        Raises:
            RecipeError: the options contradict each other.
        """
        if self.ray is None:
            need(
                file_format not in FORMATS,
                f"--format {file_format} is of shards: give --ray too, or another format",
            )
            given = {"--content": self.content, "--shard-size": self.shard_size, "--conditions": self.dataset}
            for name, value in given.items():
                need(value is None, f"{name} is of shards: give --ray too, or leave it out")
            return file_format or "png"
        need(
            file_format in (None, *FORMATS),
            f"--format {file_format} is not of shards: give --format {' or '.join(FORMATS)}, and --content "
            f"{file_format}",
        )
        return self.content or "png"


def sample_on_ray(
    bundle: Bundle,
    asked: Asked,
    out: Path,
    num_samples: int,
    labels: tuple[int, ...],
    prompted: Prompted | None,
    negative_prompt: str | None,
    plan: Plan,
    file_format: str | None,
    workers: int,
    as_json: bool,
    **more: Any,
) -> None:
    """Sample into shards, and say so; `more` goes to `farm.sample_shards`."""
    from ..farm import sample_shards

    context = click.get_current_context()
    every = context.get_parameter_source("num_samples") == ParameterSource.DEFAULT and asked.dataset
    bars: list[Any] = []
    started = time.monotonic()

    def begun(samples: int, kept: int) -> None:
        bars.append(progress(samples, f"sampling {plan}", "sample"))
        bars[0].__enter__()
        bars[0].update(kept)

    try:
        with _alone_on_the_terminal():
            done = sample_shards(
                bundle,
                out,
                None if every else num_samples,
                address=str(asked.ray),
                workers=given_workers(workers),
                labels=labels,
                prompted=prompted,
                negative_prompt=None if prompted is not None else negative_prompt,
                conditions=asked.dataset,
                plan=plan,
                shard_size=asked.shard_size,
                format="webdataset" if file_format == "webdataset" else "parquet",
                begun=begun,
                advance=lambda samples: bars[0].update(samples),
                **more,
            )
    finally:
        for bar in bars:
            bar.__exit__(None, None, None)
    seconds = time.monotonic() - started
    order = done.order
    result = {
        "out": str(out),
        "num_samples": done.num_samples,
        "shards": done.shards,
        "kept": done.kept,
        "workers": done.workers,
        "shard_size": order.shard_size,
        "batch_size": order.batch_size,
        "format": order.format,
        "content": order.content,
        "plan": order.plan,
        "backend": order.backend,
        "passed_over": dict(done.passed_over),
        "state": BACKENDS[order.backend].state,
        "seed": order.seed,
        "seconds": round(seconds, 3),
    }
    there = f", of which {done.kept} were there" if done.kept else ""
    notes = [] if prompted is None else list(prompted.notes)
    notes += [
        f"not on {name}: {why}" for name, why in done.passed_over.items() if name in bundle.manifest.backends
    ]
    text = (
        f"{done.num_samples} samples in {out}, {done.shards} shards{there}, {seconds:.1f} s, {done.workers} "
        f"workers, on {order.backend}"
    )
    show(result, as_json, text + "".join(f"\nnote: {note}" for note in notes))


def check_device(ray: str | None, device: int) -> None:
    """Refuse a device where Ray deals them out."""
    told = f"--device {device} was given with --ray, which deals out the GPUs: leave it out"
    need(ray is None or device == 0, told)


def check_alone(asked: Asked, rebuild: bool, device: int, conditions: tuple[str, ...], chosen: bool) -> None:
    """Refuse options of `run` that shards have no use for.

    Args:
        chosen: classes or prompts were given.
    Raises:
        RecipeError: one of them was given.
    """
    if asked.ray is None:
        return
    need(not rebuild, "--rebuild was given with --ray: rebuild first, by a run without --ray")
    check_device(asked.ray, device)
    need(not conditions, "--condition was given with --ray: give --conditions, a Parquet file, in its place")
    if asked.dataset is not None and chosen:
        raise RecipeError("--conditions was given beside --class-labels or --prompt: leave one of them out")
