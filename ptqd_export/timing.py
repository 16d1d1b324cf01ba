"""Times that can be compared: engines called in turn, medians."""

from __future__ import annotations

import time
from collections.abc import Mapping

import numpy as np

from .engine import Engine, Feeds


def time_engines(engines: Mapping[str, Engine], feeds: Feeds, *, repeats: int = 20, warmup: int = 3) -> dict[str, float]:
    """Median wall time of one call per engine, in seconds, all on the same feeds.

    The calls are interleaved (A B C A B C ...), so that another load on the machine, or a clock that changes, meets all
    engines alike; `warmup` rounds are not counted.
    """
    seconds: dict[str, list[float]] = {name: [] for name in engines}
    for turn in range(warmup + repeats):
        for name, engine in engines.items():
            start = time.perf_counter()
            engine(feeds)
            elapsed = time.perf_counter() - start
            if turn >= warmup:
                seconds[name].append(elapsed)
    return {name: float(np.median(values)) for name, values in seconds.items()}
