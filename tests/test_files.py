"""Files and folders that are written whole or not at all: on failure, on a kill, on a full disk, side by
side."""

from __future__ import annotations

import hashlib
import os
import subprocess
import sys
from pathlib import Path

import pytest
from disk import HALF, Names, another, go_on, read, write
from helpers import full_disk

from ptqd_export import files
from ptqd_export.errors import PTQDError

# --- one file


def test_a_file_appears_whole(tmp_path: Path) -> None:
    path = tmp_path / "a.bin"
    path.write_text("old")
    with files.writing_file(path) as file:
        file.write(b"new, ")
        file.flush()
        assert path.read_text() == "old"  # until it is whole
        file.write(b"whole")
    assert read(tmp_path) == {"a.bin": "new, whole"}


@pytest.mark.parametrize("old", [None, "old"])
@pytest.mark.parametrize("error", [ValueError, KeyboardInterrupt])
def test_a_failure_leaves_the_old_file(tmp_path: Path, old: str | None, error: type[BaseException]) -> None:
    path = tmp_path / "a.bin"
    if old is not None:
        path.write_text(old)
    with pytest.raises(error), files.writing_file(path) as file:
        file.write(b"half")
        raise error
    assert read(tmp_path) == ({} if old is None else {"a.bin": "old"})


def test_a_kill_leaves_the_old_file(tmp_path: Path) -> None:
    (tmp_path / "out").write_text("old")
    with another("writing_file", tmp_path / "out"):
        pass  # killed
    left = read(tmp_path)
    assert left.pop("out") == "old"
    assert list(left.values()) == [HALF] and next(iter(left)).startswith(".out.")  # beside it
    files.write_file(tmp_path / "out", b"new")
    assert read(tmp_path) == {"out": "new"}  # it removed what the killed one left


def test_only_what_dead_writers_of_the_same_file_left_is_removed(tmp_path: Path) -> None:
    """Parts of this version and of older ones, whose names held no token."""
    with subprocess.Popen([sys.executable, "-c", ""]) as process:
        process.wait()
    dead, alive = process.pid, os.getpid()
    gone = [f".a.1.{dead}.0a1b2c3d.part", f".a.1.{dead}.12345678.part", f".a.1.{dead}.part"]
    kept = [
        f".a.1.{alive}.0a1b2c3d.part",
        f".a.1.{alive}.part",
        f".a.{dead}.0a1b2c3d.part",  # of "a"
        f".b.{dead}.0a1b2c3d.part",
        f".a.1.{dead}.0a1b2c3d.parts",
        f"a.1.{dead}.0a1b2c3d.part",
    ]
    write(tmp_path, dict.fromkeys((*gone, *kept), ""))
    files.write_file(tmp_path / "a.1", b"new")
    assert read(tmp_path) == {"a.1": "new", **dict.fromkeys(kept, "")}


def test_a_file_is_not_written_through_a_link(tmp_path: Path) -> None:
    write(tmp_path, {"theirs": "theirs"})
    (tmp_path / "out").symlink_to("theirs")
    files.write_file(tmp_path / "out", b"ours")
    assert read(tmp_path) == {"out": "ours", "theirs": "theirs"} and not (tmp_path / "out").is_symlink()


def test_two_writers_of_a_file_do_not_mix(tmp_path: Path) -> None:
    with another("writing_file", tmp_path / "out") as process:
        files.write_file(tmp_path / "out", b"ours")
        go_on(process)
    assert read(tmp_path) == {"out": HALF}  # the one that ended last


def test_what_cannot_be_written_is_said(tmp_path: Path) -> None:
    with pytest.raises(PTQDError, match=r"cannot write .*gone/a: No such file or directory: choose another"):
        files.write_file(tmp_path / "gone" / "a", b"")
    (tmp_path / "a").write_text("old")
    with full_disk(1000), pytest.raises(PTQDError, match=r"cannot write .*: File too large"):
        files.write_file(tmp_path / "a", bytes(100_000))
    assert read(tmp_path) == {"a": "old"}
    with full_disk(1000):
        files.write_file(tmp_path / "a", b"fits")
    assert read(tmp_path) == {"a": "fits"}


# --- one folder


@pytest.mark.parametrize("old", [None, {"b": "old", "sub/c": "old"}])
def test_a_folder_appears_whole(tmp_path: Path, old: Names | None) -> None:
    path = tmp_path / "out"
    if old is not None:
        write(path, old)
    with files.replacing(path) as folder:
        write(folder, {"a": "new", "sub/d": "new"})
        assert folder.parent == tmp_path and path.exists() == (old is not None)
        assert old is None or read(path) == old
    assert read(tmp_path) == {"out/a": "new", "out/sub/d": "new"}


