"""Products of 8 bits where they would saturate: exact, and no weights spoilt."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from onnx import numpy_helper
from onnx_text import save_text

from ptqd_export.backends import OrtEngine, ort
from ptqd_export.export.structure import op_counts


@pytest.mark.parametrize("kind", ["conv", "linear"])
def test_products_of_large_numbers_are_exact(
    tmp_path: Path, kind: str, rng: np.random.Generator, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Weights and inputs at the ends of their 8 bits, on every processor (microsoft/onnxruntime#14642)."""
    conv = kind == "conv"
    weight = np.where(rng.random((16, 16, 3, 3) if conv else (16, 16)) < 0.1, -127, 127).astype(np.int8)
    layer = "Conv <pads = [1, 1, 1, 1]> (v, w)" if conv else "MatMul(v, w)"
    size, axis = ("16, 6, 6", 0) if conv else ("9, 16", 1)
    behind = "y = QuantizeLinear(raw, wide, zero) epsilon = DequantizeLinear(y, wide, zero)"
    graph = save_text(
        tmp_path / "large.onnx",
        f"""g (float[B, {size}] sample) => (float[B, {size}] epsilon) {{
            codes = QuantizeLinear(sample, scale, zero)
            v = DequantizeLinear(codes, scale, zero)
            w = DequantizeLinear <axis = {axis}> (weight, scales, zeros)
            raw = {layer}
            {behind if conv else "epsilon = Identity(raw)"}
        }}""",
        numpy_helper.from_array(weight, "weight"),
        numpy_helper.from_array(np.full(16, 2**-7, np.float32), "scales"),
        numpy_helper.from_array(np.zeros(16, np.int8), "zeros"),
        numpy_helper.from_array(np.float32(2**-7), "scale"),
        numpy_helper.from_array(np.uint8(0), "zero"),
        *([numpy_helper.from_array(np.float32(2), "wide")] if conv else []),
    )
    feeds = {"sample": rng.uniform(1.8, 2, (2, *map(int, size.split(", ")))).astype(np.float32)}
    saved = tmp_path / "fused.onnx"
    assert ort._takes_uint8(graph)
    with OrtEngine(graph, optimised_path=saved) as fused, OrtEngine(graph, optimise=False) as plain:
        np.testing.assert_allclose(fused(feeds)["epsilon"], plain(feeds)["epsilon"], rtol=1e-6)
    assert op_counts(saved)["QLinearConv" if conv else "MatMulIntegerToFloat"] == 1
    monkeypatch.setattr(ort, "saturates", lambda: True)
    monkeypatch.setattr(ort, "TAKES_UINT8", (99, 0))  # an older version: no integer kernels
    with OrtEngine(graph, optimised_path=saved) as floats, OrtEngine(graph, optimise=False) as plain:
        np.testing.assert_allclose(floats(feeds)["epsilon"], plain(feeds)["epsilon"], rtol=1e-6)
    assert not {"QLinearConv", "MatMulIntegerToFloat"} & op_counts(saved).keys()


SPOILT = {
    "two products": "a = MatMul(v, w) b = MatMul(a, w) epsilon = Identity(b)",
    "no product": "a = MatMul(v, w) b = Add(w, one) epsilon = MatMul(a, b)",
    "a sum": "a = Add(w, one) epsilon = MatMul(v, a)",
    "its left side": "a = MatMul(w, v) epsilon = Identity(a)",
    "floats": "epsilon = MatMul(sample, w)",
    "a product and a sum": "a = MatMul(v, w) epsilon = Add(a, w)",
}


@pytest.mark.parametrize("lines", SPOILT.values(), ids=SPOILT)
def test_weights_that_are_not_fused_are_right(
    tmp_path: Path, lines: str, rng: np.random.Generator, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Where products saturate too: ONNX Runtime 1.31 would spoil or refuse these for weights made uint8."""
    graph = save_text(
        tmp_path / "foreign.onnx",
        f"""g (float[16, 16] sample) => (float[16, 16] epsilon) {{
            codes = QuantizeLinear(sample, scale, zero)
            v = DequantizeLinear(codes, scale, zero)
            w = DequantizeLinear <axis = 1> (weight, scales)
            {lines}
        }}""",
        numpy_helper.from_array(rng.integers(-127, 128, (16, 16)).astype(np.int8), "weight"),
        numpy_helper.from_array(np.full(16, 2**-7, np.float32), "scales"),
        numpy_helper.from_array(np.float32(2**-7), "scale"),
        numpy_helper.from_array(np.uint8(0), "zero"),
        numpy_helper.from_array(np.float32(1), "one"),
    )
    assert not ort._takes_uint8(graph)  # where nothing saturates ONNX Runtime would not try
    monkeypatch.setattr(ort, "saturates", lambda: True)
    feeds = {"sample": rng.uniform(0, 2, (16, 16)).astype(np.float32)}
    with OrtEngine(graph) as engine, OrtEngine(graph, optimise=False) as plain:
        np.testing.assert_allclose(engine(feeds)["epsilon"], plain(feeds)["epsilon"], rtol=1e-5)
