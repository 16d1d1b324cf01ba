"""From a full-precision network to its quantized layers: observe the activations once, then quantize at any precision."""

from __future__ import annotations

import fnmatch
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..errors import ModelError
from ..precision import Number, Precision
from ..progress import progress
from ..quant import E4M3_MAX, F32, I8, OUTPUT_BITS, U8, Emission, LayerQuant, QuantizedNetwork
from ..recipe import Recipe
from ..sampler import predict_epsilon
from ..schedule import NoiseSchedule
from .engine import TorchEngine
from .models import Network
from .ranges import AbsHistogram, weight_scales
from .rounding import gptq, nearest
from .trajectories import Trajectories

OBSERVED_TRAJECTORIES = 8
"""Trajectories whose x_t are looked at, all steps and both guidance branches: millions of values per layer."""
HESSIAN_SAMPLES = 4
HESSIAN_ROWS = 1024
"""Samples, and input vectors in them, that enter a layer's Hessian per call: over all steps some ten per column of it."""
EDGE_BITS = 8
MAX_BIAS_CODE = 1 << 30
"""Largest int32 bias code allowed; channels of tiny weights get a scale that keeps their bias below it."""
MAX_HESSIAN_SIZE = 4096
"""Inputs per output (C kh kw) up to which a layer gets a Hessian (64 MiB); GPTQ leaves larger layers to rounding to the nearest."""


@dataclass
class ObservedLayer:
    """What a Conv2d or Linear was seen doing.

    Attributes:
        kind: "conv" or "linear".
        macs: multiply-accumulates per sample.
        vector: the input is 2-D, one vector per sample (time and class embeddings): such a layer stays float.
        input, output: histograms of |values|.
        hessians: float32 (groups, K, K), sums of x x^T of what meets a flattened weight row of K values; None where GPTQ is not to act.
        codes: weight codes by (rounding, number, bits, scales), so that precisions with the same weights share them.
    """

    kind: str
    macs: int = 0
    vector: bool = False
    input: AbsHistogram = field(default_factory=AbsHistogram)
    output: AbsHistogram = field(default_factory=AbsHistogram)
    hessians: Tensor | None = None
    codes: dict[tuple[str, Number, int, bytes], I8 | U8] = field(default_factory=dict)


@dataclass(frozen=True)
class Observed:
    """Observed layers by module path, in call order."""

    layers: Mapping[str, ObservedLayer]


def observe(network: Network, schedule: NoiseSchedule, recipe: Recipe, trajectories: Trajectories) -> Observed:
    """Input and output histograms of every Conv2d and Linear on full-precision trajectories, and Hessians where GPTQ will round.

    Up to OBSERVED_TRAJECTORIES of the calibration trajectories, evenly spaced, all steps, in the guidance branches that are used.

    Raises:
        ModelError: a layer's values are not finite, or the network has no Conv2d or Linear.
    """
    spec, scale = recipe.calibration, recipe.sampler.guidance_scale
    chosen = np.unique(np.linspace(0, spec.size - 1, min(OBSERVED_TRAJECTORIES, spec.size)).round().astype(int))
    layers: dict[str, ObservedLayer] = {}
    hessians = recipe.quantization.rounding == "gptq" and any(p.weight_bits < EDGE_BITS for p in recipe.precisions)
    with TorchEngine(network, schedule) as engine, progress(len(chosen) * len(schedule), "activation ranges", "step") as bar:
        for indices, x, _, conditions in trajectories:
            rows = chosen[(chosen >= indices.start) & (chosen < indices.stop)] - indices.start
            if not len(rows):
                continue
            own = {name: value[rows] for name, value in conditions.items()}
            for step in range(len(schedule)):
                # MACs are those of the first call, over the samples in it.
                batch = 0 if layers else len(rows) * (1 if scale in (0.0, 1.0) else 2)
                with _watching(network, layers, step, hessians, count_macs=batch > 0):
                    predict_epsilon(engine, x[step][rows], step, schedule, network.info, own, scale)
                for layer in layers.values() if batch else ():
                    layer.macs = round(layer.macs / batch)
                bar.update(len(rows))
    if not layers:
        raise ModelError(f"{network.info.name} calls no Conv2d and no Linear: there is nothing to quantize")
    return Observed(layers)


