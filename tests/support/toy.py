"""A small network with every form that a layer takes, its quantization written out from definitions, and a
reference.

`Toy`, `calibrated` and `simulate` are written from the definitions of core.quant, not with the package's own
calibration.
"""

from __future__ import annotations

import tempfile
from collections.abc import Mapping
from pathlib import Path

import numpy as np
import onnx_ir as ir
import torch
from torch import nn
from torch.nn import functional as F

from ptqd_export.backends import OrtEngine
from ptqd_export.bundle.bundle import WEIGHTS
from ptqd_export.core.backend import Emission
from ptqd_export.core.model import InputSpec, ModelInfo
from ptqd_export.core.noise import Correction
from ptqd_export.core.precision import Precision
from ptqd_export.core.quant import (
    E4M3_MAX,
    Grid,
    LayerQuant,
    OutputGrid,
    QuantizedNetwork,
    from_e4m3,
    qmax,
    to_codes,
    to_e4m3,
)
from ptqd_export.core.schedule import NoiseSchedule
from ptqd_export.export import export_fp, fold, insert_qdq, lower, save

INFO = ModelInfo("toy", (2, 8, 8), (InputSpec("class_labels", num_classes=4, null_class=3),), "0" * 64)
PRECISIONS = [Precision(8, 8), Precision(4, 8), Precision(4, 4)]
PORTABLE_NUMBERS = [Precision(8, 8, "fp8"), Precision(4, 16), Precision(8, 16)]
"""Precisions whose numbers are the portable ones in every emission."""
FLOAT32 = [Emission.PORTABLE, Emission.ORT_CPU]
STEPS = 3
Arrays = Mapping[str, np.ndarray]


class Toy(nn.Module):
    """Every form a layer takes in the graph: grouped conv, conv without bias, conv and linear called twice,
    Gemm, MatMul, attention."""

    def __init__(self) -> None:
        super().__init__()
        self.conv_in = nn.Conv2d(2, 8, 3, padding=1)
        self.embedding = nn.Embedding(4, 8)
        self.time = nn.Sequential(nn.Linear(8, 16), nn.SiLU(), nn.Linear(16, 8, bias=False))
        self.grouped = nn.Conv2d(8, 16, 3, padding=1, stride=2, groups=4, bias=False)
        self.norm = nn.GroupNorm(4, 16, eps=1e-3)
        self.twice = nn.Conv2d(16, 16, 1)
        self.to_q, self.to_k, self.to_v = (nn.Linear(16, 16) for _ in range(3))
        self.to_out = nn.Linear(16, 16, bias=False)
        self.conv_out = nn.Conv2d(24, 2, 3, padding=1)

    def forward(
        self, sample: torch.Tensor, timestep: torch.Tensor, class_labels: torch.Tensor
    ) -> torch.Tensor:
        angles = timestep[:, None] * torch.tensor([0.01, 0.1, 1.0, 2.0])
        emb = self.time(torch.cat([angles.sin(), angles.cos()], 1) + self.embedding(class_labels))
        first = self.conv_in(sample) + emb[:, :, None, None]
        h = F.silu(self.norm(self.grouped(first)))
        h = self.twice(F.silu(self.twice(h)))
        b, c, height, width = h.shape
        tokens = h.flatten(2).transpose(1, 2)
        q, k, v = (to(tokens).view(b, -1, 4, 4).transpose(1, 2) for to in (self.to_q, self.to_k, self.to_v))
        tokens = (
            self.to_out(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).reshape(b, -1, c)) + tokens
        )
        h = tokens.transpose(1, 2).reshape(b, c, height, width)
        return self.conv_out(torch.cat([F.interpolate(h, scale_factor=2.0, mode="nearest"), first], 1))


def feeds_of(n: int, step: int = 0, seed: int = 0) -> dict[str, np.ndarray]:
    rng = np.random.default_rng(seed)
    return {
        "sample": rng.standard_normal((n, 2, 8, 8)).astype(np.float32),
        "timestep": rng.integers(0, 1000, n),
        "class_labels": rng.integers(0, 4, n),
        "step": np.array([step]),
    }


def forward(module: nn.Module, feeds: Arrays) -> np.ndarray:
    with torch.no_grad():
        tensors = [torch.from_numpy(feeds[name]) for name in ("sample", "timestep", "class_labels")]
        return np.asarray(module(tensors[0], tensors[1], class_labels=tensors[2]).numpy())


