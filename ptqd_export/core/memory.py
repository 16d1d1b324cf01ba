"""How much memory this machine has, and how much of it is free; a control group's limit counts."""

from __future__ import annotations

import contextlib
import os
from pathlib import Path

GIB = 1 << 30
_MEMINFO, _GROUPS = Path("/proc/meminfo"), Path("/sys/fs/cgroup")


def available_bytes() -> int:
    """Free memory in bytes: what the system has left, but no more than the control group's limit leaves."""
    free = _of_system("MemAvailable")
    limit = _GROUPS / "memory.max"
    if limit.exists() and (most := limit.read_text().strip()) != "max":
        stat = dict(line.split() for line in (_GROUPS / "memory.stat").read_text().splitlines())
        used = int((_GROUPS / "memory.current").read_text()) - int(
            stat["inactive_file"]
        )  # the kernel reclaims inactive page cache
        free = min(free, max(0, int(most) - used))
    return free


def total_bytes() -> int:
    """The machine's memory in bytes, or what its control group may take: the same at every call."""
    total = _of_system("MemTotal")
    for limit in (_GROUPS / "memory.max", _GROUPS / "memory" / "memory.limit_in_bytes"):
        with contextlib.suppress(OSError, ValueError):  # "max" is no number
            total = min(total, int(limit.read_text()))
    return total


def _of_system(field: str) -> int:
    if _MEMINFO.exists():
        fields = dict(line.split(":", 1) for line in _MEMINFO.read_text().splitlines())
        return int(fields[field].split()[0]) * 1024
    # macOS does not report free memory: the installed memory is the bound there.
    return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
