"""The tables of keys in docs/recipe.md: types and defaults of ptqd_export/recipe/, words of this file.

python benchmarks/recipe_reference.py [--write]
"""

from __future__ import annotations

import argparse
import dataclasses
import types
import typing
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, Literal

from report import table, write_section

from ptqd_export.core.model import InputSpec
from ptqd_export.recipe import Recipe

HEADER = ("key", "value", "default", "option", "meaning")

OPTION: Mapping[str, str] = {
    "backends": "--backend",
    "model.checkpoint": "--checkpoint",
    "model.ldm_config": "--ldm-config",
    "sampler.solver": "--solver",
    "sampler.n_steps": "--n-steps",
    "sampler.eta": "--eta",
    "sampler.guidance_rescale": "--guidance-rescale",
    "sampler.guidance_scale": "--guidance-scale",
    "calibration.size": "--calib-size",
    "calibration.batch_size": "--batch-size",
    "calibration.seed": "--seed",
    "quantization.precisions": "--precision",
    "quantization.rounding": "--rounding",
    "quantization.iterations": "--iterations",
    "quantization.correction": "--correction",
    "quantization.recalibrate_variance": "--recalibrate-variance",
    "plan.rule": "--plan",
    "plan.steps": "--plan",
    "plan.cost": "--cost",
    "plan.budget": "--budget",
    "tensorrt.compute_capabilities": "--compute-capability",
}
"""{key: option of `ptqd-export build` that replaces it}"""

MEANING: Mapping[str, str] = {
    "backends": "what the bundle gets engines and measured times for",
    "model.checkpoint": "in place of a source: a latent diffusion model in one file of CompVis' layout",
    "model.ldm_config": "the checkpoint's configuration, a `.yaml`; not needed for Stable Diffusion 1",
    "model.source": "a diffusers folder, or `file.py:function`: **that code is run**",
    "model.name": "the bundle's name for the model; the folder's or file's name if empty",
    "model.sample_shape": "channels, height, width; read from a diffusers folder, needed for a function",
    "model.inputs": "conditioning inputs, one `[[model.inputs]]` table each: see below",
    "model.scheduler": "a diffusers scheduler config or its folder; needed for a function",
    "model.null_class": "the class that stands for no class in classifier-free guidance",
    "sampler.solver": "what the scheduler config names, if not given; see [solvers.md](solvers.md)",
    "sampler.n_steps": "denoising steps, at least 1",
    "sampler.eta": "of ddim: 0 is deterministic, 1 injects as much noise as DDPM",
    "sampler.guidance_scale": "1 is no guidance; another value needs a null class or a tensor condition",
    "sampler.guidance_rescale": "0 to 1: guided outputs towards the standard deviation of conditional ones",
    "calibration.size": "trajectories, at least 2; the option also sets held_out to half of it",
    "calibration.held_out": "more trajectories, at least 2, for the plan's errors and the parity check",
    "calibration.batch_size": "trajectories at once",
    "calibration.seed": "no sample of a run is a trajectory of calibration, whatever its seed",
    "calibration.activation_range": "how far the grid of a layer's input reaches; mse: least squared error; "
    "tails: the same, but what is cut off counts sqrt(2^bits) times",
    "calibration.weight_range": "the same for weights",
    "calibration.percentile": "for the range percentile: above 50, up to 100",
    "calibration.trajectory": "where corrections are measured; own: where each quantized network goes itself",
    "calibration.prompts": "of a text model, in turn; captions of everyday pictures if there are none",
    "calibration.prompts_file": "in place of prompts: a text file in UTF-8 with one a line",
    "quantization.precisions": "one set of graphs each; see Precisions above",
    "quantization.edge_layers": "the first and last conv: float, or 8 bits as in the paper",
    "quantization.rounding": "of weights below 8 bits; at 8 bits always to the nearest, but with adaround",
    "quantization.iterations": "for adaround: steps of gradient descent per block, at least 1",
    "quantization.weight_scales": "one scale per output channel, or one per layer",
    "quantization.skip": "globs of module paths that stay float, such as `up_blocks.*`",
    "quantization.layer_budget": "what the layers of w4a4+ may cost, relative to w4a4's, at least 1: bit "
    "operations; estimated time at w8a8+",
    "quantization.layer_bits": "layers of such a precision by hand, such as `*.conv_shortcut=w4a8`",
    "quantization.correction": "ptqd: gain per step, offset per step and channel; bias: the offset alone; "
    "affine: both per channel",
    "quantization.input_grids": "inputs' codes between two ends of their own, or about zero",
    "quantization.conv_outputs": "of 8-bit conv outputs (ONNX Runtime's CPU): per channel, or per layer",
    "quantization.smoothing": "0 to 1: how much of their inputs' unevenness convs' weights take",
    "quantization.clamp_k": "hold k at 0 or above, as the paper does",
    "pipeline.text": "take over the text encoder and its tokenizer, so that a run takes prompts",
    "pipeline.decoder": "take over the first stage's decoder, so that a latent model yields pictures",
    "pipeline.tokenizer": "a folder with CLIP's `vocab.json` and `merges.txt`, which Stable Diffusion 1 in "
    "one file lacks",
    "pipeline.weights": "theirs: w8a16 stores those of layers as 8-bit integers, a scale per channel",
    "plan.rule": "budget: least error within a cost; snr, paper: the paper's rule, and its own plan; "
    "first-last: as many first and last steps at a precise choice as fit the budget; fixed: by hand",
    "quantization.gate": "of a step's correction, only what is significant is kept",
    "quantization.recalibrate_variance": "take the variance that stays random off the injected noise",
    "plan.objective": "least distance to the full-precision pictures, or to their distribution",
    "plan.cost": "what the budget counts: measured time or bit operations",
    "plan.budget": "mean cost per step, above 0, up to 1, of full precision's (else the dearest's)",
    "plan.steps": 'for the rule fixed: runs such as `"w4a8*12"`, noisiest step first',
    "plan.batch_size": "samples per call when engines are timed",
    "plan.sensitivity": "what noise in a step counts: what is measured to be left at the end, or the same",
    "plan.sensitivity_groups": "groups of consecutive steps that are measured together",
    "plan.sensitivity_samples": "held-out trajectories that are sampled again for each group and precision",
    "tensorrt.batch_sizes": "fewest (always 1), usual and most samples of one engine call",
    "tensorrt.compute_capabilities": "GPUs of TensorRT-RTX engines; if empty, all that it knows but 7.5",
    "tensorrt.optimization_level": "of the builder, 0 to 5; its own default if not given",
    "tensorrt.workspace_mib": "most scratch memory of one layer; no limit if not given",
    "model.inputs.name": "keyword of the model's forward",
    "model.inputs.dtype": "int64: a class label; float32: a tensor such as text embeddings",
    "model.inputs.shape": "of one sample; empty for a class label",
    "model.inputs.num_classes": "for a class label: how many ids, the null class included",
    "model.inputs.null_class": "for a class label: the id that stands for no class",
    "model.inputs.default": "for a tensor: all its numbers, where nothing is given; else zeros",
    "model.inputs.kept": "for a tensor: the unconditional branch of guidance takes it too (a mask, sizes)",
    "model.inputs.values": "for a tensor: a `.npy` file (N, *shape) for calibration; else normal numbers",
}
"""{key: what it does}; `keys` asks for exactly these."""


