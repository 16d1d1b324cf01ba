"""The simulated network: its noise, by precision and emission."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import numpy as np
import torch
from cases import FP8, W4A4, W4A8, W4A16, W8A8, Case, make_layer
from torch import nn

from ptqd_export.calibrate import LayerSimulator, TorchEngine, measure, quantize, simulate
from ptqd_export.core.backend import Emission
from ptqd_export.core.engine import Engine
from ptqd_export.core.noise import NoiseStats
from ptqd_export.core.precision import Precision
from ptqd_export.core.quant import QuantizedNetwork


def test_simulated_network(case: Case, rng: np.random.Generator) -> None:
    recipe, network, sampling, trajectories, observed = case
    with TorchEngine(network.module, sampling) as engine:
        pooled: dict[str, NoiseStats] = {}
        for precision in (W8A8, W4A8, W4A4):
            net = quantize(network, observed, precision, recipe)
            for emission in (Emission.PORTABLE, Emission.ORT_CPU):
                with TorchEngine(simulate(network, net, emission), sampling) as simulated:
                    assert isinstance(simulated, Engine) and simulated.inputs == engine.inputs
                    parts = measure(simulated, sampling, trajectories, "held_out")
                pooled[f"{precision}.{emission}"] = NoiseStats.pool(parts)
    power = {name: float(s.dd.sum()) for name, s in pooled.items()}
    assert 0 < power["w8a8.portable"] < power["w4a8.portable"] < power["w4a4.portable"]
    assert all(
        power[f"{p}.portable"] < power[f"{p}.ort-cpu"] for p in (W8A8, W4A8)
    )  # quantized outputs are a noise of their own
    assert (
        pooled["w8a8.portable"].snr[-1] > 300
    )  # the ranges are those of the last steps: random weights let x_t grow

    layer = quantize(network, observed, W8A8, recipe).layers["down_blocks.0.resnets.0.conv1"]
    x = rng.standard_normal((2, 16, 8, 8)).astype(np.float32)
    output = LayerSimulator(layer, Emission.ORT_CPU)(x)
    assert output.shape == (2, 16, 8, 8) and output.dtype == np.float32
    assert layer.output is not None
    scale = layer.output.scale[:, None, None]
    assert np.array_equal(output, (np.rint(output / scale) * scale).astype(np.float32))


def test_noise_of_fp8_and_of_weights_alone(case: Case) -> None:
    recipe, network, sampling, trajectories, observed = case
    power = {}
    for precision in (W8A8, FP8, W4A8, W4A16, Precision.parse("w8a16")):
        quantized = quantize(network, observed, precision, recipe)
        with TorchEngine(simulate(network, quantized, Emission.ORT_CPU), sampling) as engine:
            parts = NoiseStats.pool(measure(engine, sampling, trajectories, "calibration"))
        power[str(precision)] = float(parts.dd.sum() / parts.ee.sum())
    assert 0 < power["w8a16"] < 0.1 * power["w8a8"] and power["w8a16"] < 0.1 * power["w4a16"] < power["w4a8"]
    assert power["w8a8-fp8"] < 1e-2  # two rounded factors of 31 dB each give 1.6e-3 per layer


def test_a_simulated_network_holds_no_weights_that_it_replaces(rng: np.random.Generator) -> None:
    """Of those it keeps the shapes; a weight that another module has too stays, as does the network."""
    net = nn.ModuleDict({"conv": nn.Conv2d(4, 8, 3), "tied": nn.Linear(6, 5), "table": nn.Embedding(5, 6)})
    net["table"].weight = net["tied"].weight
    before = {name: p.clone() for name, p in net.named_parameters()}
    inputs = {"conv": rng.standard_normal((1, 4, 6, 6)), "tied": rng.standard_normal((3, 6))}
    layers = {name: make_layer(net[name], W8A8, x.astype(np.float32), name) for name, x in inputs.items()}
    network: Any = SimpleNamespace(module=net)
    found: Any = simulate(network, QuantizedNetwork(W8A8, layers), Emission.PORTABLE)
    conv, tied = found["conv"].weight, found["tied"].weight
    assert conv.shape == (8, 4, 3, 3) and conv.untyped_storage().nbytes() == 4
    assert tied is found["table"].weight and torch.equal(tied, before["tied.weight"])
    assert all(torch.equal(p, before[name]) for name, p in net.named_parameters())
    assert found["conv"].bias is not net["conv"].bias
