"""Codes of both grids, and the values of a quantized network."""

from __future__ import annotations

import dataclasses

import ml_dtypes
import numpy as np
import pytest

from ptqd_export.core.precision import Precision
from ptqd_export.core.quant import (
    E4M3_MAX,
    LEAST_OUTPUT_SCALE,
    Geometry,
    Grid,
    LayerQuant,
    OutputGrid,
    QuantizedNetwork,
    from_e4m3,
    qmax,
    qmin,
    to_codes,
    to_e4m3,
)


@pytest.mark.parametrize("bits", range(2, 9))
def test_grid(bits: int, rng: np.random.Generator) -> None:
    assert qmax(bits) - qmin(bits) + 1 == 2**bits
    scale = np.float32(0.37)
    x = rng.normal(0, scale * 2**bits, 4000).astype(np.float32)
    codes = to_codes(x, scale, bits)
    assert codes.dtype == np.int8
    assert codes.min() == qmin(bits) and codes.max() == qmax(bits)
    inside = np.abs(x) <= scale * qmax(bits)
    assert np.abs(codes[inside] * scale - x[inside]).max() <= scale / 2 * (1 + 1e-5)
    assert np.array_equal(to_codes(codes * scale, scale, bits), codes)


def test_codes_round_half_to_even_and_broadcasts() -> None:
    assert to_codes(np.array([0.5, 1.5, 2.5, -0.5, -1.5]), 1.0, 8).tolist() == [0, 2, 2, 0, -2]
    x = np.array([[1.0, 2.0], [1.0, 2.0]])
    assert to_codes(x, np.array([[1.0], [0.5]]), 8).tolist() == [[1, 2], [2, 4]]


def test_e4m3_is_that_of_ml_dtypes(rng: np.random.Generator) -> None:
    """Bit for bit: all codes, all finite float16 numbers, ties and their neighbours, subnormals, saturation,
    both zeros."""
    codes = np.array([c for c in range(256) if c & 127 != 127], np.uint8)
    values = from_e4m3(codes)
    assert values.dtype == np.float32 and np.array_equal(
        values.view(np.uint32), codes.view(ml_dtypes.float8_e4m3fn).astype(np.float32).view(np.uint32)
    )
    assert np.array_equal(to_e4m3(values), codes) and values.max() == E4M3_MAX == float(
        ml_dtypes.finfo(ml_dtypes.float8_e4m3fn).max
    )
    positive = values[:127]
    ties = (positive[:-1] + positive[1:]) / 2
    halves = np.arange(1 << 16, dtype=np.uint16).view(np.float16).astype(np.float32)
    below, above = np.nextafter(ties, np.float32(0)), np.nextafter(ties, np.float32(500))
    edges = [1e-45, -1e-45, 463.9, 464, 464.1, 1e38, -1e38]
    drawn = rng.standard_normal(20_000) * 2.0 ** rng.uniform(-14, 9, 20_000)
    x = np.concatenate([halves[np.isfinite(halves)], ties, -ties, below, above, edges, drawn])
    x = x.astype(np.float32)
    got, expected = to_e4m3(x), np.clip(x, -448, 448).astype(ml_dtypes.float8_e4m3fn).view(np.uint8)
    assert got.dtype == np.uint8 and np.array_equal(got, expected)
    assert not (to_e4m3(ties) & 1).any()  # half to even
    assert to_e4m3(np.array([0.0, -0.0, np.inf, -np.inf])).tolist() == [0, 128, 126, 254]
    assert to_e4m3(x.reshape(-1, 1)).shape == (len(x), 1) and to_e4m3(np.array(1.0)).shape == ()
    # The test can fail: ties away from zero are other codes.
    assert not np.array_equal(to_e4m3(np.nextafter(ties, np.float32(500))), to_e4m3(ties))


