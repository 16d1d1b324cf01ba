"""What build --dry-run says."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
import torch
from cases import sampling_of
from models import recipe_of, save_pipeline
from safetensors.torch import load_file, save_file

from ptqd_export.assemble import estimate
from ptqd_export.assemble.forecast import count_evaluations
from ptqd_export.calibrate.intake import open_source
from ptqd_export.calibrate.observe import outline
from ptqd_export.calibrate.quantize import layer_precisions
from ptqd_export.core.precision import HALF_BITS, Precision
from ptqd_export.errors import ModelError, PTQDError, RecipeError
from ptqd_export.recipe import Recipe


@pytest.fixture(scope="module")
def recipe(tmp_path_factory: pytest.TempPathFactory) -> Recipe:
    """An 8x8 UNet with attention and classes, guidance 2, four steps."""
    folder = save_pipeline(tmp_path_factory.mktemp("estimate") / "tiny")
    return recipe_of(folder, quantization={"precisions": ("fp32", "w8a8", "w4a8")})


def test_evaluations_are_those_of_a_build(recipe: Recipe) -> None:
    """Counted by hand: guidance doubles all."""
    network = open_source(recipe, weights=False).network
    sampling = sampling_of(network, recipe)
    given = {p: layer_precisions(network, outline(network), p, recipe) for p in recipe.precisions}
    noisy = sum(not p.is_float for p in given)
    counts = count_evaluations(recipe, sampling, given)
    steps, size, held_out = len(sampling), recipe.calibration.size, recipe.calibration.held_out
    assert counts["measuring"] == 2 * noisy * 2 * (size + held_out) * steps
    # Trajectories, observation at every step, and a quarter of it for smoothing.
    assert counts["calibration"] == 2 * ((size + held_out) * steps + size * steps + size * steps // 4)
    own = recipe.override(calibration={"trajectory": "own"})
    more = count_evaluations(own, sampling, given)["measuring"] - counts["measuring"]
    assert more == 2 * noisy * 2 * size * steps
    uniform = recipe.override(plan={"sensitivity": "uniform"})
    assert count_evaluations(uniform, sampling, given)["plan"] < counts["plan"]


def test_what_the_estimate_grows_with(recipe: Recipe, tmp_path: Path) -> None:

    def of(*precisions: str, **sections: dict[str, object]) -> dict[str, int]:
        given = {"quantization": {"precisions": precisions}, **sections}
        said = estimate(recipe.override(**given), tmp_path / "none")
        return dict(said.bundle_bytes) | {f"memory of {k}": v for k, v in said.memory_bytes.items()}

    w8, both, shared = of("w8a8"), of("w8a8", "w4a8"), of("w4a8", "w4a4")
    assert both["codes"] == 2 * w8["codes"] == 2 * shared["codes"]
    assert of("w4a16")["codes"] == pytest.approx(w8["codes"] / 2, abs=50)  # packed
    assert of("w8a8", "fp32")["float32 weights"] > w8["float32 weights"]
    assert w8["memory of Hessians"] == 0 < both["memory of Hessians"]
    assert of("w4a8", calibration={"batch_size": 1})["memory of activations"] < both["memory of activations"]


def test_a_mixed_precision_is_bounded_by_its_budget(recipe: Recipe, tmp_path: Path) -> None:
    quantization = {"precisions": ("w4a4", "w4a4+"), "layer_budget": 1.5}
    plain, mixed = estimate(recipe.override(quantization=quantization), tmp_path / "b").precisions
    assert mixed.open and not plain.open and mixed.layers == plain.layers
    assert plain.bops < mixed.bops < 1.5 * plain.bops
    given = quantization | {"layer_bits": ("*=w8a8",)}
    _, decided = estimate(recipe.override(quantization=given), tmp_path / "b").precisions
    assert not decided.open and set(decided.layers) == {"float", "w8a8"}
    given = quantization | {"layer_bits": ("*=w3a4",)}
    plain, decided = estimate(recipe.override(quantization=given), tmp_path / "b").precisions
    assert not decided.open and decided.bops < plain.bops


def test_float_layers_are_bounded_by_their_time(recipe: Recipe, tmp_path: Path) -> None:
    """A quarter of the multiply-accumulates in float, three times as slow, are half as much time again."""
    quantization = {"precisions": ("w8a8", "w8a8+"), "layer_budget": 1.5}
    plain, mixed = estimate(recipe.override(quantization=quantization), tmp_path / "b").precisions
    inside = (mixed.bops - plain.bops) / (32 * 32 - 8 * 8) * 4
    assert mixed.open and mixed.half_bops - plain.half_bops == pytest.approx(
        inside / 4 * (16 * 16 - 8 * 8), abs=2
    )
    assert plain.bops > inside * 8 * 8  # edge layers and products are float in both


def test_wrong_inputs_are_refused_as_in_a_build(recipe: Recipe, tmp_path: Path) -> None:
    fixed = {"rule": "fixed", "steps": ("w8a8*2",)}
    cases: list[tuple[dict[str, dict[str, object]], type[PTQDError], str]] = [
        ({"plan": fixed}, RecipeError, "steps"),
        ({"quantization": {"skip": ("*",)}}, ModelError, "no layer left to quantize"),
        ({"model": {"source": "nowhere"}}, ModelError, "does not exist"),
        ({"model": {"null_class": None}}, RecipeError, "null"),
    ]
    for sections, kind, message in cases:
        with pytest.raises(kind, match=message):
            estimate(recipe.override(**sections), tmp_path / "none")
    (tmp_path / "mine").write_text("a file of the user's")
    with pytest.raises(PTQDError, match="mine"):
        estimate(recipe, tmp_path / "mine")


def test_weights_that_do_not_fit_are_refused_by_their_headers(recipe: Recipe, tmp_path: Path) -> None:
    folder = tmp_path / "model"
    shutil.copytree(recipe.folder, folder)
    (file,) = folder.glob("unet/*.safetensors")
    state = load_file(file)
    first = min(state)
    for change, message in (
        ({first: torch.zeros(3)}, "has shape"),
        ({"odd": torch.zeros(3)}, "beyond the config"),
    ):
        save_file({**state, **change}, file)
        with pytest.raises(ModelError, match=message):
            estimate(Recipe.load(folder), tmp_path / "none")
    file.write_bytes(file.read_bytes()[:-8])
    with pytest.raises(ModelError, match="damaged"):
        estimate(Recipe.load(folder), tmp_path / "none")


def test_half_bits_count_sixteen(recipe: Recipe, tmp_path: Path) -> None:
    floats = recipe.override(quantization={"precisions": ("fp32", "fp16")})
    whole, half = estimate(floats, tmp_path / "none").precisions
    assert (whole.precision, half.precision) == (Precision.parse("fp32"), Precision.parse("fp16"))
    assert whole.half_bops == half.bops == half.half_bops == whole.bops // 4
    assert half.bops % HALF_BITS**2 == 0
