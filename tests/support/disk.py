"""Folders as values, and other processes that write to them."""

from __future__ import annotations

import contextlib
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

from helpers import environment

Names = dict[str, str]
"""Relative path: text."""


def write(folder: Path, content: Names) -> Path:
    for name, text in content.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(text)
    return folder


def read(folder: Path) -> Names:
    """Every file below a folder, hidden ones too."""
    return {str(f.relative_to(folder)): f.read_text() for f in sorted(folder.rglob("*")) if f.is_file()}


HALF = "half of the new"
CODE = """
import sys
from pathlib import Path
from ptqd_export import files
with files.{manager}(Path(sys.argv[1])) as held:
    if isinstance(held, Path):
        (held / "half").write_text("{half}")
    else:
        held.write(b"{half}")
        held.flush()
    print("inside", flush=True)
    sys.stdin.read()
"""


@contextlib.contextmanager
def another(manager: str, path: Path) -> Iterator[subprocess.Popen[str]]:
    """Another process inside `with files.<manager>(path)`, which has written HALF; it goes on when it is told
    to, and is killed in the end."""
    pipe = subprocess.PIPE
    words = [sys.executable, "-c", CODE.format(manager=manager, half=HALF), str(path)]
    with subprocess.Popen(words, env=environment(), stdin=pipe, stdout=pipe, text=True) as process:
        try:
            assert process.stdout is not None and process.stdout.readline() == "inside\n"
            yield process
        finally:
            process.kill()


def go_on(process: subprocess.Popen[str]) -> None:
    """Let another process end its `with` statement."""
    assert process.communicate()[0] == "" and process.returncode == 0
