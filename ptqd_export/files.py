"""Files and folders that are written whole or not at all, whoever stops the program and whenever: once, for
all writers.

Nothing is followed or written through a symbolic link, and nothing is removed that this package did not make:
folders of its own are told by their names and by a mark inside.
"""

from __future__ import annotations

import contextlib
import ctypes
import errno
import fcntl
import hashlib
import os
import re
import shutil
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from secrets import token_hex
from typing import BinaryIO

from .errors import BundleError, PTQDError, RecipeError
from .typed import brief

MARK = ".ptqd-export-work"
"""In a work folder: it is this package's own, and may be emptied and removed."""
PART = re.compile(r"\.(?P<name>.+?)\.(?P<pid>[0-9]+)\.(?:[0-9a-f]{8}\.)?part|\.probe\.[0-9]+")
"""Names of files that were not finished, of this version and of older ones."""


def sha256_file(path: Path) -> str:
    """SHA-256 of a file, read in pieces."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def digest(*parts: bytes | str) -> str:
    """SHA-256 over parts, each with its length: the key under which results are kept."""
    total = hashlib.sha256()
    for part in parts:
        data = part.encode() if isinstance(part, str) else part
        total.update(len(data).to_bytes(8, "little") + data)
    return total.hexdigest()


def fsync(path: Path) -> None:
    """What was written to a file or folder is on the disk when this returns."""
    fd = os.open(path, os.O_RDONLY | os.O_NOFOLLOW)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)


@contextlib.contextmanager
def writing_file(path: Path, clear: bool = True) -> Iterator[BinaryIO]:
    """A file to fill beside `path`; on success it takes the place of `path`, on failure it goes.

    Args:
        clear: what killed writers of the same file left is removed, for which the folder is listed.
    Raises:
        OSError: it cannot be written.
    """
    if clear:
        _remove_parts(path)
    part = path.with_name(f".{path.name}.{os.getpid()}.{token_hex(4)}.part")
    fd = os.open(part, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC, 0o666)
    try:
        with open(fd, "wb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        os.replace(part, path)
    finally:
        with contextlib.suppress(OSError):
            part.unlink(missing_ok=True)


def _remove_parts(path: Path) -> None:
    """Remove what writers of `path` left that are no longer alive."""
    with contextlib.suppress(OSError):
        for other in path.parent.iterdir():
            match = PART.fullmatch(other.name)
            if match and match["name"] == path.name and not _alive(int(match["pid"])):
                other.unlink(missing_ok=True)


def _alive(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except (OSError, OverflowError):
        return True
    return True


def write_file(path: Path, data: bytes) -> None:
    """Write a file, whole or not at all.

    Raises:
        PTQDError: the file cannot be written.
    """
    try:
        with writing_file(path) as file:
            file.write(data)
    except OSError as error:
        raise PTQDError(
            f"cannot write {path}: {error.strerror}: choose another place or free some space"
        ) from error


InTheWay = Callable[[list[Path]], str | None]
"""Given what a folder holds, says what of it is not to be removed; None where all of it may be."""


def check_inside(folder: Path, name: Path, in_the_way: InTheWay) -> None:
    """Raise RecipeError, calling the folder `name`, where something in it is not to be removed."""
    inside = sorted(folder.iterdir())
    other = in_the_way(inside) if inside else None
    if other is not None:
        raise RecipeError(f"{name} is a folder with other things in it: {other}")


def check_target(path: Path, what: str, in_the_way: InTheWay) -> Path:
    """Refuse, before any work, a folder that cannot or must not be replaced. Leaves nothing behind.

    Args:
        what: that the folder is for: "a bundle".
        in_the_way: of the folder, if it stands.
    Returns:
        the target, absolute and without links.
    Raises:
        RecipeError: a file, the current folder or one above it, a folder with other things in it, or no
            permission.
    """
    try:
        path, here = path.resolve(), Path.cwd()
        if path == here or path in here.parents:
            raise RecipeError(
                f"{path} is the current folder or one above it, which {what} would replace: give a folder of "
                "its own"
            )
        if path.exists() and not path.is_dir():
            raise RecipeError(f"{path} is a file: give a folder for {what}")
        if path.is_dir():
            check_inside(path, path, in_the_way)
            if any(path.iterdir()) and not os.access(path, os.W_OK):
                raise RecipeError(f"{path} is read-only: make it writable, or give another folder")
        parent = next(folder for folder in path.parents if folder.exists())
    except (OSError, RuntimeError, ValueError) as error:
        told = getattr(error, "strerror", None) or brief(str(error))
        raise RecipeError(f"cannot write to {brief(str(path))} ({told}); give another folder") from error
    _remove_probes(parent, path.name)
    try:
        probe = parent / f".{path.name}.probe-{token_hex(4)}"
        probe.mkdir()
        with contextlib.suppress(FileNotFoundError):  # another one's clearing up was faster
            probe.rmdir()
    except OSError as error:
        raise RecipeError(
            f"cannot write to {parent}: {error.strerror}; give a folder you may write to"
        ) from error
    return path


def _remove_probes(parent: Path, name: str) -> None:
    """Remove the empty folders that checks of the target `name` left which were killed."""
    probe = re.compile(re.escape(f".{name}.probe-") + "[0-9a-f]{8}")
    with contextlib.suppress(OSError):
        for stale in parent.iterdir():
            if probe.fullmatch(stale.name):
                with contextlib.suppress(OSError):  # not empty, or no folder: not ours
                    stale.rmdir()


@contextlib.contextmanager
def exclusive(folder: Path, what: str = "build") -> Iterator[Path]:
    """`folder`, which exists, for this process alone; the lock goes with the process, however it ends.

    Args:
        what: another process does with it, in words.
    Raises:
        BundleError: another process has it, or it is a link.
    """
    try:
        lock = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC)
    except OSError as error:
        if error.errno in (errno.ELOOP, errno.ENOTDIR):
            raise BundleError(f"{folder} is a link or a file: remove it, or give another --out") from error
        raise
    try:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise BundleError(
                f"{folder} is in use by another {what}: wait until that one has ended, or give another --out"
            ) from error
        if not folder.exists() or not os.path.samestat(os.fstat(lock), os.stat(folder)):
            raise BundleError(
                f"{folder} was removed by another {what}, which has just ended: run the command again"
            )
        yield folder
    finally:
        os.close(lock)


@contextlib.contextmanager
def work_folder(out: Path, resume: bool = True) -> Iterator[Path]:
    """`<out>.work` for this process alone; it goes again, and folders made for it, if nothing is left in it
    to take up.

    It is this package's own only with its mark in it: a folder of that name that somebody else made is
    refused.

    Raises:
        BundleError: another build works on the same target; or the folder is not ours, or holds a link.
        PTQDError: in place of an OSError, which is a disk that is full or fails.
    """
    work = out.resolve().with_name(out.name + ".work")
    made = [folder for folder in work.parents if not folder.exists()]
    try:
        work.parent.mkdir(parents=True, exist_ok=True)
        with contextlib.suppress(FileExistsError):
            work.mkdir()
        with exclusive(work):
            _check_own(work)
            try:
                if not resume:
                    empty_folder(work)
                yield work
            finally:
                _remove_if_empty(work)
                for folder in made:
                    with contextlib.suppress(OSError):  # what holds something stays
                        folder.rmdir()
    except OSError as error:
        raise PTQDError(
            f"cannot write {error.filename or out}: {error.strerror or error}: free some space or choose "
            "another --out; "
            "the same command takes up what is finished"
        ) from error


def _check_own(work: Path) -> None:
    """Mark a new work folder; refuse one that is not marked, or in which a link could lead elsewhere."""
    mark = work / MARK
    if not any(work.iterdir()):
        os.close(os.open(mark, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW, 0o666))
    if mark.is_symlink() or not mark.is_file():
        raise BundleError(f"{work} is a folder that no build made: move it away, or give another --out")
    for folder, folders, files in os.walk(work):
        for name in (*folders, *files):
            if os.path.islink(os.path.join(folder, name)):
                raise BundleError(f"{work} holds a link, {brief(name)}: remove it, or give another --out")


def empty_folder(work: Path) -> None:
    """Remove what a work folder holds: nothing is left to take up."""
    for old in work.iterdir():
        if old.name != MARK:
            shutil.rmtree(old) if old.is_dir() else old.unlink()


def _remove_if_empty(work: Path) -> None:
    """Remove the folder where nothing but its mark, and empty folders, are in it."""
    with contextlib.suppress(OSError):
        for folder in work.glob("*/"):
            with contextlib.suppress(OSError):
                folder.rmdir()
        if [inside.name for inside in work.iterdir()] == [MARK]:
            (work / MARK).unlink()
        work.rmdir()


@contextlib.contextmanager
def replacing(path: Path, in_the_way: InTheWay = lambda inside: None) -> Iterator[Path]:
    """A folder to fill; on success it becomes `path` in one step, replacing an older one; on failure it is
    removed.

    A kill leaves the old folder, or none; what killed writers left beside it is removed by the next one.

    Args:
        in_the_way: as of `check_target`; asked again of what was replaced, before that is removed.
    Raises:
        RecipeError: the old folder holds something by now that is not to be removed; it stands as it was.
        PTQDError: the file system cannot put one folder in the place of another in one step.
    """
    path = path.resolve()
    made = [folder for folder in path.parents if not folder.exists()]
    path.parent.mkdir(parents=True, exist_ok=True)
    own = re.compile(re.escape(f".{path.name}.tmp-") + "[0-9a-f]{16}")
    for stale in path.parent.iterdir():
        if own.fullmatch(stale.name):
            with contextlib.suppress(BundleError, OSError), exclusive(stale):
                shutil.rmtree(stale, ignore_errors=True)
    tmp = path.parent / f".{path.name}.tmp-{token_hex(8)}"
    tmp.mkdir()  # fails if anything stands there
    with exclusive(tmp):
        try:
            yield tmp
            for file in tmp.rglob("*"):
                fsync(file)
            fsync(tmp)
            _put(tmp, path, in_the_way)
            fsync(path.parent)
        finally:
            shutil.rmtree(tmp, ignore_errors=True)
            for folder in made:
                with contextlib.suppress(OSError):  # what holds something stays
                    folder.rmdir()


def _put(new: Path, path: Path, in_the_way: InTheWay) -> None:
    """Put a folder at `path`; an older one that stands there goes to `new`, if all of it may be removed."""
    if not path.exists():
        try:
            os.rename(new, path)
        except OSError as error:
            if error.errno not in (errno.ENOTEMPTY, errno.EEXIST):
                raise
        else:
            return
    _exchange(new, path)
    try:
        check_inside(new, path, in_the_way)
    except RecipeError:
        _exchange(new, path)
        raise


def _exchange(a: Path, b: Path) -> None:
    """Swap two folders in one step: renameat2 on Linux, renamex_np on macOS.

    Raises:
        PTQDError: this system or file system cannot. Two renames would leave a moment in which neither folder
            stands.
    """
    at_fdcwd, exchange = -100, 2
    names = os.fsencode(a), os.fsencode(b)
    reason = "this system has no call for it"
    with contextlib.suppress(AttributeError, OSError):
        library = ctypes.CDLL(None, use_errno=True)
        if sys.platform == "darwin":
            code = library.renamex_np(*names, exchange)
        else:
            code = library.renameat2(at_fdcwd, names[0], at_fdcwd, names[1], exchange)
        if code == 0:
            return
        reason = os.strerror(ctypes.get_errno())
    raise PTQDError(
        f"{b} cannot be replaced in one step ({reason}): move the old one away, or give another --out, "
        "on another file system"
    )


def link_or_copy(source: Path, target: Path) -> None:
    """The content of `source` at `target`: by a hard link where both lie on one disk."""
    try:
        os.link(source, target, follow_symlinks=False)
    except OSError:
        shutil.copyfile(source, target)


def cache_folder() -> Path | None:
    """The folder of this user's caches, which speed things up and decide nothing; None where there can be
    none."""
    try:
        folder = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "ptqd-export"
        folder.mkdir(parents=True, exist_ok=True)
    except (OSError, RuntimeError):  # RuntimeError: a user without a home
        return None
    return folder
