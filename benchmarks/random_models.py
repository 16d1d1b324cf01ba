"""Right models of many kinds, small and with seeded random weights, for `false_alarms.py`."""

from __future__ import annotations

from collections.abc import Callable, Mapping

import torch
from torch import Tensor, nn
from torch.nn import functional as F

ACTIVATIONS: Mapping[str, Callable[[Tensor], Tensor]] = {
    "relu": F.relu,
    "silu": F.silu,
    "gelu": F.gelu,
    "mish": F.mish,
    "leaky": lambda x: F.leaky_relu(x, 0.2),
    "tanh": torch.tanh,
    "sigmoid": torch.sigmoid,
    "none": lambda x: x,
}
NORMS = ("group", "batch", "layer", "instance", "rms", "none")


class Norm(nn.Module):
    """A normalisation of the channels of (B, C, H, W), by name."""

    def __init__(self, kind: str, channels: int) -> None:
        super().__init__()
        self.kind = kind
        made: dict[str, Callable[[], nn.Module]] = {
            "group": lambda: nn.GroupNorm(4, channels),
            "batch": lambda: nn.BatchNorm2d(channels),
            "layer": lambda: nn.LayerNorm(channels),
            "instance": lambda: nn.InstanceNorm2d(channels, affine=True),
            "rms": lambda: nn.RMSNorm(channels, eps=1e-6),
            "none": nn.Identity,
        }
        self.norm = made[kind]()

    def forward(self, x: Tensor) -> Tensor:
        if self.kind in ("layer", "rms"):
            return self.norm(x.permute(0, 2, 3, 1)).permute(0, 3, 1, 2)
        return self.norm(x)


class ConvNet(nn.Module):
    """A plain network of convs, of which every part can be chosen.

    Args:
        levels: halvings of the size by a strided conv, taken back by a transposed conv or by interpolation.
        bare: norms of blocks come after the conv, which the exporter may fold into it.
        repeats: how often in a row each block calls its second conv.
        shared: one conv serves all blocks.
        pad: padding by F.pad in front of unpadded convs: "zeros", "odd" (one side alone) or "" for none.
        tokens: a linear layer over the positions; attention: one head of attention over them.
    """

    def __init__(
        self, channels: int = 2, width: int = 16, blocks: int = 1, levels: int = 0, norm: str = "group",
        activation: str = "silu", groups: int = 1, dilation: int = 1, kernel: int = 3, bias: bool = True,
        transposed: bool = False, repeats: int = 1, shared: bool = False, bare: bool = False, pad: str = "",
        tokens: bool = False, attention: bool = False, residual: bool = True, classes: int = 0, seed: int = 0,
    ) -> None:  # fmt: skip
        super().__init__()
        torch.manual_seed(seed)
        self.activation, self.repeats, self.bare, self.pad = ACTIVATIONS[activation], repeats, bare, pad
        self.residual, self.margin = residual, dilation * (kernel - 1) // 2

        def conv(i: int, o: int, stride: int = 1) -> nn.Conv2d:
            padding = 0 if pad else self.margin
            return nn.Conv2d(i, o, kernel, stride, padding, dilation, groups, bias=bias)

        self.inlet = nn.Conv2d(channels, width, 3, padding=1)
        self.clock = nn.Linear(2, width)
        self.classes = nn.Embedding(classes, width) if classes else None
        self.blocks = nn.ModuleList()
        one = conv(width, width)
        for _ in range(blocks):
            parts: dict[str, nn.Module] = {}
            for i in "12":
                parts |= {f"norm{i}": Norm(norm, width), f"conv{i}": one if shared else conv(width, width)}
            self.blocks.append(nn.ModuleDict(parts))
        self.down = nn.ModuleList(conv(width, width, 2) for _ in range(levels))
        up = nn.ConvTranspose2d if transposed else None
        self.up = nn.ModuleList((up(width, width, 2, 2) if up else conv(width, width)) for _ in range(levels))
        self.transposed = transposed
        self.tokens = nn.Linear(width, width) if tokens else None
        self.heads = nn.ModuleList(nn.Linear(width, width) for _ in range(4)) if attention else None
        self.outlet = nn.Conv2d(width, channels, 3, padding=1)
        randomise(self)

    def _conv(self, conv: nn.Module, x: Tensor, stride: int = 1) -> Tensor:
        if self.pad == "zeros":
            x = F.pad(x, (self.margin,) * 4)
        elif self.pad == "odd":
            near = 0 if stride > 1 else self.margin
            x = F.pad(x, (near, 2 * self.margin - near) * 2)
        return conv(x)

    def _block(self, parts: nn.ModuleDict, h: Tensor) -> Tensor:
        x = h
        for norm, name, times in (("norm1", "conv1", 1), ("norm2", "conv2", self.repeats)):
            if not self.bare:
                x = self.activation(parts[norm](x))
            for _ in range(times):
                x = self._conv(parts[name], x)
            if self.bare:
                x = self.activation(parts[norm](x))
        return h + x if self.residual else x

    def forward(self, sample: Tensor, timestep: Tensor, class_labels: Tensor | None = None) -> Tensor:
        t = timestep[:, None] / 1000.0
        vector = self.clock(torch.cat([(3 * t).sin(), (3 * t).cos()], 1))
        if self.classes is not None:
            vector = vector + self.classes(class_labels)
        h = self.inlet(sample) + vector[:, :, None, None]
        skips = []
        for down in self.down:
            skips.append(h)
            h = self._conv(down, h, 2)
        for parts in self.blocks:
            h = self._block(parts, h)
        if self.tokens is not None:
            h = h + self.tokens(h.flatten(2).transpose(1, 2)).transpose(1, 2).reshape(h.shape)
        if self.heads is not None:
            flat = h.flatten(2).transpose(1, 2)[:, None]
            q, k, v, out = self.heads
            seen = F.scaled_dot_product_attention(q(flat), k(flat), v(flat))[:, 0]
            h = h + out(seen).transpose(1, 2).reshape(h.shape)
        for up in self.up:
            h = up(h) if self.transposed else self._conv(up, F.interpolate(h, scale_factor=2.0))
            h = h + skips.pop()
        return self.outlet(self.activation(h))


def randomise(module: nn.Module) -> None:
    """Give normalisations random factors, offsets and statistics, and layers a random bias."""
    with torch.no_grad():
        for part in module.modules():
            weight, bias = getattr(part, "weight", None), getattr(part, "bias", None)
            if weight is not None and weight.ndim == 1:
                weight.add_(0.3 * torch.randn_like(weight))
            if bias is not None:
                bias.add_(0.1 * torch.randn_like(bias))
            if isinstance(part, nn.BatchNorm2d):
                part.running_mean.normal_(0, 0.2)
                part.running_var.uniform_(0.5, 2)
