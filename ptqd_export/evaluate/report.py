"""What an evaluation found: values, and their text."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from .guidance import Gap
from .resampling import LEVEL, Estimate


@dataclass(frozen=True)
class Paired:
    """Pairs of a candidate's samples and the reference's.

    Attributes:
        psnr, psnr_median, psnr_p5: mean, median and 5th percentile over samples, dB.
        ssim: mean over samples; None for pictures smaller than its window.
    """

    psnr: Estimate
    psnr_median: float
    psnr_p5: float
    ssim: Estimate | None


@dataclass(frozen=True)
class Distances:
    """Distances of a set of samples in the classifier's features."""

    frechet: Estimate
    kernel: Estimate | None


@dataclass(frozen=True)
class Row:
    """A candidate.

    Attributes:
        name: plan and correction.
        plan: its text.
        paired: None where the samples equal the reference's: for the reference itself.
        to_reference, to_data: distances of the set; None without a classifier, or without data.
        same_class: share of samples of the class that the reference's has.
        right_class: share of samples of the class that was asked for.
        runaway: share of samples that left the data range; largest: the largest absolute value of any.
        gap: of guidance; None for models without.
        bops: bit operations, as a share of full precision's.
        milliseconds: of all evaluations of one sampling run, by the times in the manifest.
    """

    name: str
    plan: str
    paired: Paired | None
    to_reference: Distances | None
    to_data: Distances | None
    same_class: Estimate | None
    right_class: Estimate | None
    runaway: Estimate
    largest: float
    gap: Gap | None
    bops: float
    milliseconds: float | None


@dataclass(frozen=True)
class Difference:
    """The paired difference of a metric: `name` less `to`."""

    name: str
    to: str
    metric: str
    difference: Estimate


@dataclass(frozen=True)
class Report:
    """An evaluation.

    Attributes:
        reference: name of what samples are compared with, the first row.
        classifier, data: SHA-256 of the files that judged, or None.
        rows: the reference, then the candidates.
        differences: to the first candidate, and of distances to data to the reference.
        notes: what a user should know.
    """

    model: str
    bundle: str
    backend: str
    batch_size: int
    steps: int
    eta: float
    guidance_scale: float
    samples: int
    seed: int
    resamples: int
    reference: str
    classifier: str | None
    data: str | None
    rows: tuple[Row, ...]
    differences: tuple[Difference, ...]
    notes: tuple[str, ...]


def show(estimate: Estimate | None, form: str = ".2f", scale: float = 1.0) -> str:
    """An estimate with its interval in brackets, "-" for none; `form` is of each number."""
    if estimate is None:
        return "-"
    value = f"{scale * estimate.value:{form}}"
    if estimate.low is None or estimate.high is None:
        return value
    return f"{value} [{scale * estimate.low:{form}}, {scale * estimate.high:{form}}]"


def table(headings: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A Markdown table."""
    lines = [headings, ["---"] * len(headings), *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


COLUMNS = ("plan", "PSNR, dB: mean", "median", "5th percentile", "SSIM", "runaway samples, %")
FEATURE_COLUMNS = ("Frechet", "kernel x 1000", "Frechet to data", "kernel to data x 1000")
CLASS_COLUMNS = ("same class, %", "class asked for, %")
GAP_COLUMNS = ("guidance gap, of full precision's", "the part along it")
COST_COLUMNS = ("bit operations", "ms of evaluations")


def markdown(report: Report) -> str:
    """The report as text: a table of the plans, their differences, and the notes."""
    judged, classes = report.classifier is not None, any(row.same_class for row in report.rows)
    timed = any(row.milliseconds is not None for row in report.rows)
    guided = any(row.gap is not None for row in report.rows)
    headings = [*COLUMNS, *(FEATURE_COLUMNS if judged else ()), *(CLASS_COLUMNS if classes else ())]
    headings += [*(GAP_COLUMNS if guided else ()), *COST_COLUMNS[: 2 if timed else 1]]
    rows = []
    for row in report.rows:
        paired = row.paired
        cells = [row.name, "-", "-", "-", "-"]
        if paired is not None:
            cells = [row.name, show(paired.psnr), f"{paired.psnr_median:.2f}", f"{paired.psnr_p5:.2f}"]
            cells.append(show(paired.ssim, ".4f"))
        cells.append(f"{show(row.runaway, '.2f', 100)} (largest {row.largest:.2f})")
        if judged:
            for distances in (row.to_reference, row.to_data):
                cells.append("-" if distances is None else show(distances.frechet, ".3f"))
                cells.append("-" if distances is None else show(distances.kernel, ".2f", 1000))
        if classes:
            cells += [show(row.same_class, ".1f", 100), show(row.right_class, ".1f", 100)]
        if guided:
            for values in ((), ()) if row.gap is None else (row.gap.ratio, row.gap.along):
                cells.append(f"{min(values):.3f} to {max(values):.3f}" if values else "-")
        cells.append(f"{row.bops:.1%}")
        if timed:
            cells.append("-" if row.milliseconds is None else f"{row.milliseconds:.0f}")
        rows.append(cells)
    guidance = f", guidance {report.guidance_scale:g}" if guided else ""
    head = (
        f"{report.model}: {report.samples} samples of seed {report.seed}, {report.steps} steps, eta "
        f"{report.eta:g}{guidance}, on {report.backend} in batches of {report.batch_size}. Compared with "
        f"{report.reference}, pair by pair."
    )
    parts = [head, table(headings, rows)]
    if report.differences:
        lines = [[d.name, d.to, d.metric, show(d.difference, ".3g")] for d in report.differences]
        parts.append(table(["plan", "less", "metric", "difference"], lines))
    if report.resamples:
        parts.append(
            f"In brackets: {LEVEL:.0%} intervals, of shares by Wilson, of the others by a bootstrap of "
            f"{report.resamples} resamples of the pairs."
        )
    parts += [f"note: {note}" for note in report.notes]
    return "\n\n".join(parts)
