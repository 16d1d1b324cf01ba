"""Every error the package raises on purpose.

    PTQDError                    base: the CLI prints it as one line and exits with 1
    ├── RecipeError              a recipe or an option is wrong
    ├── ModelError               a model cannot be read, or computes nonsense
    ├── GraphError               a graph cannot be exported or rewritten
    ├── BundleError              a bundle is damaged, or was built for something else
    ├── BackendUnavailable       a backend is not installed or does not work here
    └── ParityError              an engine does not compute what it was built to compute

A message says what was given, what was expected and what to do.
"""

from __future__ import annotations


class PTQDError(Exception):
    """Base of every error raised on purpose."""


class RecipeError(PTQDError):
    """A recipe, or an option that overrides it, is wrong."""


class ModelError(PTQDError):
    """A model cannot be read, is not a supported diffusion model, or computes NaN."""


class GraphError(PTQDError):
    """A graph cannot be exported, rewritten or checked."""


class BundleError(PTQDError):
    """A bundle is missing, damaged, from a newer version, or was measured for another setting."""


class BackendUnavailable(PTQDError):
    """A backend's runtime is not installed, or does not work on this machine."""


class ParityError(PTQDError):
    """An engine and its simulation disagree by more than rounding can explain."""


def need(ok: bool, message: str) -> None:
    """Raise RecipeError with `message` unless `ok`."""
    if not ok:
        raise RecipeError(message)
