"""DDIM and DDPM as written maths over any Engine: guidance in one doubled batch, recalibrated variance, per-sample noise.

The state x is float64; engines see it as float32.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

import numpy as np
import numpy.typing as npt

from .conditioning import ModelInfo
from .engine import EPSILON, SAMPLE, STEP, TIMESTEP, Array, Engine
from .noise import Correction
from .schedule import NoiseSchedule

F64 = npt.NDArray[np.float64]


class NoiseSource:
    """Standard normal noise per sample: what sample i gets depends on (seed, i) and on how often it was asked, on nothing else.

    One Philox counter generator per sample, keyed by (seed, index).
    """

    def __init__(self, seed: int, indices: Sequence[int], shape: tuple[int, ...]) -> None:
        self._shape = shape
        self._generators = [np.random.Generator(np.random.Philox(key=np.array([seed, i], np.uint64))) for i in indices]

    def draw(self) -> F64:
        """The next noise of every sample, float64 (N, *shape)."""
        return np.stack([g.standard_normal(self._shape) for g in self._generators])


def branches(guidance_scale: float) -> int:
    """Rows that one sample takes in an engine call: two where guidance mixes two predictions."""
    return 1 if guidance_scale in (0.0, 1.0) else 2


def condition_rows(info: ModelInfo, conditions: Mapping[str, Array], n: int, guidance_scale: float) -> dict[str, Array]:
    """Feeds of info.inputs for one engine call: the null condition's rows first where guidance mixes two predictions; it alone at guidance 0."""
    null = info.null_conditions(n)
    if guidance_scale == 1.0:
        used: list[Mapping[str, Array]] = [conditions]
    elif guidance_scale == 0.0:
        used = [null]
    else:
        used = [null, conditions]
    return {spec.name: np.concatenate([branch[spec.name] for branch in used]) for spec in info.inputs}


def predict_epsilon(
    engine: Engine,
    x: npt.NDArray[np.floating],
    step: int,
    schedule: NoiseSchedule,
    info: ModelInfo,
    conditions: Mapping[str, Array],
    guidance_scale: float,
) -> F64:
    """The guided noise prediction e_null + guidance_scale (e_cond - e_null), float64 (N, C, H, W), from one engine call.

    Both branches go through the engine as one batch of 2 N (null first); with guidance_scale 1 only the conditional one,
    with 0 only the unconditional one (classifier-free guidance, Ho & Salimans 2022).
    """
    n = len(x)
    x32 = np.ascontiguousarray(x, np.float32)
    feeds: dict[str, Array] = {
        SAMPLE: np.concatenate([x32] * branches(guidance_scale)),
        TIMESTEP: np.full(n * branches(guidance_scale), schedule.timesteps[step], np.int64),
        STEP: np.array([step], np.int64),
        **condition_rows(info, conditions, n, guidance_scale),
    }
    epsilon = engine(feeds)[EPSILON].astype(np.float64)
    if branches(guidance_scale) == 1:
        return epsilon
    return np.asarray(epsilon[:n] + guidance_scale * (epsilon[n:] - epsilon[:n]))


def ddim_step(x: F64, epsilon: F64, step: int, schedule: NoiseSchedule, sigma_injected: float, noise: F64 | None) -> F64:
    """x_{t-1} from x_t (DDIM eq. 12; eta = 1 is DDPM), all (N, C, H, W) float64.

    x_0 = (x - sqrt(1 - abar) e) / sqrt(abar);  x_prev = sqrt(abar_prev) x_0 + sqrt(1 - abar_prev - sigma^2) e + sigma' z.
    `sigma_injected` is sigma' (NoiseSchedule.recalibrated_sigmas); the direction term keeps the schedule's own sigma.
    """
    a, p, sigma = schedule.alphas_cumprod[step], schedule.alphas_cumprod_prev[step], schedule.sigmas[step]
    x0 = (x - np.sqrt(1 - a) * epsilon) / np.sqrt(a)
    if schedule.clip_sample is not None:
        x0 = np.clip(x0, -schedule.clip_sample, schedule.clip_sample)
        if schedule.rederive_epsilon:
            epsilon = (x - np.sqrt(a) * x0) / np.sqrt(1 - a)
    x = np.sqrt(p) * x0 + np.sqrt(max(0.0, 1 - p - sigma**2)) * epsilon
    return x if noise is None else x + sigma_injected * noise


def sample(
    engine_at: Callable[[int], Engine],
    schedule: NoiseSchedule,
    info: ModelInfo,
    conditions: Mapping[str, Array],
    indices: Sequence[int],
    *,
    seed: int,
    guidance_scale: float,
    sigmas: F64 | None = None,
    correction: Correction | None = None,
    on_step: Callable[[int, F64, F64], None] | None = None,
) -> F64:
    """Run the sampler for the samples `indices` of `seed`.

    Args:
        engine_at: the engine of each step.
        conditions: feeds (N, ...) of info.inputs, one row per index.
        sigmas: std of the injected noise per step (T,); the schedule's own if None.
        correction: applied here, to the guided prediction, for engines that do not carry it in their graph.
        on_step: called with (step, x_t, corrected guided epsilon) before the update.
    Returns:
        x_0, float64 (N, C, H, W), not clamped.
    """
    source = NoiseSource(seed, indices, info.sample_shape)
    x = source.draw()
    original = schedule.sigmas
    injected = original if sigmas is None else sigmas
    for i in range(len(schedule)):
        epsilon = predict_epsilon(engine_at(i), x, i, schedule, info, conditions, guidance_scale)
        if correction is not None:
            epsilon = correction.gain[i][:, None, None] * epsilon + correction.offset[i][:, None, None]
        if on_step is not None:
            on_step(i, x, epsilon)
        # Drawn wherever the original schedule injects, so that recalibration never shifts the stream of later steps.
        noise = source.draw() if original[i] > 0 else None
        x = ddim_step(x, epsilon, i, schedule, float(injected[i]), noise)
    return x
