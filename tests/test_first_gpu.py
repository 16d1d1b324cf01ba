"""benchmarks/first_gpu.py: with no GPU, with checks that crash or hang, and runs that are taken up."""

from __future__ import annotations

import importlib
import json
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
from helpers import environment

from ptqd_export import backends
from ptqd_export.core.backend import ORT_CPU

ROOT = Path(__file__).resolve().parent.parent
SCRIPT = ROOT / "benchmarks" / "first_gpu.py"
ARTIFICIAL = '''
import atexit, ctypes, os, subprocess, threading, time
import numpy as np
from first_gpu_process import Skipped
from ptqd_export.errors import GraphError

def machine(job, tell):
    tell("gpus", ["Fake GPU (8.9)"])
    return "one"

def states(job, tell):
    return "none asked"

def good(job, tell):
    """Says
    things.

    More."""
    tell("numbers", {"a": np.float32(1.5), "b": np.inf, "c": (np.int64(3), 1 / 3)})
    with open(job.work / "count", "a") as file:
        file.write("x")
    return "fine"

def bad(job, tell):
    tell("before", 1)
    with open(job.work / "count-bad", "a") as file:
        file.write("x")
    raise ValueError("two\\nlines")

def wrong(job, tell):
    raise GraphError("the graph is wrong")

def skips(job, tell):
    raise Skipped("there is none here")

def crashes(job, tell):
    tell("before", 1)
    print("the library says", flush=True)
    ctypes.string_at(0)

def hangs(job, tell):
    tell("child", subprocess.Popen(["sleep", "60"]).pid)
    time.sleep(60)

def lingers(job, tell):
    threading.Thread(target=time.sleep, args=(60,)).start()
    return "done"

def dies_late(job, tell):
    atexit.register(os.abort)
    return "done"
'''


@pytest.fixture
def script(monkeypatch: pytest.MonkeyPatch) -> Callable[[str], ModuleType]:
    monkeypatch.syspath_prepend(ROOT / "benchmarks")
    return importlib.import_module


