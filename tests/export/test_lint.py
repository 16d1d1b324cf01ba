"""export.lint: for every rule a tiny graph that breaks it, and the graph next to it that does not."""

from __future__ import annotations

from pathlib import Path

import onnx
import onnx_ir as ir
import pytest

from ptqd_export.bundle.bundle import WEIGHTS
from ptqd_export.core.backend import Emission
from ptqd_export.errors import GraphError
from ptqd_export.export import lint, save

STRICT = (Emission.PORTABLE, Emission.HALF)

TENSORS = {
    "s": "float s = {0.5}",
    "z": "int8 z = {0}",
    "w": "int8[2, 2, 1, 1] w = {1, 2, 3, 4}",
    "ws": "float[2] ws = {0.5, 0.25}",
    "b": "float[2] b = {1.0, 2.0}",
}
BODY = {
    "q": "q = QuantizeLinear(x, s, z)",
    "d": "d = DequantizeLinear(q, s, z)",
    "wd": "wd = DequantizeLinear<axis = 0>(w, ws)",
    "y": "y = Conv(d, wd, b)",
}


def graph(
    tensors: dict[str, str] | None = None,
    body: dict[str, str] | None = None,
    inputs: str = "",
    opset: str = '"" : 21',
    output: str = "float[N, 2, 4, 4] y",
) -> ir.Model:
    """A conv with a quantized input (N, 2, 4, 4), parts of it replaced; the nodes are called after their
    outputs."""
    constants = ", ".join(text for text in {**TENSORS, **(tensors or {})}.values() if text)
    lines = " ".join(text for text in {**BODY, **(body or {})}.values() if text)
    text = (
        f"<ir_version: 10, opset_import: [{opset}]> g (float[N, 2, 4, 4] x{inputs}) => ({output}) "
        f"<{constants}> {{ {lines} }}"
    )
    model = onnx.parser.parse_model(text)
    for node in model.graph.node:
        node.name = f"the_{node.output[0]}"
    return ir.from_proto(onnx.shape_inference.infer_shapes(model))


LINEAR = {"q": "x2 = Reshape(x, flat) q = QuantizeLinear(x2, s, z)", "y": "y = MatMul(d, wd)"}
FLAT = {
    "flat": "int64[2] flat = {-1, 2}",
    "w": "int8[2, 3] w = {1, 2, 3, 4, 5, 6}",
    "ws": "float[3] ws = {0.5, 0.25, 1.0}",
    "b": "",
}
ROWS = "float[M, 3] y"
INT4 = {"w": "int4[2, 2, 1, 1] w = {1, 2, 3, 4}"}
FP8 = {"z": "float8e4m3fn z = {0}", "w": "float8e4m3fn[2, 2, 1, 1] w = {56, 48, 40, 184}"}

GOOD = {
    "int8": graph(),
    "one weight scale": graph({"ws": "float ws = {0.5}"}, {"wd": "wd = DequantizeLinear(w, ws)"}),
    "matmul": graph(FLAT, {**LINEAR, "wd": "wd = DequantizeLinear<axis = 1>(w, ws)"}, output=ROWS),
    "gemm": graph(
        FLAT, {**LINEAR, "wd": "wd = DequantizeLinear<axis = 1>(w, ws)", "y": "y = Gemm(d, wd)"}, output=ROWS
    ),
    "gemm, transposed": graph(
        {**FLAT, "w": "int8[3, 2] w = {1, 2, 3, 4, 5, 6}"},
        {**LINEAR, "y": "y = Gemm<transB = 1>(d, wd)"},
        output=ROWS,
    ),
    "weights alone, INT4": graph(INT4, {"q": "", "d": "", "y": "y = Conv(x, wd, b)"}),
    "clipped codes": graph(
        {"low": "int8 low = {-8}", "high": "int8 high = {7}"},
        {"q": "q = QuantizeLinear(x, s, z) c = Clip(q, low, high)", "d": "d = DequantizeLinear(c, s, z)"},
    ),
    "half": graph(
        {"b": "float16[2] b = {15360, 16384}"},
        {"y": "dh = Cast<to = 10>(d) wh = Cast<to = 10>(wd) h = Conv(dh, wh, b) y = Cast<to = 1>(h)"},
    ),
    "codes with a second taker": graph(body={"y": "c = Conv(d, wd, b) y = Add(c, d)"}),
}

