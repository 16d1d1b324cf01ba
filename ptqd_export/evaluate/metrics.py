"""Image metrics over samples (N, C, H, W) in [-1, 1], in float64.

Paired metrics (PSNR, SSIM) compare a sample with the full-precision sample of the same seed; the Frechet
distance compares two sets (the kernel distance stands in `resampling`). Clamping, as PNG files need it, hides
samples that ran away: `excursions` counts those.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from ..errors import ModelError, PTQDError, RecipeError

F64 = npt.NDArray[np.float64]
Floats = npt.NDArray[np.floating]

SSIM_WINDOW = 11
"""Pixels of its Gaussian window, which is what scikit-image makes of sigma 1.5."""
EXCURSION_MARGIN = 0.5
"""A sample has run away if a value is further than this outside the data range.

It is in data units: a quarter of the range.
"""


@dataclass(frozen=True)
class Excursions:
    """How many samples left the data range, and how far.

    Attributes:
        count: how many samples.
        share: count / N, in [0, 1].
        largest: the largest absolute value of all samples; infinite where one is infinite or NaN.
    """

    count: int
    share: float
    largest: float


def pixels(x: Floats) -> npt.NDArray[np.float32]:
    """Samples as they look in an 8-bit picture: clamped to [-1, 1] and rounded to its 256 values."""
    clamped = np.clip(np.asarray(x, np.float64), -1.0, 1.0)
    return np.asarray(np.rint((clamped + 1.0) * 127.5) / 127.5 - 1.0, np.float32)


def psnr(a: Floats, b: Floats, data_range: float = 2.0, clamp: bool = True) -> F64:
    """Peak signal-to-noise ratio per sample, (N,), in dB: 10 log10(data_range^2 / mean (a - b)^2).

    It is infinite where the samples are equal.

    Args:
        a, b: (N, ...), equal shapes.
        data_range: highest minus lowest value; the range is centred on 0.
        clamp: compare the values clamped to the range, as in PNG files; False shows runaway values in full.
    Raises:
        RecipeError: the shapes differ.
        PTQDError: scikit-image is not installed.
    """
    measure = _skimage().peak_signal_noise_ratio
    a, b = _pair(a, b, data_range, clamp)
    with np.errstate(divide="ignore"):
        return np.array([measure(x, y, data_range=data_range) for x, y in zip(a, b, strict=True)], np.float64)


def ssim(a: Floats, b: Floats, data_range: float = 2.0, clamp: bool = True) -> F64:
    """Structural similarity per sample, (N,), in [-1, 1] (Wang et al. 2004, eq. 13).

    It is the mean over channels and window positions. The window is Gaussian, 11 x 11 with sigma 1.5, whole
    windows only; K1 = 0.01, K2 = 0.03, with population moments. The luminance term needs values >= 0, so
    [-data_range / 2, data_range / 2] is moved to [0, data_range].

    Args:
        a, b: (N, C, H, W), equal shapes, H and W at least SSIM_WINDOW.
        data_range, clamp: as in `psnr`.
    Raises:
        RecipeError: the shapes differ, or the images are smaller than the window.
        PTQDError: scikit-image is not installed.
    """
    measure = _skimage().structural_similarity
    a, b = (x + data_range / 2 for x in _pair(a, b, data_range, clamp))
    if a.ndim != 4 or min(a.shape[2:]) < SSIM_WINDOW:
        raise RecipeError(
            f"SSIM of images of shape {a.shape}: expected (N, C, H, W) with H and W at least {SSIM_WINDOW}"
        )
    settings = {"gaussian_weights": True, "sigma": 1.5, "use_sample_covariance": False}
    values = [
        measure(x, y, data_range=data_range, channel_axis=0, **settings) for x, y in zip(a, b, strict=True)
    ]
    return np.array(values, np.float64)


def _skimage() -> Any:
    try:
        import skimage.metrics
    except ImportError as error:
        raise PTQDError(f"PSNR and SSIM need scikit-image ({error}): install the extra eval") from error
    return skimage.metrics


def feature_stats(features: Floats, counts: npt.NDArray[np.integer] | None = None) -> tuple[F64, F64]:
    """Mean (D,) and unbiased covariance (D, D) of features (N, D), N at least 2.

    Args:
        counts: how often each row counts, (N,), with the sum N; once if None.
    Raises:
        RecipeError: the features are not a table of at least two rows.
        ModelError: a feature is NaN or infinite.
    """
    features = np.asarray(features, np.float64)
    if features.ndim != 2 or len(features) < 2:
        raise RecipeError(f"features have shape {features.shape}: expected (N, D) with at least 2 samples")
    if not np.isfinite(features).all():
        raise ModelError(
            "features hold NaN or infinite values: clamp the samples to the data range, and look for NaN "
            "among them"
        )
    weights = np.ones(len(features)) if counts is None else np.asarray(counts, np.float64)
    mean = weights @ features / len(features)
    centred = features - mean
    return mean, np.asarray((weights[:, None] * centred).T @ centred / (len(features) - 1))


def frechet_distance(mean1: Floats, cov1: Floats, mean2: Floats, cov2: Floats) -> float:
    """Squared Frechet distance of two Gaussians (Dowson & Landau 1982; FID of Heusel et al. 2017, eq. 6).

    ||m1 - m2||^2 + tr(C1 + C2 - 2 (C1 C2)^(1/2)). The trace of the root is computed as the sum of the
    singular values of C1^(1/2) C2^(1/2), with both roots from eigh: nothing becomes complex, and singular
    covariances (N <= D) are fine. A finite number of samples biases the distance upwards: compare only
    distances of equally many samples.

    Args:
        mean1, mean2: (D,).
        cov1, cov2: (D, D), symmetric, positive semi-definite up to rounding.
    Raises:
        RecipeError: the shapes do not fit.
    """
    mean1, mean2, cov1, cov2 = (np.asarray(v, np.float64) for v in (mean1, mean2, cov1, cov2))
    d = mean1.size
    if mean1.shape != (d,) or mean2.shape != (d,) or cov1.shape != (d, d) or cov2.shape != (d, d):
        raise RecipeError(
            f"means {mean1.shape}, {mean2.shape} and covariances {cov1.shape}, {cov2.shape}: expected (D,), "
            "(D,), (D, D), (D, D)"
        )
    root = np.linalg.svd(_symmetric_root(cov1) @ _symmetric_root(cov2), compute_uv=False).sum()
    return max(0.0, float(((mean1 - mean2) ** 2).sum() + np.trace(cov1) + np.trace(cov2) - 2 * root))


def excursions(
    x: Floats, low: float = -1.0, high: float = 1.0, margin: float = EXCURSION_MARGIN
) -> Excursions:
    """Count the samples with a value below low - margin or above high + margin, before clamping.

    NaN counts as outside.

    Args:
        x: (N, ...), N at least 1.
        margin: in data units; full-precision samples overshoot the range a little, which is no failure.
    Raises:
        RecipeError: there are no samples.
    """
    if len(x) == 0:
        raise RecipeError("excursions of 0 samples: give at least 1")
    flat = np.asarray(x, np.float64).reshape(len(x), -1)
    count = int((~((flat >= low - margin) & (flat <= high + margin))).any(1).sum())
    largest = float(np.where(np.isnan(flat), np.inf, np.abs(flat)).max())
    return Excursions(count, count / len(x), largest)


def _pair(a: Floats, b: Floats, data_range: float, clamp: bool) -> tuple[F64, F64]:
    if a.shape != b.shape or a.ndim < 2 or len(a) == 0:
        raise RecipeError(
            f"paired samples have shapes {a.shape} and {b.shape}: expected two equal ones (N, ...) with at "
            "least 1 sample"
        )
    a64, b64 = np.asarray(a, np.float64), np.asarray(b, np.float64)
    if not clamp:
        return a64, b64
    return np.clip(a64, -data_range / 2, data_range / 2), np.clip(b64, -data_range / 2, data_range / 2)


def _symmetric_root(cov: F64) -> F64:
    """The positive semi-definite square root; eigenvalues below zero are rounding and count as zero."""
    values, vectors = np.linalg.eigh((cov + cov.T) / 2)
    return np.asarray((vectors * np.sqrt(np.maximum(values, 0.0))) @ vectors.T)
