"""Other forms of half graphs: equal codes, nearly equal numbers, reasons where a place is left, and real
builds."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
import onnx_ir as ir
import pytest
from onnx import numpy_helper
from torch import nn
from toy import calibrated, feeds_of, run

from ptqd_export.backends import trt
from ptqd_export.core.backend import TENSORRT_RTX, Emission
from ptqd_export.core.engine_build import EngineSettings
from ptqd_export.core.precision import Precision
from ptqd_export.export import insert_qdq, lower, quantized_nodes, save
from ptqd_export.export.graph import with_outputs
from ptqd_export.export.variants import float_clip, half_scales

HALF_ULP = 2.0**-11
"""Largest relative rounding error of float16."""


def parse(text: str, **constants: np.generic) -> ir.Model:
    """A model of one graph in ONNX text, with these constants, its value types inferred."""
    model = onnx.parser.parse_model(f'<ir_version: 10, opset_import: ["" : 21]> {text}')
    for name, value in constants.items():
        model.graph.initializer.append(numpy_helper.from_array(np.asarray(value), name))
    return ir.from_proto(onnx.shape_inference.infer_shapes(model, check_type=True, strict_mode=True))


def checked(model: ir.Model) -> ir.Model:
    onnx.checker.check_model(ir.to_proto(model), full_check=True)
    return model


def clipped(scale: float = 0.3, low: int = -7, high: int = 7, half: bool = False) -> ir.Model:
    """x -> Q -> Clip -> DQ."""
    kind, dtype = ("float16", np.float16) if half else ("float", np.float32)
    return parse(
        f"""g ({kind}[N] x) => ({kind}[N] y) <
            int8 z = {{0}}, int8 low = {{{low}}}, int8 high = {{{high}}}
        > {{
            q = QuantizeLinear(x, s, z)
            c = Clip(q, low, high)
            y = DequantizeLinear(c, s, z)
        }}""",
        s=dtype(scale),
    )


def _ops(model: ir.Model) -> list[str]:
    return [node.op_type for node in model.graph]


def _around(scale: float, limit: int, dtype: type = np.float32) -> np.ndarray:
    """Numbers on both sides of every tie and limit of a grid, far beyond it, and 0."""
    ties = (np.arange(-limit - 3, limit + 3) + 0.5).astype(np.float32) * np.float32(scale)
    with np.errstate(over="ignore"):
        near = [np.nextafter(ties, np.float32(sign * np.inf)) for sign in (-1, 1)]
        every = np.concatenate([ties, *near, ties * 50, [0, -0.0, 1e30, -1e30, 1e-30]])
        return np.clip(every, -6e4, 6e4).astype(dtype) if dtype is np.float16 else every.astype(dtype)


@pytest.mark.parametrize("scale", [0.3, 1e-6, 3.7e-3, 12345.678, 0.1])
@pytest.mark.parametrize(("low", "high"), [(-7, 7), (-8, 7), (-1, 1), (0, 31), (-127, 127)])
def test_clipping_the_float_leaves_the_codes(scale: float, low: int, high: int) -> None:
    before = clipped(scale, low, high)
    variant = float_clip(before)
    assert (variant.rewritten, variant.left) == (1, {})
    assert _ops(before) == ["QuantizeLinear", "Clip", "DequantizeLinear"], "the original is left alone"
    after = checked(variant.model)
    assert _ops(after) == ["Clip", "QuantizeLinear", "DequantizeLinear"]
    feeds = {"x": _around(scale, high)}
    values = [run(with_outputs(model, ["c"]), feeds, optimise=False) for model in (before, after)]
    for name in ("c", "y"):
        np.testing.assert_array_equal(values[0][name], values[1][name])
    assert set(np.unique(values[0]["c"])) >= {low, high}


@pytest.mark.parametrize("scale", [0.3, 1e-3, 100.0])
def test_clipping_a_float16(scale: float) -> None:
    """After `half_scales` of a graph whose quantizers take float16."""
    before = clipped(scale, half=True)
    variant = float_clip(before)
    assert variant.rewritten == 1
    feeds = {"x": _around(scale, 7, np.float16)}
    values = [
        run(with_outputs(model, ["c"]), feeds, optimise=False) for model in (before, checked(variant.model))
    ]
    np.testing.assert_array_equal(values[0]["c"], values[1]["c"])


@pytest.mark.parametrize(
    ("text", "why"),
    [
        (
            "c = Clip(q, low, high) y = DequantizeLinear(c, s, z) other = DequantizeLinear(q, s, z)",
            "used unclipped",
        ),
        ("c = Clip(q, q, high) y = DequantizeLinear(c, s, z) other = Identity(x)", "not one constant each"),
        ("c = Clip(q, low) y = DequantizeLinear(c, s, z) other = Identity(x)", "not one constant each"),
    ],
)
def test_clips_that_are_left(text: str, why: str) -> None:
    model = parse(
        f"""g (float[N] x) => (float[N] y, float[N] other) <
            float s = {{0.3}}, int8 z = {{0}}, int8 low = {{-7}}, int8 high = {{7}}
        > {{ q = QuantizeLinear(x, s, z) {text} }}"""
    )
    variant = float_clip(model)
    (reason,) = variant.left.values()
    assert variant.rewritten == 0 and why in reason and _ops(variant.model) == _ops(model)


def test_limits_that_float16_does_not_have() -> None:
    variant = float_clip(clipped(3e4, half=True))
    assert variant.rewritten == 0 and "has no such limits in float16" in next(iter(variant.left.values()))


def dequantized(scale: str, more: str = "") -> ir.Model:
    """DQ -> Cast(float16) of int8 codes x; and what else is done with the float32 d."""
    return parse(
        f"""g (int8[N] x) => (float16[N] y, float[N] other) < float s = {{{scale}}}, int8 z = {{0}} > {{
            d = DequantizeLinear(x, s, z)
            y = Cast<to = 10>(d)
            {more or "other = Cast<to = 1>(y)"}
        }}"""
    )


CODES = {"x": np.arange(-128, 128).astype(np.int8)}


@pytest.mark.parametrize(("scale", "exact"), [("0.25", True), ("0.3", False), ("7e-5", False), ("500", True)])
def test_half_scales(scale: str, exact: bool) -> None:
    """Bit for bit where the scale is a float16; else to its rounding, and that of the result, which was there
    before."""
    before = dequantized(scale)
    variant = half_scales(before)
    assert (variant.rewritten, variant.left) == (1, {})
    after = checked(variant.model)
    assert _ops(before)[:2] == ["DequantizeLinear", "Cast"] and _ops(after)[0] == "DequantizeLinear"
    assert _ops(after).count("Cast") == 1, "that of the other output"
    a, b = (run(model, CODES, optimise=False)["y"].astype(np.float64) for model in (before, after))
    assert a.shape == (256,) and np.isfinite(a).all()
    if exact:
        np.testing.assert_array_equal(a, b)
    else:
        assert np.abs(a - b).max() > 0 and (np.abs(a - b) <= 3 * HALF_ULP * np.abs(a)).all()


@pytest.mark.parametrize(
    ("scale", "more", "why"),
    [
        ("5e-5", "", "from 5e-05 to 5e-05, are not all normal float16 numbers"),
        ("7e4", "", "are not all normal float16 numbers"),
        ("0.3", "other = Neg(d)", "its float32 result is used too"),
    ],
)
def test_scales_that_are_left(scale: str, more: str, why: str) -> None:
    """A weight's scale below 6.1e-5 is subnormal in float16: it would lose bits, and GPUs may take it for
    0."""
    model = dequantized(scale, more)
    variant = half_scales(model)
    assert variant.rewritten == 0 and why in next(iter(variant.left.values()))
    np.testing.assert_array_equal(run(variant.model, CODES)["y"], run(model, CODES)["y"])


def test_scales_of_channels() -> None:
    text = """g (int8[2, 3] x) => (float16[2, 3] y) <
        float[2] s = {SCALES}, int8[2] z = {0, 0}
    > { d = DequantizeLinear<axis = 0>(x, s, z) y = Cast<to = 10>(d) }"""
    assert half_scales(parse(text.replace("SCALES", "0.3, 0.5"))).rewritten == 1
    assert half_scales(parse(text.replace("SCALES", "0.3, 1e-6"))).rewritten == 0


@pytest.mark.parametrize("precision", [Precision(8, 8), Precision(4, 4)], ids=str)
def test_a_network(toy: nn.Module, base: ir.Model, precision: Precision, tmp_path: Path) -> None:
    """Every clip and nearly every scale of a half graph is rewritten, codes stay, and RTX builds it with all
    its layers in 8 bits."""
    pytest.importorskip("tensorrt_rtx")
    graph = lower(insert_qdq(base, calibrated(toy, precision), Emission.HALF), Emission.HALF, precision)
    clip = float_clip(graph)
    half = half_scales(clip.model)
    narrow = sum(node.op_type == "Clip" for node in graph.graph)
    assert (clip.rewritten, clip.left) == (narrow, {}) and (narrow > 0) == (precision.activation_bits < 8)
    assert half.rewritten > 2 * len(half.left)
    nodes = quantized_nodes(graph)
    assert len(nodes) > 5 and quantized_nodes(half.model) == nodes, "names and meanings stay"
    feeds = feeds_of(2)
    plain, of_clip, of_half = (
        run(m, feeds, optimise=False)["output"] for m in (graph, clip.model, half.model)
    )
    np.testing.assert_array_equal(plain, of_clip)
    scale = float(np.abs(plain).max())
    steps = 2.0 ** (8 - precision.activation_bits)
    assert 0 < float(np.abs(plain - of_half).max()) < 0.03 * steps * scale
    for name, model in (("clip", clip.model), ("half", half.model)):
        save({name: checked(model)}, tmp_path, None)
        path = tmp_path / f"{name}.onnx"
        made = trt.build(
            TENSORRT_RTX,
            path,
            tmp_path / "e.engine",
            EngineSettings((1, 2, 4), ("8.9",)),
            key="0" * 64,
            quantized=nodes,
            log=tmp_path / "e.log",
        )
        assert made.plan.taken == made.plan.meant == len(nodes), made.plan.fell_back