def layers_of(module: nn.Module) -> dict[str, nn.Module]:
    return {name: m for name, m in module.named_modules() if isinstance(m, nn.Conv2d | nn.Linear)}


def calibrated(
    module: nn.Module, precision: Precision, edge_bits: int | None = 8, plain: bool = False
) -> QuantizedNetwork:
    """Ranges of eight samples, which a few values leave; conv_in and conv_out at `edge_bits`.

    Integers have windows between two ends of their own, convs an output grid per channel, and convs without
    groups smoothed inputs. `plain`: grids about zero, one of the outputs, and nothing smoothed.
    """
    seen: dict[str, list[np.ndarray]] = {}
    modules = layers_of(module)
    integers = precision.number == "int" and not precision.weight_only
    smooth = {
        name: np.geomspace(0.5, 2, m.in_channels).astype(np.float32)
        for name, m in modules.items()
        if isinstance(m, nn.Conv2d) and m.groups == 1 and integers and not plain
    }

    def record(name: str) -> object:
        def hook(_: nn.Module, args: tuple[torch.Tensor, ...], out: torch.Tensor) -> None:
            x, y = args[0].numpy(), out.numpy()
            if name in smooth:
                x = x / smooth[name][:, None, None]
            others = (0, 2, 3) if y.ndim == 4 else tuple(range(y.ndim - 1))
            found = [np.minimum(x.min(), 0), np.maximum(x.max(), 0), y.min(others), y.max(others)]
            known = seen.get(name, found)
            seen[name] = [(np.minimum, np.maximum)[i % 2](known[i], found[i]) for i in range(4)]

        return hook

    handles = [m.register_forward_hook(record(name)) for name, m in modules.items()]  # type: ignore[arg-type]
    forward(module, feeds_of(8, seed=1))
    for handle in handles:
        handle.remove()
    layers = {}
    for name, m in modules.items():
        weight = m.weight.detach().numpy()
        edge = name in ("conv_in", "conv_out") and edge_bits
        w_bits, a_bits = (
            (edge_bits, edge_bits)
            if edge and edge_bits
            else (precision.weight_bits, precision.activation_bits)
        )
        if precision.weight_only:
            a_bits = precision.activation_bits
        fp8, conv = precision.number == "fp8", isinstance(m, nn.Conv2d)
        if name in smooth:
            weight = weight * smooth[name][:, None, None]
        top_w = E4M3_MAX if fp8 else qmax(w_bits)
        weight_scale = (np.abs(weight.reshape(len(weight), -1)).max(1) / top_w).astype(np.float32)
        spread = weight_scale.reshape(-1, *[1] * (weight.ndim - 1))
        low, high = (float(end) for end in seen[name][:2])  # some values saturate
        largest = 0.8 * max(-low, high)
        grid = Grid.window(0.95 * low, 0.95 * high, a_bits)
        if plain:
            grid = Grid.symmetric(float(np.float32(largest / qmax(a_bits))), a_bits)
        if fp8:
            grid = Grid(float(np.float32(largest / E4M3_MAX)), -int(E4M3_MAX), int(E4M3_MAX))
        output = None
        if conv and integers:
            ends = [np.float32(0.9) * end for end in seen[name][2:]]
            if plain:
                largest = max(float(np.abs(end).max()) for end in ends)
                ends = [np.full(len(weight), sign * largest, np.float32) for sign in (-1, 1)]
            output = OutputGrid.window(*ends)
        layers[name] = LayerQuant(
            name=name,
            kind="conv" if conv else "linear",
            weight=to_e4m3(weight / spread) if fp8 else to_codes(weight, spread, w_bits),
            weight_scale=weight_scale,
            weight_bits=w_bits,
            input=None if precision.weight_only else grid,
            activation_bits=a_bits,
            output=output,
            bias=None if m.bias is None else m.bias.detach().numpy(),
            macs=1,
            number=precision.number,
            smooth=smooth.get(name),
        )
    return QuantizedNetwork(precision, layers)


