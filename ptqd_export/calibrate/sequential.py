"""GPTQ on the inputs that layers get in the quantized network, stage after stage.

The Hessian of a layer is a sum over inputs x of the simulated network, in which all layers are quantized and
those of earlier stages have their final codes; x is rounded to the layer's own input grid. Each row counts as
much as an error at its denoising step does. A stage is a run of layers. All have about the same share of the
multiply-accumulates, so a network takes STAGES partial passes over the trajectories, not one per layer.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Mapping, Sequence
from functools import partial
from itertools import groupby
from typing import Any

import torch
from torch import Tensor, nn

from ..core.backend import Emission
from ..core.quant import LayerQuant, QuantizedNetwork
from ..core.sampling import Sampling
from ..progress import progress
from .blocks import run_until
from .network import Network
from .observe import GPTQ_BITS, MAX_HESSIAN_SIZE, OBSERVED_TRAJECTORIES, weight_inputs
from .rounding import gptq, smoothed_weight
from .rows import Call, calls, seen_trajectories
from .simulate import SimulatedLayer, geometry_of, simulate
from .trajectories import Trajectories

STAGES = 8
STRIDE = 4
"""Each trajectory is shown at every STRIDE-th step, all together at all of them."""
SAMPLES, ROWS = 8, 4096
"""Most samples, and most input vectors of them, that enter a layer's Hessian per call."""


def round_in_stages(
    network: Network,
    sampling: Sampling,
    start: QuantizedNetwork,
    trajectories: Trajectories,
    stages: int = STAGES,
    stride: int = STRIDE,
) -> QuantizedNetwork:
    """`start` with the weight codes of fewer than 8 bits chosen by GPTQ on quantized inputs.

    Ranges and scales stay. Layers of more than MAX_HESSIAN_SIZE inputs per output keep their codes.

    Args:
        start: integer codes, rounded in any way.
        stages, stride: fewer stages and a longer stride take less time.
    """
    layers = dict(start.layers)
    module = simulate(network, start, Emission.PORTABLE)
    seen = seen_trajectories(network.info, len(trajectories.calibration), OBSERVED_TRAJECTORIES)
    shown = partial(calls, sampling, trajectories, seen, min(stride, len(sampling)))
    parts = _stages(start, stages)
    number = sum(1 for _ in shown())
    with progress(len(parts) * number, f"GPTQ at {start.precision}", "call") as bar:
        for names in parts:
            hessians = _hessians(network, module, layers, names, shown(), bar.update)
            for name, sums in hessians.items():
                layer, original = layers[name], network.module.get_submodule(name)
                weight = smoothed_weight(original, layer.smooth)
                codes = gptq(weight, layer.weight_scale, layer.weight_bits, sums)
                layers[name] = dataclasses.replace(layer, weight=codes)
                module.get_submodule(name).forward = SimulatedLayer(
                    layers[name], Emission.PORTABLE, geometry_of(original)
                )
    return dataclasses.replace(start, layers=layers)


def _stages(start: QuantizedNetwork, stages: int) -> list[list[str]]:
    """Runs of the layers to round, in call order, of about the same multiply-accumulates."""
    rounded = {
        name: layer
        for name, layer in start.layers.items()
        if layer.number == "int"
        and layer.weight_bits < GPTQ_BITS
        and layer.weight[0].size <= MAX_HESSIAN_SIZE
    }
    total, done, number = sum(layer.macs for layer in rounded.values()), 0, {}
    for name, layer in rounded.items():
        number[name] = min(stages - 1, done * stages // max(total, 1))
        done += layer.macs
    return [list(names) for _, names in groupby(number, number.__getitem__)]


def _hessians(
    network: Network,
    module: nn.Module,
    layers: Mapping[str, LayerQuant],
    names: Sequence[str],
    shown: Iterable[Call],
    tell: Any,
) -> dict[str, Tensor]:
    """Weighted sums of x x^T over the inputs of the layers `names` in `module`, (groups, K, K) each."""
    found: dict[str, Tensor] = {}
    simulated = {
        name: SimulatedLayer(layers[name], Emission.PORTABLE, geometry_of(network.module.get_submodule(name)))
        for name in names
    }

    def add(
        args: tuple[Any, ...], kwargs: dict[str, Any], output: Any, name: str, number: int, weights: Tensor
    ) -> None:
        x = args[0] if args else kwargs["input"]
        # A layer may see several rows per sample; where that cannot be told, all count the same.
        times, odd = divmod(len(x), len(weights))
        each = torch.ones(len(x)) if odd else weights.repeat_interleave(times)
        some = -(-len(x) // SAMPLES)
        x, each = x[number % some :: some], each[number % some :: some]
        x = simulated[name].input_values(x) * each.sqrt().reshape(-1, *[1] * (x.ndim - 1))
        rows = weight_inputs(network.module.get_submodule(name), x, number, ROWS)
        if name not in found:
            found[name] = torch.zeros(len(rows), rows.shape[-1], rows.shape[-1])
        found[name].baddbmm_(rows.transpose(1, 2), rows)

    for number, call in enumerate(shown):
        watched = {n: partial(add, name=n, number=number, weights=call.weights) for n in names}
        run_until(module, call, names[-1], watched, on_entry=True)
        tell()
    return found
