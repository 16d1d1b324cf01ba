"""Recipe: what to build. Frozen values read from TOML; every default stands here and nowhere else.

Paths in a recipe are relative to the recipe's folder.
"""

from __future__ import annotations

import dataclasses
import difflib
import hashlib
import json
import math
import re
import tomllib
import types
import typing
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from .errors import RecipeError
from .noise import MODES
from .precision import Precision
from .quant import BACKENDS, BUILDERS

RECIPE_FILE = "recipe.toml"
SOLVERS = ("ddim", "ddpm")
BUILT = tuple(name for name in BACKENDS if name != "torch")
"""Backends that a bundle is built for; the torch one simulates any bundle."""


@dataclass(frozen=True)
class InputSpec:
    """A conditioning input besides sample and timestep.

    Attributes:
        name: keyword of the model's forward, and of the graph input.
        dtype: "int64" or "float32".
        shape: per sample; () for a class label.
        num_classes: for int64 labels: how many ids the embedding has, the null class among them.
        null_class: the id that stands for "no class" in classifier-free guidance, or None.
        values: for float32 tensors: .npy file (N, *shape) that calibration draws from; standard normal if none is given.
    """

    name: str
    dtype: Literal["int64", "float32"] = "int64"
    shape: tuple[int, ...] = ()
    num_classes: int | None = None
    null_class: int | None = None
    values: str | None = None


@dataclass(frozen=True)
class ModelSpec:
    """Where the model comes from.

    `source`: a diffusers folder (a pipeline folder with unet/ and scheduler/, or a bare UNet with scheduler/ or
    scheduler_config.json), or "file.py:function" which returns an nn.Module called as module(sample, timestep, **inputs).
    `sample_shape`, `inputs` and `scheduler` (a file or folder) are read from the folder, and must be given for a function.
    """

    source: str = "."
    name: str = ""
    sample_shape: tuple[int, ...] = ()
    inputs: tuple[InputSpec, ...] = ()
    scheduler: str = ""
    null_class: int | None = None


@dataclass(frozen=True)
class SamplerSpec:
    solver: Literal["ddim", "ddpm"] = "ddim"
    n_steps: int = 20
    eta: float = 0.0
    guidance_scale: float = 1.0


@dataclass(frozen=True)
class CalibrationSpec:
    """`size` trajectories give ranges and statistics, `held_out` more decide the fidelity gate; seeded."""

    size: int = 32
    held_out: int = 16
    batch_size: int = 8
    seed: int = 0
    activation_range: Literal["minmax", "percentile", "mse"] = "mse"
    weight_range: Literal["minmax", "percentile", "mse"] = "mse"
    percentile: float = 99.99


@dataclass(frozen=True)
class QuantizationSpec:
    """How layers are quantized and corrected.

    `edge_layers`: first and last conv in "float", or at 8 bits ("w8a8") as in the paper. `rounding`: of weights below 8 bits.
    `weight_scales`: one scale per output "channel", or one for the whole "tensor".
    `skip`: globs of module paths left in float.
    """

    precisions: tuple[str, ...] = ("w8a8", "w4a8", "w4a4")
    edge_layers: Literal["float", "w8a8"] = "float"
    rounding: Literal["gptq", "nearest"] = "gptq"
    weight_scales: Literal["channel", "tensor"] = "channel"
    skip: tuple[str, ...] = ()
    correction: Literal["none", "ptqd", "affine"] = "ptqd"
    clamp_k: bool = False
    gate: bool = True
    recalibrate_variance: bool = True


@dataclass(frozen=True)
class PlanSpec:
    """Which precision each step gets.

    `budget`: mean cost per step as a fraction of full precision's, or of the dearest precision's where none is built.
    `steps`: precision per step for rule "fixed", runs as "w4a8*12".
    """

    rule: Literal["snr", "budget", "fixed"] = "budget"
    objective: Literal["paired", "distribution"] = "paired"
    cost: Literal["time", "bops"] = "time"
    budget: float = 1.0
    steps: tuple[str, ...] = ()
    batch_size: int = 4


@dataclass(frozen=True)
class TensorRTSpec:
    """How TensorRT and TensorRT-RTX engines are built.

    `batch_sizes`: fewest (always 1), usual and most samples that one engine call gets; guidance doubles the rows that this makes.
    `compute_capabilities`: GPUs that a TensorRT-RTX engine is for, such as "8.9"; all that it knows where empty. TensorRT builds for the GPU at hand.
    `optimization_level`: the builder's, 0 to 5; its own default where not given.
    `workspace_mib`: most scratch memory of one engine; no limit where not given.
    """

    batch_sizes: tuple[int, ...] = (1, 8, 32)
    compute_capabilities: tuple[str, ...] = ()
    optimization_level: int | None = None
    workspace_mib: int | None = None


