"""The sampler's loop with the state on a device: engines and the update graph pass buffers to each other, nothing comes back before the end.

Each step is two launches: the precision's engine, sample -> epsilon, and the update, (sample, epsilon) -> (next sample, timestep, step).
Two sets of state buffers take turns, so that no engine reads what it writes and every address recurs, as CUDA graphs need.
The state is float32 here; on the host (`sampler.sample`) it is float64.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from .backends.base import Device, DeviceEngine
from .conditioning import ModelInfo
from .engine import EPSILON, NEXT_SAMPLE, NEXT_STEP, NEXT_TIMESTEP, NOISE, SAMPLE, STEP, TIMESTEP, Array, Engine
from .errors import ParityError
from .sampler import F64, NoiseSource, branches, condition_rows, ddim_step
from .schedule import NoiseSchedule


@dataclass(frozen=True)
class _Buffers:
    """For one batch size: two states in turn, {sample, timestep, step}, and what all steps share: conditions, epsilon, noise."""

    states: tuple[dict[str, Any], dict[str, Any]]
    shared: dict[str, Any]


class DeviceSampler:
    """Samples with the state on `device`.

    Args:
        update: engine of the update graph (`export.sampler_update`), made for this schedule and guidance scale.
    """

    def __init__(self, device: Device, update: DeviceEngine, schedule: NoiseSchedule, info: ModelInfo, guidance_scale: float) -> None:
        self._device, self._update = device, update
        self._schedule, self._info, self._scale = schedule, info, guidance_scale
        self._buffers: dict[int, _Buffers] = {}

    def sample(
        self,
        engine_at: Callable[[int], DeviceEngine],
        conditions: Mapping[str, Array],
        indices: Sequence[int],
        *,
        seed: int,
        advance: Callable[[int], None] = lambda step: None,
    ) -> F64:
        """As `sampler.sample`, noise included: x_0, float64 (N, C, H, W), not clamped.

        Args:
            advance: told of every step once it is launched.
        """
        n, rows = len(indices), branches(self._scale)
        buffers, write = self._allocate(n), self._device.write
        source = NoiseSource(seed, indices, self._info.sample_shape)
        here, there = buffers.states
        write(here[SAMPLE], np.concatenate([source.draw().astype(np.float32)] * rows))
        write(here[TIMESTEP], np.full(n * rows, self._schedule.timesteps[0], np.int64))
        write(here[STEP], np.zeros(1, np.int64))
        for name, value in condition_rows(self._info, conditions, n, self._scale).items():
            write(buffers.shared[name], value)
        for step, sigma in enumerate(self._schedule.sigmas):
            if sigma > 0:
                write(buffers.shared[NOISE], np.concatenate([source.draw().astype(np.float32)] * rows))
            _launch(engine_at(step), here | buffers.shared)
            following = {NEXT_SAMPLE: there[SAMPLE], NEXT_TIMESTEP: there[TIMESTEP], NEXT_STEP: there[STEP]}
            _launch(self._update, here | buffers.shared | following)
            here, there = there, here
            advance(step)
        return np.asarray(self._device.read(here[SAMPLE])[:n], np.float64)

    def _allocate(self, n: int) -> _Buffers:
        if n not in self._buffers:
            empty, shape = self._device.empty, self._info.sample_shape
            rows = n * branches(self._scale)

            def state() -> dict[str, Any]:
                return {SAMPLE: empty((rows, *shape), "float32"), TIMESTEP: empty((rows,), "int64"), STEP: empty((1,), "int64")}

            shared = {EPSILON: empty((rows, *shape), "float32"), NOISE: empty((rows, *shape), "float32")}
            self._device.write(shared[NOISE], np.zeros((rows, *shape), np.float32))  # steps that inject nothing multiply it by 0
            shared |= {spec.name: empty((rows, *spec.shape), spec.dtype) for spec in self._info.inputs}
            self._buffers[n] = _Buffers((state(), state()), shared)
        return self._buffers[n]


def _launch(engine: DeviceEngine, buffers: Mapping[str, Any]) -> None:
    engine.launch({name: buffers[name] for name in (*engine.inputs, *engine.outputs)})


UPDATE_TOLERANCE = 1e-5
"""Relative to the largest term of an update: some ten roundings of float32."""


def check_update(update: Engine, schedule: NoiseSchedule, info: ModelInfo, guidance_scale: float, sigmas: F64) -> None:
    """Every step of an update engine does what guidance and `sampler.ddim_step` do, on random numbers.

    Args:
        sigmas: sigma' per step, (T,).
    Raises:
        ParityError: naming the step.
    """
    rng, rows, n = np.random.default_rng(0), branches(guidance_scale), len(schedule)
    for step in range(n):
        x, z, *e = rng.standard_normal((2 + rows, 1, *info.sample_shape)).astype(np.float32)
        feeds: dict[str, Array] = {SAMPLE: np.concatenate([x] * rows), EPSILON: np.concatenate(e), STEP: np.array([step], np.int64)}
        got = update(feeds | {NOISE: np.concatenate([z] * rows)})
        epsilon = np.asarray(e[0] if rows == 1 else e[0] + guidance_scale * (e[1].astype(np.float64) - e[0]), np.float64)
        noise = z.astype(np.float64) if schedule.sigmas[step] > 0 else None
        expected = ddim_step(x.astype(np.float64), epsilon, step, schedule, float(sigmas[step]), noise)
        terms = (1 + 1 / np.sqrt(schedule.alphas_cumprod[step])) * max(np.abs(x).max(), np.abs(epsilon).max(), np.abs(z).max())
        off = np.abs(got[NEXT_SAMPLE].astype(np.float64) - expected).max() / terms
        following = min(step + 1, n - 1)
        if not off <= UPDATE_TOLERANCE or got[NEXT_STEP].tolist() != [step + 1] or (got[NEXT_TIMESTEP] != schedule.timesteps[following]).any():
            raise ParityError(
                f"the sampler's update does not do what the schedule says at step {step} (off by {off:.2g} of its terms): rebuild the bundle"
            )
