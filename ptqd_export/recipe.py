"""Recipe: what to build, as frozen values read from TOML. Every default is set here and nowhere else.

Paths in a recipe are relative to the recipe's folder.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import math
import tomllib
import typing
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from .core.backend import ENGINE_BACKENDS, ORT_CPU, RUNNABLE
from .core.engine_build import CAPABILITY, EngineSettings
from .core.model import InputSpec
from .core.noise import Mode
from .core.plan import Rule
from .core.precision import Precision
from .core.sampling import Solver
from .core.sensitivity import Objective
from .errors import RecipeError
from .typed import brief, read_typed, to_plain

RECIPE_FILE = "recipe.toml"
CHECKPOINTS = (".safetensors", ".ckpt")
UNTOLD_NAMES = ("model", "last", "checkpoint")
"""Names of checkpoints that say nothing: then the folder's name counts."""


@dataclass(frozen=True)
class ModelSpec:
    """Where the model comes from.

    `source`: a diffusers folder (a pipeline with unet/ and scheduler/, or a bare UNet with its scheduler
        config), or "file.py:function", where the function returns an nn.Module called as module(sample,
        timestep, **inputs). The file's code is run.
    `checkpoint`: instead of a source, one file with all weights of a latent diffusion model in CompVis'
        layout, .safetensors or .ckpt.
    `ldm_config`: its configuration, a .yaml file; not needed for Stable Diffusion 1.
    `sample_shape`, `inputs`, `scheduler` (a file or folder): read from a diffusers folder; a model from a
        function needs them in the recipe.
    """

    source: str = "."
    checkpoint: str = ""
    ldm_config: str = ""
    name: str = ""
    sample_shape: tuple[int, ...] = ()
    inputs: tuple[InputSpec, ...] = ()
    scheduler: str = ""
    null_class: int | None = None


@dataclass(frozen=True)
class SamplerSpec:
    solver: Solver = "ddim"
    n_steps: int = 20
    eta: float = 0.0
    guidance_scale: float = 1.0


@dataclass(frozen=True)
class CalibrationSpec:
    """How calibration trajectories are sampled and used.

    `size`: trajectories that give ranges and statistics.
    `held_out`: further trajectories, on which the plan's errors and the parity are judged.
    `seed`: seed of all trajectories.
    `trajectory`: the states at which corrections are measured: those of the full-precision network, or those
        that each quantized network visits with its own corrections. The second takes twice the time.
    """

    size: int = 32
    held_out: int = 16
    batch_size: int = 8
    seed: int = 0
    activation_range: Literal["minmax", "percentile", "mse"] = "mse"
    weight_range: Literal["minmax", "percentile", "mse"] = "mse"
    percentile: float = 99.99
    trajectory: Literal["full_precision", "own"] = "full_precision"


@dataclass(frozen=True)
class QuantizationSpec:
    """How layers are quantized and corrected.

    `edge_layers`: first and last conv in "float", or at 8 bits ("w8a8") as in the paper.
    `rounding`: how weights below 8 bits are rounded; "adaround" rounds 8 bits too.
    `iterations`: steps of gradient descent per block, for "adaround".
    `weight_scales`: one scale per output "channel", or one for the whole "tensor".
    `skip`: globs of module paths left in float.
    `gate`: keep of a step's correction what is significant (`core.gate`), or all of it.
    `input_grids`: grids of inputs between two ends of their own, or about zero.
    `conv_outputs`: on ORT CPU, 8-bit grids of conv outputs per "channel", or one for the whole "tensor".
    `smoothing`: how much of the inputs' differences between channels goes into the weights of convs: alpha of
        SmoothQuant, 0 for none.
    `layer_budget`: bit operations that the layers of a precision such as w4a4+ may take, relative to w4a4.
    `layer_bits`: layers of such a precision whose bits are given, as "glob=precision"; the rest is chosen by
        measured sensitivity.
    """

    precisions: tuple[str, ...] = ("w8a8", "w4a8", "w4a4")
    edge_layers: Literal["float", "w8a8"] = "float"
    rounding: Literal["gptq", "gptq-sequential", "adaround", "nearest"] = "gptq"
    iterations: int = 10_000
    weight_scales: Literal["channel", "tensor"] = "channel"
    skip: tuple[str, ...] = ()
    input_grids: Literal["asymmetric", "symmetric"] = "asymmetric"
    conv_outputs: Literal["channel", "tensor"] = "channel"
    smoothing: float = 0.5
    layer_budget: float = 1.15
    layer_bits: tuple[str, ...] = ()
    correction: Mode = "ptqd"
    clamp_k: bool = False
    gate: bool = True
    recalibrate_variance: bool = True


