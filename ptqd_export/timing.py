"""Times that can be compared: calls in turn, medians."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from functools import partial
from typing import TypeVar

import numpy as np

from .backends.base import Device, DeviceEngine
from .engine import EPSILON, SAMPLE, Engine, Feeds

Name = TypeVar("Name")


def time_calls(calls: Mapping[Name, Callable[[], object]], *, repeats: int = 20, warmup: int = 3) -> dict[Name, float]:
    """Median wall time per call, in seconds.

    The calls are interleaved (A B C A B C ...), so that another load on the machine, or a clock that changes, meets all
    alike; `warmup` rounds are not counted.
    """
    seconds: dict[Name, list[float]] = {name: [] for name in calls}
    for turn in range(warmup + repeats):
        for name, call in calls.items():
            start = time.perf_counter()
            call()
            elapsed = time.perf_counter() - start
            if turn >= warmup:
                seconds[name].append(elapsed)
    return {name: float(np.median(values)) for name, values in seconds.items()}


def launcher(engine: DeviceEngine, device: Device, feeds: Feeds) -> Callable[[], None]:
    """A call that launches `engine` on buffers of `device`, once filled with `feeds`, and waits: no copies."""
    buffers = {name: device.empty(feeds[name].shape, feeds[name].dtype.name) for name in engine.inputs}
    for name, buffer in buffers.items():
        device.write(buffer, feeds[name])
    buffers[EPSILON] = device.empty(feeds[SAMPLE].shape, "float32")

    def call() -> None:
        engine.launch(buffers)
        device.synchronize()

    return call


def time_engines(engines: Mapping[str, Engine], feeds: Feeds, *, repeats: int = 20, warmup: int = 3) -> dict[str, float]:
    """`time_calls` of engines on the same feeds."""
    return time_calls({name: partial(engine, feeds) for name, engine in engines.items()}, repeats=repeats, warmup=warmup)
