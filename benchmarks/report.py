"""Tables of the README: each stands between markers and is rewritten by the script that measured it."""

from __future__ import annotations

import platform
from collections.abc import Sequence
from importlib import metadata
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent


def table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A Markdown table."""
    return "\n".join("| " + " | ".join(row) + " |" for row in [list(header), ["---"] * len(header), *rows])


def machine() -> str:
    """One line: processor, cores and versions."""
    info = Path("/proc/cpuinfo").read_text().splitlines()
    model = next((line.split(":", 1)[1].strip() for line in info if line.startswith("model name")), platform.machine())
    cores = sum(line.startswith("processor") for line in info)
    versions = ", ".join(f"{name} {metadata.version(name)}" for name in ("onnxruntime", "torch"))
    return f"{model}, {cores} cores; {versions}"


def write_section(name: str, text: str, file: Path = ROOT / "README.md") -> None:
    """Replace what stands between `<!-- name: begin ... -->` and `<!-- name: end -->`.

    Raises:
        SystemExit: the markers are not in the file.
    """
    content = file.read_text("utf-8")
    before, begin, rest = content.partition(f"<!-- {name}: begin")
    marker, close, rest = rest.partition("-->\n")
    _, end, after = rest.partition(f"<!-- {name}: end -->")
    if not (begin and close and end):
        raise SystemExit(f"{file} has no section {name}: put `<!-- {name}: begin -->` and `<!-- {name}: end -->` where the table belongs")
    file.write_text(f"{before}{begin}{marker}{close}{text}\n{end}{after}", "utf-8")
