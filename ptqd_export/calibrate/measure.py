"""Measure the quantization noise of an engine, on stored full-precision trajectories or on its own."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Literal

import numpy as np
import numpy.typing as npt

from ..core.engine import Array, Engine
from ..core.noise import Correction, NoiseStats
from ..core.sampling import NoiseSource, Sampling
from ..errors import ParityError
from ..progress import progress
from .trajectories import CALIBRATION_STREAM, Batch, Trajectories

Subset = Literal["calibration", "held_out", "all"]
ATTENTION = 1 << 30
"""Most bytes of attention between all positions in one call: 8 heads, float32, kept whole, as in graphs that
run as they are written. Where a batch would take more, its samples are computed in smaller ones."""


def measure(
    engine: Engine,
    sampling: Sampling,
    trajectories: Trajectories,
    subset: Subset = "all",
    what: str = "quantization noise",
    steps: Sequence[int] | None = None,
) -> list[NoiseStats]:
    """Sums of e and D = eq - e per trajectory, in sample order (see core.noise; PTQD section 3.2).

    e is the stored, guided full-precision prediction; eq is the engine's prediction at the stored x_t, with
    the same guidance.

    Args:
        engine: any engine.
        what: title of the progress bar.
        steps: those to measure, the others' sums being zero; None for all.
    Raises:
        ParityError: the engine returns NaN or infinite values; names the step.
    """
    parts: dict[Subset, range] = {
        "calibration": trajectories.calibration,
        "held_out": trajectories.held_out,
        "all": range(trajectories.n),
    }
    wanted = parts[subset]
    found: list[NoiseStats] = []
    steps = range(len(sampling)) if steps is None else steps
    with progress(len(wanted) * len(steps), what, "step") as bar:
        for batch in trajectories:
            if batch.indices.start in wanted:
                found += sums_of(engine, sampling, batch, bar.update, steps)
    return found


def sums_of(
    engine: Engine,
    sampling: Sampling,
    batch: Batch,
    advance: Callable[[int], object] = lambda n: None,
    steps: Sequence[int] | None = None,
) -> list[NoiseStats]:
    """The sums of `measure` for each trajectory of a batch.

    Args:
        advance: called with the number of trajectories at each step.
        steps: those to measure; None for all.
    Raises:
        ParityError: as `measure`.
    """
    indices, x, e, conditions = batch
    n_steps = len(sampling)
    sums = [NoiseStats.zeros(n_steps, sampling.model.channels) for _ in indices]
    for step in range(n_steps) if steps is None else steps:
        eq = _predict(engine, sampling, x[step], step, indices, conditions)
        for i in range(len(indices)):
            sums[i] += NoiseStats.of_step(step, n_steps, e[step, i : i + 1], eq[i : i + 1])
        advance(len(indices))
    return sums


def measure_own(
    engine: Engine,
    reference: Engine,
    sampling: Sampling,
    trajectories: Trajectories,
    seed: int,
    correct: Callable[[Sequence[NoiseStats]], Correction],
    recalibrate: bool = False,
    what: str = "noise on own trajectory",
) -> list[NoiseStats]:
    """Sums of e and D = eq - e per calibration trajectory, at the states that the engine itself visits.

    All trajectories take each step together: its sums are measured, its correction is fitted to them, and the
    corrected prediction leads to the next states. It takes as many calls of `reference` as of `engine`.

    Args:
        engine: the quantized network, uncorrected.
        reference: the full-precision network.
        trajectories: their calibration set gives the conditions and, with `seed`, the noise.
        correct: the correction by the sums so far, those of later steps being 0; its row of the last step
            measured is used.
        recalibrate: inject the recalibrated noise.
    Raises:
        ParityError: an engine returns NaN or infinite values; names the step.
    """
    n_steps, shape = len(sampling), sampling.model.sample_shape
    batches = [(b.indices, b.conditions) for b in trajectories if b.indices.start in trajectories.calibration]
    sources = [NoiseSource(seed, [CALIBRATION_STREAM + i for i in rows], shape) for rows, _ in batches]
    states = [sampling.begin(source) for source in sources]
    sums = [NoiseStats.zeros(n_steps, sampling.model.channels) for _ in trajectories.calibration]
    with progress(len(sums) * n_steps, what, "step") as bar:
        for step in range(n_steps):
            predicted = []
            for (indices, conditions), state in zip(batches, states, strict=True):
                e, eq = (
                    _predict(net, sampling, state.x, step, indices, conditions) for net in (reference, engine)
                )
                predicted.append(eq)
                for row, i in enumerate(indices):
                    sums[i] += NoiseStats.of_step(step, n_steps, e[row : row + 1], eq[row : row + 1])
                bar.update(len(indices))
            correction = correct(sums)
            gain, offset = (rows[step][:, None, None] for rows in (correction.gain, correction.offset))
            injected = sampling.schedule.sigmas
            sigma = sampling.schedule.recalibrated_sigmas(correction.var) if recalibrate else injected
            for j, (state, eq) in enumerate(zip(states, predicted, strict=True)):
                noise = sources[j].draw() if sampling.draws(step) else None
                states[j] = sampling.advance(state, gain * eq + offset, step, float(sigma[step]), noise)
    return sums


def _predict(
    engine: Engine,
    sampling: Sampling,
    x: npt.NDArray[np.floating],
    step: int,
    indices: range,
    conditions: Mapping[str, Array],
) -> npt.NDArray[np.float64]:
    with np.errstate(invalid="ignore", over="ignore"):  # the error below replaces the warning
        _, height, width = sampling.model.sample_shape
        size = max(1, ATTENTION // (32 * (height * width) ** 2 * sampling.branches))
        parts = sampling.split(x, conditions, size)
        eq = np.concatenate([sampling.predict(engine, part, step, own) for part, own in parts])
    if not np.isfinite(eq).all():
        raise ParityError(
            f"the engine returns NaN or infinite values at step {step} (timestep "
            f"{sampling.schedule.timesteps[step]}) of samples {indices.start} to {indices.stop - 1}: it does "
            "not compute what it was built to compute"
        )
    return eq
