"""The networks of a latent diffusion model by CompVis' parameters, and their configs in diffusers."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

from .conditions import CONDITION_UNET


@dataclass(frozen=True)
class UNetParams:
    """Parameters of openaimodel.UNetModel."""

    in_channels: int
    model_channels: int
    out_channels: int
    num_res_blocks: int
    attention_resolutions: tuple[int, ...]
    channel_mult: tuple[int, ...] = (1, 2, 4, 8)
    image_size: int = 32
    num_heads: int = -1
    num_head_channels: int = -1
    num_heads_upsample: int = -1
    use_scale_shift_norm: bool = False
    resblock_updown: bool = False
    use_new_attention_order: bool = False
    use_spatial_transformer: bool = False
    use_linear_in_transformer: bool = False
    transformer_depth: int = 1
    context_dim: int | None = None
    num_classes: int | None = None
    legacy: bool = True
    conv_resample: bool = True
    dims: int = 2
    n_embed: int | None = None
    dropout: float = 0.0
    use_checkpoint: bool = False
    use_fp16: bool = False

    def heads(self, channels: int) -> int:
        """Attention heads at a level of so many channels."""
        if self.num_head_channels == -1:
            return self.num_heads
        return channels // self.num_head_channels

    @property
    def channels(self) -> tuple[int, ...]:
        """Channels of each level."""
        return tuple(self.model_channels * mult for mult in self.channel_mult)

    @property
    def attends(self) -> tuple[bool, ...]:
        """Whether each level has attention: attention_resolutions are factors of downsampling."""
        return tuple(2**i in self.attention_resolutions for i in range(len(self.channel_mult)))

    def to_diffusers(self, size: int) -> dict[str, Any]:
        """The config of UNet2DConditionModel (spatial transformers) or UNet2DModel (attention blocks).

        Args:
            size: height and width of the latents.
        """
        common = {
            "sample_size": size,
            "in_channels": self.in_channels,
            "out_channels": self.out_channels,
            "layers_per_block": self.num_res_blocks,
            "block_out_channels": list(self.channels),
            "resnet_time_scale_shift": "scale_shift" if self.use_scale_shift_norm else "default",
            "num_class_embeds": self.num_classes,
            "norm_eps": 1e-5,
        }
        if self.use_spatial_transformer:
            down = ["CrossAttnDownBlock2D" if attends else "DownBlock2D" for attends in self.attends]
            return {
                "_class_name": CONDITION_UNET,
                **common,
                "down_block_types": down,
                "up_block_types": [kind.replace("Down", "Up") for kind in reversed(down)],
                "cross_attention_dim": self.context_dim,
                # So diffusers calls the number of heads.
                "attention_head_dim": [self.heads(channels) for channels in self.channels],
                "transformer_layers_per_block": self.transformer_depth,
                "use_linear_projection": self.use_linear_in_transformer,
            }
        plain, resample = ("DownBlock2D", "UpBlock2D"), "conv"
        if self.resblock_updown:
            plain, resample = ("ResnetDownsampleBlock2D", "ResnetUpsampleBlock2D"), "resnet"
        of_head = self.num_head_channels
        return {
            "_class_name": "UNet2DModel",
            **common,
            "down_block_types": ["AttnDownBlock2D" if attends else plain[0] for attends in self.attends],
            "up_block_types": [
                "AttnUpBlock2D" if attends else plain[1] for attends in reversed(self.attends)
            ],
            # It knows head sizes only, one for all levels; `heads` is set on the finished model.
            "attention_head_dim": self.model_channels // self.num_heads if of_head == -1 else of_head,
            "downsample_type": resample,
            "upsample_type": resample,
            "attn_norm_num_groups": 32,
        }


@dataclass(frozen=True)
class AutoencoderParams:
    """`ddconfig`, the parameters of the encoder and the decoder."""

    z_channels: int
    ch: int
    ch_mult: tuple[int, ...]
    num_res_blocks: int
    attn_resolutions: tuple[int, ...] = ()
    resolution: int = 256
    in_channels: int = 3
    out_ch: int = 3
    double_z: bool = True
    dropout: float = 0.0
    attn_type: Literal["vanilla", "vanilla-xformers"] = "vanilla"
    resamp_with_conv: bool = True
    tanh_out: bool = False
    use_linear_attn: bool = False


@dataclass(frozen=True)
class FirstStage:
    """A first stage; `n_embed` entries of its codebook, or None for KL."""

    embed_dim: int
    ddconfig: AutoencoderParams
    n_embed: int | None = None

    def to_diffusers(self, scaling_factor: float) -> dict[str, Any]:
        """The config of AutoencoderKL or VQModel."""
        d = self.ddconfig
        attends = [d.resolution // 2**i in d.attn_resolutions for i in range(len(d.ch_mult))]
        down = ["AttnDownEncoderBlock2D" if a else "DownEncoderBlock2D" for a in attends]
        up = ["AttnUpDecoderBlock2D" if a else "UpDecoderBlock2D" for a in reversed(attends)]
        codebook = {"num_vq_embeddings": self.n_embed, "vq_embed_dim": self.embed_dim}
        return {
            "_class_name": "AutoencoderKL" if self.n_embed is None else "VQModel",
            "in_channels": d.in_channels,
            "out_channels": d.out_ch,
            "block_out_channels": [d.ch * mult for mult in d.ch_mult],
            "layers_per_block": d.num_res_blocks,
            "latent_channels": d.z_channels,
            "sample_size": d.resolution,
            "scaling_factor": scaling_factor,
            "down_block_types": down,
            "up_block_types": up,
            **({} if self.n_embed is None else codebook),
        }
