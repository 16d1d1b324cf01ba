"""A tiny Stable Diffusion with seeded random weights, in diffusers' layout, and a tokenizer for it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch

BEGIN, END = "<|startoftext|>", "<|endoftext|>"
TOKENS = 8
MERGES = [
    ("c", "a"), ("ca", "t</w>"), ("d", "o"), ("do", "g</w>"), ("p", "h"), ("o", "t"), ("ph", "ot"),
    ("phot", "o</w>"), ("o", "f</w>"),
]  # fmt: skip


def alphabet() -> list[str]:
    """The 256 characters by which byte-level BPE writes the bytes."""
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
    return [*map(chr, printable), *(chr(256 + i) for i in range(256 - len(printable)))]


def write_tokenizer(folder: Path, **config: Any) -> int:
    """Write vocab.json, merges.txt and tokenizer_config.json; returns the number of tokens."""
    letters = alphabet()
    tokens = [*letters, *(f"{c}</w>" for c in letters), *(a + b for a, b in MERGES), BEGIN, END]
    folder.mkdir(parents=True)
    (folder / "vocab.json").write_text(json.dumps({token: i for i, token in enumerate(tokens)}), "utf-8")
    lines = ["#version: 0.2", *(" ".join(pair) for pair in MERGES)]
    (folder / "merges.txt").write_text("\n".join(lines) + "\n", "utf-8")
    about = {
        "tokenizer_class": "CLIPTokenizer",
        "model_max_length": TOKENS,
        "bos_token": BEGIN,
        "eos_token": END,
        "unk_token": END,
        "pad_token": END,
        **config,
    }
    (folder / "tokenizer_config.json").write_text(json.dumps(about), "utf-8")
    return len(tokens)


def tiny_vae(**changes: Any) -> Any:
    """8x8 pictures, 4 x 4 x 4 latents."""
    from diffusers import AutoencoderKL

    torch.manual_seed(3)
    return AutoencoderKL(
        **{
            "block_out_channels": (4, 4),
            "down_block_types": ("DownEncoderBlock2D",) * 2,
            "up_block_types": ("UpDecoderBlock2D",) * 2,
            "layers_per_block": 1,
            "norm_num_groups": 2,
            "sample_size": 8,
            "scaling_factor": 0.5,
            "mid_block_add_attention": False,
            **changes,
        }
    )


def text_config(vocabulary: int, **changes: Any) -> dict[str, Any]:
    """One layer of 8 channels."""
    return {
        "vocab_size": vocabulary, "hidden_size": 8, "projection_dim": 8, "intermediate_size": 16,
        "num_hidden_layers": 1, "num_attention_heads": 2, "max_position_embeddings": TOKENS,
        "bos_token_id": vocabulary - 2, "eos_token_id": vocabulary - 1, "pad_token_id": vocabulary - 1,
        **changes,
    }  # fmt: skip


def tiny_text(vocabulary: int, kind: str = "CLIPTextModel", seed: int = 4, **changes: Any) -> Any:
    """Weights large enough that words matter."""
    import transformers

    torch.manual_seed(seed)
    config = transformers.CLIPTextConfig(**text_config(vocabulary, **changes))
    module = getattr(transformers, kind)(config)
    with torch.no_grad():
        for parameter in module.parameters():
            if parameter.ndim == 2:
                parameter.mul_(15)
    return module


def save_text_pipeline(folder: Path) -> Path:
    """A whole pipeline: unet/, scheduler/, vae/, text_encoder/, tokenizer/."""
    from diffusers import UNet2DConditionModel

    with torch.random.fork_rng(devices=[]):
        size = write_tokenizer(folder / "tokenizer")
        tiny_text(size).save_pretrained(folder / "text_encoder")
        tiny_vae().save_pretrained(folder / "vae")
        torch.manual_seed(5)
        UNet2DConditionModel(
            sample_size=4, block_out_channels=(4,), layers_per_block=1, cross_attention_dim=8,
            down_block_types=("CrossAttnDownBlock2D",), up_block_types=("CrossAttnUpBlock2D",),
            mid_block_type=None, attention_head_dim=1, norm_num_groups=2,
        ).save_pretrained(folder / "unet")  # fmt: skip
    _save_scheduler(folder)
    return folder


def save_sd2_pipeline(folder: Path) -> Path:
    """As Stable Diffusion 2: OpenCLIP's activation, another token for padding, linear projections, v."""
    from diffusers import UNet2DConditionModel

    with torch.random.fork_rng(devices=[]):
        size = write_tokenizer(folder / "tokenizer", pad_token="!")
        text = tiny_text(size, num_hidden_layers=3, hidden_act="gelu", projection_dim=5, eos_token_id=2)
        text.save_pretrained(folder / "text_encoder")
        torch.manual_seed(5)
        UNet2DConditionModel(
            sample_size=4, block_out_channels=(4,), layers_per_block=1, cross_attention_dim=8,
            down_block_types=("CrossAttnDownBlock2D",), up_block_types=("CrossAttnUpBlock2D",),
            mid_block_type=None, attention_head_dim=[2], norm_num_groups=2, use_linear_projection=True,
        ).save_pretrained(folder / "unet")  # fmt: skip
    _save_scheduler(folder, prediction_type="v_prediction")
    return folder


def save_sdxl_pipeline(folder: Path, **index: Any) -> Path:
    """As Stable Diffusion XL: encoders of 8 and 12 channels, pooled text of 6, sizes of 8 values each.

    Args:
        index: entries of model_index.json.
    """
    from diffusers import UNet2DConditionModel

    with torch.random.fork_rng(devices=[]):
        size = write_tokenizer(folder / "tokenizer")
        write_tokenizer(folder / "tokenizer_2", pad_token="!")
        first = tiny_text(size, num_hidden_layers=2, projection_dim=6)
        first.save_pretrained(folder / "text_encoder")
        tiny_text(
            size, "CLIPTextModelWithProjection", 6, num_hidden_layers=3, hidden_size=12, projection_dim=6,
            num_attention_heads=3, hidden_act="gelu",
        ).save_pretrained(folder / "text_encoder_2")  # fmt: skip
        tiny_vae().save_pretrained(folder / "vae")
        torch.manual_seed(5)
        UNet2DConditionModel(
            sample_size=4, block_out_channels=(4,), layers_per_block=1, cross_attention_dim=20,
            down_block_types=("CrossAttnDownBlock2D",), up_block_types=("CrossAttnUpBlock2D",),
            mid_block_type=None, attention_head_dim=[2], norm_num_groups=2, use_linear_projection=True,
            addition_embed_type="text_time", addition_time_embed_dim=8,
            projection_class_embeddings_input_dim=6 * 8 + 6,
        ).save_pretrained(folder / "unet")  # fmt: skip
    _save_scheduler(folder)
    about = {"_class_name": "StableDiffusionXLPipeline", "force_zeros_for_empty_prompt": True, **index}
    (folder / "model_index.json").write_text(json.dumps(about), "utf-8")
    return folder


def _save_scheduler(folder: Path, **changes: Any) -> None:
    from diffusers import DDIMScheduler

    DDIMScheduler(
        beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear", clip_sample=False,
        set_alpha_to_one=False, steps_offset=1, **changes,
    ).save_pretrained(folder / "scheduler")  # fmt: skip
