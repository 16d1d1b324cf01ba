"""Diffusers' scheduler configs, read as diffusers 0.42 reads them: the noise levels of a run, and its solver.

A solver means the scheduler class of that name, made from the model's config: keys that are there count,
others have the class's defaults; those that decide the diffusion process (betas) have the defaults of the
config's own class.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple, get_args

import numpy as np
import numpy.typing as npt

from ..errors import ModelError, RecipeError
from ..typed import brief
from .solvers import Options, Solver
from .spacing import DPM, Spacing

F64 = npt.NDArray[np.float64]
Config = Mapping[str, Any]
MAX_TRAIN_TIMESTEPS = 100_000
"""Most train timesteps: far above any model's, so that no file can exhaust memory."""
PREDICTION_TYPES = ("epsilon", "v_prediction", "sample")
SOLVERS: tuple[Solver, ...] = get_args(Solver)
CLASSES: Mapping[str, Solver] = {
    "DDIMScheduler": "ddim",
    "DDIMParallelScheduler": "ddim",
    "DDPMScheduler": "ddpm",
    "DDPMParallelScheduler": "ddpm",
    "PNDMScheduler": "pndm",
    "DPMSolverMultistepScheduler": "dpmsolver++",
    "EulerDiscreteScheduler": "euler",
    "EulerAncestralDiscreteScheduler": "euler-ancestral",
    "HeunDiscreteScheduler": "heun",
    "UniPCMultistepScheduler": "unipc",
    "LCMScheduler": "lcm",
}
SAME_PROCESS = (
    "DEISMultistepScheduler", "DPMSolverSinglestepScheduler", "DPMSolverSDEScheduler", "IPNDMScheduler",
    "KDPM2DiscreteScheduler", "KDPM2AncestralDiscreteScheduler", "LMSDiscreteScheduler", "SASolverScheduler",
    "TCDScheduler", "DDIMInverseScheduler", "DPMSolverMultistepInverseScheduler",
)  # fmt: skip
"""Other classes over the same process: their solvers are not known, but any of ours can take their place."""
CLIPS = ("DDIMScheduler", "DDIMParallelScheduler", "DDPMScheduler", "DDPMParallelScheduler")
"""Classes that clip x_0 unless they are told not to."""
ZERO_SNR = 2.0**-24
"""abar that diffusers puts in the place of 0 where a solver divides by it."""
REFUSED = (
    "use_exponential_sigmas", "use_beta_sigmas", "use_lu_lambdas", "use_flow_sigmas", "use_dynamic_shifting",
    "shift_terminal", "solver_p",
)  # fmt: skip


class Threshold(NamedTuple):
    """Dynamic thresholding (Saharia et al. 2022): each sample's x_0 is clipped to the quantile `ratio` of its
    absolute values, held in [1, largest], and divided by it."""

    ratio: float
    largest: float


@dataclass(frozen=True)
class Read:
    """What a config says of a run; the fields are those of `NoiseSchedule`."""

    solver: Solver
    n_steps: int
    timesteps: npt.NDArray[Any]
    alphas_cumprod: F64
    alphas_cumprod_from: F64
    alphas_cumprod_prev: F64
    eta: float
    start: float
    prediction_type: str
    clip_sample: float | None
    threshold: Threshold | None
    options: Options


def default_solver(config: Config) -> Solver:
    """The solver that a config's class names; ddim where it names none.

    Raises:
        ModelError: a class that is not supported.
    """
    name = config.get("_class_name")
    if name is None:
        return "ddim"
    if name not in CLASSES:
        if name in SAME_PROCESS:
            raise ModelError(
                f"the scheduler config is of {brief(name)}, whose solver is not supported: set "
                f"sampler.solver (--solver) to one of {', '.join(SOLVERS)}"
            )
        raise _other_process(name)
    algorithm = config.get("algorithm_type", "dpmsolver++")
    if name == "DPMSolverMultistepScheduler" and algorithm == "sde-dpmsolver++":
        return "sde-dpmsolver++"
    return CLASSES[name]


def _other_process(name: object) -> ModelError:
    return ModelError(
        f"the scheduler config is of {brief(name)}, which is not of the discrete diffusion process that is "
        "supported (flow matching, EDM and VE are others): give a model that was trained for "
        f"{', '.join(CLASSES)}"
    )


