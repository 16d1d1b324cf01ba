"""What calibration shows to the network: which trajectories and steps, and how much each step counts."""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

import numpy as np
from torch import Tensor

from ..core.engine import SAMPLE, TIMESTEP
from ..core.model import ModelInfo
from ..core.sampling import F64, Sampling
from .torch_engine import as_tensor
from .trajectories import Trajectories


class Call(NamedTuple):
    """One call of the network.

    Attributes:
        feeds: what the module takes, by keyword, each (B, ...).
        weights: how much an error counts in each row, float32 (B,) (see `error_weights`).
    """

    feeds: dict[str, Tensor]
    weights: Tensor


def seen_trajectories(info: ModelInfo, size: int, least: int) -> range:
    """The calibration trajectories that weights are rounded again on, out of `size`.

    Classes go in turn over the trajectories, so the first ones hold every class once. At least `least` are
    taken, and as many as there are classes.
    """
    return range(min(size, max(least, len(info.labels))))


def error_weights(sampling: Sampling) -> F64:
    """How much a squared error of the network's output at each step counts, (T,), 1 on average.

    A step multiplies epsilon by c_i (NoiseSchedule.epsilon_gains), and epsilon is a_i times the output: the
    weight is (c_i a_i)^2, normalised.
    """
    schedule = sampling.schedule
    weights = (schedule.epsilon_gains * schedule.epsilon_coefficients()[0]) ** 2
    mean = weights.mean()
    return np.asarray(weights / mean) if mean > 0 else np.ones(len(schedule))


def calls(sampling: Sampling, trajectories: Trajectories, seen: range, stride: int = 1) -> Iterator[Call]:
    """The full-precision trajectories `seen`, in all branches of guidance.

    The rows of a call are at different steps, so that a few calls show all of them.

    Args:
        seen: indices from 0 on.
        stride: each trajectory is shown at every stride-th step only.
    """
    n_steps, weights = len(sampling), error_weights(sampling).astype(np.float32)
    for indices, x, _, conditions in trajectories:
        kept = np.array([i for i in indices if i in seen])
        if not len(kept):
            continue
        rows = kept - indices.start
        own = {name: value[rows] for name, value in conditions.items()}
        for first in range(0, n_steps, stride):
            steps = (first + kept) % n_steps
            feeds = {
                SAMPLE: sampling.rows(np.ascontiguousarray(x[steps, rows], np.float32)),
                TIMESTEP: sampling.rows(sampling.schedule.timesteps[steps]),
                **sampling.condition_rows(own, len(rows)),
            }
            yield Call(
                {name: as_tensor(value) for name, value in feeds.items()},
                as_tensor(sampling.rows(weights[steps])),
            )
