"""Does a batch fit into memory: asked before any work."""

from __future__ import annotations

from pathlib import Path

import pytest
from cases import Case
from models import tiny_unet

from ptqd_export.calibrate import Network, collect
from ptqd_export.calibrate.memory import check_memory, largest_layer_bytes
from ptqd_export.core.memory import available_bytes, total_bytes
from ptqd_export.errors import RecipeError


def test_memory_estimate(case: Case, tmp_path: Path) -> None:
    recipe, network, sampling, *_ = case
    largest = largest_layer_bytes(network)
    assert largest >= 2 * 16 * 8 * 8 * 4  # at least a full-resolution layer's input and output
    double = Network(tiny_unet(sample_size=16).eval(), network.info, network.scheduler_config)
    assert largest_layer_bytes(double) == largest  # measured on the sample shape, not on the config
    assert 0 < available_bytes() <= total_bytes() < 1 << 50
    check_memory(network, 4, 2)
    size = 1 << 40
    huge = recipe.override(calibration={"size": size, "batch_size": size})
    with pytest.raises(
        RecipeError,
        match=r"batch_size 1099511627776 needs about [\d.]+ GiB .* GiB is free: set it to at most [1-9]\d*",
    ):
        collect(network, sampling, huge, tmp_path / "t")
    assert not (tmp_path / "t").exists()
    # Guidance doubles the batch.
    with pytest.raises(RecipeError) as guided:
        check_memory(network, size, 2)
    with pytest.raises(RecipeError) as plain:
        check_memory(network, size, 1)
    fits = [int(str(error.value).split()[-1]) for error in (guided, plain)]
    assert fits[1] == pytest.approx(2 * fits[0], rel=0.3)
