"""The first table of the README: what each precision buys. Its figures are those of docs/benchmarks.md.

    python benchmarks/summary.py [BUNDLE] [--write]

Measures sizes alone: the section "weights" of docs/benchmarks.md, from a bundle. Times and quality are
those that step_time.py and quality.py wrote there.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path

from report import REFERENCE_BUNDLE, read_section, read_tables, table, write_section

SHOWN = ("fp32", "w8a8", "w4a8", "w4a4+")
ENGINE = "{} on ort-cpu"
"""What step_time.py calls a precision's engine."""
CALL = "batch 4, 1 thread"
FOLDED = "folded"


def weights(path: Path) -> str:
    """The section "weights" of a bundle: bytes that the ort-cpu graphs refer to, and bit operations."""
    from ptqd_export.bundle.bundle import Bundle
    from ptqd_export.core.backend import Emission
    from ptqd_export.export.graph import load

    bundle = Bundle.open(path)
    m = bundle.manifest
    rows = []
    for precision, bops in m.bops.items():
        graph = load(bundle.file(m.graph(precision, Emission.ORT_CPU).file)).graph
        values = [value.const_value for value in graph.initializers.values()]
        size = sum(value.nbytes for value in values if value is not None)
        of_fp32 = bops * len(m.plan) / m.choice.bops_fp32
        rows.append([str(precision), f"{size / 1e6:.2f}", f"{bops / 1e9:.1f}", f"{of_fp32:.4f}"])
    header = ["precision", "weights, MB", "bit operations per evaluation, 10^9", "of fp32's"]
    return f"{table(header, rows)}\n\n{m.sampling.model.name}."


def _widths(name: str) -> list[tuple[int, int]]:
    """Bits of weights and of inputs of what layers may get."""
    from ptqd_export.core.precision import Precision

    return [(p.weight_bits, p.activation_bits) for p in Precision.parse(name).levels]


def _span(widths: Sequence[int]) -> str:
    low, high = min(widths), max(widths)
    return str(low) if low == high else f"{low} to {high}"


def summary(weights: str, step_time: str, quality: str) -> str:
    """The table of six rows, from the sections of these names."""
    times = {next(iter(row.values())): row[CALL] for row in read_tables(step_time)[0]}
    judged = {
        row["plan"].partition("*")[0]: row
        for row in read_tables(quality)[0]
        if " " not in row["plan"] and row["correction"] in (FOLDED, "-")
    }
    sizes = {row["precision"]: row for row in read_tables(weights)[0]}
    columns = []
    for name in SHOWN:
        row = judged[name]
        bits = ", ".join(_span(widths) for widths in zip(*_widths(name), strict=True))
        of_fp32 = float(sizes[name]["of fp32's"])
        columns.append(
            [
                f"**{name}**",
                bits,
                f"{float(sizes[name]['weights, MB']):.1f}",
                f"{of_fp32:.0%}" if of_fp32 > 0.1 else f"{of_fp32:.1%}",
                times[ENGINE.format(name)].partition(" ")[0],
                row["PSNR to fp32, dB"].partition(" ")[0],
                row["Frechet to data"].partition(" ")[0],
            ]
        )
    first = [
        "",
        "bits of weights and of activations",
        "weights, MB",
        "bit operations, of fp32's",
        "ms per evaluation of a batch of 4, one CPU thread",
        "PSNR to the fp32 pictures, dB (higher is closer)",
        "Frechet distance to test pictures (lower is better)",
    ]
    header, *rows = (list(cells) for cells in zip(first, *columns, strict=True))
    return table(header, rows)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("bundle", nargs="?", type=Path, default=REFERENCE_BUNDLE)
    parser.add_argument(
        "--write", action="store_true", help="put the tables into docs/benchmarks.md and README.md"
    )
    options = parser.parse_args()
    sizes = weights(options.bundle)
    text = summary(sizes, read_section("step-time"), read_section("quality-headline"))
    print(sizes, text, sep="\n\n")
    if options.write:
        write_section("weights", sizes)
        write_section("summary", text)


if __name__ == "__main__":
    main()
