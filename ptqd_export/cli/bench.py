"""The bench command."""

from __future__ import annotations

import tempfile
from pathlib import Path

import click

from ..core.backend import RUNNABLE
from ..core.plan import parse_plan
from ..errors import RecipeError
from ..typed import to_plain
from . import common as options
from .common import common, show


@click.command()
@click.argument("bundle_dir", metavar="BUNDLE", type=click.Path(path_type=Path))
@click.option(
    "--backend",
    "backends",
    multiple=True,
    type=click.Choice(RUNNABLE),
    help="Of the bundle's engines; repeat for several. All that work here if left out.",
)
@click.option(
    "--batch-size", type=click.IntRange(min=1), default=4, show_default=True, help="Rows of a call."
)
@click.option(
    "--threads", type=click.IntRange(min=1), default=1, show_default=True, help="CPU threads of everything."
)
@click.option(
    "--rounds",
    type=click.IntRange(min=5),
    default=20,
    show_default=True,
    help="Calls of each, in turn.",
)
@click.option(
    "--runs",
    type=click.IntRange(min=0),
    default=3,
    show_default=True,
    help="Whole runs of each plan.",
)
@click.option(
    "--plan",
    "plans",
    multiple=True,
    help="What to run and plot, such as 'fp32*3,w8a8*17'; repeat for several. The bundle's if left out.",
)
@click.option(
    "--model",
    type=click.Path(path_type=Path),
    help="What the bundle was built from: then other tools run the same network beside it.",
)
@click.option(
    "--baseline",
    "wanted",
    multiple=True,
    help="Which of them, by a part of their names; repeat for several. All if left out.",
)
@click.option("--plot", type=click.Path(path_type=Path), help="A .png file: time against predicted fidelity.")
@options.device
@common
def bench(
    bundle_dir: Path,
    backends: tuple[str, ...],
    batch_size: int,
    threads: int,
    rounds: int,
    runs: int,
    plans: tuple[str, ...],
    model: Path | None,
    wanted: tuple[str, ...],
    plot: Path | None,
    device: int,
    as_json: bool,
) -> None:
    """Time a bundle's engines, beside what else could run the same network.

    Everything lives in a process of its own and takes turns with the others. A ratio is not printed where the
    rounds spread more than it differs from 1.
    """
    from ..assemble.decide import Known
    from ..bench import BASELINES, Settings, bench_text, make_baselines, plot_bench
    from ..bench import bench as measure
    from ..bundle.bundle import Bundle

    if wanted and model is None:
        raise RecipeError("--baseline was given without --model: give what the bundle was built from")
    names = [name for name in BASELINES if not wanted or any(part.lower() in name.lower() for part in wanted)]
    if not names:
        raise RecipeError(f"--baseline {', '.join(wanted)} is part of none of {', '.join(BASELINES)}")
    if plot is not None and plot.suffix != ".png":
        raise RecipeError(f"--plot {plot}: expected a .png file")
    bundle = Bundle.open(bundle_dir)
    steps = len(bundle.manifest.sampling)
    asked = tuple(parse_plan(text, steps) for text in plans) or (bundle.manifest.plan,)
    for plan in asked:
        bundle.manifest.check_plan(plan)
    settings = Settings(backends, batch_size, threads, rounds, runs, device, asked)

    def say(text: str) -> None:
        click.echo(text, err=True)

    with tempfile.TemporaryDirectory() as folder:
        others = [] if model is None else make_baselines(bundle, model, Path(folder), names, say)
        found = measure(bundle, settings, others, say)
    if plot is not None:
        plot_bench(found, Known.of(bundle.manifest).errors("paired"), asked, plot)
    show(to_plain(found), as_json, bench_text(found))
