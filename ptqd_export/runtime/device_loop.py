"""The sampler's loop with the state on a device: engines and the update graph pass buffers to each other.

Each step is two launches: the precision's engine, sample -> epsilon, then the update, (sample, epsilon, what
the solver keeps) -> (next sample, timestep, step, what it keeps next). Nothing is copied back before the end.
Two sets of state buffers alternate, so that no engine reads what it writes, and addresses repeat, as CUDA
graphs need. The state is float32 here; on the host (`Sampling.sample`) it is float64.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from ..core.engine import (
    EPSILON,
    KEPT,
    NEXT_KEPT,
    NEXT_SAMPLE,
    NEXT_STEP,
    NEXT_TIMESTEP,
    NOISE,
    SAMPLE,
    STEP,
    TIMESTEP,
    Array,
    Device,
    DeviceEngine,
    Engine,
)
from ..core.sampling import F64, NoiseSource, Sampling, State
from ..errors import ParityError


@dataclass(frozen=True)
class _Buffers:
    """Buffers for one batch size.

    Attributes:
        states: two alternating states, {sample, timestep, step, kept.i}.
        shared: the buffers that all steps share.
    """

    states: tuple[dict[str, Any], dict[str, Any]]
    shared: dict[str, Any]


class DeviceSampler:
    """Draws samples with the state on `device`.

    Args:
        update: engine of the update graph (`export.sampler_update`), built for this sampling.
        sigmas: sigma' per step, (T,); no effect where the schedule injects no noise.
    """

    def __init__(self, device: Device, update: DeviceEngine, sampling: Sampling, sigmas: F64) -> None:
        self._device, self._update, self._sampling = device, update, sampling
        original = sampling.schedule.sigmas
        self._share = np.where(original > 0, sigmas / np.where(original > 0, original, 1.0), 0.0)
        self._buffers: dict[int, _Buffers] = {}

    def sample(
        self,
        engine_at: Callable[[int], DeviceEngine],
        conditions: Mapping[str, Array],
        indices: Sequence[int],
        *,
        seed: int,
        sampling: Sampling | None = None,
        advance: Callable[[int], None] = lambda step: None,
    ) -> F64:
        """Like `Sampling.sample`, with the same noise: x_0, float64 (N, C, H, W), not clamped.

        Args:
            sampling: the same but for what stands for no condition.
            advance: called with each step once it is launched.
        """
        n, write = len(indices), self._device.write
        sampling = self._sampling if sampling is None else sampling
        schedule, buffers = sampling.schedule, self._allocate(n)
        source = NoiseSource(seed, indices, sampling.model.sample_shape)
        here, there = buffers.states
        write(here[SAMPLE], sampling.rows(sampling.begin(source).x.astype(np.float32)))
        write(here[TIMESTEP], np.full(n * sampling.branches, schedule.timesteps[0]))
        write(here[STEP], np.zeros(1, np.int64))
        for name, value in sampling.condition_rows(conditions, n).items():
            write(buffers.shared[name], value)
        kept = [f"{KEPT}{i}" for i in range(schedule.kept)]
        for name in kept:  # the first steps multiply what is not there yet by 0: it must be finite
            write(here[name], np.zeros((n * sampling.branches, *sampling.model.sample_shape), np.float32))
        for step in range(len(sampling)):
            if sampling.draws(step):
                # The update multiplies by sigma: what is left of sigma' comes with the noise.
                noise = self._share[step] * source.draw()
                write(buffers.shared[NOISE], sampling.rows(noise.astype(np.float32)))
            _launch(engine_at(step), here | buffers.shared)
            following = {NEXT_SAMPLE: there[SAMPLE], NEXT_TIMESTEP: there[TIMESTEP], NEXT_STEP: there[STEP]}
            following |= {f"{NEXT_KEPT}{i}": there[name] for i, name in enumerate(kept)}
            _launch(self._update, here | buffers.shared | following)
            here, there = there, here
            advance(step)
        return np.asarray(self._device.read(here[SAMPLE])[:n], np.float64)

    def _allocate(self, n: int) -> _Buffers:
        if n not in self._buffers:
            empty, model, schedule = self._device.empty, self._sampling.model, self._sampling.schedule
            rows, shape = n * self._sampling.branches, model.sample_shape

            def state() -> dict[str, Any]:
                return {
                    SAMPLE: empty((rows, *shape), "float32"),
                    TIMESTEP: empty((rows,), schedule.timesteps.dtype.name),
                    STEP: empty((1,), "int64"),
                    **{f"{KEPT}{i}": empty((rows, *shape), "float32") for i in range(schedule.kept)},
                }

            shared = {EPSILON: empty((rows, *shape), "float32"), NOISE: empty((rows, *shape), "float32")}
            self._device.write(
                shared[NOISE], np.zeros((rows, *shape), np.float32)
            )  # steps without noise multiply it by 0
            shared |= {spec.name: empty((rows, *spec.shape), spec.dtype) for spec in model.inputs}
            self._buffers[n] = _Buffers((state(), state()), shared)
        return self._buffers[n]


def _launch(engine: DeviceEngine, buffers: Mapping[str, Any]) -> None:
    engine.launch({name: buffers[name] for name in (*engine.inputs, *engine.outputs)})


UPDATE_TOLERANCE = 1e-5
"""Largest allowed error, relative to the largest term of an update: some ten roundings of float32."""


def check_update(update: Engine, sampling: Sampling) -> None:
    """Check every step of an update engine against `Sampling.guide` and `Sampling.advance`.

    The inputs are random numbers.

    Raises:
        ParityError: a step differs; names it.
    """
    rng, schedule = np.random.default_rng(0), sampling.schedule
    shape, branches = (1, *sampling.model.sample_shape), sampling.branches
    for step in range(len(sampling)):
        draws = rng.standard_normal((2 + branches + schedule.kept, *shape)).astype(np.float32)
        x, z, e, *kept = draws[0], draws[1], np.concatenate(draws[2 : 2 + branches]), *draws[2 + branches :]
        feeds = {f"{KEPT}{i}": sampling.rows(value) for i, value in enumerate(kept)}
        feeds |= {SAMPLE: sampling.rows(x), EPSILON: e, NOISE: sampling.rows(z)}
        got = update({**feeds, STEP: np.array([step], np.int64)})
        exact = [value.astype(np.float64) for value in (x, *kept)]
        epsilon = sampling.guide(e, exact[0], step)
        noise = z.astype(np.float64) if sampling.draws(step) else None
        sigma = float(schedule.sigmas[step])
        expected = sampling.advance(State(exact[0], tuple(exact[1:])), epsilon, step, sigma, noise)
        largest = max(np.abs(value).max() for value in (x, epsilon, z, *kept))
        terms = _terms(sampling, step) * largest
        names = [NEXT_SAMPLE, *(f"{NEXT_KEPT}{i}" for i in range(schedule.kept))]
        off = max(
            np.abs(got[name].astype(np.float64) - value).max() / term
            for name, value, term in zip(names, (expected.x, *expected.kept), terms, strict=True)
        )
        following = schedule.timesteps[min(step + 1, len(sampling) - 1)]
        right = got[NEXT_STEP].tolist() == [step + 1] and (got[NEXT_TIMESTEP] == following).all()
        if not (off <= UPDATE_TOLERANCE and right):
            raise ParityError(
                f"the sampler's update does not do what the schedule says at step {step} "
                f"(off by {off:.2g} of its terms): rebuild the bundle"
            )


def _terms(sampling: Sampling, step: int) -> F64:
    """Largest factor of a term of the next state and of each tensor kept, (1 + S,); at least 1."""
    schedule = sampling.schedule
    u, w = (float(rows[step]) for rows in schedule.clean_coefficients)
    table = np.abs(schedule.table[step]).max(axis=1)
    inner = max(1.0, abs(u), abs(w)) if schedule.bounded else 1.0
    linear = np.abs(schedule.linear_table[step]).max(axis=1)
    guided = 1 + 2 * abs(sampling.guidance_scale) if sampling.guided else 1.0
    return np.asarray(1 + guided * np.maximum(linear, table * inner))