def keys(kind: type = Recipe, head: str = "") -> Iterator[tuple[str, Any, Any]]:
    """(key, type, default) of a recipe, inner tables as "section.key"; MISSING where there is no default."""
    hints = typing.get_type_hints(kind)
    for field in dataclasses.fields(kind):
        if hints[field.name] is Path:
            continue  # where the recipe was read from
        default = field.default if field.default_factory is dataclasses.MISSING else field.default_factory()
        if dataclasses.is_dataclass(hints[field.name]):
            yield from keys(hints[field.name], f"{head}{field.name}.")
        else:
            yield f"{head}{field.name}", hints[field.name], default


def kind_name(kind: Any) -> str:
    """A type as words of a table."""
    origin, args = typing.get_origin(kind), typing.get_args(kind)
    if origin is Literal:
        return ", ".join(f"`{value}`" for value in args)
    if origin in (types.UnionType, typing.Union):
        return kind_name(next(arg for arg in args if arg is not type(None)))
    if origin is tuple:
        many = (
            "tables"
            if dataclasses.is_dataclass(args[0])
            else {str: "strings", int: "integers", float: "numbers"}[args[0]]
        )
        return f"array of {many}"
    return {str: "string", int: "integer", float: "number", bool: "true, false"}[kind]


def default_name(default: Any) -> str:
    """A default as TOML."""
    if default is dataclasses.MISSING:
        return "needed"
    if default is None:
        return "-"
    if isinstance(default, bool):
        return f"`{str(default).lower()}`"
    if isinstance(default, tuple):
        return "`[" + ", ".join(default_name(item).strip("`") for item in default) + "]`"
    return f'`"{default}"`' if isinstance(default, str) else f"`{default}`"


def reference() -> str:
    """The section "recipe-keys" of docs/recipe.md.

    Raises:
        SystemExit: MEANING says nothing of a key, or the script says something of a key that is none.
    """
    found = [*keys(), *keys(InputSpec, "model.inputs.")]
    known = {key for key, *_ in found}
    odd = (known ^ MEANING.keys()) | (OPTION.keys() - known)
    if odd:
        raise SystemExit(f"{', '.join(sorted(odd))}: keys of recipes and of this script differ")
    sections: dict[str, list[list[str]]] = {}
    for key, kind, default in found:
        section, _, name = key.rpartition(".")
        option = f"`{OPTION[key]}`" if key in OPTION else ""
        row = [f"`{name}`", kind_name(kind), default_name(default), option, MEANING[key]]
        sections.setdefault(section, []).append(row)
    parts = []
    for section, rows in sorted(sections.items(), key=lambda item: bool(item[0])):
        title = {"": "Top level", "model.inputs": "`[[model.inputs]]`"}.get(section, f"`[{section}]`")
        parts.append(f"### {title}\n\n{table(HEADER, rows)}")
    return "\n\n".join(parts)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--write", action="store_true", help="put the tables into docs/recipe.md")
    options = parser.parse_args()
    text = reference()
    print(text)
    if options.write:
        write_section("recipe-keys", text)


if __name__ == "__main__":
    main()
