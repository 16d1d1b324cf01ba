"""Observe a full-precision network's activations once: histograms and Hessians that serve any precision."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..core.precision import Number
from ..core.quant import I8, U8
from ..core.sampling import Sampling
from ..errors import ModelError
from ..progress import progress
from ..recipe import Recipe
from .network import Network
from .ranges import AbsHistogram
from .rows import seen_trajectories
from .torch_engine import TorchEngine
from .trajectories import Trajectories

OBSERVED_TRAJECTORIES = 8
"""Fewest trajectories to observe, at all steps and in both guidance branches: millions of values per layer.

Where a model has more classes, there are as many trajectories as classes.
"""
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
        input, output: histograms of the absolute values.
        hessians: float32 (groups, K, K), sums of x x^T over the inputs x that are multiplied with a flattened
            weight row of K values; None where GPTQ is not used.
        codes: weight codes by (rounding, number, bits, scales), so that precisions with the same weights
            share them.
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


def observe(network: Network, sampling: Sampling, recipe: Recipe, trajectories: Trajectories) -> Observed:
    """Observe every Conv2d and Linear on full-precision trajectories.

    Each gets histograms of its input and output, and Hessians where GPTQ will round its weights. They are
    taken from calibration trajectories of every class (see `seen_trajectories`), at all steps and in the
    guidance branches that the sampler uses.

    Raises:
        ModelError: a layer's values are not finite, or the network has no Conv2d or Linear.
    """
    steps = len(sampling)
    chosen = np.array(seen_trajectories(network.info, recipe.calibration.size, OBSERVED_TRAJECTORIES))
    layers: dict[str, ObservedLayer] = {}
    hessians = recipe.quantization.rounding == "gptq" and any(
        p.weight_bits < GPTQ_BITS for p in recipe.precisions
    )
    with (
        TorchEngine(network.module, sampling) as engine,
        progress(len(chosen) * steps, "activation ranges", "step") as bar,
    ):
        for indices, x, _, conditions in trajectories:
            rows = chosen[(chosen >= indices.start) & (chosen < indices.stop)] - indices.start
            if not len(rows):
                continue
            own = {name: value[rows] for name, value in conditions.items()}
            for step in range(steps):
                # MACs are counted in the first call only, and divided by its number of samples.
                batch = 0 if layers else len(rows) * sampling.branches
                with _watching(network, layers, step, hessians, count_macs=batch > 0):
                    sampling.predict(engine, x[step][rows], step, own)
                for layer in layers.values() if batch else ():
                    layer.macs = round(layer.macs / batch)
                bar.update(len(rows))
    if not layers:
        raise ModelError(f"{network.info.name} calls no Conv2d and no Linear: there is nothing to quantize")
    return Observed(layers)


def _layer_kind(module: nn.Module) -> str | None:
    """The kind of a layer, or None for any other module, and for a subclass with a forward of its own."""
    forward = type(module).forward
    if forward is nn.Conv2d.forward:
        return "conv"
    return "linear" if forward is nn.Linear.forward else None


@contextmanager
def _watching(
    network: Network, layers: dict[str, ObservedLayer], step: int, hessians: bool, count_macs: bool
) -> Iterator[None]:
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
                raise ModelError(
                    f"layer {name} computes {error} at step {step}: check the model's weights and scheduler "
                    "config"
                ) from error
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
