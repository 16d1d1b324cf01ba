"""Builds whose weights are rounded on the quantized network: stopped half-way, the same command goes on."""

from __future__ import annotations

from pathlib import Path

import pytest
from chain import BLOCKS, chain_recipe

from ptqd_export.assemble import build
from ptqd_export.bundle.tables import QUANTIZATION
from ptqd_export.calibrate import reconstruct
from ptqd_export.recipe import Recipe


def recipe_at(folder: Path, rounding: str) -> Recipe:
    plan = {"rule": "fixed", "steps": ("w3a6",)}
    return chain_recipe(folder, rounding).override(quantization={"iterations": 10, "gate": False}, plan=plan)


def test_a_stopped_reconstruction_is_taken_up(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    recipe = recipe_at(tmp_path, "adaround")
    whole = build(recipe, tmp_path / "whole").file(QUANTIZATION).read_bytes()
    original, rounded = reconstruct._round_block, []

    def round_block(network, layers, block, examples, effort, tell):  # type: ignore[no-untyped-def]
        if len(rounded) == 1:
            rounded.append("stopped")
            raise KeyboardInterrupt
        rounded.append(block.name)
        return original(network, layers, block, examples, effort, tell)

    monkeypatch.setattr(reconstruct, "_round_block", round_block)
    with pytest.raises(KeyboardInterrupt):
        build(recipe, tmp_path / "stopped")
    (file,) = (tmp_path / "stopped.work" / "codes").iterdir()
    before = file.stat().st_mtime_ns
    assert build(recipe, tmp_path / "stopped").file(QUANTIZATION).read_bytes() == whole
    assert rounded == [BLOCKS[0], "stopped", *BLOCKS[1:]] and before > 0
    assert not (tmp_path / "stopped.work").exists()
    near = build(recipe_at(tmp_path, "nearest"), tmp_path / "near").file(QUANTIZATION).read_bytes()
    assert near != whole
