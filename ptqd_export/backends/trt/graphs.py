"""CUDA graphs of an engine's runs: what is captured, what is tried again, and what is dropped.

A captured graph has an execution context of its own: a context's internal state is part of what is captured
(NVIDIA/TensorRT#3798).
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from ..cuda import Buffer, CaptureFailed, CudaDevice
from .loaded import Context, Loaded

GRAPHS = 16
"""Most (shapes, addresses) of which an engine keeps a CUDA graph and its execution context."""
TRIED_AT = (2, 4, 8)
"""The launches of a key that are captured, until one succeeds: what fails may be of the moment."""
GIVEN_UP_AFTER = 2 * len(TRIED_AT)
"""Failures of an engine, with no success between them, after which it tries no more."""

Key = tuple[Buffer, ...]
"""Shapes and addresses of all tensors."""


@dataclass
class _Launches:
    """Of one key: how many runs were queued, and the CUDA graph of one, with the context in it."""

    runs: int = 0
    failed: bool = False
    graph: Any = None
    context: Context | None = None


class Graphs:
    """Launches of one engine, replayed from CUDA graphs where there are any."""

    def __init__(self, device: CudaDevice, loaded: Loaded) -> None:
        self._device, self._loaded = device, loaded
        self._launches: OrderedDict[Key, _Launches] = OrderedDict()
        self._failures = 0
        self._why = ""

    @property
    def note(self) -> str:
        """How many graphs there are, and why there are no more."""
        count = sum(launches.graph is not None for launches in self._launches.values())
        missing = sum(launches.failed for launches in self._launches.values())
        if not count:
            return f"no CUDA graph: {self._why or 'no buffers were launched on twice'}"
        note = f"{count} CUDA graph{'s' * (count > 1)} captured"
        return f"{note}, {missing} not: {self._why}" if missing else note

    def replay(self, key: Key) -> bool:
        """Queue the graph of `key`, if there is one."""
        launches = self._launches.get(key)
        if launches is None or launches.graph is None:
            return False
        self._launches.move_to_end(key)
        self._device.replay(launches.graph)
        return True

    def launch(self, key: Key, plain: Context, run: Callable[[Context], None]) -> None:
        """Queue a run that is no replay. A key's second one is captured, and later ones after a failure.

        Args:
            plain: the context of all runs that are not captured.
            run: makes a context ready for the key's buffers and queues a run; what it raises passes through.
        """
        launches = self._launches.setdefault(key, _Launches())
        launches.runs += 1
        due = launches.runs in TRIED_AT and self._failures < GIVEN_UP_AFTER
        context = self._loaded.new_context() if due else None
        if context is None:
            if due:
                self._fail(launches, f"there is no room for another context ({self._loaded.errors.told()})")
            run(plain)
        else:
            try:
                # A run comes first: what the library does once for new shapes must not be captured.
                run(context)
                self._capture(launches, context)
            finally:
                if launches.context is not context:
                    self._device.synchronize()  # the context, which goes now, has work under way
                    self._loaded.release(context)
        self._launches.move_to_end(key)
        while len(self._launches) > GRAPHS:
            self._drop(self._launches.popitem(last=False)[1])

    def _capture(self, launches: _Launches, context: Context) -> None:
        errors, stream = self._loaded.errors, self._device.stream
        errors.forget()
        if not context.is_capturable(stream):
            self._fail(launches, f"the library says that this run cannot be captured ({errors.told()})")
            return
        try:
            launches.graph = self._device.capture(lambda: context.enqueue(stream))
        except CaptureFailed as failure:
            self._fail(launches, f"{failure} ({errors.told()})")
            return
        launches.context, launches.failed = context, False
        self._failures = 0

    def _fail(self, launches: _Launches, why: str) -> None:
        launches.failed, self._why = True, why
        self._failures += 1

    def _drop(self, launches: _Launches) -> None:
        """Destroy the graph, once it has run, and its context after it."""
        if launches.graph is not None and launches.context is not None:
            self._device.drop(launches.graph)
            self._loaded.release(launches.context)
            launches.graph = launches.context = None

    def drop_all(self) -> None:
        """Destroy every graph: its addresses hold no longer. The next launch of its key is captured again."""
        for launches in self._launches.values():
            captured = launches.graph is not None
            self._drop(launches)
            launches.runs, launches.failed = TRIED_AT[0] - 1 if captured else 0, False
        self._failures = 0
