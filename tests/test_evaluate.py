"""evaluate/, images.py, and the classifier behind the Frechet distance of the reference model."""

from __future__ import annotations

import importlib.util
import json
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import numpy as np
import numpy.typing as npt
import pytest
from PIL import Image

from ptqd_export.errors import ModelError, PTQDError, RecipeError
from ptqd_export.evaluate.metrics import excursions, feature_stats, frechet_distance, psnr, ssim
from ptqd_export.evaluate.plots import plot_pareto, plot_steps
from ptqd_export.images import image_grid, save_images, save_png, to_uint8, write_atomic

FASHION = Path(__file__).parents[1] / "calib" / "fashion_mnist"
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
    np.testing.assert_allclose(psnr(a, b, data_range=0.5), 10 * np.log10(0.25 / np.array([0.04, 0.0004])), atol=1e-12)


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


# --- images ---


def test_to_uint8_inverts_the_training_scale_and_clamps() -> None:
    codes = np.arange(256, dtype=np.uint8)
    assert (to_uint8(codes.astype(np.float32) / 127.5 - 1) == codes).all()
    assert to_uint8(np.array([-np.inf, -3.0, 0.0, 7.0, np.inf])).tolist() == [0, 0, 128, 255, 255]


def test_nan_is_refused_with_its_sample() -> None:
    x = samples(3)
    x[2, 0, 3, 3] = np.nan
    with pytest.raises(ModelError, match="sample 2 holds NaN"):
        image_grid(x, 2)


@pytest.mark.parametrize("channels", [1, 3])
def test_image_grid_puts_samples_row_by_row(channels: int) -> None:
    x = samples(5, channels, size=4)
    grid = image_grid(x, columns=3, gap=1)
    assert grid.dtype == np.uint8 and grid.shape == ((9, 14) if channels == 1 else (9, 14, 3))
    pixels = to_uint8(x)
    fourth = pixels[3, 0] if channels == 1 else np.moveaxis(pixels[3], 0, -1)
    assert (grid[5:9, 0:4] == fourth).all()
    assert not grid[4].any() and not grid[5:, 10:].any()
    assert image_grid(x, columns=9).shape[:2] == (4, 20)


def test_grid_refuses_what_is_no_picture() -> None:
    with pytest.raises(RecipeError, match=r"\(1, 4, 8, 8\) are no pictures"):
        image_grid(samples(1, 4, 8), 1)
    with pytest.raises(RecipeError, match="0 columns"):
        image_grid(samples(1), 0)


def test_saved_images_read_back_and_repeat_byte_for_byte(tmp_path: Path) -> None:
    for channels in (1, 3):
        x = samples(3, channels)
        paths = save_images(tmp_path / "a", x, start=7)
        assert [p.name for p in paths] == ["00007.png", "00008.png", "00009.png"]
        with Image.open(paths[1]) as picture:
            read = np.asarray(picture)
        assert (read == np.moveaxis(to_uint8(x), 1, -1)[1].squeeze()).all()
        again = save_images(tmp_path / "b", x, start=7)
        assert [p.read_bytes() for p in paths] == [p.read_bytes() for p in again]
        assert b"tIME" not in paths[0].read_bytes()


def test_a_failed_write_leaves_the_old_file_and_no_rest(tmp_path: Path) -> None:
    with pytest.raises(PTQDError, match="cannot write"):
        save_png(np.zeros((2, 2), np.uint8), tmp_path / "missing" / "x.png")
    (tmp_path / "file").write_bytes(b"old")
    with pytest.raises(PTQDError, match="cannot write to the folder"):
        save_images(tmp_path / "file" / "below", samples(1))
    (tmp_path / "folder").mkdir()
    with pytest.raises(PTQDError, match="cannot write"):
        write_atomic(tmp_path / "folder", b"new")
    assert sorted(p.name for p in tmp_path.iterdir()) == ["file", "folder"]


# --- plots ---


def per_step(n: int) -> dict[str, dict[str, F64]]:
    rng = np.random.default_rng(0)
    return {
        "w4a8": {"snr": rng.uniform(1, 1e3, n), "k": rng.normal(0, 0.1, n), "bias": rng.normal(0, 0.1, (n, 3)), "sigma": rng.uniform(0, 1, n)},
        "w8a8": {"snr": np.full(n, np.inf), "k": np.zeros(n), "bias": np.zeros(n)},
    }