def simulate(layer: LayerQuant, module: nn.Module, emission: Emission, x: np.ndarray) -> np.ndarray:
    """One layer by the definitions of quant.py, in float64: outputs of ORT CPU's convs each on its channel's
    own grid, without `LayerQuant.fused`."""
    scale = layer.weight_scale.astype(np.float64)
    precision = Precision(layer.weight_bits, layer.activation_bits, layer.number)
    ort = emission.numerics(precision) is Emission.ORT_CPU
    grid = layer.input
    if grid is None:
        codes = x.astype(np.float64)
    else:
        scale = scale * grid.scale
        step: np.ndarray | np.float32 = np.float32(grid.scale)
        if layer.smooth is not None:
            smooth = layer.smooth[:, None, None]
            x, step = (x, step * smooth) if ort else (x * (np.float32(1) / smooth), step)
        if layer.number == "fp8":
            codes = from_e4m3(to_e4m3(x / step)).astype(np.float64)
        else:
            codes = np.clip(np.rint(x / step), grid.lo, grid.hi).astype(np.float64)
    weight = torch.from_numpy(layer.weight_values().astype(np.float64))
    bias = np.zeros(len(weight)) if layer.bias is None else layer.bias.astype(np.float64)
    if layer.kind == "linear":
        return np.asarray((codes @ weight.numpy().T) * scale + bias)
    assert isinstance(module, nn.Conv2d)
    out = F.conv2d(
        torch.from_numpy(codes), weight, None, module.stride, module.padding, module.dilation, module.groups
    ).numpy()
    if not ort:
        return np.asarray(out * scale[:, None, None] + bias[:, None, None])
    assert layer.output is not None
    step, zero = (v.astype(np.float64) for v in (layer.output.scale, layer.output.zero_point))
    # The bias is an integer in the accumulator, and with it what moves the code to the middle.
    out = out + np.rint((bias + (zero - 128) * step) / scale)[:, None, None]
    code = np.clip(np.rint(out * (scale / step)[:, None, None]) + 128, 0, 255)
    return np.asarray((code - zero[:, None, None]) * step[:, None, None])


def session(source: Path | ir.Model, optimised: Path | None = None, optimise: bool = True) -> OrtEngine:
    if isinstance(source, Path):
        return OrtEngine(source, optimise=optimise, optimised_path=optimised)
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "model.onnx"
        path.write_bytes(ir.to_proto(source).SerializeToString())
        return OrtEngine(path, optimise=optimise, optimised_path=optimised)


def run(model: Path | ir.Model, feeds: Arrays, optimise: bool = True) -> dict[str, np.ndarray]:
    with session(model, optimise=optimise) as engine:
        return engine(feeds)


def rms(x: np.ndarray) -> float:
    return float(np.sqrt(np.mean(np.square(x, dtype=np.float64))))


def copy_of(module: nn.Module) -> nn.Module:
    other = Toy().eval()
    other.load_state_dict(module.state_dict())
    return other


# --- graphs


def schedule_of(prediction_type: str = "epsilon", n_steps: int = STEPS) -> NoiseSchedule:
    return NoiseSchedule.from_config({"prediction_type": prediction_type, "clip_sample": False}, n_steps, 0.0)


def correction_of(gain: np.ndarray, offset: np.ndarray) -> Correction:
    """With no residual, which no graph knows of."""
    return Correction(gain, offset, np.zeros(len(gain)))


HALVED = correction_of(np.full((STEPS, 2), 0.5), np.ones((STEPS, 2)))


def emitted(
    base: ir.Model, network: QuantizedNetwork, emission: Emission, precision: Precision | None = None
) -> ir.Model:
    """`base` with the layers of `network` quantized, lowered for an emission."""
    return lower(insert_qdq(base, network, emission), emission, precision or network.precision)


def graph_of(module: nn.Module, base: ir.Model, precision: Precision, emission: Emission) -> ir.Model:
    """`base`, the export of `module`, at a precision."""
    return emitted(base, calibrated(module, precision), emission)


def write_all(module: nn.Module, folder: Path, fp: ir.Model | None = None) -> None:
    """Its export, and its graphs of every emission at w4a4, folded.

    Args:
        fp: the export, where it is at hand.
    """
    fp, network = fp or export_fp(module, INFO), calibrated(module, Precision(4, 4))
    graphs = {str(e): fold(emitted(fp, network, e), schedule_of(), HALVED) for e in Emission}
    save({"fp32": fp, **graphs}, folder, WEIGHTS)
