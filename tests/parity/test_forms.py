"""Layers of every geometry, with windows between two ends, output grids per channel and smoothed inputs:
equal to their simulation in every emission."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import onnx_ir as ir
import pytest
import torch
from cases import rescaled
from forms import CONVS, PADDED, Forms
from torch.nn import functional as F
from toy import INFO, calibrated, feeds_of, layers_of

from ptqd_export.bundle.bundle import WEIGHTS
from ptqd_export.calibrate.simulate import geometry_of
from ptqd_export.core.backend import Emission
from ptqd_export.core.figures import LayerFigures
from ptqd_export.core.noise import Correction
from ptqd_export.core.precision import Precision
from ptqd_export.core.quant import QuantizedNetwork
from ptqd_export.core.sampling import Sampling
from ptqd_export.errors import ParityError
from ptqd_export.export import export_fp, fold, insert_qdq, lint, lower, save
from ptqd_export.parity.layers import check_layers

W8A8, W4A4 = Precision(8, 8), Precision(4, 4)


@pytest.fixture(scope="module")
def forms() -> Forms:
    torch.manual_seed(3)
    return Forms().eval()


@pytest.fixture(scope="module")
def exported(forms: Forms) -> ir.Model:
    return export_fp(forms, INFO)


SAMPLING = Sampling.of(INFO, {"clip_sample": False}, n_steps=3, eta=0.0, guidance_scale=1.0)


def write(model: ir.Model, emission: Emission, precision: Precision, folder: Path) -> Path:
    """`model`, quantized by insert_qdq, as a bundle has it."""
    whole = fold(lower(model, emission, precision), SAMPLING.schedule, Correction.identity(3, 2))
    save({"forms": whole}, folder, WEIGHTS)
    return folder / "forms.onnx"


def check(module: Forms, graph: Path, net: QuantizedNetwork, emission: Emission) -> LayerFigures:
    """The parity check of a graph against the simulation of `net`."""
    feeds = feeds_of(2, seed=5)
    x = np.stack([feeds["sample"] * factor for factor in (1.0, 0.8, 0.6)])
    batch = range(2), x, x, {"class_labels": feeds["class_labels"]}
    trajectories: Any = SimpleNamespace(first=lambda n: batch)
    placed = net.exported({name: geometry_of(layer) for name, layer in layers_of(module).items()})
    return check_layers("forms", graph, placed, emission, SAMPLING, trajectories)


@pytest.mark.parametrize("emission", list(Emission))
@pytest.mark.parametrize("precision", [W8A8, W4A4], ids=str)
def test_layers_of_every_geometry_equal_their_simulation(
    forms: Forms, exported: ir.Model, precision: Precision, emission: Emission, tmp_path: Path
) -> None:
    net = calibrated(forms, precision)
    layers = net.layers
    assert {name for name, layer in layers.items() if layer.smooth is not None} == CONVS - {"grouped"}
    even = -(2 ** (precision.activation_bits - 1))
    assert sum(layer.input is not None and layer.input.lo != even for layer in layers.values()) > 7
    graph = write(insert_qdq(exported, net, emission), emission, precision, tmp_path)
    lint(graph, emission)
    found = check(forms, graph, net, emission)
    assert found.layers == len(layers) == 11
    # The test can fail, for each geometry: another scale of the input.
    for name, layer in layers.items():
        wrong = QuantizedNetwork(precision, {**layers, name: rescaled(layer, 1.1)})
        with pytest.raises(ParityError, match=f"layer {name} at step 0 differs from its simulation"):
            check(forms, graph, wrong, emission)


def wanted_map(forms: Forms, net: QuantizedNetwork, name: str, padding: Any = None) -> np.ndarray:
    """W (m 1) by torch's own conv, in float64; of another padding where one is given."""
    layer, module = net.layers[name], layers_of(forms)[name]
    assert layer.input is not None and isinstance(module, torch.nn.Conv2d)
    weight = layer.weight_values().astype(np.float64) * layer.weight_scale[:, None, None, None]
    moved = float(np.float32(-layer.input.zero_point(np.int8) * layer.input.scale))
    field = torch.full((1, module.in_channels, 8, 8), moved, dtype=torch.float64)
    return F.conv2d(
        field,
        torch.from_numpy(weight),
        None,
        module.stride,
        module.padding if padding is None else padding,
        module.dilation,
        module.groups,
    ).numpy()


def half_constants(exported: ir.Model, net: QuantizedNetwork) -> dict[str, np.ndarray]:
    return {
        name: np.asarray(value.const_value.numpy())
        for name, value in insert_qdq(exported, net, Emission.HALF).graph.initializers.items()
        if value.const_value is not None
    }


