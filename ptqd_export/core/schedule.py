"""NoiseSchedule: what a sampler needs to know about the diffusion process, evaluation by evaluation.

Axis T is sampling order everywhere: row 0 is the noisiest. A row is a step, which is one evaluation of the
network: solvers that evaluate more often than they advance have more rows than `n_steps`, and their timesteps
may repeat. The notation is that of DDIM (Song et al. 2021): abar_t = alphas_cumprod[t].
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any, Literal

import numpy as np
import numpy.typing as npt

from ..errors import ModelError, RecipeError
from ..typed import read_typed, to_plain
from .scheduler_config import MAX_TRAIN_TIMESTEPS, Threshold, read_config
from .solvers import CLEAN, KEPT, NOISE, PREDICTION, STATE, Options, Solver, compile_table

F64 = npt.NDArray[np.float64]
TINY = 1e-9
"""Least distance of alphas_cumprod from 0 and 1, at which noise or signal would be nothing."""
NO_SIGNAL = 1e-6
"""abar below which e says next to nothing of x_0: a network of v or x_0 is then taken to predict v."""
LARGEST = 1e9
"""Of all numbers in a table."""


@dataclass(frozen=True)
class NoiseSchedule:
    """The steps of one sampling run, and the solver that takes them.

    Attributes:
        timesteps: what the network is told, (T,): int64, or float32 where a solver evaluates between train
            timesteps.
        alphas_cumprod: abar at each evaluation, float64 (T,).
        alphas_cumprod_from: abar from which its update leads, (T,): another one where the first steps of
            PNDM go back.
        alphas_cumprod_prev: abar to which it leads, (T,).
        eta: 0 is deterministic DDIM, 1 as noisy as DDPM (eq. 16 of DDIM); 1 for ddpm, 0 for others.
        prediction_type: what the network outputs: "epsilon", "v_prediction" or "sample".
        clip_sample: bound of the predicted x_0 inside a step, or None.
        threshold: dynamic thresholding of x_0, or None.
        solver, options: what makes the next state.
        n_steps: steps that were asked for.
        start: standard deviation of the first state, in (0, 1].
    """

    timesteps: npt.NDArray[np.int64] | npt.NDArray[np.float32]
    alphas_cumprod: F64
    alphas_cumprod_from: F64
    alphas_cumprod_prev: F64
    eta: float
    prediction_type: str = "epsilon"
    clip_sample: float | None = None
    threshold: Threshold | None = None
    solver: Solver = "ddim"
    options: Options = field(default_factory=Options)
    n_steps: int = 0
    start: float = 1.0

    def __len__(self) -> int:
        return len(self.timesteps)

    @cached_property
    def table(self) -> F64:
        """The solver's table, (T, 1 + S, 4 + S): see `solvers.compile_table`."""
        return compile_table(self)

    @property
    def kept(self) -> int:
        """Tensors that the solver keeps between evaluations."""
        return int(self.table.shape[1]) - 1

    @property
    def bounded(self) -> bool:
        """Whether x_0 is clipped, by a fixed bound or by one of its own."""
        return self.clip_sample is not None or self.threshold is not None

    @property
    def velocity(self) -> npt.NDArray[np.bool_]:
        """Steps at which v stands in the place of epsilon, (T,): there is no signal left to divide by."""
        return (self.alphas_cumprod < NO_SIGNAL) & (self.prediction_type != "epsilon")

    @cached_property
    def clean_coefficients(self) -> tuple[F64, F64]:
        """(u, w), each (T,): x_0 = u x + w y, where y is the prediction of epsilon, or of v."""
        alpha, sigma = np.sqrt(self.alphas_cumprod), np.sqrt(1 - self.alphas_cumprod)
        with np.errstate(all="ignore"):
            return (
                np.where(self.velocity, alpha, 1 / alpha),
                np.where(self.velocity, -sigma, -sigma / alpha),
            )

    @cached_property
    def linear_table(self) -> F64:
        """The table with x_0 written out, as if nothing were clipped: (T, 1 + S, 4 + S), column CLEAN 0."""
        u, w = self.clean_coefficients
        table = self.table.copy()
        table[:, :, STATE] += u[:, None] * table[:, :, CLEAN]
        table[:, :, PREDICTION] += w[:, None] * table[:, :, CLEAN]
        table[:, :, CLEAN] = 0
        return table

    @property
    def sigmas(self) -> F64:
        """Standard deviation of the noise that each step injects, (T,).

        For DDIM, sigma = eta sqrt((1 - abar_prev) / (1 - abar)) sqrt(1 - abar / abar_prev).
        """
        return self.table[:, 0, NOISE]

    @cached_property
    def epsilon_gains(self) -> F64:
        """The factor c_i by which an error of the prediction of step i moves the state, (T,).

        For DDIM it is that of e in the next state:
        c = sqrt(1 - abar_prev - sigma^2) - sqrt(abar_prev (1 - abar) / abar).

        Solvers that keep predictions use each of them in several steps, with different signs, or undo a step
        and take it again. What counts is what is left once that is over. It is found by following the error
        through the table to the end, with the network's answers as they are: then x / alpha moves by what
        the entries add up to and stays there, as in d(x / alpha) = e d(sigma / alpha).
        That sum, times alpha of the level that the step leads to, is c_i. (How later answers of the network
        take it back is not known here; it is measured, see `core.sensitivity`.)
        """
        direct = self.linear_table[:, :, PREDICTION]
        if not self.kept:
            return np.asarray(direct[:, 0])
        alphas = np.sqrt(np.append(self.alphas_cumprod[1:], self.alphas_cumprod_prev[-1]))
        onward = np.zeros(1 + self.kept)
        onward[0] = 1 / alphas[-1]
        gains = np.zeros(len(self))
        for i in reversed(range(len(self))):
            gains[i] = onward @ direct[i] * alphas[i]
            onward = onward @ self._onward(self.linear_table[i])
        return gains

    @staticmethod
    def _onward(rows: F64) -> F64:
        """How state and kept tensors follow from those before, (1 + S, 1 + S), of one step's table."""
        return np.asarray(rows[:, [STATE, *range(KEPT, rows.shape[1])]])

    @property
    def snr(self) -> F64:
        """SNR_F of the forward process, (T,): abar / (1 - abar) (PTQD, section 3.4)."""
        return self.alphas_cumprod / (1 - self.alphas_cumprod)

    def recalibrated_sigmas(self, var: F64) -> F64:
        """The recalibrated sigma' = sqrt(max(0, sigma^2 - what the predictions' noise adds)), (T,).

        This is PTQD eq. 12, generalised to any solver that injects noise and any affine correction. A step
        computes x_prev = A x_t + c e + sigma z. With a quantized network, corrected or not, ec = m e + n +
        const, where n is uncorrelated with e: with D = k e + D' and ec = g eq + o, m is g (1 + k) and n is
        g D'. So

            x_prev = [A x_t + c (m e + const)] + [c n + sigma' z]

        The first bracket is a function of x_t, the second is noise about it. It has the variance of the
        full-precision step, sigma^2, if sigma'^2 = sigma^2 - c^2 Var(n): var = g^2 Var(D').

        What ec is wrong by in the mean, (m - 1) e, is no noise, and is not taken off: a step that always
        predicts too little or too much does the same to each sample, which less noise does not undo. So an
        uncorrected prediction gives Var(D') and not Var(D), which holds k^2 Var(e) besides. The best linear
        estimator has m = rho^2 < 1 and gives g^2 Var(D') = rho^2 E(ec - e)^2. That Var(ec) < Var(e) there
        does not leave room for more noise: x_t and e are correlated and c < 0, so that a step which shrinks e
        takes less noise off x_t.

        Only the injected noise changes: the direction term keeps the original sigma. (The official code puts
        sigma' there as well, and what was removed re-enters.) c is that of the solver:

            ddim             sqrt(1 - abar_prev - sigma^2) - sqrt(abar_prev (1 - abar) / abar)
            ddpm             -beta / sqrt(alpha (1 - abar)), beta = 1 - alpha = 1 - abar / abar_prev; for
                             fixed_large the same, with sigma^2 = beta
            euler-ancestral  alpha_prev (sigma_down - sigma), these as sigma / alpha: what Euler's step to
                             sigma_down does to e; the noise is alpha_prev sigma_up
            lcm              -sqrt(abar_prev) c_out sqrt((1 - abar) / abar), with sigma^2 = 1 - abar_prev
            sde-dpmsolver++  -alpha_t (1 - e^-2h) (sigma_s / alpha_s), times 1 + 1 / (2 r) in second order

        The last one keeps x_0 predictions and extrapolates: n_k enters the next state by c_k, and the one
        after it again, by b_k through what is kept. The second time it is not fresh: the state holds c_k n_k
        already. The step from x_k adds to the variance

            c_k^2 v_k + b_k-1^2 v_k-1 + 2 P_k c_k-1 b_k-1 v_k-1

        where v is var and P_k is how much of a deviation of x_k is left in x_k+1. c and b have other signs:
        the cross term is negative, and second order adds less than its c alone says. P_k is the table's
        factor of x at a given x_0: a denoiser's x_0 hardly follows white noise in x. (It follows it where
        little noise is left; P is larger there, and slightly too much is taken off.) The sum is found with
        the covariance of state and kept tensors, Q -> F Q F' + G v G', with F and G by the table: what is
        added is Q_xx - F_xx^2 Q_xx of before.

        Args:
            var: variance (T,) of the corrected prediction that e does not explain, `Correction.var`.
        """
        var = np.asarray(var, np.float64)
        if not self.kept:
            added = self.epsilon_gains**2 * var
        else:
            added = self._added(var)
        return np.asarray(np.sqrt(np.maximum(0.0, self.sigmas**2 - added)))

    def _added(self, var: F64) -> F64:
        """Variance that each step adds to the state, (T,), beyond what the state had before."""
        w = self.clean_coefficients[1]
        covariance = np.zeros((1 + self.kept, 1 + self.kept))
        added = np.zeros(len(self))
        for i, rows in enumerate(self.table):
            f = self._onward(rows)
            g = rows[:, PREDICTION] + w[i] * rows[:, CLEAN]
            before = covariance[0, 0]
            covariance = f @ covariance @ f.T + var[i] * np.outer(g, g)
            added[i] = covariance[0, 0] - f[0, 0] ** 2 * before
        return added

    def epsilon_coefficients(self) -> tuple[F64, F64]:
        """(a, b), each (T,): epsilon = a * output + b * x_t, for the schedule's prediction type.

        At steps of `velocity` it is v that these give.
        """
        alpha, sigma = np.sqrt(self.alphas_cumprod), np.sqrt(1 - self.alphas_cumprod)
        if self.prediction_type == "epsilon":
            return np.ones(len(self)), np.zeros(len(self))
        if (
            self.prediction_type == "v_prediction"
        ):  # v = alpha e - sigma x0, x_t = alpha x0 + sigma e  (Salimans & Ho 2022)
            return np.where(self.velocity, 1.0, alpha), np.where(self.velocity, 0.0, sigma)
        return (
            np.where(self.velocity, -1 / sigma, -alpha / sigma),
            np.where(self.velocity, alpha / sigma, 1 / sigma),
        )

    def to_plain(self) -> dict[str, Any]:
        """JSON-ready form; floats survive a round trip exactly."""
        return {
            "timesteps": self.timesteps.tolist(),
            "alphas_cumprod": self.alphas_cumprod.tolist(),
            "alphas_cumprod_from": self.alphas_cumprod_from.tolist(),
            "alphas_cumprod_prev": self.alphas_cumprod_prev.tolist(),
            "eta": self.eta,
            "prediction_type": self.prediction_type,
            "clip_sample": self.clip_sample,
            "threshold": None if self.threshold is None else list(self.threshold),
            "solver": self.solver,
            "options": to_plain(self.options),
            "n_steps": self.n_steps,
            "start": self.start,
        }

    @classmethod
    def from_plain(cls, data: Any) -> NoiseSchedule:
        """From `to_plain`'s form, which may come from anywhere.

        Raises:
            RecipeError: a wrong type, or values that no schedule can have.
        """
        plain = read_typed(_Plain, data, "schedule")
        t, o, threshold = plain.timesteps, plain.options, plain.threshold
        a, f, p = (
            np.asarray(v, np.float64)
            for v in (plain.alphas_cumprod, plain.alphas_cumprod_from, plain.alphas_cumprod_prev)
        )
        least = TINY if plain.prediction_type == "epsilon" else 0.0  # v says what x_0 is where e does not
        for ok, message in (
            (
                1 <= len(t) == len(a) == len(f) == len(p),
                f"{len(t)} timesteps, {len(a)}, {len(f)} and {len(p)} alphas_cumprod",
            ),
            (all(0 <= s <= MAX_TRAIN_TIMESTEPS for s in t), f"a timestep outside [0, {MAX_TRAIN_TIMESTEPS}]"),
            (
                all(bool(((v >= least) & (v <= 1 - TINY)).all()) for v in (a, f)),
                f"alphas_cumprod outside [{least:g}, 1 - {TINY}]",
            ),
            (bool(((p >= TINY) & (p <= 1)).all()), f"alphas_cumprod_prev outside [{TINY}, 1]"),
            (0 <= plain.eta <= 1, f"eta {plain.eta}, outside [0, 1]"),
            (plain.clip_sample is None or plain.clip_sample > 0, f"clip_sample {plain.clip_sample}"),
            (
                threshold is None or (0 < threshold[0] <= 1 and threshold[1] >= 1),
                f"threshold {threshold}, outside (0, 1] and [1, inf)",
            ),
            (1 <= o.order <= 3, f"order {o.order}, outside [1, 3]"),
            (len(o.disable_corrector) <= len(t), "more steps without corrector than there are"),
            (0 <= o.timestep_scaling <= LARGEST, f"timestep_scaling {o.timestep_scaling}"),
            (1 <= plain.n_steps <= MAX_TRAIN_TIMESTEPS, f"n_steps {plain.n_steps}"),
            (0 < plain.start <= 1, f"start {plain.start}, outside (0, 1]"),
        ):
            if not ok:
                raise RecipeError(f"the schedule has {message}")
        whole = all(step == int(step) for step in t)
        schedule = cls(
            np.asarray(t, np.int64) if whole else np.asarray(t, np.float32),
            a,
            f,
            p,
            plain.eta,
            plain.prediction_type,
            plain.clip_sample,
            None if threshold is None else Threshold(*threshold),
            plain.solver,
            o,
            plain.n_steps,
            plain.start,
        )
        if not schedule.usable:
            raise RecipeError(
                f"the schedule has values of which solver {plain.solver} makes numbers that are not "
                f"finite, or above {LARGEST:g}"
            )
        return schedule

    @property
    def usable(self) -> bool:
        """Whether all that the solver makes of the levels is finite, and no larger than LARGEST."""
        try:
            return all(bool((np.abs(table) <= LARGEST).all()) for table in (self.table, self.linear_table))
        except (ArithmeticError, ValueError, np.linalg.LinAlgError, LookupError):
            return False

    @classmethod
    def from_config(
        cls, config: Mapping[str, Any], n_steps: int, eta: float = 0.0, solver: Solver | None = None
    ) -> NoiseSchedule:
        """From a diffusers scheduler config over discrete train timesteps.

        Args:
            config: the scheduler config.
            n_steps: number of sampling steps.
            eta: of ddim; 0 for others.
            solver: None is the one that the config's class names.
        Raises:
            ModelError: the config holds a setting that is not supported.
            RecipeError: n_steps or eta is out of range.
        """
        schedule = cls(**vars(read_config(config, n_steps, eta, solver)))
        if not schedule.usable:
            raise ModelError(
                f"solver {schedule.solver} cannot take {n_steps} steps by this scheduler config (its numbers "
                "are not finite): give another n_steps, or another --solver"
            )
        return schedule


@dataclass(frozen=True)
class _Plain:
    """The form of `NoiseSchedule.to_plain`, typed."""

    timesteps: tuple[float, ...]
    alphas_cumprod: tuple[float, ...]
    alphas_cumprod_from: tuple[float, ...]
    alphas_cumprod_prev: tuple[float, ...]
    eta: float
    prediction_type: Literal["epsilon", "v_prediction", "sample"]
    clip_sample: float | None
    threshold: tuple[float, float] | None
    solver: Solver
    options: Options
    n_steps: int
    start: float
