"""The first stages of latent diffusion models as CompVis defined them, written down for comparison."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from ldm_original import Upsample, attend, group_norm
from torch import Tensor, nn


class ResnetBlock(nn.Module):
    def __init__(self, cin: int, cout: int) -> None:
        super().__init__()
        self.norm1, self.conv1 = group_norm(cin, 1e-6), nn.Conv2d(cin, cout, 3, padding=1)
        self.norm2, self.conv2 = group_norm(cout, 1e-6), nn.Conv2d(cout, cout, 3, padding=1)
        if cin != cout:
            self.nin_shortcut = nn.Conv2d(cin, cout, 1)

    def forward(self, x: Tensor) -> Tensor:
        h = self.conv2(F.silu(self.norm2(self.conv1(F.silu(self.norm1(x))))))
        return (self.nin_shortcut(x) if hasattr(self, "nin_shortcut") else x) + h


class AttnBlock(nn.Module):
    def __init__(self, channels: int) -> None:
        super().__init__()
        self.norm = group_norm(channels, 1e-6)
        self.q, self.k, self.v, self.proj_out = (nn.Conv2d(channels, channels, 1) for _ in range(4))

    def forward(self, x: Tensor) -> Tensor:
        y = self.norm(x)
        q, k, v = (layer(y).flatten(2).transpose(1, 2) for layer in (self.q, self.k, self.v))
        return x + self.proj_out(attend(q, k, v).transpose(1, 2).reshape(x.shape))


class Strided(nn.Module):
    """Padded at the right and the bottom alone."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(channels, channels, 3, stride=2)

    def forward(self, x: Tensor) -> Tensor:
        return self.conv(F.pad(x, (0, 1, 0, 1)))


class Level(nn.Module):
    def __init__(
        self, block: list[nn.Module], attn: list[nn.Module], resample: tuple[str, nn.Module] | None
    ) -> None:
        super().__init__()
        self.block, self.attn = nn.ModuleList(block), nn.ModuleList(attn)
        self.last = None if resample is None else resample[0]
        if resample is not None:
            self.add_module(*resample)

    def forward(self, x: Tensor) -> Tensor:
        for i, block in enumerate(self.block):
            x = block(x)
            x = self.attn[i](x) if len(self.attn) else x
        return x if self.last is None else self.get_submodule(self.last)(x)


class Middle(nn.Module):
    def __init__(self, channels: int) -> None:
        super().__init__()
        self.block_1, self.attn_1 = ResnetBlock(channels, channels), AttnBlock(channels)
        self.block_2 = ResnetBlock(channels, channels)

    def forward(self, x: Tensor) -> Tensor:
        return self.block_2(self.attn_1(self.block_1(x)))


class Side(nn.Module):
    """An encoder or a decoder."""

    def __init__(self, encodes: bool, cin: int, cout: int, dd: dict[str, Any]) -> None:
        super().__init__()
        self.encodes, n = encodes, len(dd["ch_mult"])
        widths = [dd["ch"] * mult for mult in dd["ch_mult"]]
        ch = dd["ch"] if encodes else widths[-1]
        self.conv_in = nn.Conv2d(cin, ch, 3, padding=1)
        levels: dict[int, Level] = {}
        order = range(n) if encodes else reversed(range(n))
        if not encodes:
            self.mid = Middle(ch)
        for i in order:
            block: list[nn.Module] = []
            attn: list[nn.Module] = []
            for _ in range(dd["num_res_blocks"] + (not encodes)):
                block.append(ResnetBlock(ch, widths[i]))
                ch = widths[i]
                if dd["resolution"] // 2**i in dd["attn_resolutions"]:
                    attn.append(AttnBlock(ch))
            if encodes:
                levels[i] = Level(block, attn, ("downsample", Strided(ch)) if i < n - 1 else None)
            else:
                levels[i] = Level(block, attn, ("upsample", Upsample(ch)) if i else None)
        self.add_module("down" if encodes else "up", nn.ModuleList(levels[i] for i in range(n)))
        if encodes:
            self.mid = Middle(ch)
        self.norm_out = group_norm(ch, 1e-6)
        self.conv_out = nn.Conv2d(ch, cout, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        x = self.conv_in(x)
        if self.encodes:
            for level in self.down:  # type: ignore[union-attr]
                x = level(x)
            x = self.mid(x)
        else:
            x = self.mid(x)
            for level in reversed(self.up):  # type: ignore[call-overload]
                x = level(x)
        return self.conv_out(F.silu(self.norm_out(x)))


class Codebook(nn.Module):
    def __init__(self, n: int, width: int) -> None:
        super().__init__()
        self.embedding = nn.Embedding(n, width)

    def forward(self, z: Tensor) -> Tensor:
        """The nearest entry at each place."""
        flat = z.movedim(1, -1)
        near = torch.cdist(flat.flatten(0, 2), self.embedding.weight).argmin(1)
        return self.embedding(near).reshape(flat.shape).movedim(-1, 1)


class Autoencoder(nn.Module):
    """KL, or VQ with `n_embed`."""

    def __init__(
        self, embed_dim: int, ddconfig: dict[str, Any], n_embed: int | None = None, **unused: Any
    ) -> None:
        super().__init__()
        dd = {"attn_resolutions": [], "resolution": 256, "in_channels": 3, "out_ch": 3} | ddconfig
        z, twice = dd["z_channels"], 2 if n_embed is None else 1
        self.encoder = Side(True, dd["in_channels"], twice * z, dd)
        self.decoder = Side(False, z, dd["out_ch"], dd)
        self.quant_conv = nn.Conv2d(twice * z, twice * embed_dim, 1)
        self.post_quant_conv = nn.Conv2d(embed_dim, z, 1)
        if n_embed is not None:
            self.quantize = Codebook(n_embed, embed_dim)

    def encode(self, x: Tensor) -> Tensor:
        """The mean, and for KL the log variance, of the latents, not scaled."""
        return self.quant_conv(self.encoder(x))

    def decode(self, z: Tensor) -> Tensor:
        """Of latents that are not scaled; VQ quantizes them."""
        return self.decoder(self.post_quant_conv(self.quantize(z) if hasattr(self, "quantize") else z))
