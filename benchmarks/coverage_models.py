"""What `coverage.py` builds: block types, settings and public models of diffusers' UNets, in small.

The settings are those that diffusers' own tests of UNet2DModel, UNet2DConditionModel and their blocks use,
and those that configs of published models hold. Widths and depths are small, and all weights are random.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

PLAIN, TEXT = "UNet2DModel", "UNet2DConditionModel"
WIDTH, TOKENS, SIZE = 16, 4, 16
"""Of text, in channels and tokens; of samples, in pixels."""
BLOCKS, SETTINGS, MODELS = "blocks", "settings", "published models, small"


@dataclass(frozen=True)
class Configuration:
    """A UNet, and how it is built.

    Attributes:
        name: what it shows.
        kind: class in diffusers, for the arguments in `config`.
        group: of the table.
        scheduler: entries of its scheduler's config.
    """

    name: str
    kind: str
    group: str
    config: Mapping[str, Any]
    scheduler: Mapping[str, Any] = field(default_factory=dict)

    @property
    def text_width(self) -> int | None:
        """Of the text that it takes; None where it takes none."""
        hidden, width = self.config.get("encoder_hid_dim_type"), self.config.get("cross_attention_dim")
        if self.kind == PLAIN or hidden == "image_proj":
            return None
        return int(
            self.config["encoder_hid_dim"] if hidden else width[0] if isinstance(width, tuple) else width
        )


_BASE: dict[str, Any] = {
    "sample_size": SIZE, "block_out_channels": (32, 32), "layers_per_block": 1, "norm_num_groups": 8,
    "attention_head_dim": 8,
}  # fmt: skip
_PLAIN = {
    **_BASE, "down_block_types": ("DownBlock2D", "AttnDownBlock2D"),
    "up_block_types": ("AttnUpBlock2D", "UpBlock2D"),
}  # fmt: skip
_TEXT = {
    **_BASE, "down_block_types": ("CrossAttnDownBlock2D", "DownBlock2D"),
    "up_block_types": ("UpBlock2D", "CrossAttnUpBlock2D"), "cross_attention_dim": WIDTH,
    "attention_head_dim": 2,
}  # fmt: skip
_K = {"down_block_types": ("KDownBlock2D",) * 2, "up_block_types": ("KUpBlock2D",) * 2, "act_fn": "gelu"}
_SIMPLE = {
    "down_block_types": ("ResnetDownsampleBlock2D", "SimpleCrossAttnDownBlock2D"),
    "mid_block_type": "UNetMidBlock2DSimpleCrossAttn",
    "up_block_types": ("SimpleCrossAttnUpBlock2D", "ResnetUpsampleBlock2D"), "attention_head_dim": 8,
}  # fmt: skip
_NCSNPP = {
    "down_block_types": ("SkipDownBlock2D", "AttnSkipDownBlock2D"),
    "up_block_types": ("AttnSkipUpBlock2D", "SkipUpBlock2D"),
}
_TRAILING = {"timestep_spacing": "trailing"}
"""For the logarithm of the timestep, which must not be 0."""
_LEARNED = {"variance_type": "learned_range", "_class_name": "DDIMScheduler"}


def _pair(stem: str) -> dict[str, Any]:
    down, up = (f"{stem.replace('?', way)}" for way in ("Down", "Up"))
    return {"down_block_types": (down, down), "up_block_types": (up, up)}


_PLAIN_BLOCKS: dict[str, dict[str, Any]] = {
    "DownBlock2D, UpBlock2D": _pair("?Block2D"),
    "AttnDownBlock2D, AttnUpBlock2D": _pair("Attn?Block2D"),
    "ResnetDownsampleBlock2D, ResnetUpsampleBlock2D": _pair("Resnet?sampleBlock2D"),
    "SkipDownBlock2D, SkipUpBlock2D": _pair("Skip?Block2D"),
    "AttnSkipDownBlock2D, AttnSkipUpBlock2D": _NCSNPP,
    "KDownBlock2D, KUpBlock2D": {**_K, "add_attention": False},
    "UNetMidBlock2D without attention": {"add_attention": False},
    "no middle block": {"mid_block_type": None},
}
_TEXT_BLOCKS: dict[str, dict[str, Any]] = {
    "DownBlock2D, UpBlock2D": _pair("?Block2D"),
    "CrossAttnDownBlock2D, CrossAttnUpBlock2D": _pair("CrossAttn?Block2D"),
    "SimpleCrossAttnDownBlock2D, SimpleCrossAttnUpBlock2D": {
        **_pair("SimpleCrossAttn?Block2D"), "mid_block_type": "UNetMidBlock2DSimpleCrossAttn",
    },
    "ResnetDownsampleBlock2D, ResnetUpsampleBlock2D": _pair("Resnet?sampleBlock2D"),
    "KCrossAttnDownBlock2D, KCrossAttnUpBlock2D": {
        "block_out_channels": (32, 64, 64), "time_embedding_dim": 64, "mid_block_type": None,
        "act_fn": "gelu",
        "conv_in_kernel": 1, "conv_out_kernel": 1, "norm_num_groups": None, "layers_per_block": 2,
        "down_block_types": ("KDownBlock2D", "KCrossAttnDownBlock2D", "KCrossAttnDownBlock2D"),
        "up_block_types": ("KCrossAttnUpBlock2D", "KCrossAttnUpBlock2D", "KUpBlock2D"),
        "attention_head_dim": 8, "resnet_time_scale_shift": "scale_shift",
    },
    "AttnDownBlock2D, AttnUpBlock2D": {**_pair("Attn?Block2D"), "attention_head_dim": 8},
    "UNetMidBlock2D": {"mid_block_type": "UNetMidBlock2D"},
    "no middle block": {"mid_block_type": None},
}  # fmt: skip
_PLAIN_SETTINGS: dict[str, dict[str, Any]] = {
    "time_embedding_type fourier": {"time_embedding_type": "fourier", "flip_sin_to_cos": False},
    "time_embedding_type learned": {"time_embedding_type": "learned", "num_train_timesteps": 1000},
    "time_embedding_dim": {"time_embedding_dim": 48},
    "flip_sin_to_cos, freq_shift": {"flip_sin_to_cos": False, "freq_shift": 1},
    "center_input_sample": {"center_input_sample": True},
    "downsample_padding 0": {"downsample_padding": 0},
    "downsample_type, upsample_type resnet": {"downsample_type": "resnet", "upsample_type": "resnet"},
    "mid_block_scale_factor": {"mid_block_scale_factor": 2**0.5},
    "resnet_time_scale_shift": {"resnet_time_scale_shift": "scale_shift"},
    "attention_head_dim null": {"attention_head_dim": None},
    "attn_norm_num_groups": {"attn_norm_num_groups": 4},
    "norm_eps": {"norm_eps": 1e-6},
    "act_fn mish": {"act_fn": "mish"},
    "act_fn gelu": {"act_fn": "gelu"},
    "act_fn relu": {"act_fn": "relu"},
    "num_class_embeds": {"num_class_embeds": 5},
    "class_embed_type timestep": {"class_embed_type": "timestep"},
    "class_embed_type identity": {"class_embed_type": "identity"},
    "sample_size of two numbers": {"sample_size": (16, 24)},
    "one channel": {"in_channels": 1, "out_channels": 1},
}
_IMAGE = {"encoder_hid_dim": 24, "encoder_hid_dim_type": "image_proj"}
_ADDED = {"addition_embed_type": "text_time", "addition_time_embed_dim": 8}
_PROJECTED = {"projection_class_embeddings_input_dim": 16}
_TEXT_SETTINGS: dict[str, dict[str, Any]] = {
    "time_embedding_type fourier": {"time_embedding_type": "fourier"},
    "time_embedding_dim": {"time_embedding_dim": 48},
    "time_embedding_act_fn, timestep_post_act": {
        "time_embedding_act_fn": "silu", "timestep_post_act": "gelu",
    },
    "time_cond_proj_dim": {"time_cond_proj_dim": 16},
    "center_input_sample": {"center_input_sample": True},
    "conv_in_kernel, conv_out_kernel": {"conv_in_kernel": 1, "conv_out_kernel": 5},
    "downsample_padding 0": {"downsample_padding": 0},
    "mid_block_scale_factor": {"mid_block_scale_factor": 2.0},
    "resnet_time_scale_shift": {"resnet_time_scale_shift": "scale_shift"},
    "resnet_skip_time_act, resnet_out_scale_factor": {
        **_SIMPLE, "resnet_skip_time_act": True, "resnet_out_scale_factor": 2**0.5,
    },
    "attention_head_dim per level": {"attention_head_dim": (2, 4)},
    "cross_attention_dim per level": {"cross_attention_dim": (16, 16)},
    "layers_per_block per level": {"layers_per_block": (1, 2)},
    "transformer_layers_per_block": {"transformer_layers_per_block": (2, 1)},
    "reverse_transformer_layers_per_block": {
        "transformer_layers_per_block": ((3, 2), 1), "reverse_transformer_layers_per_block": ((3, 4), 1),
        "layers_per_block": 2,
    },
    "use_linear_projection": {"use_linear_projection": True},
    "only_cross_attention": {"only_cross_attention": True},
    "only_cross_attention per level": {"only_cross_attention": (True, False)},
    "mid_block_only_cross_attention": {**_SIMPLE, "mid_block_only_cross_attention": True},
    "dual_cross_attention": {"dual_cross_attention": True},
    "upcast_attention": {"upcast_attention": True},
    "cross_attention_norm layer_norm": {
        **_SIMPLE, "cross_attention_norm": "layer_norm", "cross_attention_dim": 32,
    },
    "cross_attention_norm group_norm": {
        **_SIMPLE, "cross_attention_norm": "group_norm", "cross_attention_dim": 32,
    },
    "attention_type gated": {"attention_type": "gated"},
    "attention_type gated-text-image": {"attention_type": "gated-text-image"},
    "act_fn mish": {"act_fn": "mish"},
    "act_fn gelu": {"act_fn": "gelu"},
    "num_class_embeds": {"num_class_embeds": 5},
    "class_embed_type timestep": {"class_embed_type": "timestep"},
    "class_embed_type identity": {"class_embed_type": "identity"},
    "class_embed_type projection": {"class_embed_type": "projection", **_PROJECTED},
    "class_embed_type simple_projection": {"class_embed_type": "simple_projection", **_PROJECTED},
    "class_embeddings_concat": {
        "class_embed_type": "simple_projection", "class_embeddings_concat": True, **_PROJECTED,
    },
    "encoder_hid_dim_type text_proj": {"encoder_hid_dim": 12, "encoder_hid_dim_type": "text_proj"},
    "encoder_hid_dim_type text_image_proj": {
        "encoder_hid_dim": 12, "encoder_hid_dim_type": "text_image_proj",
    },
    "encoder_hid_dim_type image_proj": {"encoder_hid_dim": 12, "encoder_hid_dim_type": "image_proj"},
    "addition_embed_type text": {"addition_embed_type": "text", "addition_embed_type_num_heads": 2},
    "addition_embed_type text_image": {"addition_embed_type": "text_image"},
    "addition_embed_type text_time": {**_ADDED, "projection_class_embeddings_input_dim": 64},
    "addition_embed_type image": {**_IMAGE, "addition_embed_type": "image"},
    "addition_embed_type image_hint": {**_IMAGE, "addition_embed_type": "image_hint", "in_channels": 8},
}  # fmt: skip
_SD2 = {"use_linear_projection": True, "attention_head_dim": (2, 4)}
_IF = {
    **_SIMPLE, "in_channels": 3, "out_channels": 6, "act_fn": "gelu", "encoder_hid_dim": 24,
    "encoder_hid_dim_type": "text_proj", "addition_embed_type": "text", "addition_embed_type_num_heads": 4,
    "resnet_time_scale_shift": "scale_shift", "resnet_skip_time_act": True, "resnet_out_scale_factor": 2**0.5,
    "cross_attention_norm": "group_norm", "cross_attention_dim": 32, "time_embedding_act_fn": "gelu",
}  # fmt: skip
_KANDINSKY = {
    **_SIMPLE,
    "out_channels": 8,
    "resnet_time_scale_shift": "scale_shift",
    "cross_attention_dim": 32,
}
_DDPM = {"downsample_padding": 0, "flip_sin_to_cos": False, "freq_shift": 1, "norm_eps": 1e-6}
_PUBLIC: tuple[tuple[str, str, dict[str, Any], dict[str, Any]], ...] = (
    ("DDPM (google/ddpm-cifar10-32)", PLAIN, _DDPM, {}),
    ("NCSN++ (google/ncsnpp-celebahq-256)", PLAIN, {
        **_NCSNPP, "time_embedding_type": "fourier", "norm_num_groups": None, "norm_eps": 1e-6,
        "mid_block_scale_factor": 2**0.5, "flip_sin_to_cos": False,
    }, _TRAILING),
    ("latent diffusion, unconditional (lsun-bedrooms)", PLAIN, {"attention_head_dim": 32}, {}),
    ("latent diffusion, lsun-churches", PLAIN, {
        "down_block_types": ("AttnDownBlock2D", "ResnetDownsampleBlock2D"), "in_channels": 4,
        "out_channels": 4, "up_block_types": ("ResnetUpsampleBlock2D", "AttnUpBlock2D"),
        "downsample_type": "resnet", "upsample_type": "resnet",
        "resnet_time_scale_shift": "scale_shift", "attn_norm_num_groups": 8,
    }, {}),
    ("Stable Diffusion 1", TEXT, _pair("CrossAttn?Block2D"), {}),
    ("Stable Diffusion 2, v prediction", TEXT, _SD2, {"prediction_type": "v_prediction"}),
    ("Stable Diffusion 2.1 unCLIP", TEXT, {
        **_SD2, "class_embed_type": "projection", "projection_class_embeddings_input_dim": 32,
    }, {}),
    ("Stable Diffusion inpainting", TEXT, {"in_channels": 9}, {}),
    ("Stable Diffusion x4 upscaler", TEXT, {
        **_SD2, "in_channels": 7, "only_cross_attention": (True, False), "num_class_embeds": 1000,
    }, {"prediction_type": "v_prediction"}),
    ("InstructPix2Pix", TEXT, {"in_channels": 8}, {}),
    ("SDXL", TEXT, {
        **_SD2, **_ADDED, "projection_class_embeddings_input_dim": 64, "transformer_layers_per_block": (1, 2),
        "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D"),
        "up_block_types": ("CrossAttnUpBlock2D", "UpBlock2D"),
    }, {}),
    ("LCM (time_cond_proj_dim)", TEXT, {"time_cond_proj_dim": 256}, {"_class_name": "LCMScheduler"}),
    ("GLIGEN", TEXT, {"attention_type": "gated"}, {}),
    ("DeepFloyd IF, stage 1", TEXT, _IF, _LEARNED),
    ("DeepFloyd IF, stage 2", TEXT, {
        **_IF, "in_channels": 6, "class_embed_type": "timestep",
    }, _LEARNED),
    ("Karlo unCLIP, decoder", TEXT, {
        **_SIMPLE, "in_channels": 3, "out_channels": 6, "class_embed_type": "identity",
        "resnet_time_scale_shift": "scale_shift", "only_cross_attention": False,
    }, _LEARNED),
    ("Kandinsky 2.1", TEXT, {
        **_KANDINSKY, "encoder_hid_dim": 24, "encoder_hid_dim_type": "text_image_proj",
        "addition_embed_type": "text_image",
    }, _LEARNED),
    ("Kandinsky 2.2", TEXT, {**_KANDINSKY, **_IMAGE, "addition_embed_type": "image"}, _LEARNED),
    ("Kandinsky 2.2, inpainting", TEXT, {
        **_KANDINSKY, **_IMAGE, "addition_embed_type": "image", "in_channels": 9,
    }, _LEARNED),
    ("Kandinsky 2.2, hint", TEXT, {
        **_KANDINSKY, **_IMAGE, "addition_embed_type": "image_hint", "in_channels": 8,
    }, _LEARNED),
)  # fmt: skip


def _all() -> tuple[Configuration, ...]:
    found = []
    for group, kind, listed in (
        (BLOCKS, PLAIN, _PLAIN_BLOCKS), (BLOCKS, TEXT, _TEXT_BLOCKS),
        (SETTINGS, PLAIN, _PLAIN_SETTINGS), (SETTINGS, TEXT, _TEXT_SETTINGS),
    ):  # fmt: skip
        for name, config in listed.items():
            scheduler = _TRAILING if config.get("time_embedding_type") == "fourier" else {}
            found.append((name, kind, group, config, scheduler))
    found += [(name, kind, MODELS, config, scheduler) for name, kind, config, scheduler in _PUBLIC]
    made = []
    for name, kind, group, changes, scheduler in found:
        config = {**(_PLAIN if kind == PLAIN else _TEXT), **changes}
        made.append(Configuration(name, kind, group, config, scheduler))
    return tuple(made)


CONFIGURATIONS = _all()
"""Every one, in the table's order."""
