"""Sections of README.md and docs/ that scripts write: each stands between markers and is replaced whole."""

from __future__ import annotations

import json
import platform
import subprocess
import sys
from collections.abc import Sequence
from importlib import metadata
from pathlib import Path
from typing import Any

from ptqd_export.backends import saturates

ROOT = Path(__file__).resolve().parent.parent
OUT = ROOT / "benchmarks" / "out"
"""What the scripts keep between runs; git ignores it."""
REFERENCE_MODEL = ROOT / "calib" / "fashion_mnist"
TEXT_MODEL = ROOT / "calib" / "cifar10_text"
REFERENCE_BUNDLE = ROOT / "engines" / "fashion_mnist"

_README, _BENCHMARKS = ROOT / "README.md", ROOT / "docs" / "benchmarks.md"
SECTIONS = {
    "summary": _README,
    "step-time": _BENCHMARKS,
    "step-time-models": _BENCHMARKS,
    "step-time-threads": _BENCHMARKS,
    "plan-gain": _BENCHMARKS,
    "graph-rewrites": _BENCHMARKS,
    "ort-options": _BENCHMARKS,
    "float-layers": _BENCHMARKS,
    "parity": _BENCHMARKS,
    "false-alarms": _BENCHMARKS,
    "weights": _BENCHMARKS,
    "engine-builds": _BENCHMARKS,
    "input-grids": _BENCHMARKS,
    "quality-headline": _BENCHMARKS,
    "quality-ablation": _BENCHMARKS,
    "quality-paper": _BENCHMARKS,
    "quality-paper-long": _BENCHMARKS,
    "text-model": _BENCHMARKS,
    "one-step": _BENCHMARKS,
    "plan-ranking": _BENCHMARKS,
    "rounding": _BENCHMARKS,
    "switching": _BENCHMARKS,
    "first-gpu": ROOT / "docs" / "gpu.md",
    "solvers": ROOT / "docs" / "solvers.md",
    "recipe-keys": ROOT / "docs" / "recipe.md",
    "stock-pipelines": ROOT / "docs" / "models.md",
    "coverage": ROOT / "docs" / "models.md",
    "ldm-configurations": ROOT / "docs" / "models.md",
    "calibration-cost": _BENCHMARKS,
    "full-size": ROOT / "docs" / "models.md",
    "ray-sampling": ROOT / "docs" / "many-machines.md",
}
"""{section: the file that it stands in}."""


def table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A Markdown table."""
    return "\n".join("| " + " | ".join(row) + " |" for row in [list(header), ["---"] * len(header), *rows])


def count_threads(n: int | str) -> str:
    """A number of threads, or "all"."""
    return f"{n} thread" if str(n) == "1" else f"{n} threads"


def read_tables(text: str) -> list[list[dict[str, str]]]:
    """The Markdown tables of a text: a row is {column: cell}."""
    found: list[list[dict[str, str]]] = []
    header: list[str] = []
    for line in text.splitlines():
        if not line.startswith("|"):
            header = []
            continue
        cells = [cell.strip() for cell in line.strip("|").split("|")]
        if not header:
            header = cells
            found.append([])
        elif set(cells) != {"---"}:
            found[-1].append(dict(zip(header, cells, strict=True)))
    return found


def machine(*distributions: str) -> str:
    """One line: processor, cores, and versions of these packages."""
    info = Path("/proc/cpuinfo").read_text("utf-8").splitlines()
    names = (line.split(":", 1)[1].strip() for line in info if line.startswith("model name"))
    cores = sum(line.startswith("processor") for line in info)
    versions = ", ".join(
        f"{name} {metadata.version(name)}" for name in distributions or ("onnxruntime", "torch")
    )
    slow = " without VNNI" if saturates() else ""
    return f"{next(names, platform.machine())}, {cores} cores{slow}; {versions}"


class Kept(dict[str, Any]):
    """Figures by row, in a JSON file below OUT, so that a rerun of single rows keeps the others.

    What a row holds under "machine" is what it was measured on.
    """

    def __init__(self, name: str) -> None:
        self._file = OUT / f"{name}.json"
        super().__init__(json.loads(self._file.read_text("utf-8")) if self._file.is_file() else {})

    def keep(self, row: str, figures: Any) -> None:
        """Put a row's figures into the file."""
        self[row] = figures
        OUT.mkdir(parents=True, exist_ok=True)
        self._file.write_text(json.dumps(self, indent=1), "utf-8")

    def machines(self) -> str:
        """What the rows were measured on."""
        return "; ".join(sorted({figures["machine"] for figures in self.values()}))


def read_section(name: str) -> str:
    """The text between `<!-- name: begin -->` and `<!-- name: end -->`.

    Raises:
        SystemExit: the markers are not in the section's file.
    """
    return _split(name)[1]


def write_section(name: str, text: str) -> None:
    """Replace the text of a section.

    Raises:
        SystemExit: the markers are not in the section's file.
    """
    before, _, after = _split(name)
    SECTIONS[name].write_text(f"{before}{text.strip()}\n{after}", "utf-8")


def _split(name: str) -> tuple[str, str, str]:
    """The section's file up to its text, the text, and what follows."""
    begin, end = f"<!-- {name}: begin -->\n", f"<!-- {name}: end -->"
    before, found, rest = SECTIONS[name].read_text("utf-8").partition(begin)
    text, found_end, after = rest.partition(end)
    if not (found and found_end):
        raise SystemExit(
            f"{SECTIONS[name]} has no section {name}: put `{begin.strip()}` and `{end}` where it belongs"
        )
    return before + begin, text.strip(), end + after


_CHILD = """
import os, subprocess, sys, time
begin = time.monotonic()
process = subprocess.Popen(sys.argv[1:], stdout=sys.stderr)
_, status, usage = os.wait4(process.pid, 0)
print(time.monotonic() - begin, usage.ru_maxrss * 1024)
sys.exit(os.waitstatus_to_exitcode(status) != 0)
"""


def command_cost(words: Sequence[str]) -> tuple[float, float]:
    """Run ptqd-export: (seconds, bytes at the peak).

    Started by a small process of its own, as Linux counts what the parent had for the child too.

    Raises:
        SystemExit: it failed; says what it printed.
    """
    command = [sys.executable, "-c", _CHILD, sys.executable, "-m", "ptqd_export", *words]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        raise SystemExit(f"ptqd-export {' '.join(words)}:\n{done.stderr[-2000:]}")
    seconds, peak = done.stdout.split()
    return float(seconds), float(peak)
