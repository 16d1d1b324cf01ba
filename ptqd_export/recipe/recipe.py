"""Recipe: what to build, as frozen values read from TOML; its sections have the defaults.

Paths in a recipe are relative to the recipe's folder.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import tomllib
import typing
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ..core.backend import ORT_CPU
from ..core.precision import Precision
from ..errors import RecipeError
from ..typed import brief, read_typed, to_plain
from .check import check
from .sections import (
    CalibrationSpec,
    ModelSpec,
    PipelineSpec,
    PlanSpec,
    QuantizationSpec,
    SamplerSpec,
    TensorRTSpec,
)

RECIPE_FILE = "recipe.toml"
CHECKPOINTS = (".safetensors", ".ckpt")
UNTOLD_NAMES = ("model", "last", "checkpoint")
"""Names of checkpoints that say nothing: then the folder's name counts."""


@dataclass(frozen=True)
class Recipe:
    """Everything that decides a bundle's contents."""

    model: ModelSpec = field(default_factory=ModelSpec)
    sampler: SamplerSpec = field(default_factory=SamplerSpec)
    calibration: CalibrationSpec = field(default_factory=CalibrationSpec)
    quantization: QuantizationSpec = field(default_factory=QuantizationSpec)
    plan: PlanSpec = field(default_factory=PlanSpec)
    tensorrt: TensorRTSpec = field(default_factory=TensorRTSpec)
    pipeline: PipelineSpec = field(default_factory=PipelineSpec)
    backends: tuple[str, ...] = (ORT_CPU,)
    folder: Path = field(default=Path("."), compare=False, metadata={"plain": False})

    @property
    def precisions(self) -> tuple[Precision, ...]:
        return tuple(Precision.parse(p) for p in self.quantization.precisions)

    @property
    def model_name(self) -> str:
        """The model's name: the recipe's, or that of its file or folder."""
        spec = self.model
        if spec.name:
            return spec.name
        if spec.checkpoint:
            file = self.checkpoint
            return file.parent.name if file.stem in UNTOLD_NAMES else file.stem
        code, separator, _ = spec.source.rpartition(":")
        if separator and code.endswith(".py"):
            return self.path(code).stem
        return self.path(spec.source).name

    @property
    def checkpoint(self) -> Path:
        """The checkpoint by the name that it was given: in a hub's cache, a link to a file without one."""
        return self.folder.resolve() / self.model.checkpoint

    def path(self, text: str) -> Path:
        """A path of the recipe as an absolute path."""
        return (self.folder / text).resolve()

    def to_dict(self) -> dict[str, Any]:
        """The recipe as JSON-ready values, without the folder."""
        return typing.cast(dict[str, Any], to_plain(self))

    def digest(self, *sections: str) -> str:
        """SHA-256 of the named sections, or of all if none is named.

        Intermediate results are kept under such keys.
        """
        data = self.to_dict()
        chosen = {name: data[name] for name in (sections or tuple(data))}
        return hashlib.sha256(json.dumps(chosen, sort_keys=True).encode()).hexdigest()

    def override(self, **sections: dict[str, Any] | tuple[str, ...]) -> Recipe:
        """A checked copy with single values replaced.

        For example: override(sampler={"eta": 1.0}, backends=("ort-cpu",)).
        """
        data = self.to_dict()
        for name, values in sections.items():
            if name not in data:
                raise RecipeError(
                    f"the recipe has no section {brief(name)}: expected one of {', '.join(data)}"
                )
            data[name] = {**data[name], **values} if isinstance(values, dict) else values
        return Recipe.from_dict(data, self.folder)

    @classmethod
    def from_dict(cls, data: dict[str, Any], folder: Path = Path(".")) -> Recipe:
        """A recipe from parsed TOML.

        Raises:
            RecipeError: a key is unknown, or a value has a wrong type or is out of range.
        """
        recipe = dataclasses.replace(typing.cast(Recipe, read_typed(cls, data, "recipe")), folder=folder)
        check(recipe)
        return recipe

    @classmethod
    def load(cls, path: Path | str) -> Recipe:
        """Load a recipe file, a folder that holds recipe.toml, or a model with all defaults.

        A model is a diffusers folder or a checkpoint in one file.

        Raises:
            RecipeError: there is no such file, it is not TOML, or a value is wrong.
        """
        path = Path(path)
        file = path / RECIPE_FILE if path.is_dir() else path
        if path.is_dir() and not file.exists():
            return cls.from_dict({"model": {"source": str(path.resolve())}}, path.resolve())
        if path.suffix in CHECKPOINTS and not path.is_dir():
            return cls.from_dict({"model": {"checkpoint": path.name}}, path.parent.resolve())
        if path.suffix == ".py" or ".py:" in path.name:
            raise RecipeError(
                f"{path}: a model from a function needs a recipe that says model.source, model.sample_shape "
                "and model.scheduler"
            )
        if not file.is_file():
            raise RecipeError(
                f"{path} does not exist: give a recipe file, a folder that holds {RECIPE_FILE}, or a "
                "diffusers model folder"
            )
        try:
            data = tomllib.loads(file.read_text("utf-8"))
        except (ValueError, RecursionError) as error:  # ValueError covers TOMLDecodeError, UnicodeDecodeError
            raise RecipeError(f"{file} is not valid TOML: {error}") from error
        return cls.from_dict(data, file.resolve().parent)
