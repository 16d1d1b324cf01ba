"""Versions of the packages that decide what a bundle computes."""

from __future__ import annotations

import contextlib
from importlib import metadata

from ..bundle.bundle import Bundle
from ..core.backend import BACKENDS, ORT_CPU
from ..version import __version__


def versions(bundle: Bundle, backend: str) -> dict[str, str]:
    """{package: version} of those that decide what a bundle samples on a backend, besides the bundle."""
    parts = (*BACKENDS[ORT_CPU].distributions, "tokenizers") if bundle.manifest.pipeline.parts else ()
    found = {"ptqd-export": __version__}
    for name in ("numpy", *BACKENDS[backend].distributions, *parts):
        with contextlib.suppress(metadata.PackageNotFoundError):
            found[name] = metadata.version(name)
    return found
