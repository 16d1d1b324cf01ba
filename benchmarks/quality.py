"""Quality of quantized sampling: how close to full precision, and how close to data.

    python benchmarks/quality.py [--samples 2048] [--only headline ablation paper paper-250] [--write]

Each table compares bundles that differ in a few recipe keys (CONFIGURATIONS); they are built into
benchmarks/out/. All rows of a table share noise and classes with full precision, on a seed that nothing else
uses. Distances are those of `ptqd-export eval`, in the features of the reference classifier; for distances to
data give the features of the Fashion-MNIST test images, which `--data` makes from Debian's package
dataset-fashion-mnist. Bundles and samples are kept, and a rerun takes them up.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import onnx
from architectures import kept_bundle
from report import OUT, REFERENCE_MODEL, machine, read_section, table, write_section
from safetensors.numpy import save_file

from ptqd_export.bundle.bundle import Bundle
from ptqd_export.core.backend import OPENVINO_FP32, ORT_CPU
from ptqd_export.core.plan import parse_plan
from ptqd_export.core.precision import FP32, Precision
from ptqd_export.core.timing import feeds_to_time, time_calls
from ptqd_export.errors import RecipeError
from ptqd_export.evaluate import Candidate, evaluate
from ptqd_export.evaluate.report import Report, Row, show
from ptqd_export.recipe import Recipe
from ptqd_export.runtime.open import open_artifact

FIRST: Mapping[str, object] = {"input_grids": "symmetric", "conv_outputs": "tensor", "smoothing": 0.0}
"""Quantization as this package first did it."""
PAPER: Mapping[str, object] = {
    **FIRST,
    "weight_scales": "tensor",
    "clamp_k": True,
    "gate": False,
}
"""The paper's recipe: one scale per tensor, k >= 0, nothing gated."""
CONFIGURATIONS: Mapping[str, Mapping[str, object]] = {
    "ours": {},
    "first": FIRST,
    "asymmetric inputs alone": {**FIRST, "input_grids": "asymmetric"},
    "outputs per channel alone": {**FIRST, "conv_outputs": "channel"},
    "smoothing alone": {**FIRST, "smoothing": 0.5},
    "tails alone": FIRST,
    "nearest": {**FIRST, "rounding": "nearest", "correction": "none"},
    "paper": PAPER,
}
TAILS = ("ours", "tails alone")
"""Configurations with the default ranges of inputs; those of the others have least squared error."""

PLANS = ("w8a8", "w4a8", "w4a4+", "w4a4")


@dataclass(frozen=True)
class Line:
    """A row: a bundle of CONFIGURATIONS, a plan, a correction, and what the row is called."""

    configuration: str
    plan: str
    correction: Any = "folded"
    label: str = ""

    @property
    def name(self) -> str:
        return self.label or self.configuration


@dataclass(frozen=True)
class Table:
    """Rows that stand together, all at one eta and number of steps and on one backend.

    `timed` adds sizes and measured times.
    """

    title: str
    lines: Sequence[Line]
    precisions: tuple[str, ...]
    eta: float = 0.0
    n_steps: int = 20
    timed: bool = False
    backend: str = ORT_CPU


def paper_plan(n: int) -> str:
    """The paper's: the noisiest 19.2 % of the steps at w4a4, the rest at w4a8."""
    early = round(0.192 * n)
    return f"w4a4*{early},w4a8*{n - early}"


def tables() -> dict[str, list[Table]]:
    headline = [Line("ours", p) for p in ("w8a8", "w4a8", "w4a4+", paper_plan(20))]
    headline.append(Line("ours", "w8a8", "none"))
    cures = [name for name in CONFIGURATIONS if name not in ("nearest", "paper")]
    ablation = [Line(name, p) for p in ("w8a8", "w4a8", "w4a4") for name in ("first", *cures[2:], "ours")]
    portable = [Line("ours", p) for p in PLANS[:2]]
    return {
        "headline": [
            Table("eta 0, 20 steps", headline, ("fp32", *PLANS)),
            Table("The portable graphs", portable, ("fp32", *PLANS), backend=OPENVINO_FP32),
        ],
        "ablation": [Table("eta 0, 20 steps", ablation, ("fp32", "w8a8", "w4a8", "w4a4"))],
        "paper": [paper_table(eta, 20) for eta in (0.0, 1.0)],
        "paper-250": [paper_table(eta, 250) for eta in (0.0, 1.0)],
    }