def _layer_kind(module: nn.Module) -> str | None:
    """Only layers that compute what their class says: a subclass with a forward of its own is left alone."""
    forward = type(module).forward
    if forward is nn.Conv2d.forward:
        return "conv"
    return "linear" if forward is nn.Linear.forward else None


@contextmanager
def _watching(network: Network, layers: dict[str, ObservedLayer], step: int, hessians: bool, count_macs: bool) -> Iterator[None]:
    def hook_of(name: str, kind: str) -> Any:
        def hook(module: Any, args: tuple[Tensor, ...], kwargs: dict[str, Tensor], output: Tensor) -> None:
            layer = layers.setdefault(name, ObservedLayer(kind))
            x = args[0] if args else kwargs["input"]
            layer.vector = x.ndim == 2
            if count_macs:
                layer.macs += output.numel() * module.weight[0].numel()
            try:
                layer.input.add(x)
                layer.output.add(output)
            except ValueError as error:
                raise ModelError(f"layer {name} computes {error} at step {step}: check the model's weights and scheduler config") from error
            if hessians and not layer.vector and module.weight[0].numel() <= MAX_HESSIAN_SIZE:
                _add_products(layer, module, x, step)

        return hook

    handles = []
    for name, module in network.module.named_modules():
        kind = _layer_kind(module)
        if kind is not None:
            handles.append(module.register_forward_hook(hook_of(name, kind), with_kwargs=True))
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def _add_products(layer: ObservedLayer, module: Any, x: Tensor, step: int) -> None:
    """Add x x^T to the layer's Hessians, over up to HESSIAN_ROWS positions at which the weight meets `x`, in up to HESSIAN_SAMPLES samples."""
    some = -(-len(x) // HESSIAN_SAMPLES)
    x = x[step % some :: some]
    if layer.kind == "linear":
        columns = x.reshape(-1, x.shape[-1]).T[None, None]  # (1, groups, K, L)
    else:
        padded = F.pad(x, module._reversed_padding_repeated_twice)
        columns = F.unfold(padded, module.kernel_size, module.dilation, 0, module.stride)  # (B, C kh kw, L)
        columns = columns.reshape(len(x), module.groups, -1, columns.shape[-1])
    # An odd stride never falls in with an image's width and so takes positions from everywhere.
    stride = (len(columns) * columns.shape[-1] // HESSIAN_ROWS) | 1
    rows = columns[..., step % stride :: stride].permute(1, 0, 3, 2).flatten(1, 2)  # (groups, rows, K)
    if layer.hessians is None:
        layer.hessians = torch.zeros(len(rows), rows.shape[-1], rows.shape[-1])
    layer.hessians.baddbmm_(rows.transpose(1, 2), rows)


def quantize(network: Network, observed: Observed, precision: Precision, recipe: Recipe) -> QuantizedNetwork:
    """The network's layers at one precision: scales and weight codes.

    Left in float: embedding layers (see ObservedLayer.vector), convs with a padding mode other than zeros, globs of
    quantization.skip, and the first and last conv where quantization.edge_layers says so (else they get 8/8 bits, FP8 at FP8, and 8-bit
    weights alone where weights alone are quantized). fp32 and fp16 quantize nothing.

    8-bit weights are rounded to the nearest whatever the recipe says: GPTQ gains nothing there.
    FP8 reaches to the largest value whatever the recipe says. The steps of a floating grid go with the value, so that clipping only costs
    (0.9 dB of an input's signal to noise at the 99.99th percentile) and the best scale of the octave below gains less than 0.2 dB.

    Raises:
        ModelError: nothing is left to quantize.
    """
    convs = [name for name, layer in observed.layers.items() if layer.kind == "conv"]
    edges = {convs[0], convs[-1]} if convs else set()
    layers: dict[str, LayerQuant] = {}
    float_macs: dict[str, int] = {}
    for name, seen in observed.layers.items():
        module: Any = network.module.get_submodule(name)
        stays = (
            precision.is_float
            or seen.vector
            or (seen.kind == "conv" and module.padding_mode != "zeros")
            or any(fnmatch.fnmatchcase(name, glob) for glob in recipe.quantization.skip)
            or (name in edges and recipe.quantization.edge_layers == "float")
        )
        if stays:
            float_macs[name] = seen.macs
        else:
            used = _edge(precision) if name in edges else precision
            layers[name] = _quantize_layer(name, module, seen, used, recipe)
    if not layers and not precision.is_float:
        raise ModelError(
            f"{network.info.name} has no layer left to quantize at {precision}: check quantization.skip and edge_layers, or ask for fp32 or fp16"
        )
    return QuantizedNetwork(precision, layers, float_macs)


def _edge(precision: Precision) -> Precision:
    """`precision` with EDGE_BITS where it has integers; inputs that stay float do."""
    return Precision(EDGE_BITS, precision.activation_bits if precision.weight_only else EDGE_BITS, precision.number)


def _quantize_layer(name: str, module: Any, seen: ObservedLayer, precision: Precision, recipe: Recipe) -> LayerQuant:
    spec = recipe.calibration
    weight: F32 = np.ascontiguousarray(module.weight.detach().numpy(), np.float32)
    bias: F32 | None = None if module.bias is None else module.bias.detach().numpy().astype(np.float32)
    cpu = Emission.ORT_CPU.numerics(precision) is Emission.ORT_CPU
    if precision.weight_only:
        input_scale = 1.0
    elif precision.number == "fp8":
        input_scale = float(np.float32(seen.input.range("minmax", precision.activation_bits) / E4M3_MAX))
    else:
        input_scale = seen.input.scale(spec.activation_range, precision.activation_bits, spec.percentile)
    scale = _weight_scales(weight, precision, recipe)
    if bias is not None and cpu:
        smallest = np.abs(bias) / np.float32(input_scale * MAX_BIAS_CODE)
        scale = np.maximum(scale, smallest if recipe.quantization.weight_scales == "channel" else smallest.max()).astype(np.float32)
    scale = np.where(scale > 0, scale, np.float32(1.0)).astype(np.float32)
    rounding = recipe.quantization.rounding
    key = (rounding, precision.number, precision.weight_bits, scale.tobytes())
    if key not in seen.codes:
        if rounding == "nearest" or seen.hessians is None or precision.weight_bits >= EDGE_BITS:
            seen.codes[key] = nearest(weight, scale, precision.weight_bits, precision.number)
        else:
            seen.codes[key] = gptq(weight, scale, precision.weight_bits, seen.hessians)
    return LayerQuant(
        name,
        seen.kind,
        seen.codes[key],
        scale,
        precision.weight_bits,
        input_scale,
        precision.activation_bits,
        seen.output.scale(spec.activation_range, OUTPUT_BITS, spec.percentile) if seen.kind == "conv" and cpu else None,
        bias,
        seen.macs,
        precision.number,
    )


def _weight_scales(weight: F32, precision: Precision, recipe: Recipe) -> F32:
    """float32 (O,): scales of `weight` (O, ...), all equal where quantization.weight_scales is "tensor"; 0 where there are only zeros."""
    spec = recipe.calibration
    rows = weight if recipe.quantization.weight_scales == "channel" else weight.reshape(1, -1)
    if precision.number == "fp8":
        scale = (np.abs(rows).reshape(len(rows), -1).max(1) / np.float32(E4M3_MAX)).astype(np.float32)
    else:
        scale = weight_scales(rows, precision.weight_bits, spec.weight_range, spec.percentile)
    return np.ascontiguousarray(np.broadcast_to(scale, len(weight)))
