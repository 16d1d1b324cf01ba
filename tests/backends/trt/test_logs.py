"""Loggers: what is written, what is kept, and the first error of a log."""

from __future__ import annotations

import os
import threading
from pathlib import Path
from types import SimpleNamespace

import pytest

from ptqd_export.backends.trt.logs import SILENT, Errors, LogFile, first_error, make_logger


def test_errors_are_told_once() -> None:
    errors = Errors()
    assert errors.told() == SILENT
    errors.add("VERBOSE", "nothing")
    errors.add("ERROR", "first\n  of  two")
    errors.add("INTERNAL_ERROR", "second")
    assert errors.told() == "first of two" and errors.told() == SILENT


def test_forgotten_errors_are_not_told() -> None:
    errors = Errors()
    errors.add("ERROR", "of before")
    errors.forget()
    assert errors.told() == SILENT
    errors.add("ERROR", "of now")
    assert errors.told() == "of now"


def test_each_thread_is_told_of_its_own() -> None:
    """And of those of the library's threads, which never ask."""
    errors, go, done = Errors(), threading.Event(), threading.Event()
    told = []

    def work() -> None:
        errors.add("ERROR", "theirs")
        go.set()
        assert done.wait(60)
        told.append(errors.told())

    thread = threading.Thread(target=work)
    thread.start()
    assert go.wait(60)
    errors.add("ERROR", "mine")
    errors.forget()
    errors.add("ERROR", "mine, later")
    told.append(errors.told())
    done.set()
    thread.join()
    assert told == ["mine, later", "theirs"]
    other = threading.Thread(target=errors.add, args=("ERROR", "of a helper"))
    other.start()
    other.join()
    assert errors.told() == "of a helper"


def test_few_errors_are_kept() -> None:
    errors = Errors()
    for i in range(1000):
        errors.add("ERROR", str(i))
    assert int(errors.told()) > 900


def test_log_file(tmp_path: Path) -> None:
    fd = os.open(tmp_path / "log", os.O_WRONLY | os.O_CREAT)
    log = LogFile(fd)
    log.add("VERBOSE", "a")
    log.add("ERROR", "b\nc")
    log.add("INTERNAL_ERROR", "d")
    os.close(fd)
    assert (tmp_path / "log").read_text() == "VERBOSE a\nERROR b\nc\nINTERNAL_ERROR d\n"
    assert log.first_error == "b\nc" and log.disk_error is None
    log.add("INFO", "nobody reads this")
    assert log.disk_error is not None, "kept, and not raised into C++"


def test_the_logger_hands_on() -> None:
    class Module:
        class ILogger:
            made = 0

            def __init__(self) -> None:
                type(self).made += 1

    errors = Errors()
    logger = make_logger(Module, errors)
    logger.log(SimpleNamespace(name="ERROR"), "told")
    assert isinstance(logger, Module.ILogger) and type(logger).made == 1 and errors.told() == "told"


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("VERBOSE a\nERROR b  c\nERROR d\n", "b c"),
        ("VERBOSE a\nINTERNAL_ERROR e\n", "e"),
        ("VERBOSE a\nterminate called\nINFO b\n\n", "terminate called"),
        ("", ""),
    ],
)
def test_first_error(tmp_path: Path, text: str, expected: str) -> None:
    (tmp_path / "log").write_text(text)
    assert first_error(tmp_path / "log") == expected
    assert first_error(tmp_path / "none") == ""