@pytest.mark.parametrize("bits", range(2, 9))
@pytest.mark.parametrize(
    ("low", "high"),
    [(-0.28, 5.0), (-3.0, 3.0), (-1.0, 0.0), (0.0, 2.5), (-7.0, 0.1), (1.0, 2.0), (-2.0, -1.0)],
)
def test_a_window_holds_zero_and_its_ends(low: float, high: float, bits: int) -> None:
    grid = Grid.window(low, high, bits)
    low, high = min(low, 0), max(high, 0)
    assert grid.lo <= 0 <= grid.hi and grid.hi - grid.lo == 2**bits - 1
    assert np.float32(grid.scale) == grid.scale == pytest.approx((high - low) / (2**bits - 1), rel=1e-6)
    assert abs(grid.lo * grid.scale - low) <= 0.51 * grid.scale >= abs(grid.hi * grid.scale - high)
    # A symmetric grid that reaches as far has steps nearly as wide as it is uneven.
    symmetric = Grid.symmetric(max(-low, high) / qmax(bits), bits)
    assert symmetric.scale / grid.scale == pytest.approx(
        (max(-low, high) / qmax(bits)) / ((high - low) / (2**bits - 1)), rel=1e-6
    )
    assert (symmetric.lo, symmetric.hi) == (qmin(bits), qmax(bits))


def test_a_window_of_nothing_has_a_scale() -> None:
    for grid in (Grid.window(0.0, 0.0, 8), Grid.window(0.0, 1e-44, 4)):
        assert grid.scale >= np.finfo(np.float32).tiny and np.isfinite(1 / np.float32(grid.scale))


@pytest.mark.parametrize("container", [np.int8, np.uint8])
@pytest.mark.parametrize("bits", [2, 4, 7, 8])
def test_zero_points_put_the_codes_into_their_container(container: type, bits: int) -> None:
    """At 0 where the codes fit as they are."""
    info = np.iinfo(container)
    last = 2**bits - 1
    for lo in range(-last, 1):
        grid = Grid(0.1, lo, lo + last)
        zero = grid.zero_point(container)
        assert info.min <= zero + grid.lo and zero + grid.hi <= info.max
        assert (zero == 0) == (info.min <= grid.lo and grid.hi <= info.max)
    # Below 8 bits int8 holds any window, at 8 bits the symmetric one alone.
    points = {Grid(0.1, lo, lo + last).zero_point(np.int8) for lo in range(-last, 1)}
    assert points == ({0} if bits < 8 else set(range(-128, 128)))


def test_output_grids(rng: np.random.Generator) -> None:
    low = np.array([-1.0, 0.0, -0.28, -5.0, 0.0, 0.5, -1e-9], np.float32)
    high = np.array([1.0, 3.0, 9.0, 0.0, 0.0, 2.0, 1e-9], np.float32)
    grid = OutputGrid.window(low, high)
    assert grid.scale.dtype == np.float32 and grid.zero_point.dtype == np.uint8
    assert grid.common == grid.scale.max() and (grid.scale >= grid.common * LEAST_OUTPUT_SCALE).all()
    scale, zero = grid.scale.astype(np.float64), grid.zero_point.astype(np.float64)
    assert ((0 - zero) * scale <= low + scale / 2 * 1.01).all()
    assert ((255 - zero) * scale >= high - scale / 2 * 1.01).all()
    wide = [0, 1, 2, 3, 5]
    np.testing.assert_allclose(scale[wide], (np.maximum(high, 0) - np.minimum(low, 0))[wide] / 255, rtol=1e-6)
    # Channels that hardly move have room to spare, and their middle is zero.
    assert zero[[4, 6]].tolist() == [128, 128] and grid.shift[[4, 6]].tolist() == [0, 0]
    np.testing.assert_allclose(grid.shift, (zero - 128) * scale)
    assert (OutputGrid.window(low * 0, high * 0).scale > 0).all()


def _layer(bias: np.ndarray | None, output: OutputGrid | None = None) -> LayerQuant:
    weight = np.zeros((3, 2, 3, 3), np.int8)
    scale = np.array([0.5, 0.25, 0.125], np.float32)
    plain = OutputGrid(np.full(3, 0.2, np.float32), np.full(3, 128, np.uint8))
    return LayerQuant(
        "conv", "conv", weight, scale, 4, Grid.symmetric(0.1, 8), 8, output or plain, bias, 1000
    )


