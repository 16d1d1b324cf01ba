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
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from importlib import metadata
from pathlib import Path
from typing import Any

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
MARK = b"ptqd-export measures: "
"""How the lines of that process begin that are meant; libraries may print others."""
USING, FOUND = "using", "found"
"""What such a line tells: the backend that is called next, or a precision and the times of all."""
Seconds = Mapping[str, Mapping[str, float]]
"""Of one evaluation of one sample, by precision and backend."""


def by_speed(bundle: Bundle, plan: Plan, names: Sequence[str]) -> tuple[list[str], str]:
    """Backends on the host, the fastest at a plan first, and why that one is.

    A backend that fails comes last, so that the one who opens it learns why. That a process died of one is
    remembered.
    """
    file = _file(bundle, names)
    known = _remembered(file, names)
    missing = [p for p in plan.precisions if str(p) not in known]
    known |= _measure(bundle, missing, names) if missing else {}
    if missing and file is not None:
        with contextlib.suppress(OSError, PTQDError):
            file.parent.mkdir(exist_ok=True)
            remembered = {
                p: {n: s if np.isfinite(s) else None for n, s in of.items()} for p, of in known.items()
            }
            write_file(file, json.dumps(remembered).encode())
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
        found = {
            str(p): {str(n): np.inf if s is None else float(s) for n, s in times.items()}
            for p, times in data.items()
        }
    except (OSError, ValueError, TypeError, AttributeError):
        return {}
    return {p: times for p, times in found.items() if times.keys() <= set(names) and len(times) > 1}


def _measure(
    bundle: Bundle, precisions: Sequence[Precision], names: Sequence[str]
) -> dict[str, dict[str, float]]:
    """Median seconds of one evaluation of one sample, by precision and backend.

    Backends that fail are left out; those that a process dies of have infinite ones.
    """
    found: dict[str, dict[str, float]] = {}
    died: dict[str, float] = {}
    while missing := [str(p) for p in precisions if str(p) not in found]:
        left = [name for name in names if name not in died]
        last = None
        for told in _ask(bundle, missing, left) if left else ():
            last = told.get(USING, last)
            if FOUND in told:
                found[told[FOUND]] = told["seconds"] | died
        if not left:
            return found | dict.fromkeys(missing, died)
        if last is None:  # it did not start
            return found | {p: _in_turn(bundle, Precision.parse(p), left) | died for p in missing}
        if any(p not in found for p in missing):
            died[last] = np.inf
    return found


def _ask(bundle: Bundle, precisions: Sequence[str], names: Sequence[str]) -> Iterator[dict[str, Any]]:
    """What a process tells that measures, as far as it comes."""
    asked = {
        "modules": sys.path,
        "path": str(bundle.path.resolve()),
        "seal": bundle.seal,
        "precisions": precisions,
        "names": names,
        "threads": backends.threads(),
    }
    # -P: nothing is imported from the current folder.
    command = [sys.executable, "-P", "-c", CHILD, json.dumps(asked)]
    try:
        done = subprocess.run(
            command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, stdin=subprocess.DEVNULL, check=False
        )
    except OSError:
        return
    for line in done.stdout.splitlines():
        if line.startswith(MARK):
            yield json.loads(line.removeprefix(MARK))


def answer(path: str, seal: str, precisions: Sequence[str], names: Sequence[str], threads: int) -> None:
    """Measure in this process, and tell of it line by line.

    Args:
        path, seal: of the bundle; nothing is measured where another has taken its place.
        precisions, names: what to measure, on which backends.
        threads: of engines.
    """
    backends.set_threads(threads)
    bundle = Bundle.open(path)
    if bundle.seal != seal:
        return
    for precision in precisions:
        seconds = _in_turn(bundle, Precision.parse(precision), names, lambda name: _tell({USING: name}))
        _tell({FOUND: precision, "seconds": seconds})


def _tell(what: Mapping[str, object]) -> None:
    sys.stdout.buffer.write(b"\n" + MARK + json.dumps(what).encode() + b"\n")
    sys.stdout.buffer.flush()


def _in_turn(
    bundle: Bundle,
    precision: Precision,
    names: Sequence[str],
    tell: Callable[[str], None] = lambda name: None,
) -> dict[str, float]:
    """Median seconds of one evaluation of one sample, calls taking turns; without backends that fail.

    Args:
        tell: called with the backend that is turned to.
    """
    sampling = bundle.manifest.sampling
    feeds = sampling.feeds(np.zeros((1, *sampling.model.sample_shape)), 0, sampling.model.conditions(None, 1))
    seconds: dict[str, list[float]] = {}
    with contextlib.ExitStack() as opened:
        engines = {}
        for name in names:
            tell(name)
            with contextlib.suppress(PTQDError):
                engine = open_artifact(bundle, bundle.manifest.artifact(precision, name), None)
                opened.enter_context(engine)(feeds)  # some compile at the first call
                engines[name], seconds[name] = engine, []
        until = time.perf_counter() + SECONDS
        for turn in range(ROUNDS.stop):
            if turn >= ROUNDS.start and time.perf_counter() > until:
                break
            for name, engine in engines.items():
                tell(name)
                seconds[name].append(time_call(partial(engine, feeds)))
    return {name: float(np.median(values[1:])) for name, values in seconds.items()}