BAD: dict[str, tuple[ir.Model, str]] = {
    "UINT8 codes": (
        graph({"z": "uint8 z = {0}"}),
        "QuantizeLinear the_q has UINT8 codes, which TensorRT reads as signed",
    ),
    "UINT8 weights": (
        graph({"w": "uint8[2, 2, 1, 1] w = {1, 2, 3, 4}"}),
        "DequantizeLinear the_wd has UINT8 codes",
    ),
    "INT16 codes": (graph({"z": "int16 z = {0}"}), "QuantizeLinear the_q has INT16 codes: expected"),
    "scale from a table": (
        graph(
            {"table": "float[2] table = {0.5, 0.25}"},
            {"q": "r = Gather(table, step) s1 = Squeeze(r) q = QuantizeLinear(x, s1, z)"},
            ", int64[1] step",
        ),
        "the scale of QuantizeLinear the_q is not a constant",
    ),
    "scale from an input": (
        graph({"s": ""}, inputs=", float s"),
        "the scale of QuantizeLinear the_q is not a constant",
    ),
    "zero point from an input": (
        graph({"z": ""}, inputs=", int8 z"),
        "the zero point of QuantizeLinear the_q is not a constant",
    ),
    "scale of 0": (graph({"s": "float s = {0.0}"}), "the scale of QuantizeLinear the_q is 0.0"),
    "activation scales per channel": (
        graph({"s": "float[2] s = {0.5, 0.25}", "z": "int8[2] z = {0, 0}"}),
        "QuantizeLinear the_q has 2 scales for an activation",
    ),
    "conv weight axis": (
        graph(body={"wd": "wd = DequantizeLinear<axis = 1>(w, ws)"}),
        "weight scales of Conv the_y lie along axis 1 .*axis 0",
    ),
    "matmul weight axis": (
        graph({**FLAT, "ws": "float[2] ws = {0.5, 0.25}"}, LINEAR, output=ROWS),
        "weight scales of MatMul the_y lie along axis 0 .*axis 1",
    ),
    "gemm weight axis": (
        graph(
            {**FLAT, "w": "int8[3, 2] w = {1, 2, 3, 4, 5, 6}", "ws": "float[2] ws = {0.5, 0.25}"},
            {**LINEAR, "wd": "wd = DequantizeLinear<axis = 1>(w, ws)", "y": "y = Gemm<transB = 1>(d, wd)"},
            output=ROWS,
        ),
        "weight scales of Gemm the_y lie along axis 1 .*axis 0",
    ),
    "INT32 bias": (
        graph(
            {"bq": "int32[2] bq = {1, 2}"},
            {"y": "bd = DequantizeLinear<axis = 0>(bq, ws) y = Conv(d, wd, bd)"},
        ),
        "DequantizeLinear the_bd dequantizes INT32",
    ),
    "opset 22": (graph(opset='"" : 22'), "the graph has opset 22: TensorRT takes 21 at most"),
    "foreign domain": (
        graph(
            body={"y": "c = Conv(d, wd, b) y = com.microsoft.Gelu(c)"}, opset='"" : 21, "com.microsoft" : 1'
        ),
        "Gelu the_y is of domain com.microsoft",
    ),
    "INT4 weights, INT8 input": (graph(INT4), "Conv the_y has INT4 weights and a quantized input"),
    "INT4 input": (graph({"z": "int4 z = {0}"}), "QuantizeLinear the_q makes an activation INT4"),
    "FP8 input, INT8 weights": (graph({"z": FP8["z"]}), "Conv the_y has an input in fp8 and weights in int8"),
    "INT8 input, FP8 weights": (graph({"w": FP8["w"]}), "Conv the_y has an input in int8 and weights in fp8"),
    "quantized output": (
        graph(
            body={
                "y": "c = Conv(d, wd, b) q2 = QuantizeLinear(c, s, z) "
                "d2 = DequantizeLinear(q2, s, z) y = Relu(d2)"
            }
        ),
        "QuantizeLinear the_q2 quantizes a value that no Conv, MatMul or Gemm takes",
    ),
}