@pytest.mark.parametrize("old", [None, {"b": "old"}])
@pytest.mark.parametrize("error", [ValueError, KeyboardInterrupt])
def test_a_failure_leaves_the_old_folder(
    tmp_path: Path, old: Names | None, error: type[BaseException]
) -> None:
    if old is not None:
        write(tmp_path / "out", old)
    with pytest.raises(error), files.replacing(tmp_path / "out") as folder:
        write(folder, {"a": "half"})
        raise error
    assert read(tmp_path) == ({} if old is None else {"out/b": "old"})
    assert [f.name for f in tmp_path.iterdir()] == ([] if old is None else ["out"])


@pytest.mark.parametrize("name", ["out", "o[u]t*"])
def test_a_kill_leaves_the_old_folder_and_the_next_writer_clears_up(tmp_path: Path, name: str) -> None:
    path = write(tmp_path / name, {"b": "old"})
    with another("replacing", path):
        pass  # killed
    assert read(path) == {"b": "old"}
    (half,) = (f for f in tmp_path.iterdir() if f != path)
    assert read(half) == {"half": HALF}
    with files.replacing(path) as folder:
        assert not half.exists()
        write(folder, {"a": "new"})
    assert read(tmp_path) == {f"{name}/a": "new"}
    assert [f.name for f in tmp_path.iterdir()] == [name]


def test_a_writer_leaves_what_others_write(tmp_path: Path) -> None:
    """A half folder is stale only once its writer is dead; and one of another target is never touched."""
    with another("replacing", tmp_path / "out") as process:
        (half,) = tmp_path.iterdir()
        write(tmp_path / ".outer.tmp-1", {"x": "of another target"})
        for target in ("out", "o*"):
            with files.replacing(tmp_path / target) as folder:
                write(folder, {"a": "ours"})
        assert read(half) == {"half": HALF} and (tmp_path / ".outer.tmp-1" / "x").exists()
        go_on(process)
    assert read(tmp_path / "out") == {"half": HALF} and not half.exists()


def test_a_system_that_cannot_exchange_folders_keeps_the_old_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Two renames would leave a moment in which neither stands."""

    def missing(name: object, use_errno: bool = False) -> None:
        raise OSError("no libc")

    write(tmp_path / "out", {"b": "old"})
    with monkeypatch.context() as patch, pytest.raises(PTQDError, match="cannot be replaced in one step"):
        patch.setattr(files.ctypes, "CDLL", missing)
        with files.replacing(tmp_path / "out") as folder:
            write(folder, {"a": "new"})
    assert read(tmp_path) == {"out/b": "old"}
    with files.replacing(tmp_path / "out") as folder:
        write(folder, {"a": "new"})
    assert read(tmp_path) == {"out/a": "new"} and [f.name for f in tmp_path.iterdir()] == ["out"]


def test_replacing_through_a_link_keeps_the_link(tmp_path: Path) -> None:
    write(tmp_path / "real", {"b": "old"})
    (tmp_path / "out").symlink_to("real")
    with files.replacing(tmp_path / "out") as folder:
        write(folder, {"a": "new"})
    assert (tmp_path / "out").is_symlink() and read(tmp_path / "real") == {"a": "new"}


# --- small ones


def test_digests(tmp_path: Path) -> None:
    data = os.urandom(3 << 20)
    (tmp_path / "a").write_bytes(data)
    assert files.sha256_file(tmp_path / "a") == hashlib.sha256(data).hexdigest()
    assert files.digest("a", b"b") == files.digest(b"a", "b") != files.digest("ab") != files.digest("a", "")
    assert files.digest("ab", "c") != files.digest("a", "bc")  # each part with its length


def test_link_or_copy(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source = write(tmp_path, {"a": "content"}) / "a"
    files.link_or_copy(source, tmp_path / "linked")
    assert os.path.samefile(source, tmp_path / "linked")

    def across(a: object, b: object, follow_symlinks: bool = True) -> None:
        raise OSError(18, "Invalid cross-device link")

    monkeypatch.setattr(files.os, "link", across)
    files.link_or_copy(source, tmp_path / "copied")
    assert not os.path.samefile(source, tmp_path / "copied")
    assert (tmp_path / "copied").read_text() == "content"


def test_cache_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    assert files.cache_folder() == tmp_path / "cache" / "ptqd-export"
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
    assert files.cache_folder() is None
    monkeypatch.delenv("XDG_CACHE_HOME")
    monkeypatch.setenv("HOME", str(tmp_path))
    assert files.cache_folder() == tmp_path / ".cache" / "ptqd-export"
