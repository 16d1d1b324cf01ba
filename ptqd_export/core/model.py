"""ModelInfo: what a sampler and a runtime must know about a network.

That includes its conditioning inputs and their unconditional counterparts.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Literal

import numpy as np

from ..errors import RecipeError, need
from ..typed import brief
from .engine import EPSILON, SAMPLE, STEP, TIMESTEP, Array

TEXT, LABELS = "encoder_hidden_states", "class_labels"
"""What diffusers' UNets call text and classes."""
MAX_CLASSES, MAX_NAME, MAX_INPUTS = 1_000_000, 200, 64
MAX_ELEMENTS, MAX_CONDITION = 2**24, 2**22
"""Most elements of one sample or condition: far above any real model, so that no file can exhaust memory."""


def _bounded(shape: tuple[int, ...], most: int) -> bool:
    return all(size >= 1 for size in shape) and math.prod(shape) <= most


@dataclass(frozen=True)
class InputSpec:
    """A conditioning input besides sample and timestep.

    Attributes:
        name: keyword of the model's forward, and of the graph input.
        dtype: "int64" (a class label) or "float32" (a tensor).
        shape: shape per sample; () for a class label.
        num_classes: for class labels: number of ids in the embedding, the null class included.
        null_class: the id that stands for "no class" in classifier-free guidance, or None.
        values: for tensors: .npy file (N, *shape) that calibration draws from; standard normal noise if none
            is given.
        default: for tensors: what a sample gets where nothing is given, here and in calibration, one number
            per element; if empty, zeros, and standard normal noise in calibration.
        kept: the unconditional branch of guidance takes the same value (a mask, a picture's size, a level of
            noise), not zeros or the null class.
    Raises:
        RecipeError: the values contradict each other.
    """

    name: str
    dtype: Literal["int64", "float32"] = "int64"
    shape: tuple[int, ...] = ()
    num_classes: int | None = None
    null_class: int | None = None
    values: str | None = None
    default: tuple[float, ...] = ()
    kept: bool = False

    def __post_init__(self) -> None:
        n, null = self.num_classes, self.null_class
        said = f"input {brief(self.name)}"
        need(
            self.name.isprintable(),
            f"the input name {brief(self.name)} holds characters that cannot be printed: use others",
        )
        need(
            _bounded(self.shape, MAX_CONDITION),
            f"{said} has shape {brief(list(self.shape))}: expected positive sizes, at most {MAX_CONDITION} "
            "elements",
        )
        if self.dtype == "float32":
            need(n is None, f"{said} is float32 and has num_classes: only int64 class labels have classes")
        else:
            label = n is not None and self.shape == ()
            need(label, f"{said} is int64: a class label needs num_classes >= 1 and shape []")
            need(1 <= (n or 0) <= MAX_CLASSES, f"{said}: num_classes is {brief(n)}: give 1 to {MAX_CLASSES}")
        need(
            not self.default or self.dtype == "float32",
            f"{said} is a class label and has a default: only float32 inputs have one",
        )
        need(
            len(self.default) in (0, math.prod(self.shape)) and all(map(math.isfinite, self.default)),
            f"{said} has a default of {len(self.default)} numbers: expected {math.prod(self.shape)}, finite, "
            "one per element",
        )
        fits = null is None or (n is not None and n > 1 and 0 <= null < n)
        need(
            fits,
            f"{said}: null_class is {brief(null)}: give one of at least two ids below num_classes ({n})",
        )


