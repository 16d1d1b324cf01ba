"""Which files of a folder anybody opens or changes, by the kernel's word: a runtime in C++ is seen too."""

from __future__ import annotations

import ctypes
import errno
import os
import struct
from collections.abc import Iterator
from pathlib import Path

OPENED = 0x20
CHANGED = 0x2 | 0x4 | 0x40 | 0x80 | 0x100 | 0x200
"""IN_OPEN; IN_MODIFY, IN_ATTRIB, IN_MOVED_FROM, IN_MOVED_TO, IN_CREATE, IN_DELETE."""
HEAD = struct.Struct("iIII")


class Watch:
    """A context manager; watches folders, not what lies below them."""

    def __init__(self) -> None:
        self._libc = ctypes.CDLL(None, use_errno=True)
        self._fd = self._libc.inotify_init1(os.O_NONBLOCK | os.O_CLOEXEC)
        if self._fd < 0:
            raise OSError(ctypes.get_errno(), "inotify_init1")
        self._folders: dict[int, str] = {}

    def add(self, folder: Path, opened: bool) -> None:
        """Watch for changes, and for `opened` as well."""
        mask = CHANGED | (OPENED if opened else 0)
        number = self._libc.inotify_add_watch(self._fd, os.fsencode(folder), mask)
        if number < 0:
            raise OSError(ctypes.get_errno(), f"inotify_add_watch {folder}")
        self._folders[number] = folder.name

    def events(self) -> set[str]:
        """ "<folder>/<file> opened" or "... changed" since the last call."""
        return {f"{folder}/{name} {what}" for folder, name, what in self._events()}

    def _events(self) -> Iterator[tuple[str, str, str]]:
        while True:
            try:
                data = os.read(self._fd, 1 << 16)
            except OSError as error:
                if error.errno == errno.EAGAIN:
                    return
                raise
            at = 0
            while at < len(data):
                number, mask, _, length = HEAD.unpack_from(data, at)
                name = os.fsdecode(data[at + HEAD.size : at + HEAD.size + length].rstrip(b"\0"))
                at += HEAD.size + length
                if number in self._folders and mask & (CHANGED | OPENED) and name:
                    yield self._folders[number], name, "opened" if mask & OPENED else "changed"

    def __enter__(self) -> Watch:
        return self

    def __exit__(self, *exc: object) -> None:
        os.close(self._fd)
