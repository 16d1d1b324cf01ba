"""What graph files are made of, before and after a runtime has fused them."""

from __future__ import annotations

from collections import Counter
from pathlib import Path

import numpy as np
import onnx
import onnx_ir as ir
import pytest
import torch
from torch import nn
from toy import PRECISIONS, calibrated, emitted, graph_of, run, session

from ptqd_export.bundle.bundle import WEIGHTS
from ptqd_export.core.backend import Emission
from ptqd_export.core.model import ModelInfo
from ptqd_export.core.precision import Precision
from ptqd_export.core.quant import Grid, LayerQuant, OutputGrid, QuantizedNetwork
from ptqd_export.errors import GraphError
from ptqd_export.export import Calls, calls, export_fp, float_convs, op_counts, save


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
def test_calls_that_are_meant_to_run_as_integers(
    toy: nn.Module, base: ir.Model, emission: Emission, tmp_path: Path
) -> None:
    graphs = {"w8a8": graph_of(toy, base, Precision(8, 8), emission), "fp32": base}
    save({**graphs, "w4a16": graph_of(toy, base, Precision(4, 16), emission)}, tmp_path, WEIGHTS)
    convs = op_counts(tmp_path / "fp32.onnx")["Conv"]
    assert len(float_convs(tmp_path / "fp32.onnx")) == convs == 5  # one is called twice
    found = {key: calls(tmp_path / f"{key}.onnx") for key in ("w8a8", "fp32", "w4a16")}
    # In half graphs a Cast stands between codes and layers, which ONNX Runtime would not fuse; the layers of
    # the timestep stay float32.
    half = emission is Emission.HALF
    assert found["w8a8"] == (Calls(0, 2, convs) if half else Calls(convs, 6, 0))
    assert found["fp32"] == found["w4a16"] == Calls(0, 0, convs)


class InARow(nn.Module):
    """Layers whose input is another one's output as it is, or moved; a conv called again in two ways."""

    def __init__(self) -> None:
        super().__init__()
        self.inlet, self.conv, self.outlet = (nn.Conv2d(i, o, 1) for i, o in ((2, 4), (4, 4), (4, 2)))
        self.tokens = nn.Linear(4, 4)

    def forward(self, sample: torch.Tensor, timestep: torch.Tensor) -> torch.Tensor:
        h = self.conv(self.conv(self.inlet(sample)))
        h = h + self.tokens(h.flatten(2).transpose(1, 2)).transpose(1, 2).reshape(h.shape)
        return self.outlet(torch.relu(h) + self.conv(h) + self.conv(h))


def layer_of(name: str, module: nn.Module, rng: np.random.Generator) -> LayerQuant:
    codes = rng.integers(-127, 128, module.weight.shape).astype(np.int8)
    ones, conv = np.ones(len(codes), np.float32), isinstance(module, nn.Conv2d)
    scales = rng.uniform(0.01, 0.03, 2).tolist()
    bias = module.bias.detach().numpy()
    return LayerQuant(
        name,
        "conv" if conv else "linear",
        codes,
        ones / 500,
        8,
        Grid(float(np.float32(scales[0])), -100, 155),
        8,
        OutputGrid(ones * np.float32(scales[1]), np.full(len(codes), 120, np.uint8)) if conv else None,
        bias,
        1,
    )


def test_layers_in_a_row_run_as_integers(tmp_path: Path, rng: np.random.Generator) -> None:
    """ONNX Runtime makes one Q and DQ of two in a row that have one scale each, and runs what follows in
    float. The vectors of scales of conv outputs keep them apart."""
    module = InARow().eval()
    fp = export_fp(module, ModelInfo("row", (2, 6, 6), (), ""))
    layers = {name: layer_of(name, m, rng) for name, m in module.named_modules() if name}
    network = QuantizedNetwork(Precision(8, 8), layers)
    save({"q": emitted(fp, network, Emission.ORT_CPU)}, tmp_path, WEIGHTS)
    meant, sample = calls(tmp_path / "q.onnx"), rng.standard_normal((3, 2, 6, 6)).astype(np.float32)
    x = {"sample": sample, "timestep": np.zeros(3, np.int64)}
    with session(tmp_path / "q.onnx", tmp_path / "optimised.onnx") as engine:
        got = engine(x)["output"]
    ops = op_counts(tmp_path / "optimised.onnx")
    assert meant == Calls(5, 1, 0)  # the last two calls of the conv are one
    done = (ops["QLinearConv"], ops["MatMulIntegerToFloat"], len(float_convs(tmp_path / "optimised.onnx")))
    expected = run(tmp_path / "q.onnx", x, optimise=False)["output"]
    close = np.abs(got - expected).max() <= 1e-5 * np.abs(expected).max()
    assert done == (5, 1, 0) and bool(close), (done, close)


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
    for read in (op_counts, float_convs, calls):
        with pytest.raises(
            GraphError, match=r"m\.onnx (cannot be read as an ONNX graph|holds no nodes)"
        ) as caught:
            read(path)
        assert "\n" not in str(caught.value)
