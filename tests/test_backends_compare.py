"""Polygraphy's comparison of what two runtimes compute."""

from __future__ import annotations

import math
import os
import re
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from onnx import numpy_helper

from ptqd_export.backends import OrtEngine
from ptqd_export.backends.compare import Difference, compare, parser_verdict
from ptqd_export.engine import EPSILON, SAMPLE, FakeEngine, Feeds
from ptqd_export.errors import BackendUnavailable, GraphError, ParityError

pytest.importorskip("polygraphy")


def _feeds(*seeds: int) -> list[Feeds]:
    """A standard normal sample each, (2, 3, 4, 4), with its power made 1."""
    found = []
    for seed in seeds:
        x = np.random.default_rng(seed).standard_normal((2, 3, 4, 4))
        found.append({"sample": (x / np.sqrt((x**2).mean())).astype(np.float32), "timestep": np.array([seed, seed])})
    return found


def _fake(function: Callable[[Feeds], Any], inputs: tuple[str, ...] = ("sample", "timestep")) -> Callable[[], FakeEngine]:
    return lambda: FakeEngine(function, inputs)


IDENTITY = _fake(lambda feeds: feeds[SAMPLE])


def test_equal_engines() -> None:
    assert compare({"a": IDENTITY, "b": IDENTITY}, _feeds(1, 2)) == [Difference("b", "epsilon", math.inf, 0.0, 192)]


@pytest.mark.parametrize("dtype", ["float32", "float16"])
def test_figures_of_a_known_difference(dtype: str) -> None:
    """A factor of 1.01 is 40 dB. float16 holds 1.01 x to 2**-11, 54 dB or more below: 0.4 dB of it, and 2**-9 of values up to 4."""
    x, off = 1.0, 0.01
    feeds = _feeds(1, 2, 3)
    got = compare({"a": IDENTITY, "b": _fake(lambda f: ((x + off) * f[SAMPLE]).astype(dtype))}, feeds)
    assert [(d.engine, d.output) for d in got] == [("b", "epsilon")]
    assert got[0].snr == pytest.approx(40, abs=1e-3 if dtype == "float32" else 0.8)
    largest = max(float(np.abs(f[SAMPLE]).max()) for f in feeds)
    assert got[0].max_abs == pytest.approx(off * largest, abs=1e-6 if dtype == "float32" else 2**-9)


def test_the_worst_feed_counts() -> None:
    """Each feed lies off by one in ten to its timestep; of several engines, each is compared to the first."""

    def off(feeds: Feeds) -> Any:
        return feeds[SAMPLE] * np.float32(1 + 10.0 ** -float(feeds["timestep"][0]))

    for order in ((1, 2, 3), (3, 2, 1)):
        got = compare({"a": IDENTITY, "b": _fake(off), "c": IDENTITY}, _feeds(*order))
        assert [d.engine for d in got] == ["b", "c"]
        assert got[0].snr == pytest.approx(20, abs=1e-3) and got[1].snr == math.inf


def test_quantization_steps_apart() -> None:
    """Channels of largest value 8, 80 and 800 with steps 1, 10 and 100. Rounding of 1e-3 is 0.008 of a step, and is of the step where that is
    larger than the values; a value of each feed is off by 1 step, one by 2, and all by 0.005 or by 0.02.
    """
    scale = np.array([1, 10, 100]).reshape(1, 3, 1, 1)
    x = np.random.default_rng(0).integers(-7, 8, (2, 3, 4, 4)) * scale
    x[0, :, 0, 0] = 8 * scale.ravel()
    feeds: list[Feeds] = [{SAMPLE: x.astype(np.float32), "timestep": np.array([i, i])} for i in (0, 1)]

    def off(by: float, steps: int) -> Callable[[], FakeEngine]:
        def function(feeds: Feeds) -> Any:
            y = np.asarray(feeds[SAMPLE]) + by * scale
            y[1, 2, 3, 3] += 100 * (steps if feeds["timestep"][0] else 1)
            return y

        return _fake(function)

    def told(engine: Callable[[], FakeEngine], step: Any, reference: Callable[[], FakeEngine] = IDENTITY) -> tuple[int, int, float]:
        (found,) = compare({"a": reference, "b": engine}, feeds, steps={EPSILON: step}, rounding=1e-3)
        return found.size, found.apart, found.largest_steps

    assert told(off(0.005, 1), scale.astype(float)) == (192, 2, pytest.approx(1, abs=0.006))
    assert told(off(0.005, 2), scale.astype(float)) == (192, 2, pytest.approx(2, abs=0.006))
    assert told(off(0.02, 0), scale.astype(float)) == (192, 192, pytest.approx(1.02, abs=1e-3))
    assert told(IDENTITY, scale.astype(float)) == (192, 0, 0.0)
    zero = _fake(lambda f: 0 * f[SAMPLE])
    small = _fake(lambda f: 0 * f[SAMPLE] + np.float32(9e-4))
    assert told(small, np.ones((1, 3, 1, 1)), zero) == (192, 0, 0.0)
    assert told(small, np.full((1, 3, 1, 1), 0.5), zero) == (192, 192, pytest.approx(1.8e-3, rel=1e-5))


