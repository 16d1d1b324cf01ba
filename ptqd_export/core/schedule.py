"""NoiseSchedule: what a sampler needs to know about the diffusion process, step by step.

Axis T is sampling order everywhere: row 0 is the noisiest step. The notation is that of DDIM (Song et al.
2021): abar_t = alphas_cumprod[t].
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import numpy.typing as npt

from ..errors import ModelError, RecipeError
from ..typed import read_typed

F64 = npt.NDArray[np.float64]
MAX_TRAIN_TIMESTEPS = 100_000
"""Most train timesteps: far above any model's, so that no file can exhaust memory."""
TINY = 1e-9
"""Least distance of alphas_cumprod from 0 and 1, at which noise or signal would be nothing."""
PREDICTION_TYPES = ("epsilon", "v_prediction", "sample")


@dataclass(frozen=True)
class NoiseSchedule:
    """The steps of one sampling run.

    Attributes:
        timesteps: train timesteps, int64 (T,), decreasing.
        alphas_cumprod: abar at each step, float64 (T,).
        alphas_cumprod_prev: abar at the next, cleaner step in sampling order, float64 (T,).
        eta: 0 is deterministic DDIM, 1 is DDPM (eq. 16 of DDIM).
        prediction_type: what the network outputs: "epsilon", "v_prediction" or "sample".
        clip_sample: bound of the predicted x_0 inside a step, or None.
        rederive_epsilon: after clipping x_0, recompute e from the clipped x_0 (DDPM's posterior mean) instead
            of keeping the prediction (DDIM).
    """

    timesteps: npt.NDArray[np.int64]
    alphas_cumprod: F64
    alphas_cumprod_prev: F64
    eta: float
    prediction_type: str = "epsilon"
    clip_sample: float | None = None
    rederive_epsilon: bool = False

    def __len__(self) -> int:
        return len(self.timesteps)

    @property
    def sigmas(self) -> F64:
        """Standard deviation of the noise that each step injects, (T,).

        sigma = eta sqrt((1 - abar_prev) / (1 - abar)) sqrt(1 - abar / abar_prev)
        """
        a, p = self.alphas_cumprod, self.alphas_cumprod_prev
        return np.asarray(self.eta * np.sqrt(np.maximum(0.0, (1 - p) / (1 - a) * (1 - a / p))))

    @property
    def epsilon_gains(self) -> F64:
        """The factor c_i by which a step multiplies e, (T,).

        c = sqrt(1 - abar_prev - sigma^2) - sqrt(abar_prev (1 - abar) / abar)
        """
        a, p = self.alphas_cumprod, self.alphas_cumprod_prev
        return np.asarray(np.sqrt(np.maximum(0.0, 1 - p - self.sigmas**2)) - np.sqrt(p * (1 - a) / a))

    @property
    def snr(self) -> F64:
        """SNR_F of the forward process, (T,): abar / (1 - abar) (PTQD, section 3.4)."""
        return self.alphas_cumprod / (1 - self.alphas_cumprod)

    def recalibrated_sigmas(self, var: F64) -> F64:
        """The recalibrated sigma' = sqrt(max(0, sigma^2 - c^2 var)), (T,).

        This is PTQD eq. 12, generalised to any eta and any affine correction. A step computes
        x_prev = A x_t + c e + sigma z, with A = sqrt(abar_prev / abar). With a quantized network, corrected
        or not, ec = m e + n + const, where n is uncorrelated with e: with D = k e + D' and ec = g eq + o, m
        is g (1 + k) and n is g D'. So

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
        sigma' there as well, and what was removed re-enters.) For DDPM, sigma'^2 is
        sigma^2 - beta^2 / (alpha (1 - abar)) var.

        Args:
            var: variance (T,) of the corrected prediction that e does not explain, `Correction.var`.
        """
        return np.asarray(
            np.sqrt(np.maximum(0.0, self.sigmas**2 - self.epsilon_gains**2 * np.asarray(var, np.float64)))
        )

    def epsilon_coefficients(self) -> tuple[F64, F64]:
        """(a, b), each (T,): epsilon = a * output + b * x_t, for the schedule's prediction type."""
        alpha, sigma = np.sqrt(self.alphas_cumprod), np.sqrt(1 - self.alphas_cumprod)
        if self.prediction_type == "epsilon":
            return np.ones(len(self)), np.zeros(len(self))
        if (
            self.prediction_type == "v_prediction"
        ):  # v = alpha e - sigma x0, x_t = alpha x0 + sigma e  (Salimans & Ho 2022)
            return alpha, sigma
        return -alpha / sigma, 1 / sigma

    def to_plain(self) -> dict[str, Any]:
        """JSON-ready form; floats survive a round trip exactly."""
        return {
            "timesteps": self.timesteps.tolist(),
            "alphas_cumprod": self.alphas_cumprod.tolist(),
            "alphas_cumprod_prev": self.alphas_cumprod_prev.tolist(),
            "eta": self.eta,
            "prediction_type": self.prediction_type,
            "clip_sample": self.clip_sample,
            "rederive_epsilon": self.rederive_epsilon,
        }

    @classmethod
    def from_plain(cls, data: Any) -> NoiseSchedule:
        """From `to_plain`'s form, which may come from anywhere.

        Raises:
            RecipeError: a wrong type, or values that no schedule can have.
        """
        plain = read_typed(_Plain, data, "schedule")
        t = plain.timesteps
        a, p = (np.asarray(v, np.float64) for v in (plain.alphas_cumprod, plain.alphas_cumprod_prev))
        for ok, message in (
            (1 <= len(t) == len(a) == len(p), f"{len(t)} timesteps, {len(a)} and {len(p)} alphas_cumprod"),
            (all(0 <= step < 2**63 for step in t), "a timestep outside [0, 2^63)"),
            (bool(((a >= TINY) & (a <= 1 - TINY)).all()), f"alphas_cumprod outside [{TINY}, 1 - {TINY}]"),
            (bool(((p >= TINY) & (p <= 1)).all()), f"alphas_cumprod_prev outside [{TINY}, 1]"),
            (0 <= plain.eta <= 1, f"eta {plain.eta}, outside [0, 1]"),
            (plain.clip_sample is None or plain.clip_sample > 0, f"clip_sample {plain.clip_sample}"),
        ):
            if not ok:
                raise RecipeError(f"the schedule has {message}")
        steps = np.asarray(t, np.int64)
        return cls(steps, a, p, plain.eta, plain.prediction_type, plain.clip_sample, plain.rederive_epsilon)

    @classmethod
    def from_config(
        cls, config: Mapping[str, Any], n_steps: int, eta: float, solver: str = "ddim"
    ) -> NoiseSchedule:
        """From a diffusers scheduler config: DDIM, DDPM or any other over discrete train timesteps.

        Args:
            config: the scheduler config.
            n_steps: number of sampling steps.
            eta: 0 is DDIM, 1 is DDPM.
            solver: "ddim" or "ddpm".
        Raises:
            ModelError: the config holds a setting that is not supported.
            RecipeError: n_steps or eta is out of range.
        """
        n_train = int(config.get("num_train_timesteps", 1000))
        if not 1 <= n_train <= MAX_TRAIN_TIMESTEPS:
            raise ModelError(
                f"the scheduler config says num_train_timesteps {n_train}: expected 1 to "
                f"{MAX_TRAIN_TIMESTEPS}"
            )
        if not 1 <= n_steps <= n_train:
            raise RecipeError(
                f"n_steps is {n_steps}: give 1 to {n_train}, the scheduler's num_train_timesteps"
            )
        if not 0.0 <= eta <= 1.0:
            raise RecipeError(f"eta is {eta}: give a value in [0, 1] (0 is DDIM, 1 is DDPM)")
        for key in ("thresholding", "rescale_betas_zero_snr", "use_karras_sigmas"):
            if config.get(key):
                raise ModelError(
                    f"the scheduler config sets {key}, which is not supported: set it to false if the model "
                    "allows"
                )
        prediction_type = str(config.get("prediction_type", "epsilon"))
        if prediction_type not in PREDICTION_TYPES:
            raise ModelError(
                f"the scheduler config says prediction_type {prediction_type!r}: expected one of "
                f"{', '.join(PREDICTION_TYPES)}"
            )
        if str(config.get("variance_type") or "fixed_small").startswith("learned"):
            raise ModelError(
                "the scheduler config says a learned variance, which is not supported: use a model that "
                "predicts the noise alone"
            )
        if solver == "ddpm" and config.get("variance_type") == "fixed_large":
            raise ModelError(
                "the scheduler config says variance_type fixed_large, which solver ddpm does not compute: "
                "use solver ddim with eta 1"
            )
        abar = np.asarray(np.cumprod(1.0 - _betas(config, n_train)), np.float64)
        timesteps = _timesteps(config, n_train, n_steps)
        if config.get("_class_name") == "DDPMScheduler" or config.get("set_alpha_to_one", True):
            final = 1.0
        else:
            final = float(abar[0])
        a = abar[timesteps]
        prev_t = timesteps - n_train // n_steps
        if str(config.get("timestep_spacing", "leading")) != "leading":
            prev_t = np.append(timesteps[1:], -1)
        prev: F64 = np.where(prev_t >= 0, abar[np.maximum(prev_t, 0)], final)
        clips = config.get(
            "clip_sample", config.get("_class_name") in ("DDIMScheduler", "DDPMScheduler")
        )  # diffusers' default
        clip = float(config.get("clip_sample_range", 1.0)) if clips else None
        return cls(timesteps, a, prev, float(eta), prediction_type, clip, solver == "ddpm")


