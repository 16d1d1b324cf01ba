"""Where quantized layers begin and end: what is computed there against a reference written from the
definitions of core.quant."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import numpy as np
import onnx_ir as ir
import pytest
from torch import nn
from toy import (
    FLOAT32,
    PORTABLE_NUMBERS,
    PRECISIONS,
    calibrated,
    emitted,
    feeds_of,
    graph_of,
    layers_of,
    run,
    simulate,
)

from ptqd_export.bundle.bundle import WEIGHTS
from ptqd_export.core.backend import Emission
from ptqd_export.core.precision import FP32, Precision
from ptqd_export.core.quant import QuantizedNetwork
from ptqd_export.errors import GraphError
from ptqd_export.export import cut_layers, expose_layers, insert_qdq, layer_sites, lint, quantized_nodes, save
from ptqd_export.export.graph import with_outputs


@pytest.mark.parametrize("emission", FLOAT32)
@pytest.mark.parametrize("precision", PRECISIONS + PORTABLE_NUMBERS, ids=str)
def test_every_layer_equals_its_definition(
    toy: nn.Module, base: ir.Model, emission: Emission, precision: Precision, tmp_path: Path
) -> None:
    network = calibrated(toy, precision)
    graph = emitted(base, network, emission)
    sites = layer_sites(graph)
    assert set(sites) == set(network.layers)
    assert {source for source, _ in sites.values()} <= {
        v.name for v in (*base.graph.inputs, *(v for n in base.graph for v in n.outputs))
    }
    save({"q": graph}, tmp_path, WEIGHTS)
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
            step: np.ndarray | float = 1e-5 * np.abs(wanted).max()
            if fused and layer.output:
                step = layer.output.scale[:, None, None]
            difference = np.abs(got - wanted) / step
            assert difference.max() < 1.01, (name, difference.max())
            total, apart = total + difference.size, apart + int((difference > 0.5).sum())
    assert apart <= max(1, total * 1e-3), (apart, total)


def test_the_layer_check_sees_a_wrong_scale(toy: nn.Module, base: ir.Model) -> None:
    """The negative of the test above: one weight scale off by 5 % is seen."""
    network = calibrated(toy, Precision(8, 8))
    wrong = dataclasses.replace(
        network.layers["twice"], weight_scale=network.layers["twice"].weight_scale * np.float32(1.05)
    )
    graph = insert_qdq(
        base, QuantizedNetwork(network.precision, {**network.layers, "twice": wrong}), Emission.ORT_CPU
    )
    source, target = layer_sites(graph)["twice"]
    values = run(with_outputs(graph, [source, target]), feeds_of(1))
    layer = network.layers["twice"]
    assert layer.output is not None
    wanted = simulate(layer, toy.twice, Emission.ORT_CPU, values[source])
    assert (np.abs(values[target] - wanted) / layer.output.scale[:, None, None]).max() > 1.5


@pytest.mark.parametrize("emission", FLOAT32)
@pytest.mark.parametrize("precision", [Precision(8, 8), Precision(4, 4), *PORTABLE_NUMBERS], ids=str)
def test_a_cut_layer_computes_what_it_does_within_the_graph(
    toy: nn.Module, base: ir.Model, emission: Emission, precision: Precision, tmp_path: Path
) -> None:
    """On the same input, bit for bit but for float sums in another order; a step is what one code makes."""
    network = calibrated(toy, precision)
    graph = emitted(base, network, emission)
    (tmp_path / "cut").mkdir()
    save({"q": graph}, tmp_path, WEIGHTS)
    whole, layers = cut_layers(tmp_path / "q.onnx", tmp_path / "cut")
    assert {name: (layer.source, layer.target) for name, layer in layers.items()} == layer_sites(graph)
    assert list(layers) == list(layer_sites(graph))
    optimise = emission is Emission.ORT_CPU
    targets = (layer.target for layer in layers.values())
    exposed = with_outputs(graph, [*(layer.source for layer in layers.values()), *targets])
    values, inputs = (run(m, feeds_of(3), optimise) for m in (exposed, whole))
    for name, cut in layers.items():
        np.testing.assert_allclose(inputs[cut.source], values[cut.source], atol=1e-5)
        got = run(cut.file, {cut.source: values[cut.source]}, optimise)
        assert list(got) == [cut.target]
        layer, value = network.layers[name], values[cut.target]
        assert cut.step.ndim == value.ndim and (cut.step > 0).all()
        assert cut.step.shape[1 if layer.kind == "conv" else -1] == len(layer.weight)
        assert cut.added.shape == cut.step.shape
        if layer.bias is not None and emission is Emission.PORTABLE:
            np.testing.assert_allclose(cut.added.ravel(), np.abs(layer.bias), rtol=0.01, atol=1e-6)
        difference = np.abs(got[cut.target] - value) / cut.step
        fused = emission.numerics(precision) is Emission.ORT_CPU and layer.kind == "conv"
        assert difference.max() < (1.01 if fused else 0.01), name
        assert (difference > 0.5).sum() <= max(1, 1e-3 * difference.size), name
        if layer.output is not None and fused:
            assert np.array_equal(cut.step.ravel(), layer.output.scale)
            assert len(set(layer.output.scale)) > 1
    # The test can fail: another layer's graph computes something else.
    cut = layers["to_q"]
    other = run(layers["to_k"].file, {layers["to_k"].source: values[cut.source]}, optimise)
    assert (np.abs(other[layers["to_k"].target] - values[cut.target]) / cut.step).max() > 1.01


def test_a_float_graph_has_no_sites(base: ir.Model) -> None:
    assert layer_sites(base) == {} and quantized_nodes(base) == {}
    same = insert_qdq(base, QuantizedNetwork(FP32, {}), Emission.ORT_CPU)
    assert layer_sites(same) == {}


def test_only_values_of_the_graph_can_be_outputs(base: ir.Model) -> None:
    with pytest.raises(GraphError, match="no value 'nothing'"):
        with_outputs(base, ["nothing"])
    known = base.graph[0].outputs[0].name
    assert known is not None
    twice = with_outputs(base, [known, "output", known])
    assert [v.name for v in twice.graph.outputs] == ["output", known]
    assert [v.name for v in base.graph.outputs] == ["output"]


def test_what_cannot_be_exposed_is_told(toy: nn.Module, base: ir.Model, tmp_path: Path) -> None:
    (tmp_path / "other").mkdir()
    (tmp_path / "x.onnx").write_bytes(b"no graph")
    save({"q": graph_of(toy, base, Precision(8, 8), Emission.PORTABLE)}, tmp_path, WEIGHTS)
    with pytest.raises(GraphError, match=r"d\.onnx is not in the folder of q\.onnx"):
        expose_layers(tmp_path / "q.onnx", tmp_path / "other" / "d.onnx")
    for call in (
        lambda: expose_layers(tmp_path / "x.onnx", tmp_path / "d.onnx"),
        lambda: cut_layers(tmp_path / "gone.onnx", tmp_path / "other"),
        lambda: quantized_nodes(tmp_path / "x.onnx"),
    ):
        with pytest.raises(GraphError, match=r"(x|gone)\.onnx cannot be read as an ONNX graph"):
            call()
    assert not list((tmp_path / "other").iterdir())
