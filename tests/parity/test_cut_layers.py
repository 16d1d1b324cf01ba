"""Layers as graphs of their own compute what they do in the whole graph: what `verify --against` rests on."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
import onnx_ir as ir
import pytest
from helpers import Built
from torch import nn
from toy import calibrated, feeds_of

from ptqd_export.backends import OrtEngine
from ptqd_export.bundle.bundle import WEIGHTS
from ptqd_export.core.backend import Emission
from ptqd_export.core.precision import Precision
from ptqd_export.core.quant import LayerQuant
from ptqd_export.export import cut_layers, insert_qdq, lower, save

W8A8, W4A4, FP8, W4A16 = Precision(8, 8), Precision(4, 4), Precision(8, 8, "fp8"), Precision(4, 16)


def step_of(layer: LayerQuant, numerics: Emission) -> np.ndarray:
    """One quantization step of a layer's output, from what was calibrated."""
    if numerics is Emission.ORT_CPU and layer.output is not None:
        return layer.output.scale
    if layer.weight_only:
        return layer.weight_scale
    largest = np.abs(layer.weight_values().reshape(len(layer.weight), -1)).max(1)
    return largest * layer.weight_scale * layer.input_scale * (32 if layer.number == "fp8" else 1)


@pytest.mark.parametrize("emission", Emission, ids=str)
@pytest.mark.parametrize("precision", [W8A8, W4A4, FP8, W4A16], ids=str)
def test_layers_compute_what_they_do_in_the_whole_graph(
    toy: nn.Module, base: ir.Model, precision: Precision, emission: Emission, tmp_path: Path
) -> None:
    """Both run node by node: equal to the last bit, but in float16, where ONNX Runtime leaves out roundings
    between operators that are no outputs. Steps are products of three float32 numbers: 2**-22 of them.
    """
    network = calibrated(toy, precision)
    save({"graph": lower(insert_qdq(base, network, emission), emission, precision)}, tmp_path, WEIGHTS)
    (tmp_path / "parts").mkdir()
    whole, layers = cut_layers(tmp_path / "graph.onnx", tmp_path / "parts")
    assert sorted(layers) == sorted(network.layers)
    feeds = feeds_of(3)
    with (
        OrtEngine(tmp_path / "graph.onnx", optimise=False) as engine,
        OrtEngine(whole, optimise=False) as exposed,
    ):
        values, expected = exposed(feeds), engine(feeds)
    if emission is not Emission.HALF:
        np.testing.assert_array_equal(values["output"], expected["output"])
    assert set(values) == {"output", *(layer.source for layer in layers.values() if layer.source in values)}
    names = dict.fromkeys(layer.target for layer in layers.values())
    model = onnx.load(whole)
    known = {output.name for output in model.graph.output}
    model.graph.output.extend(
        onnx.helper.make_empty_tensor_value_info(name) for name in names if name not in known
    )
    onnx.save(model, tmp_path / "all.onnx")
    with OrtEngine(tmp_path / "all.onnx", optimise=False) as engine:
        targets = engine(feeds)
    for path, layer in layers.items():
        with OrtEngine(layer.file, optimise=False) as engine:
            assert (engine.inputs, engine.outputs) == ((layer.source,), (layer.target,))
            got = engine({layer.source: {**feeds, **values}[layer.source]})[layer.target]
        wanted = targets[layer.target].astype(np.float64)
        rms = np.sqrt(np.square(got - wanted).mean() / np.square(wanted).mean())
        assert rms <= (6 * 2**-11 if emission is Emission.HALF else 0), path
        assert layer.step.ndim == got.ndim
        np.testing.assert_allclose(
            layer.step.ravel(), step_of(network.layers[path], emission.numerics(precision)), rtol=2**-22
        )
        assert layer.step.shape[1 if network.layers[path].kind == "conv" else -1] == len(
            network.layers[path].weight
        )


def test_the_folder_of_the_graph_is_left_alone(rgb: Built, tmp_path: Path) -> None:
    before = {file.name: file.stat().st_mtime_ns for file in rgb.path.iterdir()}
    cut_layers(rgb.path / "w8a8.half.onnx", tmp_path)
    assert {file.name: file.stat().st_mtime_ns for file in rgb.path.iterdir()} == before