def paper_table(eta: float, n: int) -> Table:
    lines = [
        Line("nearest", paper_plan(n), label="nearest rounding, no correction"),
        Line("paper", paper_plan(n), label="the paper's recipe"),
        Line("ours", paper_plan(n), label="ours, the paper's plan"),
        Line("ours", "w4a8", label="ours, w4a8"),
    ]
    return Table(f"eta {eta:g}, {n} steps", lines, ("fp32", "w4a8", "w4a4"), eta, n, timed=n == 20)


def bundle_of(line: Line, of: Table, args: argparse.Namespace) -> Bundle:
    """The bundle of a row, built unless it is there."""
    # One bundle of ours serves all tables of 20 steps.
    every = line.configuration == "ours" and of.n_steps == 20
    precisions = ("fp32", *PLANS) if every else of.precisions
    name = f"{line.configuration.replace(' ', '_')}-eta{of.eta:g}-{of.n_steps}-{len(precisions)}"
    recipe = Recipe.load(args.model).override(
        sampler={"eta": of.eta, "n_steps": of.n_steps},
        calibration={
            "size": args.calib_size,
            "held_out": max(2, args.calib_size // 2),
            "activation_range": "tails" if line.configuration in TAILS else "mse",
        },
        quantization={"precisions": precisions, **CONFIGURATIONS[line.configuration]},
        plan={
            "rule": "fixed",
            "steps": (precisions[1],),
            "sensitivity": "measured" if every else "uniform",
        },
    )
    return kept_bundle(recipe, OUT / name)


def features_of_data(model: Path) -> Path:
    """Features of the 10,000 test images, made once."""
    file = OUT / "data_features.safetensors"
    if not file.exists():
        sys.path.insert(0, str(model))
        from classifier import load_features
        from data import load

        images = (load(split="t10k")[0].astype(np.float32) / 127.5 - 1)[:, None]
        file.parent.mkdir(parents=True, exist_ok=True)
        save_file({"features": np.asarray(load_features(model)(images), np.float32)}, file)
    return file


def measured(of: Table, args: argparse.Namespace) -> list[tuple[Line, Row, Report, Bundle]]:
    """The rows of a table; one evaluation per bundle."""
    found = []
    for name in dict.fromkeys(line.configuration for line in of.lines):
        lines = [line for line in of.lines if line.configuration == name]
        bundle = bundle_of(lines[0], of, args)
        candidates = [Candidate(parse_plan(line.plan, of.n_steps), line.correction) for line in lines]
        data = None if args.no_data else features_of_data(args.model)
        report = evaluate(
            bundle,
            candidates,
            work=OUT / "samples",
            backend=of.backend,
            num_samples=args.samples,
            workers=args.workers,
            gaps=False,
            classifier=args.model / "classifier.onnx",
            data=data,
        )
        rows = {row.name: row for row in report.rows}
        found += [
            (line, rows[candidate.name], report, bundle)
            for line, candidate in zip(lines, candidates, strict=True)
        ]
    return found


def weight_bytes(files: Sequence[Path]) -> int:
    """Bytes of the weights that some graphs of a bundle refer to."""
    places = set()
    for file in files:
        for tensor in onnx.load(file, load_external_data=False).graph.initializer:
            entries = {entry.key: entry.value for entry in tensor.external_data}
            places |= {(entries["offset"], int(entries["length"]))} if entries else set()
    return sum(length for _, length in places)


def costs(plans: Mapping[tuple[Path, str], Bundle], n_steps: int) -> dict[tuple[Path, str], tuple[str, str]]:
    """(MB of the weights of a plan's engines, ms of a step for one sample with both branches of guidance).

    Engines of all bundles take turns.
    """
    calls: dict[tuple[Path, Precision], Callable[[], object]] = {}
    sizes = {}
    for (path, text), bundle in plans.items():
        feeds = feeds_to_time(bundle.manifest.sampling, 1)
        used = sorted(set(parse_plan(text, n_steps).steps), key=str)
        names = {bundle.manifest.artifact(p, ORT_CPU).file for p in used}
        sizes[path, text] = weight_bytes([bundle.file(name) for name in names]) / 1e6
        for p in used:
            artifact = bundle.manifest.artifact(p, ORT_CPU)
            calls.setdefault((path, p), partial(open_artifact(bundle, artifact, None), feeds))
    seconds = time_calls(calls, repeats=200)
    found = {}
    for (path, text), size in sizes.items():
        steps = parse_plan(text, n_steps).steps
        found[path, text] = f"{size:.1f}", f"{1e3 * np.mean([seconds[path, p] for p in steps]):.2f}"
    return found


def text_of(of: Table, args: argparse.Namespace) -> str:
    found = measured(of, args)
    order = {line: i for i, line in enumerate(of.lines)}
    found.sort(key=lambda one: order[one[0]])
    _, _, report, bundle = found[0]
    head = [
        "row",
        "plan",
        "correction",
        "PSNR to fp32, dB",
        "median, 5th percentile",
        "Frechet to fp32",
        "Frechet to data",
        "kernel to data, 10^-3",
        "class of fp32",
        "run away",
        "BOPs, fp32 / this (floats at 32, 16 bits)",
    ]

    def bops(line: Line, bundle: Bundle) -> str:
        m = bundle.manifest
        steps = parse_plan(line.plan, of.n_steps).steps
        shares = []
        for counts in (m.bops, m.half_bops):
            shares.append(len(steps) * m.bops[FP32] / sum(counts[p] for p in steps))
        return " / ".join(f"{share:.1f}" for share in shares)

    def cells(line: Line | None, row: Row, bundle: Bundle) -> list[str]:
        paired = row.paired
        to, data = row.to_reference, row.to_data
        return [
            "full precision" if line is None else line.name,
            row.plan,
            "-" if line is None else line.correction,
            show(paired.psnr if paired else None, ".1f"),
            f"{paired.psnr_median:.1f}, {paired.psnr_p5:.1f}" if paired else "-",
            show(to.frechet if to else None, ".3f"),
            show(data.frechet if data else None, ".2f"),
            show(data.kernel if data else None, ".1f", 1e3),
            show(row.same_class, ".1f", 100),
            show(row.runaway, ".1f", 100),
            "1" if line is None else bops(line, bundle),
        ]

    rows = [cells(None, report.rows[0], bundle), *(cells(line, row, b) for line, row, _, b in found)]
    if of.timed:
        first = (bundle.path, report.rows[0].plan)
        keys = [first, *((b.path, line.plan) for line, _, _, b in found)]
        taken = costs(dict(zip(keys, [bundle, *(b for *_, b in found)], strict=True)), of.n_steps)
        head += ["weights, MB", "ms per step"]
        rows = [[*row, *taken[key]] for row, key in zip(rows, keys, strict=True)]
    note = (
        f"{report.model}, {report.steps} steps, guidance {report.guidance_scale:g}, {report.backend}; "
        f"{report.samples} samples of seed {report.seed}, 95 % intervals. {machine()}."
    )
    return f"**{of.title}**\n\n{table(head, rows)}\n\n{note}"


SECTIONS = {
    "headline": "quality-headline",
    "ablation": "quality-ablation",
    "paper": "quality-paper",
    "paper-250": "quality-paper-long",
}
"""Where tables stand."""


def chosen(of: Table, args: argparse.Namespace) -> Table:
    """A table with the rows that are asked for; with none if it is not.

    Raises:
        SystemExit: a plan is none.
    """
    if (args.eta and of.eta not in args.eta) or (args.backend and of.backend not in args.backend):
        return replace(of, lines=())
    try:
        plans = [parse_plan(text.replace(" ", ","), of.n_steps) for text in args.plan or ()]
    except RecipeError as error:
        sys.exit(f"--plan: {error}")
    lines = [
        line
        for line in of.lines
        if (not plans or parse_plan(line.plan, of.n_steps) in plans)
        and (not args.row or line.name in args.row)
        and (not args.correction or line.correction in args.correction)
    ]
    return replace(of, lines=lines)


def merged(section: str, of: Table, text: str, rows: str) -> str:
    """A section with one of its tables measured anew: the whole of it, or rows, and how those were measured.

    A whole table that it does not have is put at its end, a row at its place. A row that the script does not
    have any more goes.

    Args:
        of: the whole table.
        rows: what its rows have in common, if not all were measured.

    Raises:
        SystemExit: the section does not have the table of some rows.
    """
    before, heading, rest = section.partition(f"**{of.title}**\n\n")
    own, following, after = rest.partition("\n\n**")
    if not heading:
        if rows:
            sys.exit(f"{of.title}: no such table is there; write all of it first")
        return f"{section}\n\n{text}"
    if not rows:
        return f"{before}{text}{following}{after}"
    _, new, note = text.split("\n\n")
    old, *notes = own.split("\n\n")
    head, known = old.splitlines()[:3], {}  # the head has full precision's row
    for line in [*old.splitlines()[3:], *new.splitlines()[3:]]:
        known[tuple(line.strip("| ").split(" | ")[:3])] = line
    names = [(line.name, str(parse_plan(line.plan, of.n_steps)), line.correction) for line in of.lines]
    lines = [*head, *(known[name] for name in names if name in known)]
    about = f"{rows}, measured later: "
    notes = [one for one in notes if not one.startswith(about)]
    notes.append(about + note)
    return "\n\n".join([f"{before}{heading}" + "\n".join(lines), *notes]) + following + after


def main() -> None:
    every = tables()
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", type=Path, default=REFERENCE_MODEL)
    parser.add_argument("--samples", type=int, default=2048)
    parser.add_argument("--calib-size", type=int, default=32)
    parser.add_argument("--workers", type=int, default=2, help="processes of one thread each")
    usual = [name for name in every if name != "paper-250"]  # which takes hours
    parser.add_argument("--only", nargs="+", default=usual, choices=list(every))
    parser.add_argument("--eta", type=float, nargs="+", help="only tables of these; the others are kept")
    known = (ORT_CPU, OPENVINO_FP32)
    parser.add_argument("--backend", nargs="+", choices=known, help="as --eta")
    parser.add_argument("--plan", nargs="+", help="only rows of these; what is written keeps the others")
    parser.add_argument("--row", nargs="+", help="as --plan, by what stands in the first column")
    parser.add_argument("--correction", nargs="+", help="as --plan")
    parser.add_argument("--no-data", action="store_true", help="leave distances to data out")
    parser.add_argument("--write", action="store_true", help="put tables into docs/benchmarks.md")
    args = parser.parse_args()
    OUT.mkdir(parents=True, exist_ok=True)
    rows = ", ".join([*(args.row or ()), *(args.plan or ()), *(args.correction or ())])
    wanted = {
        name: [(of, one) for of in every[name] if (one := chosen(of, args)).lines] for name in args.only
    }
    if not any(wanted.values()):
        sys.exit(f"{', '.join(args.only)}: no table has rows that are all of these; see --help")
    for name, of_section in wanted.items():
        texts = [text_of(some, args) for _, some in of_section]
        text = "\n\n".join(texts)
        if args.eta or args.backend or rows:
            text = read_section(SECTIONS[name])
            for (of, _), own in zip(of_section, texts, strict=True):
                text = merged(text, of, own, rows)
        print(text)
        if args.write and texts:
            write_section(SECTIONS[name], text)


if __name__ == "__main__":
    main()
