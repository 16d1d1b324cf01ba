"""Time of one evaluation: a bundle's engines beside what else a user could run, by `ptqd-export bench`.

    python benchmarks/step_time.py [BUNDLE] [--model calib/fashion_mnist] [--baseline NAME ...] [--write]

All from the same weights, each in a process of its own, in turn. OpenVINO and NNCF take part where they are
installed. To see whether it works: `--batch 1 --threads 1 --rounds 5`.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
from pathlib import Path

from report import REFERENCE_BUNDLE, REFERENCE_MODEL, machine, table, write_section

from ptqd_export.bench import BASELINES, Bench, Settings, bench, make_baselines
from ptqd_export.bundle.bundle import Bundle


def cells(found: Bench, name: str) -> list[str]:
    """Milliseconds, and how many times faster than the first row."""
    row = next((row for row in found.rows if row.name == name), None)
    if row is None:
        return ["-"]
    faster = "" if row is found.rows[0] else f" ({found.ratio(row)})"
    return [f"{row.median:.1f}{faster}"]


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("bundle", nargs="?", type=Path, default=REFERENCE_BUNDLE)
    parser.add_argument("--model", type=Path, default=REFERENCE_MODEL)
    parser.add_argument("--baseline", nargs="+", choices=BASELINES, default=BASELINES)
    parser.add_argument("--batch", type=int, nargs="+", default=[1, 4])
    parser.add_argument("--threads", type=int, nargs="+", default=[1])
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--write", action="store_true", help="put the table into docs/benchmarks.md")
    args = parser.parse_args()
    bundle, columns = Bundle.open(args.bundle), {}

    def say(text: str) -> None:
        print(text, file=sys.stderr)

    with tempfile.TemporaryDirectory() as folder:
        others = make_baselines(args.model, Path(folder), args.baseline, say)
        for threads in args.threads:
            for batch in args.batch:
                settings = Settings(batch=batch, threads=threads, rounds=args.rounds, runs=0)
                columns[batch, threads] = bench(bundle, settings, others, say)
    calls = [f"batch {n}, {threads} thread{'s' * (threads > 1)}" for n, threads in columns]
    names = dict.fromkeys(row.name for found in columns.values() for row in found.rows)
    rows = [[name, *(cell for found in columns.values() for cell in cells(found, name))] for name in names]
    header = ["ms per evaluation (times faster than the first row)", *calls]
    libraries = ("onnxruntime", "torch", "openvino", "nncf")
    last = next(reversed(columns.values())).versions
    text = (
        f"{table(header, rows)}\n\n{machine(*(name for name in libraries if name in last))}; medians of "
        f"{args.rounds} rounds in turn. A ratio nearer to 1 than the rounds spread is not told."
    )
    print(text)
    if args.write:
        write_section("step-time", text)


if __name__ == "__main__":
    main()
