"""What input grids with two ends of their own cost TensorRT-RTX, which computes with zero point 0 alone.

    python benchmarks/input_grids.py [--models reference cifar cross] [--write]

Engines are built without a GPU, from the same model with symmetric and with asymmetric input grids. The
finished plan says how many kernels there are and which layers run in 8 bits. Below 8 bits the asymmetric grid
is a window inside int8; at 8 bits inputs are shifted, and what is missing is added as a constant.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
from pathlib import Path

from architectures import REFERENCE
from engine_builds import build_engine, export_apart, taken
from report import machine, table, write_section

from ptqd_export.backends import trt
from ptqd_export.core.backend import TENSORRT_RTX

PRECISIONS = ("w8a8", "w4a4")
HEADER = ("model", "precision", "input grids", "8-bit convs", "8-bit linears", "kernels", "engine, MB")


def rows_of(key: str) -> list[list[str]]:
    rows = []
    for grids in ("symmetric", "asymmetric"):
        with tempfile.TemporaryDirectory() as tmp:
            folder = Path(tmp)
            graphs = export_apart(key, folder, precisions=PRECISIONS, input_grids=grids)
            for precision, file in graphs.files.items():
                made, size = build_engine(graphs, file, folder)
                row = [graphs.title, precision, grids, taken(file, made, "Conv")]
                row += [taken(file, made, "MatMul", "Gemm"), str(made.plan.kernels), f"{size / 1e6:.1f}"]
                rows.append(row)
                print(" | ".join(row), *made.plan.complaints(), sep="\n  ", file=sys.stderr)
    return sorted(rows, key=lambda row: PRECISIONS.index(row[1]))


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    known = (REFERENCE, "cifar", "cross")
    parser.add_argument("--models", nargs="+", choices=known, default=known)
    parser.add_argument("--write", action="store_true", help="put the table into docs/benchmarks.md")
    args = parser.parse_args()
    rows = [row for key in args.models for row in rows_of(key)]
    text = f"{table(HEADER, rows)}\n\n{machine()}, {trt.runtime_version(TENSORRT_RTX)}."
    print(text)
    if args.write:
        write_section("input-grids", text)


if __name__ == "__main__":
    main()
