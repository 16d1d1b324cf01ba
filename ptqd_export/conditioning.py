"""ModelInfo: what a sampler and a runtime must know about a network; conditioning inputs and their unconditional twins."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from .engine import Array
from .errors import RecipeError
from .recipe import InputSpec


@dataclass(frozen=True)
class ModelInfo:
    """A denoising network, as seen from outside.

    Attributes:
        name: for people.
        sample_shape: (C, H, W) of x_t and epsilon.
        inputs: conditioning inputs besides sample and timestep.
        sha256: hash of the weights, part of a bundle's key of validity.
    """

    name: str
    sample_shape: tuple[int, int, int]
    inputs: tuple[InputSpec, ...]
    sha256: str

    @property
    def channels(self) -> int:
        return self.sample_shape[0]

    @property
    def class_input(self) -> InputSpec | None:
        """The class-label input, or None."""
        return next((spec for spec in self.inputs if spec.num_classes is not None), None)

    @property
    def labels(self) -> tuple[int, ...]:
        """The class labels a user may ask for: the classes without the null class; none for a model without classes."""
        spec = self.class_input
        if spec is None or spec.num_classes is None:
            return ()
        return tuple(i for i in range(spec.num_classes) if i != spec.null_class)

    def check_guidance(self, guidance_scale: float) -> None:
        """Guidance needs an unconditional prediction.

        Raises:
            RecipeError: guidance_scale is not 1 and the model has nothing to be unconditional in.
        """
        if guidance_scale == 1.0:
            return
        if not self.inputs:
            raise RecipeError(f"guidance_scale is {guidance_scale}, but {self.name} takes no condition: set it to 1")
        spec = self.class_input
        if spec is not None and spec.null_class is None:
            raise RecipeError(
                f"guidance_scale is {guidance_scale}, but {self.name} has no null class: set model.null_class in the recipe, or guidance_scale to 1"
            )

    def conditions(self, labels: Sequence[int] | None, n: int, tensors: Mapping[str, Array] | None = None) -> dict[str, Array]:
        """Feeds of the conditioning inputs for n samples.

        Args:
            labels: one class per sample, or None: all classes in turn.
            tensors: float conditions (n, *shape) by input name; zeros where one is missing.
        Raises:
            RecipeError: a label out of range, a wrong count or a wrong shape.
        """
        feeds: dict[str, Array] = {}
        if labels is not None and self.class_input is None:
            raise RecipeError(f"class labels were given, but {self.name} has no classes: leave them out")
        unknown = set(tensors or {}) - {spec.name for spec in self.inputs if spec.num_classes is None}
        if unknown:
            raise RecipeError(f"{self.name} has no tensor condition {min(unknown)!r}: it takes {', '.join(s.name for s in self.inputs) or 'none'}")
        for spec in self.inputs:
            if spec.num_classes is not None:
                known = self.labels
                values = np.array([known[i % len(known)] for i in range(n)] if labels is None else labels, np.int64)
                if len(values) != n:
                    raise RecipeError(f"{len(values)} class labels for {n} samples: give one per sample")
                bad = sorted(set(values.tolist()) - set(known))
                if bad:
                    raise RecipeError(f"class label {bad[0]} is out of range: {self.name} has classes {known[0]} to {known[-1]}")
                feeds[spec.name] = values
            else:
                value = (tensors or {}).get(spec.name)
                if value is None:
                    value = np.zeros((n, *spec.shape), np.dtype(spec.dtype))
                if value.shape != (n, *spec.shape):
                    raise RecipeError(f"condition {spec.name!r} has shape {value.shape}: expected {(n, *spec.shape)}")
                feeds[spec.name] = value.astype(spec.dtype)
        return feeds

    def null_conditions(self, n: int) -> dict[str, Array]:
        """Feeds that stand for "no condition": the null class, and zeros for tensors."""
        feeds: dict[str, Array] = {}
        for spec in self.inputs:
            value = spec.null_class if spec.num_classes is not None and spec.null_class is not None else 0
            feeds[spec.name] = np.full((n, *spec.shape), value, np.dtype(spec.dtype))
        return feeds

    def to_dict(self) -> dict[str, Any]:
        return dataclasses.asdict(self)

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> ModelInfo:
        channels, height, width = (int(v) for v in data["sample_shape"])
        inputs = tuple(InputSpec(**{**spec, "shape": tuple(spec["shape"])}) for spec in data["inputs"])
        return cls(str(data["name"]), (channels, height, width), inputs, str(data["sha256"]))
