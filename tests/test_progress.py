"""Progress where stderr is no terminal: lines now and then, on stderr alone."""

from __future__ import annotations

import sys

import pytest

from ptqd_export import progress as module
from ptqd_export.progress import LINE_SECONDS, progress


class Clock:
    """time.monotonic, moved by hand."""

    def __init__(self) -> None:
        self.now = 1000.0

    def __call__(self) -> float:
        return self.now


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    clock = Clock()
    monkeypatch.setattr(module.time, "monotonic", clock)
    return clock


def test_a_line_every_half_minute(clock: Clock, capsys: pytest.CaptureFixture[str]) -> None:
    with progress(100, "sampling", "step") as bar:
        for i in range(10):
            clock.now += LINE_SECONDS / 2
            bar.update(5)
            captured = capsys.readouterr()
            assert captured.out == "" and (captured.err != "") == (i % 2 == 1)
            if captured.err:
                done, seconds = 5 * (i + 1), LINE_SECONDS / 2 * (i + 1)
                left = seconds * (100 - done) / done
                line = f"sampling: {done} of 100 steps, {done}%, about {left:.0f} s left\n"
                assert captured.err == line


def test_short_work_prints_nothing(clock: Clock, capsys: pytest.CaptureFixture[str]) -> None:
    with progress(3, "sampling") as bar:
        for _ in range(3):
            clock.now += LINE_SECONDS / 3 - 1e-6
            bar.update()
    assert capsys.readouterr() == ("", "")
    with progress(3, "sampling") as bar:
        clock.now += LINE_SECONDS  # the test can fail
        bar.update()
    assert capsys.readouterr().err == "sampling: 1 of 3 steps, 33%, about 60 s left\n"


def test_the_phase_is_named(clock: Clock, capsys: pytest.CaptureFixture[str]) -> None:
    with progress(4, "engines", "engine") as bar:
        bar.set_postfix_str("tactics")
        clock.now += LINE_SECONDS
        bar.update(2)
        bar.set_postfix_str("")
        clock.now += LINE_SECONDS
        bar.update(1.5)
    assert capsys.readouterr().err.splitlines() == [
        "engines (tactics): 2 of 4 engines, 50%, about 30 s left",
        "engines: 4 of 4 engines, 88%, about 9 s left",
    ]


def test_nothing_done_and_nothing_to_do(clock: Clock, capsys: pytest.CaptureFixture[str]) -> None:
    for total, line in ((5, "work: 0 of 5 steps, 0%\n"), (0, "work: 0 of 0 steps, 0%\n")):
        with progress(total, "work") as bar:
            clock.now += LINE_SECONDS
            bar.update(0)
        assert capsys.readouterr().err == line


def test_a_failure_passes_through(clock: Clock, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(KeyError), progress(5, "work") as bar:
        bar.update()
        raise KeyError
    assert capsys.readouterr() == ("", "")


def test_a_terminal_gets_a_bar(
    clock: Clock, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True)
    with progress(2, "sampling", "step") as bar:
        bar.update()
        bar.set_postfix_str("last")
        bar.update()
    captured = capsys.readouterr()
    assert captured.out == "" and "sampling" in captured.err and "2/2" in captured.err
