"""Right models of many kinds, small and with seeded random weights, for `false_alarms.py`."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ptqd_export.core.engine import Feeds
from ptqd_export.core.sampling import Sampling

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


@dataclass(frozen=True)
class Architecture:
    """A network of seeded random weights, and how it is built.

    Attributes:
        kind: "UNet2DModel", "UNet2DConditionModel" or "ConvNet", for the arguments in `config`.
        shape: (channels, height, width) of a sample.
        dtype: of the file of weights, where there is one.
        scheduler: entries of its config.
        sections: of the recipe, as far as they are not the default of `write_model`.
    """

    name: str
    kind: str
    config: Mapping[str, Any]
    shape: tuple[int, int, int] = (2, 8, 8)
    seed: int = 0
    dtype: str = "float32"
    scheduler: Mapping[str, Any] = field(default_factory=dict)
    sections: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)


def write_model(architecture: Architecture, folder: Path) -> dict[str, Any]:
    """Write a network into an empty folder; returns the recipe that builds it."""
    a, config = architecture, dict(architecture.config)
    model: dict[str, Any] = {"name": a.name}
    (folder / "scheduler").mkdir()
    settings = {"clip_sample": False, **a.scheduler}
    (folder / "scheduler" / "scheduler_config.json").write_text(json.dumps(settings))
    if a.kind == "ConvNet":
        config |= {"channels": a.shape[0], "seed": a.seed}
        code = f"from random_models import ConvNet\n\n\ndef make():\n    return ConvNet(**{config!r})\n"
        (folder / "net.py").write_text(code)
        model |= {"source": "net.py:make", "sample_shape": list(a.shape), "scheduler": "scheduler"}
        if classes := config.get("classes"):
            labels = {"name": "class_labels", "dtype": "int64", "shape": [], "num_classes": classes}
            model |= {"inputs": [labels], "null_class": classes - 1}
    else:
        import diffusers

        torch.manual_seed(a.seed)
        channels, *size = a.shape
        shape = {"in_channels": channels, "out_channels": channels, "sample_size": size}
        unet = getattr(diffusers, a.kind)(**{**SMALL, **shape, **config})
        randomise(unet)
        unet.to(getattr(torch, a.dtype)).save_pretrained(folder / "unet")
        if a.kind == "UNet2DConditionModel":
            width = config["cross_attention_dim"]
            text = {"name": "encoder_hidden_states", "dtype": "float32", "shape": [5, width]}
            model |= {"sample_shape": list(a.shape), "inputs": [text]}
        if classes := config.get("num_class_embeds"):
            model |= {"null_class": classes - 1}
    defaults: dict[str, dict[str, Any]] = {
        "model": model,
        "sampler": {"n_steps": 3},
        "calibration": {"size": 4, "held_out": 8, "batch_size": 4, "seed": a.seed},
        "quantization": {"precisions": ["fp32", "w8a8", "w4a4"]},
    }
    return {name: {**given, **a.sections.get(name, {})} for name, given in defaults.items()}


SMALL: dict[str, Any] = {
    "block_out_channels": (8, 16), "layers_per_block": 1, "norm_num_groups": 4, "attention_head_dim": 8,
}  # fmt: skip
EVERY = ("fp32", "fp16", "w8a8", "w4a8", "w4a4", "w4a16", "w8a8-fp8")
ROTATED = (("w8a8", "w4a16"), ("w4a8", "w8a8-fp8"), ("w4a4", "w8a8"), ("w8a8-fp8", "w4a4"), ("w4a16", "w4a8"))


def _blocks(down: str, up: str, plain: str = "") -> dict[str, Any]:
    """Two levels, of one kind of block or with a plain one outside."""
    first, last = (f"{plain}DownBlock2D", f"{plain}UpBlock2D") if "Attn" in down else (down, up)
    return {"down_block_types": (first, down), "up_block_types": (up, last)}


_ATTENTION = _blocks("AttnDownBlock2D", "AttnUpBlock2D")
_CROSS = _blocks("CrossAttnDownBlock2D", "CrossAttnUpBlock2D")
_UNETS: dict[str, dict[str, Any]] = {
    "plain": _blocks("DownBlock2D", "UpBlock2D"),
    "attention": _ATTENTION,
    "resnet-blocks": _blocks("ResnetDownsampleBlock2D", "ResnetUpsampleBlock2D"),
    "skip": _blocks("SkipDownBlock2D", "SkipUpBlock2D"),
    "attention-skip": {
        **_blocks("AttnSkipDownBlock2D", "AttnSkipUpBlock2D", "Skip"),
        "block_out_channels": (32, 32),
    },
    "k": {**_blocks("KDownBlock2D", "KUpBlock2D"), "block_out_channels": (32, 64), "add_attention": False},
    "padded-outside": {**_ATTENTION, "downsample_padding": 0},
    "padded-outside-plain": {**_blocks("DownBlock2D", "UpBlock2D"), "downsample_padding": 0},
    "scale-shift": {**_ATTENTION, "resnet_time_scale_shift": "scale_shift"},
    "resampled-by-resnets": {**_ATTENTION, "downsample_type": "resnet", "upsample_type": "resnet"},
    "fourier": {**_ATTENTION, "time_embedding_type": "fourier", "flip_sin_to_cos": False},
    "gelu-heads": {**_ATTENTION, "act_fn": "gelu", "attention_head_dim": 4, "add_attention": False},
    "mish": {**_blocks("DownBlock2D", "UpBlock2D"), "act_fn": "mish", "center_input_sample": True},
    "deep": {**_ATTENTION, "layers_per_block": 2, "mid_block_scale_factor": 2**0.5},
    "classes": {**_ATTENTION, "num_class_embeds": 5},
}
_CONVS: dict[str, dict[str, Any]] = {
    **{f"norm-{kind}": {"norm": kind} for kind in NORMS},
    **{f"after-{kind}": {"norm": kind, "bare": True, "activation": "relu"} for kind in NORMS[:5]},
    **{f"act-{kind}": {"activation": kind, "norm": "layer"} for kind in ACTIVATIONS},
    "grouped": {"groups": 4},
    "depthwise": {"groups": 16, "kernel": 5},
    "dilated": {"dilation": 2},
    "pointwise": {"kernel": 1, "norm": "rms"},
    "strided": {"levels": 1},
    "transposed": {"levels": 1, "transposed": True},
    "twice": {"repeats": 2},
    "thrice-bare": {"repeats": 3, "bare": True, "norm": "none", "activation": "none"},
    "shared": {"shared": True, "blocks": 2},
    "shared-twice": {"shared": True, "repeats": 2, "norm": "layer"},
    "padded-outside": {"pad": "zeros", "levels": 1},
    "padded-oddly": {"pad": "odd", "levels": 1},
    "tokens": {"tokens": True, "norm": "none"},
    "attention": {"attention": True, "tokens": True},
    "no-bias": {"bias": False, "norm": "batch", "bare": True},
    "no-residual": {"residual": False, "blocks": 2, "norm": "instance"},
    "classes": {"classes": 4, "norm": "layer"},
}
_SIZES = ((2, 8, 8), (1, 8, 12), (3, 12, 8), (4, 16, 16))
_STEPS, _KINDS = (3, 4, 5), ("ptqd", "affine", "none")


def _all() -> dict[str, Architecture]:
    """Every network of the lists, its other settings in turn."""
    listed = [("UNet2DModel", f"unet-{name}", config) for name, config in _UNETS.items()]
    cross = {**_CROSS, "cross_attention_dim": 12}
    listed += [("UNet2DConditionModel", "text-unet", cross)]
    linear = {**cross, "use_linear_projection": True, "act_fn": "gelu"}
    listed += [("UNet2DConditionModel", "text-unet-linear", linear)]
    listed += [("ConvNet", f"conv-{name}", config) for name, config in _CONVS.items()]
    found = {}
    for i, (kind, name, config) in enumerate(listed):
        guided = "num_class_embeds" in config or "classes" in config
        sampler = {"n_steps": _STEPS[i % 3], "eta": float(i % 2), "guidance_scale": 2.0 if guided else 1.0}
        precisions = EVERY if i % 8 == 0 else ("fp32", *ROTATED[i % 5])
        quantization = {
            "precisions": list(precisions),
            "edge_layers": ("float", "w8a8")[i % 4 == 3],
            "rounding": ("gptq", "nearest")[i % 3 == 2],
            "weight_scales": ("channel", "tensor")[i % 6 == 5],
            "correction": _KINDS[(0, 0, 1, 0, 2)[i % 5]],
        }
        sections = {"sampler": sampler, "quantization": quantization, "calibration": {"size": 4 + i % 5}}
        dtype = ("float32", "float16", "bfloat16")[i % 3]
        scheduler = {"prediction_type": ("epsilon", "v_prediction", "sample")[(0, 0, 0, 1, 0, 2)[i % 6]]}
        if "fourier" in name:  # the logarithm of the timestep, which must not be 0
            scheduler["timestep_spacing"] = "trailing"
        shape = _SIZES[i % 4]
        if kind != "ConvNet":
            skip = "skip" in name  # such blocks take three channels alone
            shape = (3 if skip else 1 + i % 2, 16 if skip else 8, 8 * (1 + i % 2))
        found[name] = Architecture(name, kind, config, shape, i, dtype, scheduler, sections)
    return found


ARCHITECTURES: Mapping[str, Architecture] = _all()
"""Every network, by name."""


def random_feeds(sampling: Sampling, seed: int) -> Feeds:
    """What a network takes for one sample at the first step: noise, also in the place of float conditions."""
    rng = np.random.default_rng(seed)
    conditions = sampling.model.conditions(None, 1)
    for spec in sampling.model.inputs:
        if spec.num_classes is None:
            conditions[spec.name] = rng.standard_normal((1, *spec.shape)).astype(np.float32)
    x = rng.standard_normal((1, *sampling.model.sample_shape))
    return sampling.conditional.feeds(x, 0, conditions)
