"""Which of the backends that run on the host is the fastest at a bundle: measured once, and remembered.

It is measured in a process of its own: a library may die of a graph that another one runs. What is remembered
lies in the user's cache folder, outside the bundle, and may be lost.
"""

from __future__ import annotations

import contextlib
import json
import platform
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from importlib import metadata
from pathlib import Path

import numpy as np

from .. import backends
from ..bundle.bundle import Bundle
from ..core.backend import BACKENDS
from ..core.plan import Plan
from ..core.precision import Precision
from ..core.timing import time_call
from ..errors import PTQDError
from ..files import cache_folder, digest, write_file
from .open import open_artifact

FOLDER = "backends"
"""Of the cache folder: a file for each bundle, machine, number of threads and versions."""
ROUNDS = range(3, 12)
"""Fewest and most rounds, the first of which is not counted."""
SECONDS = 2.0
"""Time after which no more than the fewest rounds are made at a precision."""
CHILD = (
    "import json, sys; asked = json.loads(sys.argv[1]); sys.path[:] = asked.pop('modules'); "
    "from ptqd_export.runtime.fastest import answer; answer(**asked)"
)
"""What the process runs that measures."""
OPENING, SECONDS_OF = "opening", "seconds"
"""What a line of the process tells: which backend it turns to, and in the end the times of all."""
Seconds = Mapping[str, Mapping[str, float]]
"""Of one evaluation of one sample, by precision and backend."""


def by_speed(bundle: Bundle, plan: Plan, names: Sequence[str]) -> tuple[list[str], str]:
    """Backends on the host, the fastest at a plan first, and why that one is.

    A backend that fails comes last, so that the one who opens it learns why.
    """
    file = _file(bundle, names)
    known = _remembered(file, names)
    missing = [p for p in plan.precisions if str(p) not in known]
    known |= {str(p): _measure(bundle, p, names) for p in missing}
    if missing and file is not None:
        with contextlib.suppress(OSError, PTQDError):
            file.parent.mkdir(exist_ok=True)
            write_file(file, json.dumps(known).encode())
    mean = {
        name: sum(known[str(p)].get(name, np.inf) for p in plan.steps) / len(plan.steps) for name in names
    }
    order = sorted(names, key=lambda name: mean[name])
    times = ", ".join(
        f"{name} {1e3 * mean[name]:.3g} ms" if np.isfinite(mean[name]) else f"{name} fails" for name in order
    )
    source = "measured here once" if missing else "remembered"
    return order, f"{order[0]} is taken: one evaluation of one sample takes {times} ({source})"


def _file(bundle: Bundle, names: Sequence[str]) -> Path | None:
    folder = cache_folder()
    if folder is None:
        return None
    versions = []
    for package in (package for name in names for package in BACKENDS[name].distributions):
        with contextlib.suppress(metadata.PackageNotFoundError):
            versions.append(f"{package} {metadata.version(package)}")
    machine = digest(_processor(), str(backends.threads()), *versions)
    return folder / FOLDER / f"{digest(bundle.seal, machine)[:32]}.json"


def _processor() -> str:
    """The processor's model and features; a home folder may be shared between machines."""
    try:
        lines = Path("/proc/cpuinfo").read_text("utf-8", "replace").splitlines()
    except OSError:
        return f"{platform.machine()} {platform.processor()}"
    return "\n".join(sorted({line for line in lines if line.startswith(("model name", "flags", "Features"))}))


def _remembered(file: Path | None, names: Sequence[str]) -> dict[str, Mapping[str, float]]:
    """What an earlier run measured of these backends; nothing if it is lost or damaged."""
    try:
        data = json.loads(file.read_bytes()) if file is not None else {}
        found = {str(p): {str(n): float(s) for n, s in times.items()} for p, times in data.items()}
    except (OSError, ValueError, TypeError, AttributeError):
        return {}
    return {p: times for p, times in found.items() if times.keys() <= set(names) and len(times) > 1}


def _measure(bundle: Bundle, precision: Precision, names: Sequence[str]) -> dict[str, float]:
    """Median seconds of one evaluation of a sample; without backends that fail, or that a process dies of."""
    left = list(names)
    while left:
        asked = {
            "modules": sys.path,
            "path": str(bundle.path.resolve()),
            "seal": bundle.seal,
            "precision": str(precision),
            "names": left,
            "threads": backends.threads(),
        }
        done = subprocess.run(
            [sys.executable, "-c", CHILD, json.dumps(asked)], capture_output=True, text=True, check=False
        )
        told = [json.loads(line) for line in done.stdout.splitlines() if line.startswith("{")]
        if told and SECONDS_OF in told[-1]:
            return {str(name): float(value) for name, value in told[-1][SECONDS_OF].items()}
        if not told:  # it did not start
            return _in_turn(bundle, precision, names)
        left.remove(told[-1][OPENING])  # it died of that
    return {}


def answer(path: str, seal: str, precision: str, names: Sequence[str], threads: int) -> None:
    """Measure in this process, and tell of it line by line."""
    backends.set_threads(threads)
    bundle = Bundle.open(path)
    same = bundle.seal == seal  # else the one who asked finds out
    seconds = _in_turn(bundle, Precision.parse(precision), names, _tell) if same else {}
    _tell({SECONDS_OF: seconds})


def _tell(line: object) -> None:
    print(json.dumps(line), flush=True)


def _in_turn(
    bundle: Bundle,
    precision: Precision,
    names: Sequence[str],
    tell: Callable[[object], None] = lambda line: None,
) -> dict[str, float]:
    """Median seconds of one evaluation of one sample, calls taking turns; without backends that fail."""
    sampling = bundle.manifest.sampling
    feeds = sampling.feeds(np.zeros((1, *sampling.model.sample_shape)), 0, sampling.model.conditions(None, 1))
    seconds: dict[str, list[float]] = {}
    with contextlib.ExitStack() as opened:
        engines = {}
        for name in names:
            tell({OPENING: name})
            with contextlib.suppress(PTQDError):
                engine = open_artifact(bundle, bundle.manifest.artifact(precision, name), None)
                opened.enter_context(engine)(feeds)  # some compile at the first call
                engines[name], seconds[name] = engine, []
        until = time.perf_counter() + SECONDS
        for turn in range(ROUNDS.stop):
            if turn >= ROUNDS.start and time.perf_counter() > until:
                break
            for name, engine in engines.items():
                seconds[name].append(time_call(partial(engine, feeds)))
    return {name: float(np.median(values[1:])) for name, values in seconds.items()}
