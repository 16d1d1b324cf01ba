"""What a bench found: as values, as text, and as a picture."""

from __future__ import annotations

import io
import os
import platform
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import Self

import numpy as np
import numpy.typing as npt

from ..core.backend import install_hint
from ..core.plan import Plan
from ..core.precision import Precision
from ..errors import PTQDError
from ..files import write_file
from .subject import Subject

F64 = npt.NDArray[np.float64]
RESAMPLES = 2000
LIBRARIES = ("onnxruntime", "torch", "openvino", "nncf", "tensorrt", "tensorrt_rtx", "numpy")
MOST_OPERATORS = 6
"""Kinds of operators that a table names."""


@dataclass(frozen=True)
class Ratio:
    """How many times faster one thing is than another.

    Attributes:
        value: ratio of the medians of rounds that both were in.
        low, high: its 95 % interval, by the bootstrap over rounds.
    """

    value: float
    low: float
    high: float

    def __str__(self) -> str:
        """The ratio; "-" where its spread is larger than its distance from 1."""
        told = (self.high - self.low) / 2 < abs(self.value - 1)
        return f"{self.value:.2f}x" if told else "-"


@dataclass(frozen=True)
class Row:
    """One thing that was timed.

    Attributes:
        name, kind, detail, backend: see `Subject`.
        milliseconds: of each round, (rounds,), of one call.
        seconds_to_open: to load it and call it once.
        peak_bytes: the most memory that its process took; None where no one counts it.
    """

    name: str
    kind: str
    detail: str
    backend: str
    milliseconds: tuple[float, ...]
    seconds_to_open: float
    peak_bytes: int | None

    @property
    def median(self) -> float:
        return float(np.median(self.milliseconds))

    @property
    def spread(self) -> float:
        """Half the range of the middle half of the rounds, as a share of the median."""
        low, high = np.percentile(self.milliseconds, (25, 75))
        return float((high - low) / 2 / self.median)


@dataclass(frozen=True)
class RunRow:
    """Whole runs of a plan on a backend.

    Attributes:
        milliseconds: of each run, in the rounds that all had in turn.
        calls: of each, milliseconds of the same engine calls alone, right after it.
        switch: milliseconds that a call takes longer right after another engine's.
    """

    plan: str
    backend: str
    milliseconds: tuple[float, ...]
    calls: tuple[float, ...]
    switch: float

    @property
    def median(self) -> float:
        return float(np.median(self.milliseconds))

    @property
    def more(self) -> float:
        """What a run takes over its engines' calls, as a share of them."""
        return float(np.median(np.divide(self.milliseconds, self.calls)) - 1)

    @classmethod
    def of(cls, plan: str, backend: str, taken: Sequence[tuple[float, float]], switch: float) -> Self:
        """Of times in seconds: (of a run, of its calls) per round."""
        whole, calls = (tuple(round(1e3 * value, 4) for value in row) for row in zip(*taken, strict=True))
        return cls(plan, backend, whole, calls, 1e3 * switch)


@dataclass(frozen=True)
class Bench:
    """A bench of a bundle.

    Attributes:
        bundle: its seal.
        batch: rows of a call, samples of a run.
        threads, rounds: see `Settings`.
        rows: what was timed; baselines first.
        operators: seconds per kind of operator in a call, by row's name.
        runs: of plans; the first is what others are compared with.
        versions: of the machine and the libraries.
    """

    model: str
    bundle: str
    batch: int
    threads: int
    rounds: int
    rows: tuple[Row, ...]
    operators: Mapping[str, Mapping[str, float]]
    runs: tuple[RunRow, ...]
    versions: Mapping[str, str]

    def ratio(self, row: Row) -> Ratio:
        """How many times faster a row is than the first."""
        return ratio(self.rows[0].milliseconds, row.milliseconds)


def ratio(slow: Sequence[float], fast: Sequence[float]) -> Ratio:
    """Ratio of medians of two rows of the same rounds; drawn in pairs, as a load on the machine hits both."""
    pairs = np.array([slow, fast], np.float64)
    rng = np.random.default_rng(0)
    drawn = pairs[:, rng.integers(0, pairs.shape[1], (RESAMPLES, pairs.shape[1]))]
    a, b = np.median(drawn, axis=2)
    low, high = np.percentile(a / b, (2.5, 97.5))
    return Ratio(float(np.median(pairs[0]) / np.median(pairs[1])), float(low), float(high))


def row_of(subject: Subject, seconds: Sequence[float], to_open: float, peak: int | None) -> Row:
    """A row of times in seconds."""
    ms = tuple(round(1e3 * value, 4) for value in seconds)
    return Row(subject.name, subject.kind, subject.detail, subject.backend, ms, round(to_open, 3), peak)


