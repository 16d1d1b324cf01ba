"""A chain of small blocks, quantized: quick to reconstruct."""

from __future__ import annotations

from pathlib import Path

from cases import Case, sampling_of
from models import own_model

from ptqd_export.calibrate import collect, observe, open_model, quantize
from ptqd_export.core.precision import Precision
from ptqd_export.core.quant import QuantizedNetwork
from ptqd_export.recipe import Recipe

INIT = """
torch.manual_seed(0)
self.first = nn.Conv2d(1, 8, 3, padding=1)
makers = [lambda: nn.Conv2d(8, 12, 3, padding=1), nn.SiLU, lambda: nn.Conv2d(12, 8, 1)]
self.blocks = nn.ModuleList([nn.Sequential(*(make() for make in makers)) for _ in range(2)])
self.mix = nn.Conv2d(8, 8, 1)
self.last = nn.Conv2d(8, 1, 3, padding=1)
"""
RETURNS = "self.last(self.mix(self.blocks[1](self.blocks[0](self.first(sample)))))"
BLOCKS = ("blocks.0", "blocks.1", "mix")


def chain_recipe(folder: Path, rounding: str) -> Recipe:
    quantization = {"precisions": ["w3a6"], "rounding": rounding, "iterations": 60}
    sampler, calibration = {"n_steps": 3, "eta": 0.0}, {"size": 4, "held_out": 2, "batch_size": 3}
    return own_model(
        folder, [1, 6, 6], INIT, RETURNS, quantization=quantization, sampler=sampler, calibration=calibration
    )


def chain(folder: Path, rounding: str = "nearest", precision: str = "w3a6") -> tuple[Case, QuantizedNetwork]:
    """The chain as a case, and as `quantize` made it."""
    recipe = chain_recipe(folder, rounding)
    network = open_model(recipe)
    sampling = sampling_of(network, recipe)
    trajectories = collect(network, sampling, recipe, folder / "trajectories")
    observed = observe(network, sampling, recipe, trajectories)
    case = Case(recipe, network, sampling, trajectories, observed)
    return case, quantize(network, observed, Precision.parse(precision), recipe)
