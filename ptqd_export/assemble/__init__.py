"""build: recipe in, bundle out."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from ..bundle.bundle import Bundle
from ..core.backend import install_hint
from ..core.estimate import Estimate
from ..core.pool import Connect
from ..errors import BackendUnavailable
from ..recipe import Recipe


def build(
    recipe: Recipe | Path | str,
    out: Path | str,
    *,
    resume: bool = True,
    say: Callable[[str], None] = lambda text: None,
    connect: Connect | None = None,
) -> Bundle:
    """Build the bundle of a recipe at `out`, atomically.

    Args:
        recipe: a recipe, its path, or the path of a diffusers folder (`Recipe.load`).
        resume: reuse intermediate results of an earlier, stopped build with the same settings.
        say: called with one line of text for each thing that is done.
        connect: opens a pool that samples the trajectories and measures the noise.
    Raises:
        PTQDError: the build failed; the message is one line. `out` is as it was, and `<out>.work` holds
            complete intermediate results or does not exist.
    """
    recipe = recipe if isinstance(recipe, Recipe) else Recipe.load(recipe)
    try:
        from .assemble import assemble
    except ImportError as error:
        raise _missing(error) from error
    return assemble(recipe, Path(out), resume=resume, say=say, connect=connect)


def estimate(recipe: Recipe, out: Path) -> Estimate:
    """What building a recipe at `out` will do and take; it reads no weights and writes nothing.

    Raises:
        PTQDError: see `assemble.forecast.estimate`.
    """
    try:
        from .forecast import estimate as of
    except ImportError as error:
        raise _missing(error) from error
    return of(recipe, out)


def _missing(error: ImportError) -> BackendUnavailable:
    return BackendUnavailable(f"build needs torch, diffusers and onnx ({error}): {install_hint('build')}")


def rebuild(
    bundle: Bundle | Path | str, backend: str, say: Callable[[str], None] = lambda text: None
) -> Bundle:
    """Build a bundle's engines of `backend` anew, for this machine and from its own graphs.

    The new bundle replaces the old one on disk in one step.

    Raises:
        PTQDError: see `assemble.engines.rebuild`.
    """
    from .engines import rebuild as rebuild_engines

    return rebuild_engines(bundle, backend, say)
