"""Every solver against diffusers' own scheduler, step by step: largest difference of what the network sees.

    python benchmarks/solvers.py [--model MODEL ...] [--write]

Both loops start from the same noise and draw the same noise; each calls the network at its own states.
Diffusers computes in float32. The network is a smooth function of x and t, or a trained model.
Differences are those of the network's input at every evaluation, and of the last state relative to its
largest value or 1.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from diffusers import (
    DDIMScheduler,
    DDPMScheduler,
    DPMSolverMultistepScheduler,
    EulerAncestralDiscreteScheduler,
    EulerDiscreteScheduler,
    HeunDiscreteScheduler,
    LCMScheduler,
    PNDMScheduler,
    UniPCMultistepScheduler,
)
from report import REFERENCE_MODEL, TEXT_MODEL, machine, table, write_section

from ptqd_export.core.model import ModelInfo
from ptqd_export.core.sampling import Sampling, State
from ptqd_export.core.schedule import NoiseSchedule

STEPS = (10, 20, 50)
LATENT = {"beta_schedule": "scaled_linear", "beta_start": 0.00085, "beta_end": 0.012}
"""Stable Diffusion's betas."""
ZERO_SNR = {"timestep_spacing": "trailing", "rescale_betas_zero_snr": True, "prediction_type": "v_prediction"}
PROMPT = "a photo of a horse"
Network = Callable[[np.ndarray, float], np.ndarray]


@dataclass(frozen=True)
class Case:
    """A scheduler of diffusers, and how it is set."""

    name: str
    scheduler: Any
    settings: Mapping[str, Any]
    eta: float = 0.0


CASES = (
    Case("ddim", DDIMScheduler, {"clip_sample": False, "steps_offset": 1, "set_alpha_to_one": False}),
    Case("ddim, eta 1, linspace", DDIMScheduler, {"clip_sample": True, "timestep_spacing": "linspace"}, 1.0),
    Case("ddim, trailing, thresholding", DDIMScheduler,
         {"timestep_spacing": "trailing", "thresholding": True, "sample_max_value": 2.0}),
    Case("ddim, zero SNR, v", DDIMScheduler, {"clip_sample": False, **ZERO_SNR}),
    Case("ddpm, fixed_small", DDPMScheduler, {}),
    Case("ddpm, fixed_large, v", DDPMScheduler,
         {"variance_type": "fixed_large", "prediction_type": "v_prediction", "clip_sample": False}),
    Case("pndm, plms", PNDMScheduler, {"skip_prk_steps": True, "steps_offset": 1}),
    Case("pndm, Runge-Kutta first, v", PNDMScheduler, {"prediction_type": "v_prediction"}),
    Case("dpmsolver++, 2M", DPMSolverMultistepScheduler, {}),
    Case("dpmsolver++, 2M, Karras", DPMSolverMultistepScheduler, {"use_karras_sigmas": True}),
    Case("dpmsolver++, third order, v", DPMSolverMultistepScheduler,
         {"solver_order": 3, "prediction_type": "v_prediction", "timestep_spacing": "leading"}),
    Case("sde-dpmsolver++, second order", DPMSolverMultistepScheduler, {"algorithm_type": "sde-dpmsolver++"}),
    Case("euler", EulerDiscreteScheduler, {"steps_offset": 1, "timestep_spacing": "leading"}),
    Case("euler, Karras, linspace", EulerDiscreteScheduler, {"use_karras_sigmas": True}),
    Case("euler, zero SNR, v", EulerDiscreteScheduler, ZERO_SNR),
    Case("euler-ancestral", EulerAncestralDiscreteScheduler, {}),
    Case("heun", HeunDiscreteScheduler, {}),
    Case("heun, Karras, clipped", HeunDiscreteScheduler, {"use_karras_sigmas": True, "clip_sample": True}),
    Case("unipc, bh2", UniPCMultistepScheduler, {}),
    Case("unipc, third order, bh1, x_0", UniPCMultistepScheduler,
         {"solver_order": 3, "solver_type": "bh1", "prediction_type": "sample",
          "final_sigmas_type": "sigma_min"}),
    Case("lcm", LCMScheduler, {}),
)  # fmt: skip


@dataclass(frozen=True)
class Compared:
    """Largest difference of the network's input at each evaluation, and of the end; tensors that are kept."""

    steps: tuple[float, ...]
    end: float
    kept: int

    @property
    def largest(self) -> float:
        return max(*self.steps, self.end)


@contextmanager
def drawing(scheduler: Any, draw: Callable[[], torch.Tensor]) -> Iterator[None]:
    """The scheduler's noise is what `draw` gives."""
    module = sys.modules[type(scheduler).__module__]
    names = [name for name in ("randn_tensor",) if hasattr(module, name)]
    before = {name: getattr(module, name) for name in names}
    for name in names:
        setattr(module, name, lambda *args, **kwargs: draw())
    try:
        yield
    finally:
        for name, value in before.items():
            setattr(module, name, value)


