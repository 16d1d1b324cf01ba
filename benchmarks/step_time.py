"""Time of one evaluation: a bundle's engines beside what else a user could run, by `ptqd-export bench`.

    python benchmarks/step_time.py [--models reference unet cifar condition] [--baseline NAME ...] [--write]

All from the same weights, each in a process of its own, in turn. OpenVINO and NNCF take part where they are
installed. The reference model's bundle is that of `make bench`; the other models have random weights, and
bundles in fp32 and w8a8, which are built and kept in benchmarks/out. With several `--threads` the table is
of what more threads gain. To see whether it works: `--models
reference --batch 1 --rounds 5`.
"""

from __future__ import annotations

import argparse
import tempfile
from pathlib import Path

from architectures import ARCHITECTURES, REFERENCE, kept_bundle, quickly, say, write_model
from report import OUT, REFERENCE_BUNDLE, count_threads, machine, table, write_section

from ptqd_export.bench import BASELINES, Bench, Settings, bench, make_baselines
from ptqd_export.bundle.bundle import Bundle

OTHERS = ("unet", "cifar", "condition")
LIBRARIES = ("onnxruntime", "torch", "openvino", "nncf")


def cells(found: Bench, name: str) -> list[str]:
    """Milliseconds, and how many times faster than the first row."""
    row = next((row for row in found.rows if row.name == name), None)
    if row is None:
        return ["-"]
    faster = "" if row is found.rows[0] else f" ({found.ratio(row)})"
    return [f"{row.median:.1f}{faster}"]


def bundle_of(key: str, model: Path) -> Bundle:
    """The bundle of a model, built unless it is there."""
    if key == REFERENCE:
        return Bundle.open(REFERENCE_BUNDLE)
    recipe = quickly(model, n_steps=2, precisions=("fp32", "w8a8"), rounding="nearest")
    recipe = recipe.override(plan={"rule": "fixed", "steps": ("fp32", "w8a8")})
    return kept_bundle(recipe, OUT / f"step-time-{key}")


def measure(key: str, args: argparse.Namespace) -> dict[tuple[int, int], Bench]:
    """A bench per batch and number of threads."""
    with tempfile.TemporaryDirectory() as folder:
        model = write_model(key, Path(folder))
        bundle = bundle_of(key, model)
        others = make_baselines(bundle, model, Path(folder), args.baseline, say)
        found = {}
        for threads in args.threads:
            for batch in args.batch:
                settings = Settings(batch=batch, threads=threads, rounds=args.rounds, runs=0)
                found[batch, threads] = bench(bundle, settings, others, say)
    return found


def text_of(columns: dict[str, Bench], rounds: int) -> str:
    """A table with a column for each bench, by its title."""
    names = dict.fromkeys(row.name for found in columns.values() for row in found.rows)
    rows = [[name, *(cell for found in columns.values() for cell in cells(found, name))] for name in names]
    header = ["ms per evaluation (times faster than the first row)", *columns]
    versions = next(iter(columns.values())).versions
    return (
        f"{table(header, rows)}\n\n{machine(*(name for name in LIBRARIES if name in versions))}; medians of "
        f"{rounds} rounds in turn. A ratio nearer to 1 than the rounds spread is not told."
    )


def threads_text(columns: dict[str, dict[int, Bench]], rounds: int) -> str:
    """A table of what more threads gain, with columns for each call by its title."""
    names = dict.fromkeys(row.name for of in columns.values() for found in of.values() for row in found.rows)
    header, rows = ["ms per evaluation"], [[name] for name in names]
    for title, of in columns.items():
        fewest = min(of)
        once = {row.name: row.median for row in of[fewest].rows}
        for threads, found in sorted(of.items()):
            header.append(f"{title}, {count_threads(threads)}")
            median = {row.name: row.median for row in found.rows}
            for row in rows:
                own = median.get(row[0])
                more = f" ({once[row[0]] / own:.2f}x)" if own and threads > fewest and row[0] in once else ""
                row.append("-" if own is None else f"{own:.1f}{more}")
    versions = next(found.versions for of in columns.values() for found in of.values())
    return (
        f"{table(header, rows)}\n\n{machine(*(name for name in LIBRARIES if name in versions))}; medians of "
        f"{rounds} rounds in turn, one number of threads after the other."
    )


def call(batch: int, threads: int) -> str:
    return f"batch {batch}, {count_threads(threads)}"


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    known = (REFERENCE, *OTHERS)
    parser.add_argument("--models", nargs="+", choices=known, default=known)
    parser.add_argument("--baseline", nargs="+", choices=BASELINES, default=BASELINES)
    parser.add_argument("--batch", type=int, nargs="+", default=[1, 4])
    parser.add_argument("--threads", type=int, nargs="+", default=[1])
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--write", action="store_true", help="put the tables into docs/benchmarks.md")
    args = parser.parse_args()
    texts, others = {}, dict[str, Bench]()
    by_threads: dict[str, dict[int, Bench]] = {}
    for key in args.models:
        found = measure(key, args)
        if len(args.threads) > 1:
            for (batch, threads), one in found.items():
                by_threads.setdefault(f"{key}, batch {batch}", {})[threads] = one
        elif key == REFERENCE:
            texts["step-time"] = text_of({call(*at): one for at, one in found.items()}, args.rounds)
        else:
            title = f"{key}, {ARCHITECTURES[key].parameters / 1e6:.1f} M"
            others |= {f"{title}: {call(*at)}": one for at, one in found.items()}
    if by_threads:
        texts["step-time-threads"] = threads_text(by_threads, args.rounds)
    if others:
        texts["step-time-models"] = text_of(others, args.rounds)
    for name, text in texts.items():
        print(text, end="\n\n")
        if args.write:
            write_section(name, text)


if __name__ == "__main__":
    main()