@dataclass(frozen=True)
class Recipe:
    """Everything that decides a bundle's contents."""

    model: ModelSpec = field(default_factory=ModelSpec)
    sampler: SamplerSpec = field(default_factory=SamplerSpec)
    calibration: CalibrationSpec = field(default_factory=CalibrationSpec)
    quantization: QuantizationSpec = field(default_factory=QuantizationSpec)
    plan: PlanSpec = field(default_factory=PlanSpec)
    tensorrt: TensorRTSpec = field(default_factory=TensorRTSpec)
    backends: tuple[str, ...] = ("ort-cpu",)
    folder: Path = field(default=Path("."), compare=False)

    @property
    def precisions(self) -> tuple[Precision, ...]:
        return tuple(Precision.parse(p) for p in self.quantization.precisions)

    def path(self, text: str) -> Path:
        """A path of the recipe, made absolute."""
        return (self.folder / text).resolve()

    def to_dict(self) -> dict[str, Any]:
        """JSON-ready, without the folder."""
        data = dataclasses.asdict(self)
        del data["folder"]
        return typing.cast(dict[str, Any], json.loads(json.dumps(data)))

    def digest(self, *sections: str) -> str:
        """SHA-256 of the named sections (all if none is named): the key under which intermediate results are kept."""
        data = self.to_dict()
        chosen = {name: data[name] for name in (sections or tuple(data))}
        return hashlib.sha256(json.dumps(chosen, sort_keys=True).encode()).hexdigest()

    def override(self, **sections: dict[str, Any] | tuple[str, ...]) -> Recipe:
        """A copy with single values replaced, checked: override(sampler={"eta": 1.0}, backends=("ort-cpu",))."""
        data = self.to_dict()
        for name, values in sections.items():
            data[name] = {**data[name], **values} if isinstance(values, dict) else values
        return Recipe.from_dict(data, self.folder)

    @classmethod
    def from_dict(cls, data: dict[str, Any], folder: Path = Path(".")) -> Recipe:
        """From parsed TOML.

        Raises:
            RecipeError: an unknown key, a wrong type or a value out of range.
        """
        recipe = dataclasses.replace(typing.cast(Recipe, read_typed(cls, data, "recipe")), folder=folder)
        check(recipe)
        return recipe

    @classmethod
    def load(cls, path: Path | str) -> Recipe:
        """From a recipe file, a folder that holds recipe.toml, or a diffusers folder with all defaults.

        Raises:
            RecipeError: nothing there, not TOML, or wrong values.
        """
        path = Path(path)
        file = path / RECIPE_FILE if path.is_dir() else path
        if path.is_dir() and not file.exists():
            return cls.from_dict({"model": {"source": str(path.resolve())}}, path.resolve())
        if path.suffix == ".py" or ".py:" in path.name:
            raise RecipeError(f"{path}: a model from a function needs a recipe that says model.source, model.sample_shape and model.scheduler")
        if not file.is_file():
            raise RecipeError(f"{path} does not exist: give a recipe file, a folder that holds {RECIPE_FILE}, or a diffusers model folder")
        try:
            data = tomllib.loads(file.read_text("utf-8"))
        except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
            raise RecipeError(f"{file} is not valid TOML: {error}") from error
        return cls.from_dict(data, file.resolve().parent)


def read_typed(kind: Any, value: Any, where: str) -> Any:
    """Check `value` against a type annotation and convert it: dataclasses from tables, tuples from arrays, int to float."""
    origin, args = typing.get_origin(kind), typing.get_args(kind)
    if dataclasses.is_dataclass(kind) and isinstance(kind, type):
        if not isinstance(value, dict):
            raise RecipeError(f"{where}: expected a table, got {value!r}")
        hints = typing.get_type_hints(kind)
        hints.pop("folder", None)
        for key in value:
            if key not in hints:
                close = difflib.get_close_matches(key, hints, n=1)
                hint = f"did you mean {close[0]!r}?" if close else f"expected one of {', '.join(hints)}"
                raise RecipeError(f"{where}: unknown key {key!r}: {hint}")
        try:
            return kind(**{key: read_typed(hints[key], item, f"{where}.{key}") for key, item in value.items()})
        except TypeError as error:
            raise RecipeError(f"{where}: {error}") from error
    if origin is tuple:
        if not isinstance(value, list | tuple):
            raise RecipeError(f"{where}: expected an array, got {value!r}")
        return tuple(read_typed(args[0], item, f"{where}[{i}]") for i, item in enumerate(value))
    if origin is Literal:
        if value not in args:
            raise RecipeError(f"{where}: got {value!r}, expected one of {', '.join(map(str, args))}")
        return value
    if origin in (types.UnionType, typing.Union):
        return None if value is None else read_typed(next(a for a in args if a is not type(None)), value, where)
    if kind is float and isinstance(value, int) and not isinstance(value, bool):
        return float(value)
    if not isinstance(value, kind) or (isinstance(value, bool) and kind is not bool):
        raise RecipeError(f"{where}: expected {kind.__name__}, got {value!r}")
    return value


