"""What all tests share: seeded numbers and small values of the core."""

from __future__ import annotations

import os

# Before numpy and torch are loaded: small tests gain nothing from more threads.
os.environ.setdefault("OMP_NUM_THREADS", "2")

import numpy as np
import pytest

from ptqd_export.conditioning import ModelInfo
from ptqd_export.recipe import InputSpec
from ptqd_export.schedule import NoiseSchedule


@pytest.fixture
def rng() -> np.random.Generator:
    return np.random.default_rng(20231210)


@pytest.fixture
def schedule() -> NoiseSchedule:
    """Ten steps of the linear schedule, eta 1."""
    return NoiseSchedule.from_config({"clip_sample": False}, 10, 1.0)


@pytest.fixture
def class_info() -> ModelInfo:
    """A model of 1x4x4 samples with classes 0 to 2 and the null class 3."""
    return ModelInfo("toy", (1, 4, 4), (InputSpec("class_labels", num_classes=4, null_class=3),), "0" * 64)
