"""What the library says while it works: its loggers, the errors among what it logged, and what they mean."""

from __future__ import annotations

import contextlib
import os
import re
import threading
from collections import deque
from pathlib import Path
from typing import Any, Protocol

SILENT = "it does not say why"
ERRORS = ("ERROR", "INTERNAL_ERROR")
"""Severities of errors."""
OUT_OF_MEMORY = re.compile(
    r"bad_alloc|MemoryError|[Oo]ut ?[Oo]f ?[Mm]emory|[Cc]annot allocate memory|insufficient memory"
    r"|Resource temporarily unavailable"
)
"""The last one: no thread could be started."""


def one_line(text: object) -> str:
    """`text` with every run of white space as one space."""
    return " ".join(str(text).split())


class Sink(Protocol):
    """Takes what the library logs."""

    def add(self, severity: str, message: str) -> None: ...


def make_logger(trt: Any, sink: Sink) -> Any:
    """A logger of the library that hands everything to `sink`."""

    class Logger(trt.ILogger):  # type: ignore[misc]
        def __init__(self) -> None:
            trt.ILogger.__init__(self)

        def log(self, severity: Any, message: str) -> None:
            with contextlib.suppress(Exception):  # its caller is C++, which may never return
                sink.add(severity.name, message)

    return Logger()


class LogFile:
    """Writes "SEVERITY message" to a file descriptor.

    Attributes:
        first_error: the first error's message.
        disk_error: why a line could not be written.
    """

    def __init__(self, fd: int) -> None:
        self._fd = fd
        self.first_error = ""
        self.disk_error: OSError | None = None

    def add(self, severity: str, message: str) -> None:
        if severity in ERRORS:
            self.first_error = self.first_error or message
        data = f"{severity} {message}\n".encode(errors="replace")
        try:
            while data:
                data = data[os.write(self._fd, data) :]
        except OSError as error:
            self.disk_error = self.disk_error or error


class Errors:
    """Keeps the latest errors, each with the thread that it was logged in, and prints nothing."""

    def __init__(self) -> None:
        self._kept: deque[tuple[int, str]] = deque(maxlen=64)
        self._lock = threading.Lock()

    def add(self, severity: str, message: str) -> None:
        if severity in ERRORS:
            with self._lock:
                self._kept.append((threading.get_ident(), one_line(message)))

    def told(self) -> str:
        """The first error since this thread last asked; if it logged none, the first of another thread."""
        with self._lock:
            me, everything = threading.get_ident(), list(self._kept)
            self._kept.clear()
            self._kept.extend(entry for entry in everything if entry[0] != me)
        own = [text for thread, text in everything if thread == me]
        return (own or [text for _, text in everything] or [SILENT])[0]

    def forget(self) -> None:
        """What this thread and threads that are gone have logged so far is told of no more."""
        others = {thread.ident for thread in threading.enumerate()} - {threading.get_ident()}
        with self._lock:
            everything = list(self._kept)
            self._kept.clear()
            self._kept.extend(entry for entry in everything if entry[0] in others)


def first_error(log: Path) -> str:
    """The first error in a builder's log, or else its last line."""
    last = ""
    with contextlib.suppress(OSError), open(log, encoding="utf-8", errors="replace") as lines:
        for line in lines:
            if line.startswith(tuple(f"{severity} " for severity in ERRORS)):
                return one_line(line.partition(" ")[2])
            if not line.startswith(("VERBOSE ", "INFO ", "WARNING ")) and line.strip():
                last = line
    return one_line(last)
