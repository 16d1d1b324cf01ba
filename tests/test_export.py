"""export/: numbers of every rewrite against a reference written from quant.py's definitions, structure, and bytes."""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
from collections.abc import Mapping
from pathlib import Path

import numpy as np
import onnx
import onnx_ir as ir
import pytest
import torch
from safetensors.numpy import load_file
from torch import nn
from torch.nn import functional as F

from ptqd_export.backends import OrtEngine
from ptqd_export.conditioning import ModelInfo
from ptqd_export.errors import GraphError
from ptqd_export.export import (
    export_fp,
    expose_layers,
    float_convs,
    fold,
    layer_sites,
    lint,
    lower,
    op_counts,
    quantize,
    quantized_nodes,
    save,
    with_outputs,
)
from ptqd_export.precision import FP32, Precision
from ptqd_export.quant import E4M3_MAX, Emission, LayerQuant, QuantizedNetwork, from_e4m3, qmax, to_e4m3
from ptqd_export.quant import quantize as codes_of
from ptqd_export.recipe import InputSpec

INFO = ModelInfo("toy", (2, 8, 8), (InputSpec("class_labels", num_classes=4, null_class=3),), "0" * 64)
PRECISIONS = [Precision(8, 8), Precision(4, 8), Precision(4, 4)]
PORTABLE_NUMBERS = [Precision(8, 8, "fp8"), Precision(4, 16), Precision(8, 16)]
"""Precisions whose numbers are the portable ones in every emission."""
FLOAT32 = [Emission.PORTABLE, Emission.ORT_CPU]
Arrays = Mapping[str, np.ndarray]


class Toy(nn.Module):
    """Every form a layer takes in the graph: grouped conv, conv without bias, conv and linear called twice, Gemm, MatMul, attention."""

    def __init__(self) -> None:
        super().__init__()
        self.conv_in = nn.Conv2d(2, 8, 3, padding=1)
        self.embedding = nn.Embedding(4, 8)
        self.time = nn.Sequential(nn.Linear(8, 16), nn.SiLU(), nn.Linear(16, 8, bias=False))
        self.grouped = nn.Conv2d(8, 16, 3, padding=1, stride=2, groups=4, bias=False)
        self.norm = nn.GroupNorm(4, 16, eps=1e-3)
        self.twice = nn.Conv2d(16, 16, 1)
        self.to_q, self.to_k, self.to_v = (nn.Linear(16, 16) for _ in range(3))
        self.to_out = nn.Linear(16, 16, bias=False)
        self.conv_out = nn.Conv2d(24, 2, 3, padding=1)

    def forward(self, sample: torch.Tensor, timestep: torch.Tensor, class_labels: torch.Tensor) -> torch.Tensor:
        angles = timestep[:, None] * torch.tensor([0.01, 0.1, 1.0, 2.0])
        emb = self.time(torch.cat([angles.sin(), angles.cos()], 1) + self.embedding(class_labels))
        first = self.conv_in(sample) + emb[:, :, None, None]
        h = F.silu(self.norm(self.grouped(first)))
        h = self.twice(F.silu(self.twice(h)))
        b, c, height, width = h.shape
        tokens = h.flatten(2).transpose(1, 2)
        q, k, v = (to(tokens).view(b, -1, 4, 4).transpose(1, 2) for to in (self.to_q, self.to_k, self.to_v))
        tokens = self.to_out(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).reshape(b, -1, c)) + tokens
        h = tokens.transpose(1, 2).reshape(b, c, height, width)
        return self.conv_out(torch.cat([F.interpolate(h, scale_factor=2.0, mode="nearest"), first], 1))


def feeds_of(n: int, step: int = 0, seed: int = 0) -> dict[str, np.ndarray]:
    rng = np.random.default_rng(seed)
    return {
        "sample": rng.standard_normal((n, 2, 8, 8)).astype(np.float32),
        "timestep": rng.integers(0, 1000, n),
        "class_labels": rng.integers(0, 4, n),
        "step": np.array([step]),
    }


def forward(module: nn.Module, feeds: Arrays) -> np.ndarray:
    with torch.no_grad():
        tensors = [torch.from_numpy(feeds[name]) for name in ("sample", "timestep", "class_labels")]
        return np.asarray(module(tensors[0], tensors[1], class_labels=tensors[2]).numpy())


