"""The sections of a recipe, with all defaults."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from ..core.engine_build import EngineSettings
from ..core.model import InputSpec
from ..core.noise import Mode
from ..core.plan import Rule
from ..core.sensitivity import Objective
from ..core.solvers import Solver


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
    """How samples are drawn.

    `solver`: if not given, the one that the scheduler config's class names.
    `eta`: of solver ddim.
    `guidance_rescale`: how far guided outputs are brought back to the standard deviation of conditional ones.
    """

    solver: Solver | None = None
    n_steps: int = 20
    eta: float = 0.0
    guidance_scale: float = 1.0
    guidance_rescale: float = 0.0


@dataclass(frozen=True)
class CalibrationSpec:
    """How calibration trajectories are sampled and used.

    `size`: trajectories that give ranges and statistics.
    `held_out`: further trajectories, on which the plan's errors and the parity are judged.
    `seed`: seed of all trajectories.
    `prompts`, or `prompts_file` (UTF-8, one a line): what trajectories of a text model are sampled for, in
        turn; short captions of everyday pictures if neither is given.
    `trajectory`: the states at which corrections are measured: those of the full-precision network, or those
        that each quantized network visits with its own corrections. The second takes twice the time.
    """

    size: int = 32
    held_out: int = 16
    batch_size: int = 8
    seed: int = 0
    activation_range: Literal["minmax", "percentile", "mse", "tails"] = "tails"
    weight_range: Literal["minmax", "percentile", "mse"] = "mse"
    percentile: float = 99.99
    trajectory: Literal["full_precision", "own"] = "full_precision"
    prompts: tuple[str, ...] = ()
    prompts_file: str = ""


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
    `layer_budget`: what the layers of a precision such as w4a4+ may cost, relative to w4a4: bit operations,
        or, at w8a8+, time as `core.bits` estimates it.
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
class PipelineSpec:
    """What the bundle takes over of a diffusers pipeline, beside its UNet.

    `text`: text encoder and tokenizer, so that a run takes prompts.
    `decoder`: the first stage's decoder, so that a run of a latent model yields pictures.
    `tokenizer`: a folder with CLIP's vocab.json and merges.txt, for the text encoder of a checkpoint in one
        file, which has none.
    `weights`: how theirs are stored: "fp32", or "w8a16": layers' weights as 8-bit integers, a scale per
        channel.
    """

    text: bool = True
    decoder: bool = True
    tokenizer: str = ""
    weights: Literal["fp32", "w8a16"] = "fp32"
