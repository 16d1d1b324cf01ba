"""What tests of calibration share: one small model, its trajectories and what was observed on them."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
from cases import Case, sampling_of
from models import recipe_of, save_pipeline

from ptqd_export.calibrate import collect, observe, open_model


@pytest.fixture(scope="session")
def pipeline(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_pipeline(tmp_path_factory.mktemp("pipeline") / "tiny")


@pytest.fixture
def copy(pipeline: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(pipeline, tmp_path / "tiny"))


@pytest.fixture(scope="session")
def case(pipeline: Path, tmp_path_factory: pytest.TempPathFactory) -> Case:
    """Nothing of it changes but what `observed` keeps of codes that it was asked for."""
    recipe = recipe_of(pipeline)
    network = open_model(recipe)
    sampling = sampling_of(network, recipe)
    trajectories = collect(network, sampling, recipe, tmp_path_factory.mktemp("trajectories") / "t")
    return Case(recipe, network, sampling, trajectories, observe(network, sampling, recipe, trajectories))
