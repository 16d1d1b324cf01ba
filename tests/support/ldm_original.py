"""The networks of latent diffusion models as CompVis defined them, written down for comparison.

Names of submodules, and so of weights, are those of their checkpoints (openaimodel.UNetModel,
autoencoder.AutoencoderKL and VQModelInterface in ldm_autoencoder.py); what only training needs is left out.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn


def group_norm(channels: int, eps: float = 1e-5) -> nn.GroupNorm:
    return nn.GroupNorm(32, channels, eps)


def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """softmax(q k^T / sqrt(d)) v over (..., tokens, d)."""
    return (q @ k.transpose(-1, -2) * q.shape[-1] ** -0.5).softmax(-1) @ v


class ResBlock(nn.Module):
    def __init__(self, cin: int, cout: int, emb: int, film: bool, resample: str = "") -> None:
        super().__init__()
        self.film, self.resample = film, resample
        self.in_layers = nn.Sequential(group_norm(cin), nn.SiLU(), nn.Conv2d(cin, cout, 3, padding=1))
        self.emb_layers = nn.Sequential(nn.SiLU(), nn.Linear(emb, 2 * cout if film else cout))
        last = nn.Conv2d(cout, cout, 3, padding=1)
        self.out_layers = nn.Sequential(group_norm(cout), nn.SiLU(), nn.Identity(), last)
        self.skip_connection = nn.Identity() if cin == cout else nn.Conv2d(cin, cout, 1)

    def move(self, x: Tensor) -> Tensor:
        if self.resample == "up":
            return F.interpolate(x, scale_factor=2, mode="nearest")
        return F.avg_pool2d(x, 2) if self.resample == "down" else x

    def forward(self, x: Tensor, emb: Tensor) -> Tensor:
        h = self.in_layers[2](self.move(self.in_layers[:2](x)))
        e = self.emb_layers(emb)[:, :, None, None]
        if self.film:
            scale, shift = e.chunk(2, dim=1)
            h = self.out_layers[1:](self.out_layers[0](h) * (1 + scale) + shift)
        else:
            h = self.out_layers(h + e)
        return self.skip_connection(self.move(x)) + h


class AttentionBlock(nn.Module):
    """Its qkv is ordered by heads first, or in the new order by q, k, v first."""

    def __init__(self, channels: int, heads: int, new_order: bool) -> None:
        super().__init__()
        self.heads, self.new_order = heads, new_order
        self.norm = group_norm(channels)
        self.qkv = nn.Conv1d(channels, 3 * channels, 1)
        self.proj_out = nn.Conv1d(channels, channels, 1)

    def forward(self, x: Tensor) -> Tensor:
        b, c, h, w = x.shape
        flat = x.flatten(2)
        qkv = self.qkv(self.norm(flat))
        if self.new_order:
            parts = qkv.reshape(b, 3, self.heads, c // self.heads, -1).unbind(1)
        else:
            parts = qkv.reshape(b, self.heads, 3, c // self.heads, -1).unbind(2)
        q, k, v = (part.transpose(-1, -2) for part in parts)
        out = attend(q, k, v).transpose(-1, -2).reshape(b, c, -1)
        return (flat + self.proj_out(out)).reshape(b, c, h, w)


class CrossAttention(nn.Module):
    def __init__(self, width: int, context: int, heads: int, head: int) -> None:
        super().__init__()
        self.heads = heads
        self.to_q = nn.Linear(width, heads * head, bias=False)
        self.to_k = nn.Linear(context, heads * head, bias=False)
        self.to_v = nn.Linear(context, heads * head, bias=False)
        self.to_out = nn.Sequential(nn.Linear(heads * head, width), nn.Identity())

    def forward(self, x: Tensor, context: Tensor) -> Tensor:
        def split(t: Tensor) -> Tensor:
            return t.unflatten(-1, (self.heads, -1)).transpose(1, 2)

        out = attend(split(self.to_q(x)), split(self.to_k(context)), split(self.to_v(context)))
        return self.to_out(out.transpose(1, 2).flatten(2))


class GEGLU(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.proj = nn.Linear(width, 8 * width)

    def forward(self, x: Tensor) -> Tensor:
        value, gate = self.proj(x).chunk(2, dim=-1)
        return value * F.gelu(gate)


class FeedForward(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.net = nn.Sequential(GEGLU(width), nn.Identity(), nn.Linear(4 * width, width))

    def forward(self, x: Tensor) -> Tensor:
        return self.net(x)


class TransformerBlock(nn.Module):
    def __init__(self, width: int, heads: int, head: int, context: int) -> None:
        super().__init__()
        self.attn1 = CrossAttention(width, width, heads, head)
        self.ff = FeedForward(width)
        self.attn2 = CrossAttention(width, context, heads, head)
        self.norm1, self.norm2, self.norm3 = (nn.LayerNorm(width) for _ in range(3))

    def forward(self, x: Tensor, context: Tensor) -> Tensor:
        y = self.norm1(x)
        x = self.attn1(y, y) + x
        x = self.attn2(self.norm2(x), context) + x
        return self.ff(self.norm3(x)) + x


class SpatialTransformer(nn.Module):
    def __init__(self, channels: int, heads: int, depth: int, context: int, linear: bool) -> None:
        super().__init__()
        self.linear = linear
        self.norm = group_norm(channels, 1e-6)
        self.proj_in = self._projection(channels)
        head = channels // heads
        blocks = (TransformerBlock(channels, heads, head, context) for _ in range(depth))
        self.transformer_blocks = nn.ModuleList(blocks)
        self.proj_out = self._projection(channels)

    def _projection(self, channels: int) -> nn.Module:
        return nn.Linear(channels, channels) if self.linear else nn.Conv2d(channels, channels, 1)

    def forward(self, x: Tensor, context: Tensor) -> Tensor:
        b, c, h, w = x.shape
        y = self.norm(x)
        y = y if self.linear else self.proj_in(y)
        y = y.flatten(2).transpose(1, 2)
        y = self.proj_in(y) if self.linear else y
        for block in self.transformer_blocks:
            y = block(y, context)
        y = self.proj_out(y) if self.linear else y
        y = y.transpose(1, 2).reshape(b, c, h, w)
        return x + (y if self.linear else self.proj_out(y))


class Downsample(nn.Module):
    def __init__(self, channels: int) -> None:
        super().__init__()
        self.op = nn.Conv2d(channels, channels, 3, stride=2, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        return self.op(x)


class Upsample(nn.Module):
    def __init__(self, channels: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(channels, channels, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        return self.conv(F.interpolate(x, scale_factor=2, mode="nearest"))


class Row(nn.Sequential):
    """Modules in a row; each gets what it takes."""

    def forward(self, x: Tensor, emb: Tensor, context: Tensor | None) -> Tensor:  # type: ignore[override]
        for module in self:
            if isinstance(module, ResBlock):
                x = module(x, emb)
            else:
                x = module(x, context) if isinstance(module, SpatialTransformer) else module(x)
        return x


class UNetModel(nn.Module):
    def __init__(
        self,
        in_channels: int,
        model_channels: int,
        out_channels: int,
        num_res_blocks: int,
        attention_resolutions: Sequence[int],
        channel_mult: Sequence[int],
        num_heads: int = -1,
        num_head_channels: int = -1,
        use_scale_shift_norm: bool = False,
        resblock_updown: bool = False,
        use_new_attention_order: bool = False,
        use_spatial_transformer: bool = False,
        use_linear_in_transformer: bool = False,
        transformer_depth: int = 1,
        context_dim: int | None = None,
        num_classes: int | None = None,
        **unused: Any,
    ) -> None:
        super().__init__()
        self.model_channels, emb = model_channels, 4 * model_channels
        self.time_embed = nn.Sequential(nn.Linear(model_channels, emb), nn.SiLU(), nn.Linear(emb, emb))
        if num_classes is not None:
            self.label_emb = nn.Embedding(num_classes, emb)

        def attention(channels: int) -> nn.Module:
            heads = num_heads if num_head_channels == -1 else channels // num_head_channels
            if not use_spatial_transformer:
                return AttentionBlock(channels, heads, use_new_attention_order)
            assert context_dim is not None
            linear = use_linear_in_transformer
            return SpatialTransformer(channels, heads, transformer_depth, context_dim, linear)

        def block(cin: int, cout: int, resample: str = "") -> ResBlock:
            return ResBlock(cin, cout, emb, use_scale_shift_norm, resample)

        rows = [Row(nn.Conv2d(in_channels, model_channels, 3, padding=1))]
        skips, ch, ds = [model_channels], model_channels, 1
        for level, mult in enumerate(channel_mult):
            for _ in range(num_res_blocks):
                row: list[nn.Module] = [block(ch, mult * model_channels)]
                ch = mult * model_channels
                if ds in attention_resolutions:
                    row.append(attention(ch))
                rows.append(Row(*row))
                skips.append(ch)
            if level != len(channel_mult) - 1:
                rows.append(Row(block(ch, ch, "down") if resblock_updown else Downsample(ch)))
                skips.append(ch)
                ds *= 2
        self.input_blocks = nn.ModuleList(rows)
        self.middle_block = Row(block(ch, ch), attention(ch), block(ch, ch))
        rows = []
        for level, mult in reversed(list(enumerate(channel_mult))):
            for i in range(num_res_blocks + 1):
                row = [block(ch + skips.pop(), mult * model_channels)]
                ch = mult * model_channels
                if ds in attention_resolutions:
                    row.append(attention(ch))
                if level and i == num_res_blocks:
                    row.append(block(ch, ch, "up") if resblock_updown else Upsample(ch))
                    ds //= 2
                rows.append(Row(*row))
        self.output_blocks = nn.ModuleList(rows)
        self.out = nn.Sequential(group_norm(ch), nn.SiLU(), nn.Conv2d(ch, out_channels, 3, padding=1))

    def forward(self, x: Tensor, t: Tensor, context: Tensor | None = None, y: Tensor | None = None) -> Tensor:
        half = self.model_channels // 2
        angles = t[:, None].float() * torch.exp(-math.log(10000) * torch.arange(half) / half)
        emb = self.time_embed(torch.cat([angles.cos(), angles.sin()], dim=1))
        if y is not None:
            emb = emb + self.label_emb(y)
        skips = []
        for row in self.input_blocks:
            x = row(x, emb, context)
            skips.append(x)
        x = self.middle_block(x, emb, context)
        for row in self.output_blocks:
            x = row(torch.cat([x, skips.pop()], dim=1), emb, context)
        return self.out(x)
