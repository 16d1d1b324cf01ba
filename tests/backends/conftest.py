"""A small graph that ONNX Runtime runs."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from onnx_text import save_text

from ptqd_export.core.engine import Feeds


@pytest.fixture
def affine(tmp_path: Path) -> Path:
    """epsilon = 2 sample + timestep, over (B, 2)."""
    return save_text(
        tmp_path / "affine.onnx",
        """g (float[B, 2] sample, int64[B] timestep) => (float[B, 2] epsilon, float[B, 2] doubled) {
            axis = Constant<value = int64[1] {1}>()
            t = Cast<to = 1>(timestep)
            column = Unsqueeze(t, axis)
            doubled = Add(sample, sample)
            epsilon = Add(doubled, column)
        }""",
    )


@pytest.fixture
def feeds() -> Feeds:
    return {"sample": np.arange(6, dtype=np.float32).reshape(3, 2), "timestep": np.array([10, 20, 30])}
