"""How far a build is, from the phases that the builder reports."""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from typing import Any


class Progress:
    """The fraction done of nested phases of equal steps; it never falls."""

    def __init__(self) -> None:
        self.fraction = 0.0
        self._phases: dict[str, tuple[float, float]] = {}  # name: (where it begins, what one step is worth)

    def start(self, phase: str, parent: str | None, steps: int) -> None:
        """A phase of `steps` begins, within a step of `parent` where it has one."""
        begin, worth = self._phases.get(parent or "", (0.0, 1.0)) if parent else (0.0, 1.0)
        self._phases[phase] = (begin, worth / max(steps, 1))

    def step(self, phase: str, step: int) -> None:
        """Step number `step`, counted from 0, is done."""
        if phase in self._phases:
            begin, worth = self._phases[phase]
            self._phases[phase] = (begin + worth, worth)
            self.fraction = min(1.0, max(self.fraction, begin + worth))

    def finish(self, phase: str) -> None:
        """The phase is done."""
        self._phases.pop(phase, None)


def make_monitor(trt: Any, tell: Callable[[float, str], None]) -> Any:
    """The library's monitor, which tells (fraction done, phase) whenever that has grown by a hundredth."""

    class Monitor(trt.IProgressMonitor):  # type: ignore[misc]
        def __init__(self) -> None:
            trt.IProgressMonitor.__init__(self)
            self.progress, self.told = Progress(), -1.0

        # Nothing is raised, out of memory say: the caller is C++, which may never return.
        def phase_start(self, phase: str, parent: str | None, steps: int) -> None:
            with contextlib.suppress(Exception):
                self.progress.start(phase, parent, steps)
                self._tell(phase)

        def phase_finish(self, phase: str) -> None:
            with contextlib.suppress(Exception):
                self.progress.finish(phase)

        def step_complete(self, phase: str, step: int) -> bool:
            with contextlib.suppress(Exception):
                self.progress.step(phase, step)
                self._tell(phase)
            return True

        def _tell(self, phase: str) -> None:
            if self.progress.fraction >= self.told + 0.01:
                self.told = self.progress.fraction
                tell(self.told, phase)

    return Monitor()
