"""How much memory this machine has, and how much of it is free; a control group's limit counts."""

from __future__ import annotations

import contextlib
import os
from pathlib import Path
from typing import NamedTuple

GIB = 1 << 30
_MEMINFO = Path("/proc/meminfo")


class _Group(NamedTuple):
    """Where a version of control groups tells of memory."""

    folder: Path
    most: str
    used: str
    inactive: str

    def limit(self) -> int:
        """Bytes; ValueError where there is none ("max")."""
        return int((self.folder / self.most).read_text())


_GROUPS = (
    _Group(Path("/sys/fs/cgroup"), "memory.max", "memory.current", "inactive_file"),
    _Group(
        Path("/sys/fs/cgroup/memory"),
        "memory.limit_in_bytes",
        "memory.usage_in_bytes",
        "total_inactive_file",
    ),
)


def available_bytes() -> int:
    """Free memory in bytes: what the system has left, but no more than the control group's limit leaves."""
    free = _of_system("MemAvailable")
    for group in _GROUPS:
        with contextlib.suppress(OSError, ValueError, KeyError):
            stat = dict(line.split() for line in (group.folder / "memory.stat").read_text().splitlines())
            # The kernel reclaims inactive page cache.
            used = int((group.folder / group.used).read_text()) - int(stat[group.inactive])
            free = min(free, max(0, group.limit() - used))
    return free


def total_bytes() -> int:
    """The machine's memory in bytes, or what its control group may take: the same at every call."""
    total = _of_system("MemTotal")
    for group in _GROUPS:
        with contextlib.suppress(OSError, ValueError):
            total = min(total, group.limit())
    return total


def _of_system(field: str) -> int:
    if _MEMINFO.exists():
        fields = dict(line.split(":", 1) for line in _MEMINFO.read_text().splitlines())
        return int(fields[field].split()[0]) * 1024
    # macOS does not report free memory: the installed memory is the bound there.
    return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
