"""A check of first_gpu.py in a process of its own: what it is given, what it says, what came of it.

A library that crashes or hangs ends its check, and nothing else.
"""

from __future__ import annotations

import contextlib
import datetime
import faulthandler
import multiprocessing
import os
import signal
import threading
import time
import traceback
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import numpy as np

from ptqd_export.errors import PTQDError
from ptqd_export.typed import to_plain

OK, FAILED, SKIPPED = "ok", "failed", "skipped"
ENDING_S = 10.0
"""Seconds that a process may take to end after its last word."""
ABORTING_S = 2.0
"""Seconds that it may take to say where it hangs."""

Tell = Callable[[str, Any], None]
"""Takes the name of a figure and its value, as soon as a check has it."""


class Skipped(Exception):
    """The check cannot be tried here, and why."""


class Failed(Exception):
    """The check found something wrong."""


@dataclass(frozen=True)
class Job:
    """What a check works on.

    Attributes:
        work: folder for files of the checks.
        bundle: folder of the bundle that all engine checks use; the check `bundle` makes it.
        source: a bundle to copy instead of building one.
        tiny: build a small network with random weights, not the reference model.
        backend: of the checks of one backend; else "".
        seconds: time limit of the check.
    """

    work: Path
    bundle: Path
    source: Path | None = None
    tiny: bool = False
    backend: str = ""
    seconds: float = 60.0


Run = Callable[[Job, Tell], str]
"""A check: returns one line of what it found; raises Skipped, or anything else where it fails."""


@dataclass(frozen=True)
class Record:
    """What came of a check.

    Attributes:
        status: OK, FAILED or SKIPPED.
        why: one line: what was found, or what went wrong.
        seconds: that it took; None where it did not run.
        figures: what it measured, before it failed too.
        at: when, UTC.
        source: digest of the check's code.
    """

    status: str
    why: str
    seconds: float | None = None
    figures: Mapping[str, Any] = field(default_factory=dict)
    at: str = ""
    source: str = ""


def require(condition: bool, problem: str) -> None:
    """Raise Failed with `problem` unless the condition holds."""
    if not condition:
        raise Failed(problem)


def clean(value: Any) -> Any:
    """`value` as JSON holds it: numbers of Python, floats to five digits, None for what is not finite."""
    value = to_plain(value)
    if isinstance(value, dict):
        return {key: clean(item) for key, item in value.items()}
    if isinstance(value, list):
        return [clean(item) for item in value]
    if isinstance(value, np.generic):
        value = value.item()
    if isinstance(value, float):
        return float(f"{value:.5g}") if np.isfinite(value) else None
    return value


def one_line(error: BaseException) -> str:
    """An error for people."""
    text = " ".join(str(error).split())[:1000]
    return text if isinstance(error, PTQDError | Failed | Skipped) else f"{type(error).__name__}: {text}"


def _child(run: Run, job: Job, pipe: Connection, log: Path) -> None:
    """The process of a check: figures and its verdict go through the pipe, what is printed into the log."""
    os.setsid()  # what it starts ends with it
    sink = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
    os.dup2(sink, 1)
    os.dup2(sink, 2)
    faulthandler.enable()  # where it crashed, or where it is when it is aborted
    os.environ["XDG_CACHE_HOME"] = str(job.work / "caches")  # kernels that were compiled here, by no one else
    threading.Thread(target=_end_with_parent, daemon=True).start()
    try:
        verdict = (OK, run(job, lambda name, value: pipe.send((name, clean(value)))))
    except Skipped as reason:
        verdict = (SKIPPED, one_line(reason))
    except Exception as error:
        traceback.print_exc()
        verdict = (FAILED, one_line(error))
    pipe.send(verdict)
    pipe.send(None)


def _end_with_parent() -> None:
    parent = multiprocessing.parent_process()
    if parent is not None:
        parent.join()
        os.killpg(0, signal.SIGKILL)


def isolated(run: Run, job: Job, log: Path) -> Record:
    """Run a check in a process of its own, for at most `job.seconds`; it is gone when this returns or raises.

    Args:
        log: file for all that the process prints, and for where in Python it crashed or hung.
    """
    log.parent.mkdir(parents=True, exist_ok=True)
    spawn = multiprocessing.get_context("spawn")
    ours, theirs = spawn.Pipe(duplex=False)
    process = spawn.Process(target=_child, args=(run, job, theirs, log))
    started = time.monotonic()
    said: list[tuple[str, Any]] = []
    ended = late = False
    process.start()
    theirs.close()
    try:
        while not ended and not late:
            late = not ours.poll(max(0.0, started + job.seconds - time.monotonic()))
            if not late:
                try:
                    message = ours.recv()
                except (EOFError, OSError):  # it died
                    break
                ended = message is None
                said += [] if message is None else [message]
        elapsed = time.monotonic() - started
        process.join(0 if late else ENDING_S)
        lingers, code = process.is_alive(), process.exitcode
        if lingers and process.pid is not None:
            os.kill(process.pid, signal.SIGABRT)  # its log then says where it is
            process.join(ABORTING_S)
    finally:
        if process.pid is not None:
            with contextlib.suppress(OSError):  # it had no group of its own yet, or nothing is left of it
                os.killpg(process.pid, signal.SIGKILL)
        process.kill()
        process.join()
        ours.close()
    status, why = said.pop() if ended else (FAILED, "")
    if late:
        why = f"timed out after {job.seconds:.0f} s, killed"
    elif not ended or code or lingers:
        how = signal.Signals(-code).name if code is not None and code < 0 else f"exit code {code}"
        how = "hung as it ended, killed" if lingers else f"crashed: {how}"
        status, why = FAILED, f"{why}; then it {how}" if ended else how
    why = why if status != FAILED else f"{why} (log: {log})"
    at = datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")
    return Record(status, why, round(elapsed, 2), dict(said), at)
