"""The simulated layer against exact arithmetic and against ONNX Runtime."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import pytest
import torch
from cases import FP8, W4A4, W4A8, W4A16, W8A8, make_layer, rescaled
from onnx import TensorProto, checker, helper, numpy_helper
from torch import nn

from ptqd_export.backends import OrtEngine
from ptqd_export.calibrate import LayerSimulator, SimulatedLayer
from ptqd_export.calibrate.simulate import geometry_of
from ptqd_export.core.backend import Emission
from ptqd_export.core.precision import Precision
from ptqd_export.core.quant import Geometry, Grid, LayerQuant, from_e4m3, to_e4m3


def ort_model(layer: LayerQuant, emission: Emission, conv: nn.Conv2d | None) -> bytes:
    """The layer as the emission writes it, by hand."""
    fp8 = layer.number == "fp8"
    cpu = emission is Emission.ORT_CPU
    weight = layer.weight.view(ml_dtypes.float8_e4m3fn) if fp8 else layer.weight
    container = np.dtype(np.uint8 if cpu else np.int8)
    linear, grid, nodes = conv is None, layer.input, []
    constants: dict[str, Any] = {
        "w": weight.T.copy() if linear else weight,
        "sw": layer.weight_scale,
        "zw": np.zeros(len(weight), weight.dtype),
    }
    if grid is None:
        nodes.append(helper.make_node("Identity", ["x"], ["xd"]))
    else:
        zero = 0 if fp8 else grid.zero_point(container)
        constants |= {"sx": np.array(grid.scale, np.float32)}
        constants["zx"] = np.array(zero, weight.dtype if fp8 else container)
        source, scale, point = "x", "sx", "zx"
        if layer.smooth is not None and cpu:
            scale, point = "sxs", "zxs"
            constants[scale] = layer.smooth * np.float32(grid.scale)
            constants[point] = np.full(len(layer.smooth), zero, container)
        elif layer.smooth is not None:
            constants["m"] = (np.float32(1) / layer.smooth)[:, None, None]
            nodes.append(helper.make_node("Mul", ["x", "m"], ["xm"]))
            source = "xm"
        nodes.append(helper.make_node("QuantizeLinear", [source, scale, point], ["xq"], axis=1))
        quantized = "xq"
        if layer.activation_bits < 8:
            constants["low"], constants["high"] = (np.array(zero + v, container) for v in (grid.lo, grid.hi))
            nodes.append(helper.make_node("Clip", ["xq", "low", "high"], ["xc"]))
            quantized = "xc"
        nodes.append(helper.make_node("DequantizeLinear", [quantized, "sx", "zx"], ["xd"]))
    if linear:
        constants["b"] = layer.bias
        shape: list[Any] = [["n", "l", layer.weight.shape[1]], ["n", "l", layer.weight.shape[0]]]
        nodes += [helper.make_node("MatMul", ["xd", "wd"], ["m"]), helper.make_node("Add", ["m", "b"], ["y"])]
    else:
        assert conv is not None
        shape = [["n", conv.in_channels, "h", "w"], ["n", conv.out_channels, "p", "q"]]
        inputs = ["xd", "wd"]
        if cpu:
            fused, out = layer.fused(), layer.output
            assert out is not None
            constants |= {
                "sw": fused.weight_scale,
                "b": fused.bias,
                "sb": np.float32(layer.input_scale) * fused.weight_scale,
                "zb": np.zeros(len(layer.weight), np.int32),
                "sy": np.array(out.common),
                "zy": np.array(128, np.uint8),
                "sys": out.scale,
                "zys": out.zero_point,
            }
            inputs.append("bd")
            nodes.append(helper.make_node("DequantizeLinear", ["b", "sb", "zb"], ["bd"], axis=0))
        elif layer.bias is not None:
            inputs.append("bd")
            constants["bd"] = layer.bias
        result = "c" if cpu else "y"
        attributes = {
            "strides": conv.stride,
            "pads": [*conv.padding, *conv.padding],
            "dilations": conv.dilation,
            "group": conv.groups,
        }
        nodes.append(helper.make_node("Conv", inputs, [result], **attributes))
        if cpu:
            nodes += [
                helper.make_node("QuantizeLinear", ["c", "sy", "zy"], ["yq"]),
                helper.make_node("DequantizeLinear", ["yq", "sys", "zys"], ["y"], axis=1),
            ]
    nodes.insert(0, helper.make_node("DequantizeLinear", ["w", "sw", "zw"], ["wd"], axis=1 if linear else 0))
    graph = helper.make_graph(
        nodes,
        "layer",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, shape[0])],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, shape[1])],
        [numpy_helper.from_array(np.asarray(value), name) for name, value in constants.items()],
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
    assert layer.smooth is not None or kind in ("grouped", "linear") or precision in (FP8, W4A16)
    step: Any = 0.0
    if emission is Emission.ORT_CPU and layer.kind == "conv":
        assert "QLinearConv" in ops
        assert layer.output is not None
        step = layer.output.scale[:, None, None]
        steps = np.rint((got - simulated) / step)
        codes = np.rint(got / step) + layer.output.zero_point[:, None, None]
        assert len(np.unique(codes)) > 150 and codes.min() >= 0 and codes.max() <= 255
        assert np.abs(steps).max() <= 1 and (steps != 0).mean() < 1e-3
    else:
        assert emission is Emission.PORTABLE or "MatMulIntegerToFloat" in ops
        # Float32 sums of some 200 products; an input code more or less would move an output by a hundred
        # times that.
        assert np.abs(got - simulated).max() < 2e-6 * np.abs(got).max()
    # The test can fail: another scale of the input (of the weights, where the input has none) moves far more
    # outputs, and so do a window that begins elsewhere and other factors.
    if layer.weight_only:
        others = [dataclasses.replace(layer, weight_scale=layer.weight_scale * np.float32(1.02))]
    else:
        others = [rescaled(layer, 1.02)]
    if layer.input is not None and layer.number == "int":
        grid = layer.input
        half = grid.lo // 2
        others.append(dataclasses.replace(layer, input=Grid(grid.scale, half, half + grid.hi - grid.lo)))
    if layer.smooth is not None:
        others.append(dataclasses.replace(layer, smooth=layer.smooth[::-1].copy()))
    for moved in others:
        with torch.inference_mode():
            other = SimulatedLayer(moved, emission, layer.geometry)(torch.from_numpy(x)).numpy()
        share = (np.abs(other - got) > 0.5 * step + 1e-5).mean()
        assert share > (0.5 if kind == "linear" else 0.005), moved


@pytest.mark.parametrize("precision", [W8A8, W4A4], ids=str)
def test_simulated_accumulator_is_the_integer_one(precision: Precision, rng: np.random.Generator) -> None:
    """Against int64 arithmetic in numpy, on the widest conv of a usual UNet."""
    torch.manual_seed(1)
    conv = nn.Conv2d(256, 8, 3, padding=1)
    x = rng.standard_normal((1, 256, 6, 6)).astype(np.float32)
    layer = make_layer(conv, precision, x)
    grid, out = layer.input, layer.output
    assert grid is not None and out is not None and layer.smooth is not None and layer.bias is not None
    assert grid.lo != -(2 ** (precision.activation_bits - 1)) and len(set(out.zero_point)) > 1
    ratio = x / (layer.smooth * np.float32(grid.scale))[:, None, None]
    codes = np.clip(np.rint(ratio), grid.lo, grid.hi).astype(np.int64)
    padded = np.pad(codes, ((0, 0), (0, 0), (1, 1), (1, 1)))  # code 0 is value 0
    windows = np.lib.stride_tricks.sliding_window_view(padded, (3, 3), axis=(2, 3))
    # Scales and the bias that one grid for all channels needs to give each channel its own, in float64.
    unit = (np.float32(grid.scale) * layer.weight_scale).astype(np.float64)
    moved = layer.bias + (out.zero_point.astype(np.float64) - 128) * out.scale
    bias = np.rint(moved / unit).astype(np.int64)
    acc = np.einsum("nihwkl,oikl->nohw", windows, layer.weight.astype(np.int64)) + bias[:, None, None]
    assert np.abs(acc).max() < 2**24
    wide = (layer.weight_scale * (out.common / out.scale)).astype(np.float32)
    factor = (np.float32(grid.scale) * wide / out.common)[:, None, None]
    code = np.clip(np.rint(acc.astype(np.float32) * factor) + 128, 0, 255)
    zero = out.zero_point.astype(np.float32)[:, None, None]
    wanted = (code.astype(np.float32) - zero) * out.scale[:, None, None]
    with torch.inference_mode():
        simulated = SimulatedLayer(layer, Emission.ORT_CPU, layer.geometry)(torch.from_numpy(x)).numpy()
    assert np.array_equal(simulated, wanted)
    # The test can fail: a bias without what moves the codes.
    still = dataclasses.replace(
        layer, output=dataclasses.replace(out, zero_point=np.full_like(out.zero_point, 128))
    )
    with torch.inference_mode():
        other = SimulatedLayer(still, Emission.ORT_CPU, layer.geometry)(torch.from_numpy(x)).numpy()
    assert (other != wanted).mean() > 0.01


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
        scale = layer.accumulator_scale().astype(np.float64)[:, None, None]
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
        grid = Grid(scale, -448, 448)
        layer = LayerQuant(
            "one", "conv", one, np.array([1 / scale], np.float32), 8, grid, 8, None, None, 1, "fp8"
        )
        simulated = SimulatedLayer(layer, Emission.PORTABLE, geometry_of(conv))
        with torch.inference_mode():
            got = simulated(torch.from_numpy(x * np.float32(scale))).numpy()
            assert np.isnan(
                simulated(torch.full((1, 1, 1, 1), np.nan)).numpy()
            ).all()  # said by measure, not hidden
        expected = from_e4m3(to_e4m3(x * np.float32(scale) / np.float32(scale))) * layer.accumulator_scale()
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
