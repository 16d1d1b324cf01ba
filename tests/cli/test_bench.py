"""bench on the command line."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from helpers import Built, Invoke

SHORT = ("--batch-size", "1", "--rounds", "5", "--runs", "1", "--backend", "ort-cpu")


def test_a_bench_with_a_baseline_and_a_plot(own: Built, invoke: Invoke, tmp_path: Path) -> None:
    words = ("bench", own.path, *SHORT, "--model", own.recipe, "--baseline", "as exported")
    result = invoke(*words, "--plot", tmp_path / "p.png", "--json")
    assert result.code == 0
    found = json.loads(result.out)
    assert found["rows"][0]["name"] == "ORT fp32, as exported" and found["batch"] == 1
    assert {row["kind"] for row in found["rows"]} == {"onnx", "engine"}
    assert (tmp_path / "p.png").read_bytes().startswith(b"\x89PNG")


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (("--baseline", "torch"), "--baseline was given without --model"),
        (("--model", "m", "--baseline", "nobody"), "--baseline nobody is part of none of ORT fp32"),
        (("--plot", "p.jpg"), "--plot p.jpg: expected a .png file"),
    ],
)
def test_wrong_words(own: Built, invoke: Invoke, words: tuple[str, ...], says: str) -> None:
    assert says in invoke("bench", own.path, *words).error
