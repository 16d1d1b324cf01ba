"""How many samples are drawn at a time where nobody says: by cores, memory and what engines take."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from helpers import Built, Invoke

from ptqd_export import backends
from ptqd_export.core.backend import OPENVINO, ORT_CPU, ORT_CUDA, TENSORRT_RTX
from ptqd_export.core.memory import GIB
from ptqd_export.errors import BackendUnavailable, BundleError, RecipeError
from ptqd_export.runtime import Runtime, batch, run, usual_batch

Machine = Callable[[int, float], None]


@pytest.fixture
def machine(monkeypatch: pytest.MonkeyPatch) -> Machine:
    """A machine of so many threads and bytes."""

    def of(threads: int, total: float) -> None:
        monkeypatch.setattr(backends, "threads", lambda: threads)
        monkeypatch.setattr(batch, "total_bytes", lambda: int(total))

    return of


def test_by_cores_and_memory(own: Built, machine: Machine) -> None:
    """One sample per thread, four at least and sixteen at most; fewer where half of the memory is short."""
    bundle = replace(own.bundle, live_bytes=GIB)
    for threads, expected in ((1, 4), (4, 4), (10, 10), (64, 16)):
        machine(threads, 1000 * GIB)
        assert usual_batch(bundle, ORT_CPU) == expected
        assert usual_batch(bundle, ORT_CPU, workers=2) == 4  # of one thread each
    for total, workers, expected in ((12.1, 1, 3), (12.1, 2, 1), (1.0, 1, 1), (12.1, 3, 1)):
        machine(2, total * GIB)
        assert usual_batch(bundle, OPENVINO, workers) == expected
    with pytest.raises(RecipeError, match="not known"):
        usual_batch(bundle, "cray")


def test_on_a_gpu(own: Built, machine: Machine, monkeypatch: pytest.MonkeyPatch) -> None:
    """Sixteen, and no more than finished engines take; its memory is not the host's."""
    machine(1, GIB)
    bundle = replace(own.bundle, live_bytes=GIB)
    assert usual_batch(bundle, ORT_CUDA) == 16
    with pytest.raises(BundleError, match="no engines for backend 'tensorrt-rtx'"):
        usual_batch(bundle, TENSORRT_RTX)
    monkeypatch.setattr(batch, "most_samples", lambda manifest, name: {TENSORRT_RTX: 3}.get(name))
    assert usual_batch(bundle, TENSORRT_RTX) == 3


def test_a_gpu_that_does_not_open(own: Built, machine: Machine, monkeypatch: pytest.MonkeyPatch) -> None:
    """The batch is of the backend that is taken in the end."""
    machine(1, GIB)
    bundle, sizes = replace(own.bundle, live_bytes=GIB), list[int]()
    monkeypatch.setattr(backends, "check", lambda name: None)

    def fails(*_: object) -> Any:
        raise BackendUnavailable("out of memory")

    monkeypatch.setattr(backends, "open_device", fails)
    run(bundle, 3, batched=sizes.append)
    run(bundle, 3, workers=2, batched=sizes.append)
    assert sizes == [1, 1]


def test_a_run_takes_it(
    own: Built, machine: Machine, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, invoke: Invoke
) -> None:
    """Where no batch is given, and then alone; the samples are the same."""
    seen: list[int] = []
    sample = Runtime.sample

    def counted(runtime: Runtime, indices: range, *args: Any, **kwargs: Any) -> Any:
        seen.append(len(indices))
        return sample(runtime, indices, *args, **kwargs)

    monkeypatch.setattr(Runtime, "sample", counted)
    machine(1, 1000 * GIB)
    usual = run(own.bundle, 6, backend=ORT_CPU)
    assert seen == [4, 2]
    whole = run(own.bundle, 6, backend=ORT_CPU, batch_size=6)
    assert seen == [4, 2, 6]
    np.testing.assert_allclose(usual, whole, atol=1e-4)
    asked = ("run", own.path, "--out", tmp_path / "out", "--num-samples", 5, "--format", "npy", "--json")
    assert invoke(*asked).json["batch_size"] == 4 and seen[3:] == [4, 1]
    assert json.loads((tmp_path / "out" / "run.json").read_text())["batch_size"] == 4
