"""How many samples are drawn at a time where nobody says: by cores, memory and what engines take."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from helpers import Built, Invoke

from ptqd_export import backends
from ptqd_export.core.backend import AUTOMATIC, OPENVINO, ORT_CPU, ORT_CUDA, TENSORRT_RTX
from ptqd_export.core.memory import GIB
from ptqd_export.errors import RecipeError
from ptqd_export.runtime import Runtime, batch, run, usual_batch

Machine = Callable[[int, float], None]
HOST = dict.fromkeys(AUTOMATIC, "not installed") | {ORT_CPU: "ok", OPENVINO: "ok"}


@pytest.fixture
def machine(monkeypatch: pytest.MonkeyPatch) -> Machine:
    """A machine of so many threads and bytes, without a GPU."""

    def of(threads: int, total: float) -> None:
        monkeypatch.setattr(backends, "threads", lambda: threads)
        monkeypatch.setattr(backends, "available", lambda: HOST)
        monkeypatch.setattr(batch, "total_bytes", lambda: int(total))

    return of


def test_by_cores_and_memory(own: Built, machine: Machine) -> None:
    """One sample per thread, four at least and sixteen at most; fewer where half of the memory is short."""
    bundle = replace(own.bundle, live_bytes=GIB)
    for threads, expected in ((1, 4), (4, 4), (10, 10), (64, 16)):
        machine(threads, 1000 * GIB)
        assert usual_batch(bundle, ORT_CPU) == usual_batch(bundle, None) == expected
        assert usual_batch(bundle, ORT_CPU, workers=2) == 4  # of one thread each
    for total, workers, expected in ((12.1, 1, 3), (12.1, 2, 1), (1.0, 1, 1), (12.1, 3, 1)):
        machine(2, total * GIB)
        assert usual_batch(bundle, OPENVINO, workers) == expected
    with pytest.raises(RecipeError, match="not known"):
        usual_batch(bundle, "cray")


def test_on_a_gpu(own: Built, machine: Machine, monkeypatch: pytest.MonkeyPatch) -> None:
    """Sixteen, and no more than finished engines take; the GPU's is not the host's memory."""
    machine(1, GIB)
    bundle = replace(own.bundle, live_bytes=GIB)
    monkeypatch.setattr(backends, "available", lambda: {**HOST, ORT_CUDA: "ok", TENSORRT_RTX: "ok"})
    assert usual_batch(bundle, None) == usual_batch(bundle, ORT_CUDA) == 16
    monkeypatch.setattr(batch, "most_samples", lambda manifest, name: {TENSORRT_RTX: 3}.get(name))
    assert usual_batch(bundle, TENSORRT_RTX) == 3
    # Of which this bundle has no engines.
    assert TENSORRT_RTX not in bundle.manifest.backends and usual_batch(bundle, None) == 16


def test_what_a_network_needs_at_one_time(own: Built) -> None:
    """More than its input and output in both branches, and without its weights."""
    m = own.bundle.manifest
    rows = 4 * m.sampling.branches * int(np.prod(m.sampling.model.sample_shape))
    assert 2 * rows < own.bundle.live_bytes < 1000 * rows


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
    result = invoke("run", own.path, "--out", tmp_path / "out", "--num-samples", 5, "--format", "npy")
    assert result.code == 0, result.err
    assert seen[3:] == [4, 1]