def check(recipe: Recipe) -> None:
    """Ranges that types cannot say.

    Raises:
        RecipeError: a value out of range.
    """
    s, c, q, p = recipe.sampler, recipe.calibration, recipe.quantization, recipe.plan

    def need(ok: bool, message: str) -> None:
        if not ok:
            raise RecipeError(message)

    need(s.n_steps >= 1, f"sampler.n_steps is {s.n_steps}: give at least 1")
    need(0 <= s.eta <= 1, f"sampler.eta is {s.eta}: give a value in [0, 1] (0 is DDIM, 1 is DDPM)")
    need(s.solver != "ddpm" or s.eta == 1, "sampler.solver is ddpm, which is eta = 1: set sampler.eta to 1, or the solver to ddim")
    need(math.isfinite(s.guidance_scale) and s.guidance_scale >= 0, f"sampler.guidance_scale is {s.guidance_scale}: give a finite value >= 0")
    need(c.size >= 2, f"calibration.size is {c.size}: give at least 2 trajectories")
    need(c.held_out >= 2, f"calibration.held_out is {c.held_out}: give at least 2 trajectories")
    need(c.batch_size >= 1, f"calibration.batch_size is {c.batch_size}: give at least 1")
    need(0 <= c.seed < 2**63, f"calibration.seed is {c.seed}: give a value from 0 to 2^63 - 1")
    for text in (recipe.model.name, *(spec.name for spec in recipe.model.inputs)):
        need(text.isprintable(), f"the name {text!r} holds characters that cannot be printed: use others")
    shape = recipe.model.sample_shape
    need(len(shape) in (0, 3) and all(d >= 1 for d in shape), f"model.sample_shape is {list(shape)}: give [channels, height, width]")
    for spec in recipe.model.inputs:
        n, null = spec.num_classes, spec.null_class
        need(n is None or n >= 1, f"input {spec.name!r}: num_classes is {n}: give at least 1")
        fits = null is None or (n is not None and n > 1 and 0 <= null < n)
        need(fits, f"input {spec.name!r}: null_class is {null}: give one of at least two ids below num_classes ({n})")
    need(50 < c.percentile <= 100, f"calibration.percentile is {c.percentile}: give a value in (50, 100]")
    need(bool(q.precisions), "quantization.precisions is empty: give at least one, such as w8a8")
    precisions = [Precision.parse(text) for text in q.precisions]
    need(len(set(precisions)) == len(precisions), f"quantization.precisions holds a precision twice: {', '.join(q.precisions)}")
    need(q.correction in MODES, f"quantization.correction is {q.correction!r}: expected one of {', '.join(MODES)}")
    need(0 < p.budget <= 1, f"plan.budget is {p.budget}: give a fraction in (0, 1] of the dearest precision's cost")
    need(p.batch_size >= 1, f"plan.batch_size is {p.batch_size}: give at least 1")
    need(p.rule != "fixed" or bool(p.steps), 'plan.rule is fixed but plan.steps is empty: give a precision per step, such as ["w4a8*12", "w8a8*8"]')
    need(bool(recipe.backends), "backends is empty: give at least one, such as ort-cpu")
    for name in recipe.backends:
        need(name in BUILT, f"backend {name!r} is not known: expected one of {', '.join(BUILT)}")
    t, batches = recipe.tensorrt, list(recipe.tensorrt.batch_sizes)
    in_order = len(batches) == 3 and batches == sorted(batches) and batches[0] == 1
    need(
        in_order,
        f"tensorrt.batch_sizes is {batches}: give 1, the usual and the most, such as [1, 8, 32]; the last batch of a run may hold one sample",
    )
    fits = p.batch_size <= batches[-1] or not set(recipe.backends) & set(BUILDERS)
    need(
        fits,
        f"plan.batch_size is {p.batch_size}, but engines are built for at most {batches[-1]} (tensorrt.batch_sizes): lower it, or build for more",
    )
    for text in t.compute_capabilities:
        need(re.fullmatch(r"[0-9]{1,2}\.[0-9]", text) is not None, f"tensorrt.compute_capabilities holds {text!r}: give major.minor, such as 8.9")
    level, space = t.optimization_level, t.workspace_mib
    need(level is None or 0 <= level <= 5, f"tensorrt.optimization_level is {level}: give 0 to 5")
    need(space is None or space >= 1, f"tensorrt.workspace_mib is {space}: give at least 1")
