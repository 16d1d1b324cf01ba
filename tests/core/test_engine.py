"""The fake engine is one; and engines are timed in turn."""

from __future__ import annotations

import time

import numpy as np

from ptqd_export.core.engine import EPSILON, Engine, FakeEngine
from ptqd_export.core.timing import time_engines


def test_fake_engine_is_an_engine() -> None:
    with FakeEngine(lambda f: f["sample"] * 2) as engine:
        assert isinstance(engine, Engine)
        assert engine({"sample": np.ones(2)})[EPSILON].tolist() == [2, 2]
    assert engine.closed and engine.calls == 1


def test_time_engines_interleaves() -> None:
    order: list[str] = []

    def wait(name: str, seconds: float) -> FakeEngine:
        def run(feeds: object) -> np.ndarray:
            order.append(name)
            time.sleep(seconds)
            return np.zeros(1)

        return FakeEngine(run)

    times = time_engines({"slow": wait("slow", 0.008), "fast": wait("fast", 0.001)}, {}, repeats=5, warmup=2)
    assert order == ["slow", "fast"] * 7
    assert times["slow"] >= 0.008 and 0.001 <= times["fast"] < times["slow"]
