"""Builders that are killed, and disks that fill up under them: the bundle stays, and whole engines are taken
up."""

from __future__ import annotations

import contextlib
import os
import re
import shutil
import signal
import subprocess
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from helpers import RTX, Built, Invoke, Launch, content, copied, engines_of, full_disk

from ptqd_export import rebuild
from ptqd_export.bundle import Bundle
from ptqd_export.files import sha256_file

pytest.importorskip("tensorrt_rtx")

needs_proc = pytest.mark.skipif(not Path("/proc/self/stat").exists(), reason="looks for processes in /proc")
REBUILD = ("--backend", RTX, "--rebuild", "--format", "npy")


def _parent(pid: int) -> int:
    """0 where there is no such process any more."""
    try:
        state, parent = Path(f"/proc/{pid}/stat").read_text().rpartition(") ")[2].split()[:2]
    except OSError:
        return 0
    return 0 if state in "ZX" else int(parent)


def _wait(until: Callable[[], Any], what: str) -> Any:
    end = time.monotonic() + 120
    while not (found := until()):
        assert time.monotonic() < end, f"waited in vain until {what}"
        time.sleep(0.002)
    return found


def _builder(process: subprocess.Popen[str], work: Path, finished: int) -> int:
    """The builder that works after so many engines, stopped while it does."""

    def found() -> int:
        assert process.poll() is None, process.communicate()
        done = len(list(work.glob("engines/[!.]*.json"))) if work.exists() else 0
        if done < finished:
            return 0
        for pid in (int(path.name) for path in Path("/proc").iterdir() if path.name.isdecimal()):
            # Before exec it is a copy of its parent, which waits for it to become another.
            if _parent(pid) == process.pid and b"main(request)" in Path(f"/proc/{pid}/cmdline").read_bytes():
                os.kill(pid, signal.SIGSTOP)
                return pid
        return 0

    return int(_wait(found, "a builder worked"))


@pytest.fixture
def start(place: Path, launch: Launch) -> Iterator[Callable[[], subprocess.Popen[str]]]:
    """`run --rebuild` as a process; whatever becomes of it, the bundle is as it was."""
    before = content(place / "bundle")
    yield lambda: launch("run", place / "bundle", *REBUILD, "--out", place.parent / "x")
    assert content(place / "bundle") == before
    Bundle.open(place / "bundle")
    assert not (place.parent / "x").exists()


def _halves(place: Path) -> list[Path]:
    """What is not whole: every hidden file but the mark of the work folder."""
    return [path for path in place.rglob(".*") if path.name != ".ptqd-export-work"]


@needs_proc
def test_the_builder_is_killed(place: Path, start: Callable[[], subprocess.Popen[str]]) -> None:
    process = start()
    os.kill(_builder(process, place / "bundle.work", 1), signal.SIGKILL)
    out, error = process.communicate(timeout=60)
    assert (process.returncode, out) == (1, "")
    found = re.fullmatch(
        r"Error: the builder of (\S+) was ended, most likely because memory ran out: .*; its log is (\S+)\n",
        error,
    )
    assert found is not None, error
    log = Path(found[2])
    assert found[1] == "w8a8.half.onnx"
    assert log.is_file() and log.parent == place / "bundle.work" / "engines"
    assert {path.name for path in place.iterdir()} == {"bundle", "bundle.work"}
    assert not _halves(place)


@needs_proc
def test_ctrl_c_while_an_engine_is_built(place: Path, start: Callable[[], subprocess.Popen[str]]) -> None:
    process = start()
    builder = _builder(process, place / "bundle.work", 0)
    os.killpg(process.pid, signal.SIGINT)
    out, error = process.communicate(timeout=60)
    assert (process.returncode, out) == (130, "")
    assert error.startswith("Error: interrupted: the old files stand") and error.count("\n") == 1
    # It may have been stopped before its parent knew it: then it ends with its stdin.
    with contextlib.suppress(ProcessLookupError):
        os.kill(builder, signal.SIGCONT)
    _wait(lambda: not _parent(builder), "the builder was gone")
    assert not _halves(place)


