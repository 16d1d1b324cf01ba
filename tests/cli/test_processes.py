"""Runs that are stopped from outside: Ctrl-C, and a worker that dies."""

from __future__ import annotations

import os
import signal
import subprocess
import time
from collections.abc import Callable
from pathlib import Path

import pytest
from helpers import Built, Launch


def loaded(pid: int) -> bool:
    """The process has loaded ONNX Runtime; False also where there is no such process."""
    try:
        return "onnxruntime" in Path(f"/proc/{pid}/maps").read_text()
    except OSError:
        return False


def workers_of(process: subprocess.Popen[str]) -> list[int]:
    """The worker processes that have loaded the runtime."""
    children = Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()
    found = []
    for pid in children:
        try:
            # Between fork and exec a child has its parent's maps, but not yet its own arguments.
            if loaded(int(pid)) and "spawn_main" in Path(f"/proc/{pid}/cmdline").read_text():
                found.append(int(pid))
        except OSError:
            continue
    return found


def wait(process: subprocess.Popen[str], until: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 120
    while not until():
        assert process.poll() is None and time.monotonic() < deadline
        time.sleep(0.01)


def cpu_seconds(pid: int) -> float:
    """Of a process, with what ended of its children."""
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(") ")[2].split()
    return sum(map(int, fields[11:13])) / os.sysconf("SC_CLK_TCK")


@pytest.mark.parametrize(("workers", "batch"), [(1, 300), (2, 6000)])
def test_ctrl_c_ends_a_run_with_one_line(
    rgb: Built, tmp_path: Path, launch: Launch, workers: int, batch: int
) -> None:
    """With workers as fast as without: nobody waits until their batches, of half a minute each, are done."""
    words = ("--num-samples", 100 * batch, "--batch-size", batch, "--workers", workers)
    process = launch("run", rgb.path, "--out", tmp_path / "x", *words)
    wait(process, lambda: loaded(process.pid) if workers == 1 else len(workers_of(process)) == 2)
    pids = [process.pid] if workers == 1 else workers_of(process)
    started = {pid: cpu_seconds(pid) for pid in pids}
    # Amid a batch: a worker opens its engines in less.
    wait(process, lambda: all(cpu_seconds(pid) - started[pid] > 2 for pid in pids))
    os.killpg(process.pid, signal.SIGINT)
    told = time.monotonic()
    printed, error = process.communicate(timeout=60)
    assert time.monotonic() - told < 10
    assert (process.returncode, printed) == (130, "")
    assert error.startswith("Error: interrupted") and error.count("\n") == 1
    assert not any(loaded(pid) for pid in pids)
    assert list(tmp_path.iterdir()) == []


def test_a_dead_worker_is_one_line(rgb: Built, tmp_path: Path, launch: Launch) -> None:
    words = ("--num-samples", "100000", "--batch-size", "4", "--workers", "2")
    process = launch("run", rgb.path, "--out", tmp_path / "x", *words)
    # Those two, and not the one that measures backends before.
    wait(process, lambda: len(workers_of(process)) == 2)
    os.kill(workers_of(process)[0], signal.SIGKILL)
    printed, error = process.communicate(timeout=60)
    assert (process.returncode, printed) == (1, "")
    assert error.startswith("Error: a worker process died") and error.count("\n") == 1
    assert list(tmp_path.iterdir()) == []
