"""What is said of times: medians, and ratios only where they can be told."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from ptqd_export.bench.report import Bench, Row, RunRow, bench_text, plot_bench, ratio
from ptqd_export.core.plan import parse_plan
from ptqd_export.core.precision import Precision
from ptqd_export.errors import PTQDError
from ptqd_export.typed import to_plain


def row(name: str, ms: tuple[float, ...], **about: str) -> Row:
    return Row(name, about.get("kind", "engine"), about.get("detail", "w8a8"), "ort-cpu", ms, 0.5, 2_000_000)


STEADY = row("slow", (10.0, 10.1, 9.9, 10.0, 10.2))
FOUND = Bench(
    "m", "0" * 64, 4, 1, 5,
    (STEADY, row("fast", (4.0, 4.1, 4.0, 3.9, 4.0)), row("like it", (9.7, 10.3, 10.0, 9.6, 10.4))),
    {"fast": {"QLinearConv": 0.003, "Add": 0.001}},
    (
        RunRow.of("fp32*2", "ort-cpu", [(0.022, 0.020), (0.020, 0.019), (0.024, 0.020)], 0.0),
        RunRow.of("w8a8*2", "ort-cpu", [(0.011, 0.010), (0.010, 0.010), (0.012, 0.010)], 0.0002),
    ),
    {"machine": "x86_64"},
)  # fmt: skip


def test_a_ratio_is_told_only_beyond_its_spread() -> None:
    fast, alike = (FOUND.ratio(r) for r in FOUND.rows[1:])
    assert fast.value == pytest.approx(2.5) and str(fast) == "2.50x" and fast.low < 2.5 < fast.high
    assert str(alike) == "-"
    text = bench_text(FOUND)
    assert "2.50x" in text and "-: no nearer or farther from 1" in text
    assert "fast: QLinearConv 75%, Add 25%" in text
    lines = [line.split() for line in text.splitlines()]
    assert ["fp32*2", "ort-cpu", "22", "+10.0%", "+0.00"] in lines
    assert ["w8a8*2", "ort-cpu", "11", "2.00x", "+10.0%", "+0.20"] in lines


def test_a_ratio_pairs_the_rounds() -> None:
    """A load on the machine that hits both in the same rounds does not widen the interval."""
    rng = np.random.default_rng(3)
    load = 1 + rng.random(40)
    a, b = 2.0 * load, 1.0 * load
    paired, loose = ratio(a, b), ratio(a, rng.permutation(b))
    assert paired.high - paired.low < 1e-12 < loose.high - loose.low


def test_the_spread_is_of_the_middle_half() -> None:
    assert row("x", (1.0, 1.0, 1.0, 1.0, 9.0)).spread == 0.0
    assert row("x", (1.0, 2.0, 3.0, 4.0, 5.0)).spread == pytest.approx(1 / 3)


def test_a_bench_is_json() -> None:
    plain = to_plain(FOUND)
    assert plain["rows"][1]["milliseconds"] == [4.0, 4.1, 4.0, 3.9, 4.0] and plain["runs"][1]["switch"] == 0.2


def test_a_plot_has_a_point_per_engine_and_plan(tmp_path: Path) -> None:
    both = replace(FOUND, rows=(*FOUND.rows, row("precise", (8.0,) * 5, detail="w8a16")))
    low, high, none = (
        {Precision(8, 8): np.full(2, e), Precision(8, 16): np.full(2, 1e-6)} for e in (1e-4, 1e-2, 0.0)
    )
    own, mixed, other = (parse_plan(text, 2) for text in ("w8a8", "w8a16,w8a8", "fp32,w8a8"))
    cases = ((low, own), (high, own), (low, own), (none, own), (low, mixed), (low, other))
    pictures = []
    for errors, plan in cases:
        plot_bench(both, errors, [plan], tmp_path / "p.png")
        pictures.append((tmp_path / "p.png").read_bytes())
    assert pictures[0].startswith(b"\x89PNG") and pictures[0] == pictures[2]
    assert pictures[5] == pictures[0]  # no engine of fp32 was timed
    assert len({*pictures}) == 4
    with pytest.raises(PTQDError, match="nowhere"):
        plot_bench(FOUND, none, [], tmp_path / "nowhere" / "p.png")
