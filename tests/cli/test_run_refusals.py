"""Options and targets that run does not take: one line, and nothing changed."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from helpers import Built, Invoke, full_disk


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--num-samples", "0"], "'--num-samples': 0 is not in the range x>=1"),
        (["--batch-size", "0"], "'--batch-size': 0 is not in the range x>=1"),
        (["--workers", "0"], "'--workers': 0 is not in the range x>=1"),
        (["--device", "-1"], "'--device': -1 is not in the range x>=0"),
        (["--seed", "-1"], "'--seed': -1 is not in the range 0<=x<=18446744073709551615"),
        (["--seed", str(2**64)], f"'--seed': {2**64} is not in the range 0<=x<=18446744073709551615"),
        (["--class-labels", "5"], "class label 5 is out of range: classes has classes 0 to 4"),
        (["--class-labels", "1,9", "--num-samples", "3"], "class label 9 is out of range"),
        (["--class-labels", "shirt"], "--class-labels 'shirt': expected numbers"),
        (["--class-labels", "1.5"], "--class-labels '1.5': expected numbers"),
        (["--class-labels", "-1"], "--class-labels '-1': expected numbers"),
        (["--class-labels", "4-2"], "--class-labels '4-2' names no class"),
        (["--class-labels", ","], "--class-labels ',' names no class"),
        (
            ["--condition", "text=nowhere.npy"],
            "--condition text=nowhere.npy: cannot read nowhere.npy as .npy",
        ),
        (["--num-samples", "1000000000000000"], "out of memory"),
    ],
)
def test_options(
    classes: Built, place: Path, refused: Callable[..., str], words: list[str], message: str
) -> None:
    out = place / "pictures"
    for workers in ("1", "2"):
        assert message in refused("run", classes.path, "--out", out, "--workers", workers, *words)


def test_a_null_class_is_no_label(guided: Built, place: Path, refused: Callable[..., str]) -> None:
    assert "class label 4 is out of range: guided has classes 0 to 3" in refused(
        "run", guided.path, "--out", place / "x", "--class-labels", "4"
    )


def test_labels_for_a_model_without_classes(rgb: Built, place: Path, refused: Callable[..., str]) -> None:
    assert "class labels were given, but rgb has no classes" in refused(
        "run", rgb.path, "--out", place / "x", "--class-labels", "0"
    )


def test_conditions(own: Built, place: Path, tmp_path: Path, refused: Callable[..., str]) -> None:
    """A pickle is not loaded: its code would have made a file."""
    flag = tmp_path / "was-here"

    class Bomb:
        def __reduce__(self) -> tuple[object, tuple[str, str]]:
            return (Path.write_text, (flag, "x"))  # type: ignore[return-value]

    np.save(tmp_path / "pickle.npy", np.array([Bomb()], object), allow_pickle=True)
    np.save(tmp_path / "wide.npy", np.zeros((2, 7)))
    (tmp_path / "text.npy").write_text("no array")
    words = ("run", own.path, "--out", place / "x", "--format", "npy", "--num-samples", "2", "--condition")
    assert "pickle.npy as .npy (it holds no numbers)" in refused(*words, f"context={tmp_path / 'pickle.npy'}")
    assert not flag.exists()
    np.load(tmp_path / "pickle.npy", allow_pickle=True)
    assert flag.exists()
    assert "condition 'context' has shape (2, 7): expected (2, 6)" in refused(
        *words, f"context={tmp_path / 'wide.npy'}"
    )
    assert "cannot read" in refused(*words, f"context={tmp_path / 'text.npy'}")
    assert "no tensor condition 'text': it takes context" in refused(*words, f"text={tmp_path / 'wide.npy'}")
    assert "give NAME=FILE.npy" in refused(*words, "context")


def test_targets(classes: Built, place: Path, refused: Callable[..., str]) -> None:
    (place / "file").write_text("x")
    for target, message in {
        place / "file": "is a file: give a folder for a set of pictures",
        place / "file" / "below": f"cannot write to {place / 'file'}",
        Path("/proc/pictures"): "cannot write to /proc",
        Path("/sys/pictures"): "cannot write to /sys",
    }.items():
        assert message in refused("run", classes.path, "--out", target, "--num-samples", "1")


def test_the_current_folder_is_no_target(
    classes: Built, place: Path, refused: Callable[..., str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """It would be exchanged under the feet of whoever works there."""
    (place / "pictures").mkdir()
    monkeypatch.chdir(place / "pictures")
    for target in (".", "..", "../pictures", place):
        line = refused("run", classes.path, "--out", target, "--num-samples", "1")
        assert "is the current folder or one above it" in line


def test_a_disk_that_fills_up(rgb: Built, place: Path, refused: Callable[..., str], invoke: Invoke) -> None:
    """Neither a part of the pictures nor a part of one; older pictures stay."""
    with full_disk(1500):  # single pictures fit, the grid does not
        line = refused("run", rgb.path, "--out", place / "new" / "pictures", "--num-samples", "9")
        assert f"cannot write {place / 'new' / 'pictures'}: File too large" in line
    assert invoke("run", rgb.path, "--out", place / "old", "--num-samples", "2").code == 0
    with full_disk(1500):
        refused("run", rgb.path, "--out", place / "old", "--num-samples", "9", "--seed", "1")
        refused("run", rgb.path, "--out", place / "arrays", "--num-samples", "9", "--format", "npy")
