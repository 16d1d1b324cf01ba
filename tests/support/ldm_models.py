"""Latent diffusion models in CompVis' layout: the public configurations, small or whole, on disk."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import yaml
from ldm_autoencoder import Autoencoder
from ldm_original import UNetModel
from torch import Tensor, nn

from ptqd_export.recipe import Recipe

LDM = "ldm.models.diffusion.ddpm.LatentDiffusion"
UNET = "ldm.modules.diffusionmodules.openaimodel.UNetModel"
MODULES = "ldm.modules.encoders.modules."
VQ: dict[str, Any] = {
    "z_channels": 3,
    "resolution": 256,
    "in_channels": 3,
    "out_ch": 3,
    "ch": 128,
    "ch_mult": [1, 2, 4],
    "num_res_blocks": 2,
    "attn_resolutions": [],
    "dropout": 0.0,
    "double_z": False,
}
KL = VQ | {"z_channels": 4, "ch_mult": [1, 2, 4, 4], "double_z": True}
VQ_STAGE = {
    "target": "ldm.models.autoencoder.VQModelInterface",
    "params": {
        "embed_dim": 3,
        "n_embed": 8192,
        "ddconfig": VQ,
        "lossconfig": {"target": "torch.nn.Identity"},
    },
}
KL_STAGE = {
    "target": "ldm.models.autoencoder.AutoencoderKL",
    "params": {"embed_dim": 4, "ddconfig": KL, "lossconfig": {"target": "torch.nn.Identity"}},
}


def _config(
    first: Mapping[str, Any], condition: Any, unet: Mapping[str, Any], **params: Any
) -> dict[str, Any]:
    plain = {
        "timesteps": 1000, "log_every_t": 200, "monitor": "val/loss_simple_ema", "first_stage_key": "image",
        "first_stage_config": first, "cond_stage_config": condition,
        "unet_config": {"target": UNET, "params": {"num_res_blocks": 2, **unet}},
    }  # fmt: skip
    whole = {"model": {"base_learning_rate": 1e-06, "target": LDM, "params": {**plain, **params}}}
    return copy.deepcopy(whole)


CONFIGURATIONS: dict[str, dict[str, Any]] = {
    "cin256-v2": _config(
        VQ_STAGE,
        {"target": MODULES + "ClassEmbedder", "params": {"n_classes": 1001, "embed_dim": 512, "key": "c"}},
        {
            "image_size": 64, "in_channels": 3, "out_channels": 3, "model_channels": 192,
            "attention_resolutions": [8, 4, 2], "channel_mult": [1, 2, 3, 5], "num_heads": 1,
            "use_spatial_transformer": True, "transformer_depth": 1, "context_dim": 512,
        },
        linear_start=0.0015, linear_end=0.0195, image_size=64, channels=3, use_ema=False,
        conditioning_key="crossattn", cond_stage_key="c",
    ),
    "lsun_beds256": _config(
        VQ_STAGE,
        "__is_unconditional__",
        {
            "image_size": 64, "in_channels": 3, "out_channels": 3, "model_channels": 224,
            "attention_resolutions": [8, 4, 2], "channel_mult": [1, 2, 3, 4], "num_head_channels": 32,
        },
        linear_start=0.0015, linear_end=0.0195, image_size=64, channels=3,
    ),
    "lsun_churches256": _config(
        KL_STAGE,
        "__is_unconditional__",
        {
            "image_size": 32, "in_channels": 4, "out_channels": 4, "model_channels": 192,
            "attention_resolutions": [1, 2, 4, 8], "channel_mult": [1, 2, 2, 4, 4], "num_heads": 8,
            "use_scale_shift_norm": True, "resblock_updown": True,
        },
        linear_start=0.0015, linear_end=0.0155, image_size=32, channels=4, scale_by_std=True, loss_type="l1",
    ),
    "v1-inference": _config(
        KL_STAGE,
        {"target": MODULES + "FrozenCLIPEmbedder"},
        {
            "image_size": 32, "in_channels": 4, "out_channels": 4, "model_channels": 320,
            "attention_resolutions": [4, 2, 1], "channel_mult": [1, 2, 4, 4], "num_heads": 8,
            "use_spatial_transformer": True, "transformer_depth": 1, "context_dim": 768,
            "use_checkpoint": True, "legacy": False,
        },
        linear_start=0.00085, linear_end=0.0120, image_size=64, channels=4, scale_factor=0.18215,
        use_ema=False, conditioning_key="crossattn",
    ),
}  # fmt: skip
"""{name: the configuration file as it is published}"""
SMALL_WIDTH = 32
"""Channels of small versions: the fewest that 32 groups divide."""


def small(name: str) -> dict[str, Any]:
    """A configuration with fewer channels, one block a level and small latents; all else as published."""
    config = copy.deepcopy(CONFIGURATIONS[name])
    params = config["model"]["params"]
    unet, first = params["unet_config"]["params"], params["first_stage_config"]["params"]
    unet.update(model_channels=SMALL_WIDTH, num_res_blocks=1, image_size=16)
    if unet.get("context_dim"):
        unet["context_dim"] = 24
    if "params" in params["cond_stage_config"]:
        params["cond_stage_config"]["params"]["embed_dim"] = 24
    params["image_size"] = 16
    first["ddconfig"].update(ch=32, num_res_blocks=1)
    if "n_embed" in first:
        first["n_embed"] = 64
    return config


def shallow(name: str) -> dict[str, Any]:
    """`small` with two levels, both with attention: for what does not depend on the depth."""
    config = small(name)
    config["model"]["params"]["unet_config"]["params"] |= {
        "channel_mult": [1, 2],
        "attention_resolutions": [1, 2],
    }
    return config


@dataclass
class Original:
    """A model of a configuration by CompVis' definition, with seeded random weights."""

    unet: nn.Module
    first_stage: nn.Module
    table: nn.Embedding | None
    state: dict[str, Tensor]


