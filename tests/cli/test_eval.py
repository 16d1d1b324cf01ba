"""eval on the command line: its report, what it keeps, and whose files it leaves alone."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from helpers import Built, Invoke, content

from ptqd_export.evaluate import SEED

WORDS = ("--num-samples", "4", "--resamples", "10", "--batch-size", "2")


def test_eval_writes_a_report(classes: Built, tmp_path: Path, invoke: Invoke) -> None:
    out = tmp_path / "x"
    plans = ("--plan", "w8a8", "--plan", "fp32*1,w4a4*2")
    result = invoke("eval", classes.path, "--out", out, *WORDS, *plans, "--json")
    assert (result.code, result.err) == (0, "")
    assert sorted(path.name for path in out.iterdir()) == ["report.json", "report.md", "report.png"]
    found = json.loads((out / "report.json").read_text())
    assert {"out": str(out), **found} == result.json
    assert [row["plan"] for row in found["rows"]] == ["fp32*3", "w8a8*3", "fp32*1 w4a4*2"]
    assert found["seed"] == SEED and found["samples"] == 4 and found["rows"][1]["gap"] is None
    assert found["notes"] == [
        "without --classifier there are no Frechet and kernel distances, and no agreement of classes"
    ]
    before = content(out)
    again = invoke("eval", classes.path, "--out", out, *WORDS, *plans)
    assert (again.code, again.err) == (0, "") and "| fp32*1 w4a4*2 |" in again.out
    assert content(out) == before
    assert sorted(path.name for path in tmp_path.iterdir()) == ["x", "x.work"]


def test_the_bundle_s_own_plan_against_another(classes: Built, tmp_path: Path, invoke: Invoke) -> None:
    out = tmp_path / "x"
    words = ("--against", "w4a4", "--seed", "3", "--workers", "2", "--json")
    result = invoke("eval", classes.path, "--out", out, *WORDS, *words)
    assert (result.code, result.err) == (0, "")
    assert [row["plan"] for row in result.json["rows"]] == ["w4a4*3", str(classes.bundle.manifest.plan)]
    assert result.json["reference"] == "w4a4*3" and result.json["seed"] == 3


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--plan", "w8a8*2"], "plan has 2 steps, the sampler 3"),
        (["--plan", "w2a2"], "the plan asks for w2a2, but the bundle holds"),
        (["--against", "w8a8*4"], "plan has 4 steps, the sampler 3"),
        (["--classifier", "nowhere.onnx"], "nowhere.onnx does not exist"),
        (["--condition", "text=nowhere.npy"], "cannot read nowhere.npy"),
        (["--num-samples", "1"], "1 is not in the range x>=2"),
    ],
)
def test_refusals(classes: Built, words: list[str], message: str, invoke: Invoke, tmp_path: Path) -> None:
    assert message in invoke("eval", classes.path, "--out", tmp_path / "x", *WORDS, *words).error
    assert list(tmp_path.iterdir()) == []


def test_files_of_somebody_else_stay(classes: Built, tmp_path: Path, invoke: Invoke) -> None:
    (tmp_path / "x").mkdir()
    (tmp_path / "x" / "notes.txt").write_text("mine")
    line = invoke("eval", classes.path, "--out", tmp_path / "x", *WORDS).error
    assert "'notes.txt' is not of a report: give another --out" in line
    (tmp_path / "y.work").mkdir()
    (tmp_path / "y.work" / "notes.txt").write_text("mine")
    line = invoke("eval", classes.path, "--out", tmp_path / "y", *WORDS).error
    assert "y.work is a folder that no build made" in line
    assert content(tmp_path) == {"x/notes.txt": b"mine", "y.work/notes.txt": b"mine"}
