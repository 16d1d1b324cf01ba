"""A bundle takes the place of an older one in one step, whoever is stopped, and whoever else writes."""

from __future__ import annotations

import shutil
import signal
import subprocess
import sys
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from helpers import Built, content, environment

from ptqd_export.bundle import Bundle
from ptqd_export.files import exclusive, replacing


def test_an_old_bundle_survives_a_failed_write_and_is_replaced_by_a_good_one(
    bundle: Path, write: Callable[..., Path]
) -> None:
    before = content(bundle)
    with pytest.raises(OSError, match="full"), replacing(bundle) as tmp:
        (tmp / "half").write_text("x")
        raise OSError("disk full")
    assert content(bundle) == before
    write(marker="new")
    assert (bundle / "w8a8.ort-cpu.onnx").read_bytes().count(b"new") == 1
    assert sorted(p.name for p in bundle.parent.iterdir()) == ["bundle"]
    Bundle.open(bundle)


def test_kill_leaves_the_old_bundle_and_the_next_writer_cleans_up(
    bundle: Path, write: Callable[..., Path]
) -> None:
    before = content(bundle)
    code = f"""
import time
from pathlib import Path
from ptqd_export.files import replacing
with replacing(Path({str(bundle)!r})) as tmp:
    (tmp / "half").write_text("x")
    print("ready", flush=True)
    time.sleep(60)
"""
    process = subprocess.Popen(
        [sys.executable, "-c", code], env=environment(), stdout=subprocess.PIPE, text=True
    )
    assert process.stdout is not None
    assert process.stdout.readline() == "ready\n"
    process.send_signal(signal.SIGKILL)
    process.wait()
    process.stdout.close()
    assert content(bundle) == before
    assert len(list(bundle.parent.iterdir())) == 2
    write()
    assert sorted(p.name for p in bundle.parent.iterdir()) == ["bundle"]


def test_a_writer_spares_the_temporary_folder_of_another_that_lives(own: Built, tmp_path: Path) -> None:
    target = tmp_path / "bundle"
    code = f"""
import shutil, sys
from pathlib import Path
from ptqd_export.files import replacing
with replacing(Path({str(target)!r})) as tmp:
    shutil.copytree({str(own.path)!r}, tmp, dirs_exist_ok=True)
    print(tmp, flush=True)
    sys.stdin.readline()
"""
    with subprocess.Popen(
        [sys.executable, "-c", code],
        env=environment(),
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    ) as other:
        assert other.stdout is not None and other.stdin is not None
        theirs = Path(other.stdout.readline().strip())
        (tmp_path / f".bundle.tmp-{'0' * 16}").mkdir()  # left by a writer that is gone
        with replacing(target) as ours:
            shutil.copytree(own.path, ours, dirs_exist_ok=True)
        assert content(theirs) == content(own.path)
        assert {path.name for path in tmp_path.iterdir()} == {"bundle", theirs.name}
        other.stdin.write("\n")
        other.stdin.close()
        assert other.wait(60) == 0
    assert [path.name for path in tmp_path.iterdir()] == ["bundle"]
    Bundle.open(target)


def test_a_lock_is_of_threads_too_and_ends_with_its_block(tmp_path: Path) -> None:
    found: list[Any] = []
    folder = tmp_path / "x"
    folder.mkdir()

    def attempt() -> None:
        try:
            with exclusive(folder):
                found.append("in")
        except Exception as error:
            found.append(str(error))

    with exclusive(folder):
        thread = threading.Thread(target=attempt)
        thread.start()
        thread.join()
    attempt()
    assert "in use" in found[0] and found[1] == "in"