@dataclass(frozen=True)
class PlanSpec:
    """Which precision each step gets.

    `budget`: mean cost per step, as a fraction of full precision's cost, or of the most expensive precision's
        where no full precision is built.
    `steps`: precision per step for rule "fixed", as runs such as "w4a8*12".
    `sensitivity`: what the noise of a step counts: as much as it is "measured" to matter at the end, in
        `sensitivity_groups` groups of steps on `sensitivity_samples` held-out trajectories, or "uniform"ly.
    """

    rule: Rule = "budget"
    objective: Objective = "paired"
    cost: Literal["time", "bops"] = "time"
    budget: float = 1.0
    steps: tuple[str, ...] = ()
    batch_size: int = 4
    sensitivity: Literal["measured", "uniform"] = "measured"
    sensitivity_groups: int = 5
    sensitivity_samples: int = 16


@dataclass(frozen=True)
class TensorRTSpec:
    """How TensorRT and TensorRT-RTX engines are built.

    `batch_sizes`: fewest (always 1), usual and most samples of one engine call; with guidance, a call gets
        twice as many rows.
    `compute_capabilities`: GPUs that a TensorRT-RTX engine is for, such as "8.9"; if empty, all that it
        supports except 7.5. TensorRT builds for the GPU at hand.
    `optimization_level`: the builder's optimization level, 0 to 5; its own default if not given.
    `workspace_mib`: most scratch memory of one layer, in MiB; no limit if not given.
    """

    batch_sizes: tuple[int, ...] = (1, 8, 32)
    compute_capabilities: tuple[str, ...] = ()
    optimization_level: int | None = None
    workspace_mib: int | None = None

    def settings(self, branches: int) -> EngineSettings:
        """Settings for engines of a network that takes `branches` rows per sample."""
        low, usual, high = (size * branches for size in self.batch_sizes)
        return EngineSettings(
            (low, usual, high), self.compute_capabilities, self.optimization_level, self.workspace_mib
        )


@dataclass(frozen=True)
class Recipe:
    """Everything that decides a bundle's contents."""

    model: ModelSpec = field(default_factory=ModelSpec)
    sampler: SamplerSpec = field(default_factory=SamplerSpec)
    calibration: CalibrationSpec = field(default_factory=CalibrationSpec)
    quantization: QuantizationSpec = field(default_factory=QuantizationSpec)
    plan: PlanSpec = field(default_factory=PlanSpec)
    tensorrt: TensorRTSpec = field(default_factory=TensorRTSpec)
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


