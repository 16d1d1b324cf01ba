"""Measure the quantization noise of an engine on stored full-precision trajectories."""

from __future__ import annotations

from typing import Literal

import numpy as np

from ..core.engine import Engine
from ..core.noise import NoiseStats
from ..core.sampling import Sampling
from ..errors import ParityError
from ..progress import progress
from .trajectories import Trajectories

Subset = Literal["calibration", "held_out", "all"]


def measure(
    engine: Engine,
    sampling: Sampling,
    trajectories: Trajectories,
    subset: Subset = "all",
    what: str = "quantization noise",
) -> list[NoiseStats]:
    """Sums of e and D = eq - e per trajectory, in sample order (see core.noise; PTQD section 3.2).

    e is the stored, guided full-precision prediction; eq is the engine's prediction at the stored x_t, with
    the same guidance.

    Args:
        engine: any engine.
        what: title of the progress bar.
    Raises:
        ParityError: the engine returns NaN or infinite values; names the step.
    """
    parts = {
        "calibration": trajectories.calibration,
        "held_out": trajectories.held_out,
        "all": range(trajectories.n),
    }
    wanted = parts[subset]
    n_steps = len(sampling)
    found: list[NoiseStats] = []
    with progress(len(wanted) * n_steps, what, "step") as bar:
        for indices, x, e, conditions in trajectories:
            if indices.start not in wanted:
                continue
            sums = [NoiseStats.zeros(n_steps, sampling.model.channels) for _ in indices]
            for step in range(n_steps):
                with np.errstate(invalid="ignore", over="ignore"):  # the error below replaces the warning
                    eq = sampling.predict(engine, x[step], step, conditions)
                if not np.isfinite(eq).all():
                    raise ParityError(
                        f"the engine returns NaN or infinite values at step {step} (timestep "
                        f"{sampling.schedule.timesteps[step]}) of samples "
                        f"{indices.start} to {indices.stop - 1}: it does not compute what it was built to "
                        "compute"
                    )
                for i in range(len(indices)):
                    sums[i] += NoiseStats.of_step(step, n_steps, e[step, i : i + 1], eq[i : i + 1])
                bar.update(len(indices))
            found += sums
    return found