def test_one_output_grid_about_zero_leaves_weights_and_bias() -> None:
    bias = np.array([1.0, -0.03, 1e9], np.float32)
    layer = _layer(bias)
    fused, scale = layer.fused(), layer.accumulator_scale()
    assert fused.bias.dtype == np.int32 and scale.dtype == fused.weight_scale.dtype == np.float32
    np.testing.assert_array_equal(scale, np.float32(0.1) * layer.weight_scale)
    np.testing.assert_array_equal(fused.weight_scale, layer.weight_scale)
    assert np.all(np.abs(fused.bias[:2] * scale[:2] - bias[:2]) <= scale[:2] / 2)
    assert fused.bias[2] == 2**31 - 1  # saturated, not wrapped
    assert not _layer(None).fused().bias.any()


def _fused_codes(layer: LayerQuant, acc: np.ndarray) -> np.ndarray:
    """What QLinearConv computes from sums of products (O, N), by its specification."""
    assert layer.output is not None
    fused = layer.fused()
    factor = np.float32(layer.input_scale) * fused.weight_scale / layer.output.common
    total = (acc + fused.bias[:, None].astype(np.int64)).astype(np.float32)
    return np.asarray(np.clip(np.rint(total * factor[:, None]) + 128, 0, 255))


def _own_codes(layer: LayerQuant, acc: np.ndarray) -> np.ndarray:
    """Each channel's result on its own grid, in float64."""
    assert layer.output is not None
    scale, zero = (v.astype(np.float64) for v in (layer.output.scale, layer.output.zero_point))
    bias = 0.0 if layer.bias is None else layer.bias.astype(np.float64)
    y = acc * layer.accumulator_scale().astype(np.float64)[:, None] + np.reshape(bias, (-1, 1))
    return np.asarray(np.clip(np.rint(y / scale[:, None]) + zero[:, None], 0, 255))


def test_fused_convs_quantize_each_channel_on_its_own_grid(rng: np.random.Generator) -> None:
    """Exactly, where all scales are powers of two and biases multiples of the accumulator's unit. Zero points
    are even: a tie goes to the even code."""
    acc = rng.integers(-(2**14), 2**14, (3, 4000))
    output = OutputGrid(np.array([2.0, 0.5, 0.25], np.float32), np.array([4, 128, 250], np.uint8))
    layer = dataclasses.replace(
        _layer(np.array([-100.0, 0.0625, 7.0], np.float32), output), input=Grid(0.125, -20, 235)
    )
    codes = _fused_codes(layer, acc)
    assert np.array_equal(codes, _own_codes(layer, acc))
    assert all(len(np.unique(row)) > 100 for row in codes)
    # The test can fail: without the zero points in the bias, and with the scales of one grid for all.
    still = dataclasses.replace(output, zero_point=np.full(3, 128, np.uint8))
    one = dataclasses.replace(output, scale=np.full(3, 2.0, np.float32))
    for other in (still, one):
        assert not np.array_equal(_fused_codes(dataclasses.replace(layer, output=other), acc), codes)


def test_fused_convs_with_any_scales(rng: np.random.Generator) -> None:
    """Ties apart, and the bias's own rounding of half a unit of the accumulator."""
    acc = rng.integers(-(2**14), 2**14, (3, 4000))
    output = OutputGrid.window(np.array([-90.0, -3.0, -20.0], np.float32), np.array([50, 40, 1], np.float32))
    layer = dataclasses.replace(
        _layer(np.array([-11.0, 0.07, 3.1], np.float32), output), input=Grid.window(-0.28, 5.0, 8)
    )
    apart = np.abs(_fused_codes(layer, acc) - _own_codes(layer, acc))
    assert apart.max() <= 1 and (apart > 0).mean() < 0.02
    moved = dataclasses.replace(output, zero_point=output.zero_point + np.uint8(1))
    assert (
        _fused_codes(dataclasses.replace(layer, output=moved), acc) != _own_codes(layer, acc)
    ).mean() > 0.2