def layers_of(module: nn.Module) -> dict[str, nn.Module]:
    return {name: m for name, m in module.named_modules() if isinstance(m, nn.Conv2d | nn.Linear)}


def calibrated(module: nn.Module, precision: Precision, edge_bits: int | None = 8) -> QuantizedNetwork:
    """Absolute-maximum scales; conv_in and conv_out at `edge_bits`. Inputs and outputs from eight samples."""
    seen: dict[str, list[float]] = {}
    modules = layers_of(module)

    def record(name: str) -> object:
        def hook(_: nn.Module, args: tuple[torch.Tensor, ...], out: torch.Tensor) -> None:
            known = seen.get(name, [0.0, 0.0])
            seen[name] = [max(known[0], float(args[0].abs().max())), max(known[1], float(out.abs().max()))]

        return hook

    handles = [m.register_forward_hook(record(name)) for name, m in modules.items()]  # type: ignore[arg-type]
    forward(module, feeds_of(8, seed=1))
    for handle in handles:
        handle.remove()
    layers = {}
    for name, m in modules.items():
        weight = m.weight.detach().numpy()
        edge = name in ("conv_in", "conv_out") and edge_bits
        w_bits, a_bits = (edge_bits, edge_bits) if edge and edge_bits else (precision.weight_bits, precision.activation_bits)
        if precision.weight_only:
            a_bits = precision.activation_bits
        fp8, conv = precision.number == "fp8", isinstance(m, nn.Conv2d)
        top_w, top_a = (E4M3_MAX, E4M3_MAX) if fp8 else (qmax(w_bits), qmax(a_bits))
        weight_scale = (np.abs(weight.reshape(len(weight), -1)).max(1) / top_w).astype(np.float32)
        spread = weight_scale.reshape(-1, *[1] * (weight.ndim - 1))
        layers[name] = LayerQuant(
            name=name,
            kind="conv" if conv else "linear",
            weight=to_e4m3(weight / spread) if fp8 else codes_of(weight, spread, w_bits),
            weight_scale=weight_scale,
            weight_bits=w_bits,
            input_scale=float(np.float32(0.8 * seen[name][0] / top_a)),  # some values saturate
            activation_bits=a_bits,
            output_scale=float(np.float32(0.9 * seen[name][1] / qmax(8))) if conv else None,
            bias=None if m.bias is None else m.bias.detach().numpy(),
            macs=1,
            number=precision.number,
        )
    return QuantizedNetwork(precision, layers)


def simulate(layer: LayerQuant, module: nn.Module, emission: Emission, x: np.ndarray) -> np.ndarray:
    """One layer by the definitions of quant.py, in float64."""
    scale = layer.bias_scale().astype(np.float64)
    if layer.weight_only:
        codes, scale = x.astype(np.float64), layer.weight_scale.astype(np.float64)
    elif layer.number == "fp8":
        codes = from_e4m3(to_e4m3(x / np.float32(layer.input_scale))).astype(np.float64)
    else:
        codes = codes_of(x, layer.input_scale, layer.activation_bits).astype(np.float64)
    weight = torch.from_numpy(layer.weight_values().astype(np.float64))
    precision = Precision(layer.weight_bits, layer.activation_bits, layer.number)
    ort_conv = emission.numerics(precision) is Emission.ORT_CPU and layer.kind == "conv"
    bias: np.ndarray | None = None if layer.bias is None else layer.bias.astype(np.float64) / scale
    if ort_conv:
        bias = layer.bias_codes()
    offset = 0 if bias is None else bias.astype(np.float64)
    if layer.kind == "linear":
        return np.asarray(((codes @ weight.numpy().T) + offset) * scale)
    assert isinstance(module, nn.Conv2d)
    out = F.conv2d(torch.from_numpy(codes), weight, None, module.stride, module.padding, module.dilation, module.groups).numpy()
    out = (out + np.reshape(offset, (-1, 1, 1) if bias is not None else ())) * scale[:, None, None]
    if not ort_conv:
        return np.asarray(out)
    assert layer.output_scale is not None
    return codes_of(out, layer.output_scale, 8).astype(np.float64) * np.float32(layer.output_scale)


