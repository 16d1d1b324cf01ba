"""Observe a full-precision network's activations once: histograms and Hessians that serve any precision."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from ..core.precision import Number
from ..core.quant import F32, I8, U8
from ..core.sampling import Sampling
from ..errors import ModelError
from ..progress import progress
from ..recipe import Recipe
from .network import Network, trial_tensors
from .ranges import ChannelRanges, Histogram
from .torch_engine import TorchEngine
from .trajectories import Trajectories

OBSERVED_TRAJECTORIES, OBSERVED_STEPS = 8, 50
"""What is observed: as many samples as so many trajectories of so many steps have, or fewer.

They are spread over all trajectories and steps: millions of values per layer. It is more where there are so
many trajectories that each would not be seen at one step.
"""
SMOOTHED_SHARE = 4
"""One in so many of the observed steps also gives the ranges per channel that inputs are smoothed by."""
MAX_SMOOTHING = 64.0
"""Largest smoothing factor, and the reciprocal of the smallest."""
HESSIAN_SAMPLES = 4
HESSIAN_ROWS = 1024
"""Most samples, and most input vectors of them, that enter a layer's Hessian per call.

Over all steps these are some ten vectors per column of the Hessian.
"""
MAX_HESSIAN_SIZE = 4096
"""Most inputs per output (C kh kw) of a layer with a Hessian (64 MiB); larger layers round to the nearest."""
GPTQ_BITS = 8
"""GPTQ rounds weights of fewer bits than this, if the recipe asks for it: at 8 bits it gains nothing."""


@dataclass
class ObservedLayer:
    """What was observed of a Conv2d or Linear.

    Attributes:
        kind: "conv" or "linear".
        macs: multiply-accumulates per sample.
        vector: the input is 2-D, one vector per sample (time and class embeddings); such a layer stays float.
        channels: ranges of the input x per channel.
        smooth: factors m per input channel, float32 (I,); None for 1. Histogram and Hessians are of x / m.
        input: histogram.
        output: ranges per channel.
        hessians: float32 (groups, K, K), sums of x x^T over the inputs x that are multiplied with a flattened
            weight row of K values; None where GPTQ is not used.
        codes: weight codes by (rounding, number, bits, scales), so that precisions with the same weights
            share them.
    """

    kind: str
    macs: int = 0
    vector: bool = False
    channels: ChannelRanges = field(default_factory=ChannelRanges)
    smooth: F32 | None = None
    input: Histogram = field(default_factory=Histogram)
    output: ChannelRanges = field(default_factory=ChannelRanges)
    hessians: Tensor | None = None
    codes: dict[tuple[str, Number, int, bytes], I8 | U8] = field(default_factory=dict)


@dataclass(frozen=True)
class Observed:
    """What calibration saw of a network.

    Attributes:
        layers: by module path, in call order.
        product_macs: multiply-accumulates per sample outside of them (`QuantizedNetwork`).
    """

    layers: Mapping[str, ObservedLayer]
    product_macs: int


@dataclass(frozen=True)
class Outline(Observed):
    """What one call of a network tells without any number: kinds and multiply-accumulates of its layers.

    Attributes:
        inputs: shape of each layer's input at its first call, for one sample, (1, ...).
    """

    inputs: Mapping[str, tuple[int, ...]]


def outline(network: Network) -> Outline:
    """The layers of a network, by one call for one sample; on the meta device it takes no memory.

    Raises:
        ModelError: the network has no Conv2d or Linear.
    """
    layers: dict[str, ObservedLayer] = {}
    inputs: dict[str, tuple[int, ...]] = {}
    names = {module: name for name, module in network.module.named_modules()}

    def count(layer: ObservedLayer, module: Any, x: Tensor, output: Tensor, step: int) -> None:
        layer.macs += output.numel() * module.weight[0].numel()
        inputs.setdefault(names[module], tuple(x.shape))

    # The counter knows no fused attention of the CPU, but the products that it is made of.
    with (
        torch.inference_mode(),
        sdpa_kernel(SDPBackend.MATH),
        FlopCounterMode(display=False) as counter,
        _watching(network, layers, 0, count),
    ):
        network.module(**trial_tensors(network, 1))
    if not layers:
        raise ModelError(f"{network.info.name} calls no Conv2d and no Linear: there is nothing to quantize")
    in_layers = sum(layer.macs for layer in layers.values())
    return Outline(layers, max(counter.get_total_flops() // 2 - in_layers, 0), inputs)


def observe(network: Network, sampling: Sampling, recipe: Recipe, trajectories: Trajectories) -> Observed:
    """Observe every Conv2d and Linear on full-precision trajectories.

    Each gets a histogram of its input and ranges of its output, and Hessians where GPTQ will round its
    weights. Every calibration trajectory is seen, each at some of the steps (`_rows`), in the guidance
    branches that the sampler uses: rare large values decide, and a class that is left out may have them.
    Before that, a share of the steps gives the factors that even out the channels of inputs (`smoothing`).

    Raises:
        ModelError: a layer's values are not finite, or the network has no Conv2d or Linear.
    """
    steps, size = len(sampling), recipe.calibration.size
    stride = observed_stride(size, steps)
    layers: dict[str, ObservedLayer] = {}
    hessians = recipe.quantization.rounding == "gptq" and any(
        p.weight_bits < GPTQ_BITS for p in recipe.precisions
    )
    alpha = recipe.quantization.smoothing
    with (
        TorchEngine(network.module, sampling) as engine,
        progress(size * steps * (2 if alpha else 1), "activation ranges", "step") as bar,
    ):

        def look(stride: int, watch: Watch) -> None:
            for indices, x, _, conditions in trajectories:
                if indices.stop > size:
                    return
                for step in range(steps):
                    rows = _rows(indices, step, stride)
                    if len(rows):
                        own = {name: value[rows] for name, value in conditions.items()}
                        with _watching(network, layers, step, watch):
                            sampling.predict(engine, x[step][rows], step, own)
                    bar.update(len(indices))

        if alpha:
            look(stride * SMOOTHED_SHARE, _see_channels)
            for name, layer in layers.items():
                layer.smooth = smoothing(layer, network.module.get_submodule(name), alpha)
        look(stride, partial(_see_values, hessians=hessians))
    counted = outline(network)
    for name, layer in layers.items():
        layer.macs = counted.layers[name].macs if name in counted.layers else 0
    return Observed(layers, counted.product_macs)


def observed_stride(size: int, steps: int) -> int:
    """Each of `size` trajectories is observed at every so many-th step."""
    if steps <= OBSERVED_STEPS:
        return min(max(1, size // OBSERVED_TRAJECTORIES), steps)
    return min(-(-size * steps // (OBSERVED_TRAJECTORIES * OBSERVED_STEPS)), steps)


def _rows(indices: range, step: int, stride: int) -> npt.NDArray[np.int64]:
    """Which trajectories of a batch are seen at a step: each at every stride-th, beginning anywhere.

    Where they begin is spread by the golden ratio, which has no period in common with that of the classes.
    """
    begin = (np.asarray(indices) * 0.6180339887498949 % 1 * stride).astype(np.int64)
    return np.flatnonzero((begin + step) % stride == 0)


def smoothing(layer: ObservedLayer, module: Any, alpha: float) -> F32 | None:
    """Factors m_c = max|x_c|^alpha / max|W_c|^(1 - alpha), with geometric mean 1 (SmoothQuant, eq. 4).

    None for linear layers, whose inputs others share, and for convs with groups.
    """
    if layer.kind != "conv" or module.groups != 1:
        return None
    seen = layer.channels.largest.astype(np.float64)
    weight = module.weight.detach().abs().amax((0, 2, 3)).numpy().astype(np.float64)
    used = (seen > 0) & (weight > 0)
    if not used.any():
        return None
    factors = np.ones(len(seen))
    factors[used] = seen[used] ** alpha / weight[used] ** (1 - alpha)
    factors[used] /= np.exp(np.log(factors[used]).mean())
    return np.clip(factors, 1 / MAX_SMOOTHING, MAX_SMOOTHING).astype(np.float32)


def _layer_kind(module: nn.Module) -> str | None:
    """The kind of a layer, or None for any other module, and for a subclass with a forward of its own."""
    forward = type(module).forward
    if forward is nn.Conv2d.forward:
        return "conv"
    return "linear" if forward is nn.Linear.forward else None


Watch = Callable[[ObservedLayer, Any, Tensor, Tensor, int], None]
"""What is done at each call of a layer: (layer, module, input, output, step)."""


@contextmanager
def _watching(network: Network, layers: dict[str, ObservedLayer], step: int, watch: Watch) -> Iterator[None]:
    def hook_of(name: str, kind: str) -> Any:
        def hook(module: Any, args: tuple[Tensor, ...], kwargs: dict[str, Tensor], output: Tensor) -> None:
            layer = layers.setdefault(name, ObservedLayer(kind))
            x = args[0] if args else kwargs["input"]
            layer.vector = x.ndim == 2
            try:
                watch(layer, module, x, output, step)
            except ValueError as error:
                raise ModelError(
                    f"layer {name} computes {error} at step {step}: check the model's weights and scheduler "
                    "config"
                ) from error

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


def _channel_axis(layer: ObservedLayer, x: Tensor) -> int:
    return 1 if layer.kind == "conv" else x.ndim - 1


def _see_channels(layer: ObservedLayer, module: Any, x: Tensor, output: Tensor, step: int) -> None:
    layer.channels.add(x, _channel_axis(layer, x))
    layer.output.add(output, _channel_axis(layer, output))


def _see_values(
    layer: ObservedLayer, module: Any, x: Tensor, output: Tensor, step: int, hessians: bool
) -> None:
    layer.channels.add(x, _channel_axis(layer, x))
    if layer.smooth is not None:
        x = x / torch.from_numpy(layer.smooth)[:, None, None]
    layer.input.add(x)
    layer.output.add(output, _channel_axis(layer, output))
    if hessians and not layer.vector and module.weight[0].numel() <= MAX_HESSIAN_SIZE:
        _add_products(layer, module, x, step)


def _add_products(layer: ObservedLayer, module: Any, x: Tensor, step: int) -> None:
    """Add x x^T to the layer's Hessians."""
    some = -(-len(x) // HESSIAN_SAMPLES)
    rows = weight_inputs(module, x[step % some :: some], step)
    if layer.hessians is None:
        layer.hessians = torch.zeros(len(rows), rows.shape[-1], rows.shape[-1])
    layer.hessians.baddbmm_(rows.transpose(1, 2), rows)


def weight_inputs(module: Any, x: Tensor, offset: int, most: int = HESSIAN_ROWS) -> Tensor:
    """Up to `most` of the vectors that a layer's weight rows are multiplied with, (groups, rows, K).

    Args:
        module: a Conv2d or Linear.
        x: its input.
        offset: of the first position that is taken; others give others.
    """
    if isinstance(module, nn.Linear):
        columns = x.reshape(-1, x.shape[-1]).T[None, None]  # (1, groups, K, L)
    else:
        padded = F.pad(x, module._reversed_padding_repeated_twice)
        columns = F.unfold(padded, module.kernel_size, module.dilation, 0, module.stride)  # (B, C kh kw, L)
        columns = columns.reshape(len(x), module.groups, -1, columns.shape[-1])
    # An odd stride shares no factor with an image width of a power of two, so it reaches every column.
    stride = (len(columns) * columns.shape[-1] // most) | 1
    return columns[..., offset % stride :: stride].permute(1, 0, 3, 2).flatten(1, 2)