def test_a_parser_tells_what_it_refuses(tmp_path: Path) -> None:
    pytest.importorskip("tensorrt_rtx")
    text = "g (float[2, 3] x) => (float[2, 3] y) { a = Relu(x) y = %s(a) }"
    for op, verdict in (("Sigmoid", "^ok$"), ("Det2", "^In node 1 with name: and operator: Det2 .*Plugin not found")):
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

    compare({"a": partial(make, lambda f: f[SAMPLE]), "b": partial(make, lambda f: f[SAMPLE])}, _feeds(1))
    with pytest.raises(ParityError):
        compare({"a": partial(make, lambda f: f[SAMPLE]), "b": partial(make, lambda f: f[SAMPLE] * np.nan)}, _feeds(1))
    assert len(opened) == 4 and all(engine.closed for engine in opened)


def _fail(feeds: Feeds) -> Any:
    raise BackendUnavailable("memory ran out")


@pytest.mark.parametrize(
    ("engines", "feeds", "outputs", "kind", "message"),
    [
        ({"a": IDENTITY}, _feeds(1), None, GraphError, "got 1 engines and 1 feeds: give at least two engines and one feed"),
        ({"a": IDENTITY, "b": IDENTITY}, [], None, GraphError, "got 2 engines and 0 feeds"),
        ({"a": IDENTITY, "b": IDENTITY}, _feeds(1), ["epsilon", "other"], GraphError, "a has no output 'other': got epsilon"),
        (
            {"a": IDENTITY, "b": _fake(lambda f: f[SAMPLE], ("sample", "labels"))},
            _feeds(1),
            None,
            GraphError,
            "b needs the input 'labels': got sample",
        ),
        ({"a": IDENTITY, "b": _fake(lambda f: f[SAMPLE][:1])}, _feeds(1), None, ParityError, r"b gives 'epsilon' the shape \(1, 3, 4, 4\), a \(2, 3"),
        ({"a": IDENTITY, "b": _fake(lambda f: f[SAMPLE] / 0)}, _feeds(1), None, ParityError, "b computes NaN or infinite values in 'epsilon'"),
        ({"a": IDENTITY, "b": _fake(_fail)}, _feeds(1), None, BackendUnavailable, "^memory ran out$"),
        ({"a": IDENTITY, "b": _fake(lambda f: f["none"])}, _feeds(1), None, GraphError, "the comparison failed: 'none'"),
        ({"a": IDENTITY, "b": Path("nowhere.onnx")}, _feeds(1), None, GraphError, "nowhere.onnx does not exist: give an ONNX file"),
    ],
)
@pytest.mark.filterwarnings("ignore:divide by zero:RuntimeWarning")
def test_failures(
    engines: Any, feeds: list[Feeds], outputs: list[str] | None, kind: type[Exception], message: str, capfd: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(kind, match=message):
        compare(engines, feeds, outputs)
    assert capfd.readouterr() == ("", "")


def test_not_installed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "polygraphy.comparator", None)
    with pytest.raises(BackendUnavailable, match=r"comparing backends needs polygraphy \(.*\): pip install 'ptqd-export\[verify\]'"):
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
        lines.append(
            f"q{i} = QuantizeLinear({x}, s, z) in{i} = DequantizeLinear(q{i}, s, z) w{i} = DequantizeLinear<axis = 0>(codes{i}, ws{i}, wz{i})"
        )
        lines.append(f"out{i} = Conv<pads = [1, 1, 1, 1]>(in{i}, w{i})")
        if i == 0:
            lines.append("gate = Sigmoid(out0) silu = Mul(out0, gate)")
    text = f"g (float[B, 3, 4, 4] sample) => (float[B, 3, 4, 4] out0, float[B, 3, 4, 4] epsilon) {{ {' '.join(lines)} epsilon = Identity(out1) }}"
    model = onnx.parser.parse_model(f'<ir_version: 10, opset_import: ["": 21]> {text}')
    model.graph.initializer.extend(tensors)
    onnx.save(model, path)
    return path


def test_an_engine_against_the_graph_as_it_stands(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    """One layer on the same codes: float32 sums of 27 products, of 8-bit codes with each its scale, lie within 27 x 3 half steps of 2**-24
    of the largest product, 105 dB. A later layer may see flipped roundings; another scale is another layer, off by its quantization noise.
    """
    path, other = _network(tmp_path / "net.onnx"), _network(tmp_path / "other.onnx", 0.025)
    engines = {"graph": path, "engine": lambda: OrtEngine(path), "other": lambda: OrtEngine(other)}
    got = {(d.engine, d.output): d.snr for d in compare(engines, _feeds(1, 2))}
    assert list(got) == [(engine, output) for engine in ("engine", "other") for output in ("out0", EPSILON)]
    assert got["engine", "out0"] > 105
    assert got["other", "out0"] < 60 and got["other", EPSILON] < 60
    assert [d.output for d in compare(engines, _feeds(1), ["out0"])] == ["out0", "out0"]
    assert capfd.readouterr() == ("", "")


def test_a_broken_graph(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "broken.onnx"
    path.write_bytes(b"not a graph")
    with pytest.raises(GraphError, match=r"broken\.onnx cannot be loaded"):
        compare({"graph": path, "engine": IDENTITY}, _feeds(1))
    assert capfd.readouterr() == ("", "")
