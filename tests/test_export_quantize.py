"""FP8 and weight-only graphs, names of nodes, and how their codes are stored."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import ml_dtypes
import numpy as np
import onnx
import onnx_ir as ir
import onnxruntime
import pytest
import torch
from safetensors.numpy import load_file
from test_export import INFO, calibrated, feeds_of, layers_of, rms, run, session
from torch import nn

from ptqd_export.export import export_fp, fold, lint, lower, op_counts, quantize, quantized_convs, quantized_nodes, save
from ptqd_export.precision import Precision
from ptqd_export.quant import Emission

FP8, W4A16, W8A16 = Precision(8, 8, "fp8"), Precision(4, 16), Precision(8, 16)


def graph_of(toy: nn.Module, base: ir.Model, precision: Precision, emission: Emission) -> ir.Model:
    return lower(quantize(base, calibrated(toy, precision), emission), emission, precision)


@pytest.mark.parametrize("precision", [FP8, W4A16, W8A16], ids=str)
def test_ort_cpu_optimised_computes_the_portable_numbers(toy: nn.Module, base: ir.Model, precision: Precision, tmp_path: Path) -> None:
    """Float sums in another order: 1e-5 of the largest value, but where one of the 4000 inputs of FP8 rounds the other way (6 % of it)."""
    portable, ours = (graph_of(toy, base, precision, e) for e in (Emission.PORTABLE, Emission.ORT_CPU))
    save({"q": ours}, tmp_path)
    for n in (1, 3):
        exact = run(portable, feeds_of(n), optimise=False)["output"]
        difference = np.abs(run(tmp_path / "q.onnx", feeds_of(n))["output"] - exact) / np.abs(exact).max()
        assert (difference > 1e-5).mean() < (0.02 if precision == FP8 else 1e-9) and difference.max() < 0.01
    session(tmp_path / "q.onnx", tmp_path / "optimised.onnx")
    ops = op_counts(tmp_path / "optimised.onnx")
    assert not {"MatMulIntegerToFloat", "MatMulNBits", "QLinearConv", "DequantizeLinear"} & set(ops)
    assert quantized_convs(tmp_path / "q.onnx") == 0 and quantized_nodes(tmp_path / "q.onnx") == {}


def test_onnx_runtime_would_break_the_portable_forms(toy: nn.Module, base: ir.Model) -> None:
    """Why ORT_CPU has forms of its own: if this fails, onnxruntime's defaults have learned them, and they can go."""
    portable, feeds = graph_of(toy, base, W8A16, Emission.PORTABLE), feeds_of(1)
    exact = run(portable, feeds, optimise=False)["output"]
    with pytest.raises(Exception, match="MatMulIntegerToFloat"):
        default_session(graph_of(toy, base, FP8, Emission.PORTABLE))
    loaded = default_session(portable)
    got = loaded.run(None, {i.name: feeds[i.name] for i in loaded.get_inputs()})[0]
    assert rms(got - exact) > 1e-4 * rms(exact)


def default_session(model: ir.Model) -> onnxruntime.InferenceSession:
    """ONNX Runtime as it comes, but for the thread pool, which is the one that OrtEngine made for the process."""
    options = onnxruntime.SessionOptions()
    options.use_per_session_threads = False
    options.log_severity_level = 4
    return onnxruntime.InferenceSession(ir.to_proto(model).SerializeToString(), options, providers=["CPUExecutionProvider"])


@pytest.mark.parametrize("emission", list(Emission))
def test_more_bits_are_closer_to_float(toy: nn.Module, base: ir.Model, emission: Emission) -> None:
    """Weights in 8 bits are closer than in 4, without quantized inputs closer than with them (which saturate here), and INT8 closer than FP8."""
    exact = run(base, feeds_of(3), optimise=False)["output"]
    native = emission is Emission.ORT_CPU
    order = [W8A16, W4A16, Precision(8, 8), FP8]
    errors = [rms(run(graph_of(toy, base, p, emission), feeds_of(3), optimise=native)["output"] - exact) / rms(exact) for p in order]
    assert 0 < errors[0] < errors[1] < errors[2] < errors[3] < 0.2


@pytest.mark.parametrize("emission", [Emission.PORTABLE, Emission.HALF])
def test_containers(toy: nn.Module, base: ir.Model, emission: Emission) -> None:
    for precision, weights, inputs in (
        (FP8, {ir.DataType.FLOAT8E4M3FN}, {ir.DataType.FLOAT8E4M3FN}),
        (W4A16, {ir.DataType.INT4, ir.DataType.INT8}, set()),  # first and last conv have 8 bits
        (W8A16, {ir.DataType.INT8}, set()),
        (Precision(4, 8), {ir.DataType.INT8}, {ir.DataType.INT8}),
    ):
        graph = graph_of(toy, base, precision, emission)
        lint(graph, emission)
        assert graph.opset_imports[""] == 21
        assert {n.outputs[0].dtype for n in graph.graph if n.op_type == "QuantizeLinear"} == inputs
        codes = [n.inputs[0] for n in graph.graph if n.op_type == "DequantizeLinear" and n.inputs[0] is not None and n.inputs[0].is_initializer()]
        assert {v.dtype for v in codes} == weights
        packed = {str(v.name) for v in codes if v.dtype is ir.DataType.INT4}
        assert ("grouped.weight.codes" in packed) == (precision == W4A16) and "conv_in.weight.codes" not in packed