def read_config(config: Config, n_steps: int, eta: float, solver: Solver | None) -> Read:
    """A run of a solver, by a config.

    Args:
        solver: None is the one that the config's class names.
    Raises:
        ModelError: the config holds a setting that is not supported.
        RecipeError: n_steps or eta is out of range.
    """
    name = config.get("_class_name")
    if name is not None and name not in CLASSES and name not in SAME_PROCESS:
        raise _other_process(name)
    solver = solver or default_solver(config)
    n_train = int(config.get("num_train_timesteps", 1000))
    if not 1 <= n_train <= MAX_TRAIN_TIMESTEPS:
        raise ModelError(
            f"the scheduler config says num_train_timesteps {n_train}: expected 1 to {MAX_TRAIN_TIMESTEPS}"
        )
    if not 1 <= n_steps <= n_train:
        raise RecipeError(f"n_steps is {n_steps}: give 1 to {n_train}, the scheduler's num_train_timesteps")
    if not 0.0 <= eta <= 1.0:
        raise RecipeError(f"eta is {eta}: give a value in [0, 1] (0 is DDIM, 1 is DDPM)")
    if solver != "ddim" and eta != 0 and (solver, eta) != ("ddpm", 1):
        raise RecipeError(
            f"eta is {eta}, but it belongs to ddim: leave it out with {solver}, or "
            "set sampler.solver (--solver) to ddim"
        )
    prediction_type = _check(config, solver)
    abar = np.asarray(np.cumprod(1.0 - _betas(config, n_train)), np.float64)
    if config.get("rescale_betas_zero_snr"):
        abar = _zero_snr(abar, solver)
    spacing = Spacing(config, solver, n_train, n_steps, abar)
    timesteps, at, start, to = spacing.grid()
    low, high = float(np.min(timesteps)), float(np.max(timesteps))
    if high > n_train - 1 or low < 0:
        raise ModelError(
            f"timesteps {low:g}..{high:g} leave the scheduler's 0..{n_train - 1}: lower steps_offset or "
            "n_steps"
        )
    scaled = solver in ("euler", "euler-ancestral", "heun") and spacing.name != "leading"
    thresholds = config.get("thresholding") and solver in ("ddim", "ddpm", "lcm", "unipc", *DPM)
    clips = config.get("clip_sample", name in CLIPS) and solver in ("ddim", "ddpm", "heun", "lcm")
    ratio, largest = (float(config.get(*key)) for key in _THRESHOLD)
    if thresholds and not (0 < ratio <= 1 and largest >= 1):
        raise ModelError(
            f"the scheduler config says dynamic_thresholding_ratio {ratio:g} and sample_max_value {largest:g}"
            ": expected a ratio in (0, 1] and a value of 1 or more"
        )
    return Read(
        solver,
        n_steps,
        np.asarray(timesteps, np.int64 if (timesteps == np.round(timesteps)).all() else np.float32),
        np.asarray(at, np.float64),
        np.asarray(start, np.float64),
        np.asarray(to, np.float64),
        1.0 if solver == "ddpm" else float(eta),
        float(np.sqrt(1 - at[0])) if scaled else 1.0,
        prediction_type,
        float(config.get("clip_sample_range", 1.0)) if clips and not thresholds else None,
        Threshold(ratio, largest) if thresholds else None,
        _options(config, solver),
    )


_THRESHOLD = (("dynamic_thresholding_ratio", 0.995), ("sample_max_value", 1.0))


def _check(config: Config, solver: Solver) -> str:
    """Refuse what is not supported.

    Returns:
        the prediction type.
    """
    for key in REFUSED:
        if config.get(key):
            raise ModelError(
                f"the scheduler config sets {key}, which is not supported: set it to false if the model "
                "allows"
            )
    prediction_type = str(config.get("prediction_type", "epsilon"))
    allowed = PREDICTION_TYPES[: 2 if solver in ("pndm", "euler-ancestral") else 3]
    if prediction_type not in allowed:
        raise ModelError(
            f"the scheduler config says prediction_type {brief(prediction_type)}: expected one of "
            f"{', '.join(allowed)}" + (f" with solver {solver}" if len(allowed) < 3 else "")
        )
    if solver == "ddpm" and learns_variance(config):
        raise ModelError(
            "the scheduler config says a learned variance, which solver ddpm does not know: give another "
            "--solver, such as ddim, which needs the mean alone"
        )
    for key, wanted, solvers in (
        ("timestep_type", ("discrete",), ("euler",)),
        ("interpolation_type", ("linear",), ("euler",)),
        ("algorithm_type", ("dpmsolver++", "sde-dpmsolver++", "deis"), DPM),
        ("final_sigmas_type", ("zero", "sigma_min"), ("euler", "unipc", *DPM)),
        ("variance_type", ("fixed_small", "fixed_small_log", "fixed_large"), ("ddpm",)),
    ):
        value = config.get(key)
        if value is not None and value not in wanted and solver in solvers:
            raise ModelError(
                f"the scheduler config says {key} {brief(value)}, which solver {solver} does not know: "
                f"expected {' or '.join(wanted)}, or give another --solver"
            )
    if config.get("rescale_betas_zero_snr"):
        if solver in ("pndm", "heun"):
            raise ModelError(
                f"the scheduler config sets rescale_betas_zero_snr, which solver {solver} does not know: "
                "give another --solver, such as ddim"
            )
        if prediction_type == "epsilon" and solver in ("ddim", "ddpm", "lcm"):
            raise ModelError(
                f"the scheduler config sets rescale_betas_zero_snr, but epsilon says nothing where there is "
                f"noise alone, and solver {solver} cannot start there: it takes a model of v_prediction"
            )
    return prediction_type


