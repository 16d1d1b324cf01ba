"""Which backends there are, whether they work here, and how to open an engine on one of them."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from ..engine import Engine
from ..errors import BackendUnavailable
from . import ort


@dataclass(frozen=True)
class Backend:
    """A runtime: `check` raises BackendUnavailable where it cannot work, `open` loads a graph file."""

    check: Callable[[], object]
    open: Callable[[Path], Engine]


BACKENDS: dict[str, Backend] = {"ort-cpu": Backend(ort.runtime, ort.OrtEngine)}


def available() -> dict[str, str]:
    """{name: "ok", or the reason why it does not work on this machine} for every backend that runs graph files."""
    found = {}
    for name, backend in BACKENDS.items():
        try:
            backend.check()
            found[name] = "ok"
        except BackendUnavailable as error:
            found[name] = str(error)
    return found


def open_engine(backend: str, path: Path) -> Engine:
    """Load the graph file `path` on a backend; the caller closes the engine.

    Raises:
        BackendUnavailable: no such backend, or its runtime is not installed or cannot run this graph.
        GraphError: the file is missing, or is not a valid graph.
    """
    if backend not in BACKENDS:
        raise BackendUnavailable(f"backend {backend!r} does not run graph files: expected one of {', '.join(BACKENDS)}")
    return BACKENDS[backend].open(path)