def test_a_channel_that_hardly_moves_has_a_bias_that_int32_holds() -> None:
    """A conv's channel with weights of next to nothing and no bias: its result is 0 to within a step."""
    low, high = np.array([-4.0, -1e-13, -2.0], np.float32), np.array([4.0, 1e-13, 2.0], np.float32)
    layer = dataclasses.replace(
        _layer(None, OutputGrid.window(low, high)), weight_scale=np.array([0.5, 1e-16, 0.5], np.float32)
    )
    assert layer.output is not None
    code = _fused_codes(layer, np.array([[0], [1000], [0]]))
    value = (code[:, 0] - layer.output.zero_point) * layer.output.scale
    assert np.abs(value).max() <= layer.output.scale[1]
    # A zero point at the lower end would need more than int32 holds, and the result would be far off.
    wrong = dataclasses.replace(layer.output, zero_point=np.array([128, 0, 128], np.uint8))
    code = _fused_codes(dataclasses.replace(layer, output=wrong), np.array([[0], [1000], [0]]))
    assert abs(code[1, 0]) * wrong.scale[1] > 50 * wrong.scale[1]


def test_bops() -> None:
    layer = _layer(None)
    assert layer.bops == 1000 * 4 * 8
    assert (
        QuantizedNetwork(Precision(4, 8), {"conv": layer}, {"edge": 10}).bops == 1000 * 4 * 8 + 10 * 32 * 32
    )
    assert QuantizedNetwork(Precision.parse("fp16"), {}, {"edge": 10}).bops == 10 * 16 * 16
    # Products without a layer (attention) are float too; at 16 bits float parts count a quarter.
    network = QuantizedNetwork(Precision(4, 8), {"conv": layer}, {"edge": 10}, 7)
    assert network.macs == 1017 and network.bops == 1000 * 4 * 8 + 17 * 32 * 32
    assert network.bops_at(16) == 1000 * 4 * 8 + 17 * 16 * 16
    floats = [QuantizedNetwork(Precision.parse(p), {}, {"edge": 10}, 7) for p in ("fp32", "fp16")]
    assert [[n.bops_at(bits) // 17 for bits in (32, 16)] for n in floats] == [[1024, 256], [256, 256]]


def test_weight_values() -> None:
    codes = np.array([[-8, 7], [0, 3]], np.int8)
    layer = LayerQuant("l", "linear", codes, np.ones(2, np.float32), 4, None, 16, None, None, 1)
    assert layer.weight_only and layer.input_scale == 1.0 and layer.bops == 4 * 16
    assert layer.weight_values().dtype == np.float32 and layer.weight_values().tolist() == [[-8, 7], [0, 3]]
    fp8 = dataclasses.replace(
        layer,
        weight=to_e4m3(np.array([[-448.0, 1.5], [0.0, 2.0**-9]])),
        weight_bits=8,
        input=Grid(1.0, -448, 448),
        activation_bits=8,
        number="fp8",
    )
    assert not fp8.weight_only and fp8.weight_values().tolist() == [[-448, 1.5], [0, 2.0**-9]]


def test_a_network_of_some_layers_counts_the_others_as_float() -> None:
    a, b = _layer(None), dataclasses.replace(_layer(None), name="b", macs=50)
    network = QuantizedNetwork(Precision(4, 8), {"conv": a, "b": b}, {"edge": 10}, 3)
    alone = network.only(["b"])
    assert list(alone.layers) == ["b"] and dict(alone.float_macs) == {"edge": 10, "conv": 1000}
    assert alone.macs == network.macs == 1063 and alone.product_macs == 3
    assert alone.bops == 50 * 4 * 8 + 1013 * 32 * 32 > network.bops
    assert network.only(["conv", "b"]).bops == network.bops


def test_layers_of_an_exported_graph_have_its_geometry() -> None:
    """And the others stay float."""
    own, other = (Geometry((2, 2), (0, 0, bottom, 1), (1, 1), 1) for bottom in (0, 1))
    conv = dataclasses.replace(_layer(None), geometry=own)
    network = QuantizedNetwork(Precision(4, 8), {"conv": conv, "lost": conv}, {"edge": 10})
    found = network.exported({"conv": other, "edge": own})
    assert {name: layer.geometry for name, layer in found.layers.items()} == {"conv": other}
    assert dict(found.float_macs) == {"edge": 10, "lost": 1000} and network.layers["conv"].geometry == own
