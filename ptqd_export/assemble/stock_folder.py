"""A bundle as a folder that stock pipelines of ONNX models open: optimum-onnx, optimum-intel.

model_index.json  unet/  vae_decoder/  text_encoder/  tokenizer/  scheduler/

Such a pipeline has one network for all steps, a scheduler of diffusers and its own guidance. The correction
is in the network's graph, by the timestep; the recalibrated variance is left out.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..bundle.bundle import Bundle
from ..bundle.pipeline import LATENT, MODEL, Decoder, TextEncoder, graph_file
from ..bundle.tokenizer import MERGES, VOCABULARY
from ..core.backend import Emission
from ..core.model import TEXT
from ..core.precision import Precision
from ..core.scheduler_config import CLASSES
from ..errors import RecipeError
from ..export import save, stock_unet, with_offset
from ..export.graph import load
from ..files import check_target, replacing

WEIGHTS = f"{MODEL}_data"
"""Of a graph; hubs take files of this name along with it."""
ABOUT = "ptqd_export.json"
TOKENIZER_CONFIG = "tokenizer_config.json"


@dataclass(frozen=True)
class Stock:
    """What was written, and what a pipeline must be asked for.

    Attributes:
        precision, emission: of the network's graph.
        scheduler: class in diffusers.
        call: arguments of the pipeline's call.
    """

    precision: Precision
    emission: Emission
    scheduler: str
    call: Mapping[str, Any]


def write_stock(bundle: Bundle, out: Path, precision: Precision | None, emission: Emission) -> Stock:
    """Write the folder at `out`, in one step.

    Args:
        precision: of the network; None is the one of most steps of the plan.
        emission: the form of its graph; the correction is that of its numerics.
    Raises:
        RecipeError: no stock pipeline takes such a model, the bundle has no such precision, or something else
            than an older folder of this kind stands at `out`.
    """
    m = bundle.manifest
    encoder, decoder = _parts(bundle)
    steps = m.plan.steps
    precision = precision or max(dict.fromkeys(steps), key=steps.count)
    graph = next((g for g in m.graphs if (g.precision, g.emission) == (precision, emission)), None)
    if graph is None:
        known = dict.fromkeys(str(g.precision) for g in m.graphs)
        raise RecipeError(f"the bundle has no graph of {precision}: it has {', '.join(known)}")
    out = check_target(out, "a pipeline", _in_the_way)
    schedule, scale = m.sampling.schedule, m.sampling.guidance_scale
    name, config = _scheduler(bundle)
    call = {"num_inference_steps": schedule.n_steps, "guidance_scale": scale}
    call |= {"eta": schedule.eta} if schedule.eta else {}
    stock = Stock(precision, emission, name, call)
    unet = stock_unet(load(bundle.file(graph.file)), schedule, bundle.correction(precision, emission))
    pictures = load(bundle.file(graph_file(decoder)))
    if decoder.shift_factor:
        pictures = with_offset(pictures, LATENT, decoder.shift_factor)
    configs = {
        "unet": _unet_config(bundle),
        decoder.folder: _decoder_config(decoder),
        encoder.folder: _encoder_config(encoder),
    }
    texts = load(bundle.file(graph_file(encoder)))
    with replacing(out, _in_the_way) as tmp:
        for folder, model in (("unet", unet), (decoder.folder, pictures), (encoder.folder, texts)):
            (tmp / folder).mkdir()
            save({MODEL.removesuffix(".onnx"): model}, tmp / folder, WEIGHTS)
            _write(tmp / folder / "config.json", configs[folder])
        (tmp / "scheduler").mkdir()
        _write(tmp / "scheduler" / "scheduler_config.json", config)
        _write_tokenizer(bundle, encoder, tmp / "tokenizer")
        _write(tmp / "model_index.json", _index(name))
        about = {"bundle": bundle.seal, "precision": str(precision), "emission": str(emission), "call": call}
        _write(tmp / ABOUT, about)
        bundle.check_unchanged()
    return stock


def _parts(bundle: Bundle) -> tuple[TextEncoder, Decoder]:
    p, model = bundle.manifest.pipeline, bundle.manifest.sampling.model
    if len(p.encoders) != 1 or p.decoder is None:
        raise RecipeError(
            f"{bundle.path} holds {len(p.encoders)} text encoders and {'a' if p.decoder else 'no'} decoder: "
            "a stock pipeline needs one of each; use `ptqd-export run`"
        )
    others = [spec.name for spec in model.inputs if spec.name != TEXT]
    if others or p.encoders[0].input != TEXT:
        raise RecipeError(
            f"{model.name} takes {', '.join(others)} beside {TEXT}, which stock pipelines do not give: use "
            "`ptqd-export run`, or PtqdUNet in a pipeline of diffusers"
        )
    if p.decoder.image_range != (-1.0, 1.0):
        raise RecipeError(
            f"the decoder's pictures go from {p.decoder.image_range[0]:g} to {p.decoder.image_range[1]:g}, "
            "stock pipelines expect -1 to 1: use `ptqd-export run`"
        )
    return p.encoders[0], p.decoder


def _scheduler(bundle: Bundle) -> tuple[str, dict[str, Any]]:
    """Class and config of diffusers' scheduler that goes through the bundle's steps."""
    m = bundle.manifest
    config, solver = dict(m.provenance.scheduler), m.sampling.schedule.solver
    if not config:
        raise RecipeError(f"{bundle.path} holds no config of its model's scheduler: rebuild it")
    own = str(config.get("_class_name"))
    of_solver = next(iter(name for name, known in CLASSES.items() if known == solver), "")
    name = own if CLASSES.get(own) == solver else of_solver
    if solver == "sde-dpmsolver++":
        name, config["algorithm_type"] = "DPMSolverMultistepScheduler", solver
    return name, {**config, "_class_name": name}


def _index(scheduler: str) -> dict[str, Any]:
    nothing = [None, None]
    return {
        "_class_name": "StableDiffusionPipeline",
        "feature_extractor": nothing,
        "image_encoder": nothing,
        "requires_safety_checker": False,
        "safety_checker": nothing,
        "scheduler": ["diffusers", scheduler],
        "text_encoder": ["transformers", "CLIPTextModel"],
        "tokenizer": ["transformers", "CLIPTokenizer"],
        "unet": ["diffusers", "UNet2DConditionModel"],
        "vae": ["diffusers", "AutoencoderKL"],
    }


def _unet_config(bundle: Bundle) -> dict[str, Any]:
    model = bundle.manifest.sampling.model
    height, width = model.sample_shape[1:]
    text = next(spec for spec in model.inputs if spec.name == TEXT)
    return {
        "_class_name": "UNet2DConditionModel",
        "cross_attention_dim": text.shape[-1],
        "in_channels": model.channels,
        "out_channels": model.channels,
        "sample_size": height if height == width else [height, width],
        "time_cond_proj_dim": None,
    }


def _decoder_config(decoder: Decoder) -> dict[str, Any]:
    """Pipelines count its levels to know how many pixels a latent has."""
    ratio = decoder.picture_shape[1] // decoder.latent_shape[1]
    return {
        "_class_name": "AutoencoderKL",
        "block_out_channels": [1] * ratio.bit_length(),
        "latent_channels": decoder.latent_shape[0],
        "out_channels": decoder.picture_shape[0],
        "sample_size": decoder.picture_shape[1],
        "scaling_factor": decoder.scaling_factor,
        "shift_factor": None,  # in the graph
    }


def _encoder_config(encoder: TextEncoder) -> dict[str, Any]:
    return {
        "architectures": ["CLIPTextModel"],
        "eos_token_id": encoder.special.end,
        "hidden_size": encoder.width,
        "max_position_embeddings": encoder.tokens,
        "model_type": "clip_text_model",
        "num_hidden_layers": 1,  # the graph gives the states of one
        "vocab_size": encoder.vocabulary,
    }


def _write_tokenizer(bundle: Bundle, encoder: TextEncoder, folder: Path) -> None:
    folder.mkdir()
    vocabulary = bundle.read(f"{encoder.tokenizer}/{VOCABULARY}")
    (folder / VOCABULARY).write_bytes(vocabulary)
    (folder / MERGES).write_bytes(bundle.read(f"{encoder.tokenizer}/{MERGES}"))
    text = {number: token for token, number in json.loads(vocabulary).items()}
    s = encoder.special
    ends = {"bos_token": s.begin, "eos_token": s.end, "pad_token": s.pad, "unk_token": s.unknown}
    config = {
        "tokenizer_class": "CLIPTokenizer",
        "model_max_length": encoder.tokens,
        **{name: text[number] for name, number in ends.items()},
    }
    _write(folder / TOKENIZER_CONFIG, config)


def _write(file: Path, data: Mapping[str, Any]) -> None:
    file.write_text(json.dumps(data, indent=2, allow_nan=False) + "\n", "utf-8")


def _in_the_way(inside: list[Path]) -> str | None:
    """Says what of a folder's content is not ours; None where all of it is."""
    ours = any(file.name == ABOUT for file in inside)
    return None if ours else "it holds no older pipeline of ours; give an empty or new folder"