def check(recipe: Recipe) -> None:
    """Check the ranges that types cannot express.

    Raises:
        RecipeError: a value is out of range.
    """
    s, c, q, p = recipe.sampler, recipe.calibration, recipe.quantization, recipe.plan

    def need(ok: bool, message: str) -> None:
        if not ok:
            raise RecipeError(message)

    need(s.n_steps >= 1, f"sampler.n_steps is {s.n_steps}: give at least 1")
    need(0 <= s.eta <= 1, f"sampler.eta is {s.eta}: give a value in [0, 1] (0 is DDIM, 1 is DDPM)")
    need(
        s.solver != "ddpm" or s.eta == 1,
        "sampler.solver is ddpm, which is eta = 1: set sampler.eta to 1, or the solver to ddim",
    )
    need(
        math.isfinite(s.guidance_scale) and s.guidance_scale >= 0,
        f"sampler.guidance_scale is {s.guidance_scale}: give a finite value >= 0",
    )
    need(c.size >= 2, f"calibration.size is {c.size}: give at least 2 trajectories")
    need(c.held_out >= 2, f"calibration.held_out is {c.held_out}: give at least 2 trajectories")
    need(c.batch_size >= 1, f"calibration.batch_size is {c.batch_size}: give at least 1")
    need(0 <= c.seed < 2**63, f"calibration.seed is {c.seed}: give a value from 0 to 2^63 - 1")
    name, shape = recipe.model.name, recipe.model.sample_shape
    need(name.isprintable(), f"the name {brief(name)} holds characters that cannot be printed: use others")
    m = recipe.model
    need(
        not m.ldm_config or bool(m.checkpoint),
        f"model.ldm_config is {brief(m.ldm_config)}, but model.checkpoint is not set: give the file of its "
        "weights",
    )
    need(
        len(shape) in (0, 3) and all(size >= 1 for size in shape),
        f"model.sample_shape is {list(shape)}: give [channels, height, width]",
    )
    need(50 < c.percentile <= 100, f"calibration.percentile is {c.percentile}: give a value in (50, 100]")
    need(0 <= q.smoothing <= 1, f"quantization.smoothing is {q.smoothing}: give a value in [0, 1]")
    need(1 <= q.layer_budget <= 16, f"quantization.layer_budget is {q.layer_budget}: give a value in [1, 16]")
    for text in q.layer_bits:
        glob, _, given = text.rpartition("=")
        need(
            bool(glob and given),
            f"quantization.layer_bits holds {brief(text)}: give glob=precision, such as *.conv2=w4a8",
        )
        bits = Precision.parse(given)
        need(
            not (bits.is_float or bits.weight_only or bits.mixed) and bits.number == "int",
            f"quantization.layer_bits holds {brief(text)}: give integers of 2 to 8 bits, such as w4a8",
        )
    need(bool(q.precisions), "quantization.precisions is empty: give at least one, such as w8a8")
    precisions = [Precision.parse(text) for text in q.precisions]
    need(
        len(set(precisions)) == len(precisions),
        f"quantization.precisions holds a precision twice: {', '.join(q.precisions)}",
    )
    adaround = q.rounding == "adaround"
    need(
        not adaround or all(p.number == "int" for p in precisions),
        "quantization.rounding is adaround, which chooses integers: leave w8a8-fp8 out, or set it to gptq",
    )
    need(q.iterations >= 1, f"quantization.iterations is {q.iterations}: give at least 1")
    need(
        0 < p.budget <= 1,
        f"plan.budget is {p.budget}: give a fraction in (0, 1] of the dearest precision's cost",
    )
    need(p.batch_size >= 1, f"plan.batch_size is {p.batch_size}: give at least 1")
    for key in ("sensitivity_groups", "sensitivity_samples"):
        need(getattr(p, key) >= 1, f"plan.{key} is {getattr(p, key)}: give at least 1")
    need(
        p.rule != "fixed" or bool(p.steps),
        'plan.rule is fixed but plan.steps is empty: give a precision per step, such as ["w4a8*12", '
        '"w8a8*8"]',
    )
    need(bool(recipe.backends), "backends is empty: give at least one, such as ort-cpu")
    for name in recipe.backends:
        need(name in RUNNABLE, f"backend {brief(name)} is not known: expected one of {', '.join(RUNNABLE)}")
    t, batches = recipe.tensorrt, list(recipe.tensorrt.batch_sizes)
    in_order = len(batches) == 3 and batches == sorted(batches) and batches[0] == 1
    need(
        in_order,
        f"tensorrt.batch_sizes is {batches}: give 1, the usual and the most, such as [1, 8, 32]; the last "
        "batch of a run may hold one sample",
    )
    fits = p.batch_size <= batches[-1] or not set(recipe.backends) & set(ENGINE_BACKENDS)
    need(
        fits,
        f"plan.batch_size is {p.batch_size}, but engines are built for at most {batches[-1]} "
        "(tensorrt.batch_sizes): lower it, or build for more",
    )
    for text in t.compute_capabilities:
        need(
            CAPABILITY.fullmatch(text) is not None,
            f"tensorrt.compute_capabilities holds {brief(text)}: give major.minor, such as 8.9",
        )
    level, space = t.optimization_level, t.workspace_mib
    need(level is None or 0 <= level <= 5, f"tensorrt.optimization_level is {level}: give 0 to 5")
    need(space is None or space >= 1, f"tensorrt.workspace_mib is {space}: give at least 1")
