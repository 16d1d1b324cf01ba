"""Does a batch fit into memory: asked before any work."""

from __future__ import annotations

from pathlib import Path

import pytest
from cases import Case
from models import tiny_unet

from ptqd_export.calibrate import Network, collect
from ptqd_export.calibrate.memory import check_memory, largest_layer_bytes
from ptqd_export.core import memory
from ptqd_export.core.memory import available_bytes, total_bytes
from ptqd_export.errors import RecipeError


@pytest.mark.parametrize(
    ("names", "limit", "total", "free"),
    [
        (("", "memory.max", "memory.current", "inactive_file"), "5000000", 5_000_000, 4_500_000),
        (("", "memory.max", "memory.current", "inactive_file"), "max", 2_048_000, 1_024_000),
        (
            ("memory", "memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file"),
            "1000000",
            1_000_000,
            500_000,
        ),
    ],
)
def test_memory_of_a_control_group(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    names: tuple[str, str, str, str],
    limit: str,
    total: int,
    free: int,
) -> None:
    """Of either version: its limit counts where the machine has more, less what is used but page cache."""
    folder, most, used, inactive = names
    (tmp_path / folder).mkdir(exist_ok=True)
    for file, text in ((most, limit), (used, "700000"), ("memory.stat", f"anon 1\n{inactive} 200000\n")):
        (tmp_path / folder / file).write_text(text)
    kilobytes = (8000, 7000) if limit == "5000000" else (2000, 1000)
    told = "MemTotal: {} kB\nMemAvailable: {} kB\n".format(*kilobytes)
    (tmp_path / "meminfo").write_text(told)
    monkeypatch.setattr(memory, "_MEMINFO", tmp_path / "meminfo")
    there = [
        group._replace(folder=tmp_path / of) for group, of in zip(memory._GROUPS, ("", "memory"), strict=True)
    ]
    monkeypatch.setattr(memory, "_GROUPS", there)
    assert (memory.total_bytes(), memory.available_bytes()) == (total, free)


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
