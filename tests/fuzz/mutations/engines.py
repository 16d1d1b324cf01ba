"""Finished engines: no case can run them, but every case opens a bundle that has them."""

from __future__ import annotations

import copy
from typing import Any

from ..base import GIB, Draft, Sparse, Special
from . import mutation
from .manifest import TEXTS

BUILD: dict[str, Any] = {
    "key": "1" * 64, "targets": ["8.9"], "seconds": 1.5, "peak_bytes": 10**9, "weight_bytes": None,
    "scratch_bytes": None,
    "settings": {"rows": [1, 8, 32], "compute_capabilities": [], "optimization_level": None,
    "workspace_mib": None},
    "plan": {"meant": 1, "taken": 1, "fell_back": {}, "kernels": 9, "types": {}}, "variant": "", "notes": [],
}  # fmt: skip


def add(draft: Draft, backend: str = "tensorrt-rtx") -> list[dict[str, Any]]:
    """Engines of every precision of the plan and of the update, of bytes that are none; their entries."""
    data = draft.data
    precisions = list(dict.fromkeys(run.partition("*")[0] for run in data["plan"].split()))
    entries = []
    for precision in precisions:
        entry = {"precision": precision, "backend": backend, "file": f"{precision}.{backend}.engine",
        "lowering": "x",
                 "runtime": "tensorrt-rtx 1.7", "time_ms": None, "build": copy.deepcopy(BUILD)}  # fmt: skip
        data["artifacts"].append(entry)
        entries.append(entry)
    entry = {
        "backend": backend,
        "file": f"update.{backend}.engine",
        "runtime": "x",
        "build": copy.deepcopy(BUILD),
    }
    data["update_engines"].append(entry)
    entries.append(entry)
    for entry in entries:
        draft.contents[entry["file"]] = draft.rng.choice([b"", b"ftrt" + bytes(200), b"\x7fELF", b"x" * 5000])
    return entries


@mutation("engine/garbage")
def garbage(draft: Draft) -> object:
    backend = draft.rng.choice(["tensorrt-rtx", "tensorrt"])
    add(draft, backend)
    return backend


@mutation("engine/sparse", refuse=True, weight=0.5)
def sparse(draft: Draft) -> object:
    """Far larger than the weights that they are made of."""
    entry = draft.rng.choice(add(draft))
    size = draft.rng.choice([GIB, 6 * GIB, 1 << 40])
    draft.contents[entry["file"]] = Sparse(size, b"", "" if size <= 6 * GIB else "0" * 64)
    return size


@mutation("engine/special", refuse=True)
def special(draft: Draft) -> object:
    entry = draft.rng.choice(add(draft))
    kind = draft.rng.choice(["fifo", "socket", "device", "folder"])
    draft.contents[entry["file"]] = Special(kind)
    return kind


@mutation("engine/build", weight=2)
def build(draft: Draft) -> object:
    """What the manifest says of how an engine was made."""
    rng = draft.rng
    made = rng.choice(add(draft))["build"]
    key = rng.choice(sorted(made))
    made[key] = rng.choice(
        [*TEXTS, None, -1, 2**70, 1e308, [], {}, ["\x1b[31m"], ["x" * 5000] * 3, ["8.9"] * 100_000,
        {"rows": [3, 2, 1]},
         {"meant": -1, "taken": 2**70, "fell_back": {"\x1b": "y" * 5000}, "kernels": 0, "types": {}}]
    )  # fmt: skip
    return key, str(made[key])[:40]


@mutation("engine/half")
def half(draft: Draft) -> object:
    """Engines without an update engine, an update engine alone, graphs that claim to be engines."""
    data, rng = draft.data, draft.rng
    entries = add(draft)
    kind = rng.choice(["no update", "update alone", "no build", "graph", "shared", "twice", "weights"])
    if kind == "no update":
        data["update_engines"] = []
    elif kind == "update alone":
        data["artifacts"] = [a for a in data["artifacts"] if a.get("build") is None]
    elif kind == "no build":
        del entries[0]["build"]
    elif kind == "graph":
        entries[0]["file"] = draft.base.graphs[0]
    elif kind == "shared":
        entries[0]["file"] = entries[-1]["file"]
    elif kind == "weights":
        entries[0]["file"] = "weights.safetensors"
    else:
        data["update_engines"] *= 2
    return kind


@mutation("engine/name", refuse=True)
def name(draft: Draft) -> object:
    entry = draft.rng.choice(add(draft))
    entry["file"] = draft.rng.choice(
        ["../canary/secret.bin", str(draft.canary / "secret.bin"), "a.plan", "\x1b[31m.engine", "x/y.engine"]
    )
    draft.contents[entry["file"]] = (draft.canary / "secret.bin").read_bytes()
    return entry["file"]