@dataclass(frozen=True)
class ModelInfo:
    """A denoising network, as seen from outside.

    Attributes:
        name: the name that people read.
        sample_shape: (C, H, W) of x_t and epsilon.
        inputs: conditioning inputs besides sample and timestep.
        sha256: hash of the weights; a bundle is valid for this hash only.
        null: values (shape of the input) that stand for "no condition", by the name of a tensor input: of
            text inputs the empty prompt's embedding. Zeros where there is none. No part of the plain form: a
            bundle holds them as arrays.
    Raises:
        RecipeError: a shape is out of bounds, two inputs have the same name, or two are class labels.
    """

    name: str
    sample_shape: tuple[int, int, int]
    inputs: tuple[InputSpec, ...]
    sha256: str
    null: Mapping[str, Array] = field(
        default_factory=dict, compare=False, repr=False, metadata={"plain": False}
    )

    def __post_init__(self) -> None:
        need(
            len(self.sample_shape) == 3 and _bounded(self.sample_shape, MAX_ELEMENTS),
            f"sample_shape is {brief(list(self.sample_shape))}: expected [channels, height, width], "
            f"at most {MAX_ELEMENTS} elements",
        )
        need(
            self.name.isprintable() and len(self.name) <= MAX_NAME,
            f"the model's name {brief(self.name)}: expected at most {MAX_NAME} characters that can be "
            "printed",
        )
        names = [SAMPLE, TIMESTEP, STEP, EPSILON, *(spec.name for spec in self.inputs)]
        need(len(self.inputs) <= MAX_INPUTS, f"{len(self.inputs)} inputs: expected {MAX_INPUTS} at most")
        twice = next((name for name in names if names.count(name) > 1), None)
        need(twice is None, f"two inputs are called {brief(twice)}: give each a name of its own")
        classes = sum(spec.num_classes is not None for spec in self.inputs)
        need(classes <= 1, "the model declares two class-label inputs: at most one is supported")
        shapes = {spec.name: spec.shape for spec in self.inputs if spec.num_classes is None}
        for name, value in self.null.items():
            need(
                value.shape == shapes.get(name),
                f"the value of {brief(name)} without a condition has shape {value.shape}: expected "
                f"{shapes.get(name)}",
            )

    @property
    def channels(self) -> int:
        return self.sample_shape[0]

    @property
    def class_input(self) -> InputSpec | None:
        """The class-label input, or None."""
        return next((spec for spec in self.inputs if spec.num_classes is not None), None)

    @cached_property
    def labels(self) -> tuple[int, ...]:
        """The class labels that a user may ask for: all classes except the null class.

        Empty for a model without classes.
        """
        spec = self.class_input
        if spec is None or spec.num_classes is None:
            return ()
        return tuple(i for i in range(spec.num_classes) if i != spec.null_class)

    def labels_in_turn(self, indices: Sequence[int]) -> list[int] | None:
        """The class of each sample where the user names none: sample i gets class i modulo their number.

        None for a model without classes.
        """
        known = self.labels
        return [known[i % len(known)] for i in indices] if known else None

    def check_guidance(self, guidance_scale: float) -> None:
        """Check that the model has the unconditional prediction that guidance needs.

        Raises:
            RecipeError: guidance_scale is not 1 and the model has no unconditional prediction.
        """
        if guidance_scale == 1.0:
            return
        if all(spec.kept for spec in self.inputs):
            raise RecipeError(
                f"guidance_scale is {guidance_scale}, but {self.name} takes no condition: set it to 1"
            )
        spec = self.class_input
        if spec is not None and spec.null_class is None and not spec.kept:
            raise RecipeError(
                f"guidance_scale is {guidance_scale}, but {self.name} has no null class: "
                "set model.null_class in the recipe, or guidance_scale to 1"
            )

    def conditions(
        self, labels: Sequence[int] | None, n: int, tensors: Mapping[str, Array] | None = None
    ) -> dict[str, Array]:
        """Feeds of the conditioning inputs for n samples.

        Args:
            labels: one class per sample, or None: all classes in turn.
            tensors: float conditions (n, *shape) by input name; where one is missing, its default, or that
                of no condition.
        Raises:
            RecipeError: a label is out of range or not an integer, or a count or shape is wrong.
        """
        if labels is not None and self.class_input is None:
            raise RecipeError(f"class labels were given, but {self.name} has no classes: leave them out")
        tensors = tensors or {}
        unknown = set(tensors) - {spec.name for spec in self.inputs if spec.num_classes is None}
        if unknown:
            takes = ", ".join(spec.name for spec in self.inputs) or "none"
            raise RecipeError(f"{self.name} has no tensor condition {min(unknown)!r}: it takes {takes}")
        return {
            spec.name: self._labels(labels, n)
            if spec.num_classes is not None
            else self._tensor(spec, n, tensors)
            for spec in self.inputs
        }

    def _labels(self, labels: Sequence[int] | None, n: int) -> Array:
        if labels is None:
            labels = self.labels_in_turn(range(n)) or []
        for label in labels:
            if isinstance(label, bool) or not isinstance(label, int | np.integer):
                raise RecipeError(f"class label {label!r} is not an integer: give class numbers")
        if len(labels) != n:
            raise RecipeError(f"{len(labels)} class labels for {n} samples: give one per sample")
        known = set(self.labels)
        bad = next((label for label in sorted(set(labels)) if label not in known), None)
        if bad is not None:
            first, last = self.labels[0], self.labels[-1]
            raise RecipeError(f"class label {bad} is out of range: {self.name} has classes {first} to {last}")
        return np.array(labels, np.int64)

    def null_conditions(self, n: int) -> dict[str, Array]:
        """Feeds that stand for "no condition": the null class, and `null` or zeros for tensors.

        A tensor that is `kept` has its default; where there is a condition, `Sampling.condition_rows` takes
        that.
        """
        return {
            spec.name: np.full((n, *spec.shape), self._null(spec), np.dtype(spec.dtype))
            for spec in self.inputs
        }

    def _null(self, spec: InputSpec) -> Array:
        if spec.kept and spec.default:
            return np.reshape(spec.default, spec.shape)
        return np.asarray(spec.null_class or 0 if spec.num_classes else self.null.get(spec.name, 0))

    def _tensor(self, spec: InputSpec, n: int, tensors: Mapping[str, Array]) -> Array:
        value = tensors.get(spec.name)
        if value is None:
            return np.full((n, *spec.shape), self._usual(spec), np.dtype(spec.dtype))
        if value.shape != (n, *spec.shape):
            raise RecipeError(f"condition {spec.name!r} has shape {value.shape}: expected {(n, *spec.shape)}")
        return value.astype(spec.dtype)

    def _usual(self, spec: InputSpec) -> Array:
        """The value of a tensor where none is given: its default, or that of no condition."""
        return np.reshape(spec.default, spec.shape) if spec.default else self._null(spec)
