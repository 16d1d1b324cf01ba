"""Time of an engine's step, of a switch between engines, and of whole runs beside the sum of their engines' times.

    python benchmarks/switching.py [BUNDLE] [--backend ort-cpu] [--samples 4] [--write]

For every backend that works here and that the bundle has engines for. A switch is what a call costs more right after another
engine's than right after its own; the overhead of a run is all that is not an engine's call: sampler, noise, copies, switches.
"""

from __future__ import annotations

import argparse
import contextlib
import itertools
import os
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
from report import machine, table, write_section

from ptqd_export.backends import available, open_device
from ptqd_export.bundle import Bundle
from ptqd_export.engine import SAMPLE, STEP, TIMESTEP
from ptqd_export.engines import open_artifact
from ptqd_export.plan import Plan
from ptqd_export.precision import Precision
from ptqd_export.quant import BUILDERS
from ptqd_export.recipe import BUILT
from ptqd_export.runtime import Runtime
from ptqd_export.sampler import branches
from ptqd_export.timing import launcher

WARMUP, ROUNDS, RUNS = 3, 30, 5


def seconds(call: Callable[[], object]) -> float:
    start = time.perf_counter()
    call()
    return time.perf_counter() - start


def measure(bundle: Bundle, backend: str, n: int) -> list[list[str]]:
    """Rows of the table: an engine each, and a run."""
    m = bundle.manifest
    precisions = list(m.bops)
    steps = tuple(itertools.islice(itertools.cycle(precisions), len(m.schedule)))
    rows_per_call = n * branches(m.guidance_scale)
    feeds = {
        SAMPLE: np.random.default_rng(0).standard_normal((rows_per_call, *m.model.sample_shape)).astype(np.float32),
        TIMESTEP: np.full(rows_per_call, m.schedule.timesteps[0]),
        STEP: np.zeros(1, np.int64),
        **m.model.conditions(None, rows_per_call),
    }
    figures = []
    with contextlib.ExitStack() as opened:
        device = opened.enter_context(contextlib.closing(open_device(backend)))
        engines = {p: opened.enter_context(open_artifact(bundle, m.artifact(p, backend), device)) for p in precisions}
        calls = {p: launcher(engine, device, feeds) for p, engine in engines.items()}
        alone: dict[Precision, list[float]] = {p: [] for p in precisions}
        after: dict[Precision, list[float]] = {p: [] for p in precisions}
        for turn in range(WARMUP + ROUNDS):
            for p, other in zip(precisions, [*precisions[1:], precisions[0]], strict=True):
                calls[p]()
                own = seconds(calls[p])
                calls[other]()
                switched = seconds(calls[p])
                if turn >= WARMUP:
                    alone[p].append(own)
                    after[p].append(switched)
    step = {p: float(np.median(alone[p])) for p in precisions}
    for p in precisions:
        switch = float(np.median(np.array(after[p]) - np.array(alone[p])))
        figures.append([backend, str(p), f"{step[p] * 1e3:.2f}", f"{switch * 1e3:+.2f}", ""])
    with Runtime(bundle, backend, Plan(steps)) as runtime:
        indices = range(n)
        runtime.sample(indices)
        whole = float(np.median([seconds(lambda: runtime.sample(indices)) for _ in range(RUNS)]))
    figures.append(
        [backend, f"run of {len(steps)} steps, all precisions in turn", f"{whole * 1e3:.1f}", "", f"{whole / sum(step[p] for p in steps) - 1:+.1%}"]
    )
    return figures


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("bundle", nargs="?", type=Path, default=Path("engines/fashion_mnist"))
    parser.add_argument("--backend", choices=BUILT, help="one alone")
    parser.add_argument("--samples", type=int, default=4)
    parser.add_argument("--write", action="store_true", help="put the table into README.md")
    options = parser.parse_args()
    bundle = Bundle.open(options.bundle)
    rows, missing = [], []
    for backend, reason in available().items():
        if options.backend not in (None, backend):
            continue
        if reason == "ok" and (backend not in BUILDERS or backend in bundle.manifest.backends):
            rows += measure(bundle, backend, options.samples)
        else:
            missing.append(f"{backend}: not measured, for {reason if reason != 'ok' else 'the bundle has no engines for it'}")
    text = table(("backend", "engine", "ms per call", "ms more after a switch", "run over the sum of its calls"), rows)
    how = f"CPU threads: {len(os.sched_getaffinity(0))}; {options.samples} samples per call; medians of {ROUNDS} calls and of {RUNS} runs"
    text += "\n\n" + "\n".join([*(f"- {line}" for line in missing), "", f"{how}. {machine()}."])
    print(text)
    if options.write:
        write_section("switching", text)


if __name__ == "__main__":
    main()
