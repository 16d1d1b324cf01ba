"""Polygraphy's comparison of what two runtimes compute."""

from __future__ import annotations

import math
import os
import re
import sys
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from onnx import numpy_helper

from ptqd_export.backends import OrtEngine
from ptqd_export.core.engine import EPSILON, SAMPLE, FakeEngine, Feeds
from ptqd_export.errors import BackendUnavailable, GraphError, ParityError
from ptqd_export.parity import polygraphy
from ptqd_export.parity.polygraphy import Result, Source, parser_verdict

pytest.importorskip("polygraphy")


def compare(engines: dict[str, Source], feeds: Sequence[Feeds]) -> list[Result]:
    return list(polygraphy.compare(engines, feeds))


def _feeds(*seeds: int) -> list[Feeds]:
    """A standard normal sample each, (2, 3, 4, 4), with its power made 1."""
    found = []
    for seed in seeds:
        x = np.random.default_rng(seed).standard_normal((2, 3, 4, 4))
        found.append(
            {"sample": (x / np.sqrt((x**2).mean())).astype(np.float32), "timestep": np.array([seed, seed])}
        )
    return found


def _fake(
    function: Callable[[Feeds], Any], inputs: tuple[str, ...] = ("sample", "timestep")
) -> Callable[[], FakeEngine]:
    return lambda: FakeEngine(function, inputs)


IDENTITY = _fake(lambda feeds: feeds[SAMPLE])


def test_equal_engines() -> None:
    feeds = _feeds(1, 2)
    got = compare({"a": IDENTITY, "b": IDENTITY}, feeds)
    assert [result.snr for result in got] == [{"epsilon": math.inf}] * 2
    for result, feed in zip(got, feeds, strict=True):
        assert list(result.outputs) == ["a", "b"]
        for outputs in result.outputs.values():
            np.testing.assert_array_equal(outputs[EPSILON], feed[SAMPLE])


@pytest.mark.parametrize("dtype", ["float32", "float16"])
def test_figures_of_a_known_difference(dtype: str) -> None:
    """A factor of 1.01 is 40 dB. float16 holds 1.01 x to 2**-11, 54 dB or more below: 0.4 dB of it, and 2**-9
    of values up to 4."""
    x, off = 1.0, 0.01
    feeds = _feeds(1, 2, 3)
    got = compare({"a": IDENTITY, "b": _fake(lambda f: ((x + off) * f[SAMPLE]).astype(dtype))}, feeds)
    assert [list(result.snr) for result in got] == [["epsilon"]] * 3
    for result in got:
        assert result.snr[EPSILON] == pytest.approx(40, abs=1e-3 if dtype == "float32" else 0.8)
    largest = max(float(np.abs(f[SAMPLE]).max()) for f in feeds)
    differences = (r.outputs["b"][EPSILON].astype(np.float64) - r.outputs["a"][EPSILON] for r in got)
    found = max(float(np.abs(difference).max()) for difference in differences)
    assert found == pytest.approx(off * largest, abs=1e-6 if dtype == "float32" else 2**-9)


def test_every_feed_has_its_own_figure() -> None:
    """Each lies off by one in ten to its timestep; the first engine is the reference."""

    def off(feeds: Feeds) -> Any:
        return feeds[SAMPLE] * np.float32(1 + 10.0 ** -float(feeds["timestep"][0]))

    for order in ((1, 2, 3), (3, 2, 1)):
        got = compare({"a": IDENTITY, "b": _fake(off)}, _feeds(*order))
        assert [result.snr[EPSILON] for result in got] == pytest.approx([20.0 * n for n in order], abs=1e-2)
    (other_way,) = compare({"b": _fake(off), "a": IDENTITY}, _feeds(1))
    assert other_way.snr[EPSILON] == pytest.approx(20 * np.log10(1.1 / 0.1), abs=1e-2)


