"""PtqdScheduler: a bundle's solver and its recalibrated variance in the place of a pipeline's scheduler."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import torch
from diffusers.configuration_utils import FrozenDict
from diffusers.schedulers.scheduling_utils import SchedulerOutput
from diffusers.utils.torch_utils import randn_tensor
from torch import Tensor

from ..bundle.bundle import Bundle
from ..core.backend import ORT_CPU
from ..core.plan import Plan
from ..core.sampling import F64, State
from ..errors import RecipeError


class PtqdScheduler:
    """What pipelines of diffusers take for a scheduler: the steps of a bundle, with sigma' of its plan.

    A step is an evaluation of the network, as everywhere in a bundle: a second-order solver has more of them
    than `num_inference_steps`. It keeps state between steps and belongs to one run at a time.

    Args:
        bundle: an opened bundle, or its folder.
        backend: whose corrections sigma' is for.
        plan: the plan of the UNet; None is the bundle's own.
    Attributes:
        timesteps: of the steps, (T,).
        init_noise_sigma: standard deviation of the first state.
    Raises:
        BundleError, RecipeError: the bundle cannot be read, or has no such plan.
    """

    order = 1

    def __init__(self, bundle: Bundle | Path | str, backend: str = ORT_CPU, plan: Plan | None = None) -> None:
        opened = bundle if isinstance(bundle, Bundle) else Bundle.open(bundle)
        if plan is not None:
            opened.manifest.check_plan(plan)
        self._sampling = opened.manifest.sampling
        self._sigmas = opened.sigmas(backend, plan)
        schedule = self._sampling.schedule
        self.init_noise_sigma = float(schedule.start)
        self.timesteps = torch.from_numpy(schedule.timesteps.copy())
        self.num_inference_steps = schedule.n_steps
        frozen: Any = FrozenDict
        self.config = frozen({"prediction_type": schedule.prediction_type})
        self._kept: tuple[F64, ...]
        self.set_begin_index(0)

    def __len__(self) -> int:
        return len(self._sampling)

    def set_timesteps(self, num_inference_steps: int, device: Any = None, **_: Any) -> None:
        """Begin a run.

        Raises:
            RecipeError: the bundle was measured with another number of steps.
        """
        if num_inference_steps != self.num_inference_steps:
            raise RecipeError(
                f"{num_inference_steps} steps were asked for, but the bundle was measured for "
                f"{self.num_inference_steps}: ask for these, or rebuild with --n-steps {num_inference_steps}"
            )
        self.timesteps = self.timesteps.to(device or "cpu")
        self.set_begin_index(0)

    def set_begin_index(self, begin_index: int = 0) -> None:
        """Begin at a later step: a picture with noise is given (`add_noise`)."""
        self._next, self._kept = begin_index, ()

    def scale_model_input(self, sample: Tensor, timestep: Any = None) -> Tensor:
        """The state is what the network takes."""
        return sample

    def step(
        self,
        model_output: Tensor,
        timestep: Any,
        sample: Tensor,
        generator: Any = None,
        return_dict: bool = True,
        **_: Any,
    ) -> Any:
        """The next state (B, C, H, W) from the guided output of the network, as it was trained.

        Raises:
            RecipeError: the timestep is not that of the next step.
        """
        schedule, t = self._sampling.schedule, float(torch.as_tensor(timestep).flatten()[0])
        if self._next >= len(self) or not np.isclose(schedule.timesteps[self._next], t):
            started = np.flatnonzero(np.isclose(schedule.timesteps, t))
            if not len(started):
                raise RecipeError(
                    f"timestep {t:g} is none of the bundle's, {schedule.timesteps.tolist()}: call "
                    "set_timesteps first"
                )
            self.set_begin_index(int(started[0]))
        step = self._next
        x, output = (value.detach().cpu().double().numpy() for value in (sample, model_output))
        gain, offset = (row[step] for row in schedule.epsilon_coefficients())
        noise = None
        if self._sampling.draws(step):
            drawn = randn_tensor(sample.shape, generator=generator, device=sample.device, dtype=sample.dtype)
            noise = drawn.cpu().double().numpy()
        prediction = gain * output + offset * x
        state = self._sampling.advance(
            State(x, self._kept), prediction, step, float(self._sigmas[step]), noise
        )
        self._next, self._kept = step + 1, state.kept
        following = torch.from_numpy(state.x).to(sample.device, sample.dtype)
        return SchedulerOutput(prev_sample=following) if return_dict else (following,)

    def add_noise(self, original_samples: Tensor, noise: Tensor, timesteps: Tensor) -> Tensor:
        """sqrt(abar) x_0 + sqrt(1 - abar) z at timesteps (B,) of the bundle, for runs that begin later."""
        known = self._sampling.schedule.timesteps
        rows = np.abs(known[:, None] - timesteps.detach().cpu().double().numpy()[None]).argmin(0)
        abar = torch.from_numpy(self._sampling.schedule.alphas_cumprod[rows]).to(original_samples)
        abar = abar.reshape(-1, *[1] * (original_samples.ndim - 1))
        return abar.sqrt() * original_samples + (1 - abar).sqrt() * noise
