"""What graph files are made of, before and after a runtime has fused them."""

from __future__ import annotations

from collections import Counter
from pathlib import Path

import onnx
import onnx_ir as ir
import pytest
from torch import nn
from toy import PRECISIONS, calibrated, emitted, graph_of, session

from ptqd_export.bundle.bundle import WEIGHTS
from ptqd_export.core.backend import Emission
from ptqd_export.core.precision import Precision
from ptqd_export.errors import GraphError
from ptqd_export.export import float_convs, op_counts, quantized_convs, save


@pytest.mark.parametrize("precision", PRECISIONS, ids=str)
def test_every_quantized_conv_is_fused_into_an_integer_one(
    toy: nn.Module, base: ir.Model, precision: Precision, tmp_path: Path
) -> None:
    network = calibrated(toy, precision)
    save({"q": emitted(base, network, Emission.ORT_CPU)}, tmp_path, WEIGHTS)
    session(tmp_path / "q.onnx", tmp_path / "optimised.onnx")
    ops = op_counts(tmp_path / "optimised.onnx")
    convs = sum(layer.kind == "conv" for layer in network.layers.values()) + 1  # one is called twice
    assert ops["QLinearConv"] == convs and float_convs(tmp_path / "optimised.onnx") == []
    assert (
        ops["MatMulIntegerToFloat"] == len(network.layers) - convs + 1 and ops["Gemm"] == ops["MatMul"] == 0
    )


@pytest.mark.parametrize("emission", list(Emission))
def test_convs_that_are_meant_to_run_as_integers(
    toy: nn.Module, base: ir.Model, emission: Emission, tmp_path: Path
) -> None:
    graphs = {"w8a8": graph_of(toy, base, Precision(8, 8), emission), "fp32": base}
    save({**graphs, "w4a16": graph_of(toy, base, Precision(4, 16), emission)}, tmp_path, WEIGHTS)
    convs = op_counts(tmp_path / "fp32.onnx")["Conv"]
    found = {key: quantized_convs(tmp_path / f"{key}.onnx") for key in ("w8a8", "fp32", "w4a16")}
    # In half graphs a Cast stands between the codes and the Conv, which ONNX Runtime would not fuse.
    assert found == {"w8a8": 0 if emission is Emission.HALF else convs, "fp32": 0, "w4a16": 0}
    assert len(float_convs(tmp_path / "fp32.onnx")) == convs == 5  # one is called twice


def write(path: Path, body: str, functions: str = "") -> Path:
    domains = '"" : 21, "own" : 1'
    text = (
        f"<ir_version: 10, opset_import: [{domains}]> "
        f"g (float[N, 2, 4, 4] x, bool c) => (float[N, 2, 4, 4] y) {body} {functions}"
    )
    path.write_bytes(onnx.parser.parse_model(text).SerializeToString())
    return path


def test_subgraphs_and_functions_are_counted(tmp_path: Path) -> None:
    path = write(
        tmp_path / "m.onnx",
        "{ a = own.twice(x) y = If(c) <then_branch = t () => (float[N, 2, 4, 4] d) { d = Relu(a) }, "
        "else_branch = e () => (float[N, 2, 4, 4] b) { k = Neg(a) b = Relu(k) }> }",
        '<domain: "own", opset_import: ["" : 21]> twice (p) => (q) { r = Relu(p) q = Relu(r) }',
    )
    assert op_counts(path) == Counter(Relu=4, Neg=1, If=1, twice=1)


def test_every_kind_of_float_conv_is_named(tmp_path: Path) -> None:
    path = tmp_path / "m.onnx"
    model = onnx.load(write(path, "{ a = Relu(x) b = Relu(a) d = Relu(b) y = Relu(d) }"))
    for node, (op, name) in zip(
        model.graph.node,
        (("Conv", ""), ("FusedConv", "fused"), ("NhwcFusedConv", "nhwc"), ("QLinearConv", "integer")),
        strict=True,
    ):
        node.op_type, node.name = op, name
    path.write_bytes(model.SerializeToString())
    assert float_convs(path) == ["a", "fused", "nhwc"]


@pytest.mark.parametrize("content", [None, b"no graph", b""])
def test_what_is_no_graph_is_told(tmp_path: Path, content: bytes | None) -> None:
    path = tmp_path / "m.onnx"
    if content is not None:
        path.write_bytes(content)
    for read in (op_counts, float_convs, quantized_convs):
        with pytest.raises(
            GraphError, match=r"m\.onnx (cannot be read as an ONNX graph|holds no nodes)"
        ) as caught:
            read(path)
        assert "\n" not in str(caught.value)
