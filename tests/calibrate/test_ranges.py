"""Histograms, ranges and rounding on known data."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from ptqd_export.calibrate.ranges import BINS, AbsHistogram, weight_scales
from ptqd_export.calibrate.rounding import gptq, nearest
from ptqd_export.core.quant import qmax, to_codes


def histogram(*parts: np.ndarray) -> AbsHistogram:
    h = AbsHistogram()
    for part in parts:
        h.add(torch.from_numpy(np.asarray(part, np.float32)))
    return h


def same(a: AbsHistogram, b: AbsHistogram) -> bool:
    return a.exponent == b.exponent and a.largest == b.largest and bool((a.counts == b.counts).all())


def test_histogram_counts_what_numpy_counts(rng: np.random.Generator) -> None:
    x = rng.standard_normal((7, 11, 3)).astype(np.float32)
    h = histogram(x)
    expected, _ = np.histogram(np.abs(x), BINS, (0, h.limit))
    assert (h.counts == expected).all() and h.total == x.size
    assert h.largest == np.abs(x).max() and h.limit / 2 <= h.largest < h.limit


def test_growth_is_exact(rng: np.random.Generator) -> None:
    parts = [rng.standard_normal(500) * s for s in (1e-3, 40.0, 1.0, 0.0, 1e4)]
    whole = histogram(np.concatenate(parts))
    assert same(histogram(*parts), whole) and same(histogram(*parts[::-1]), whole)
    assert not same(histogram(*parts[1:]), whole)


def test_minmax_and_percentile_on_known_data(rng: np.random.Generator) -> None:
    values = rng.permutation(np.arange(1, 10001) / 10000)
    h = histogram(values)
    assert h.range("minmax", 8) == 1.0 == h.range("percentile", 8, 100.0)
    bin_width = h.limit / BINS
    for p in (60.0, 90.0, 99.9):
        assert h.range("percentile", 8, p) == pytest.approx(np.percentile(values, p), abs=bin_width)
    assert h.scale("minmax", 8) == np.float32(1 / 127) and h.scale("minmax", 4) == np.float32(1 / 7)


def rounding_error(x: np.ndarray, scale: float, bits: int) -> float:
    return float(((x - to_codes(x, scale, bits).astype(np.float64) * scale) ** 2).mean())


@pytest.mark.parametrize("bits", [4, 8])
def test_mse_beats_minmax_on_heavy_tails_and_is_near_the_best(rng: np.random.Generator, bits: int) -> None:
    x = rng.standard_t(3, 50_000)
    h = histogram(x)
    chosen, minmax = (rounding_error(x, h.scale(m, bits), bits) for m in ("mse", "minmax"))
    best = min(rounding_error(x, np.abs(x).max() * r / qmax(bits), bits) for r in np.geomspace(0.01, 1, 400))
    assert chosen < {4: 0.5, 8: 0.9}[bits] * minmax
    assert chosen < 1.02 * best


def test_mse_keeps_the_whole_range_where_clipping_hurts() -> None:
    two_points = np.array([0.0, 1.0] * 100)
    assert histogram(two_points).range("mse", 8) > 0.99


def test_zeros_and_tiny_values() -> None:
    assert histogram(np.zeros(5)).range("mse", 8) == 1.0
    tiny = histogram(np.full(4, 1e-42))
    assert tiny.total == 4 and tiny.largest == pytest.approx(1e-42, rel=0.01)
    with pytest.raises(ValueError, match="NaN"):
        histogram(np.array([1.0, np.nan]))


def channel_errors(w: np.ndarray, scale: np.ndarray, bits: int) -> np.ndarray:
    s = scale.reshape(-1, 1, 1, 1)
    return np.asarray(((w - to_codes(w, s, bits) * s) ** 2).sum((1, 2, 3)))


def test_weight_scales_per_channel(rng: np.random.Generator) -> None:
    w = (rng.standard_normal((6, 5, 3, 3)) * np.geomspace(0.01, 10, 6)[:, None, None, None]).astype(
        np.float32
    )
    w[3] = 0.0
    minmax, percentile, mse = (weight_scales(w, 4, m, 90.0) for m in ("minmax", "percentile", "mse"))
    flat = np.abs(w).reshape(6, -1)
    np.testing.assert_allclose(minmax, flat.max(1) / 7, rtol=1e-6)
    np.testing.assert_allclose(percentile, np.quantile(flat, 0.9, axis=1) / 7, rtol=1e-5)
    assert mse.dtype == np.float32 and mse[3] == 0.0
    live = [0, 1, 2, 4, 5]
    least, widest = channel_errors(w[live], mse[live], 4), channel_errors(w[live], minmax[live], 4)
    assert (least <= widest).all() and least.sum() < 0.95 * widest.sum()


def test_gptq_lowers_output_error_and_stays_on_the_grid(rng: np.random.Generator) -> None:
    mixing = rng.standard_normal((40, 40)) * np.geomspace(1, 0.02, 40)
    x = (rng.standard_normal((4000, 40)) @ mixing).astype(np.float32)  # correlated inputs
    held_out = (rng.standard_normal((1000, 40)) @ mixing).astype(np.float32)
    w = rng.standard_normal((16, 40)).astype(np.float32)
    scale = weight_scales(w, 4, "mse")
    hessian = torch.from_numpy(x.T @ x)[None]
    codes, plain = gptq(w, scale, 4, hessian), nearest(w, scale, 4)

    def error(c: np.ndarray) -> float:
        return float((((c * scale[:, None]) @ held_out.T - w @ held_out.T) ** 2).mean())

    assert codes.dtype == np.int8 and codes.min() >= -8 and codes.max() <= 7
    assert error(codes) < 0.5 * error(plain)
    assert (codes == gptq(w, scale, 4, hessian)).all()


def test_gptq_with_white_inputs_is_nearest_and_groups_are_apart(rng: np.random.Generator) -> None:
    w = rng.standard_normal((6, 8)).astype(np.float32)
    scale = weight_scales(w, 4, "minmax")
    white = torch.eye(8)[None]
    assert (gptq(w, scale, 4, white) == nearest(w, scale, 4)).all()
    a, b = (torch.from_numpy(m @ m.T).float() for m in rng.standard_normal((2, 8, 12)))
    both = gptq(w, scale, 4, torch.stack([a, b]))
    assert (both[:3] == gptq(w[:3], scale[:3], 4, a[None])).all() and (
        both[3:] == gptq(w[3:], scale[3:], 4, b[None])
    ).all()
