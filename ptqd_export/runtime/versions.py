"""Versions of the packages that decide what a bundle computes."""

from __future__ import annotations

import contextlib
from collections.abc import Mapping
from importlib import metadata

from ..bundle.bundle import Bundle
from ..core.backend import BACKENDS, ORT_CPU
from ..errors import BackendUnavailable
from ..version import __version__


def versions(bundle: Bundle, backend: str) -> dict[str, str]:
    """{package: version} of those that decide what a bundle samples on a backend, besides the bundle."""
    parts = (*BACKENDS[ORT_CPU].distributions, "tokenizers") if bundle.manifest.pipeline.parts else ()
    found = {"ptqd-export": __version__}
    for name in ("numpy", *BACKENDS[backend].distributions, *parts):
        with contextlib.suppress(metadata.PackageNotFoundError):
            found[name] = metadata.version(name)
    return found


def check_versions(expected: Mapping[str, str], here: Mapping[str, str]) -> None:
    """Check that a worker's machine computes with the packages of the machine where the work was begun.

    Raises:
        BackendUnavailable: one of them has another version, or is missing.
    """
    for name, version in expected.items():
        if here.get(name) != version:
            raise BackendUnavailable(
                f"this machine has {name} {here.get(name, 'not at all')}, where the run was started "
                f"{version}: install the same"
            )
