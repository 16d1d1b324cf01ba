"""PSNR, SSIM, Frechet distance and excursions: values that are known, and input that is refused."""

from __future__ import annotations

import subprocess
import sys

import numpy as np
import numpy.typing as npt
import pytest
from helpers import environment

from ptqd_export.errors import ModelError, RecipeError
from ptqd_export.evaluate.metrics import excursions, feature_stats, frechet_distance, psnr, ssim

F64 = npt.NDArray[np.float64]


def samples(n: int, channels: int = 1, size: int = 16, seed: int = 0) -> F64:
    return np.random.default_rng(seed).uniform(-1, 1, (n, channels, size, size))


def covariance(d: int, seed: int) -> F64:
    a = np.random.default_rng(seed).standard_normal((d, 2 * d))
    return a @ a.T / (2 * d)


# --- PSNR ---


def test_psnr_of_a_known_error_is_exact_and_per_sample() -> None:
    a = np.zeros((2, 1, 4, 4))
    b = a + np.array([0.2, 0.02])[:, None, None, None]
    np.testing.assert_allclose(psnr(a, b), [20.0, 40.0], atol=1e-12)
    np.testing.assert_allclose(
        psnr(a, b, data_range=0.5), 10 * np.log10(0.25 / np.array([0.04, 0.0004])), atol=1e-12
    )


def test_psnr_of_equal_samples_is_infinite() -> None:
    assert psnr(samples(1), samples(1)).tolist() == [np.inf]


def test_psnr_clamps_by_default_and_the_option_shows_runaway_values() -> None:
    a, b = np.ones((1, 1, 2, 2)), np.full((1, 1, 2, 2), 101.0)
    assert psnr(a, b)[0] == np.inf
    np.testing.assert_allclose(psnr(a, b, clamp=False), 10 * np.log10(4 / 100**2))


def test_paired_metrics_refuse_other_shapes() -> None:
    for metric in (psnr, ssim):
        with pytest.raises(RecipeError, match=r"\(2, 1, 16, 16\) and \(3, 1, 16, 16\)"):
            metric(samples(2), samples(3))


# --- SSIM ---


def test_ssim_is_one_for_equal_samples_and_falls_with_noise() -> None:
    a, noise = samples(3, 3), samples(3, 3, seed=1)
    np.testing.assert_allclose(ssim(a, a), 1.0)
    little, much = ssim(a, a + 0.1 * noise), ssim(a, a + 0.5 * noise)
    assert (much < little).all() and (little < 0.999).all()


def test_ssim_of_flat_images_is_the_luminance_term() -> None:
    a, b = np.full((1, 1, 11, 11), -0.5), np.full((1, 1, 11, 11), 0.5)
    c1 = (0.01 * 2) ** 2
    np.testing.assert_allclose(ssim(a, b), (2 * 0.5 * 1.5 + c1) / (0.5**2 + 1.5**2 + c1), rtol=1e-9)


def test_ssim_of_one_window_equals_the_weighted_moments() -> None:
    a, b = samples(1, size=11)[0, 0] + 1, samples(1, size=11, seed=1)[0, 0] + 1
    y, x = np.mgrid[-5:6, -5:6]
    w = np.exp(-(x**2 + y**2) / (2 * 1.5**2))
    w /= w.sum()
    ma, mb = (w * a).sum(), (w * b).sum()
    va, vb, cov = (w * (a - ma) ** 2).sum(), (w * (b - mb) ** 2).sum(), (w * (a - ma) * (b - mb)).sum()
    c1, c2 = 0.02**2, 0.06**2
    expected = (2 * ma * mb + c1) * (2 * cov + c2) / ((ma**2 + mb**2 + c1) * (va + vb + c2))
    np.testing.assert_allclose(ssim(a[None, None] - 1, b[None, None] - 1), [expected], rtol=1e-10)


def test_ssim_refuses_images_smaller_than_its_window() -> None:
    with pytest.raises(RecipeError, match="at least 11"):
        ssim(samples(1, size=10), samples(1, size=10))


# --- Frechet distance ---


