"""Plots: what they show, the same bytes twice, and what they refuse."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import numpy.typing as npt
import pytest
from PIL import Image

from ptqd_export.errors import RecipeError
from ptqd_export.evaluate.plots import plot_evaluation, plot_layers, plot_pareto, plot_steps

F64 = npt.NDArray[np.float64]


def per_step(n: int) -> dict[str, dict[str, F64]]:
    rng = np.random.default_rng(0)
    return {
        "w4a8": {
            "snr": rng.uniform(1, 1e3, n),
            "k": rng.normal(0, 0.1, n),
            "bias": rng.normal(0, 0.1, (n, 3)),
            "sigma": rng.uniform(0, 1, n),
        },
        "w8a8": {"snr": np.full(n, np.inf), "k": np.zeros(n), "bias": np.zeros(n)},
    }


@pytest.mark.parametrize("n", [1, 20])
def test_plot_steps_writes_a_png_twice_the_same(tmp_path: Path, n: int) -> None:
    plan = ["w4a8"] * (n // 2) + ["fp32"] * (n - n // 2)
    for name in ("a.png", "b.png"):
        plot_steps(
            tmp_path / name,
            per_step(n),
            plan,
            snr_forward=np.geomspace(1e-4, 1e4, n),
            sigmas=np.zeros(n),
            title="steps",
        )
    assert (tmp_path / "a.png").read_bytes() == (tmp_path / "b.png").read_bytes()
    with Image.open(tmp_path / "a.png") as picture:
        assert (
            picture.format == "PNG"
            and min(picture.size) > 500
            and not picture.info.keys() & {"Software", "Creation Time"}
        )


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


def test_plot_of_an_evaluation(tmp_path: Path) -> None:
    """With the guidance gap and without; the same data gives the same bytes."""
    psnr = {"w8a8*3": np.array([40.0, 38.0, 41.0]), "w4a4*3": np.array([20.0, 22.0, 21.0])}
    for name, gaps in (("a", {}), ("b", {"w8a8*3": (1.0, 1.1, 0.9)}), ("c", {"w8a8*3": (1.0, 1.1, 0.9)})):
        plot_evaluation(tmp_path / f"{name}.png", psnr, gaps, title="t")
    a, b, c = ((tmp_path / f"{name}.png").read_bytes() for name in "abc")
    assert a != b == c and a.startswith(b"\x89PNG")
    with pytest.raises(RecipeError, match="png"):
        plot_evaluation(tmp_path / "x.jpg", psnr, {})


def test_a_map_of_layers_is_white_where_there_is_no_noise(tmp_path: Path) -> None:
    """Its rows are in the order of the labels, from the top."""

    def draw(name: str, noise: F64) -> npt.NDArray[np.uint8]:
        plot_layers(tmp_path / name, ["first", "second"], [0, 7], noise, label="noise", title="a $ b $")
        with Image.open(tmp_path / name) as picture:
            assert picture.format == "PNG"
            return np.asarray(picture.convert("RGB"))

    full, again = (draw(name, np.array([[1e-3, 1e-6], [1e-9, 1e-1]])) for name in ("a.png", "b.png"))
    assert (full == again).all()
    holed = draw("c.png", np.array([[0.0, 1e-6], [1e-9, 1e-1]]))
    rows, columns = np.nonzero((full != holed).any(2))
    assert (holed[rows, columns] == 255).mean() > 0.9
    assert rows.max() < full.shape[0] / 2 and columns.max() < full.shape[1] / 2
    draw("d.png", np.zeros((2, 2)))
    with pytest.raises(RecipeError, match="expected a row for each of 2 layers"):
        draw("e.png", np.ones((3, 2)))
    assert not (tmp_path / "e.png").exists()