@pytest.mark.parametrize("n", [1, 20])
def test_plot_steps_writes_a_png_twice_the_same(tmp_path: Path, n: int) -> None:
    plan = ["w4a8"] * (n // 2) + ["fp32"] * (n - n // 2)
    for name in ("a.png", "b.png"):
        plot_steps(tmp_path / name, per_step(n), plan, snr_forward=np.geomspace(1e-4, 1e4, n), sigmas=np.zeros(n), title="steps")
    assert (tmp_path / "a.png").read_bytes() == (tmp_path / "b.png").read_bytes()
    with Image.open(tmp_path / "a.png") as picture:
        assert picture.format == "PNG" and min(picture.size) > 500 and not picture.info.keys() & {"Software", "Creation Time"}


def test_plot_steps_shows_the_plan_and_the_figures(tmp_path: Path) -> None:
    def draw(name: str, plan: list[str], rows: dict[str, dict[str, F64]]) -> bytes:
        plot_steps(tmp_path / name, rows, plan, snr_forward=np.ones(4), sigmas=np.ones(4))
        return (tmp_path / name).read_bytes()

    base = draw("a.png", ["w4a8", "w4a8", "w8a8", "w8a8"], per_step(4))
    assert draw("b.png", ["w4a8", "w8a8", "w8a8", "w8a8"], per_step(4)) != base
    for key in ("snr", "k", "bias", "sigma"):
        changed = per_step(4)
        changed["w4a8"][key] = changed["w4a8"][key] * 2
        assert draw("c.png", ["w4a8", "w4a8", "w8a8", "w8a8"], changed) != base, key


def test_plots_refuse_what_they_cannot_draw(tmp_path: Path) -> None:
    with pytest.raises(RecipeError, match=r"snr of w4a8 has 3 steps: expected 4"):
        plot_steps(tmp_path / "x.png", per_step(3), ["w4a8"] * 4, snr_forward=np.ones(4), sigmas=np.ones(4))
    with pytest.raises(RecipeError, match=r"ends in \.png"):
        plot_pareto(tmp_path / "x.svg", [(1.0, 1.0)], None)
    with pytest.raises(RecipeError, match="empty"):
        plot_pareto(tmp_path / "x.png", [], None)
    assert not list(tmp_path.iterdir())


def test_plot_pareto_marks_the_chosen_plan(tmp_path: Path) -> None:
    front = [(1.0, 3.0), (2.0, 1.0), (3.0, 0.0)]
    pictures = set()
    for i, chosen in enumerate([None, front[0], front[1]]):
        path = tmp_path / f"{i}.png"
        plot_pareto(path, front, chosen, uniform={"w4a8": (1.0, 3.0)}, cost_label="TBOPs")
        pictures.add(path.read_bytes())
    assert len(pictures) == 3


def test_importing_the_metrics_and_plots_loads_nothing_heavy() -> None:
    code = (
        "import sys, ptqd_export.images, ptqd_export.evaluate.metrics, ptqd_export.evaluate.plots\n"
        "print([m for m in ('torch', 'scipy', 'matplotlib', 'onnx', 'onnxruntime', 'diffusers') if m in sys.modules])"
    )
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.strip() == "[]"


# --- the reference model's classifier ---


def load_module(path: Path) -> ModuleType:
    spec = importlib.util.spec_from_file_location(f"fashion_mnist_{path.stem}", path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_classifier_knows_the_test_images_and_sees_when_they_are_spoilt() -> None:
    data = load_module(FASHION / "data.py")
    if not data.DEBIAN_PATH.is_dir():
        pytest.skip("the Debian package dataset-fashion-mnist is not installed")
    classifier = load_module(FASHION / "classifier.py")
    figures = json.loads((FASHION / "classifier.json").read_text())
    assert figures["test_accuracy"] >= 0.91
    images, labels = data.load(split="t10k")
    # A share of the 10,000 keeps this quick; its accuracy has a standard error of 0.6 %.
    x = (images[:2000].astype(np.float32) / 127.5 - 1)[:, None]
    extract = classifier.load_features(FASHION)
    features = extract(x)
    assert features.shape == (2000, 64) and features.dtype == np.float64
    assert abs((extract.classes(features) == labels[:2000]).mean() - figures["test_accuracy"]) < 0.02
    reference = classifier.load_reference(FASHION)
    clean = frechet_distance(*feature_stats(features), *reference)
    noisy = np.clip(x + 0.2 * np.random.default_rng(0).standard_normal(x.shape), -1, 1)
    spoilt = frechet_distance(*feature_stats(extract(noisy)), *reference)
    assert clean < 1.0 and spoilt > 5 * clean
    with pytest.raises(ValueError, match=r"\(N, 1, 32, 32\)"):
        extract(x[:, 0])
