"""The ways to choose weight codes that look at the quantized network, not at one layer alone."""

from __future__ import annotations

import dataclasses
from pathlib import Path

from ..core.quant import QuantizedNetwork
from ..core.sampling import Sampling
from ..recipe import Recipe
from .kept import KeptCodes
from .network import Network
from .reconstruct import Effort, reconstruct
from .sequential import round_in_stages
from .trajectories import Trajectories


def refine(
    network: Network,
    sampling: Sampling,
    start: QuantizedNetwork,
    trajectories: Trajectories,
    recipe: Recipe,
    folder: Path,
    key: str,
) -> QuantizedNetwork:
    """`start`, rounded again where the recipe asks for rounding "gptq-sequential" or "adaround".

    Args:
        start: layers of `network` at one precision, as `quantize` made them.
        folder: of intermediate results, from which those of a stopped build are reused.
        key: of everything before `start` that decides the trajectories.
    Raises:
        OSError: the folder cannot be written.
    """
    spec = recipe.quantization
    if start.precision.is_float or start.precision.number == "fp8":
        return start
    if spec.rounding == "adaround":
        effort = Effort(spec.iterations, seed=recipe.calibration.seed)
        return reconstruct(network, sampling, start, trajectories, folder, key, effort)
    if spec.rounding != "gptq-sequential":
        return start
    kept = KeptCodes(folder, start, key, spec.rounding)
    codes = kept.read("all", start.layers)
    if codes is None:
        done = round_in_stages(network, sampling, start, trajectories)
        codes = {name: layer.weight.view("int8") for name, layer in done.layers.items()}
        kept.write("all", codes)
    return dataclasses.replace(
        start, layers={n: dataclasses.replace(layer, weight=codes[n]) for n, layer in start.layers.items()}
    )
