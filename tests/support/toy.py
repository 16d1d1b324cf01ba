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
from ptqd_export.core.quant import E4M3_MAX, LayerQuant, QuantizedNetwork, from_e4m3, qmax, to_codes, to_e4m3
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


def calibrated(module: nn.Module, precision: Precision, edge_bits: int | None = 8) -> QuantizedNetwork:
    """Absolute-maximum scales; conv_in and conv_out at `edge_bits`. Inputs and outputs from eight samples."""
    seen: dict[str, list[float]] = {}
    modules = layers_of(module)

    def record(name: str) -> object:
        def hook(_: nn.Module, args: tuple[torch.Tensor, ...], out: torch.Tensor) -> None:
            known = seen.get(name, [0.0, 0.0])
            seen[name] = [max(known[0], float(args[0].abs().max())), max(known[1], float(out.abs().max()))]

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
        top_w, top_a = (E4M3_MAX, E4M3_MAX) if fp8 else (qmax(w_bits), qmax(a_bits))
        weight_scale = (np.abs(weight.reshape(len(weight), -1)).max(1) / top_w).astype(np.float32)
        spread = weight_scale.reshape(-1, *[1] * (weight.ndim - 1))
        layers[name] = LayerQuant(
            name=name,
            kind="conv" if conv else "linear",
            weight=to_e4m3(weight / spread) if fp8 else to_codes(weight, spread, w_bits),
            weight_scale=weight_scale,
            weight_bits=w_bits,
            input_scale=float(np.float32(0.8 * seen[name][0] / top_a)),  # some values saturate
            activation_bits=a_bits,
            output_scale=float(np.float32(0.9 * seen[name][1] / qmax(8))) if conv else None,
            bias=None if m.bias is None else m.bias.detach().numpy(),
            macs=1,
            number=precision.number,
        )
    return QuantizedNetwork(precision, layers)


def simulate(layer: LayerQuant, module: nn.Module, emission: Emission, x: np.ndarray) -> np.ndarray:
    """One layer by the definitions of quant.py, in float64."""
    scale = layer.bias_scale().astype(np.float64)
    if layer.weight_only:
        codes, scale = x.astype(np.float64), layer.weight_scale.astype(np.float64)
    elif layer.number == "fp8":
        codes = from_e4m3(to_e4m3(x / np.float32(layer.input_scale))).astype(np.float64)
    else:
        codes = to_codes(x, layer.input_scale, layer.activation_bits).astype(np.float64)
    weight = torch.from_numpy(layer.weight_values().astype(np.float64))
    precision = Precision(layer.weight_bits, layer.activation_bits, layer.number)
    ort_conv = emission.numerics(precision) is Emission.ORT_CPU and layer.kind == "conv"
    bias: np.ndarray | None = None if layer.bias is None else layer.bias.astype(np.float64) / scale
    if ort_conv:
        bias = layer.bias_codes()
    offset = 0 if bias is None else bias.astype(np.float64)
    if layer.kind == "linear":
        return np.asarray(((codes @ weight.numpy().T) + offset) * scale)
    assert isinstance(module, nn.Conv2d)
    out = F.conv2d(
        torch.from_numpy(codes), weight, None, module.stride, module.padding, module.dilation, module.groups
    ).numpy()
    out = (out + np.reshape(offset, (-1, 1, 1) if bias is not None else ())) * scale[:, None, None]
    if not ort_conv:
        return np.asarray(out)
    assert layer.output_scale is not None
    return to_codes(out, layer.output_scale, 8).astype(np.float64) * np.float32(layer.output_scale)


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
