"""errors, precision, quant, conditioning, engine, timing."""

from __future__ import annotations

import time

import numpy as np
import pytest

from ptqd_export import errors
from ptqd_export.conditioning import ModelInfo
from ptqd_export.engine import EPSILON, Engine, FakeEngine
from ptqd_export.errors import PTQDError, RecipeError
from ptqd_export.precision import FP32, Precision
from ptqd_export.quant import LayerQuant, QuantizedNetwork, qmax, qmin, quantize
from ptqd_export.recipe import InputSpec
from ptqd_export.timing import time_engines


def test_every_error_is_a_ptqd_error() -> None:
    kinds = [kind for kind in vars(errors).values() if isinstance(kind, type)]
    assert len(kinds) == 7
    assert all(issubclass(kind, PTQDError) for kind in kinds)


@pytest.mark.parametrize("text", ["fp32", "w8a8", "w4a8", "w4a4", "w2a3"])
def test_precision_round_trip(text: str) -> None:
    assert str(Precision.parse(text)) == text
    assert Precision.parse(text).is_float == (text == "fp32")


@pytest.mark.parametrize("text", ["", "w8", "w9a8", "w1a8", "W8A8", "w8a8 ", "int8", "w16a16"])
def test_precision_refuses(text: str) -> None:
    with pytest.raises(RecipeError, match="w8a8"):
        Precision.parse(text)


def test_precision_order_and_fp32() -> None:
    assert sorted([FP32, Precision(8, 8), Precision(4, 8), Precision(4, 4)]) == [Precision(4, 4), Precision(4, 8), Precision(8, 8), FP32]


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
