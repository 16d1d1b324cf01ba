"""errors, precision, quant, conditioning, engine, timing."""

from __future__ import annotations

import dataclasses
import time

import ml_dtypes
import numpy as np
import pytest

from ptqd_export import errors
from ptqd_export.conditioning import ModelInfo
from ptqd_export.engine import EPSILON, Engine, FakeEngine
from ptqd_export.errors import PTQDError, RecipeError
from ptqd_export.precision import FP32, Precision
from ptqd_export.quant import BACKENDS, E4M3_MAX, Emission, LayerQuant, QuantizedNetwork, from_e4m3, qmax, qmin, quantize, to_e4m3
from ptqd_export.recipe import InputSpec
from ptqd_export.timing import time_engines


def test_every_error_is_a_ptqd_error() -> None:
    kinds = [kind for kind in vars(errors).values() if isinstance(kind, type)]
    assert len(kinds) == 7
    assert all(issubclass(kind, PTQDError) for kind in kinds)


@pytest.mark.parametrize("text", ["fp32", "fp16", "w8a8", "w4a8", "w4a4", "w2a3", "w4a16", "w8a16", "w8a8-fp8"])
def test_precision_round_trip(text: str) -> None:
    precision = Precision.parse(text)
    assert str(precision) == text
    assert precision.is_float == text.startswith("fp")
    assert precision.weight_only == text.endswith("a16")
    assert precision.number == ("fp8" if text.endswith("-fp8") else "int")


@pytest.mark.parametrize(
    "text", ["", "w8", "w9a8", "w1a8", "W8A8", "w8a8 ", "int8", "w16a16", "w9a16", "w8a15", "fp8", "fp16 ", "w4a8-fp8", "w8a16-fp8", "w8a8-fp4"]
)
def test_precision_refuses(text: str) -> None:
    with pytest.raises(RecipeError, match="w8a8"):
        Precision.parse(text)


def test_precision_order_and_fp32() -> None:
    assert sorted([FP32, Precision(8, 8), Precision(4, 8), Precision(4, 4)]) == [Precision(4, 4), Precision(4, 8), Precision(8, 8), FP32]
    assert len({Precision(8, 8), Precision(8, 8, "fp8"), Precision.parse("w8a8-fp8")}) == 2


@pytest.mark.parametrize("bits", range(2, 9))
def test_quantize_grid(bits: int, rng: np.random.Generator) -> None:
    assert qmax(bits) - qmin(bits) + 1 == 2**bits
    scale = np.float32(0.37)
    x = rng.normal(0, scale * 2**bits, 4000).astype(np.float32)
    codes = quantize(x, scale, bits)
    assert codes.dtype == np.int8
    assert codes.min() == qmin(bits) and codes.max() == qmax(bits)
    inside = np.abs(x) <= scale * qmax(bits)
    assert np.abs(codes[inside] * scale - x[inside]).max() <= scale / 2 * (1 + 1e-5)
    assert np.array_equal(quantize(codes * scale, scale, bits), codes)


def test_quantize_rounds_half_to_even_and_broadcasts() -> None:
    assert quantize(np.array([0.5, 1.5, 2.5, -0.5, -1.5]), 1.0, 8).tolist() == [0, 2, 2, 0, -2]
    x = np.array([[1.0, 2.0], [1.0, 2.0]])
    assert quantize(x, np.array([[1.0], [0.5]]), 8).tolist() == [[1, 2], [2, 4]]


def test_e4m3_is_that_of_ml_dtypes(rng: np.random.Generator) -> None:
    """Bit for bit: all codes, all finite float16 numbers, ties and their neighbours, subnormals, saturation, both zeros."""
    codes = np.array([c for c in range(256) if c & 127 != 127], np.uint8)
    values = from_e4m3(codes)
    assert values.dtype == np.float32 and np.array_equal(
        values.view(np.uint32), codes.view(ml_dtypes.float8_e4m3fn).astype(np.float32).view(np.uint32)
    )
    assert np.array_equal(to_e4m3(values), codes) and values.max() == E4M3_MAX == float(ml_dtypes.finfo(ml_dtypes.float8_e4m3fn).max)
    positive = values[:127]
    ties = (positive[:-1] + positive[1:]) / 2
    halves = np.arange(1 << 16, dtype=np.uint16).view(np.float16).astype(np.float32)
    x = np.concatenate([
        halves[np.isfinite(halves)], ties, -ties, np.nextafter(ties, np.float32(0)), np.nextafter(ties, np.float32(500)),
        [1e-45, -1e-45, 463.9, 464, 464.1, 1e38, -1e38], rng.standard_normal(20_000) * 2.0 ** rng.uniform(-14, 9, 20_000),
    ]).astype(np.float32)  # fmt: skip
    got, expected = to_e4m3(x), np.clip(x, -448, 448).astype(ml_dtypes.float8_e4m3fn).view(np.uint8)
    assert got.dtype == np.uint8 and np.array_equal(got, expected)
    assert not (to_e4m3(ties) & 1).any()  # half to even
    assert to_e4m3(np.array([0.0, -0.0, np.inf, -np.inf])).tolist() == [0, 128, 126, 254]
    assert to_e4m3(x.reshape(-1, 1)).shape == (len(x), 1) and to_e4m3(np.array(1.0)).shape == ()
    # The test can fail: ties away from zero are other codes.
    assert not np.array_equal(to_e4m3(np.nextafter(ties, np.float32(500))), to_e4m3(ties))


