"""No false alarms: graphs of many architectures, in every emission, pass the check."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir
import pytest
import torch
from diffusers import UNet2DConditionModel, UNet2DModel
from graph_edits import FILE
from torch import nn
from torch.nn import functional as F
from toy import STEPS, correction_of, emitted, schedule_of

from ptqd_export.bundle.graph_check import Expected, check_graph
from ptqd_export.core.backend import Emission
from ptqd_export.core.model import InputSpec, ModelInfo
from ptqd_export.core.precision import FP32, Precision
from ptqd_export.core.quant import Grid, LayerQuant, OutputGrid, QuantizedNetwork, to_codes, to_e4m3
from ptqd_export.core.sampling import Sampling
from ptqd_export.export import export_fp, fold, save
from ptqd_export.export.sites import exported_layers

PORTABLE, HALF, ORT_CPU = Emission
VARIANTS = {
    FP32: (PORTABLE, ORT_CPU),
    Precision(16, 16): (HALF,),
    Precision(4, 4): (PORTABLE, HALF, ORT_CPU),
    Precision(8, 8): (HALF,),  # moved inputs, which 4 bits do not need
}
"""Every precision in every emission is tried on the toy."""
TOKENS = InputSpec("encoder_hidden_states", "float32", (3, 8))
LABELS = InputSpec("class_labels", num_classes=5, null_class=4)
HALVED = correction_of(np.full((STEPS, 2), 0.5), np.ones((STEPS, 2)))
Make = Callable[[], nn.Module]


class Unet(nn.Module):
    def __init__(self, kind: Any, down: str, up: str, **more: Any) -> None:
        super().__init__()
        config = {
            "sample_size": 8, "in_channels": 2, "out_channels": 2, "layers_per_block": 1,
            "norm_num_groups": 4,
            "block_out_channels": (8,), "attention_head_dim": 4,
            "down_block_types": tuple(down.split()), "up_block_types": tuple(up.split()),
        }  # fmt: skip
        self.unet = kind(**{**config, **more})

    def forward(self, sample: torch.Tensor, timestep: torch.Tensor, **inputs: torch.Tensor) -> torch.Tensor:
        return self.unet(sample, timestep, return_dict=False, **inputs)[0]


class Plain(nn.Module):
    """A conv network around a body that keeps (8, 8, 8)."""

    def __init__(self, *body: nn.Module) -> None:
        super().__init__()
        self.inlet, self.clock = nn.Conv2d(2, 8, 3, padding=1), nn.Linear(1, 8)
        self.body, self.outlet = nn.Sequential(*body), nn.Conv2d(8, 2, 3, padding=1)

    def forward(self, sample: torch.Tensor, timestep: torch.Tensor) -> torch.Tensor:
        h = self.inlet(sample) + self.clock(timestep[:, None] / 1000.0)[:, :, None, None]
        return self.outlet(self.body(h))


class Function(nn.Module):
    def __init__(self, function: Callable[[torch.Tensor], torch.Tensor]) -> None:
        super().__init__()
        self.function = function

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.function(x)


class SelfAttention(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.attention = nn.MultiheadAttention(8, 2, batch_first=True)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        t = x.flatten(2).transpose(1, 2)
        return x + self.attention(t, t, t, need_weights=False)[0].transpose(1, 2).reshape(x.shape)


def windows(x: torch.Tensor) -> torch.Tensor:
    parts = x.view(x.shape[0], 8, 2, 4, 2, 4).permute(0, 2, 4, 1, 3, 5).reshape(-1, 8, 4, 4)
    return parts.reshape(x.shape[0], 2, 2, 8, 4, 4).permute(0, 3, 1, 4, 2, 5).reshape(x.shape)


def mixture(x: torch.Tensor) -> torch.Tensor:
    turned = torch.cat([x.roll(1, 2)[:, :4], x.flip(3)[:, 4:]], 1) * x.abs().amax((2, 3), keepdim=True).clamp(
        0.1
    )
    total = torch.einsum("bchw,bdhw->bcd", x, x).mean((1, 2))[:, None, None, None] + x.std(1, keepdim=True)
    return turned + total + torch.where(x > 0, x, 0.1 * x).pow(2).sqrt() + F.normalize(x, dim=1)


def more_of_it(x: torch.Tensor) -> torch.Tensor:
    sums = x.cumsum(1) + x.logsumexp(1, keepdim=True) + x.topk(2, 1)[0].sum(1, keepdim=True)
    cut = F.pad(x, (1, 1, 1, 1))[:, :, 1:-1, 1:-1] + x.repeat(1, 2, 1, 1)[:, :8] + x.tril() + x.triu()
    return sums + cut + x.argmax(1, keepdim=True).float() + x.norm(dim=(2, 3), keepdim=True) + x.erf().exp()


unet, conditional = partial(Unet, UNet2DModel), partial(Unet, UNet2DConditionModel, cross_attention_dim=8)
conv = partial(nn.Conv2d, 8, 8, 3)
MODES = "reflect", "circular", "replicate"
NETS: dict[str, tuple[Make, tuple[InputSpec, ...]]] = {
    "attention": (
        lambda: unet("AttnDownBlock2D", "AttnUpBlock2D", num_class_embeds=5), (LABELS,)
    ),
    "resnet sampling": (
        lambda: unet("ResnetDownsampleBlock2D DownBlock2D", "UpBlock2D ResnetUpsampleBlock2D",
                     block_out_channels=(8, 8), resnet_time_scale_shift="scale_shift",
                     time_embedding_type="fourier", act_fn="gelu", add_attention=False), ()
    ),
    "k blocks": (
        lambda: unet("KDownBlock2D", "KUpBlock2D", block_out_channels=(32,), add_attention=False),
        (),
    ),
    "cross attention": (
        lambda: conditional("CrossAttnDownBlock2D", "CrossAttnUpBlock2D", act_fn="mish",
                            use_linear_projection=True, num_class_embeds=5, mid_block_type=None),
        (TOKENS, LABELS),
    ),
    "simple cross attention": (
        lambda: conditional("SimpleCrossAttnDownBlock2D", "SimpleCrossAttnUpBlock2D", mid_block_type=None),
        (TOKENS,),
    ),
    "batch norm": (lambda: Plain(nn.BatchNorm2d(8), nn.ReLU6(), nn.PReLU(8)), ()),
    "instance norms": (lambda: Plain(nn.InstanceNorm2d(8, affine=True), nn.InstanceNorm2d(8), nn.ELU()), ()),
    "layer norms": (lambda: Plain(nn.LayerNorm([8, 8, 8]), nn.RMSNorm(8), nn.LocalResponseNorm(3)), ()),
    "group norm": (lambda: Plain(nn.GroupNorm(2, 8), nn.Mish(), nn.GroupNorm(1, 8), nn.SiLU()), ()),
    "smooth activations": (lambda: Plain(nn.GELU(), nn.SELU(), nn.CELU(), nn.Softplus()), ()),
    "hard activations": (
        lambda: Plain(nn.Hardswish(), nn.Hardsigmoid(), nn.Hardtanh(), nn.Hardshrink()), ()
    ),
    "other activations": (
        lambda: Plain(nn.Softsign(), nn.Softshrink(), nn.Tanhshrink(), nn.LeakyReLU(), nn.Softmin(1),
                      nn.LogSigmoid(), nn.Threshold(0.1, 0.0), nn.Conv2d(8, 16, 1), nn.GLU(1)), ()
    ),
    "groups, dilation, strides": (
        lambda: Plain(conv(padding=2, dilation=2, groups=8), conv(stride=2, padding=1),
                      nn.ConvTranspose2d(8, 8, 4, stride=2, padding=1)), ()
    ),
    "paddings": (
        lambda: Plain(*(conv(padding=1, padding_mode=mode) for mode in MODES)), ()
    ),
    "shuffles": (lambda: Plain(nn.PixelUnshuffle(2), nn.Conv2d(32, 32, 1), nn.PixelShuffle(2)), ()),
    "pools and interpolation": (
        lambda: Plain(nn.AvgPool2d(2), nn.Upsample(scale_factor=2, mode="bilinear"), nn.MaxPool2d(2),
                      nn.Upsample(size=(8, 8), mode="bicubic"), nn.AdaptiveAvgPool2d(4),
                      nn.Upsample(scale_factor=2)),
        (),
    ),
    "multi-head attention": (lambda: Plain(SelfAttention()), ()),
    "windows": (lambda: Plain(Function(windows)), ()),
    "a mixture": (lambda: Plain(Function(mixture)), ()),
    "more of it": (lambda: Plain(Function(more_of_it)), ()),
    "unfold, fold, grid": (
        lambda: Plain(Function(lambda x: F.fold(F.unfold(x, 2, stride=2), (8, 8), 2, stride=2)),
                      Function(lambda x: F.grid_sample(x, x[:, :2].permute(0, 2, 3, 1)))), ()
    ),
}  # fmt: skip


def quantized(module: nn.Module, base: ir.Model, precision: Precision) -> QuantizedNetwork:
    """Every layer, with scales that no calibration found."""
    modules, layers = dict(module.named_modules()), {}
    for name in [] if precision.is_float else exported_layers(base):
        m: Any = modules[name]
        weight = m.weight.detach().numpy()
        scale = np.linspace(0.01, 0.02, len(weight), dtype=np.float32)
        spread = scale.reshape(-1, *[1] * (weight.ndim - 1))
        fp8, conv = precision.number == "fp8", weight.ndim == 4
        integers = not fp8 and not precision.weight_only
        grid = Grid(0.1, -448, 448) if fp8 else Grid.window(-0.28, 2.0, precision.activation_bits)
        zero = np.linspace(0, 255, len(weight)).astype(np.uint8)
        smooth = np.geomspace(0.5, 2, weight.shape[1]).astype(np.float32)
        layers[name] = LayerQuant(
            name=name,
            kind="conv" if conv else "linear",
            weight=to_e4m3(weight / spread) if fp8 else to_codes(weight, spread, precision.weight_bits),
            weight_scale=scale,
            weight_bits=precision.weight_bits,
            input=None if precision.weight_only else grid,
            activation_bits=precision.activation_bits,
            output=OutputGrid(scale, zero) if conv and integers else None,
            bias=None if m.bias is None else m.bias.detach().numpy(),
            macs=1,
            number=precision.number,
            smooth=smooth if conv and integers and m.groups == 1 else None,
        )
    return QuantizedNetwork(precision, layers)


@pytest.mark.parametrize("name", NETS)
def test_no_right_graph_is_refused(name: str, tmp_path: Path) -> None:
    make, inputs = NETS[name]
    torch.manual_seed(0)
    module = make().eval()
    info = ModelInfo(name, (2, 8, 8), inputs, "0" * 64)
    base, sampling = export_fp(module, info), Sampling(info, schedule_of("v_prediction"))
    graphs = {}
    for precision, emissions in VARIANTS.items():
        network = quantized(module, base, precision)
        for emission in emissions:
            graph = emitted(base, network, emission)
            graphs[f"{precision}.{emission}"] = fold(graph, sampling.schedule, HALVED)
    save(graphs, tmp_path, FILE)
    size = (tmp_path / FILE).stat().st_size
    for key in graphs:
        expected = Expected(sampling, Emission(key.rpartition(".")[2]), FILE, size)
        check_graph((tmp_path / f"{key}.onnx").read_bytes(), key, expected)