def test_results_come_one_by_one() -> None:
    """What is not asked for any more is not computed, and the engines are closed."""
    opened: list[FakeEngine] = []

    def make() -> FakeEngine:
        opened.append(FakeEngine(lambda f: f[SAMPLE]))
        return opened[-1]

    results = polygraphy.compare({"a": make, "b": make}, _feeds(1, 2, 3))
    next(results)
    assert [engine.calls for engine in opened] == [1, 1]
    results.close()  # type: ignore[attr-defined]
    assert all(engine.closed for engine in opened)


def test_a_parser_tells_what_it_refuses(tmp_path: Path) -> None:
    pytest.importorskip("tensorrt_rtx")
    text = "g (float[2, 3] x) => (float[2, 3] y) { a = Relu(x) y = %s(a) }"
    for op, verdict in (
        ("Sigmoid", "^ok$"),
        ("Det2", "^In node 1 with name: and operator: Det2 .*Plugin not found"),
    ):
        path = tmp_path / f"{op}.onnx"
        onnx.save(onnx.parser.parse_model(f'<ir_version: 10, opset_import: ["": 21]> {text % op}'), path)
        assert re.search(verdict, parser_verdict("tensorrt-rtx", path))
    assert parser_verdict("tensorrt-rtx", tmp_path / "nowhere.onnx").startswith("the parser ended with 1: ")
    assert "POLYGRAPHY_USE_TENSORRT_RTX" not in os.environ
    assert sorted(file.name for file in tmp_path.iterdir()) == ["Det2.onnx", "Sigmoid.onnx"]


def test_engines_are_closed() -> None:
    opened: list[FakeEngine] = []

    def make(function: Callable[[Feeds], Any]) -> FakeEngine:
        opened.append(FakeEngine(function))
        return opened[-1]

    right, wrong = partial(make, lambda f: f[SAMPLE]), partial(make, lambda f: f[SAMPLE] * np.nan)
    compare({"a": right, "b": right}, _feeds(1))
    with pytest.raises(ParityError):
        compare({"a": right, "b": wrong}, _feeds(1))
    assert len(opened) == 4 and all(engine.closed for engine in opened)


def _fail(feeds: Feeds) -> Any:
    raise BackendUnavailable("memory ran out")


class Other(FakeEngine):
    """An engine whose output has another name."""

    outputs = ("other",)

    def __call__(self, feeds: Feeds) -> Any:
        return {"other": feeds[SAMPLE]}


@pytest.mark.parametrize(
    ("engines", "feeds", "kind", "message"),
    [
        (
            {"a": IDENTITY},
            _feeds(1),
            GraphError,
            "got 1 engines and 1 feeds: give two engines and at least one feed",
        ),
        (
            {"a": IDENTITY, "b": IDENTITY, "c": IDENTITY},
            _feeds(1),
            GraphError,
            "got 3 engines and 1 feeds: give two engines",
        ),
        ({"a": IDENTITY, "b": IDENTITY}, [], GraphError, "got 2 engines and 0 feeds"),
        (
            {"a": IDENTITY, "b": lambda: Other(lambda f: f[SAMPLE])},
            _feeds(1),
            GraphError,
            "b has no output 'epsilon': got other",
        ),
        (
            {"a": IDENTITY, "b": _fake(lambda f: f[SAMPLE], ("sample", "labels"))},
            _feeds(1),
            GraphError,
            "b needs the input 'labels': got sample",
        ),
        (
            {"a": IDENTITY, "b": _fake(lambda f: f[SAMPLE][:1])},
            _feeds(1),
            ParityError,
            r"b gives 'epsilon' the shape \(1, 3, 4, 4\), a \(2, 3",
        ),
        (
            {"a": IDENTITY, "b": _fake(lambda f: f[SAMPLE] / 0)},
            _feeds(1),
            ParityError,
            "b computes NaN or infinite values in 'epsilon'",
        ),
        (
            {"a": _fake(lambda f: f[SAMPLE] / 0), "b": IDENTITY},
            _feeds(1),
            ParityError,
            "a computes NaN or infinite values in 'epsilon'",
        ),
        ({"a": IDENTITY, "b": _fake(_fail)}, _feeds(1), BackendUnavailable, "^memory ran out$"),
        (
            {"a": IDENTITY, "b": _fake(lambda f: f["none"])},
            _feeds(1),
            GraphError,
            "the comparison failed: 'none'",
        ),
        (
            {"a": IDENTITY, "b": Path("nowhere.onnx")},
            _feeds(1),
            GraphError,
            "nowhere.onnx does not exist: give an ONNX file",
        ),
    ],
)
@pytest.mark.filterwarnings("ignore:divide by zero:RuntimeWarning")
def test_failures(
    engines: Any,
    feeds: list[Feeds],
    kind: type[Exception],
    message: str,
    capfd: pytest.CaptureFixture[str],
) -> None:
    with pytest.raises(kind, match=message):
        compare(engines, feeds)
    assert capfd.readouterr() == ("", "")