@needs_proc
def test_killed_while_an_engine_is_built(
    place: Path, tmp_path: Path, start: Callable[[], subprocess.Popen[str]]
) -> None:
    process = start()
    builder = _builder(process, place / "bundle.work", 2)
    process.kill()
    process.wait(60)
    os.kill(builder, signal.SIGCONT)
    _wait(lambda: not _parent(builder), "the builder ended too")
    process.communicate()
    shutil.copytree(place, tmp_path / "again")
    said: list[str] = []
    bundle = rebuild(Bundle.open(tmp_path / "again" / "bundle"), RTX, said.append)
    assert [line.endswith("unchanged, not built again") for line in said] == [True, True, False, False, False]
    assert len(engines_of(bundle)) == 5
    assert "bundle.work" not in {path.name for path in (tmp_path / "again").iterdir()}


@needs_proc
def test_a_build_that_is_killed_and_resumed(
    classes: Built, tmp_path: Path, launch: Launch, invoke: Invoke
) -> None:
    """`build`, over an older bundle: it stays until the new one is whole."""
    bundle = copied(classes, tmp_path)
    before = content(bundle)
    words = ("build", classes.recipe, "--out", bundle, "--n-steps", "2", "--calib-size", "2")
    words = (*words, "--precision", "w8a8", "--precision", "w4a8", "--plan", "w8a8,w4a8")
    words = (*words, "--backend", RTX, "--compute-capability", "8.9", "--json")
    process = launch(*words)
    builder = _builder(process, bundle.with_name("bundle.work"), 1)
    process.kill()
    os.kill(builder, signal.SIGCONT)
    _wait(lambda: not _parent(builder), "the builder ended too")
    process.communicate()
    assert content(bundle) == before
    left = {sha256_file(path) for path in bundle.with_name("bundle.work").glob("engines/[!.]*.engine")}
    assert len(left) == 1
    result = invoke(*words)
    assert (result.code, result.err) == (0, "")
    assert {a["precision"] for a in result.json["engines"]} == {"w8a8", "w4a8"}
    assert [u["file"] for u in result.json["update_engines"]] == [f"update.{RTX}.engine"]
    assert left == {sha256_file(bundle / f"w8a8.{RTX}.engine")}
    assert {path.name for path in bundle.parent.iterdir()} == {"bundle"}
    assert Bundle.open(bundle).manifest.backends == (RTX,)


# --- full disks


@pytest.mark.parametrize(
    ("limit", "message"),
    [
        (20_000, r"cannot write \S*/fp32\.tensorrt-rtx\.log: File too large"),
        (1_000_000, r"cannot write the engine of \d+ bytes into \S*engines"),
    ],
)
def test_a_disk_that_fills_up_under_the_builder(
    place: Path, invoke: Invoke, limit: int, message: str
) -> None:
    before = content(place / "bundle")
    with full_disk(limit):
        line = invoke("run", place / "bundle", *REBUILD, "--out", place / "x").error
    assert re.search(message, line) and "free some space" in line
    assert content(place / "bundle") == before
    assert {path.name for path in place.iterdir()} == {"bundle", "bundle.work"}
    assert not list(place.rglob("*.engine"))


def test_a_disk_that_is_really_full(own: Built, tmp_path: Path, invoke: Invoke) -> None:
    """At every point of the road, and then with room enough; needs the right to mount."""
    disk = tmp_path / "disk"
    disk.mkdir()

    def mount(size: str, *options: str) -> bool:
        words = ["mount", "-t", "tmpfs", "-o", ",".join((*options, f"size={size}")), "none", str(disk)]
        return (
            shutil.which("mount") is not None
            and subprocess.run(words, capture_output=True, check=False).returncode == 0
        )

    if not mount("2m"):
        pytest.skip("no file system can be mounted here")
    try:
        shutil.copytree(own.path, disk / "bundle")
        before = content(disk / "bundle")
        finished = []
        for size in ("2m", "6m"):
            assert mount(size, "remount")
            line = invoke("run", disk / "bundle", *REBUILD, "--out", tmp_path / "x").error
            assert "cannot write" in line and "No space left on device" in line, line
            assert "free some space" in line, line
            assert content(disk / "bundle") == before
            assert {path.name for path in disk.iterdir()} == {"bundle", "bundle.work"}
            reports = disk.glob("bundle.work/engines/[!.]*.json")
            finished.append({path.stem for path in reports if path.stat().st_size})
        assert mount("200m", "remount")
        said: list[str] = []
        bundle = rebuild(Bundle.open(disk / "bundle"), RTX, said.append)
        assert sum("unchanged" in line for line in said) >= len(finished[-1]) >= len(finished[0])
        assert len(engines_of(bundle)) == 5 and {path.name for path in disk.iterdir()} == {"bundle"}
    finally:
        subprocess.run(["umount", str(disk)], check=True)
