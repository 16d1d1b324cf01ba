"""Ranges: how far a symmetric grid should reach.

Activations are measured by streaming histograms, weights as whole tensors. real = code * scale with codes in
[qmin(bits), qmax(bits)]; a range r gives scale = r / qmax(bits).
"""

from __future__ import annotations

import math

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from ..core.quant import F32, qmax, qmin

F64 = npt.NDArray[np.float64]
BINS = 2048
SUBDIVISIONS = 4
"""Points per bin at which the quantization error is taken: at 8 bits a bin is nearly as wide as a step."""
ACTIVATION_RATIOS = np.geomspace(0.01, 1.0, 160)
WEIGHT_RATIOS = np.linspace(0.2, 1.0, 81)
_SMALLEST = -100
"""Exponent of the limit of an empty histogram; BINS / limit still fits a float32."""


class AbsHistogram:
    """Streaming histogram of |x|: BINS equal bins on [0, limit), limit a power of two.

    A larger value doubles the limit, and bins are merged in pairs. Because limits are powers of two, this
    equals binning everything at the final limit: the result depends neither on order nor on grouping.

    Attributes:
        counts: int64 (BINS,).
        exponent: limit = 2^exponent.
        largest: largest |x| seen, exactly.
    """

    def __init__(self) -> None:
        self.counts: npt.NDArray[np.int64] = np.zeros(BINS, np.int64)
        self.exponent = _SMALLEST
        self.largest = 0.0

    @property
    def limit(self) -> float:
        return math.ldexp(1.0, self.exponent)

    @property
    def total(self) -> int:
        return int(self.counts.sum())

    def add(self, values: Tensor) -> None:
        """Count |values| (any shape, float32, finite).

        Raises:
            ValueError: NaN or infinite values.
        """
        if values.numel() == 0:
            return
        magnitudes = values.detach().float().flatten().abs()
        largest = float(magnitudes.max())
        if not math.isfinite(largest):
            raise ValueError("NaN or infinite values")
        self._grow(math.frexp(largest)[1] if largest > 0 else _SMALLEST)  # largest < 2^exponent
        self.largest = max(self.largest, largest)
        bins = magnitudes.mul_(BINS / self.limit).to(torch.int32)
        self.counts += torch.bincount(bins, minlength=BINS).numpy()

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
        """
        if self.largest == 0.0:
            return 1.0
        if method == "minmax":
            return self.largest
        if method == "percentile":
            return self._percentile(percentile)
        return self._least_error(bits)

    def _percentile(self, percentile: float) -> float:
        wanted = percentile / 100 * self.total
        cumulative = np.cumsum(self.counts)
        i = int(np.searchsorted(cumulative, wanted))
        before = int(cumulative[i] - self.counts[i])
        value = (i + (wanted - before) / self.counts[i]) * self.limit / BINS
        return float(min(value, self.largest))

    def _least_error(self, bits: int) -> float:
        used = np.flatnonzero(self.counts)
        offsets = (np.arange(SUBDIVISIONS) + 0.5) / SUBDIVISIONS
        points = np.minimum((used[:, None] + offsets) * (self.limit / BINS), self.largest)
        weights = self.counts[used]
        errors = []
        for ratio in ACTIVATION_RATIOS:
            scale = self.largest * ratio / qmax(bits)
            error = points - np.clip(np.rint(points / scale), qmin(bits), qmax(bits)) * scale
            errors.append(float(weights @ (error**2).sum(1)))
        return float(self.largest * ACTIVATION_RATIOS[int(np.argmin(errors))])

    def scale(self, method: str, bits: int, percentile: float = 100.0) -> float:
        """The scale of that grid, range / qmax(bits): a float32 value."""
        return float(np.float32(self.range(method, bits, percentile) / qmax(bits)))


def _coarsened(counts: npt.NDArray[np.int64], doublings: int) -> npt.NDArray[np.int64]:
    width = min(1 << min(doublings, 11), BINS)
    merged = np.zeros(BINS, np.int64)
    merged[: BINS // width] = counts.reshape(-1, width).sum(1)
    return merged


def weight_scales(weight: F32, bits: int, method: str, percentile: float = 100.0) -> F32:
    """One scale per output channel of `weight` (O, ...), float32 (O,); 0 for a channel of zeros.

    The scales come from the weight values themselves, not from a histogram.

    mse: of a fixed set of ratios to the channel's largest |w|, the one with the least squared error of
        round-to-nearest.
    """
    rows = weight.reshape(len(weight), -1).astype(np.float64)
    magnitude = np.abs(rows)
    largest = magnitude.max(1)
    if method == "percentile":
        largest = np.quantile(magnitude, percentile / 100, axis=1)
    best = largest / qmax(bits)
    if method == "mse":
        least = np.full(len(rows), np.inf)
        safe = np.where(largest > 0, largest, 1.0)
        for ratio in WEIGHT_RATIOS:
            scale = (safe * ratio / qmax(bits))[:, None]
            error = ((rows - np.clip(np.rint(rows / scale), qmin(bits), qmax(bits)) * scale) ** 2).sum(1)
            better = error < least
            least = np.where(better, error, least)
            best = np.where(better, safe * ratio / qmax(bits), best)
        best = np.where(largest > 0, best, 0.0)
    return np.asarray(best, np.float32)
