"""PtqdUNet: a bundle's engines in the place of a pipeline's UNet.

    pipe = StableDiffusionPipeline.from_pretrained(folder)
    pipe.unet = PtqdUNet("engines/sd")

The engine is chosen by the timestep and not by counting calls, so that guidance, solvers with two evaluations
per step, and starts in the middle (img2img) get the engine that the plan means.
"""

from __future__ import annotations

import inspect
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Self

import numpy as np
import torch
from diffusers import UNet2DConditionModel, UNet2DModel
from diffusers.configuration_utils import ConfigMixin
from diffusers.models.modeling_utils import ModelMixin
from diffusers.models.unets.unet_2d import UNet2DOutput
from diffusers.models.unets.unet_2d_condition import UNet2DConditionOutput
from torch import Tensor

from ..bundle.bundle import Bundle
from ..core.engine import EPSILON, SAMPLE, STEP, TIMESTEP, Array
from ..core.model import LABELS, TEXT, InputSpec
from ..core.plan import Plan
from ..errors import RecipeError
from ..runtime import Runtime


class PtqdUNet(ModelMixin, ConfigMixin):
    """What pipelines of diffusers take for a UNet2DModel or UNet2DConditionModel; its numbers are a bundle's.

    It answers with what the original network predicts (epsilon, v or sample), corrected, so that the
    pipeline's own scheduler goes on. The corrections are valid for the guidance_scale and the solver that the
    bundle was measured for. It holds no parameters; `.to()` moves what it returns.

    Args:
        bundle: an opened bundle, or its folder.
        backend, plan, device: as of `Runtime`.
    Raises:
        BackendUnavailable, BundleError, GraphError, ParityError, RecipeError: as `Runtime`.
    """

    config_name = "config.json"  # type: ignore[assignment]

    def __init__(
        self,
        bundle: Bundle | Path | str,
        backend: str | None = None,
        plan: Plan | None = None,
        device: int = 0,
    ) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.runtime = Runtime(bundle, backend, plan, device=device)
        self.sampling = self.runtime.bundle.manifest.sampling
        self._coefficients = self.sampling.schedule.epsilon_coefficients()
        self._places = torch.device("cpu"), torch.float32
        self._told = False
        model = self.sampling.model
        specs = {spec.name: spec for spec in model.inputs}
        kind = UNet2DConditionModel if TEXT in specs else UNet2DModel
        parameters = inspect.signature(kind.__init__).parameters.values()
        height, width = model.sample_shape[1:]
        config = {p.name: p.default for p in parameters if p.default is not inspect.Parameter.empty}
        config |= {
            "in_channels": model.channels,
            "out_channels": model.channels,
            "sample_size": height if height == width else (height, width),
        }
        if TEXT in specs:
            config["cross_attention_dim"] = specs[TEXT].shape[-1]
        if LABELS in specs:
            config["num_class_embeds"] = specs[LABELS].num_classes
        self.register_to_config(**config)  # type: ignore[no-untyped-call]

    @property
    def device(self) -> torch.device:
        return self._places[0]

    @property
    def dtype(self) -> torch.dtype:
        return self._places[1]

    def to(self, *args: Any, **kwargs: Any) -> Self:  # type: ignore[override]
        device, dtype, *_ = torch._C._nn._parse_to(*args, **kwargs)
        self._places = device or self.device, dtype or self.dtype
        return self

    def forward(
        self,
        sample: Tensor,
        timestep: Tensor | float | int,
        encoder_hidden_states: Tensor | None = None,
        class_labels: Tensor | None = None,
        *_: Any,
        added_cond_kwargs: Mapping[str, Tensor] | None = None,
        return_dict: bool = True,
        **others: Any,
    ) -> Any:
        """The prediction for x_t (B, C, H, W) at a timestep; B counts guidance's halves.

        Args:
            timestep: one for all rows.
            encoder_hidden_states, class_labels, added_cond_kwargs: what the bundle's model takes.
        Returns:
            a tuple of (B, C, H, W), or diffusers' output class with `.sample`.
        Raises:
            RecipeError: a condition is missing, not taken, or has a wrong shape.
        """
        given = {TEXT: encoder_hidden_states, LABELS: class_labels, **(added_cond_kwargs or {}), **others}
        held = {name: value for name, value in given.items() if isinstance(value, Tensor)}
        specs = {spec.name: spec for spec in self.sampling.model.inputs}
        if unknown := sorted(held.keys() - specs.keys()):
            raise RecipeError(
                f"{self.sampling.model.name} takes no {unknown[0]}: it takes {', '.join(specs) or 'none'}"
            )
        rows, kind = len(sample), self.sampling.schedule.timesteps.dtype
        t = float(torch.as_tensor(timestep).flatten()[0])
        if kind == np.int64:
            t = round(t)
        step = self._step(t)
        x = _numbers(sample)
        feeds = {
            SAMPLE: x,
            TIMESTEP: np.full(rows, t, kind),
            STEP: np.array([step], np.int64),
            **{name: _condition(spec, held.get(name), rows) for name, spec in specs.items()},
        }
        epsilon = self.runtime.engine_at(step)(feeds)[EPSILON]
        gain, offset = (row[step] for row in self._coefficients)
        output = torch.from_numpy(np.asarray((epsilon - offset * x) / gain, np.float32))
        output = output.to(sample.device, sample.dtype)
        if not return_dict:
            return (output,)
        return (UNet2DConditionOutput if TEXT in specs else UNet2DOutput)(sample=output)

    def _step(self, timestep: float) -> int:
        """The step whose timestep is nearest."""
        known = self.sampling.schedule.timesteps
        step = int(np.abs(known - timestep).argmin())
        if not np.isclose(known[step], timestep) and not self._told:
            self._told = True
            warnings.warn(
                f"timestep {timestep:g} is not one of the {len(known)} that the bundle was measured at: "
                f"engine and correction of {known[step]:g} are used; set as many steps and the same spacing",
                stacklevel=2,
            )
        return step

    def close(self) -> None:
        """Free the engines."""
        self.runtime.close()


def _numbers(value: Tensor) -> Array:
    return np.ascontiguousarray(value.detach().to("cpu", torch.float32).numpy())


def _condition(spec: InputSpec, value: Tensor | None, rows: int) -> Array:
    if value is None:
        raise RecipeError(f"the bundle's model needs {spec.name} of shape {[rows, *spec.shape]}: give it")
    if tuple(value.shape) != (rows, *spec.shape):
        raise RecipeError(f"{spec.name} has shape {list(value.shape)}: expected {[rows, *spec.shape]}")
    if spec.num_classes is not None:
        return value.detach().cpu().numpy().astype(np.int64)
    return _numbers(value)