def test_not_installed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "polygraphy.comparator", None)
    with pytest.raises(
        BackendUnavailable,
        match=r"comparing backends needs polygraphy \(.*\): "
        r"in a checkout of ptqd-export: pip install '\.\[verify\]'",
    ):
        compare({"a": IDENTITY, "b": IDENTITY}, _feeds(1))


def _network(path: Path, scale: float = 0.02) -> Path:
    """Two 8-bit convs with SiLU in between, over (B, 3, 4, 4); the first one's output is an output too."""
    rng = np.random.default_rng(0)
    tensors = [numpy_helper.from_array(np.float32(scale), "s"), numpy_helper.from_array(np.int8(0), "z")]
    lines = []
    for i, x in ((0, "sample"), (1, "silu")):
        tensors += [
            numpy_helper.from_array(rng.integers(-127, 128, (3, 3, 3, 3)).astype(np.int8), f"codes{i}"),
            numpy_helper.from_array(np.full(3, 0.004, np.float32), f"ws{i}"),
            numpy_helper.from_array(np.zeros(3, np.int8), f"wz{i}"),
        ]
        lines.append(f"q{i} = QuantizeLinear({x}, s, z) in{i} = DequantizeLinear(q{i}, s, z)")
        lines.append(f"w{i} = DequantizeLinear<axis = 0>(codes{i}, ws{i}, wz{i})")
        lines.append(f"out{i} = Conv<pads = [1, 1, 1, 1]>(in{i}, w{i})")
        if i == 0:
            lines.append("gate = Sigmoid(out0) silu = Mul(out0, gate)")
    ends = "(float[B, 3, 4, 4] sample) => (float[B, 3, 4, 4] out0, float[B, 3, 4, 4] epsilon)"
    text = f"g {ends} {{ {' '.join(lines)} epsilon = Identity(out1) }}"
    model = onnx.parser.parse_model(f'<ir_version: 10, opset_import: ["": 21]> {text}')
    model.graph.initializer.extend(tensors)
    onnx.save(model, path)
    return path


def test_an_engine_against_the_graph_as_it_stands(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    """One layer on the same codes: float32 sums of 27 products, of 8-bit codes with each its scale, lie
    within 27 x 3 half steps of 2**-24 of the largest product, 105 dB. A later layer may see flipped
    roundings; another scale is another layer, off by its quantization noise."""
    path, other = _network(tmp_path / "net.onnx"), _network(tmp_path / "other.onnx", 0.025)
    engine = compare({"graph": path, "engine": lambda: OrtEngine(path)}, _feeds(1, 2))
    wrong = compare({"graph": path, "other": lambda: OrtEngine(other)}, _feeds(1, 2))
    assert all(list(result.snr) == ["out0", EPSILON] for result in (*engine, *wrong))
    assert min(result.snr["out0"] for result in engine) > 105
    assert min(result.snr["out0"] for result in wrong) < 60 and min(r.snr[EPSILON] for r in wrong) < 60
    assert capfd.readouterr() == ("", "")


def test_a_broken_graph(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "broken.onnx"
    path.write_bytes(b"not a graph")
    with pytest.raises(GraphError, match=r"broken\.onnx cannot be loaded"):
        compare({"graph": path, "engine": IDENTITY}, _feeds(1))
    assert capfd.readouterr() == ("", "")
