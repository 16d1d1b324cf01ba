"""Options of ONNX Runtime's CPU sessions: time and memory of calls of a bundle's engines.

    python benchmarks/ort_options.py [BUNDLE ...] [--batch 1 4] [--rounds 60] [--write]

"as run" is what the package sets. Memory is what three calls add to the most that a process has taken.
"""

from __future__ import annotations

import argparse
import multiprocessing
from collections.abc import Mapping
from concurrent.futures import ProcessPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any

import onnxruntime as ort
from report import REFERENCE_BUNDLE, machine, table, write_section

from ptqd_export.backends import saturates, set_threads
from ptqd_export.backends.ort import session_options
from ptqd_export.bundle.bundle import Bundle
from ptqd_export.core.backend import ORT_CPU
from ptqd_export.core.precision import FP32, Precision
from ptqd_export.core.timing import feeds_to_time, time_calls

VARIANTS: Mapping[str, Mapping[str, Any]] = {
    "as run": {},
    "values in buffers of older ones": {"enable_mem_reuse": True},
    "no pattern of memory": {"enable_mem_pattern": False},
    "no arena": {"enable_cpu_mem_arena": False},
    "in order of priority": {"execution_order": ort.ExecutionOrder.PRIORITY_BASED},
    "basic fusions alone": {"graph_optimization_level": ort.GraphOptimizationLevel.ORT_ENABLE_BASIC},
}


def session(file: Path, variant: str) -> Any:
    set_threads(1)
    options, _ = session_options(ort, file, exact=saturates())
    for name, value in VARIANTS[variant].items():
        setattr(options, name, value)
    return ort.InferenceSession(str(file), options, providers=["CPUExecutionProvider"])


def megabytes(path: Path, file: Path, variant: str, rows: int) -> float:
    """Memory of a few calls, in a process of its own."""

    def most() -> float:
        lines = Path("/proc/self/status").read_text("utf-8").splitlines()
        return next(int(line.split()[1]) for line in lines if line.startswith("VmHWM:")) / 1024

    own, given = session(file, variant), feeds_to_time(Bundle.open(path).manifest.sampling.conditional, rows)
    given = {value.name: given[value.name] for value in own.get_inputs()}
    before = most()
    for _ in range(3):
        own.run(None, given)
    return most() - before


def measure(bundle: Bundle, precision: Precision, batches: list[int], rounds: int) -> list[list[str]]:
    """A row per variant: milliseconds and memory by batch."""
    file = bundle.file(bundle.manifest.artifact(precision, ORT_CPU).file)
    sessions = {variant: session(file, variant) for variant in VARIANTS}
    rows = {variant: [f"{bundle.manifest.sampling.model.name} {precision}", variant] for variant in VARIANTS}
    for batch in batches:
        given = feeds_to_time(bundle.manifest.sampling.conditional, batch)
        calls = {}
        for variant, own in sessions.items():
            taken = {value.name: given[value.name] for value in own.get_inputs()}
            calls[variant] = partial(own.run, None, taken)
        seconds = time_calls(calls, repeats=rounds, warmup=3)
        for variant, taken_s in seconds.items():
            with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as pool:
                memory = pool.submit(megabytes, bundle.path, file, variant, batch).result()
            more = taken_s / seconds["as run"] - 1
            rows[variant] += [f"{1e3 * taken_s:.2f} ({more:+.1%})", f"{memory:.0f}"]
    return list(rows.values())


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("bundles", nargs="*", type=Path, default=[REFERENCE_BUNDLE])
    parser.add_argument("--precision", nargs="+", default=["w8a8", str(FP32)])
    parser.add_argument("--batch", type=int, nargs="+", default=[1, 4])
    parser.add_argument("--rounds", type=int, default=60)
    parser.add_argument("--write", action="store_true", help="put the table into docs/benchmarks.md")
    args = parser.parse_args()
    rows = []
    for path in args.bundles:
        for precision in args.precision:
            rows += measure(Bundle.open(path), Precision.parse(precision), args.batch, args.rounds)
    columns = [f"{what}, batch {n}" for n in args.batch for what in ("ms", "MB")]
    how = f"medians of {args.rounds} rounds in turn, one thread."
    text = f"{table(['engine', 'options', *columns], rows)}\n\n{machine('onnxruntime')}; {how}"
    print(text)
    if args.write:
        write_section("ort-options", text)


if __name__ == "__main__":
    main()