@dataclass(frozen=True)
class _Plain:
    """The form of `NoiseSchedule.to_plain`, typed."""

    timesteps: tuple[int, ...]
    alphas_cumprod: tuple[float, ...]
    alphas_cumprod_prev: tuple[float, ...]
    eta: float
    prediction_type: Literal["epsilon", "v_prediction", "sample"]
    clip_sample: float | None
    rederive_epsilon: bool


def _betas(config: Mapping[str, Any], n: int) -> F64:
    if config.get("trained_betas") is not None:
        betas = np.asarray(config["trained_betas"], np.float64)
        if betas.shape != (n,):
            raise ModelError(f"the scheduler config has {betas.size} trained_betas for {n} train timesteps")
        return betas
    kind = str(config.get("beta_schedule", "linear"))
    start, end = float(config.get("beta_start", 1e-4)), float(config.get("beta_end", 0.02))
    if kind == "linear":
        return np.linspace(start, end, n)
    if kind == "scaled_linear":
        return np.asarray(np.linspace(math.sqrt(start), math.sqrt(end), n) ** 2)
    if kind == "squaredcos_cap_v2":
        u = np.arange(n + 1) / n
        bar = np.cos((u + 0.008) / 1.008 * math.pi / 2) ** 2
        return np.asarray(np.minimum(1 - bar[1:] / bar[:-1], 0.999))
    raise ModelError(
        f"the scheduler config says beta_schedule {kind!r}: expected linear, scaled_linear, "
        "squaredcos_cap_v2 or trained_betas"
    )


def _timesteps(config: Mapping[str, Any], n_train: int, n_steps: int) -> npt.NDArray[np.int64]:
    spacing = str(config.get("timestep_spacing", "leading"))
    if spacing == "leading":
        t: npt.NDArray[np.floating | np.integer] = np.arange(n_steps)[::-1] * (n_train // n_steps) + int(
            config.get("steps_offset", 0)
        )
    elif spacing == "trailing":
        t = np.round(np.arange(n_train, 0, -n_train / n_steps)) - 1
    elif spacing == "linspace":
        t = np.linspace(0, n_train - 1, n_steps).round()[::-1]
    else:
        raise ModelError(
            f"the scheduler config says timestep_spacing {spacing!r}: expected leading, trailing or linspace"
        )
    timesteps = t.astype(np.int64)
    if timesteps.max() >= n_train or timesteps.min() < 0:
        raise ModelError(
            f"timesteps {timesteps.min()}..{timesteps.max()} leave the scheduler's 0..{n_train - 1}: lower "
            "steps_offset or n_steps"
        )
    return timesteps
