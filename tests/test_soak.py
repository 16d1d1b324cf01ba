"""benchmarks/soak.py: a short soak holds on to nothing, and one that does is found."""

from __future__ import annotations

import gc
import importlib
import json
import mmap
import os
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest
from helpers import Built, environment

ROOT = Path(__file__).resolve().parent.parent
SCRIPT = ROOT / "benchmarks" / "soak.py"


@pytest.fixture
def script(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    monkeypatch.syspath_prepend(ROOT / "benchmarks")
    return importlib.import_module("soak")


def test_a_short_soak(classes: Built, tmp_path: Path) -> None:
    """Guidance, classes, noise in every step; all precisions in turn."""
    counts = ("--samples", "150", "--opens", "20")
    words = [sys.executable, SCRIPT, classes.path, *counts, "--out", tmp_path / "x"]
    done = subprocess.run(words, env=environment(), capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (0, ""), done
    report = json.loads((tmp_path / "x").read_text())
    assert report["problems"] == [] and report["samples"]["count"] == 150
    assert report["opens"]["threads"]["last"] >= 1 and report["opens"]["memory"]["last"] > 1e7


@pytest.fixture
def leaks() -> Iterator[dict[str, Callable[[], object]]]:
    """Something that holds on to more with every call: memory, a descriptor, a thread."""
    kept: list[mmap.mmap] = []  # pages of its own: what lies in a heap may fill room that was free
    end, threads, descriptors = threading.Event(), list[threading.Thread](), list[int]()

    def memory() -> None:
        kept.append(mmap.mmap(-1, 1 << 20))
        kept[-1].write(b"x" * len(kept[-1]))

    def thread() -> None:
        threads.append(threading.Thread(target=end.wait))
        threads[-1].start()

    yield {
        "memory": memory,
        "descriptors": lambda: descriptors.append(os.open(os.devnull, os.O_RDONLY)),
        "threads": thread,
    }
    gc.unfreeze()
    for pages in kept:
        pages.close()
    end.set()
    for one in threads:
        one.join()
    for number in descriptors:
        os.close(number)


@pytest.mark.parametrize("what", ["memory", "descriptors", "threads"])
@pytest.mark.parametrize("name", ["samples", "opens"])
def test_a_leak_is_found(
    script: ModuleType, classes: Built, leaks: dict[str, Callable[[], object]], name: str, what: str
) -> None:
    gc.freeze()  # the tests' own objects, which every round would look through
    rounds = script.SOAKS[name](classes.path, {"samples": 60, "opens": 10}[name], leaks[what])
    assert [line.split()[0] for line in script.grown(script.soak(rounds))] == [what]


def test_growth(script: ModuleType, rng: np.random.Generator) -> None:
    """Caches that fill up in the first half, noise and single peaks are no growth; a slow leak is."""
    flat = np.minimum(np.arange(200.0) * 1e6, 5e7) + rng.normal(0, 2e5, 200)
    flat[[120, 150, 199]] += 5e7
    assert abs(script.Growth.of(flat).added) < 3e5
    growth = script.Growth.of(flat + 3e4 * np.arange(200))
    assert growth.added == pytest.approx(3e6, rel=0.15)
    assert script.grown({"memory": growth}) and not script.grown({"memory": script.Growth.of(flat)})
    assert script.grown({"descriptors": script.Growth.of(np.arange(200) // 50)})
    assert not script.grown({"descriptors": script.Growth.of(7 + np.arange(200) % 2)})