def _spread(module: nn.Module) -> nn.Module:
    """Weights of which each counts: norms are not 1 and 0, and what training starts at zero is not."""
    with torch.no_grad():
        for name, value in module.named_parameters():
            if value.ndim == 1:
                value.normal_(1.0 if name.endswith("weight") else 0.0, 0.2)
    return module.eval().requires_grad_(False)


def original(config: Mapping[str, Any], seed: int = 0) -> Original:
    """The model and its state_dict, schedule buffers and averaged weights included."""
    params = config["model"]["params"]
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        unet = _spread(UNetModel(**params["unet_config"]["params"]))
        first = _spread(Autoencoder(**params["first_stage_config"]["params"]))
        condition = params["cond_stage_config"]
        known = condition["params"] if "ClassEmbedder" in str(condition) else None
        table = None if known is None else nn.Embedding(known["n_classes"], known["embed_dim"])
        scale = torch.rand(()) + 0.5
    start, end = params["linear_start"] ** 0.5, params["linear_end"] ** 0.5
    betas = torch.linspace(start, end, params["timesteps"], dtype=torch.float64) ** 2
    state = {"betas": betas.float(), "alphas_cumprod": torch.cumprod(1 - betas, 0).float()}
    averaged = params.get("use_ema", True)
    for name, value in unet.state_dict().items():
        key = "model.diffusion_model." + name
        state[key] = value
        if averaged:  # what was trained last is another model
            state[key] = value + 0.01
            state["model_ema." + ("diffusion_model." + name).replace(".", "")] = value
    if averaged:
        state["model_ema.decay"] = torch.tensor(0.9999)
        state["model_ema.num_updates"] = torch.tensor(7)
    state |= {"first_stage_model." + name: value for name, value in first.state_dict().items()}
    if params.get("scale_by_std"):
        state["scale_factor"] = scale
    if table is not None:
        state["cond_stage_model.embedding.weight"] = table.weight.detach()
    return Original(unet, first, table, state)


def write(folder: Path, config: Mapping[str, Any], state: Mapping[str, Tensor]) -> None:
    """config.yaml and model.ckpt, as a training run of CompVis leaves them but for Lightning's objects."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.yaml").write_text(yaml.safe_dump(copy.deepcopy(dict(config)), sort_keys=False))
    torch.save({"epoch": 3, "global_step": 12, "state_dict": dict(state)}, folder / "model.ckpt")


def edit(folder: Path, old: str, new: str) -> None:
    """Replace a text of the configuration."""
    file = folder / "config.yaml"
    text = file.read_text()
    assert old in text
    file.write_text(text.replace(old, new))


def ldm_recipe(folder: Path, **model: Any) -> Recipe:
    """The recipe for what `write` wrote."""
    files = {"checkpoint": "model.ckpt", "ldm_config": "config.yaml"}
    return Recipe.from_dict({"model": files | model}, folder)
