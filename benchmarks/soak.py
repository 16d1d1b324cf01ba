"""Does a process that samples for hours, or opens bundles again and again, hold on to anything?

    python benchmarks/soak.py [BUNDLE] [--samples 1000] [--opens 300] [--out report.json]

Two soaks, each in a process of its own: samples from one Runtime, in batches of several sizes, with another
precision in every step; and a Bundle and a Runtime opened and closed. After every batch, or close, this
process's memory, descriptors and threads are noted. Exit code 1 if one of them grows: see `Growth`.
"""

from __future__ import annotations

import argparse
import gc
import itertools
import json
import os
import subprocess
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
from report import REFERENCE_BUNDLE

from ptqd_export.bundle import Bundle
from ptqd_export.core.backend import ORT_CPU
from ptqd_export.core.plan import Plan
from ptqd_export.runtime import Runtime

BATCHES = (1, 4, 2, 7, 3, 16, 5, 1, 8)
"""Sizes of batches in turn."""
PAGE = os.sysconf("SC_PAGESIZE")
ALLOWED = {"memory": 2 << 20, "descriptors": 0.5, "threads": 0.5}
"""What the second half may add, by its slope. Of descriptors and threads not one. Of memory 2 MiB: an arena
of Python's, which is 1 MiB and taken at once, may fall into it, and malloc moves by less than that again. Of
1,000 samples, or 300 opens, it is 4 kB a sample, or 14 kB an open: less than a 28x28 sample, or than an
engine, takes."""


@dataclass(frozen=True)
class Growth:
    """How something grew in the second half of a soak, when caches are filled.

    Attributes:
        first, last: medians of the first and of the last tenth of all values.
        slope: per round, in the second half, by the Theil-Sen estimate: the median of the slopes of pairs,
            which single peaks do not move.
        added: the slope over the whole second half.
    """

    first: float
    last: float
    slope: float
    added: float

    @classmethod
    def of(cls, values: Sequence[float]) -> Growth:
        tenth, half = max(len(values) // 10, 1), np.asarray(values[len(values) // 2 :], np.float64)
        i, j = np.triu_indices(len(half), 1)
        slope = float(np.median((half[j] - half[i]) / (j - i)))
        first, last = float(np.median(values[:tenth])), float(np.median(values[-tenth:]))
        return cls(first, last, slope, slope * len(half))


Leak = Callable[[], object]


def held() -> dict[str, float]:
    """Memory in bytes, descriptors and threads of this process."""
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    descriptors, threads = (len(os.listdir(f"/proc/self/{name}")) for name in ("fd", "task"))
    return {"memory": pages * PAGE, "descriptors": descriptors, "threads": threads}


def sampling(path: Path, n: int, leak: Leak = lambda: None) -> Iterator[None]:
    """Sample n in one Runtime; a step per batch."""
    bundle = Bundle.open(path)
    precisions = [a.precision for a in bundle.manifest.artifacts if a.backend == ORT_CPU]
    plan = Plan(tuple(itertools.islice(itertools.cycle(precisions), len(bundle.manifest.sampling))))
    with Runtime(bundle, ORT_CPU, plan) as runtime:
        start = 0
        for size in itertools.cycle(BATCHES):
            runtime.sample(range(start, start + size), seed=start % 7)
            leak()
            yield
            start += size
            if start >= n:
                return


def opening(path: Path, n: int, leak: Leak = lambda: None) -> Iterator[None]:
    """Open and close n times."""
    for _ in range(n):
        with Runtime(Bundle.open(path), ORT_CPU) as runtime:
            runtime.sample(range(1))
        leak()
        yield


SOAKS = {"samples": sampling, "opens": opening}


def soak(rounds: Iterator[None]) -> dict[str, Growth]:
    """What grew over these rounds."""
    values: dict[str, list[float]] = {name: [] for name in ALLOWED}
    for _ in rounds:
        gc.collect()  # what only waits for the collector is no leak
        for name, value in held().items():
            values[name].append(value)
    return {name: Growth.of(column) for name, column in values.items()}


def grown(found: dict[str, Growth]) -> list[str]:
    """What grew by more than is allowed."""
    return [
        f"{name} grow by {growth.added:.3g} over the second half ({growth.slope:.3g} a round), allowed "
        f"{ALLOWED[name]:.3g}"
        for name, growth in found.items()
        if growth.added > ALLOWED[name]
    ]


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("bundle", nargs="?", type=Path, default=REFERENCE_BUNDLE)
    parser.add_argument("--samples", type=int, default=1000)
    parser.add_argument("--opens", type=int, default=300)
    parser.add_argument("--out", type=Path, help="A JSON report.")
    parser.add_argument("--only", choices=SOAKS, help="This one soak, in this process; prints JSON.")
    args = parser.parse_args()
    counts = {"samples": args.samples, "opens": args.opens}
    if args.only:
        found = soak(SOAKS[args.only](args.bundle, counts[args.only]))
        print(json.dumps({name: asdict(growth) for name, growth in found.items()}))
        return
    report, problems = {}, []
    for name, count in counts.items():
        words = [sys.executable, __file__, str(args.bundle), "--only", name, f"--{name}", str(count)]
        done = subprocess.run(words, check=True, stdout=subprocess.PIPE, text=True)
        growths = {what: Growth(**values) for what, values in json.loads(done.stdout).items()}
        problems += [f"{count} {name}: {line}" for line in grown(growths)]
        report[name] = {"count": count, **{what: asdict(growth) for what, growth in growths.items()}}
        print(f"{count} {name}:")
        for what, growth in growths.items():
            print(f"  {what}: {growth.first:.0f} -> {growth.last:.0f}, second half {growth.added:+.3g}")
    if args.out:
        args.out.write_text(json.dumps({**report, "problems": problems}, indent=1) + "\n")
    sys.exit("\n".join(problems) or 0)


if __name__ == "__main__":
    main()
