"""Progress bars on stderr: what is being done and how long it will take; silent when stderr is not a terminal."""

from __future__ import annotations

from typing import Any

from tqdm import tqdm  # type: ignore[import-untyped,unused-ignore]


def progress(total: int, what: str, unit: str = "it") -> Any:
    """A bar to use as a context manager; call `.update(n)`."""
    return tqdm(total=total, desc=what, unit=unit, disable=None, leave=True, dynamic_ncols=True)
