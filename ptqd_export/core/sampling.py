"""Sampling: DDIM and DDPM over any Engine, with the network's interface, the schedule and the guidance.

The state x is float64; engines receive it as float32.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

import numpy as np
import numpy.typing as npt

from .engine import EPSILON, SAMPLE, STEP, TIMESTEP, Array, Engine
from .model import ModelInfo
from .schedule import NoiseSchedule

F64 = npt.NDArray[np.float64]
Floats = npt.NDArray[np.floating]
Solver = Literal["ddim", "ddpm"]


class NoiseSource:
    """Standard normal noise per sample, the same whatever the batch.

    The noise of sample i depends only on (seed, i) and on the number of draws before: each sample has a
    Philox counter generator of its own, keyed by (seed, index).
    """

    def __init__(self, seed: int, indices: Sequence[int], shape: tuple[int, ...]) -> None:
        self._shape = shape
        keys = (np.array([seed, index], np.uint64) for index in indices)
        self._generators = [np.random.Generator(np.random.Philox(key=key)) for key in keys]

    def draw(self) -> F64:
        """The next noise of every sample, float64 (N, *shape)."""
        return np.stack([generator.standard_normal(self._shape) for generator in self._generators])


@dataclass(frozen=True)
class Sampling:
    """What is sampled and how; the statistics and tables of a bundle are valid for one Sampling only.

    Attributes:
        model: shapes and conditions of the network.
        schedule: the denoising steps.
        guidance_scale: s of e_null + s (e_cond - e_null); 1 is the conditional prediction, 0 the
            unconditional one.
        solver: "ddim" or "ddpm".
    Raises:
        RecipeError: guidance needs an unconditional prediction that the model does not have.
    """

    model: ModelInfo
    schedule: NoiseSchedule
    guidance_scale: float = 1.0
    solver: Solver = "ddim"

    def __post_init__(self) -> None:
        self.model.check_guidance(self.guidance_scale)

    @classmethod
    def of(
        cls,
        model: ModelInfo,
        scheduler_config: Mapping[str, Any],
        *,
        n_steps: int,
        eta: float = 0.0,
        guidance_scale: float = 1.0,
        solver: Solver = "ddim",
    ) -> Sampling:
        """From a diffusers scheduler config.

        Raises:
            ModelError, RecipeError: as `NoiseSchedule.from_config`, or the model does not support guidance.
        """
        schedule = NoiseSchedule.from_config(scheduler_config, n_steps, eta, solver)
        return cls(model, schedule, guidance_scale, solver)

    def __len__(self) -> int:
        """Denoising steps."""
        return len(self.schedule)

    @property
    def guided(self) -> bool:
        """Whether guidance mixes two predictions: then each sample takes two rows of an engine call.

        The rows without the condition come first.
        """
        return self.guidance_scale not in (0.0, 1.0)

    @property
    def branches(self) -> int:
        """Rows that one sample takes in an engine call."""
        return 2 if self.guided else 1

    @property
    def conditional(self) -> Sampling:
        """The same without guidance: the feeds of the conditional branch alone, for a graph as it is."""
        return replace(self, guidance_scale=1.0)

    def without(self, null: Mapping[str, Array]) -> Sampling:
        """The same with other values for "no condition", by input name: a negative prompt's."""
        return replace(self, model=replace(self.model, null={**self.model.null, **null})) if null else self

    def guide(self, epsilon: Floats) -> F64:
        """The guided prediction, float64 (N, ...), of an engine's rows (branches * N, ...).

        e_null + guidance_scale (e_cond - e_null) (classifier-free guidance, Ho & Salimans 2022).
        """
        e = np.asarray(epsilon, np.float64)
        if not self.guided:
            return e
        null, conditional = np.split(e, 2)
        return np.asarray(null + self.guidance_scale * (conditional - null))

    def rows(self, value: Array) -> Array:
        """`value` (N, ...) once per branch: (branches * N, ...)."""
        return np.concatenate([value] * self.branches)

    def condition_rows(self, conditions: Mapping[str, Array], n: int) -> dict[str, Array]:
        """Feeds (branches * n, ...) of the conditioning inputs.

        Rows of the null condition come first; at guidance_scale 0 there are no others.
        """
        null = self.model.null_conditions(n)
        if self.guided:
            used: list[Mapping[str, Array]] = [null, conditions]
        else:
            used = [null if self.guidance_scale == 0.0 else conditions]
        return {
            spec.name: np.concatenate([branch[spec.name] for branch in used]) for spec in self.model.inputs
        }

    def feeds(self, x: Floats, step: int, conditions: Mapping[str, Array]) -> dict[str, Array]:
        """Feeds of one engine call for x_t (N, C, H, W) at a step, with both branches in one batch."""
        rows = len(x) * self.branches
        return {
            SAMPLE: self.rows(np.ascontiguousarray(x, np.float32)),
            TIMESTEP: np.full(rows, self.schedule.timesteps[step], np.int64),
            STEP: np.array([step], np.int64),
            **self.condition_rows(conditions, len(x)),
        }

    def predict(self, engine: Engine, x: Floats, step: int, conditions: Mapping[str, Array]) -> F64:
        """The guided noise prediction, float64 (N, C, H, W), from one engine call."""
        return self.guide(np.asarray(engine(self.feeds(x, step, conditions))[EPSILON], np.float64))

    def predict_singly(self, engine: Engine, x: Floats, step: int, conditions: Mapping[str, Array]) -> F64:
        """`predict`, one sample at a time: every engine takes that, whatever batches it was built for."""
        parts = []
        for i in range(len(x)):
            own = {spec.name: conditions[spec.name][i : i + 1] for spec in self.model.inputs}
            parts.append(self.predict(engine, x[i : i + 1], step, own))
        return np.concatenate(parts)

    def advance(self, x: F64, epsilon: F64, step: int, sigma: float, noise: F64 | None) -> F64:
        """x_{t-1} from x_t (DDIM eq. 12; eta = 1 is DDPM), all (N, C, H, W) float64.

            x_0 = (x - sqrt(1 - abar) e) / sqrt(abar)
            x_prev = sqrt(abar_prev) x_0 + sqrt(1 - abar_prev - sigma^2) e + sigma' z

        Args:
            sigma: sigma' (NoiseSchedule.recalibrated_sigmas); the direction term, the one with e, keeps the
                schedule's own sigma.
            noise: z, or None where no noise is injected.
        """
        s = self.schedule
        abar, prev = s.alphas_cumprod[step], s.alphas_cumprod_prev[step]
        x0 = (x - np.sqrt(1 - abar) * epsilon) / np.sqrt(abar)
        if s.clip_sample is not None:
            x0 = np.clip(x0, -s.clip_sample, s.clip_sample)
            if s.rederive_epsilon:
                epsilon = (x - np.sqrt(abar) * x0) / np.sqrt(1 - abar)
        x = np.sqrt(prev) * x0 + np.sqrt(max(0.0, 1 - prev - s.sigmas[step] ** 2)) * epsilon
        return x if noise is None else x + sigma * noise

    def sample(
        self,
        engine_at: Callable[[int], Engine],
        conditions: Mapping[str, Array],
        indices: Sequence[int],
        *,
        seed: int,
        sigmas: F64 | None = None,
        on_step: Callable[[int, F64, F64], None] | None = None,
    ) -> F64:
        """Draw the samples `indices` of `seed`.

        Args:
            engine_at: the engine of each step.
            conditions: feeds (N, ...) of the model's inputs, one row per index.
            sigmas: standard deviation of the injected noise per step (T,); the schedule's own if None.
            on_step: called with (step, x_t, guided epsilon) before the update.
        Returns:
            x_0, float64 (N, C, H, W), not clamped.
        """
        source = NoiseSource(seed, indices, self.model.sample_shape)
        x = source.draw()
        original = self.schedule.sigmas
        injected = original if sigmas is None else sigmas
        for step in range(len(self)):
            epsilon = self.predict(engine_at(step), x, step, conditions)
            if on_step is not None:
                on_step(step, x, epsilon)
            # Drawn wherever the original schedule injects noise, so that recalibration does not shift the
            # stream of later steps.
            noise = source.draw() if original[step] > 0 else None
            x = self.advance(x, epsilon, step, float(injected[step]), noise)
        return x
