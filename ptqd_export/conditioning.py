"""ModelInfo: what a sampler and a runtime must know about a network; conditioning inputs and their unconditional twins."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np

from .engine import EPSILON, SAMPLE, STEP, TIMESTEP, Array
from .errors import RecipeError
from .recipe import InputSpec, read_typed

MAX_CLASSES = 1_000_000
MAX_ELEMENTS = 2**28
"""Of one sample or condition: bounds on what a file may make a program allocate, far above any real model."""


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

    @cached_property
    def labels(self) -> tuple[int, ...]:
        """The class labels a user may ask for: the classes without the null class; none for a model without classes."""
        spec = self.class_input
        if spec is None or spec.num_classes is None:
            return ()
        return tuple(i for i in range(spec.num_classes) if i != spec.null_class)

    def labels_in_turn(self, indices: Sequence[int]) -> list[int] | None:
        """The class of each sample where none is asked for: sample i gets class i modulo their number; None for a model without classes."""
        known = self.labels
        return [known[i % len(known)] for i in indices] if known else None

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
                values = np.array(self.labels_in_turn(range(n)) if labels is None else labels, np.int64)
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
        """From `to_dict`'s form, which may come from anywhere.

        Raises:
            RecipeError, KeyError, TypeError: a wrong type or value, or something missing.
        """
        name, digest = read_typed(str, data["name"], "model.name"), read_typed(str, data["sha256"], "model.sha256")
        shape = read_typed(tuple[int, ...], data["sample_shape"], "model.sample_shape")
        inputs = read_typed(tuple[InputSpec, ...], data["inputs"], "model.inputs")

        def need(ok: bool, message: str) -> None:
            if not ok:
                raise RecipeError(message)

        def bounded(dims: tuple[int, ...]) -> bool:
            return all(d >= 1 for d in dims) and math.prod(dims) <= MAX_ELEMENTS

        need(len(shape) == 3 and bounded(shape), f"sample_shape {shape}: expected 3 positive dimensions, at most {MAX_ELEMENTS} elements")
        names = [SAMPLE, TIMESTEP, STEP, EPSILON, *(spec.name for spec in inputs)]
        need(len(set(names)) == len(names), "two inputs of one name")
        for spec in inputs:
            n, null = spec.num_classes, spec.null_class
            need(bounded(spec.shape), f"input {spec.name!r} has shape {spec.shape}: expected positive dimensions, at most {MAX_ELEMENTS} elements")
            need(n is None or 1 <= n <= MAX_CLASSES, f"input {spec.name!r} has {n} classes: expected 1 to {MAX_CLASSES}")
            need(n is None or (spec.dtype, spec.shape) == ("int64", ()), f"input {spec.name!r} has classes, but is no int64 number per sample")
            need(null is None or (n is not None and n > 1 and 0 <= null < n), f"input {spec.name!r} has null class {null} of {n}")
        return cls(name, shape, inputs, digest)
