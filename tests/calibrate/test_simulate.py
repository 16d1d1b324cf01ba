"""The simulated layer against exact arithmetic and against ONNX Runtime."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import pytest
import torch
from cases import FP8, W4A4, W4A8, W4A16, W8A8, make_layer
from onnx import TensorProto, checker, helper, numpy_helper
from torch import nn

from ptqd_export.backends import OrtEngine
from ptqd_export.calibrate import LayerSimulator, SimulatedLayer
from ptqd_export.calibrate.simulate import geometry_of
from ptqd_export.core.backend import Emission
from ptqd_export.core.precision import Precision
from ptqd_export.core.quant import Geometry, LayerQuant, from_e4m3, qmax, qmin, to_codes, to_e4m3


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
        # type: ignore[assignment]
        shape: list[Any] = ["n", "l", layer.weight.shape[1]], ["n", "l", layer.weight.shape[0]]
    else:
        # type: ignore[assignment, union-attr]
        shape = ["n", conv.in_channels, "h", "w"], ["n", conv.out_channels, "p", "q"]
        inputs = ["xd", "wd"]
        if layer.bias is not None:
            inputs.append("bd")
            if cpu:
                constants |= {
                    "b": layer.bias_codes(),
                    "sb": layer.bias_scale(),
                    "zb": np.zeros(len(layer.weight), np.int32),
                }
                nodes.append(helper.make_node("DequantizeLinear", ["b", "sb", "zb"], ["bd"], axis=0))
            else:
                constants["bd"] = layer.bias
        pads = [*conv.padding, *conv.padding]  # type: ignore[union-attr]
        result = "c" if cpu else "y"
        # type: ignore[union-attr]
        attributes = {"strides": conv.stride, "pads": pads, "dilations": conv.dilation, "group": conv.groups}
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
    with OrtEngine(
        tmp_path / "layer.onnx", optimise=optimise, optimised_path=tmp_path / "optimised.onnx"
    ) as engine:
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
    [
        *((p, e) for p in (W8A8, W4A8, W4A4) for e in (Emission.PORTABLE, Emission.ORT_CPU)),
        (FP8, Emission.PORTABLE),
        (W4A16, Emission.PORTABLE),
    ],
    ids=lambda v: str(v),
)
@pytest.mark.parametrize("kind", [*CONVS, "linear"])
def test_simulation_equals_onnx_runtime(
    kind: str, emission: Emission, precision: Precision, rng: np.random.Generator, tmp_path: Path
) -> None:
    torch.manual_seed(5)
    module = CONVS[kind]() if kind in CONVS else nn.Linear(24, 40)
    x = rng.standard_normal((3, 24, 10, 9) if kind in CONVS else (3, 50, 24)).astype(np.float32)
    layer = make_layer(module, precision, x)
    # ONNX Runtime 1.31 cannot run an FP8 MatMul once optimised, and takes the input of one with 8-bit weights
    # to 8 bits itself.
    optimise = precision not in (FP8, W4A16)
    got, ops = run_ort(
        ort_model(layer, emission, module if isinstance(module, nn.Conv2d) else None), x, tmp_path, optimise
    )
    with torch.inference_mode():
        simulated = SimulatedLayer(layer, emission, layer.geometry)(torch.from_numpy(x)).numpy()
    axis = (1, -1)[kind == "linear"]
    if emission is Emission.ORT_CPU and layer.kind == "conv":
        assert "QLinearConv" in ops
        assert layer.output_scale is not None
        steps = np.rint((got - simulated) / layer.output_scale)
        assert len(np.unique(np.rint(got / layer.output_scale))) > 50
        assert np.abs(steps).max() <= 1 and (steps != 0).mean() < 1e-3
    else:
        assert emission is Emission.PORTABLE or "MatMulIntegerToFloat" in ops
        # Float32 sums of some 200 products; an input code more or less would move an output by a hundred
        # times that.
        assert np.abs(got - simulated).max() < 2e-6 * np.abs(got).max()
    # The test can fail: another scale of the input (of the weights, where the input has none) moves far more
    # outputs.
    scales: dict[str, Any] = (
        {"weight_scale": layer.weight_scale * np.float32(1.02)}
        if layer.weight_only
        else {"input_scale": layer.input_scale * 1.02}
    )
    moved = dataclasses.replace(layer, **scales)
    with torch.inference_mode():
        other = SimulatedLayer(moved, emission, layer.geometry)(torch.from_numpy(x)).numpy()
    assert (np.abs(other - got) > 0.5 * (layer.output_scale or 0) + 1e-5).mean() > (
        0.005 if axis == 1 else 0.5
    )


@pytest.mark.parametrize("precision", [W8A8, W4A4], ids=str)
def test_simulated_accumulator_is_the_integer_one(precision: Precision, rng: np.random.Generator) -> None:
    """Against int64 arithmetic in numpy, on the widest conv of a usual UNet."""
    torch.manual_seed(1)
    conv = nn.Conv2d(256, 8, 3, padding=1)
    x = rng.standard_normal((1, 256, 6, 6)).astype(np.float32)
    layer = make_layer(conv, precision, x)
    codes = np.pad(
        to_codes(x, layer.input_scale, precision.activation_bits).astype(np.int64),
        ((0, 0), (0, 0), (1, 1), (1, 1)),
    )
    windows = np.lib.stride_tricks.sliding_window_view(codes, (3, 3), axis=(2, 3))
    bias = layer.bias_codes()
    assert bias is not None and layer.output_scale is not None
    acc = np.einsum("nihwkl,oikl->nohw", windows, layer.weight.astype(np.int64)) + bias[:, None, None]
    ratio = (layer.bias_scale() / np.float32(layer.output_scale))[:, None, None]
    out = np.clip(np.rint(acc.astype(np.float32) * ratio), -128, 127).astype(np.float32) * np.float32(
        layer.output_scale
    )
    with torch.inference_mode():
        simulated = SimulatedLayer(layer, Emission.ORT_CPU, layer.geometry)(torch.from_numpy(x)).numpy()
    assert np.array_equal(simulated, out)


@pytest.mark.parametrize("precision", [FP8, W4A16], ids=str)
def test_simulated_products_are_those_of_the_grid(precision: Precision, rng: np.random.Generator) -> None:
    """FP8 and weights alone, against float64 arithmetic in numpy; every emission computes the same."""
    torch.manual_seed(1)
    conv = nn.Conv2d(64, 8, 3, padding=1)
    x = (rng.standard_normal((1, 64, 6, 6)) * 10.0 ** rng.uniform(-4, 1, (1, 64, 1, 1))).astype(
        np.float32
    )  # subnormal FP8 codes to saturated ones
    layer = make_layer(conv, precision, x)
    assert layer.bias is not None
    with torch.inference_mode():
        simulated = [
            SimulatedLayer(layer, emission, layer.geometry)(torch.from_numpy(x)).numpy()
            for emission in Emission
        ]
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
    # Rounding of the scaled weight, of each product and of each sum, of one sign at worst (Higham 2002,
    # section 3.1).
    bound = (64 * 9 + 3) * 2.0**-24 * (reference(np.abs(values), np.abs(weight)) + np.abs(bias))
    assert (np.abs(simulated[0] - reference(values, weight) - bias) <= bound).all()
    # The test can fail: inputs and weights as they were before they were rounded.
    exact = conv.weight.detach().numpy() / layer.weight_scale[:, None, None, None]
    others = [reference(values, exact)] + ([reference(ratio, weight)] if precision is FP8 else [])
    assert all((np.abs(simulated[0] - other - bias) > bound).mean() > 0.9 for other in others)


def test_fp8_inputs_are_rounded_as_the_codes_are(rng: np.random.Generator) -> None:
    """A 1x1 layer that passes its input on: bit for bit from_e4m3(to_e4m3(x / scale)), ties, subnormals,
    zeros and saturation included."""
    conv = nn.Conv2d(1, 1, 1, bias=False)
    one = np.full((1, 1, 1, 1), to_e4m3(np.array(1.0)))
    values = from_e4m3(np.arange(127, dtype=np.uint8))
    ties = (values[:-1] + values[1:]) / 2
    x = np.concatenate(
        [
            values,
            ties,
            np.nextafter(ties, 0),
            np.nextafter(ties, 500),
            [447.9, 449, 1e30, np.inf],
            300 * rng.standard_normal(2000),
        ]
    )
    x = np.concatenate([x, -x]).astype(np.float32)[None, None, None]
    for scale in (1.0, 0.25, float(np.float32(0.037))):
        layer = LayerQuant(
            "one", "conv", one, np.array([1 / scale], np.float32), 8, scale, 8, None, None, 1, "fp8"
        )
        simulated = SimulatedLayer(layer, Emission.PORTABLE, geometry_of(conv))
        with torch.inference_mode():
            got = simulated(torch.from_numpy(x * np.float32(scale))).numpy()
            assert np.isnan(
                simulated(torch.full((1, 1, 1, 1), np.nan)).numpy()
            ).all()  # said by measure, not hidden
        expected = from_e4m3(to_e4m3(x * np.float32(scale) / np.float32(scale))) * layer.bias_scale()
        assert np.array_equal(got, expected) and got.max() == expected.max()
        assert len(np.unique(got)) == 2 * 126 + 1


@pytest.mark.parametrize("emission", list(Emission))
def test_padding_of_a_layer_that_stands_alone(emission: Emission, rng: np.random.Generator) -> None:
    """That of the graph's conv gives what the module gives on an input that the network has padded."""
    torch.manual_seed(2)
    conv = nn.Conv2d(4, 6, 3, stride=2)
    x = rng.standard_normal((2, 4, 8, 6)).astype(np.float32)
    layer = make_layer(conv, W8A8, x)
    around = Geometry((2, 2), (0, 1, 1, 2), (1, 1), 1)
    alone = LayerSimulator(dataclasses.replace(layer, geometry=around), emission)(x)
    inside = LayerSimulator(layer, emission)(np.pad(x, ((0, 0), (0, 0), (0, 1), (1, 2))))
    assert alone.shape == (2, 6, 4, 4) and np.array_equal(alone, inside)
    assert LayerSimulator(layer, emission)(x).shape == (2, 6, 3, 2)
