"""Ranges: how far a grid should reach.

Activations are measured by streaming histograms, weights as whole tensors. real = code * scale; a symmetric
grid has codes in [qmin(bits), qmax(bits)], and a range r gives scale = r / qmax(bits).
"""

from __future__ import annotations

import math

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from ..core.quant import F32, Grid, qmax, qmin

F64 = npt.NDArray[np.float64]
BINS = 2048
SUBDIVISIONS = 4
"""Points per bin at which the quantization error is taken: at 8 bits a bin is nearly as wide as a step."""
ACTIVATION_RATIOS = np.geomspace(0.01, 1.0, 160)
WINDOW_RATIOS = np.geomspace(0.02, 1.0, 60)
MOVED_ENDS = ((1, 1), (0, 1), (1, 0), (0, 1), (1, 0))
"""Which ends of a window (low, high) are moved, search after search."""
WEIGHT_RATIOS = np.linspace(0.2, 1.0, 81)
_SMALLEST = -100
"""Exponent of the limit of an empty histogram; BINS / limit still fits a float32."""


class Histogram:
    """Streaming histogram: BINS equal bins of magnitude on [0, limit) for either sign, limit a power of two.

    A larger value doubles the limit, and bins are merged in pairs. Because limits are powers of two, this
    equals binning everything at the final limit: the result depends neither on order nor on grouping.

    Attributes:
        counts: int64 (2, BINS): values below zero, and from zero on.
        exponent: limit = 2^exponent.
        low, high: smallest and largest value seen, exactly; 0 is between them.
    """

    def __init__(self) -> None:
        self.counts: npt.NDArray[np.int64] = np.zeros((2, BINS), np.int64)
        self.exponent = _SMALLEST
        self.low = self.high = 0.0

    @property
    def limit(self) -> float:
        return math.ldexp(1.0, self.exponent)

    @property
    def largest(self) -> float:
        """Largest |x| seen."""
        return max(-self.low, self.high)

    @property
    def total(self) -> int:
        return int(self.counts.sum())

    def add(self, values: Tensor) -> None:
        """Count values (any shape, float32, finite).

        Raises:
            ValueError: NaN or infinite values.
        """
        if values.numel() == 0:
            return
        flat = values.detach().float().flatten()
        low, high = (float(v) for v in torch.aminmax(flat))
        if not (math.isfinite(low) and math.isfinite(high)):
            raise ValueError("NaN or infinite values")
        self.low, self.high = min(self.low, low), max(self.high, high)
        largest = max(-low, high)
        self._grow(math.frexp(largest)[1] if largest > 0 else _SMALLEST)  # largest < 2^exponent
        # floor puts -0.5 bins into bin -1: mirrored, that is bin 0 of the values below zero.
        bins = flat.mul(BINS / self.limit).floor_().clamp_(-BINS, BINS - 1).to(torch.int32).add_(BINS)
        both = torch.bincount(bins, minlength=2 * BINS).numpy()
        self.counts += np.stack([both[BINS - 1 :: -1], both[BINS:]])

    def _grow(self, exponent: int) -> None:
        if exponent > self.exponent:
            self.counts = _coarsened(self.counts, exponent - self.exponent)
            self.exponent = exponent

    def range(self, method: str, bits: int, percentile: float = 100.0) -> float:
        """The range of a symmetric grid of `bits` bits; 1.0 if only zeros were seen.

        minmax: the largest |x|.
        percentile: the value below which that share (in percent) of |x| lies, linear inside a bin.
        mse: the clip threshold with the least expected squared quantization error (rounding and clipping)
            over the histogram.
        tails: the same, but the error of values that are cut off counts sqrt(2^bits) times. It goes the same
            way at each step and makes large values of single samples run away; that of rounding averages out.
        """
        if self.largest == 0.0:
            return 1.0
        if method == "minmax":
            return self.largest
        if method == "percentile":
            return min(_quantile(self.counts.sum(0), percentile / 100) * self.limit / BINS, self.largest)
        points, weights = self._points()
        ranges = self.largest * ACTIVATION_RATIOS
        grids = [Grid.symmetric(float(r) / qmax(bits), bits) for r in ranges]
        clipping = _clipping(method, bits)
        return float(ranges[int(np.argmin([_error(points, weights, grid, clipping) for grid in grids]))])

    def symmetric(self, method: str, bits: int, percentile: float = 100.0) -> Grid:
        """The symmetric grid with that range."""
        return Grid.symmetric(float(np.float32(self.range(method, bits, percentile) / qmax(bits))), bits)

    def window(self, method: str, bits: int, percentile: float = 100.0) -> Grid:
        """The grid of `bits` bits between two ends of its own.

        minmax: smallest and largest value.
        percentile: the window that leaves out half of the rest on either side.
        mse, tails: the ends with the least expected error over the histogram: both moved together, then each
            alone, twice, by the ratios of WINDOW_RATIOS.
        """
        if self.largest == 0.0:
            return Grid.symmetric(float(np.float32(1 / qmax(bits))), bits)
        low, high = self.low, self.high
        if method == "percentile":
            below, above = (
                _quantile(side, 1 - min(1.0, (100 - percentile) / 200 * self.total / max(side.sum(), 1)))
                for side in self.counts
            )
            low, high = max(low, -below * self.limit / BINS), min(high, above * self.limit / BINS)
        if method in ("mse", "tails"):
            points, weights = self._points()
            ends, kept, clipping = np.array([low, high]), np.ones(2), _clipping(method, bits)
            for moved in MOVED_ENDS:
                ratios = np.where(moved, WINDOW_RATIOS[:, None], kept)
                grids = [Grid.window(float(a), float(b), bits) for a, b in ends * ratios]
                errors = [_error(points, weights, grid, clipping) for grid in grids]
                kept = ratios[int(np.argmin(errors))]
            low, high = (float(end) for end in ends * kept)
        return Grid.window(low, high, bits)

    def _points(self) -> tuple[F64, F64]:
        """SUBDIVISIONS values in each bin that holds any, and its count, both (N, SUBDIVISIONS) or (N, 1)."""
        sign, used = np.nonzero(self.counts)
        offsets = (np.arange(SUBDIVISIONS) + 0.5) / SUBDIVISIONS
        points = np.where(sign, 1, -1)[:, None] * (used[:, None] + offsets) * (self.limit / BINS)
        return np.clip(points, self.low, self.high), self.counts[sign, used][:, None].astype(np.float64)