COLUMNS = {"wd": "wd = DequantizeLinear<axis = 1>(w, ws)"}
UNCAST = {
    "Conv": graph({"b": ""}, {"y": "dh = Cast<to = 10>(d) h = Conv(dh, wd) y = Cast<to = 1>(h)"}),
    "MatMul": graph(
        FLAT,
        {**LINEAR, **COLUMNS, "y": "dh = Cast<to = 10>(d) h = MatMul(dh, wd) y = Cast<to = 1>(h)"},
        output=ROWS,
    ),
    "Gemm": graph(
        FLAT,
        {**LINEAR, **COLUMNS, "y": "dh = Cast<to = 10>(d) h = Gemm(dh, wd) y = Cast<to = 1>(h)"},
        output=ROWS,
    ),
}


@pytest.mark.parametrize("name", GOOD)
@pytest.mark.parametrize("emission", list(Emission))
def test_good_graphs_pass(name: str, emission: Emission) -> None:
    lint(GOOD[name], emission)


@pytest.mark.parametrize("tensors", [{"z": "int8 z = {3}"}, {"wz": "int8[2] wz = {0, 3}"}], ids=str)
def test_only_half_graphs_need_zero_points_of_0(tensors: dict[str, str]) -> None:
    """Of inputs and of weights alike. A portable graph's codes are INT8 all the same."""
    body = {"wd": "wd = DequantizeLinear<axis = 0>(w, ws, wz)"} if "wz" in tensors else {}
    moved = graph(tensors, body)
    where = "DequantizeLinear the_wd" if body else "QuantizeLinear the_q"
    with pytest.raises(GraphError, match=f"{where} has a zero point other than 0.*move the value"):
        lint(moved, Emission.HALF)
    for emission in (Emission.PORTABLE, Emission.ORT_CPU):
        lint(moved, emission)
    with pytest.raises(GraphError, match="UINT8 codes"):
        lint(graph({"z": "uint8 z = {3}"}), Emission.PORTABLE)


def test_fp8_passes() -> None:
    lint(graph(FP8), Emission.HALF)


@pytest.mark.parametrize("name", BAD)
@pytest.mark.parametrize("emission", STRICT)
def test_a_bad_graph_is_told_by_node(name: str, emission: Emission, tmp_path: Path) -> None:
    model, says = BAD[name]
    with pytest.raises(GraphError, match=says):
        lint(model, emission)
    save({"bad": model}, tmp_path, WEIGHTS)
    with pytest.raises(GraphError, match=says):
        lint(tmp_path / "bad.onnx", emission)


@pytest.mark.parametrize(
    "name", sorted(set(BAD) - {"scale from a table", "scale from an input", "scale of 0"})
)
def test_onnx_runtime_may_have_them(name: str) -> None:
    lint(BAD[name][0], Emission.ORT_CPU)


@pytest.mark.parametrize("name", ["scale from a table", "scale from an input", "scale of 0"])
def test_scales_are_constants_everywhere(name: str) -> None:
    with pytest.raises(GraphError, match=BAD[name][1]):
        lint(BAD[name][0], Emission.ORT_CPU)


@pytest.mark.parametrize("op", UNCAST)
@pytest.mark.parametrize("emission", list(Emission))
def test_a_missing_cast_behind_dequantize_is_seen(op: str, emission: Emission) -> None:
    """By the checker's own type inference, for every operator that a layer becomes."""
    with pytest.raises(GraphError, match=rf"{op}|the_h"):
        lint(UNCAST[op], emission)


def test_attention_is_named() -> None:
    text = """<ir_version: 11, opset_import: ["" : 23]> g (float[N, 2, 4, 4] x) => (float[N, 2, 4, 4] y) { y =
    Attention(x, x, x) }"""
    with pytest.raises(GraphError, match="opset 23"):
        lint(ir.from_proto(onnx.parser.parse_model(text)), Emission.HALF)
    lint(ir.from_proto(onnx.parser.parse_model(text)), Emission.ORT_CPU)


def test_lint_sees_a_broken_graph(base: ir.Model, tmp_path: Path) -> None:
    broken = base.clone()
    next(n for n in broken.graph if n.op_type == "Conv").attributes["strides"] = ir.AttrInt64s(
        "strides", [1, 1, 1, 1, 1]
    )
    with pytest.raises(GraphError, match=r"onnx\.checker"):
        lint(broken, Emission.PORTABLE)
    (tmp_path / "x.onnx").write_bytes(b"no graph")
    with pytest.raises(GraphError, match=r"onnx\.checker"):
        lint(tmp_path / "x.onnx", Emission.PORTABLE)
