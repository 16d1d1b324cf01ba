"""Single-file checkpoints without a configuration: Stable Diffusion 1 is recognised, others are named."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import Tensor

from ..errors import ModelError
from .ldm_config import LdmConfig
from .ldm_names import UNET

FIRST_CONV = UNET + "input_blocks.0.0.weight"
FIRST_CROSS = UNET + "input_blocks.1.1.transformer_blocks.0.attn2.to_k.weight"
TRANSFORMERS = ("double_blocks.", "joint_blocks.", "x_embedder.")
STABLE_DIFFUSION_1: Mapping[str, Any] = {
    "target": "ldm.models.diffusion.ddpm.LatentDiffusion",
    "params": {
        "linear_start": 0.00085,
        "linear_end": 0.0120,
        "timesteps": 1000,
        "image_size": 64,
        "channels": 4,
        "conditioning_key": "crossattn",
        "scale_factor": 0.18215,
        "use_ema": False,
        "unet_config": {
            "target": "ldm.modules.diffusionmodules.openaimodel.UNetModel",
            "params": {
                "in_channels": 4,
                "out_channels": 4,
                "model_channels": 320,
                "attention_resolutions": [4, 2, 1],
                "num_res_blocks": 2,
                "channel_mult": [1, 2, 4, 4],
                "num_heads": 8,
                "use_spatial_transformer": True,
                "transformer_depth": 1,
                "context_dim": 768,
                "legacy": False,
            },
        },
        "first_stage_config": {
            "target": "ldm.models.autoencoder.AutoencoderKL",
            "params": {
                "embed_dim": 4,
                "ddconfig": {
                    "z_channels": 4,
                    "resolution": 256,
                    "ch": 128,
                    "ch_mult": [1, 2, 4, 4],
                    "num_res_blocks": 2,
                },
            },
        },
        "cond_stage_config": {"target": "ldm.modules.encoders.modules.FrozenCLIPEmbedder"},
    },
}
"""v1-inference.yaml of Stable Diffusion."""


def recognise(held: Mapping[str, Tensor], file: Path) -> LdmConfig:
    """The configuration of a checkpoint by its names and shapes.

    Raises:
        ModelError: it is not Stable Diffusion 1; says what else to give.
    """
    first, cross = held.get(FIRST_CONV), held.get(FIRST_CROSS)
    if first is None or first.ndim != 4:
        if any(part in key for key in held for part in TRANSFORMERS):
            raise ModelError(
                f"{file} holds a transformer (Flux, SD 3), which is not supported: supported are UNets"
            )
        raise ModelError(
            f"{file} holds no {FIRST_CONV}: it is no checkpoint in CompVis' layout; give a diffusers folder"
        )
    if any(key.startswith("conditioner.") for key in held):
        raise ModelError(f"{file} is Stable Diffusion XL in one file: give its diffusers folder instead")
    width, channels = (None if cross is None else cross.shape[-1]), first.shape[1]
    if width == 768 and tuple(first.shape) in ((320, 4, 3, 3), (320, 9, 3, 3)):
        params = STABLE_DIFFUSION_1["params"]
        unet = params["unet_config"]
        own = {**unet, "params": {**unet["params"], "in_channels": channels}}
        plain = {"model": {**STABLE_DIFFUSION_1, "params": {**params, "unet_config": own}}}
        return LdmConfig.from_plain(plain, "v1-inference.yaml of Stable Diffusion")
    if width == 1024:
        raise ModelError(
            f"{file} looks like Stable Diffusion 2, and does not say whether it predicts noise or v: give "
            "--ldm-config v2-inference.yaml or v2-inference-v.yaml"
        )
    raise ModelError(
        f"{file} is not Stable Diffusion 1 (its first conv takes {channels} channels, its text has width "
        f"{width}): give its configuration, --ldm-config FILE.yaml"
    )
