"""Codes of both grids, and the values of a quantized network."""

from __future__ import annotations

import dataclasses

import ml_dtypes
import numpy as np
import pytest

from ptqd_export.core.precision import Precision
from ptqd_export.core.quant import (
    E4M3_MAX,
    Geometry,
    LayerQuant,
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


def _layer(bias: np.ndarray | None) -> LayerQuant:
    weight = np.zeros((3, 2, 3, 3), np.int8)
    scale = np.array([0.5, 0.25, 0.125], np.float32)
    return LayerQuant("conv", "conv", weight, scale, 4, 0.1, 8, 0.2, bias, 1000)


def test_layer_bias_codes() -> None:
    bias = np.array([1.0, -0.03, 1e9], np.float32)
    layer = _layer(bias)
    codes, scale = layer.bias_codes(), layer.bias_scale()
    assert codes is not None and codes.dtype == np.int32 and scale.dtype == np.float32
    np.testing.assert_array_equal(scale, np.float32(0.1) * layer.weight_scale)
    assert np.all(np.abs(codes[:2] * scale[:2] - bias[:2]) <= scale[:2] / 2)
    assert codes[2] == 2**31 - 1  # saturated, not wrapped
    assert _layer(None).bias_codes() is None


def test_bops() -> None:
    layer = _layer(None)
    assert layer.bops == 1000 * 4 * 8
    assert (
        QuantizedNetwork(Precision(4, 8), {"conv": layer}, {"edge": 10}).bops == 1000 * 4 * 8 + 10 * 32 * 32
    )
    assert QuantizedNetwork(Precision.parse("fp16"), {}, {"edge": 10}).bops == 10 * 16 * 16


def test_weight_values() -> None:
    codes = np.array([[-8, 7], [0, 3]], np.int8)
    layer = LayerQuant("l", "linear", codes, np.ones(2, np.float32), 4, 1.0, 16, None, None, 1)
    assert layer.weight_only and layer.bops == 4 * 16
    assert layer.weight_values().dtype == np.float32 and layer.weight_values().tolist() == [[-8, 7], [0, 3]]
    fp8 = dataclasses.replace(
        layer,
        weight=to_e4m3(np.array([[-448.0, 1.5], [0.0, 2.0**-9]])),
        weight_bits=8,
        activation_bits=8,
        number="fp8",
    )
    assert not fp8.weight_only and fp8.weight_values().tolist() == [[-448, 1.5], [0, 2.0**-9]]


def test_a_network_of_some_layers_counts_the_others_as_float() -> None:
    a, b = _layer(None), dataclasses.replace(_layer(None), name="b", macs=50)
    network = QuantizedNetwork(Precision(4, 8), {"conv": a, "b": b}, {"edge": 10})
    alone = network.only(["b"])
    assert list(alone.layers) == ["b"] and dict(alone.float_macs) == {"edge": 10, "conv": 1000}
    assert alone.macs == network.macs == 1060
    assert alone.bops == 50 * 4 * 8 + 1010 * 32 * 32 > network.bops
    assert network.only(["conv", "b"]).bops == network.bops


def test_layers_of_an_exported_graph_have_its_geometry() -> None:
    """And the others stay float."""
    own, other = (Geometry((2, 2), (0, 0, bottom, 1), (1, 1), 1) for bottom in (0, 1))
    conv = dataclasses.replace(_layer(None), geometry=own)
    network = QuantizedNetwork(Precision(4, 8), {"conv": conv, "lost": conv}, {"edge": 10})
    found = network.exported({"conv": other, "edge": own})
    assert {name: layer.geometry for name, layer in found.layers.items()} == {"conv": other}
    assert dict(found.float_macs) == {"edge": 10, "lost": 1000} and network.layers["conv"].geometry == own
