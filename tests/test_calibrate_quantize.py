"""Observed layers, quantized networks, and the simulation against exact arithmetic and against ONNX Runtime."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import pytest
import torch
from onnx import TensorProto, checker, helper, numpy_helper
from safetensors.numpy import load_file
from test_calibrate_models import recipe_of, save_pipeline
from torch import nn

from ptqd_export.backends import OrtEngine
from ptqd_export.build import _write_tables
from ptqd_export.bundle import QUANTIZATION
from ptqd_export.calibrate import (
    LayerSimulator,
    Network,
    Observed,
    SimulatedEngine,
    SimulatedLayer,
    TorchEngine,
    Trajectories,
    collect,
    measure,
    observe,
    open_model,
    quantize,
)
from ptqd_export.calibrate.quantize import MAX_BIAS_CODE
from ptqd_export.calibrate.ranges import weight_scales
from ptqd_export.calibrate.rounding import nearest
from ptqd_export.engine import Engine
from ptqd_export.errors import ModelError
from ptqd_export.noise import Correction, NoiseStats
from ptqd_export.precision import FP32, Precision
from ptqd_export.quant import E4M3_MAX, Emission, LayerQuant, from_e4m3, qmax, qmin, to_e4m3
from ptqd_export.quant import quantize as to_codes
from ptqd_export.recipe import Recipe
from ptqd_export.reference import _layers
from ptqd_export.schedule import NoiseSchedule

W8A8, W4A8, W4A4, FP8, W4A16 = (Precision.parse(p) for p in ("w8a8", "w4a8", "w4a4", "w8a8-fp8", "w4a16"))
Case = tuple[Recipe, Network, NoiseSchedule, Trajectories, Observed]


@pytest.fixture(scope="module")
def case(tmp_path_factory: pytest.TempPathFactory) -> Case:
    folder = tmp_path_factory.mktemp("quantize")
    recipe = recipe_of(save_pipeline(folder / "tiny"))
    network = open_model(recipe)
    schedule = NoiseSchedule.from_config(network.scheduler_config, 4, 1.0)
    trajectories = collect(network, schedule, recipe, folder / "t")
    return recipe, network, schedule, trajectories, observe(network, schedule, recipe, trajectories)


def equal(a: LayerQuant, b: LayerQuant) -> bool:
    same = (np.array_equal(getattr(a, f), getattr(b, f)) for f in ("weight", "weight_scale", "bias"))
    return all(same) and (a.input_scale, a.output_scale, a.macs, a.name) == (b.input_scale, b.output_scale, b.macs, b.name)


def test_observed_layers(case: Case) -> None:
    recipe, network, schedule, trajectories, observed = case
    names = list(observed.layers)
    convs = [name for name in names if observed.layers[name].kind == "conv"]
    assert convs[0] == "conv_in" and convs[-1] == "conv_out"
    assert names.index("down_blocks.0.resnets.0.conv1") < names.index("mid_block.resnets.0.conv1") < names.index("up_blocks.1.resnets.0.conv1")
    assert observed.layers["conv_in"].macs == 64 * 16 * 9
    assert observed.layers["down_blocks.1.attentions.0.to_q"].macs == 16 * 32 * 32
    assert observed.layers["time_embedding.linear_1"].vector and observed.layers["time_embedding.linear_1"].macs == 16 * 64
    assert not observed.layers["down_blocks.1.attentions.0.to_q"].vector
    # conv_in sees the calibration trajectories' x_t, in both branches, at every step.
    x = np.concatenate([b.x for b in trajectories if b.indices.start in trajectories.calibration], axis=1)
    assert observed.layers["conv_in"].input.largest == np.abs(x).max() and observed.layers["conv_in"].input.total == 2 * x.size
    again = observe(network, schedule, recipe, trajectories)
    for name, layer in again.layers.items():
        assert (layer.output.counts == observed.layers[name].output.counts).all() and layer.output.largest == observed.layers[name].output.largest
    assert not any(m._forward_hooks for m in network.module.modules())


def test_which_layers_are_quantized(case: Case) -> None:
    recipe, network, *_, observed = case
    net = quantize(network, observed, W4A8, recipe)
    assert {"conv_in", "conv_out", "time_embedding.linear_1", "down_blocks.0.resnets.0.time_emb_proj"} <= set(net.float_macs)
    assert {"down_blocks.0.resnets.0.conv1", "down_blocks.1.attentions.0.to_out.0"} <= set(net.layers)
    assert sorted([*net.layers, *net.float_macs]) == sorted(observed.layers)
    assert net.macs == sum(layer.macs for layer in observed.layers.values())
    conv, linear = net.layers["down_blocks.0.resnets.0.conv1"], net.layers["down_blocks.1.attentions.0.to_q"]
    assert (conv.kind, conv.weight.shape, conv.weight_bits, conv.activation_bits) == ("conv", (16, 16, 3, 3), 4, 8)
    assert conv.output_scale is not None and linear.output_scale is None and linear.weight.shape == (32, 32)
    assert conv.weight.min() >= -8 and conv.weight.max() <= 7 and len(np.unique(conv.weight)) > 8
    assert np.float32(conv.input_scale) == conv.input_scale
    assert net.bops == sum(layer.macs * 32 for layer in net.layers.values()) + sum(net.float_macs.values()) * 1024

    edges = quantize(network, observed, W4A4, recipe.override(quantization={"edge_layers": "w8a8", "skip": ("*.attentions.*", "mid_block.*")}))
    assert (edges.layers["conv_in"].weight_bits, edges.layers["conv_out"].activation_bits) == (8, 8)
    assert edges.layers["down_blocks.0.resnets.0.conv1"].weight_bits == 4
    assert not any("attentions" in name or name.startswith("mid_block") for name in edges.layers)

    fp32 = quantize(network, observed, FP32, recipe)
    assert not fp32.layers and set(fp32.float_macs) == set(observed.layers)
    with pytest.raises(ModelError, match="no layer left to quantize"):
        quantize(network, observed, W8A8, recipe.override(quantization={"skip": ("*",)}))


def test_quantize_is_deterministic_and_leaves_the_network_alone(case: Case) -> None:
    recipe, network, schedule, trajectories, observed = case
    before = {k: v.clone() for k, v in network.module.state_dict().items()}
    again = observe(network, schedule, recipe, trajectories)
    for rounding in ("nearest", "gptq"):
        of = recipe.override(quantization={"rounding": rounding})
        first, second = (quantize(network, seen, W4A8, of) for seen in (observed, again))
        assert list(first.layers) == list(second.layers) and all(equal(first.layers[n], second.layers[n]) for n in first.layers)
    with SimulatedEngine(network, first, Emission.ORT_CPU, schedule) as engine:
        measure(engine, network.info, schedule, trajectories, 2.0, "held_out")
    assert all(torch.equal(v, before[k]) for k, v in network.module.state_dict().items())


@pytest.mark.parametrize("groups", [1, 2])
def test_hessians_are_those_of_the_flattened_weight(tmp_path: Path, groups: int) -> None:
    """Output energy from the Hessian, w^T H w summed, equals that of the layer itself when all positions are taken."""
    (tmp_path / "net.py").write_text(
        "import torch\nclass Net(torch.nn.Module):\n def __init__(self):\n  super().__init__()\n"
        f"  self.conv = torch.nn.Conv2d(2, 4, 3, 2, padding=1, groups={groups}, bias=False)\n  self.up = torch.nn.ConvTranspose2d(4, 2, 2, 2)\n"
        " def forward(self, sample, timestep):\n  return self.up(self.conv(sample))\n"
        "def make():\n return Net()\n"
    )
    (tmp_path / "scheduler_config.json").write_text("{}")
    model = {"source": "net.py:make", "sample_shape": [2, 6, 6], "scheduler": "scheduler_config.json", "null_class": None}
    recipe = recipe_of(tmp_path, model=model, calibration={"size": 4, "batch_size": 4}, sampler={"guidance_scale": 1.0})
    network = open_model(recipe)
    schedule = NoiseSchedule.from_config(network.scheduler_config, 3, 0.0)
    trajectories = collect(network, schedule, recipe, tmp_path / "t")
    seen = observe(network, schedule, recipe, trajectories).layers
    assert list(seen) == ["conv"] and seen["conv"].hessians is not None
    conv: Any = network.module.get_submodule("conv")
    x = torch.from_numpy(trajectories.first(4).x.reshape(-1, 2, 6, 6))
    with torch.no_grad():
        expected = float((conv(x).double() ** 2).sum())
    rows = conv.weight.reshape(groups, 4 // groups, -1)
    got = float(torch.einsum("gok,gkl,gol->", rows, seen["conv"].hessians, rows))
    assert got == pytest.approx(expected, rel=1e-4)


def make_layer(module: nn.Module, precision: Precision, x: np.ndarray, name: str = "layer") -> LayerQuant:
    """A layer quantized from random data, at ranges that clip a little."""
    m: Any = module
    weight = m.weight.detach().numpy()
    bias = None if m.bias is None else m.bias.detach().numpy()
    bits, number = (precision.weight_bits, precision.activation_bits), precision.number
    scale = weight_scales(weight, bits[0], "mse")
    conv = weight.ndim == 4
    with torch.no_grad():
        y = module(torch.from_numpy(x)).numpy()
    if number == "fp8":
        scale = (scale * np.float32(127 / E4M3_MAX)).astype(np.float32)
    top = E4M3_MAX if number == "fp8" else qmax(bits[1])
    input_scale = 1.0 if precision.weight_only else float(np.float32(np.quantile(np.abs(x), 0.99) / top))
    cpu = Emission.ORT_CPU.numerics(precision) is Emission.ORT_CPU
    output_scale = float(np.float32(np.quantile(np.abs(y), 0.995) / 127)) if conv and cpu else None
    codes = nearest(weight, scale, bits[0], number)
    return LayerQuant(name, "conv" if conv else "linear", codes, scale, bits[0], input_scale, bits[1], output_scale, bias, 1, number)


def ort_model(layer: LayerQuant, emission: Emission, conv: nn.Conv2d | None) -> bytes:
    """The layer as the emission writes it, by hand."""
    fp8 = layer.number == "fp8"
    cpu = emission is Emission.ORT_CPU
    weight = layer.weight.view(ml_dtypes.float8_e4m3fn) if fp8 else layer.weight
    zero = np.array(128, np.uint8) if cpu else np.array(0, weight.dtype)
    low, high = (int(zero) + q(min(layer.activation_bits, 8)) for q in (qmin, qmax))
    linear = conv is None
    constants = {
        "sx": np.array(layer.input_scale, np.float32),
        "zx": zero,
        "low": np.array(low, np.uint8 if cpu else np.int8),
        "high": np.array(high, np.uint8 if cpu else np.int8),
        "w": weight.T.copy() if linear else weight,
        "sw": layer.weight_scale,
        "zw": np.zeros(len(weight), weight.dtype),
    }
    nodes = [helper.make_node("QuantizeLinear", ["x", "sx", "zx"], ["xq"])]
    quantized = "xq"
    if layer.activation_bits < 8:
        nodes.append(helper.make_node("Clip", ["xq", "low", "high"], ["xc"]))
        quantized = "xc"
    nodes.append(helper.make_node("DequantizeLinear", [quantized, "sx", "zx"], ["xd"]))
    if layer.weight_only:
        nodes = [helper.make_node("Identity", ["x"], ["xd"])]
    nodes.append(helper.make_node("DequantizeLinear", ["w", "sw", "zw"], ["wd"], axis=1 if linear else 0))
    if linear:
        constants["b"] = layer.bias
        nodes += [helper.make_node("MatMul", ["xd", "wd"], ["m"]), helper.make_node("Add", ["m", "b"], ["y"])]
        shape: list[Any] = ["n", "l", layer.weight.shape[1]], ["n", "l", layer.weight.shape[0]]  # type: ignore[assignment]
    else:
        shape = ["n", conv.in_channels, "h", "w"], ["n", conv.out_channels, "p", "q"]  # type: ignore[assignment, union-attr]
        inputs = ["xd", "wd"]
        if layer.bias is not None:
            inputs.append("bd")
            if cpu:
                constants |= {"b": layer.bias_codes(), "sb": layer.bias_scale(), "zb": np.zeros(len(layer.weight), np.int32)}
                nodes.append(helper.make_node("DequantizeLinear", ["b", "sb", "zb"], ["bd"], axis=0))
            else:
                constants["bd"] = layer.bias
        pads = [*conv.padding, *conv.padding]  # type: ignore[union-attr]
        result = "c" if cpu else "y"
        attributes = {"strides": conv.stride, "pads": pads, "dilations": conv.dilation, "group": conv.groups}  # type: ignore[union-attr]
        nodes.append(helper.make_node("Conv", inputs, [result], **attributes))
        if cpu:
            constants["sy"] = np.array(layer.output_scale, np.float32)
            nodes += [
                helper.make_node("QuantizeLinear", ["c", "sy", "zx"], ["yq"]),
                helper.make_node("DequantizeLinear", ["yq", "sy", "zx"], ["y"]),
            ]
    graph = helper.make_graph(
        nodes,
        "layer",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, shape[0])],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, shape[1])],
        [numpy_helper.from_array(value, name) for name, value in constants.items()],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 21)], ir_version=10)
    checker.check_model(model, full_check=True)
    return bytes(model.SerializeToString())


def run_ort(model: bytes, x: np.ndarray, tmp_path: Path, optimise: bool) -> tuple[np.ndarray, str]:
    (tmp_path / "layer.onnx").write_bytes(model)
    with OrtEngine(tmp_path / "layer.onnx", optimise=optimise, optimised_path=tmp_path / "optimised.onnx") as engine:
        (y,) = engine({"x": x}).values()
    return np.asarray(y), (tmp_path / "optimised.onnx").read_bytes().decode("latin-1")


CONVS = {
    "plain": lambda: nn.Conv2d(24, 32, 3, padding=1),
    "strided without bias": lambda: nn.Conv2d(24, 16, 3, stride=2, padding=1, bias=False),
    "grouped": lambda: nn.Conv2d(24, 12, 3, padding=2, dilation=2, groups=3),
    "pointwise": lambda: nn.Conv2d(24, 20, 1),
}


@pytest.mark.parametrize(
    ("precision", "emission"),
    [*((p, e) for p in (W8A8, W4A8, W4A4) for e in (Emission.PORTABLE, Emission.ORT_CPU)), (FP8, Emission.PORTABLE), (W4A16, Emission.PORTABLE)],
    ids=lambda v: str(v),
)
@pytest.mark.parametrize("kind", [*CONVS, "linear"])
def test_simulation_equals_onnx_runtime(kind: str, emission: Emission, precision: Precision, rng: np.random.Generator, tmp_path: Path) -> None:
    torch.manual_seed(5)
    module = CONVS[kind]() if kind in CONVS else nn.Linear(24, 40)
    x = rng.standard_normal((3, 24, 10, 9) if kind in CONVS else (3, 50, 24)).astype(np.float32)
    layer = make_layer(module, precision, x)
    # ONNX Runtime 1.31 cannot run an FP8 MatMul once optimised, and takes the input of one with 8-bit weights to 8 bits itself.
    optimise = precision not in (FP8, W4A16)
    got, ops = run_ort(ort_model(layer, emission, module if isinstance(module, nn.Conv2d) else None), x, tmp_path, optimise)
    with torch.inference_mode():
        simulated = SimulatedLayer(layer, emission, module)(torch.from_numpy(x)).numpy()
    axis = (1, -1)[kind == "linear"]
    if emission is Emission.ORT_CPU and layer.kind == "conv":
        assert "QLinearConv" in ops
        assert layer.output_scale is not None
        steps = np.rint((got - simulated) / layer.output_scale)
        assert len(np.unique(np.rint(got / layer.output_scale))) > 50
        assert np.abs(steps).max() <= 1 and (steps != 0).mean() < 1e-3
    else:
        assert emission is Emission.PORTABLE or "MatMulIntegerToFloat" in ops
        # Float32 sums of some 200 products; an input code more or less would move an output by a hundred times that.
        assert np.abs(got - simulated).max() < 2e-6 * np.abs(got).max()
    # The test can fail: another scale of the input (of the weights, where the input has none) moves far more outputs.
    scales: dict[str, Any] = (
        {"weight_scale": layer.weight_scale * np.float32(1.02)} if layer.weight_only else {"input_scale": layer.input_scale * 1.02}
    )
    moved = dataclasses.replace(layer, **scales)
    with torch.inference_mode():
        other = SimulatedLayer(moved, emission, module)(torch.from_numpy(x)).numpy()
    assert (np.abs(other - got) > 0.5 * (layer.output_scale or 0) + 1e-5).mean() > (0.005 if axis == 1 else 0.5)


@pytest.mark.parametrize("precision", [W8A8, W4A4], ids=str)
def test_simulated_accumulator_is_the_integer_one(precision: Precision, rng: np.random.Generator) -> None:
    """Against int64 arithmetic in numpy, on the widest conv of a usual UNet."""
    torch.manual_seed(1)
    conv = nn.Conv2d(256, 8, 3, padding=1)
    x = rng.standard_normal((1, 256, 6, 6)).astype(np.float32)
    layer = make_layer(conv, precision, x)
    codes = np.pad(to_codes(x, layer.input_scale, precision.activation_bits).astype(np.int64), ((0, 0), (0, 0), (1, 1), (1, 1)))
    windows = np.lib.stride_tricks.sliding_window_view(codes, (3, 3), axis=(2, 3))
    bias = layer.bias_codes()
    assert bias is not None and layer.output_scale is not None
    acc = np.einsum("nihwkl,oikl->nohw", windows, layer.weight.astype(np.int64)) + bias[:, None, None]
    ratio = (layer.bias_scale() / np.float32(layer.output_scale))[:, None, None]
    out = np.clip(np.rint(acc.astype(np.float32) * ratio), -128, 127).astype(np.float32) * np.float32(layer.output_scale)
    with torch.inference_mode():
        simulated = SimulatedLayer(layer, Emission.ORT_CPU, conv)(torch.from_numpy(x)).numpy()
    assert np.array_equal(simulated, out)


@pytest.mark.parametrize("precision", [FP8, W4A16], ids=str)
def test_simulated_products_are_those_of_the_grid(precision: Precision, rng: np.random.Generator) -> None:
    """FP8 and weights alone, against float64 arithmetic in numpy; every emission computes the same."""
    torch.manual_seed(1)
    conv = nn.Conv2d(64, 8, 3, padding=1)
    x = (rng.standard_normal((1, 64, 6, 6)) * 10.0 ** rng.uniform(-4, 1, (1, 64, 1, 1))).astype(np.float32)  # subnormal FP8 codes to saturated ones
    layer = make_layer(conv, precision, x)
    assert layer.bias is not None
    with torch.inference_mode():
        simulated = [SimulatedLayer(layer, emission, conv)(torch.from_numpy(x)).numpy() for emission in Emission]
    assert all(np.array_equal(simulated[0], other) for other in simulated[1:])

    def reference(values: np.ndarray, weight: np.ndarray) -> np.ndarray:
        padded = np.pad(values.astype(np.float64), ((0, 0), (0, 0), (1, 1), (1, 1)))
        windows = np.lib.stride_tricks.sliding_window_view(padded, (3, 3), axis=(2, 3))
        scale = layer.bias_scale().astype(np.float64)[:, None, None]
        return np.asarray(np.einsum("nihwkl,oikl->nohw", windows, weight.astype(np.float64)) * scale)

    ratio = x / np.float32(layer.input_scale)
    values = from_e4m3(to_e4m3(ratio)) if precision is FP8 else ratio
    weight = layer.weight_values()
    bias = layer.bias.astype(np.float64)[:, None, None]
    # Rounding of the scaled weight, of each product and of each sum, of one sign at worst (Higham 2002, section 3.1).
    bound = (64 * 9 + 3) * 2.0**-24 * (reference(np.abs(values), np.abs(weight)) + np.abs(bias))
    assert (np.abs(simulated[0] - reference(values, weight) - bias) <= bound).all()
    # The test can fail: inputs and weights as they were before they were rounded.
    exact = conv.weight.detach().numpy() / layer.weight_scale[:, None, None, None]
    others = [reference(values, exact)] + ([reference(ratio, weight)] if precision is FP8 else [])
    assert all((np.abs(simulated[0] - other - bias) > bound).mean() > 0.9 for other in others)


def test_fp8_inputs_are_rounded_as_the_codes_are(rng: np.random.Generator) -> None:
    """A 1x1 layer that passes its input on: bit for bit from_e4m3(to_e4m3(x / scale)), ties, subnormals, zeros and saturation included."""
    conv = nn.Conv2d(1, 1, 1, bias=False)
    one = np.full((1, 1, 1, 1), to_e4m3(np.array(1.0)))
    values = from_e4m3(np.arange(127, dtype=np.uint8))
    ties = (values[:-1] + values[1:]) / 2
    x = np.concatenate([values, ties, np.nextafter(ties, 0), np.nextafter(ties, 500), [447.9, 449, 1e30, np.inf], 300 * rng.standard_normal(2000)])
    x = np.concatenate([x, -x]).astype(np.float32)[None, None, None]
    for scale in (1.0, 0.25, float(np.float32(0.037))):
        layer = LayerQuant("one", "conv", one, np.array([1 / scale], np.float32), 8, scale, 8, None, None, 1, "fp8")
        simulated = SimulatedLayer(layer, Emission.PORTABLE, conv)
        with torch.inference_mode():
            got = simulated(torch.from_numpy(x * np.float32(scale))).numpy()
            assert np.isnan(simulated(torch.full((1, 1, 1, 1), np.nan)).numpy()).all()  # said by measure, not hidden
        expected = from_e4m3(to_e4m3(x * np.float32(scale) / np.float32(scale))) * layer.bias_scale()
        assert np.array_equal(got, expected) and got.max() == expected.max()
        assert len(np.unique(got)) == 2 * 126 + 1


def test_simulated_network(case: Case, rng: np.random.Generator) -> None:
    recipe, network, schedule, trajectories, observed = case
    with TorchEngine(network, schedule) as engine:
        pooled: dict[str, NoiseStats] = {}
        for precision in (W8A8, W4A8, W4A4):
            net = quantize(network, observed, precision, recipe)
            for emission in (Emission.PORTABLE, Emission.ORT_CPU):
                with SimulatedEngine(network, net, emission, schedule) as simulated:
                    assert isinstance(simulated, Engine) and simulated.inputs == engine.inputs
                    parts = measure(simulated, network.info, schedule, trajectories, 2.0, "held_out")
                pooled[f"{precision}.{emission}"] = NoiseStats.pool(parts)
    power = {name: float(s.dd.sum()) for name, s in pooled.items()}
    assert 0 < power["w8a8.portable"] < power["w4a8.portable"] < power["w4a4.portable"]
    assert all(power[f"{p}.portable"] < power[f"{p}.ort-cpu"] for p in (W8A8, W4A8))  # quantized outputs are a noise of their own
    assert pooled["w8a8.portable"].snr[-1] > 300  # the ranges are those of the last steps: random weights let x_t grow

    layer = quantize(network, observed, W8A8, recipe).layers["down_blocks.0.resnets.0.conv1"]
    x = rng.standard_normal((2, 16, 8, 8)).astype(np.float32)
    output = LayerSimulator(network, layer, Emission.ORT_CPU)(x)
    assert output.shape == (2, 16, 8, 8) and output.dtype == np.float32
    assert layer.output_scale is not None
    assert np.array_equal(output, (np.rint(output / layer.output_scale) * layer.output_scale).astype(np.float32))


def test_correction_rows_follow_the_step(case: Case, rng: np.random.Generator) -> None:
    recipe, network, schedule, _, observed = case
    net = quantize(network, observed, W4A8, recipe)
    correction = Correction(1 + 0.1 * rng.standard_normal((4, 1)), rng.standard_normal((4, 1)), np.zeros(4))
    feeds = {
        "sample": rng.standard_normal((2, 1, 8, 8)).astype(np.float32),
        "timestep": np.full(2, schedule.timesteps[2]),
        "step": np.array([2]),
        "class_labels": np.array([0, 3]),
    }
    with (
        SimulatedEngine(network, net, Emission.PORTABLE, schedule) as raw,
        SimulatedEngine(network, net, Emission.PORTABLE, schedule, correction) as out,
    ):
        expected = correction.gain[2, 0] * raw(feeds)["epsilon"] + correction.offset[2, 0]
        np.testing.assert_allclose(out(feeds)["epsilon"], expected, rtol=1e-5, atol=1e-6)
        assert np.array_equal(raw(feeds)["epsilon"], raw(feeds)["epsilon"])


def test_fp8_and_weights_alone(case: Case) -> None:
    recipe, network, _, _, observed = case
    fp8, w4a16, w8a16 = (quantize(network, observed, p, recipe) for p in (FP8, W4A16, Precision.parse("w8a16")))
    name = "down_blocks.0.resnets.0.conv1"
    weight = network.module.get_submodule(name).weight.detach().numpy()
    layer = fp8.layers[name]
    assert (layer.number, layer.weight.dtype, layer.weight_bits, layer.activation_bits, layer.output_scale) == ("fp8", np.uint8, 8, 8, None)
    np.testing.assert_array_equal(layer.weight_scale, np.abs(weight).reshape(16, -1).max(1) / np.float32(448))
    assert layer.input_scale == np.float32(observed.layers[name].input.largest / 448)
    # A normal FP8 number is off by at most 2^-4 of itself, a subnormal one by 2^-10 scales.
    error = np.abs(layer.weight_values() * layer.weight_scale[:, None, None, None] - weight)
    assert (error <= np.maximum(np.abs(weight) * 2.0**-4, layer.weight_scale.max() * 2.0**-10) * (1 + 1e-6)).all() and error.max() > 0
    for net, bits in ((w4a16, 4), (w8a16, 8)):
        layer = net.layers[name]
        assert (layer.number, layer.weight.dtype, layer.weight_bits, layer.activation_bits) == ("int", np.int8, bits, 16)
        assert (layer.input_scale, layer.output_scale) == (1.0, None) and layer.weight_only
    # Weights do not know of their inputs' bits: GPTQ's codes at 4 bits are those of w4a8.
    w4a8 = quantize(network, observed, W4A8, recipe)
    assert all(np.array_equal(w4a16.layers[n].weight, w4a8.layers[n].weight) for n in w4a8.layers)
    near = quantize(network, observed, W4A16, recipe.override(quantization={"rounding": "nearest"}))
    assert not np.array_equal(near.layers[name].weight, w4a16.layers[name].weight)

    edges = recipe.override(quantization={"edge_layers": "w8a8"})
    first = [quantize(network, observed, p, edges).layers["conv_in"] for p in (FP8, W4A16, W4A8)]
    assert [(e.weight_bits, e.activation_bits, e.number) for e in first] == [(8, 8, "fp8"), (8, 16, "int"), (8, 8, "int")]
    fp16 = quantize(network, observed, Precision.parse("fp16"), recipe)
    assert not fp16.layers and fp16.bops == fp16.macs * 16 * 16


def test_noise_of_fp8_and_of_weights_alone(case: Case) -> None:
    recipe, network, schedule, trajectories, observed = case
    power = {}
    for precision in (W8A8, FP8, W4A8, W4A16, Precision.parse("w8a16")):
        with SimulatedEngine(network, quantize(network, observed, precision, recipe), Emission.ORT_CPU, schedule) as engine:
            parts = NoiseStats.pool(measure(engine, network.info, schedule, trajectories, 2.0, "calibration"))
        power[str(precision)] = float(parts.dd.sum() / parts.ee.sum())
    assert 0 < power["w8a16"] < 0.1 * power["w8a8"] and power["w8a16"] < 0.1 * power["w4a16"] < power["w4a8"]
    assert power["w8a8-fp8"] < 1e-2  # two rounded factors of 31 dB each give 1.6e-3 per layer


@pytest.mark.parametrize("text", ["w8a8", "w4a8", "w8a8-fp8", "w4a16"])
def test_one_weight_scale_per_tensor(case: Case, text: str) -> None:
    recipe, network, _, _, observed = case
    precision = Precision.parse(text)
    per_channel = recipe.override(quantization={"rounding": "nearest"}, calibration={"activation_range": "minmax"})  # quicker; weights are looked at
    per_tensor = per_channel.override(quantization={"weight_scales": "tensor"})
    channel = quantize(network, observed, precision, per_channel)
    tensor = quantize(network, observed, precision, per_tensor)
    fresh = Observed({name: dataclasses.replace(layer, codes={}) for name, layer in observed.layers.items()})
    assert all(equal(layer, quantize(network, fresh, precision, per_tensor).layers[n]) for n, layer in tensor.layers.items())
    errors: dict[str, list[float]] = {"channel": [], "tensor": []}
    for name, layer in tensor.layers.items():
        weight = network.module.get_submodule(name).weight.detach().numpy()
        assert layer.weight_scale.shape == (len(weight),) and layer.weight_scale.dtype == np.float32 and len(set(layer.weight_scale)) == 1
        if precision.number == "int":
            assert layer.weight_scale[0] == weight_scales(weight.reshape(1, -1), precision.weight_bits, "mse")[0]
        for key, net in (("channel", channel), ("tensor", tensor)):
            found = net.layers[name]
            values = found.weight_values() * found.weight_scale.reshape(-1, *[1] * (weight.ndim - 1))
            errors[key].append(float(((values - weight) ** 2).sum() / (weight**2).sum()))
    assert len(set(channel.layers["down_blocks.0.resnets.0.conv1"].weight_scale)) == 16
    if precision.number == "int":
        assert all(c < t for c, t in zip(errors["channel"], errors["tensor"], strict=True))
    else:  # a floating grid hardly minds its scale
        assert np.mean(errors["tensor"]) < 1.2 * np.mean(errors["channel"])


def test_a_bundle_s_tables_give_the_layers_back(case: Case, tmp_path: Path) -> None:
    recipe, network, _, _, observed = case
    of = recipe.override(calibration={"activation_range": "minmax"}, quantization={"edge_layers": "w8a8"})
    nets = {p: quantize(network, observed, p, of) for p in (W8A8, W4A8, FP8, W4A16)}
    _write_tables(tmp_path, {}, nets, {})
    tables = load_file(tmp_path / QUANTIZATION)
    for precision, net in nets.items():
        found = _layers(tables, precision, network.module)
        assert set(found) == set(net.layers)
        for name, layer in net.layers.items():
            assert equal(dataclasses.replace(found[name], macs=layer.macs), layer)
            assert (found[name].number, found[name].weight_bits, found[name].activation_bits) == (
                layer.number,
                layer.weight_bits,
                layer.activation_bits,
            )
    for key, value, error in (
        ("codes/fp8/conv_in", tables["codes/w8/conv_in"], "type int8"),
        ("codes/w8/conv_in", tables["codes/fp8/conv_in"], "type uint8"),
        ("codes/w8/conv_in", tables["codes/w8/conv_in"][:1], "shape"),
    ):
        with pytest.raises(ValueError, match=f"layer conv_in has weights.*{error}"):
            _layers({**tables, key: value}, FP8 if "fp8" in key else W8A8, network.module)


def test_gptq_lowers_every_layer_s_noise(case: Case) -> None:
    recipe, network, _, _, observed = case
    nets = [quantize(network, observed, W4A8, recipe.override(quantization={"rounding": r})) for r in ("nearest", "gptq")]
    for name in nets[0].layers:
        hessians = observed.layers[name].hessians
        assert hessians is not None
        powers = []  # of the layer's output noise over the observed inputs: sum of d^T H d over the rows d of the weight error
        for net in nets:
            layer = net.layers[name]
            weight = network.module.get_submodule(name).weight.detach().numpy()
            error = weight - layer.weight * layer.weight_scale.reshape(-1, *[1] * (weight.ndim - 1))
            rows = torch.from_numpy(error.reshape(len(hessians), -1, hessians.shape[-1]))
            powers.append(float(torch.einsum("gok,gkl,gol->", rows, hessians, rows)))
        assert powers[1] < powers[0], name
    eight = [quantize(network, observed, W8A8, recipe.override(quantization={"rounding": r})) for r in ("nearest", "gptq")]
    assert all(equal(eight[0].layers[n], eight[1].layers[n]) for n in eight[0].layers)


def test_padding_modes_and_zero_weights(tmp_path: Path) -> None:
    (tmp_path / "net.py").write_text(
        "import torch\nfrom torch import nn\nclass Net(nn.Module):\n def __init__(self):\n  super().__init__()\n"
        "  self.a = nn.Conv2d(1, 4, 3, padding=1)\n  self.b = nn.Conv2d(4, 4, 3, padding=1, padding_mode='circular')\n"
        "  self.c = nn.Conv2d(4, 4, 3, padding='same')\n  self.d = nn.Conv2d(4, 1, 1)\n  nn.init.zeros_(self.c.weight)\n"
        " def forward(self, sample, timestep):\n  return self.d(self.c(self.b(self.a(sample))))\n"
        "def make():\n return Net()\n"
    )
    (tmp_path / "scheduler_config.json").write_text("{}")
    model = {"source": "net.py:make", "sample_shape": [1, 6, 6], "scheduler": "scheduler_config.json", "null_class": None}
    recipe = recipe_of(tmp_path, model=model, sampler={"guidance_scale": 1.0})
    network = open_model(recipe)
    schedule = NoiseSchedule.from_config(network.scheduler_config, 2, 0.0)
    trajectories = collect(network, schedule, recipe, tmp_path / "t")
    net = quantize(network, observe(network, schedule, recipe, trajectories), W4A8, recipe)
    assert list(net.layers) == ["c"] and set(net.float_macs) == {"a", "b", "d"}
    layer = net.layers["c"]
    assert (layer.weight == 0).all() and (layer.weight_scale > 0).all()
    x = np.ones((1, 4, 6, 6), np.float32)
    conv: Any = network.module.get_submodule("c")
    for emission, tolerance in ((Emission.PORTABLE, 1e-7), (Emission.ORT_CPU, (layer.output_scale or 0) * 0.51)):
        output = LayerSimulator(network, layer, emission)(x)
        np.testing.assert_allclose(output[0, :, 0, 0], conv.bias.numpy(), atol=tolerance)
    # Codes are kept by number too: an all-zero layer has the same scales in integers and in FP8.
    observed = observe(network, schedule, recipe, trajectories)
    assert [quantize(network, observed, p, recipe).layers["c"].weight.dtype for p in (W8A8, FP8)] == [np.int8, np.uint8]
    # One scale for the tensor, whichever channel's bias raises it.
    layer = quantize(network, observed, W8A8, recipe.override(quantization={"weight_scales": "tensor"})).layers["c"]
    codes = layer.bias_codes()
    assert len(set(layer.weight_scale)) == 1 and codes is not None and len(set(codes)) == 4
    assert np.abs(codes).max() == pytest.approx(MAX_BIAS_CODE, rel=1e-6)
