"""Comparable times: calls take turns, and the median of each counts."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import TypeVar

import numpy as np

from .engine import EPSILON, SAMPLE, Array, Device, DeviceEngine, Engine, Feeds
from .sampling import Sampling

Name = TypeVar("Name")
REPEATS, WARM_UP = 20, 3
"""Calls that are timed, after others that are not counted."""
FEWEST = 3
"""Rounds that are timed, however long they take."""
REPEATABILITY = 0.01
"""Share of a median by which engines of the very same kernels differ, wherever their buffers happen to lie:
three INT8 engines on one CPU did by up to 1.5 % (docs/benchmarks.md, switching)."""


def time_calls(
    calls: Mapping[Name, Callable[[], object]], *, repeats: int = REPEATS, warmup: int = WARM_UP
) -> dict[Name, float]:
    """Median wall time per call, in seconds; see `time_rounds`."""
    return {name: float(np.median(v)) for name, v in time_rounds(calls, repeats, warmup).items()}


def rounds_within(
    enough: float, first: float, repeats: int = REPEATS, warmup: int = WARM_UP
) -> tuple[int, int]:
    """(rounds that are not counted, rounds that are): all if they take less than `enough` seconds, else as
    many as do, but FEWEST.

    Args:
        first: seconds of the first round.
    """
    fitting = int(enough / max(first, 1e-9))
    return (warmup, repeats) if fitting >= warmup + repeats else (1, max(FEWEST, fitting - 1))


def time_rounds(
    calls: Mapping[Name, Callable[[], object]],
    repeats: int = REPEATS,
    warmup: int = WARM_UP,
    enough: float = math.inf,
) -> dict[Name, list[float]]:
    """Wall times of each call, in seconds, one per round.

    The calls are interleaved (A B C A B C ...), so that another load on the machine or a changing clock
    affects all of them equally; `warmup` rounds are not counted. Of slow calls there are fewer rounds, where
    they would take more than `enough` seconds (`rounds_within`).
    """
    if warmup and enough < math.inf:
        warmup, repeats = rounds_within(enough, sum(map(time_call, calls.values())), repeats, warmup)
        warmup -= 1
    seconds: dict[Name, list[float]] = {name: [] for name in calls}
    for turn in range(warmup + repeats):
        for name, call in calls.items():
            elapsed = time_call(call)
            if turn >= warmup:
                seconds[name].append(elapsed)
    return seconds


def time_call(call: Callable[[], object]) -> float:
    """Wall time of one call, in seconds."""
    start = time.perf_counter()
    call()
    return time.perf_counter() - start


def time_switches(
    calls: Mapping[Name, Callable[[], object]], repeats: int, warmup: int
) -> tuple[dict[Name, list[float]], dict[Name, list[float]]]:
    """Wall times of each call in seconds, one per round: right after itself, and right after another call."""
    names = list(calls)
    alone: dict[Name, list[float]] = {name: [] for name in names}
    after: dict[Name, list[float]] = {name: [] for name in names}
    for turn in range(warmup + repeats):
        for name, other in zip(names, [*names[1:], names[0]], strict=True):
            calls[name]()
            own = time_call(calls[name])
            calls[other]()
            switched = time_call(calls[name])
            if turn >= warmup:
                alone[name].append(own)
                after[name].append(switched)
    return alone, after


def feeds_to_time(sampling: Sampling, n: int, step: int = 0) -> dict[str, Array]:
    """Feeds of one engine call for n samples of noise, conditions as where the user names none."""
    x = np.random.default_rng(0).standard_normal((n, *sampling.model.sample_shape))
    return sampling.feeds(x, step, sampling.model.conditions(None, n))


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