def session(source: Path | ir.Model, optimised: Path | None = None, optimise: bool = True) -> OrtEngine:
    if isinstance(source, Path):
        return OrtEngine(source, optimise=optimise, optimised_path=optimised)
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "model.onnx"
        path.write_bytes(ir.to_proto(source).SerializeToString())
        return OrtEngine(path, optimise=optimise, optimised_path=optimised)


def run(model: Path | ir.Model, feeds: Arrays, optimise: bool = True) -> dict[str, np.ndarray]:
    with session(model, optimise=optimise) as engine:
        return engine(feeds)


def rms(x: np.ndarray) -> float:
    return float(np.sqrt(np.mean(np.square(x, dtype=np.float64))))


# --- export_fp


@pytest.mark.parametrize("n", [1, 3])
def test_export_equals_torch_at_any_batch(toy: nn.Module, base: ir.Model, n: int) -> None:
    assert [v.name for v in base.graph.inputs] == ["sample", "timestep", "class_labels"]
    np.testing.assert_allclose(run(base, feeds_of(n))["output"], forward(toy, feeds_of(n)), atol=2e-6)
    lint(base, Emission.PORTABLE)


def test_every_layer_is_noted_and_nothing_else_of_the_exporter_is_kept(toy: nn.Module, base: ir.Model) -> None:
    nodes = [(node.metadata_props["ptqd.layer"], node.op_type) for node in base.graph if "ptqd.layer" in node.metadata_props]
    assert {path for path, op in nodes if op != "Add"} == set(layers_of(toy))
    assert [path for path, op in nodes if op == "Conv"].count("twice") == 2
    text = ir.to_proto(base).SerializeToString()
    assert b"pkg.torch" not in text and b"stack_trace" not in text and str(Path.cwd()).encode() not in text
    assert b"module." not in text
    assert all(not isinstance(v.shape[0], int) and str(v.shape[0]) == "batch" for v in (*base.graph.inputs, *base.graph.outputs) if v.shape)


def test_the_model_owns_its_weights(toy: nn.Module) -> None:
    module, wanted = copy_of(toy), forward(toy, feeds_of(1))
    model = export_fp(module, INFO)
    with torch.no_grad():
        for p in module.parameters():
            p.zero_()
    np.testing.assert_allclose(run(model, feeds_of(1))["output"], wanted, atol=2e-6)


def copy_of(module: nn.Module) -> nn.Module:
    other = Toy().eval()
    other.load_state_dict(module.state_dict())
    return other


def test_export_is_silent(toy: nn.Module, capfd: pytest.CaptureFixture[str]) -> None:
    export_fp(toy, INFO)
    captured = capfd.readouterr()
    assert captured.out == "" and captured.err == ""


class Frozen(nn.Module):
    """Its forward turns the batch size into a Python number."""

    def forward(self, sample: torch.Tensor, timestep: torch.Tensor) -> torch.Tensor:
        return sample * float(len(sample)) if sample.shape[0] == 2 else sample


class Failing(nn.Module):
    def forward(self, sample: torch.Tensor, timestep: torch.Tensor) -> torch.Tensor:
        return sample.reshape(3, 5, 7)


