"""Progress on stderr: what is being done, and how long it will take.

It is a bar on a terminal, and elsewhere a line now and then.
"""

from __future__ import annotations

import sys
import time
from types import TracebackType
from typing import Protocol, Self

from tqdm import tqdm

LINE_SECONDS = 30.0
"""Seconds between two lines where stderr is not a terminal; shorter work prints none."""


class Progress(Protocol):
    """A context manager that is told how much work is done."""

    def update(self, n: float = 1, /) -> object: ...
    def set_postfix_str(self, text: str, /, refresh: bool = True) -> None: ...
    def __enter__(self) -> Self: ...
    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> object: ...


def progress(total: int, what: str, unit: str = "step") -> Progress:
    """Show progress of `total` units: `with progress(100, "sampling", "step") as bar: bar.update()`."""
    if sys.stderr.isatty():
        bar: Progress = tqdm(total=total, desc=what, unit=unit, leave=True, dynamic_ncols=True)
        return bar
    return _Lines(total, what, unit)


class _Lines:
    """Shows progress as lines."""

    def __init__(self, total: int, what: str, unit: str) -> None:
        self._total, self._what, self._unit = total, what, unit
        self._done, self._phase = 0.0, ""
        self._start = self._told = time.monotonic()

    def update(self, n: float = 1, /) -> None:
        self._done += n
        now = time.monotonic()
        if now - self._told >= LINE_SECONDS:
            self._told = now
            print(self._line(now - self._start), file=sys.stderr, flush=True)

    def _line(self, seconds: float) -> str:
        share = self._done / max(self._total, 1)
        left = f", about {seconds * (1 - share) / share:.0f} s left" if share > 0 else ""
        phase = f" ({self._phase})" if self._phase else ""
        units = self._unit if self._unit == "%" else f"{self._unit}s"
        return f"{self._what}{phase}: {self._done:.0f} of {self._total} {units}, {share:.0%}{left}"

    def set_postfix_str(self, text: str, /, refresh: bool = True) -> None:
        self._phase = text

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        pass