@pytest.mark.parametrize("precision", [Precision(8, 8), FP8, W4A16], ids=str)
@pytest.mark.parametrize("emission", list(Emission))
def test_layers_are_called_by_their_module_paths(toy: nn.Module, base: ir.Model, emission: Emission, precision: Precision) -> None:
    graph = fold(graph_of(toy, base, precision, emission), np.full((3, 2), 0.5), np.zeros((3, 2)))
    names = [n.name for n in graph.graph]
    assert len(names) == len(set(names))
    layers = {n.name for n in graph.graph if "ptqd.layer" in n.metadata_props and n.op_type in ("Conv", "MatMul")}
    assert layers == {*layers_of(toy), "twice.2"}


class Wide(nn.Module):
    """One conv of 720 weights between two small ones: enough to lie outside the ONNX file in INT4 as well."""

    def __init__(self) -> None:
        super().__init__()
        self.inlet, self.wide, self.outlet = nn.Conv2d(2, 2, 1), nn.Conv2d(2, 40, 3, padding=1), nn.Conv2d(40, 2, 1)

    def forward(self, sample: torch.Tensor, timestep: torch.Tensor, class_labels: torch.Tensor) -> torch.Tensor:
        return self.outlet(torch.relu(self.wide(torch.relu(self.inlet(sample)))))  # type: ignore[no-any-return]


def test_tensors_of_fp8_and_int4_are_stored_as_bytes(tmp_path: Path) -> None:
    torch.manual_seed(0)
    module = Wide().eval()
    base = export_fp(module, INFO)
    models = {str(p): graph_of(module, base, p, Emission.PORTABLE) for p in (FP8, W4A16)}
    save(models, tmp_path)
    tensors = [a for name, a in load_file(tmp_path / "weights.safetensors").items() if name.startswith("wide.weight.codes")]
    four, eight = (calibrated(module, p).layers["wide"].weight for p in (W4A16, FP8))
    nibbles = four.reshape(-1).astype(np.uint8) & 15
    assert [a.dtype for a in tensors] == [np.uint8, np.uint8]
    assert {a.tobytes() for a in tensors} == {((nibbles[1::2] << 4) | nibbles[::2]).tobytes(), eight.tobytes()}
    for key, model in models.items():
        loaded = onnx.load(tmp_path / f"{key}.onnx")
        kinds = {i.name: onnx.numpy_helper.to_array(i) for i in loaded.graph.initializer}
        wanted, dtype = (four, ml_dtypes.int4) if key == "w4a16" else (eight.view(ml_dtypes.float8_e4m3fn), ml_dtypes.float8_e4m3fn)
        assert kinds["wide.weight.codes"].dtype == dtype
        np.testing.assert_array_equal(kinds["wide.weight.codes"].astype(np.float32), wanted.astype(np.float32))
        got, exact = (run(m, feeds_of(2), optimise=False)["output"] for m in (tmp_path / f"{key}.onnx", model))
        np.testing.assert_array_equal(got, exact)


def test_a_digest_is_of_the_graph_and_its_weights_alone(toy: nn.Module, base: ir.Model, tmp_path: Path) -> None:
    models = {str(p): graph_of(toy, base, p, Emission.HALF) for p in (Precision(8, 8), FP8, W4A16)}
    folders = [tmp_path / name for name in ("alone", "beside", "within")]
    for folder in folders:
        folder.mkdir()
    alone = save({"w8a8": models["w8a8"]}, folders[0])
    beside = save({"base": base, **models, "again": models["w8a8"].clone()}, folders[1])
    within = save(models, folders[2], None)
    assert alone["w8a8"] == beside["w8a8"] == beside["again"] == within["w8a8"]
    assert (folders[0] / "w8a8.onnx").read_bytes() != (folders[1] / "w8a8.onnx").read_bytes()
    assert beside == {**within, "base": beside["base"], "again": beside["w8a8"]} and len(set(beside.values())) == 4
    assert not (folders[2] / "weights.safetensors").exists()
    np.testing.assert_array_equal(*(run(folder / "w8a8.onnx", feeds_of(1), optimise=False)["output"] for folder in (folders[1], folders[2])))


@pytest.mark.parametrize("change", ["value", "name", "attribute", "small"])
def test_a_digest_sees_every_change(base: ir.Model, tmp_path: Path, change: str) -> None:
    other = base.clone()
    node = next(n for n in other.graph if n.op_type == "GroupNormalization")
    weight = other.graph.initializers["conv_in.weight"] if change in ("value", "name") else node.inputs[1]
    assert weight is not None and weight.const_value is not None
    if change == "name":
        weight.name = "renamed"
    elif change == "attribute":
        node.attributes["epsilon"] = ir.AttrFloat32("epsilon", 0.5)
    else:
        array = weight.const_value.numpy().copy()
        array.reshape(-1)[-1] += 1e-3
        weight.const_value = ir.tensor(array, name=weight.name)
    digests = save({"a": base, "b": other}, tmp_path)
    assert digests["a"] != digests["b"]


@pytest.mark.parametrize("precision", [Precision(8, 8), FP8, W4A16], ids=str)
def test_one_weight_scale_is_a_scalar(toy: nn.Module, base: ir.Model, precision: Precision) -> None:
    """A vector of equal values would still be per channel to TensorRT."""
    network = calibrated(toy, precision)
    single = {n: dataclasses.replace(layer, weight_scale=np.full_like(layer.weight_scale, 0.01)) for n, layer in network.layers.items()}
    for emission, dims in ((Emission.PORTABLE, 0), (Emission.HALF, 0), *([(Emission.ORT_CPU, 1)] if precision == Precision(8, 8) else [])):
        for layers, expected in ((single, dims), (network.layers, 1)):
            graph = lower(quantize(base, dataclasses.replace(network, layers=layers), emission), emission, precision)
            lint(graph, emission)
            scales = {v.name: v.const_value for v in graph.graph.initializers.values() if str(v.name).endswith(".weight.scale")}
            assert {np.asarray(scale.numpy()).ndim for scale in scales.values()} == {expected}  # type: ignore[union-attr]