class TwoOutputs(nn.Module):
    def forward(self, sample: torch.Tensor, timestep: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        return sample * 2, sample * 3


class First(nn.Module):
    def forward(self, sample: torch.Tensor, timestep: torch.Tensor) -> torch.Tensor:
        return sample[:1] * 2


@pytest.mark.parametrize(
    ("module", "says"),
    [(Frozen(), "conflicts"), (Failing(), "is invalid for input of size"), (TwoOutputs(), "returns one tensor"), (First(), "became static")],
)
def test_what_cannot_be_exported_is_told_in_one_line(module: nn.Module, says: str) -> None:
    with pytest.raises(GraphError, match=f"toy.*{says}|{says}.*toy") as error:
        export_fp(module, ModelInfo("toy", (2, 8, 8), (), ""))
    assert "\n" not in str(error.value)


def test_a_folded_normalisation_hides_its_layer() -> None:
    """The exporter folds BatchNorm into the conv before it: the module's own weight is not in the graph, so it must not be quantized with it."""

    class Normed(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv, self.norm = nn.Conv2d(2, 2, 1), nn.BatchNorm2d(2)

        def forward(self, sample: torch.Tensor, timestep: torch.Tensor) -> torch.Tensor:
            return self.norm(self.conv(sample))

    module = Normed().eval()
    module.norm.running_var.fill_(4.0)  # type: ignore[operator, union-attr]
    model = export_fp(module, ModelInfo("normed", (2, 8, 8), (), ""))
    assert [n.op_type for n in model.graph] == ["Conv"]
    assert "ptqd.layer" not in model.graph[0].metadata_props


# --- quantize


@pytest.mark.parametrize("emission", FLOAT32)
@pytest.mark.parametrize("precision", PRECISIONS + PORTABLE_NUMBERS, ids=str)
def test_every_layer_equals_its_definition(toy: nn.Module, base: ir.Model, emission: Emission, precision: Precision, tmp_path: Path) -> None:
    network = calibrated(toy, precision)
    graph = lower(quantize(base, network, emission), emission, precision)
    sites = layer_sites(graph)
    assert set(sites) == set(network.layers)
    assert {source for source, _ in sites.values()} <= {v.name for v in (*base.graph.inputs, *(v for n in base.graph for v in n.outputs))}
    save({"q": graph}, tmp_path)
    lint(tmp_path / "q.onnx", emission)
    assert expose_layers(tmp_path / "q.onnx", tmp_path / "debug.onnx") == sites
    modules = layers_of(toy)
    total = apart = 0
    for n in (1, 3):
        values = run(tmp_path / "debug.onnx", feeds_of(n, seed=n), optimise=emission is Emission.ORT_CPU)
        for name, (source, target) in sites.items():
            layer = network.layers[name]
            wanted, got = simulate(layer, modules[name], emission, values[source]), values[target]
            assert got.shape == wanted.shape, name
            fused = emission.numerics(precision) is Emission.ORT_CPU
            step = layer.output_scale if fused and layer.output_scale else 1e-5 * np.abs(wanted).max()
            difference = np.abs(got - wanted) / step
            assert difference.max() < 1.01, (name, difference.max())
            total, apart = total + difference.size, apart + int((difference > 0.5).sum())
    assert apart <= max(1, total * 1e-3), (apart, total)


def test_the_layer_check_sees_a_wrong_scale(toy: nn.Module, base: ir.Model) -> None:
    """The negative of the test above: one weight scale off by 5 % is seen."""
    import dataclasses

    network = calibrated(toy, Precision(8, 8))
    wrong = dataclasses.replace(network.layers["twice"], weight_scale=network.layers["twice"].weight_scale * np.float32(1.05))
    graph = quantize(base, QuantizedNetwork(network.precision, {**network.layers, "twice": wrong}), Emission.ORT_CPU)
    source, target = layer_sites(graph)["twice"]
    values = run(with_outputs(graph, [source, target]), feeds_of(1))
    layer = network.layers["twice"]
    assert layer.output_scale is not None
    assert (np.abs(values[target] - simulate(layer, toy.twice, Emission.ORT_CPU, values[source])) / layer.output_scale).max() > 1.5  # type: ignore[arg-type]


@pytest.mark.parametrize("emission", FLOAT32)
def test_quantized_graphs_are_close_to_float_and_closer_with_more_bits(toy: nn.Module, base: ir.Model, emission: Emission) -> None:
    exact = forward(toy, feeds_of(3))
    errors = [rms(run(quantize(base, calibrated(toy, p), emission), feeds_of(3))["output"] - exact) / rms(exact) for p in PRECISIONS]
    assert 0 < errors[0] < 0.1 and errors[0] < errors[1] < errors[2] < 1


@pytest.mark.parametrize("precision", PRECISIONS, ids=str)
def test_every_quantized_conv_is_fused_into_an_integer_one(toy: nn.Module, base: ir.Model, precision: Precision, tmp_path: Path) -> None:
    network = calibrated(toy, precision)
    save({"q": lower(quantize(base, network, Emission.ORT_CPU), Emission.ORT_CPU, precision)}, tmp_path)
    session(tmp_path / "q.onnx", tmp_path / "optimised.onnx")
    ops = op_counts(tmp_path / "optimised.onnx")
    convs = sum(layer.kind == "conv" for layer in network.layers.values()) + 1  # one is called twice
    assert ops["QLinearConv"] == convs and float_convs(tmp_path / "optimised.onnx") == []
    assert ops["MatMulIntegerToFloat"] == len(network.layers) - convs + 1 and ops["Gemm"] == ops["MatMul"] == 0


def test_bits_and_containers(toy: nn.Module, base: ir.Model) -> None:
    network = calibrated(toy, Precision(4, 4))
    for emission, dtype, zero in ((Emission.PORTABLE, np.int8, 0), (Emission.ORT_CPU, np.uint8, 128)):
        graph = quantize(base, network, emission).graph
        clips = [n for n in graph if n.op_type == "Clip"]
        limits = {tuple(int(v.const_value.numpy()) for v in n.inputs[1:] if v and v.const_value) for n in clips}
        assert limits == {(zero - 8, zero + 7)}
        assert {n.inputs[2].const_value.numpy().dtype for n in graph if n.op_type == "QuantizeLinear" and n.inputs[2]} == {np.dtype(dtype)}  # type: ignore[union-attr]
        narrow = [layer for layer in network.layers.values() if layer.activation_bits == 4]
        assert 0 < len(clips) <= len(narrow) + 1  # to_q, to_k and to_v see one value; one conv is called twice
        assert all(np.abs(layer.weight).max() <= 8 for layer in narrow)


def test_one_value_is_quantized_once(toy: nn.Module, base: ir.Model) -> None:
    graph = quantize(base, calibrated(toy, Precision(8, 8)), Emission.PORTABLE).graph
    quantized = [n.inputs[0].name for n in graph if n.op_type == "QuantizeLinear" and n.inputs[0]]
    assert len(quantized) == len(set(quantized))
    assert len([n for n in graph if n.op_type in ("Conv", "MatMul") and "ptqd.layer" in n.metadata_props]) > len(quantized)


def test_base_is_left_alone(toy: nn.Module, base: ir.Model) -> None:
    before = ir.to_proto(base).SerializeToString(deterministic=True)
    graph = quantize(base, calibrated(toy, Precision(4, 4)), Emission.ORT_CPU)
    fold(lower(graph, Emission.ORT_CPU, Precision(4, 4)), np.full((3, 2), 0.5), np.zeros((3, 2)))
    lower(base, Emission.HALF, Precision(16, 16))
    assert ir.to_proto(base).SerializeToString(deterministic=True) == before


def test_a_layer_that_the_graph_lacks_is_named(toy: nn.Module, base: ir.Model) -> None:
    import dataclasses

    network = calibrated(toy, Precision(8, 8))
    ghost = dataclasses.replace(network.layers["twice"], name="down.ghost")
    with pytest.raises(GraphError, match=r"'down\.ghost' is not in the exported graph"):
        quantize(base, QuantizedNetwork(network.precision, {**network.layers, "down.ghost": ghost}), Emission.PORTABLE)
    swapped = dataclasses.replace(network.layers["grouped"], name="twice")
    with pytest.raises(GraphError, match="'twice' has weight codes of shape"):
        quantize(base, QuantizedNetwork(network.precision, {"twice": swapped}), Emission.PORTABLE)


# --- fold


def test_fold_is_the_affine_map_of_its_step(base: ir.Model, rng: np.random.Generator) -> None:
    gain, offset, mix = rng.uniform(0.5, 1.5, (3, 2)), rng.standard_normal((3, 2)), rng.standard_normal((3, 2))
    for sample_gain in (None, mix, mix[:, 0]):
        graph = fold(base, gain, offset, sample_gain)
        lint(graph, Emission.PORTABLE)
        for step in range(3):
            feeds = feeds_of(3, step)
            wanted = gain[step][:, None, None] * run(base, feeds)["output"] + offset[step][:, None, None]
            if sample_gain is not None:
                wanted = wanted + np.reshape(sample_gain[step], (-1, 1, 1)) * feeds["sample"]
            np.testing.assert_allclose(run(graph, feeds)["epsilon"], wanted, atol=1e-5)


def test_identity_adds_nothing(base: ir.Model) -> None:
    graph = fold(base, np.ones((3, 2)), np.zeros((3, 2)), np.zeros(3)).graph
    assert [v.name for v in graph.outputs] == ["epsilon"] and len(graph) == len(base.graph)
    assert "step" not in [v.name for v in graph.inputs]


@pytest.mark.parametrize(
    ("gain", "offset", "sample_gain", "says"),
    [
        (np.ones((3, 5)), np.ones((3, 5)), None, r"expected \(steps, 2\)"),
        (np.ones((3, 2)), np.ones((4, 2)), None, r"expected \(steps, 2\)"),
        (np.ones((3, 2)), np.ones((3, 2)), np.ones(4), "sample_gain has shape"),
        (np.full((3, 2), np.nan), np.ones((3, 2)), None, "gain table holds a value that is not finite"),
    ],
)
def test_wrong_tables(base: ir.Model, gain: np.ndarray, offset: np.ndarray, sample_gain: np.ndarray | None, says: str) -> None:
    with pytest.raises(GraphError, match=says):
        fold(base, gain, offset, sample_gain)


def test_fold_once(base: ir.Model) -> None:
    with pytest.raises(GraphError, match="once"):
        fold(fold(base, np.ones((3, 2)), np.zeros((3, 2))), np.ones((3, 2)), np.zeros((3, 2)))


# --- lower


def test_lowered_equals(base: ir.Model) -> None:
    graph = lower(base, Emission.ORT_CPU, FP32)
    ops = [n.op_type for n in graph.graph]
    assert ops.count("InstanceNormalization") == 1 and "GroupNormalization" not in ops
    assert ops.count("MultiHeadAttention") == 1 and "Softmax" not in ops
    lint(graph, Emission.ORT_CPU)
    for n in (1, 3):
        np.testing.assert_allclose(run(graph, feeds_of(n))["output"], run(base, feeds_of(n))["output"], atol=1e-5)
    assert [n.op_type for n in lower(base, Emission.PORTABLE, FP32).graph] == [n.op_type for n in base.graph]


def test_masked_attention_is_left_alone() -> None:
    class Causal(nn.Module):
        def forward(self, sample: torch.Tensor, timestep: torch.Tensor) -> torch.Tensor:
            b, c, h, w = sample.shape
            x = sample.flatten(2).view(b, h * w, 1, c).transpose(1, 2)
            out = F.scaled_dot_product_attention(x, x, x, is_causal=True)
            return out.transpose(1, 2).reshape(b, c, h, w)

    model = export_fp(Causal(), ModelInfo("causal", (2, 4, 4), (), ""))
    assert [n.op_type for n in lower(model, Emission.ORT_CPU, FP32).graph].count("Softmax") == 1


def test_a_diffusers_unet(tmp_path: Path) -> None:
    """Every layer is found under its path, every conv is fused, attention too; both batch sizes."""
    from diffusers import UNet2DModel

    torch.manual_seed(1)
    unet = UNet2DModel(
        sample_size=16,
        in_channels=2,
        out_channels=2,
        block_out_channels=(16, 32),
        layers_per_block=1,
        norm_num_groups=4,
        attention_head_dim=8,
        down_block_types=("DownBlock2D", "AttnDownBlock2D"),
        up_block_types=("AttnUpBlock2D", "UpBlock2D"),
        num_class_embeds=4,
    ).eval()

    class Tensor(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.unet = unet

        def forward(self, sample: torch.Tensor, timestep: torch.Tensor, class_labels: torch.Tensor) -> torch.Tensor:
            return self.unet(sample, timestep, class_labels=class_labels).sample  # type: ignore[no-any-return]

    module = Tensor().eval()
    model = export_fp(module, INFO)
    network = calibrated(module, Precision(4, 4))
    for n in (1, 3):
        np.testing.assert_allclose(run(lower(model, Emission.ORT_CPU, FP32), feeds_of(n))["output"], forward(module, feeds_of(n)), atol=1e-5)
    for emission in Emission:
        graph = lower(quantize(model, network, emission), emission, Precision(4, 4))
        assert set(layer_sites(graph)) == set(layers_of(module)) == set(quantized_nodes(graph))
        lint(graph, emission)
    save({"q": graph}, tmp_path)
    session(tmp_path / "q.onnx", tmp_path / "optimised.onnx")
    ops = op_counts(tmp_path / "optimised.onnx")
    assert emission is Emission.ORT_CPU
    assert ops["QLinearConv"] == sum(layer.kind == "conv" for layer in network.layers.values()) and not float_convs(tmp_path / "optimised.onnx")
    assert ops["MultiHeadAttention"] == 4 and ops["MatMul"] == ops["Gemm"] == 0
    assert ops["MatMulIntegerToFloat"] == sum(layer.kind == "linear" for layer in network.layers.values())


# --- save, lint


def test_weights_are_shared_and_stored_once(toy: nn.Module, base: ir.Model, tmp_path: Path) -> None:
    models = {"fp32": base}
    for precision in PRECISIONS[1:]:
        network = calibrated(toy, precision)
        models |= {f"{precision}.{e}": lower(quantize(base, network, e), e, precision) for e in FLOAT32}
    save(models, tmp_path)
    tensors = load_file(tmp_path / "weights.safetensors")
    contents = [(a.dtype.name, a.shape, a.tobytes()) for a in tensors.values()]
    assert len(contents) == len(set(contents)) and all(a.nbytes > 256 for a in tensors.values())
    codes = [name for name, a in tensors.items() if a.dtype == np.int8 and name.startswith("grouped.weight")]
    assert len(codes) == 1  # w4a8 and w4a4, both emissions
    assert (tmp_path / "weights.safetensors").stat().st_mode == (tmp_path / "fp32.onnx").stat().st_mode
    assert any(name.startswith("grouped.weight") and a.dtype == np.float32 for name, a in tensors.items())
    for key, model in models.items():
        path = tmp_path / f"{key}.onnx"
        lint(path, Emission.ORT_CPU)
        for initializer in onnx.load(path, load_external_data=False).graph.initializer:
            assert (initializer.data_location == onnx.TensorProto.EXTERNAL) == (int(np.prod(initializer.dims)) * itemsize(initializer) > 256)
        np.testing.assert_array_equal(run(path, feeds_of(2))["output"], run(model, feeds_of(2))["output"])


def itemsize(initializer: onnx.TensorProto) -> int:
    return int(onnx.helper.tensor_dtype_to_np_dtype(initializer.data_type).itemsize)


HASH_SEED_SCRIPT = """
import sys
from pathlib import Path
sys.path.insert(0, {tests!r})
import torch
from test_export import write_all, Toy
torch.set_num_threads(1)
torch.manual_seed(0)
write_all(Toy().eval(), Path({folder!r}))
"""


def write_all(module: nn.Module, folder: Path) -> None:
    fp = export_fp(module, INFO)
    network = calibrated(module, Precision(4, 4))
    tables = np.full((3, 2), 0.5), np.ones((3, 2))
    save({"fp32": fp} | {str(e): fold(lower(quantize(fp, network, e), e, network.precision), *tables) for e in Emission}, folder)


def test_same_module_same_bytes(toy: nn.Module, tmp_path: Path) -> None:
    """Twice in this process, and in one with another hash seed."""
    folders = [tmp_path / name for name in ("a", "b", "c")]
    for folder in folders:
        folder.mkdir()
    write_all(toy, folders[0])
    write_all(copy_of(toy), folders[1])
    script = HASH_SEED_SCRIPT.format(tests=str(Path(__file__).parent), folder=str(folders[2]))
    done = subprocess.run([sys.executable, "-c", script], env={**os.environ, "PYTHONHASHSEED": "7"}, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    for file in sorted(folders[0].iterdir()):
        assert {(folder / file.name).read_bytes() for folder in folders} == {file.read_bytes()}, file.name


def test_lint_sees_a_broken_graph(base: ir.Model, tmp_path: Path) -> None:
    broken = base.clone()
    next(n for n in broken.graph if n.op_type == "Conv").attributes["strides"] = ir.AttrInt64s("strides", [1, 1, 1, 1, 1])
    with pytest.raises(GraphError, match=r"onnx\.checker"):
        lint(broken, Emission.PORTABLE)
    (tmp_path / "x.onnx").write_bytes(b"no graph")
    with pytest.raises(GraphError, match=r"onnx\.checker"):
        lint(tmp_path / "x.onnx", Emission.PORTABLE)
    with pytest.raises(GraphError, match="no value 'nothing'"):
        with_outputs(base, ["nothing"])


def test_importing_export_leaves_torch_alone() -> None:
    script = "import sys, ptqd_export.export; sys.exit('torch' in sys.modules or 'onnxruntime' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", script], timeout=120).returncode == 0


def test_float_network_is_the_base(base: ir.Model) -> None:
    same = quantize(base, QuantizedNetwork(FP32, {}), Emission.ORT_CPU)
    assert ir.to_proto(same).SerializeToString(deterministic=True) == ir.to_proto(base).SerializeToString(deterministic=True)
    assert layer_sites(same) == {}