def test_frechet_distance_of_commuting_covariances_has_a_closed_form() -> None:
    rng = np.random.default_rng(0)
    q, _ = np.linalg.qr(rng.standard_normal((16, 16)))
    l1, l2 = rng.uniform(0, 3, 16), rng.uniform(0, 3, 16)
    m1, m2 = rng.standard_normal(16), rng.standard_normal(16)
    expected = ((m1 - m2) ** 2).sum() + ((np.sqrt(l1) - np.sqrt(l2)) ** 2).sum()
    got = frechet_distance(m1, (q * l1) @ q.T, m2, (q * l2) @ q.T)
    np.testing.assert_allclose(got, expected, rtol=1e-10)


def test_frechet_distance_of_general_covariances_equals_the_product_form() -> None:
    c1, c2, m = covariance(8, 1), covariance(8, 2), np.zeros(8)
    # The eigenvalues of C1 C2 are real and positive; the trace of its root is the sum of their roots.
    root = np.sqrt(np.linalg.eigvals(c1 @ c2).real).sum()
    assert np.abs(c1 @ c2 - c2 @ c1).max() > 0.01
    np.testing.assert_allclose(frechet_distance(m, c1, m, c2), np.trace(c1 + c2) - 2 * root, rtol=1e-9)


def test_frechet_distance_is_symmetric_zero_to_itself_and_fine_with_singular_covariances() -> None:
    rng = np.random.default_rng(3)
    few = feature_stats(rng.standard_normal((10, 64)))
    many = feature_stats(rng.standard_normal((500, 64)))
    assert np.linalg.matrix_rank(few[1]) == 9
    np.testing.assert_allclose(frechet_distance(*few, *many), frechet_distance(*many, *few), rtol=1e-10)
    assert 0 <= frechet_distance(*few, *few) < 1e-10
    assert frechet_distance(*few, *many) > 1


def test_feature_stats_are_mean_and_unbiased_covariance() -> None:
    features = np.random.default_rng(0).standard_normal((50, 5)) + 100
    mean, cov = feature_stats(features.astype(np.float32))
    np.testing.assert_allclose(mean, features.mean(0), rtol=1e-6)
    np.testing.assert_allclose(cov, np.cov(features, rowvar=False), atol=1e-4)


def test_frechet_distance_refuses_bad_input() -> None:
    with pytest.raises(RecipeError, match="at least 2"):
        feature_stats(np.zeros((1, 4)))
    with pytest.raises(ModelError, match="NaN"):
        feature_stats(np.full((3, 4), np.nan))
    with pytest.raises(RecipeError, match=r"\(D, D\)"):
        frechet_distance(np.zeros(3), np.eye(3), np.zeros(4), np.eye(4))


# --- excursions ---


def test_excursions_count_samples_beyond_the_margin() -> None:
    x = np.zeros((5, 1, 2, 2))
    x[1, 0, 0, 0] = 1.5  # on the margin: inside
    x[2, 0, 1, 1] = -1.51
    x[3] = 120.0
    found = excursions(x)
    assert (found.count, found.share, found.largest) == (2, 0.4, 120.0)
    assert excursions(x, margin=0.0).count == 3
    assert excursions(x, low=-2, high=2, margin=0.0).count == 1


def test_excursions_count_nan_and_infinity() -> None:
    x = np.zeros((2, 1, 2, 2))
    x[1, 0, 0, 0] = np.nan
    assert excursions(x) == excursions(np.nan_to_num(x, nan=np.inf)) and excursions(x).largest == np.inf
    with pytest.raises(RecipeError, match="0 samples"):
        excursions(x[:0])


def test_importing_the_metrics_and_plots_loads_nothing_heavy() -> None:
    code = (
        "import sys, ptqd_export.pictures, ptqd_export.evaluate.metrics, ptqd_export.evaluate.plots\n"
        "heavy = 'torch', 'scipy', 'skimage', 'matplotlib', 'onnx', 'onnxruntime', 'diffusers'\n"
        "print([m for m in heavy if m in sys.modules])"
    )
    assert (
        subprocess.run(
            [sys.executable, "-c", code], env=environment(), capture_output=True, text=True, check=True
        ).stdout.strip()
        == "[]"
    )
