"""Time of an engine's call, of a switch between engines, and of a run beside the sum of its engines' calls.

    python benchmarks/switching.py [BUNDLE] [--backend ort-cpu] [--samples 4] [--rounds 30] [--write]

For every backend that works here and that the bundle has engines for. A switch is what a call takes longer
right after another engine's call than right after its own. What a run takes besides its engines' calls is
the sampler, the noise, copies and switches.
"""

from __future__ import annotations

import argparse
import contextlib
import itertools
import os
import sys
from pathlib import Path

import numpy as np
from report import REFERENCE_BUNDLE, machine, table, write_section

from ptqd_export.backends import available, open_device
from ptqd_export.bundle.bundle import Bundle
from ptqd_export.core.backend import BACKENDS, ENGINE_BACKENDS, RUNNABLE
from ptqd_export.core.plan import Plan
from ptqd_export.core.timing import feeds_to_time, launcher, time_call, time_switches
from ptqd_export.runtime import Runtime, open_artifact

WARMUP, RUNS = 3, 5
HEADER = ("backend", "engine", "ms per call", "ms more after a switch", "run over the sum of its calls")


def measure(bundle: Bundle, backend: str, n: int, rounds: int) -> list[list[str]]:
    """Rows of the table: one per engine, and one of a run."""
    m, sampling = bundle.manifest, bundle.manifest.sampling
    precisions = list(m.bops)
    steps = tuple(itertools.islice(itertools.cycle(precisions), len(sampling)))
    feeds = feeds_to_time(sampling, n)
    with contextlib.ExitStack() as opened:
        device = opened.enter_context(contextlib.closing(open_device(backend)))
        engines = {p: open_artifact(bundle, m.artifact(p, backend), device) for p in precisions}
        for engine in engines.values():
            opened.enter_context(engine)
        calls = {p: launcher(engine, device, feeds) for p, engine in engines.items()}
        alone, after = time_switches(calls, rounds, WARMUP)
    step = {p: float(np.median(alone[p])) for p in precisions}
    switch = {p: float(np.median(np.array(after[p]) - np.array(alone[p]))) for p in precisions}
    found = [[backend, str(p), f"{step[p] * 1e3:.2f}", f"{switch[p] * 1e3:+.2f}", ""] for p in precisions]
    with Runtime(bundle, backend, Plan(steps)) as runtime:
        runtime.sample(range(n))
        whole = float(np.median([time_call(lambda: runtime.sample(range(n))) for _ in range(RUNS)]))
    more = whole / sum(step[p] for p in steps) - 1
    run = f"run of {len(steps)} steps, all precisions in turn"
    return [*found, [backend, run, f"{whole * 1e3:.1f}", "", f"{more:+.1%}"]]


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("bundle", nargs="?", type=Path, default=REFERENCE_BUNDLE)
    parser.add_argument("--backend", choices=RUNNABLE, help="one alone")
    parser.add_argument("--samples", type=int, default=4)
    parser.add_argument("--rounds", type=int, default=30)
    parser.add_argument("--write", action="store_true", help="put the table into docs/benchmarks.md")
    options = parser.parse_args()
    bundle = Bundle.open(options.bundle)
    rows: list[list[str]] = []
    for backend, state in available().items():
        if options.backend not in (None, backend):
            continue
        if state == "ok" and backend in ENGINE_BACKENDS and backend not in bundle.manifest.backends:
            state = "the bundle has no engines for it"
        if state == "ok":
            rows += measure(bundle, backend, options.samples, options.rounds)
        else:
            print(f"{backend} is left out: {state}", file=sys.stderr)
    if not rows:
        raise SystemExit("no backend works here: nothing was measured")
    measured = list(dict.fromkeys(row[0] for row in rows))
    others = (
        ""
        if set(measured) & {n for n, b in BACKENDS.items() if b.on_device}
        else "; those of GPUs need an NVIDIA GPU"
    )
    how = f"CPU threads: {len(os.sched_getaffinity(0))}; {options.samples} samples per call"
    text = (
        f"{table(HEADER, rows)}\n\nMeasured: {', '.join(measured)}{others}. {how}; "
        f"medians of {options.rounds} calls and of {RUNS} runs. {machine()}."
    )
    print(text)
    if options.write:
        write_section("switching", text)


if __name__ == "__main__":
    main()