@pytest.fixture
def artificial(script: Callable[[str], ModuleType], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    """Checks that a process of its own can import."""
    folder = tmp_path / "modules"
    folder.mkdir()
    (folder / "artificial_checks.py").write_text(ARTIFICIAL)
    monkeypatch.syspath_prepend(folder)
    monkeypatch.delitem(sys.modules, "artificial_checks", raising=False)
    return script("artificial_checks")


def gpu_works() -> bool:
    return any(state == "ok" for name, state in backends.available().items() if name != ORT_CPU)


def checks_in(path: Path) -> dict[str, Any]:
    (run,) = json.loads(path.read_bytes())["runs"]
    return dict(run["checks"])


def numbers(value: Any) -> list[Any]:
    """All numbers in a JSON value."""
    if isinstance(value, dict | list):
        return [n for item in (value.values() if isinstance(value, dict) else value) for n in numbers(item)]
    return [value] if isinstance(value, int | float) else []


@pytest.mark.skipif(gpu_works(), reason="a backend for GPUs works here")
def test_without_a_gpu_nothing_is_claimed(tmp_path: Path) -> None:
    out = tmp_path / "x" / "first.json"
    command = [sys.executable, str(SCRIPT), "--tiny", "--out", str(out)]
    done = subprocess.run(command, env=environment(), capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (0, "")
    found = checks_in(out)
    ran = ["machine", "backends"]
    assert [name for name, check in found.items() if check["status"] == "ok"] == ran
    for name, check in found.items():
        assert numbers(check["figures"]) == [] and check["why"] and "\n" not in check["why"]
        assert name in ran or (check["status"], check["seconds"], check["figures"]) == ("skipped", None, {})
    lines = done.stdout.splitlines()
    assert [line.split()[:2] for line in lines[: len(found)]] == [[n, c["status"]] for n, c in found.items()]
    assert lines[-1] == str(out) and f"2 ok, 0 failed, {len(found) - 2} skipped" in lines
    (run,) = json.loads(out.read_bytes())["runs"]
    assert run["identity"]["model"] == "tiny" and "numpy" in run["identity"]["versions"]
    assert sorted(path.name for path in (tmp_path / "x").iterdir()) == ["first", "first.json"]


def test_list_and_usage(script: Callable[[str], ModuleType], capsys: pytest.CaptureFixture[str]) -> None:
    first_gpu = script("first_gpu")
    assert first_gpu.main(["--list"]) == 0
    lines = capsys.readouterr().out.splitlines()
    every = first_gpu.all_checks()
    assert [line.split()[0] for line in lines] == [check.name for check in every]
    assert all(check.proves.endswith(".") and check.limit <= 300 for check in every)
    for wrong, message in (
        (["--only", "x"], "there is no check x"),
        (["--tiny", "--bundle", "x"], "not allowed"),
    ):
        with pytest.raises(SystemExit):
            first_gpu.main(wrong)
        assert message in capsys.readouterr().err


def test_the_last_run_is_published(
    script: Callable[[str], ModuleType], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    first_gpu, written = script("first_gpu"), dict[str, str]()
    monkeypatch.setattr(first_gpu, "write_section", written.__setitem__)
    out = tmp_path / "x.json"
    with pytest.raises(SystemExit, match=r"x\.json holds no run: run this script without --write"):
        first_gpu.main(["--out", str(out), "--write"])
    ledger = first_gpu.Ledger(out)
    for gpu, why in (("An old one", "seen before"), ("Fake GPU, 1.0, 8.9", "fine")):
        machine = {"nvidia_smi": [gpu]}
        key = ledger.open({"machine": machine, "versions": {"python": "3.12", "torch": "2"}}, "abc")
        ledger.put(key, "machine", first_gpu.Record("ok", why, 1.0))
        ledger.put(key, "cuda-graphs", first_gpu.Record("skipped", "none here"))
    assert first_gpu.main(["--out", str(out), "--write"]) == 0
    text = written.pop("first-gpu")
    assert text.startswith("Fake GPU, 1.0, 8.9; python 3.12.\n") and "| machine | ok | fine |" in text
    assert "1 ok, 0 failed, 0 skipped" in text and "none here" not in text and "seen before" not in text


def test_every_need_is_met_by_an_earlier_check(script: Callable[[str], ModuleType]) -> None:
    before: set[str] = set()
    for check in script("first_gpu").all_checks():
        assert {*check.after} <= before
        before.add(check.name)


def isolated(artificial: Any, name: str, folder: Path, seconds: float = 30.0) -> Any:
    process = importlib.import_module("first_gpu_process")
    job = process.Job(folder, folder / "bundle", seconds=seconds)
    return process.isolated(getattr(artificial, name), job, folder / f"{name}.log")


@pytest.mark.parametrize(
    ("name", "status", "why", "figures"),
    [
        ("good", "ok", "fine", {"numbers": {"a": 1.5, "b": None, "c": [3, 0.33333]}}),
        ("bad", "failed", "ValueError: two lines (log: ", {"before": 1}),
        ("wrong", "failed", "the graph is wrong (log: ", {}),
        ("skips", "skipped", "there is none here", {}),
        ("crashes", "failed", "crashed: SIGSEGV (log: ", {"before": 1}),
        ("dies_late", "failed", "done; then it crashed: SIGABRT (log: ", {}),
    ],
)
def test_how_a_check_ends(
    artificial: Any, tmp_path: Path, name: str, status: str, why: str, figures: dict[str, Any]
) -> None:
    record = isolated(artificial, name, tmp_path)
    assert (record.status, record.figures) == (status, figures) and record.why.startswith(why)
    log = (tmp_path / f"{name}.log").read_text()
    assert ("in good" in log or ("the library says" in log and "in crashes" in log)) == (name == "crashes")


def runs(pid: int) -> bool:
    """A process is there, and no zombie."""
    try:
        return not Path(f"/proc/{pid}/stat").read_text().rpartition(") ")[2].startswith("Z")
    except OSError:
        return False


def test_a_check_that_hangs(artificial: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """It is ended, and what it started with it; its log says where it hung."""
    started = time.monotonic()
    record = isolated(artificial, "hangs", tmp_path, seconds=6)
    assert record.status == "failed" and record.why.startswith("timed out after 6 s, killed")
    assert "in hangs" in (tmp_path / "hangs.log").read_text()
    deadline = time.monotonic() + 5
    while runs(record.figures["child"]):
        assert time.monotonic() < deadline
        time.sleep(0.05)
    monkeypatch.setattr(importlib.import_module("first_gpu_process"), "ENDING_S", 0.5)
    record = isolated(artificial, "lingers", tmp_path)
    assert record.status == "failed" and record.why.startswith("done; then it hung as it ended, killed")
    assert time.monotonic() - started < 40


def test_a_run_is_taken_up(
    script: Callable[[str], ModuleType],
    artificial: Any,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """Successes are kept, failures tried again; nothing holds for other versions, sources, or other code."""
    first_gpu = script("first_gpu")
    out = tmp_path / "first.json"
    checks = [
        first_gpu.Check(name, getattr(artificial, name), 30.0)
        for name in ("machine", "states", "good", "bad")
    ]
    checks.append(first_gpu.Check("after", artificial.good, 30.0, after=("bad",)))

    def run(*more: str) -> tuple[int, int]:
        """How often good and bad have run."""
        assert first_gpu.main(["--out", str(out), "--tiny", *more], checks) == 1
        counts = (tmp_path / "first" / name for name in ("count", "count-bad"))
        return tuple(len(path.read_text()) for path in counts)  # type: ignore[return-value]

    assert run() == (1, 1)
    before = checks_in(out)
    assert before["after"]["status"] == "skipped" and "needs bad" in before["after"]["why"]
    assert run() == (1, 2) and "from an earlier run: fine" in capsys.readouterr().out
    after = checks_in(out)
    assert after["good"] == before["good"] and after["bad"]["figures"] == {"before": 1}
    assert run("--again") == (2, 3)
    assert run("--only", "bad") == (2, 4) and checks_in(out)["good"]["status"] == "ok"
    monkeypatch.setattr(first_gpu, "versions", lambda: {"numpy": "0.1"})
    assert run() == (3, 5)
    first, second = json.loads(out.read_bytes())["runs"]
    assert second["identity"]["versions"] == {"numpy": "0.1"} != first["identity"]["versions"]
    assert {*first["checks"]} == {*second["checks"]}
    monkeypatch.setattr(first_gpu, "sources", lambda: "others")
    assert run() == (4, 6)
    monkeypatch.setattr(first_gpu.Check, "source", "other code")
    assert run() == (5, 7)


def test_no_time_is_left(
    script: Callable[[str], ModuleType],
    artificial: Any,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """What there is no time for is skipped, and replaces nothing that was tried."""
    first_gpu = script("first_gpu")
    monkeypatch.setattr(first_gpu, "sources", lambda: "mine")
    out = str(tmp_path / "first.json")
    checks = [
        first_gpu.Check(name, getattr(artificial, name), 30.0) for name in ("machine", "states", "good")
    ]
    for minutes, status in (("0", "skipped"), ("10", "ok"), ("0", "ok")):
        assert first_gpu.main(["--out", out, "--minutes", minutes, "--again"], checks) == 0
        assert checks_in(Path(out))["good"]["status"] == status
    assert "no time is left of 0 minutes: run it again" in capsys.readouterr().out
    Path(out).write_text("{}")
    with pytest.raises(SystemExit, match="is not a file of this script"):
        first_gpu.main(["--out", out], checks)
    with pytest.raises(SystemExit, match="is not a bundle"):
        first_gpu.main(["--out", f"{out}2", "--bundle", str(tmp_path)], checks)
