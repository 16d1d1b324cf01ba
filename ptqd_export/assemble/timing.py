"""Times of a build's engines, which plans are chosen by."""

from __future__ import annotations

import contextlib
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from .. import backends
from ..bundle.manifest import Artifact, Graph
from ..core.backend import BACKENDS, ORT_CPU
from ..core.engine import Feeds
from ..core.precision import Precision
from ..core.sampling import Sampling
from ..core.timing import feeds_to_time, launcher, median_error, time_rounds
from ..errors import BackendUnavailable, BundleError, GraphError


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


ENOUGH = 60.0
"""Seconds after which slow engines are timed no longer."""


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
    feeds = feeds_to_time(sampling, batch_size)
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
        calls = {file: launcher(engine, device, feeds) for file, engine in engines.items()}
        return time_rounds(calls, enough=ENOUGH)
