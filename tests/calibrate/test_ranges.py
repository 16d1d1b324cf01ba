"""Histograms, ranges and rounding on known data."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from ptqd_export.calibrate.ranges import BINS, ChannelRanges, Histogram, weight_scales
from ptqd_export.calibrate.rounding import gptq, nearest
from ptqd_export.core.quant import Grid, qmax, to_codes


def histogram(*parts: np.ndarray) -> Histogram:
    h = Histogram()
    for part in parts:
        h.add(torch.from_numpy(np.asarray(part, np.float32)))
    return h


def same(a: Histogram, b: Histogram) -> bool:
    return (a.exponent, a.low, a.high) == (b.exponent, b.low, b.high) and bool((a.counts == b.counts).all())


def silu(rng: np.random.Generator, size: int = 50_000) -> np.ndarray:
    """Values as they leave the activation of most diffusion models: from -0.28 up."""
    x = 2 * rng.standard_normal(size)
    return np.asarray(x / (1 + np.exp(-x)))


def test_histogram_counts_what_numpy_counts(rng: np.random.Generator) -> None:
    x = (rng.standard_normal((7, 11, 3)) + 0.7).astype(np.float32)
    h = histogram(x)
    for side, values in ((0, -x[x < 0]), (1, x[x >= 0])):
        assert (h.counts[side] == np.histogram(values, BINS, (0, h.limit))[0]).all()
    assert h.counts.dtype == np.int64 and h.total == x.size and (h.counts.sum(1) > 0).all()
    assert (h.low, h.high) == (x.min(), x.max())
    assert h.largest == np.abs(x).max() and h.limit / 2 <= h.largest < h.limit
    assert not (histogram(-x).counts == h.counts).all()


def test_growth_is_exact(rng: np.random.Generator) -> None:
    parts = [rng.standard_normal(500) * s + s for s in (1e-3, -40.0, 1.0, 0.0, 1e4)]
    whole = histogram(np.concatenate(parts))
    assert same(histogram(*parts), whole) and same(histogram(*parts[::-1]), whole)
    assert not same(histogram(*parts[1:]), whole) and not same(histogram(*(-p for p in parts)), whole)


def test_minmax_and_percentile_on_known_data(rng: np.random.Generator) -> None:
    values = rng.permutation(np.arange(1, 10001) / 10000)
    values[::2] *= -1
    h = histogram(values)
    assert (
        h.range("minmax", 8) == h.largest == h.range("percentile", 8, 100.0) == pytest.approx(1.0, abs=1e-3)
    )
    bin_width = h.limit / BINS
    for p in (60.0, 90.0, 99.9):
        assert h.range("percentile", 8, p) == pytest.approx(np.percentile(np.abs(values), p), abs=bin_width)
    for bits in (4, 8):
        grid = h.symmetric("minmax", bits)
        assert grid == Grid.symmetric(float(np.float32(h.largest / qmax(bits))), bits)


def test_windows_by_minmax_and_percentile(rng: np.random.Generator) -> None:
    values = rng.permutation(np.linspace(-1, 3, 40_001))
    h = histogram(values)
    assert h.window("minmax", 8) == h.window("percentile", 8, 100.0) == Grid.window(h.low, h.high, 8)
    for p in (80.0, 99.0):
        ends = [float(np.percentile(values, q)) for q in ((100 - p) / 2, (100 + p) / 2)]
        got, wanted = h.window("percentile", 8, p), Grid.window(*ends, 8)
        assert got.scale == pytest.approx(wanted.scale, rel=0.01) and abs(got.lo - wanted.lo) <= 1
        assert got.scale < 0.995 * h.window("minmax", 8).scale
    # Where less lies below zero than is left out on either side, nothing of it is kept.
    few = histogram(np.concatenate([[-1.0], np.linspace(0, 1, 1000)]))
    assert few.window("percentile", 8, 99.0).lo == 0 > few.window("percentile", 8, 99.9).lo


def rounding_error(x: np.ndarray, grid: Grid) -> float:
    codes = np.clip(np.rint(x / grid.scale), grid.lo, grid.hi)
    return float(((x - codes * grid.scale) ** 2).mean())


def counted_error(x: np.ndarray, grid: Grid) -> float:
    """What "tails" makes least: the squared error, where a value that is cut off counts more."""
    codes = np.rint(x / grid.scale)
    kept = np.clip(codes, grid.lo, grid.hi)
    counts = np.where(codes == kept, 1, np.sqrt(grid.hi - grid.lo + 1))
    return float((counts * (x - kept * grid.scale) ** 2).mean())


def decibels(worse: float, better: float) -> float:
    return float(10 * np.log10(worse / better))


@pytest.mark.parametrize("bits", [4, 8])
def test_mse_beats_minmax_on_heavy_tails_and_is_near_the_best(rng: np.random.Generator, bits: int) -> None:
    x = rng.standard_t(3, 50_000)
    h = histogram(x)
    chosen, minmax = (rounding_error(x, h.symmetric(m, bits)) for m in ("mse", "minmax"))
    scales = np.abs(x).max() * np.geomspace(0.01, 1, 400) / qmax(bits)
    best = min(rounding_error(x, Grid.symmetric(float(scale), bits)) for scale in scales)
    assert chosen < {4: 0.5, 8: 0.9}[bits] * minmax
    assert chosen < 1.02 * best


def test_windows_beat_symmetric_grids_where_data_are_uneven(rng: np.random.Generator) -> None:
    uneven, even = silu(rng), rng.standard_normal(50_000)
    gain = {}
    for name, x in (("uneven", uneven), ("even", even)):
        for bits in (4, 8):
            h = histogram(x)
            found = [rounding_error(x, grid) for grid in (h.symmetric("mse", bits), h.window("mse", bits))]
            gain[name, bits] = decibels(*found)
    assert gain["uneven", 4] > 3 and gain["uneven", 8] > 3
    # Of 15 steps an end of its own is worth little, and of 255 nothing.
    assert abs(gain["even", 4]) < 0.5 and abs(gain["even", 8]) < 0.2


@pytest.mark.parametrize("bits", [4, 8])
def test_mse_windows_are_near_the_best(rng: np.random.Generator, bits: int) -> None:
    """Of a grid of ends. Without clipping they are far from it."""
    x = silu(rng, 20_000)
    h = histogram(x)
    ends = [(x.min() * a, x.max() * b) for a in np.linspace(0.5, 1, 12) for b in np.linspace(0.3, 1, 36)]
    best = min(rounding_error(x, Grid.window(float(low), float(high), bits)) for low, high in ends)
    assert rounding_error(x, h.window("mse", bits)) < 1.05 * best
    if bits == 4:
        assert rounding_error(x, h.window("minmax", bits)) > 1.3 * best


@pytest.mark.parametrize(("bits", "wider"), [(4, 1.2), (8, 1.03)])
def test_tails_are_cut_off_less_than_by_squared_error(
    rng: np.random.Generator, bits: int, wider: float
) -> None:
    """As far as their own measure says, which is near its best."""
    x = rng.standard_t(5, 50_000)
    h = histogram(x)
    window, symmetric, plain = h.window("tails", bits), h.symmetric("tails", bits), h.symmetric("mse", bits)
    assert wider * plain.scale < symmetric.scale <= h.symmetric("minmax", bits).scale
    assert window.scale > wider * h.window("mse", bits).scale
    ends = [(x.min() * a, x.max() * b) for a in np.linspace(0.2, 1, 40) for b in np.linspace(0.2, 1, 40)]
    best = min(counted_error(x, Grid.window(float(low), float(high), bits)) for low, high in ends)
    assert counted_error(x, window) < 1.05 * best
    scales = np.abs(x).max() * np.geomspace(0.05, 1, 400) / qmax(bits)
    best = min(counted_error(x, Grid.symmetric(float(scale), bits)) for scale in scales)
    assert counted_error(x, symmetric) < 1.05 * best


def test_channel_ranges(rng: np.random.Generator) -> None:
    x = (rng.standard_normal((3, 4, 5, 5)) * np.array([1, 10, 0, 0.1])[:, None, None]).astype(np.float32)
    ranges = ChannelRanges()
    for part in x:
        ranges.add(torch.from_numpy(part[None]), 1)
    np.testing.assert_array_equal(ranges.low, np.minimum(x.min((0, 2, 3)), 0))
    np.testing.assert_array_equal(ranges.high, np.maximum(x.max((0, 2, 3)), 0))
    np.testing.assert_array_equal(ranges.largest, np.abs(x).max((0, 2, 3)))
    last = ChannelRanges()
    last.add(torch.from_numpy(np.abs(x).transpose(0, 2, 3, 1).copy()), 3)
    np.testing.assert_array_equal(last.high, ranges.largest)
    for bad in (np.nan, np.inf, -np.inf):
        with pytest.raises(ValueError, match="NaN or infinite"):
            last.add(torch.tensor([[[[1.0], [bad]]]]), 1)
    assert not last.low.any()  # zero is within, though no value of channels 0 and 1 is


def test_mse_keeps_the_whole_range_where_clipping_hurts() -> None:
    two_points = np.array([0.0, 1.0] * 100)
    assert histogram(two_points).range("mse", 8) > 0.99
    grid = histogram(-two_points).window("mse", 8)
    assert grid.hi == 0 and grid.lo * grid.scale < -0.99


def test_zeros_and_tiny_values() -> None:
    assert histogram(np.zeros(5)).range("mse", 8) == 1.0
    assert histogram(np.zeros(5)).window("mse", 4) == histogram(np.zeros(5)).symmetric("mse", 4)
    tiny = histogram(np.full(4, 1e-42))
    assert tiny.window("mse", 8).scale > 0
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
