"""Comparable times: calls take turns, and the median of each counts."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TypeVar

import numpy as np

from .. import backends
from ..bundle.manifest import Artifact, Graph
from ..core.backend import BACKENDS, ORT_CPU
from ..core.engine import EPSILON, SAMPLE, Device, DeviceEngine, Engine, Feeds
from ..core.precision import Precision
from ..core.sampling import Sampling
from ..errors import BackendUnavailable, BundleError, GraphError

Name = TypeVar("Name")
REPEATS, WARM_UP = 20, 3
"""Calls that are timed, after others that are not counted."""
REPEATABILITY = 0.01
"""Share of a median by which engines of the very same kernels differ, wherever their buffers happen to lie:
three INT8 engines on one CPU did by up to 1.5 % (docs/benchmarks.md, switching)."""


@dataclass(frozen=True)
class Times:
    """Measured times of one evaluation.

    Attributes:
        backend: the backend that was timed.
        seconds: time per precision.
        errors: standard error of each.
        notes: better backends that could not be timed, and why.
    """

    backend: str
    seconds: Mapping[Precision, float]
    errors: Mapping[Precision, float]
    notes: tuple[str, ...] = ()


def time_calls(
    calls: Mapping[Name, Callable[[], object]], *, repeats: int = REPEATS, warmup: int = WARM_UP
) -> dict[Name, float]:
    """Median wall time per call, in seconds; see `time_rounds`."""
    return {name: float(np.median(v)) for name, v in time_rounds(calls, repeats, warmup).items()}


def time_rounds(
    calls: Mapping[Name, Callable[[], object]], repeats: int = REPEATS, warmup: int = WARM_UP
) -> dict[Name, list[float]]:
    """Wall times of each call, in seconds, one per round.

    The calls are interleaved (A B C A B C ...), so that another load on the machine or a changing clock
    affects all of them equally; `warmup` rounds are not counted.
    """
    seconds: dict[Name, list[float]] = {name: [] for name in calls}
    for turn in range(warmup + repeats):
        for name, call in calls.items():
            start = time.perf_counter()
            call()
            elapsed = time.perf_counter() - start
            if turn >= warmup:
                seconds[name].append(elapsed)
    return seconds


def median_error(values: Sequence[float]) -> float:
    """Standard error of the median of values, from the range that holds half of them; see REPEATABILITY.

    sqrt(pi / 2) IQR / (1.349 sqrt(n)), as of a normal distribution: single slow calls do not count.
    """
    low, median, high = np.percentile(values, (25, 50, 75))
    error = np.sqrt(np.pi / 2 / len(values)) * (high - low) / 1.349
    return float(np.hypot(error, REPEATABILITY * median))


def launcher(engine: DeviceEngine, device: Device, feeds: Feeds) -> Callable[[], None]:
    """A call that launches `engine` on buffers of `device` and waits, without copies.

    The buffers are filled with `feeds` once, here.
    """
    buffers = {name: device.empty(feeds[name].shape, feeds[name].dtype.name) for name in engine.inputs}
    for name, buffer in buffers.items():
        device.write(buffer, feeds[name])
    buffers[EPSILON] = device.empty(feeds[SAMPLE].shape, "float32")

    def call() -> None:
        engine.launch(buffers)
        device.synchronize()

    return call


def time_engines(
    engines: Mapping[str, Engine], feeds: Feeds, *, repeats: int = REPEATS, warmup: int = WARM_UP
) -> dict[str, float]:
    """`time_calls` for engines on the same feeds."""
    calls = {name: partial(engine, feeds) for name, engine in engines.items()}
    return time_calls(calls, repeats=repeats, warmup=warmup)


def time_backends(
    wanted: Sequence[str],
    sampling: Sampling,
    batch_size: int,
    artifacts: Sequence[Artifact],
    graphs: Sequence[Graph],
    folder: Path,
) -> Times:
    """Time one evaluation of `batch_size` samples per precision, on the best wanted backend that works here.

    If none of them works, ORT CPU is timed.
    """
    x = np.random.default_rng(0).standard_normal((batch_size, *sampling.model.sample_shape))
    feeds = sampling.feeds(x, 0, sampling.model.conditions(None, batch_size))
    notes: list[str] = []
    for name in (*(b for b in BACKENDS if b in wanted and b != ORT_CPU), ORT_CPU):
        files = files_of(name, artifacts, graphs, folder)
        try:
            seconds = _seconds(name, set(files.values()), feeds)
        except (BackendUnavailable, BundleError, GraphError) as error:
            if name == ORT_CPU:
                raise
            notes.append(f"{name} does not run here: {error}")
            continue
        medians, errors = (
            {p: float(of(seconds[file])) for p, file in files.items()} for of in (np.median, median_error)
        )
        return Times(name, medians, errors, tuple(notes))
    raise AssertionError("the last backend raises")


def files_of(
    name: str, artifacts: Sequence[Artifact], graphs: Sequence[Graph], folder: Path
) -> dict[Precision, Path]:
    """What a backend runs at each precision: its artifacts, or the graphs of its emission if it has none."""
    files = {a.precision: folder / a.file for a in artifacts if a.backend == name}
    emission = BACKENDS[name].emission
    return files or {g.precision: folder / g.file for g in graphs if g.emission is emission}


def _seconds(name: str, files: Collection[Path], feeds: Feeds) -> dict[Path, list[float]]:
    """Seconds of launches per file, on buffers of the backend's device."""
    backends.check(name)
    with contextlib.ExitStack() as opened:
        device = opened.enter_context(contextlib.closing(backends.open_device(name)))
        engines = {
            file: opened.enter_context(backends.open_engine(name, file, device)) for file in sorted(files)
        }
        return time_rounds({file: launcher(engine, device, feeds) for file, engine in engines.items()})