def versions() -> dict[str, str]:
    """The machine, and the libraries that are installed."""
    found = {"machine": platform.machine(), "processor": _processor(), "cpus": str(os.cpu_count())}
    for name in LIBRARIES:
        try:
            found[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            continue
    return found


def _processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text("utf-8").splitlines()
    except OSError:
        return platform.processor()
    named = (line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    return next(named, platform.processor())


def bench_text(found: Bench) -> str:
    """A bench for people."""
    first = found.rows[0].name
    rows = [("", "ms per call", "spread", f"to {first}", "peak MB", "s to open")]
    for row in found.rows:
        peak = "-" if row.peak_bytes is None else f"{row.peak_bytes / 1e6:.0f}"
        faster = "" if row is found.rows[0] else str(found.ratio(row))
        rows.append(
            (row.name, f"{row.median:.2f}", f"{row.spread:.1%}", faster, peak, f"{row.seconds_to_open:.1f}")
        )
    lines = [
        f"{found.model}: batch {found.batch}, {found.threads} thread{'s' * (found.threads > 1)}, medians of "
        f"{found.rounds} rounds in turn",
        *_aligned(rows),
    ]
    if any(str(found.ratio(row)) == "-" for row in found.rows[1:]):
        lines.append("-: no nearer or farther from 1 than the spread of the rounds")
    if found.operators:
        lines += ["", "share of a call by kind of operator (the profiler adds to every node):"]
        lines += [f"  {name}: {_shares(seconds)}" for name, seconds in found.operators.items()]
    if found.runs:
        first_run = found.runs[0]
        rows = [("whole run of", "on", "ms", "to the first", "over its calls", "ms more after a switch")]
        for run in found.runs:
            faster = "" if run is first_run else str(ratio(first_run.milliseconds, run.milliseconds))
            about = (f"{run.median:.0f}", faster, f"{run.more:+.1%}", f"{run.switch:+.2f}")
            rows.append((run.plan, run.backend, *about))
        lines += ["", *_aligned(rows)]
    return "\n".join([*lines, "", ", ".join(f"{name} {what}" for name, what in found.versions.items())])


def _aligned(rows: Sequence[Sequence[str]]) -> list[str]:
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    return [
        "  ".join(
            [row[0].ljust(widths[0]), *(cell.rjust(w) for cell, w in zip(row[1:], widths[1:], strict=True))]
        )
        for row in rows
    ]


def _shares(seconds: Mapping[str, float]) -> str:
    whole = sum(seconds.values())
    parts = list(seconds.items())
    named = [f"{name} {value / whole:.0%}" for name, value in parts[:MOST_OPERATORS]]
    rest = sum(value for _, value in parts[MOST_OPERATORS:])
    return ", ".join([*named, *([f"others {rest / whole:.0%}"] if rest else [])])


def plot_bench(found: Bench, error: Mapping[Precision, F64], plans: Sequence[Plan], path: Path) -> None:
    """Draw time against fidelity, a point per engine and per plan that mixes engines.

    A plan's time per call is the mean of its steps' engines.

    Args:
        error: predicted squared error at the end of sampling that each step at a precision adds, (T,); data
            reaches from -1 to 1.
        path: a .png file.
    Raises:
        PTQDError: matplotlib is not installed, or the file cannot be written.
    """
    try:
        from matplotlib.figure import Figure
    except ImportError as missing:
        raise PTQDError(f"a plot needs matplotlib ({missing}): {install_hint('eval')}") from missing
    figure = Figure(figsize=(7, 4.5), layout="constrained")
    axes = figure.subplots()
    engines: dict[str, dict[Precision, float]] = {}
    for row in found.rows:
        precision = Precision.parse(row.detail) if row.kind == "engine" else None
        if precision is not None:
            engines.setdefault(row.backend, {})[precision] = row.median
        if precision is None or not np.any(error[precision]):
            axes.axvline(row.median, color="0.8", linewidth=0.8)
            axes.annotate(
                row.name, (row.median, 0.02), xycoords=("data", "axes fraction"), rotation=90, fontsize=7,
                color="0.4",
            )  # fmt: skip
    mixed = [plan for plan in plans if len(plan.precisions) > 1]
    for backend, ms in engines.items():
        alone = {str(p): Plan((p,) * len(error[p])) for p in ms}
        every = alone | {str(plan): plan for plan in mixed if {*plan.precisions} <= ms.keys()}
        points = {
            name: (plan.total(ms) / len(plan), -10 * np.log10(noise / 4))
            for name, plan in every.items()
            if (noise := plan.error(error)) > 0
        }
        axes.plot([x for x, _ in points.values()], [y for _, y in points.values()], "o", label=backend)
        for name, point in points.items():
            axes.annotate(name, point, textcoords="offset points", xytext=(6, 4), fontsize=8)
    axes.set(
        xlabel=f"ms per call, batch {found.batch}",
        ylabel="predicted PSNR to full precision, dB",
        title=found.model,
    )
    axes.set_xlim(left=0)
    axes.legend(fontsize=8)
    data = io.BytesIO()
    figure.savefig(data, format="png", metadata={"Software": None})
    write_file(path, data.getvalue())
