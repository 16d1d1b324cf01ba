"""Builds on a disk that fills up: the bundle stays as it was, and what is left is taken up."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path

import pytest
from helpers import SMALL, Built, Invoke, full_disk, listing
from safetensors.numpy import load_file

from ptqd_export.files import MARK


def test_a_disk_that_fills_up_in_the_trajectories(
    own: Built, place: Path, refused: Callable[..., str]
) -> None:
    with full_disk(2048):
        for out in (place / "bundle", place / "new" / "deep"):
            line = refused("build", own.recipe, "--out", out, *SMALL)
            assert "cannot write" in line and "File too large" in line and "free some space" in line


@pytest.mark.parametrize("limit", [5000, 12_000, 20_000])
def test_a_disk_that_fills_up_later(own: Built, place: Path, invoke: Invoke, limit: int) -> None:
    """In the weights or one of the graphs: the bundle is as it was, and what is left is whole and taken up by
    the next build."""
    out, work = place / "bundle", place / "bundle.work"
    before = listing(out)
    words = ("build", own.recipe, "--out", out, *own.options, "--seed", "3", "--batch-size", "1")
    with full_disk(limit):
        line = invoke(*words).error
    assert "cannot write" in line or "cannot be written" in line or "cannot be loaded" in line, line
    assert listing(out) == before
    assert {path.name for path in place.iterdir()} == {"bundle", "bundle.work"}
    kept = {name: stamp for name, stamp in listing(work).items() if (work / name).is_file() and name != MARK}
    assert len(kept) == 6 + 6 and all(name.endswith(".safetensors") for name in kept)
    for name in kept:
        load_file(work / name)
    with full_disk(limit):
        assert _unnumbered(invoke(*words).error) == _unnumbered(line)
    assert {name: listing(work)[name] for name in kept} == kept


def _unnumbered(line: str) -> str:
    """Without what each writer draws for the name of its own temporary folder."""
    return re.sub(r"\.tmp-[0-9a-f]{16}", ".tmp", line)
