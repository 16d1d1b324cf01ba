"""Times of a build's engines: on which backend."""

from __future__ import annotations

from pathlib import Path

import pytest
from helpers import Built, cuda_on_the_cpu

from ptqd_export import backends
from ptqd_export.assemble import timing
from ptqd_export.assemble.timing import time_backends
from ptqd_export.backends import registry
from ptqd_export.core.backend import Emission
from ptqd_export.core.timing import REPEATABILITY
from ptqd_export.errors import BackendUnavailable


def test_the_best_of_the_wanted_backends_that_works(rgb: Built, monkeypatch: pytest.MonkeyPatch) -> None:
    m = rgb.bundle.manifest
    every = (rgb.path, m.artifacts, m.graphs)

    def timed(*wanted: str) -> timing.Times:
        path, artifacts, graphs = every
        return time_backends(wanted, m.sampling, 1, artifacts, graphs, path)

    times = timed("ort-cpu")
    assert times.backend == "ort-cpu" and set(times.seconds) == set(m.bops) and times.notes == ()
    assert all(0 < seconds < 10 for seconds in times.seconds.values())
    assert times.errors.keys() == times.seconds.keys()
    assert all(times.errors[p] >= REPEATABILITY * times.seconds[p] for p in m.bops)
    if "ok" not in registry.available()["ort-cuda"]:
        times = timed("ort-cpu", "ort-cuda")
        assert times.backend == "ort-cpu" and times.notes[0].startswith("ort-cuda does not run here: ")
    monkeypatch.setattr(registry, "OPENERS", cuda_on_the_cpu())
    opened: list[str] = []
    real = backends.open_engine

    def open_engine(name: str, path: Path, *rest: object) -> object:
        opened.append(path.name)
        return real(name, path, *rest)  # type: ignore[arg-type]

    monkeypatch.setattr(backends, "open_engine", open_engine)
    times = timed("ort-cpu", "ort-cuda")
    assert times.backend == "ort-cuda" and times.notes == ()
    assert sorted(opened) == sorted({m.graph(p, Emission.HALF).file for p in m.bops})  # each once

    def fails(name: str) -> None:
        raise BackendUnavailable("nothing works")

    monkeypatch.setattr(backends, "check", fails)
    with pytest.raises(BackendUnavailable, match="nothing works"):
        timed("ort-cuda")
