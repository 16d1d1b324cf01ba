"""Builds that are stopped half-way: the old bundle stands, and the same command takes up what is finished."""

from __future__ import annotations

import shutil
import signal
import subprocess
import time
from collections.abc import Callable
from pathlib import Path

from helpers import Built, Launch, content

from ptqd_export.bundle import Bundle
from ptqd_export.bundle.bundle import MANIFEST


def stop(
    process: subprocess.Popen[str], when: Callable[[], bool], by: signal.Signals
) -> tuple[int, str, str]:
    deadline = time.monotonic() + 240
    while not when():
        assert process.poll() is None, process.communicate()
        assert time.monotonic() < deadline
        time.sleep(0.02)
    process.send_signal(by)
    out, err = process.communicate(timeout=60)
    return process.returncode, out, err


def test_a_stopped_build_leaves_the_old_bundle_and_is_taken_up(
    classes: Built, own: Built, tmp_path: Path, launch: Launch
) -> None:
    """Ctrl-C in the trajectories, kill -9 in the statistics, SIGTERM in the export, kill -9 while ends are
    sampled; then the same command to the end."""
    out, work = tmp_path / "bundle", tmp_path / "bundle.work"
    shutil.copytree(own.path, out)
    before = content(out)

    def start() -> subprocess.Popen[str]:
        return launch("build", classes.recipe, "--out", out, *classes.options, "--resume")

    def unharmed() -> None:
        assert content(out) == before
        Bundle.open(out)

    def finished(pattern: str) -> dict[Path, tuple[int, int]]:
        return {file: (file.stat().st_ino, file.stat().st_mtime_ns) for file in work.glob(pattern)}

    chunks, statistics = "trajectories-*/[!.]*.safetensors", "stats-*.safetensors"
    code, printed, error = stop(start(), lambda: bool(finished(chunks)), signal.SIGINT)
    assert (code, printed) == (130, "")
    assert error.startswith("Error: interrupted: the old files stand") and error.count("\n") == 1
    unharmed()
    first = finished(chunks)
    assert first and not list(work.glob("trajectories-*/*.tmp"))

    code, printed, error = stop(start(), lambda: bool(finished(statistics)), signal.SIGKILL)
    assert (code, printed, error) == (-signal.SIGKILL, "", "")
    unharmed()
    second = finished(chunks)
    assert len(second) == 6 and first.items() <= second.items()
    measured = finished(statistics)

    code, _, error = stop(start(), lambda: len(finished(statistics)) == 6, signal.SIGTERM)
    assert code == 128 + signal.SIGTERM
    assert error.startswith("Error: interrupted: the old files stand") and error.count("\n") == 1
    unharmed()
    assert finished(chunks) == second and measured.items() <= finished(statistics).items()
    assert not list(tmp_path.glob(".bundle.tmp-*"))

    ends = "sensitivity-*.json"
    assert not finished(ends)
    code, *_ = stop(start(), lambda: bool(finished(ends)), signal.SIGKILL)
    assert code == -signal.SIGKILL and finished(ends)
    unharmed()

    process = start()
    printed, error = process.communicate(timeout=300)
    assert (process.returncode, error) == (0, "")
    assert [path.name for path in tmp_path.iterdir()] == ["bundle"]
    old, new = content(out), content(classes.path)
    assert old.keys() == new.keys() and all(old[name] == new[name] for name in old if name != MANIFEST)
    again, first_time = Bundle.open(out).manifest, classes.bundle.manifest
    assert again.plan == first_time.plan and again.choice.sensitivity is not None
    assert again.choice.sensitivity == first_time.choice.sensitivity
