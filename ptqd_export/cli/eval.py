"""The eval command."""

from __future__ import annotations

import functools
import json
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from ..core.backend import BACKENDS, TORCH
from ..core.plan import Plan, parse_plan
from ..typed import brief, to_plain
from . import common as options
from .common import common, show
from .farm import check_device, given_workers, on_ray, ray_option
from .run import AUTO, read_tensors

if TYPE_CHECKING:
    from ..core.schedule import F64

REPORT, TABLE, PLOT = "report.json", "report.md", "report.png"


@click.command("eval")
@click.argument("bundle_dir", metavar="BUNDLE", type=click.Path(path_type=Path))
@click.option(
    "--out",
    type=click.Path(path_type=Path),
    required=True,
    help="Folder of the report; the samples are kept in OUT.work and taken up from there.",
)
@click.option(
    "--plan",
    "plans",
    multiple=True,
    help="A plan over the bundle's precisions, such as w8a8 or fp32*3,w8a8*17; repeat for several. The "
    "bundle's own if left out.",
)
@click.option(
    "--against", help="The plan that all are compared with, pair by pair; full precision if left out."
)
@click.option("--num-samples", type=click.IntRange(min=2), default=2048, show_default=True)
@click.option(
    "--seed",
    type=click.IntRange(0, 2**64 - 1),
    help="Of the noise; if left out, one that nothing else uses.",
)
@options.condition
@options.prompts
@click.option(
    "--classifier",
    type=click.Path(path_type=Path),
    help="An ONNX file with the output features, and logits for classes: for distances of sets and classes.",
)
@click.option(
    "--data-stats",
    type=click.Path(path_type=Path),
    help="A safetensors file with features of data, or their mean and covariance: for distances to data.",
)
@click.option(
    "--resamples",
    type=click.IntRange(min=0),
    default=1000,
    show_default=True,
    help="Of the bootstrap behind the intervals.",
)
@options.batch_size
@options.workers
@ray_option("Sample")
@click.option("--threads", type=click.IntRange(min=1), help="CPU threads without --workers; all if left out.")
@click.option(
    "--backend",
    type=click.Choice([AUTO, *(name for name in BACKENDS if name != TORCH)]),
    default=AUTO,
    show_default=True,
    help="auto: the best that works here.",
)
@options.device
@common
def evaluate(
    bundle_dir: Path,
    out: Path,
    plans: tuple[str, ...],
    against: str | None,
    num_samples: int,
    seed: int | None,
    conditions: tuple[str, ...],
    prompts: tuple[str, ...],
    prompts_file: Path | None,
    negative_prompt: str | None,
    classifier: Path | None,
    data_stats: Path | None,
    resamples: int,
    batch_size: int | None,
    workers: int,
    ray: str | None,
    threads: int | None,
    backend: str,
    device: int,
    as_json: bool,
) -> None:
    """Compare plans of BUNDLE with full precision, on many samples from the same noise."""
    from .. import backends
    from ..bundle import Bundle
    from ..evaluate import SEED, Candidate, markdown
    from ..evaluate import evaluate as evaluate_bundle
    from ..files import check_target, work_folder
    from ..runtime import encode_prompts

    bundle = Bundle.open(bundle_dir)
    steps = len(bundle.manifest.sampling)
    asked: list[Plan] = [parse_plan(text, steps) for text in plans] or [bundle.manifest.plan]
    reference = None if against is None else Candidate(parse_plan(against, steps))
    tensors = read_tensors(conditions)
    texts = options.read_texts(prompts, prompts_file, negative_prompt)
    target = check_target(out, "a report", _in_the_way)
    if threads is not None:
        backends.set_threads(threads)
    prompted = encode_prompts(bundle, texts, negative_prompt) if texts else None
    check_device(ray, device)
    connect = None if ray is None else functools.partial(on_ray, ray, given_workers(workers))
    psnr: dict[str, F64] = {}
    with work_folder(target) as work:
        report = evaluate_bundle(
            bundle,
            [Candidate(plan) for plan in asked],
            work=work,
            against=reference,
            num_samples=num_samples,
            seed=SEED if seed is None else seed,
            backend=None if backend == AUTO else backend,
            batch_size=batch_size,
            workers=workers,
            device=device,
            tensors=tensors,
            prompted=prompted,
            classifier=classifier,
            data=data_stats,
            resamples=resamples,
            connect=connect,
            drawn=psnr.update,
        )
    text, plain = markdown(report), to_plain(report)
    gaps = {row.name: row.gap.ratio for row in report.rows[1:] if row.gap is not None}
    _write(target, text, plain, psnr, gaps, f"{report.model}, {report.samples} samples")
    show({"out": str(out), **plain}, as_json, f"{text}\n\n{out / TABLE}, {out / REPORT}, {out / PLOT}")


def _write(
    out: Path, text: str, plain: Any, psnr: Mapping[str, F64], gaps: Mapping[str, Any], title: str
) -> None:
    """Write the report, in place of an earlier one and in one step."""
    from ..evaluate.plots import plot_evaluation
    from ..files import replacing

    with replacing(out, _in_the_way) as part:
        (part / TABLE).write_text(text + "\n", "utf-8")
        (part / REPORT).write_text(json.dumps(plain, indent=1, allow_nan=False) + "\n", "utf-8")
        plot_evaluation(part / PLOT, psnr, gaps, title=title)


def _in_the_way(inside: list[Path]) -> str | None:
    other = next((file for file in inside if file.name not in (REPORT, TABLE, PLOT) or file.is_dir()), None)
    return None if other is None else f"{brief(other.name)} is not of a report: give another --out"
