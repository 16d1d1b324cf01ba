"""files: which folder may be replaced or worked in, and what is left alone."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
from disk import HALF, another, read, write
from helpers import full_disk

from ptqd_export import files
from ptqd_export.errors import BundleError, PTQDError, RecipeError

# --- check_target


def nothing_is(inside: list[Path]) -> str | None:
    raise AssertionError("an empty folder has nothing in the way")


def all_but_a(inside: list[Path]) -> str | None:
    other = [f.name for f in inside if f.name != "a"]
    return f"{', '.join(other)}; give another" if other else None


def test_a_target_that_may_be_replaced(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "empty").mkdir()
    write(tmp_path / "ours", {"a": "1"})
    (tmp_path / "link").symlink_to("ours")
    monkeypatch.chdir(tmp_path)
    before = sorted(tmp_path.rglob("*"))
    assert files.check_target(Path("new"), "a bundle", nothing_is) == tmp_path / "new"
    assert files.check_target(Path("far/below/new"), "a bundle", nothing_is) == tmp_path / "far/below/new"
    assert files.check_target(Path("empty"), "a bundle", nothing_is) == tmp_path / "empty"
    assert files.check_target(Path("ours"), "a bundle", all_but_a) == tmp_path / "ours"
    assert files.check_target(Path("link"), "a bundle", all_but_a) == tmp_path / "ours"
    assert sorted(tmp_path.rglob("*")) == before  # nothing is left behind


@pytest.mark.parametrize(
    ("target", "message"),
    [
        (
            ".",
            "is the current folder or one above it, which a bundle would replace: give a folder of its own",
        ),
        ("..", "is the current folder or one above it"),
        ("/", "is the current folder or one above it"),
        ("file", "file is a file: give a folder for a bundle"),
        ("file/below", "cannot write to .*Not a directory"),
        ("others", r"others is a folder with other things in it: b, c; give another"),
        ("loop/x", r"cannot write to .*loop/x' \(.*\); give another folder"),
        ("nul\0", r"cannot write to '.*nul\\x00' \(.*null byte.*\); give another folder"),
        ("n" * 300, "cannot write to .*File name too long.*; give another folder"),
    ],
)
def test_a_target_that_must_not_be_replaced(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, target: str, message: str
) -> None:
    here = tmp_path / "here"
    write(here, {"file": "", "others/a": "", "others/b": "", "others/c": ""})
    (here / "loop").symlink_to("loop")
    monkeypatch.chdir(here)
    before = sorted(tmp_path.rglob("*"))
    with pytest.raises(RecipeError, match=message) as caught:
        files.check_target(Path(target), "a bundle", all_but_a)
    assert str(caught.value).isprintable()
    assert sorted(tmp_path.rglob("*")) == before


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write everywhere")
def test_a_target_without_permission(tmp_path: Path) -> None:
    ours = write(tmp_path / "ours", {"a": "1"})
    ours.chmod(0o500)
    with pytest.raises(RecipeError, match="ours is read-only: make it writable"):
        files.check_target(ours, "a bundle", all_but_a)
    ours.chmod(0o700)
    tmp_path.chmod(0o500)
    with pytest.raises(RecipeError, match=r"cannot write to .*: Permission denied; give a folder"):
        files.check_target(tmp_path / "new", "a bundle", nothing_is)
    tmp_path.chmod(0o700)


def test_permission_is_asked_for_by_trying(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The same for root, who may write everywhere: the system says no."""
    ours = write(tmp_path / "ours", {"a": "1"})
    monkeypatch.setattr(files.os, "access", lambda path, mode: False)
    with pytest.raises(RecipeError, match="ours is read-only: make it writable, or give another folder"):
        files.check_target(ours, "a bundle", all_but_a)

    def denied(self: Path, *args: object, **kwargs: object) -> None:
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(Path, "mkdir", denied)
    with pytest.raises(RecipeError, match=r"cannot write to .*: Permission denied; give a folder you may"):
        files.check_target(tmp_path / "new", "a bundle", nothing_is)


# --- one process at a time


def test_a_folder_is_for_one_process(tmp_path: Path) -> None:
    path = tmp_path / "out"
    path.mkdir()
    with (
        another("exclusive", path),
        pytest.raises(BundleError, match="out is in use by another build"),
        files.exclusive(path),
    ):
        pass
    with files.exclusive(path) as folder:  # the lock goes with the process
        assert read(folder) == {"half": HALF}


@pytest.mark.parametrize("kind", ["link", "file", "broken link"])
def test_only_a_folder_is_locked(tmp_path: Path, kind: str) -> None:
    write(tmp_path, {"theirs/a": "theirs", "file": "theirs"})
    (tmp_path / "link").symlink_to("theirs")
    (tmp_path / "broken link").symlink_to("nothing")
    with (
        pytest.raises(BundleError, match=f"{kind} is a link or a file: remove it, or give another"),
        files.exclusive(tmp_path / kind),
    ):
        pass
    with files.exclusive(tmp_path / "theirs"):
        pass


def test_a_work_folder_goes_if_nothing_is_left_in_it(tmp_path: Path) -> None:
    out = tmp_path / "far" / "out"
    with files.work_folder(out) as work:
        assert work == tmp_path / "far" / "out.work"
        (work / "steps").mkdir()
    assert not (tmp_path / "far").exists()
    with files.work_folder(out) as work:
        write(work, {"steps/1": "done"})
    assert read(tmp_path) == {"far/out.work/steps/1": "done", f"far/out.work/{files.MARK}": ""}
    with files.work_folder(out) as work:
        assert read(work) == {"steps/1": "done", files.MARK: ""}  # taken up
    with files.work_folder(out, resume=False) as work:
        assert read(work) == {files.MARK: ""}
    assert list(tmp_path.iterdir()) == [tmp_path / "far"]  # it was not made for this call


def test_a_work_folder_that_is_not_ours_is_left_alone(tmp_path: Path) -> None:
    out, work = tmp_path / "out", tmp_path / "out.work"

    def refused(message: str) -> None:
        before = sorted((f, f.is_symlink()) for f in tmp_path.rglob("*"))
        for resume in (True, False):
            with pytest.raises(BundleError, match=message), files.work_folder(out, resume):
                pass
        assert sorted((f, f.is_symlink()) for f in tmp_path.rglob("*")) == before

    write(work, {"thesis.tex": "theirs"})
    refused(r"out\.work is a folder that no build made: move it away, or give another --out")
    (work / files.MARK).symlink_to("thesis.tex")
    refused(r"out\.work is a folder that no build made")
    (work / files.MARK).unlink()
    write(work, {files.MARK: ""})
    with files.work_folder(out) as folder:  # the mark makes it ours
        assert folder == work
    write(work, {"steps/1": ""})
    (work / "steps" / "2").symlink_to(tmp_path)
    refused(r"out\.work holds a link, '2': remove it, or give another --out")
    (work / "steps" / "2").unlink()
    work.rename(tmp_path / "elsewhere")
    work.symlink_to("elsewhere")
    refused(r"out\.work is a link or a file: remove it")


def test_a_work_folder_says_what_failed(tmp_path: Path) -> None:
    with (
        full_disk(1000),
        pytest.raises(PTQDError, match=r"cannot write .*File too large: free some space or choose another"),
        files.work_folder(tmp_path / "out") as work,
    ):
        write(work, {"half": "x" * 100_000})
    with (
        another("work_folder", tmp_path / "out"),
        pytest.raises(BundleError, match=r"out\.work is in use by another build"),
        files.work_folder(tmp_path / "out"),
    ):
        pass
