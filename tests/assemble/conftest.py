"""Every test here has a user's cache folder of its own: timings and kernels in it would be others'."""

from __future__ import annotations

from pathlib import Path

import pytest


@pytest.fixture(autouse=True)
def own_caches(caches: Path) -> Path:
    return caches
