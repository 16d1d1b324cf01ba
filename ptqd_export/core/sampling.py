"""Sampling: any solver over any Engine, with the network's interface, the schedule and the guidance.

The state x is float64; engines receive it as float32.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from ..errors import RecipeError
from .engine import EPSILON, SAMPLE, STEP, TIMESTEP, Array, Engine
from .model import ModelInfo
from .schedule import NoiseSchedule
from .solvers import CLEAN, KEPT, NOISE, PREDICTION, STATE, Solver

F64 = npt.NDArray[np.float64]
Floats = npt.NDArray[np.floating]


class State(NamedTuple):
    """Where a run stands between two evaluations.

    Attributes:
        x: what the network sees next; x_0 at the end. (N, C, H, W).
        kept: what the solver keeps, each like x; empty before the first step.
    """

    x: F64
    kept: tuple[F64, ...] = ()


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


MOST_GUIDANCE = 1000.0
"""Far above what pictures bear; far below what overflows."""


@dataclass(frozen=True)
class Sampling:
    """What is sampled and how; the statistics and tables of a bundle are valid for one Sampling only.

    Attributes:
        model: shapes and conditions of the network.
        schedule: the denoising steps.
        guidance_scale: s of e_null + s (e_cond - e_null); 1 is the conditional prediction, 0 the
            unconditional one.
        guidance_rescale: phi of Lin et al. 2023, eq. 16: how far the guided output is brought back to the
            standard deviation of the conditional one, per sample.
    Raises:
        RecipeError: guidance needs an unconditional prediction that the model does not have, or
            guidance_scale or guidance_rescale is out of range.
    """

    model: ModelInfo
    schedule: NoiseSchedule
    guidance_scale: float = 1.0
    guidance_rescale: float = 0.0

    def __post_init__(self) -> None:
        if not 0 <= self.guidance_scale <= MOST_GUIDANCE:
            raise RecipeError(
                f"guidance_scale is {self.guidance_scale}: give a value from 0 to {MOST_GUIDANCE:g}"
            )
        self.model.check_guidance(self.guidance_scale)
        if not 0 <= self.guidance_rescale <= 1:
            raise RecipeError(f"guidance_rescale is {self.guidance_rescale}: give a value in [0, 1]")

    @classmethod
    def of(
        cls,
        model: ModelInfo,
        scheduler_config: Mapping[str, Any],
        *,
        n_steps: int,
        eta: float = 0.0,
        guidance_scale: float = 1.0,
        guidance_rescale: float = 0.0,
        solver: Solver | None = None,
    ) -> Sampling:
        """From a diffusers scheduler config; solver None is the one that its class names.

        Raises:
            ModelError, RecipeError: as `NoiseSchedule.from_config`, or the model does not support guidance.
        """
        schedule = NoiseSchedule.from_config(scheduler_config, n_steps, eta, solver)
        return cls(model, schedule, guidance_scale, guidance_rescale)

    def __len__(self) -> int:
        """Steps, which are evaluations of the network."""
        return len(self.schedule)

    @property
    def solver(self) -> Solver:
        return self.schedule.solver

    @property
    def summary(self) -> str:
        """Solver, steps and guidance in words."""
        s = self.schedule
        calls = f" ({len(s)} evaluations)" if len(s) != s.n_steps else ""
        eta = f", eta {s.eta:g}" if s.solver == "ddim" else ""
        rescaled = f" rescaled by {self.guidance_rescale:g}" if self.guidance_rescale else ""
        return f"{s.solver}, {s.n_steps} steps{calls}{eta}, guidance {self.guidance_scale:g}{rescaled}"

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

    def guide(self, prediction: Floats, x: Floats, step: int) -> F64:
        """The guided prediction, float64 (N, ...), of an engine's rows (branches * N, ...) at x (N, ...).

        e_null + guidance_scale (e_cond - e_null) (classifier-free guidance, Ho & Salimans 2022). With
        guidance_rescale, the network's output r of that is scaled: r (1 - phi + phi std(r_cond) / std(r)),
        with the standard deviations of each sample (Lin et al. 2023, eq. 15 and 16).
        """
        e = np.asarray(prediction, np.float64)
        if not self.guided:
            return e
        null, conditional = np.split(e, 2)
        guided = np.asarray(null + self.guidance_scale * (conditional - null))
        if not self.guidance_rescale:
            return guided
        a, b = (rows[step] for rows in self.schedule.epsilon_coefficients())
        raw, wanted = ((value - b * x) / a for value in (guided, conditional))
        axes = tuple(range(1, e.ndim))
        share = wanted.std(axes, keepdims=True) / raw.std(axes, keepdims=True)
        return np.asarray(a * raw * (1 + self.guidance_rescale * (share - 1)) + b * x)

    def rows(self, value: Array) -> Array:
        """`value` (N, ...) once per branch: (branches * N, ...)."""
        return np.concatenate([value] * self.branches)

    def condition_rows(self, conditions: Mapping[str, Array], n: int) -> dict[str, Array]:
        """Feeds (branches * n, ...) of the conditioning inputs.

        Rows of the null condition come first; at guidance_scale 0 there are no others. What an input keeps
        (`InputSpec.kept`) is the same in both.
        """
        kept = {spec.name: conditions[spec.name] for spec in self.model.inputs if spec.kept}
        null = self.model.null_conditions(n) | kept
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
            TIMESTEP: np.full(rows, self.schedule.timesteps[step]),
            STEP: np.array([step], np.int64),
            **self.condition_rows(conditions, len(x)),
        }

    def predict(self, engine: Engine, x: Floats, step: int, conditions: Mapping[str, Array]) -> F64:
        """The guided noise prediction, float64 (N, C, H, W), from one engine call."""
        return self.guide(engine(self.feeds(x, step, conditions))[EPSILON].astype(np.float64), x, step)

    def predict_singly(self, engine: Engine, x: Floats, step: int, conditions: Mapping[str, Array]) -> F64:
        """`predict`, one sample at a time: every engine takes that, whatever batches it was built for."""
        return np.concatenate(
            [self.predict(engine, one, step, own) for one, own in self.split(x, conditions, 1)]
        )

    def split(
        self, x: Floats, conditions: Mapping[str, Array], size: int
    ) -> Iterator[tuple[Floats, dict[str, Array]]]:
        """Samples x (N, C, H, W) in batches of at most `size`, each with its conditions."""
        for i in range(0, len(x), size):
            rows = slice(i, i + size)
            yield x[rows], {spec.name: conditions[spec.name][rows] for spec in self.model.inputs}

    def begin(self, source: NoiseSource) -> State:
        """The first state, from the first draw of `source`."""
        return State(self.schedule.start * source.draw())

    def clean(self, x: F64, prediction: F64, step: int) -> F64:
        """The predicted x_0 of a step, clipped or thresholded where the schedule does so.

        x_0 = (x - sqrt(1 - abar) e) / sqrt(abar); where v stands for e (`NoiseSchedule.velocity`),
        x_0 = sqrt(abar) x - sqrt(1 - abar) v.
        """
        s, abar = self.schedule, self.schedule.alphas_cumprod[step]
        if s.velocity[step]:
            x0 = np.sqrt(abar) * x - np.sqrt(1 - abar) * prediction
        else:
            x0 = (x - np.sqrt(1 - abar) * prediction) / np.sqrt(abar)
        if s.clip_sample is not None:
            return np.asarray(np.clip(x0, -s.clip_sample, s.clip_sample))
        if s.threshold is not None:
            axes = tuple(range(1, x0.ndim))
            bound = np.quantile(np.abs(x0), s.threshold.ratio, axis=axes, keepdims=True)
            bound = np.clip(bound, 1.0, s.threshold.largest)
            return np.asarray(np.clip(x0, -bound, bound) / bound)
        return np.asarray(x0)

    def advance(self, state: State, prediction: F64, step: int, sigma: float, noise: F64 | None) -> State:
        """The next state by the solver's table (`solvers.compile_table`): all tensors (N, C, H, W) float64.

        Args:
            prediction: guided, of e (or of v, at steps of `NoiseSchedule.velocity`).
            sigma: sigma' (NoiseSchedule.recalibrated_sigmas), in the place of the table's own.
            noise: z, or None where no noise is injected.
        """
        rows = self.schedule.table[step]
        terms = {CLEAN: self.clean(state.x, prediction, step), PREDICTION: prediction, STATE: state.x}
        terms |= {KEPT + i: value for i, value in enumerate(state.kept)}
        following, *kept = (_total(row, terms, state.x) for row in rows)
        if noise is not None:
            following = following + sigma * noise
        return State(following, tuple(kept))

    def draws(self, step: int) -> bool:
        """Whether a step takes noise from the source: wherever the schedule's own sigma is above 0, so that
        recalibration does not shift the stream of later steps."""
        return bool(self.schedule.table[step, 0, NOISE] > 0)

    def replay(self, states: Floats, predictions: Floats, source: NoiseSource, n: int) -> State:
        """The state before step n of a run whose x and predictions, (T, N, C, H, W), are known.

        What a solver keeps is found from them, and the last step is taken again; `source` has then given
        what those steps take.
        """
        state, known = self.begin(source), range(len(states))
        for step in range(n):
            noise = source.draw() if self.draws(step) else None
            if self.schedule.kept or step + 1 not in known:
                x, e = (np.asarray(values[step], np.float64) for values in (states, predictions))
                state = self.advance(State(x, state.kept), e, step, float(self.schedule.sigmas[step]), noise)
        return State(np.asarray(states[n], np.float64), state.kept) if n in known else state

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
        state = self.begin(source)
        injected = self.schedule.sigmas if sigmas is None else sigmas
        for step in range(len(self)):
            epsilon = self.predict(engine_at(step), state.x, step, conditions)
            if on_step is not None:
                on_step(step, state.x, epsilon)
            noise = source.draw() if self.draws(step) else None
            state = self.advance(state, epsilon, step, float(injected[step]), noise)
        return state.x


def _total(row: F64, terms: Mapping[int, F64], like: F64) -> F64:
    """The sum of the terms, each times its entry of a row of the table; those of 0 are left out."""
    total: F64 | None = None
    for column, value in terms.items():
        if row[column]:
            total = row[column] * value if total is None else total + row[column] * value
    return np.zeros_like(like) if total is None else total