def _clipping(method: str, bits: int) -> float:
    """How often the error of values counts that a grid of `bits` bits cuts off."""
    return math.sqrt(1 << bits) if method == "tails" else 1.0


def _error(points: F64, weights: F64, grid: Grid, clipping: float) -> float:
    codes = np.rint(points / grid.scale)
    kept = np.clip(codes, grid.lo, grid.hi)
    counted = np.where(codes == kept, weights, clipping * weights)
    return float((counted * (points - kept * grid.scale) ** 2).sum())


def _quantile(counts: npt.NDArray[np.int64], share: float) -> float:
    """The place in bins below which that share of the counts lies; 0 without counts."""
    if not counts.any():
        return 0.0
    wanted, cumulative = share * counts.sum(), np.cumsum(counts)
    i = min(int(np.searchsorted(cumulative, wanted)), len(counts) - 1)
    if not counts[i]:
        return float(i)
    return float(i + (wanted - (cumulative[i] - counts[i])) / counts[i])


class ChannelRanges:
    """Streaming smallest and largest value per channel.

    Attributes:
        low, high: float32 (C,); 0 is between them.
    """

    def __init__(self) -> None:
        self.low: F32 = np.zeros(0, np.float32)
        self.high: F32 = np.zeros(0, np.float32)

    def add(self, values: Tensor, axis: int) -> None:
        """Take in `values`, whose channels lie along `axis`.

        Raises:
            ValueError: NaN or infinite values.
        """
        rows = values.detach().float().movedim(axis, 0).flatten(1)
        low, high = (v.numpy() for v in torch.aminmax(rows, dim=1))
        if not (np.isfinite(low).all() and np.isfinite(high).all()):
            raise ValueError("NaN or infinite values")
        if not len(self.low):
            self.low, self.high = np.zeros_like(low), np.zeros_like(high)
        self.low, self.high = np.minimum(self.low, low), np.maximum(self.high, high)

    @property
    def largest(self) -> F32:
        """Largest |x| per channel."""
        return np.maximum(-self.low, self.high)


def _coarsened(counts: npt.NDArray[np.int64], doublings: int) -> npt.NDArray[np.int64]:
    width = min(1 << min(doublings, 11), BINS)
    merged = np.zeros_like(counts)
    merged[:, : BINS // width] = counts.reshape(2, -1, width).sum(2)
    return merged


BLOCK = 1 << 17
"""Weights that are scaled at a time: what fits into a core's cache is five times as fast."""


def weight_scales(weight: F32, bits: int, method: str, percentile: float = 100.0) -> F32:
    """One scale per output channel of `weight` (O, ...), float32 (O,); 0 for a channel of zeros.

    The scales come from the weight values themselves, not from a histogram.

    mse: of a fixed set of ratios to the channel's largest |w|, the one with the least squared error of
        round-to-nearest.
    """
    rows = weight.reshape(len(weight), -1)
    size = max(1, BLOCK // rows.shape[1])
    parts = (rows[i : i + size].astype(np.float64) for i in range(0, len(rows), size))
    best = np.concatenate([_row_scales(part, bits, method, percentile) for part in parts])
    return np.asarray(best, np.float32)


def _row_scales(
    rows: npt.NDArray[np.float64], bits: int, method: str, percentile: float
) -> npt.NDArray[np.float64]:
    """`weight_scales` of some rows (N, K): (N,)."""
    magnitude = np.abs(rows)
    largest = magnitude.max(1)
    if method == "percentile":
        largest = np.quantile(magnitude, percentile / 100, axis=1)
    best = largest / qmax(bits)
    if method == "mse":
        least = np.full(len(rows), np.inf)
        safe = np.where(largest > 0, largest, 1.0)
        off = magnitude  # its memory, for what comes between
        for ratio in WEIGHT_RATIOS:
            scale = (safe * ratio / qmax(bits))[:, None]
            np.rint(np.divide(rows, scale, out=off), out=off)
            np.multiply(np.clip(off, qmin(bits), qmax(bits), out=off), scale, out=off)
            error = np.square(np.subtract(rows, off, out=off), out=off).sum(1)
            better = error < least
            least = np.where(better, error, least)
            best = np.where(better, scale[:, 0], best)
        best = np.where(largest > 0, best, 0.0)
    return np.asarray(best)
