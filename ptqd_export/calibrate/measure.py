"""Measure the quantization noise of an engine on stored full-precision trajectories."""

from __future__ import annotations

from typing import Literal

import numpy as np

from ..conditioning import ModelInfo
from ..engine import Engine
from ..errors import ParityError
from ..noise import NoiseStats
from ..progress import progress
from ..sampler import predict_epsilon
from ..schedule import NoiseSchedule
from .trajectories import Trajectories

Subset = Literal["calibration", "held_out", "all"]


def measure(
    engine: Engine,
    info: ModelInfo,
    schedule: NoiseSchedule,
    trajectories: Trajectories,
    guidance_scale: float,
    subset: Subset = "all",
    what: str = "quantization noise",
) -> list[NoiseStats]:
    """Sums of e and D = eq - e per trajectory, in order of the samples (science of it: noise.py; PTQD section 3.2).

    e is the stored guided full-precision prediction, eq the engine's, guided alike, at the stored x_t.

    Args:
        engine: any engine with raw (uncorrected) outputs.
        what: title of the progress bar.
    Raises:
        ParityError: the engine returns NaN or infinite values; names the step.
    """
    parts = {"calibration": trajectories.calibration, "held_out": trajectories.held_out, "all": range(trajectories.n)}
    wanted = parts[subset]
    n_steps = len(schedule)
    found: list[NoiseStats] = []
    with progress(len(wanted) * n_steps, what, "step") as bar:
        for indices, x, e, conditions in trajectories:
            if indices.start not in wanted:
                continue
            sums = [NoiseStats.zeros(n_steps, info.channels) for _ in indices]
            for step in range(n_steps):
                with np.errstate(invalid="ignore", over="ignore"):  # said in a sentence below
                    eq = predict_epsilon(engine, x[step], step, schedule, info, conditions, guidance_scale)
                if not np.isfinite(eq).all():
                    raise ParityError(
                        f"the engine returns NaN or infinite values at step {step} (timestep {schedule.timesteps[step]}) of samples "
                        f"{indices.start} to {indices.stop - 1}: it does not compute what it was built to compute"
                    )
                for i in range(len(indices)):
                    sums[i] += NoiseStats.of_step(step, n_steps, e[step, i : i + 1], eq[i : i + 1])
                bar.update(len(indices))
            found += sums
    return found
