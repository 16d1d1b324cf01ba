"""Measure how much noise each layer makes at the network's output when it alone is quantized."""

from __future__ import annotations

import contextlib
import fnmatch
import json
from collections.abc import Collection, Sequence
from pathlib import Path
from typing import TextIO

import numpy as np

from ..core.backend import Emission
from ..core.bits import LayerSensitivity, to_measure
from ..core.precision import Precision
from ..core.sampling import Sampling
from ..core.sensitivity import step_groups
from ..progress import progress
from ..recipe import Recipe
from .network import Network
from .observe import Observed
from .quantize import quantize
from .simulate import SimulatedLayer, geometry_of
from .torch_engine import TorchEngine
from .trajectories import Trajectories

SENSITIVITY_SAMPLES = 4
SENSITIVITY_STEPS = 4


def sensitivity(
    network: Network,
    observed: Observed,
    sampling: Sampling,
    trajectories: Trajectories,
    precision: Precision,
    recipe: Recipe,
    layers: Collection[str],
    notes: Path,
) -> LayerSensitivity:
    """The sensitivity of `layers` to a mixed precision (`to_measure`), in the portable arithmetic.

    It is measured on SENSITIVITY_SAMPLES trajectories, at `steps_and_weights`.

    Args:
        notes: file of what is measured so far, which a stopped measurement leaves to the next one.
    Raises:
        ModelError: nothing is left to quantize.
    """
    networks = {
        level: quantize(network, observed, level, recipe).only(layers) for level in to_measure(precision)
    }
    first = networks[precision.base].layers
    steps, gains = steps_and_weights(sampling)
    _, x, e, conditions = trajectories.first(SENSITIVITY_SAMPLES)
    power = [float((e[step].astype(np.float64) ** 2).mean()) for step in steps]
    noise: dict[Precision, list[tuple[float, ...]]] = {level: [] for level in networks}
    known = _noted(notes, len(steps))
    with (
        notes.open("w", encoding="utf-8") as noting,
        TorchEngine(network.module, sampling) as engine,
        progress(
            len(first) * len(networks) * len(steps), f"noise of single layers at {precision}", "call"
        ) as bar,
    ):
        for key, held in known.items():
            _note(noting, *key, held)
        for name in first:
            target = network.module.get_submodule(name)
            for level, quantized in networks.items():
                if (done := known.get((name, str(level)))) is not None:
                    noise[level].append(tuple(done))
                    bar.update(len(steps))
                    continue
                target.forward = SimulatedLayer(
                    quantized.layers[name], Emission.PORTABLE, geometry_of(target)
                )
                try:
                    row = []
                    for step, of in zip(steps, power, strict=True):
                        d = sampling.predict(engine, x[step], step, conditions) - e[step]
                        row.append(float(f"{float((d**2).mean()) / max(of, 1e-30):.6g}"))
                        bar.update()
                finally:
                    del target.forward
                noise[level].append(tuple(row))
                _note(noting, name, str(level), row)
    return LayerSensitivity(
        tuple(first),
        tuple(layer.macs for layer in first.values()),
        steps,
        gains,
        {level: tuple(rows) for level, rows in noise.items()},
    )


def steps_and_weights(sampling: Sampling) -> tuple[tuple[int, ...], tuple[float, ...]]:
    """The middles of SENSITIVITY_STEPS groups of steps, and the sum of c^2 over each group."""
    groups = step_groups(len(sampling), SENSITIVITY_STEPS)
    gains = [float((sampling.schedule.epsilon_gains[group] ** 2).sum()) for group in groups]
    return (
        tuple((group[0] + group[-1]) // 2 for group in groups),
        tuple(float(f"{gain:.6g}") for gain in gains),
    )


def _note(file: TextIO, name: str, level: str, row: Sequence[float]) -> None:
    file.write(json.dumps([name, level, row]) + "\n")
    file.flush()


def _noted(notes: Path, steps: int) -> dict[tuple[str, str], list[float]]:
    """Noise at each step by layer and level; of a line that a kill has cut nothing is taken."""
    found = {}
    for line in notes.read_text("utf-8").split("\n")[:-1] if notes.exists() else ():
        with contextlib.suppress(ValueError, TypeError):
            name, level, row = json.loads(line)
            if len(row) == steps and all(isinstance(value, float) and value >= 0 for value in row):
                found[str(name), str(level)] = row
    return found


def given_layers(recipe: Recipe, layers: Collection[str]) -> dict[str, Precision]:
    """The precisions that quantization.layer_bits gives by hand; the last glob that matches counts."""
    found = {}
    for text in recipe.quantization.layer_bits:
        glob, _, precision = text.rpartition("=")
        found.update({n: Precision.parse(precision) for n in layers if fnmatch.fnmatchcase(n, glob)})
    return found