def test_which_numerics_hold_for_an_emission() -> None:
    own = {(str(p), e) for p in map(Precision.parse, ("w8a8", "w4a4", "w8a8-fp8", "w4a16", "fp16", "fp32")) for e in Emission if e.numerics(p) is e}
    assert own == {(p, Emission.PORTABLE) for p in ("w8a8", "w4a4", "w8a8-fp8", "w4a16", "fp16", "fp32")} | {
        ("w8a8", Emission.ORT_CPU),
        ("w4a4", Emission.ORT_CPU),
    }
    assert all(e.numerics(Precision(8, 8, "fp8")) is Emission.PORTABLE for e in Emission)
    assert Emission.HALF.numerics(Precision(8, 8)) is Emission.PORTABLE
    assert set(BACKENDS.values()) <= set(Emission)


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
    assert QuantizedNetwork(Precision(4, 8), {"conv": layer}, {"edge": 10}).bops == 1000 * 4 * 8 + 10 * 32 * 32
    assert QuantizedNetwork(Precision.parse("fp16"), {}, {"edge": 10}).bops == 10 * 16 * 16


def test_weight_values() -> None:
    codes = np.array([[-8, 7], [0, 3]], np.int8)
    layer = LayerQuant("l", "linear", codes, np.ones(2, np.float32), 4, 1.0, 16, None, None, 1)
    assert layer.weight_only and layer.bops == 4 * 16
    assert layer.weight_values().dtype == np.float32 and layer.weight_values().tolist() == [[-8, 7], [0, 3]]
    fp8 = dataclasses.replace(layer, weight=to_e4m3(np.array([[-448.0, 1.5], [0.0, 2.0**-9]])), weight_bits=8, activation_bits=8, number="fp8")
    assert not fp8.weight_only and fp8.weight_values().tolist() == [[-448, 1.5], [0, 2.0**-9]]


def test_conditions(class_info: ModelInfo) -> None:
    assert class_info.labels == (0, 1, 2) and class_info.channels == 1
    assert class_info.conditions(None, 5)["class_labels"].tolist() == [0, 1, 2, 0, 1]
    feeds = class_info.conditions([2, 0], 2)["class_labels"]
    assert feeds.tolist() == [2, 0] and feeds.dtype == np.int64
    assert class_info.null_conditions(2)["class_labels"].tolist() == [3, 3]
    assert ModelInfo.from_dict(class_info.to_dict()) == class_info


@pytest.mark.parametrize("labels", [[0, 4], [-1, 0], [0], [0, 1, 2]])
def test_bad_labels(class_info: ModelInfo, labels: list[int]) -> None:
    with pytest.raises(RecipeError, match=r"class label"):
        class_info.conditions(labels, 2)


def test_tensor_conditions() -> None:
    info = ModelInfo("text", (3, 8, 8), (InputSpec("text", "float32", (4, 2)),), "")
    assert info.conditions(None, 2)["text"].shape == (2, 4, 2)
    value = np.ones((2, 4, 2))
    given = info.conditions(None, 2, {"text": value})["text"]
    assert given.dtype == np.float32 and given.all()
    assert not info.null_conditions(2)["text"].any()
    with pytest.raises(RecipeError, match=r"\(2, 4, 2\)"):
        info.conditions(None, 2, {"text": np.ones((2, 4))})
    with pytest.raises(RecipeError, match="'txt'"):
        info.conditions(None, 2, {"txt": value})
    with pytest.raises(RecipeError, match="no classes"):
        info.conditions([0, 1], 2)


def test_guidance_needs_a_null(class_info: ModelInfo) -> None:
    class_info.check_guidance(3.0)
    bare = ModelInfo("bare", (1, 4, 4), (), "")
    bare.check_guidance(1.0)
    with pytest.raises(RecipeError, match="no condition"):
        bare.check_guidance(2.0)
    no_null = ModelInfo("n", (1, 4, 4), (InputSpec("y", num_classes=4),), "")
    assert no_null.labels == (0, 1, 2, 3)
    with pytest.raises(RecipeError, match="no null class"):
        no_null.check_guidance(0.0)


def test_fake_engine_is_an_engine() -> None:
    with FakeEngine(lambda f: f["sample"] * 2) as engine:
        assert isinstance(engine, Engine)
        assert engine({"sample": np.ones(2)})[EPSILON].tolist() == [2, 2]
    assert engine.closed and engine.calls == 1


def test_time_engines_interleaves() -> None:
    order: list[str] = []

    def wait(name: str, seconds: float) -> FakeEngine:
        def run(feeds: object) -> np.ndarray:
            order.append(name)
            time.sleep(seconds)
            return np.zeros(1)

        return FakeEngine(run)

    times = time_engines({"slow": wait("slow", 0.008), "fast": wait("fast", 0.001)}, {}, repeats=5, warmup=2)
    assert order == ["slow", "fast"] * 7
    assert times["slow"] >= 0.008 and 0.001 <= times["fast"] < times["slow"]