def test_half_graphs_add_what_moved_inputs_lack(forms: Forms, exported: ir.Model) -> None:
    """As a map where zeros are padded, which are not moved; in the bias elsewhere."""
    net = calibrated(forms, W8A8)
    constants = half_constants(exported, net)
    assert {name[: -len(".shift")] for name in constants if name.endswith(".shift")} == PADDED
    for name in PADDED:
        found, wanted = constants[f"{name}.shift"], wanted_map(forms, net, name)
        np.testing.assert_allclose(found, wanted, rtol=1e-5, atol=1e-6 * np.abs(wanted).max())
        # Nothing but the padding makes it a map, and that of another is another.
        assert np.abs(found - found[:, :, 3:4, 3:4]).max() > 0.01 * np.abs(wanted).max()
    other = wanted_map(forms, net, "padded", padding=2)[:, :, :8, :8]
    assert np.abs(constants["padded.shift"] - other).max() > 0.1 * np.abs(other).max()
    strided = wanted_map(forms, net, "strided")[0, :, 0, 0] + forms.strided.bias.detach().numpy()
    np.testing.assert_allclose(constants["strided.bias.float"], strided, rtol=1e-5, atol=1e-6)
    pointwise = wanted_map(forms, net, "pointwise")[0, :, 0, 0]
    np.testing.assert_allclose(constants["pointwise.bias.float"], pointwise, rtol=1e-5, atol=1e-6)
    for layer in (net.layers["vector"], net.layers["rows"], net.layers["plain"]):
        assert layer.input is not None
        moved = -layer.input.zero_point(np.int8) * layer.input.scale
        total = (layer.weight_values() * layer.weight_scale[:, None] * moved).sum(1)
        total = total if layer.bias is None else total + layer.bias
        np.testing.assert_allclose(constants[f"{layer.name}.bias.float"], total, rtol=1e-5, atol=1e-6)


def test_half_graphs_keep_what_float16_takes_off_a_map(forms: Forms, exported: ir.Model) -> None:
    """On average over its places, in the bias: also where the layer has none. A large map would be off by as
    much at every step."""
    net = calibrated(forms, W8A8)
    layers = dict(net.layers)
    for name in PADDED:  # far from zero: maps of hundreds
        grid = layers[name].input
        assert grid is not None
        layers[name] = replace(layers[name], input=replace(grid, scale=37.0))
    net = replace(net, layers=layers)
    constants = half_constants(exported, net)
    biases = 0
    for name in PADDED:
        bias = layers_of(forms)[name].bias
        added = constants[f"{name}.bias.float"].astype(np.float16).astype(np.float64)
        if bias is not None:
            added, biases = added - bias.detach().double().numpy(), biases + 1
        wanted = wanted_map(forms, net, name)
        rounded = wanted.astype(np.float16)
        lost = (wanted - rounded).mean((0, 2, 3))
        assert np.abs(lost).max() > 5e-3
        assert np.abs(lost - added).max() < 0.2 * np.abs(lost).max()
    assert 0 < biases < len(PADDED)


@pytest.mark.parametrize("name", ["padded", "grouped"])
def test_the_map_of_another_padding_is_found(
    forms: Forms, exported: ir.Model, name: str, tmp_path: Path
) -> None:
    """One that has what lies inside at the borders too, as if there were no padding."""
    net = calibrated(forms, W8A8)
    graph = insert_qdq(exported, net, Emission.HALF)
    shift = graph.graph.initializers[f"{name}.shift"]
    assert shift.const_value is not None
    right = shift.const_value.numpy()
    shift.const_value = ir.tensor(np.broadcast_to(right[:, :, 3:4, 3:4], right.shape).copy(), name=shift.name)
    with pytest.raises(ParityError, match=f"layer {name} at step 0 differs"):
        check(forms, write(graph, Emission.HALF, W8A8, tmp_path), net, Emission.HALF)


def test_padding_stays_zero_in_the_graph(forms: Forms, exported: ir.Model, tmp_path: Path) -> None:
    """Padding with the lowest code instead of the code of zero is found: what a runtime that forgets zero
    points computes."""
    net = calibrated(forms, W8A8)
    graph = insert_qdq(exported, net, Emission.PORTABLE)
    conv = next(node for node in graph.graph if node.name == "padded")
    layer = net.layers["padded"]
    assert layer.input is not None and conv.inputs[0] is not None
    lowest = ir.tensor(np.float32(layer.input.lo * layer.input.scale), name="lowest")
    value = ir.Value(
        name="lowest", const_value=lowest, shape=ir.Shape([]), type=ir.TensorType(ir.DataType.FLOAT)
    )
    graph.graph.register_initializer(value)
    sizes = ir.tensor(np.array([0, 0, 1, 1, 0, 0, 1, 1]), name="sizes")
    pads = ir.Value(
        name="sizes", const_value=sizes, shape=ir.Shape([8]), type=ir.TensorType(ir.DataType.INT64)
    )
    graph.graph.register_initializer(pads)
    around = ir.node("Pad", [conv.inputs[0], pads, value], name="around")
    around.outputs[0].name, around.outputs[0].dtype = "around", ir.DataType.FLOAT
    around.metadata_props.update(conv.inputs[0].producer().metadata_props)  # type: ignore[union-attr]
    graph.graph.insert_before(conv, around)
    conv.replace_input_with(0, around.outputs[0])
    conv.attributes["pads"] = ir.AttrInt64s("pads", [0, 0, 0, 0])
    with pytest.raises(ParityError, match="layer padded at step 0 differs"):
        check(forms, write(graph, Emission.PORTABLE, W8A8, tmp_path), net, Emission.PORTABLE)