def learns_variance(config: Config) -> bool:
    """Whether the network of a scheduler's config returns a variance beside its prediction."""
    return str(config.get("variance_type") or "fixed_small").startswith("learned")


def _options(config: Config, solver: Solver) -> Options:
    lower_order_final = bool(config.get("lower_order_final", True))
    if solver == "ddpm":
        return Options("fixed_large" if config.get("variance_type") == "fixed_large" else "fixed_small")
    if solver == "pndm":
        return Options("plms" if config.get("skip_prk_steps") else "prk")
    if solver == "lcm":
        return Options(timestep_scaling=float(config.get("timestep_scaling", 10.0)))
    if solver not in ("unipc", *DPM):
        return Options()
    order, most = int(config.get("solver_order", 2)), 3
    if not 1 <= order <= most:
        raise ModelError(f"the scheduler config says solver_order {order}: expected 1 to {most}")
    kind = config.get("solver_type")
    if solver == "unipc":
        without = tuple(int(step) for step in config.get("disable_corrector") or ())
        return Options(
            "bh1" if kind == "bh1" else "bh2",
            order,
            lower_order_final,
            disable_corrector=without,
            predict_x0=bool(config.get("predict_x0", True)),
        )
    return Options(
        "heun" if kind == "heun" else "midpoint",
        order,
        lower_order_final,
        euler_at_final=bool(config.get("euler_at_final", False)),
    )


def _betas(config: Config, n: int) -> F64:
    if config.get("trained_betas") is not None:
        betas = np.asarray(config["trained_betas"], np.float64)
        if betas.shape != (n,):
            raise ModelError(f"the scheduler config has {betas.size} trained_betas for {n} train timesteps")
        return betas
    name = config.get("_class_name")
    of_sd = name in ("LCMScheduler", "HeunDiscreteScheduler")
    kind = str(config.get("beta_schedule", "scaled_linear" if name == "LCMScheduler" else "linear"))
    start = float(config.get("beta_start", 0.00085 if of_sd else 1e-4))
    end = float(config.get("beta_end", 0.012 if of_sd else 0.02))
    if kind == "linear":
        return np.linspace(start, end, n)
    if kind == "scaled_linear":
        return np.asarray(np.linspace(math.sqrt(start), math.sqrt(end), n) ** 2)
    if kind == "sigmoid" and name in ("DDPMScheduler", "DDPMParallelScheduler"):
        return np.asarray((end - start) / (1 + np.exp(-np.linspace(-6, 6, n))) + start)
    if kind == "squaredcos_cap_v2":
        u = np.arange(n + 1) / n
        bar = np.cos((u + 0.008) / 1.008 * math.pi / 2) ** 2
        return np.asarray(np.minimum(1 - bar[1:] / bar[:-1], 0.999))
    raise ModelError(
        f"the scheduler config says beta_schedule {brief(kind)}: expected linear, scaled_linear, "
        "squaredcos_cap_v2 or trained_betas"
    )


def _zero_snr(abar: F64, solver: Solver) -> F64:
    """abar shifted and scaled so that the last one is 0 (Lin et al. 2023, algorithm 1)."""
    root = np.sqrt(abar)
    rescaled = ((root - root[-1]) * root[0] / (root[0] - root[-1])) ** 2
    if solver in ("euler", "euler-ancestral", "unipc", *DPM):
        rescaled[-1] = ZERO_SNR
    return np.asarray(rescaled)
