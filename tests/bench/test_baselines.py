"""Other tools run the same network on the same numbers."""

from __future__ import annotations

import importlib.util
from pathlib import Path

import numpy as np
import pytest
from helpers import Built

from ptqd_export.backends import OrtEngine
from ptqd_export.bench import BASELINES, make_baselines
from ptqd_export.bench.baselines import EXPORTED, OPENVINO, STATIC
from ptqd_export.bench.subject import Place, Subject, feeds_of
from ptqd_export.calibrate.eager import eager_call
from ptqd_export.errors import BundleError
from ptqd_export.recipe import Recipe

TORCH = "PyTorch eager"


@pytest.fixture(scope="module")
def made(rgb: Built, tmp_path_factory: pytest.TempPathFactory) -> tuple[dict[str, Subject], list[str]]:
    said: list[str] = []
    wanted = (EXPORTED, STATIC, *OPENVINO, TORCH)
    found = make_baselines(rgb.bundle, rgb.recipe, tmp_path_factory.mktemp("baselines"), wanted, said.append)
    return {one.name: one for one in found}, said


def test_they_compute_the_same(made: tuple[dict[str, Subject], list[str]], rgb: Built) -> None:
    found, _ = made
    feeds = feeds_of(rgb.bundle, 2)
    expected = eager_call(Recipe.load(rgb.recipe), feeds, 1)().numpy()
    half = eager_call(Recipe.load(rgb.recipe), feeds, 1, half=True)().float().numpy()
    results = {"half": half}
    for name in (EXPORTED, STATIC):
        file = found[name].file
        assert file is not None
        with OrtEngine(file, exact=False) as engine:
            (results[name],) = engine({key: feeds[key] for key in engine.inputs}).values()
    power = float(np.mean(expected**2))
    noise = {name: float(np.mean((got - expected) ** 2)) / power for name, got in results.items()}
    assert noise[EXPORTED] < 1e-8 < noise["half"] < 1e-2 and 1e-6 < noise[STATIC] < 1


def test_what_is_not_installed_is_told(made: tuple[dict[str, Subject], list[str]]) -> None:
    found, said = made
    there = importlib.util.find_spec("openvino") is not None
    assert [*found] == [n for n in BASELINES if n in (EXPORTED, STATIC, TORCH) or (there and n in OPENVINO)]
    assert there or said == [
        f"{n} is left out: openvino is not installed: pip install openvino" for n in OPENVINO
    ]


def test_another_model_is_refused(rgb: Built, own: Built, tmp_path: Path) -> None:
    """Before anything is exported."""
    with pytest.raises(
        BundleError, match=r"is not the model that .* was built from: its weights have another"
    ):
        make_baselines(rgb.bundle, own.recipe, tmp_path, BASELINES, print)
    assert not list(tmp_path.iterdir())


def test_rows_are_alone(rgb: Built) -> None:
    """Rows of a call, whatever the guidance."""
    place = Place(rgb.path, 3, 1)
    feeds = feeds_of(rgb.bundle, place.batch)
    assert feeds["sample"].shape[0] == 3
