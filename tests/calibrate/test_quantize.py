"""Quantized layers: which, with what scales and codes."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from cases import FP8, W4A4, W4A8, W4A16, W8A8, Case, equal, sampling_of, smoothed
from models import own_model

from ptqd_export.calibrate import (
    LayerSimulator,
    TorchEngine,
    collect,
    measure,
    observe,
    open_model,
    quantize,
    simulate,
)
from ptqd_export.calibrate.quantize import MAX_BIAS_CODE
from ptqd_export.calibrate.ranges import weight_scales
from ptqd_export.core.backend import Emission
from ptqd_export.core.precision import FP32, Precision
from ptqd_export.errors import ModelError


def test_which_layers_are_quantized(case: Case) -> None:
    recipe, network, *_, observed = case
    net = quantize(network, observed, W4A8, recipe)
    assert {"conv_in", "conv_out", "time_embedding.linear_1", "down_blocks.0.resnets.0.time_emb_proj"} <= set(
        net.float_macs
    )
    assert {"down_blocks.0.resnets.0.conv1", "down_blocks.1.attentions.0.to_out.0"} <= set(net.layers)
    assert sorted([*net.layers, *net.float_macs]) == sorted(observed.layers)
    assert net.product_macs == observed.product_macs > 0
    assert net.macs == sum(layer.macs for layer in observed.layers.values()) + net.product_macs
    conv, linear = net.layers["down_blocks.0.resnets.0.conv1"], net.layers["down_blocks.1.attentions.0.to_q"]
    assert (conv.kind, conv.weight.shape, conv.weight_bits, conv.activation_bits) == (
        "conv",
        (16, 16, 3, 3),
        4,
        8,
    )
    assert conv.output is not None and linear.output is None and linear.weight.shape == (32, 32)
    assert conv.smooth is not None and conv.smooth.shape == (16,) and linear.smooth is None
    assert conv.input is not None and -128 < conv.input.lo < 0 and conv.input.hi - conv.input.lo == 255
    assert conv.weight.min() >= -8 and conv.weight.max() <= 7 and len(np.unique(conv.weight)) > 8
    assert np.float32(conv.input_scale) == conv.input_scale
    assert (
        net.bops
        == sum(layer.macs * 32 for layer in net.layers.values())
        + (sum(net.float_macs.values()) + net.product_macs) * 1024
    )

    edges = quantize(
        network,
        observed,
        W4A4,
        recipe.override(quantization={"edge_layers": "w8a8", "skip": ("*.attentions.*", "mid_block.*")}),
    )
    assert (edges.layers["conv_in"].weight_bits, edges.layers["conv_out"].activation_bits) == (8, 8)
    assert edges.layers["down_blocks.0.resnets.0.conv1"].weight_bits == 4
    assert not any("attentions" in name or name.startswith("mid_block") for name in edges.layers)

    fp32 = quantize(network, observed, FP32, recipe)
    assert not fp32.layers and set(fp32.float_macs) == set(observed.layers)
    with pytest.raises(ModelError, match="no layer left to quantize"):
        quantize(network, observed, W8A8, recipe.override(quantization={"skip": ("*",)}))


def test_quantize_is_deterministic_and_leaves_the_network_alone(case: Case) -> None:
    recipe, network, sampling, trajectories, observed = case
    before = {k: v.clone() for k, v in network.module.state_dict().items()}
    again = observe(network, sampling, recipe, trajectories)
    for rounding in ("nearest", "gptq"):
        of = recipe.override(quantization={"rounding": rounding})
        first, second = (quantize(network, seen, W4A8, of) for seen in (observed, again))
        assert list(first.layers) == list(second.layers) and all(
            equal(first.layers[n], second.layers[n]) for n in first.layers
        )
    with TorchEngine(simulate(network, first, Emission.ORT_CPU), sampling) as engine:
        measure(engine, sampling, trajectories, "held_out")
    assert all(torch.equal(v, before[k]) for k, v in network.module.state_dict().items())


def test_fp8_and_weights_alone(case: Case) -> None:
    recipe, network, _, _, observed = case
    fp8, w4a16, w8a16 = (
        quantize(network, observed, p, recipe) for p in (FP8, W4A16, Precision.parse("w8a16"))
    )
    name = "down_blocks.0.resnets.0.conv1"
    weight = network.module.get_submodule(name).weight.detach().numpy()
    layer = fp8.layers[name]
    assert (
        layer.number,
        layer.weight.dtype,
        layer.weight_bits,
        layer.activation_bits,
        layer.output,
        layer.smooth,
    ) == ("fp8", np.uint8, 8, 8, None, None)
    np.testing.assert_array_equal(layer.weight_scale, np.abs(weight).reshape(16, -1).max(1) / np.float32(448))
    assert layer.input_scale == np.float32(observed.layers[name].channels.largest.max() / 448)
    # A normal FP8 number is off by at most 2^-4 of itself, a subnormal one by 2^-10 scales.
    error = np.abs(layer.weight_values() * layer.weight_scale[:, None, None, None] - weight)
    assert (
        error <= np.maximum(np.abs(weight) * 2.0**-4, layer.weight_scale.max() * 2.0**-10) * (1 + 1e-6)
    ).all() and error.max() > 0
    for net, bits in ((w4a16, 4), (w8a16, 8)):
        layer = net.layers[name]
        assert (layer.number, layer.weight.dtype, layer.weight_bits, layer.activation_bits) == (
            "int",
            np.int8,
            bits,
            16,
        )
        assert (layer.input, layer.input_scale, layer.output, layer.smooth) == (None, 1.0, None, None)
        assert layer.weight_only
    # Weights do not know of their inputs' bits: GPTQ's codes at 4 bits are those of w4a8, where that smooths
    # nothing.
    w4a8 = quantize(network, observed, W4A8, recipe)
    for n, other in w4a8.layers.items():
        assert np.array_equal(w4a16.layers[n].weight, other.weight) == (other.smooth is None), n
    near = quantize(network, observed, W4A16, recipe.override(quantization={"rounding": "nearest"}))
    assert not np.array_equal(near.layers[name].weight, w4a16.layers[name].weight)

    edges = recipe.override(quantization={"edge_layers": "w8a8"})
    first = [quantize(network, observed, p, edges).layers["conv_in"] for p in (FP8, W4A16, W4A8)]
    assert [(e.weight_bits, e.activation_bits, e.number) for e in first] == [
        (8, 8, "fp8"),
        (8, 16, "int"),
        (8, 8, "int"),
    ]
    fp16 = quantize(network, observed, Precision.parse("fp16"), recipe)
    assert not fp16.layers and fp16.bops == fp16.macs * 16 * 16


@pytest.mark.parametrize("text", ["w8a8", "w4a8", "w8a8-fp8", "w4a16"])
def test_one_weight_scale_per_tensor(case: Case, text: str) -> None:
    recipe, network, _, _, observed = case
    precision = Precision.parse(text)
    per_channel = recipe.override(
        quantization={"rounding": "nearest"}, calibration={"activation_range": "minmax"}
    )  # quicker; weights are looked at
    per_tensor = per_channel.override(quantization={"weight_scales": "tensor"})
    channel = quantize(network, observed, precision, per_channel)
    tensor = quantize(network, observed, precision, per_tensor)
    fresh = {name: dataclasses.replace(layer, codes={}) for name, layer in observed.layers.items()}
    again = quantize(network, dataclasses.replace(observed, layers=fresh), precision, per_tensor)
    assert all(equal(layer, again.layers[name]) for name, layer in tensor.layers.items())
    errors: dict[str, list[float]] = {"channel": [], "tensor": []}
    for name, layer in tensor.layers.items():
        weight = smoothed(network.module.get_submodule(name), layer)
        assert (
            layer.weight_scale.shape == (len(weight),)
            and layer.weight_scale.dtype == np.float32
            and len(set(layer.weight_scale)) == 1
        )
        if precision.number == "int":
            assert (
                layer.weight_scale[0] == weight_scales(weight.reshape(1, -1), precision.weight_bits, "mse")[0]
            )
        for key, net in (("channel", channel), ("tensor", tensor)):
            found = net.layers[name]
            values = found.weight_values() * found.weight_scale.reshape(-1, *[1] * (weight.ndim - 1))
            errors[key].append(float(((values - weight) ** 2).sum() / (weight**2).sum()))
    assert len(set(channel.layers["down_blocks.0.resnets.0.conv1"].weight_scale)) == 16
    if precision.number == "int":
        assert all(c < t for c, t in zip(errors["channel"], errors["tensor"], strict=True))
    else:  # a floating grid hardly minds its scale
        assert np.mean(errors["tensor"]) < 1.2 * np.mean(errors["channel"])


@pytest.mark.parametrize("precision", [W4A8, W4A16], ids=str)
def test_gptq_lowers_every_layer_s_noise(case: Case, precision: Precision) -> None:
    """Hessians are those of the inputs that the weights are multiplied with: x / m where these are smoothed,
    x where weights alone are quantized."""
    recipe, network, _, _, observed = case
    nets = [
        quantize(network, observed, precision, recipe.override(quantization={"rounding": r}))
        for r in ("nearest", "gptq")
    ]
    for name in nets[0].layers:
        hessians, smooth = observed.layers[name].hessians, observed.layers[name].smooth
        assert hessians is not None
        # of the layer's output noise over the observed inputs: sum of d^T H d over the rows d of the weight
        # error
        powers = []
        for net in nets:
            layer = net.layers[name]
            error = smoothed(network.module.get_submodule(name), layer) - layer.weight * (
                layer.weight_scale.reshape(-1, *[1] * (layer.weight.ndim - 1))
            )
            if smooth is not None and layer.smooth is None:
                error = error * smooth[:, None, None]
            rows = torch.from_numpy(error.reshape(len(hessians), -1, hessians.shape[-1]))
            powers.append(float(torch.einsum("gok,gkl,gol->", rows, hessians, rows)))
        assert powers[1] < powers[0], name
    if precision is W4A16:
        return
    eight = [
        quantize(network, observed, W8A8, recipe.override(quantization={"rounding": r}))
        for r in ("nearest", "gptq")
    ]
    assert all(equal(eight[0].layers[n], eight[1].layers[n]) for n in eight[0].layers)


def test_padding_modes_and_zero_weights(tmp_path: Path) -> None:
    recipe = own_model(
        tmp_path,
        [1, 6, 6],
        """self.a = nn.Conv2d(1, 4, 3, padding=1)
           self.b = nn.Conv2d(4, 4, 3, padding=1, padding_mode="circular")
           self.c = nn.Conv2d(4, 4, 3, padding="same")
           self.d = nn.Conv2d(4, 1, 1)
           nn.init.zeros_(self.c.weight)""",
        "self.d(self.c(self.b(self.a(sample))))",
        sampler={"n_steps": 2, "eta": 0.0},
    )
    network = open_model(recipe)
    sampling = sampling_of(network, recipe)
    trajectories = collect(network, sampling, recipe, tmp_path / "t")
    net = quantize(network, observe(network, sampling, recipe, trajectories), W4A8, recipe)
    assert list(net.layers) == ["c"] and set(net.float_macs) == {"a", "b", "d"}
    layer = net.layers["c"]
    assert layer.output is not None and layer.smooth is None
    assert (layer.weight == 0).all() and (layer.weight_scale > 0).all()
    x = np.ones((1, 4, 6, 6), np.float32)
    conv: Any = network.module.get_submodule("c")
    for emission, tolerance in (
        (Emission.PORTABLE, 1e-7),
        (Emission.ORT_CPU, layer.output.scale * 0.51),
    ):
        output = LayerSimulator(layer, emission)(x)
        assert (np.abs(output[0, :, 0, 0] - conv.bias.numpy()) <= tolerance).all()
    # Codes are kept by number too: an all-zero layer has the same scales in integers and in FP8.
    observed = observe(network, sampling, recipe, trajectories)
    assert [quantize(network, observed, p, recipe).layers["c"].weight.dtype for p in (W8A8, FP8)] == [
        np.int8,
        np.uint8,
    ]
    # One scale for the tensor, whichever channel's bias raises it.
    layer = quantize(
        network, observed, W8A8, recipe.override(quantization={"weight_scales": "tensor"})
    ).layers["c"]
    assert layer.bias is not None
    codes = layer.bias / layer.accumulator_scale()
    assert len(set(layer.weight_scale)) == 1 and len(set(codes)) == 4
    assert np.abs(codes).max() == pytest.approx(MAX_BIAS_CODE, rel=1e-6)
    assert 0 < np.abs(layer.fused().bias.astype(np.int64)).max() < 2**31 - 1


def test_what_the_recipe_says_of_grids(case: Case) -> None:
    """Symmetric inputs, one grid of a conv's outputs; `smoothing` is what was observed, see test_observe."""
    recipe, network, _, _, observed = case
    nearest = recipe.override(quantization={"rounding": "nearest"})
    uneven = quantize(network, observed, W4A4, nearest).layers
    even = quantize(
        network, observed, W4A4, nearest.override(quantization={"input_grids": "symmetric"})
    ).layers
    one = quantize(network, observed, W4A4, nearest.override(quantization={"conv_outputs": "tensor"})).layers
    assert {(layer.input.lo, layer.input.hi) for layer in even.values() if layer.input} == {(-8, 7)}
    assert len({layer.input.lo for layer in uneven.values() if layer.input}) > 1
    for name, layer in uneven.items():
        seen, whole = observed.layers[name].output, one[name].output
        assert layer.input == one[name].input
        if layer.output is None or whole is None:
            assert layer.kind == "linear" and layer.output is whole is None
            continue
        assert len(set(layer.output.scale)) > 1 and len(set(whole.scale)) == len(set(whole.zero_point)) == 1
        assert whole.common >= layer.output.common
        for low, high, grid in (
            (seen.low, seen.high, layer.output),
            (seen.low.min(), seen.high.max(), whole),
        ):
            zero, scale = grid.zero_point.astype(np.float64), grid.scale.astype(np.float64)
            assert (-zero * scale <= low + 0.51 * scale).all()
            assert ((255 - zero) * scale >= high - 0.51 * scale).all()
