"""Times that can be compared: what is called when, and what is counted."""

from __future__ import annotations

import numpy as np
import pytest
from helpers import Built

from ptqd_export.backends import OrtDevice, OrtEngine
from ptqd_export.core import timing
from ptqd_export.core.backend import Emission
from ptqd_export.core.engine import FakeEngine
from ptqd_export.core.precision import FP32
from ptqd_export.core.timing import (
    REPEATABILITY,
    launcher,
    median_error,
    rounds_within,
    time_calls,
    time_engines,
    time_rounds,
    time_switches,
)


class Clock:
    """time.perf_counter, moved by hand."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.now = 0.0
        monkeypatch.setattr(timing.time, "perf_counter", lambda: self.now)


@pytest.mark.parametrize(
    ("seconds", "rounds"), [(0.1, 23), (60 / 23, 23), (3.0, 20), (10.0, 6), (20.0, 4), (1000.0, 4)]
)
def test_slow_calls_are_timed_less(monkeypatch: pytest.MonkeyPatch, seconds: float, rounds: int) -> None:
    """Of what takes a minute there are fewer rounds; one is never counted, and three always are."""
    clock, calls = Clock(monkeypatch), list[float]()

    def call() -> None:
        calls.append(clock.now)
        clock.now += seconds

    found = time_rounds({"a": call}, enough=60.0)["a"]
    assert len(calls) == rounds == sum(rounds_within(60.0, seconds))
    assert found == pytest.approx([seconds] * (20 if rounds == 23 else rounds - 1))


def test_calls_take_turns_and_medians_count(monkeypatch: pytest.MonkeyPatch) -> None:
    """The first rounds are not counted, and an outlier is not either."""
    clock, order = Clock(monkeypatch), list[str]()
    times = {"a": [100.0, 1.0, 2.0, 3.0, 90.0, 3.0], "b": [100.0, 5.0, 5.0, 5.0, 5.0, 5.0]}
    left = {name: iter(values) for name, values in times.items()}

    def call(name: str) -> None:
        order.append(name)
        clock.now += next(left[name])

    found = time_calls({n: lambda n=n: call(n) for n in times}, repeats=5, warmup=1)
    assert order == ["a", "b"] * 6 and found == {"a": 3.0, "b": 5.0}


def test_a_switch_follows_another_call(monkeypatch: pytest.MonkeyPatch) -> None:
    """Each call is timed right after itself and right after the next one; the first round is not counted."""
    clock, order = Clock(monkeypatch), list[str]()

    def call(name: str) -> None:
        clock.now += 1.0 if order and order[-1] == name else 3.0
        order.append(name)

    alone, after = time_switches({n: lambda n=n: call(n) for n in ("a", "b", "c")}, 2, 1)
    assert order == [*"aababbcbccac"] * 3
    assert [alone[n] for n in "abc"] == [[1.0, 1.0]] * 3 and [after[n] for n in "abc"] == [[3.0, 3.0]] * 3


def test_the_error_of_a_median(rng: np.random.Generator) -> None:
    """That of many medians of normal values, whatever single slow calls take; never below what another
    process finds."""
    draws = 100 + 20 * rng.standard_normal((2000, 25))
    spread = np.median(draws, axis=1).std()
    found = np.array([median_error(row) for row in draws])
    assert 0.85 * spread < np.sqrt(np.median(found) ** 2 - 1) < 1.15 * spread
    slow = np.concatenate([draws[0], [1e6]])
    assert median_error(slow) < 1.5 * median_error(draws[0])
    assert median_error([2.0] * 20) == pytest.approx(2.0 * REPEATABILITY)


def test_engines_get_the_same_feeds() -> None:
    feeds = {"sample": np.ones((1, 1, 2, 2), np.float32), "timestep": np.zeros(1, np.int64)}
    seen = []
    engines = {name: FakeEngine(lambda f: seen.append(f) or f["sample"]) for name in ("a", "b")}
    assert set(time_engines(engines, feeds, repeats=2, warmup=1)) == {"a", "b"}
    assert len(seen) == 6 and all(f is feeds for f in seen)
    assert {engine.calls for engine in engines.values()} == {3}


def test_a_launch_copies_nothing(rgb: Built, monkeypatch: pytest.MonkeyPatch) -> None:
    """What is timed is the engine, on buffers that were filled before."""
    m = rgb.bundle.manifest
    device = OrtDevice()
    copies: list[str] = []
    for name in ("write", "read"):
        real = getattr(OrtDevice, name)
        monkeypatch.setattr(
            OrtDevice, name, lambda self, *a, name=name, real=real: copies.append(name) or real(self, *a)
        )
    feeds = m.sampling.feeds(np.zeros((1, *m.sampling.model.sample_shape)), 0, {})
    with OrtEngine(rgb.bundle.file(m.graph(FP32, Emission.ORT_CPU).file), device=device) as engine:
        call = launcher(engine, device, feeds)
        assert copies == ["write"] * len(engine.inputs)
        call()
        call()
    assert copies == ["write"] * len(engine.inputs)