def compare(
    case: Case,
    n_steps: int,
    network: Network,
    shape: tuple[int, ...] = (3, 8, 8),
    betas: Any = LATENT,
    n: int = 2,
) -> Compared:
    """One case; the network takes x (N, C, H, W) and a timestep, and returns its output."""
    theirs = case.scheduler(**{**betas, **case.settings})
    theirs.set_timesteps(n_steps)
    config = {**theirs.config, "_class_name": case.scheduler.__name__}
    schedule = NoiseSchedule.from_config(config, n_steps, case.eta)
    sampling = Sampling(ModelInfo("compared", shape, (), ""), schedule)
    if np.abs(theirs.timesteps.numpy() - schedule.timesteps).max() > 0.01:
        raise SystemExit(f"{case.name}: diffusers has timesteps {theirs.timesteps.tolist()}")
    rng = np.random.default_rng(0)
    first = rng.standard_normal((n, *shape))
    a, b = schedule.epsilon_coefficients()
    x, state = torch.from_numpy(first) * float(theirs.init_noise_sigma), State(schedule.start * first)
    options = {"eta": case.eta} if case.eta else {}
    steps = []
    for k, t in enumerate(theirs.timesteps):
        z = rng.standard_normal(first.shape)
        seen = theirs.scale_model_input(x, t)
        steps.append(float(np.abs(seen.numpy() - state.x).max()))
        output = torch.from_numpy(network(seen.numpy(), float(t)))
        with drawing(theirs, lambda z=z: torch.from_numpy(z)):  # type: ignore[misc]
            x = theirs.step(output, t, x, **options).prev_sample.double()
        y = a[k] * network(state.x, float(schedule.timesteps[k])) + b[k] * state.x
        state = sampling.advance(state, y, k, float(schedule.sigmas[k]), z if sampling.draws(k) else None)
    end = x.numpy()
    return Compared(
        tuple(steps), float(np.abs(end - state.x).max() / max(1.0, np.abs(end).max())), schedule.kept
    )


def smooth(x: np.ndarray, t: float) -> np.ndarray:
    """A network that mixes three channels, in float64."""
    weights = 0.3 * np.random.default_rng(5).standard_normal((3, 3))
    mixed = np.einsum("ij,njhw->nihw", weights, np.asarray(x, np.float64))
    return np.asarray(np.tanh(mixed + 0.3 * np.sin(t / 150)) + 0.5 * x)


def trained(folder: Path) -> tuple[Network, tuple[int, ...], dict[str, Any]]:
    """A trained model for one class or prompt, its shape and its betas."""
    from ptqd_export.calibrate import open_parts, open_source
    from ptqd_export.recipe import Recipe

    recipe = Recipe.load(folder)
    source = open_source(recipe)
    found = source.network
    conditions = found.info.conditions([3] if found.info.labels else None, 1)
    conditions |= open_parts(recipe, source).encode([PROMPT])

    def network(x: np.ndarray, t: float) -> np.ndarray:
        own = {name: torch.from_numpy(np.repeat(value, len(x), 0)) for name, value in conditions.items()}
        sample = torch.from_numpy(np.asarray(x, np.float32))
        with torch.inference_mode():
            return found.module(sample, torch.full((len(x),), t), **own).double().numpy()

    keys = ("beta_schedule", "beta_start", "beta_end", "num_train_timesteps")
    return network, found.info.sample_shape, {k: v for k, v in found.scheduler_config.items() if k in keys}


def section(folders: Sequence[Path]) -> str:
    networks: dict[str, tuple[Any, ...]] = {"smooth function": (smooth,)}
    networks |= {folder.name: (*trained(folder), 1) for folder in folders}
    rows = []
    for case in CASES:
        row = [case.name]
        for arguments in networks.values():
            predicts_epsilon = case.settings.get("prediction_type", "epsilon") == "epsilon"
            if arguments[0] is not smooth and not predicts_epsilon:
                row += ["-"] * len(STEPS)
                continue
            found = [compare(case, n, *arguments) for n in STEPS]
            row += [f"{one.largest:.1e}" for one in found]
        rows.append([*row, str(found[0].kept) if len(row) > 1 else "-"])
        print("  ".join(rows[-1]))
    header = [f"{name}, {n} steps" for name in networks for n in STEPS]
    return f"{machine('diffusers', 'torch')}.\n\n" + table(["", *header, "kept"], rows)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", type=Path, nargs="*", default=[REFERENCE_MODEL, TEXT_MODEL])
    parser.add_argument("--write", action="store_true", help="write the section of docs/solvers.md")
    args = parser.parse_args()
    torch.set_num_threads(1)
    text = section(args.model)
    if args.write:
        write_section("solvers", text)


if __name__ == "__main__":
    main()
