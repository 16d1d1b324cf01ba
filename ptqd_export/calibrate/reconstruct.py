"""Round weights block by block, by gradient descent on the block's output (AdaRound, BRECQ).

A weight w with scale s gets the code floor(w / s) or the one above it. While the block is optimised, the code
is floor(w / s) + h(V) with the rectified sigmoid h(V) = clip(1.2 sigmoid(V) - 0.1, 0, 1) (Nagel et al. 2020,
eq. 22 and 23), and a regulariser 1 - |2 h - 1|^b drives every h to 0 or 1, with b falling from 20 to 2 (eq.
24). What is minimised is the squared difference of a whole block's output (Li et al. 2021), weighted by
denoising step. The block's input comes from the network whose earlier blocks are quantized already, its
target from the full-precision network: later blocks make up for errors of earlier ones.
"""

from __future__ import annotations

import copy
import dataclasses
import hashlib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..core.backend import Emission
from ..core.quant import I8, LayerQuant, QuantizedNetwork, qmax, qmin
from ..core.sampling import Sampling
from ..progress import progress
from .blocks import Block, Examples, find_blocks
from .kept import KeptCodes
from .network import Network
from .rounding import per_channel, smoothed_weight
from .rows import Call, calls, seen_trajectories
from .simulate import SimulatedLayer, geometry_of, simulate
from .trajectories import Trajectories

ZETA, GAMMA = 1.1, -0.1
"""What the sigmoid is stretched to, so that h reaches 0 and 1 (AdaRound, eq. 23)."""
REGULARISER = 0.01
WARM_UP = 0.2
"""Share of the iterations without the regulariser."""
FIRST_B, LAST_B = 20.0, 2.0
TRAVEL = 10.0
"""Learning rate times iterations: 1e-3 at 10,000, as in BRECQ; fewer iterations take larger steps."""
MAX_ROWS = 1024
"""Most rows that a block is shown; they are on disk."""
BATCH = 16
CHECK_BATCH = 16


@dataclass(frozen=True)
class Effort:
    """How much is done for each block.

    Attributes:
        iterations: steps of Adam.
        rows: most rows that a block is shown.
        batch: rows of an iteration.
        seed: of the order of the rows.
    """

    iterations: int
    rows: int = MAX_ROWS
    batch: int = BATCH
    seed: int = 0


def reconstruct(
    network: Network,
    sampling: Sampling,
    start: QuantizedNetwork,
    trajectories: Trajectories,
    folder: Path,
    key: str,
    effort: Effort,
) -> QuantizedNetwork:
    """`start` with the weight codes chosen by block reconstruction.

    Ranges and scales stay. A block keeps the codes that it had if those of the optimisation do not lower its
    error. The codes of a finished block are kept in `folder`, so that a rerun goes on at the next one.

    Args:
        start: integer codes, rounded in any way.
        folder: of intermediate results.
        key: of everything before `start` that decides the trajectories.
    Raises:
        OSError: the folder cannot be written.
    """
    shown = partial(_shown, network, sampling, trajectories, effort.rows)  # read again for every block
    blocks = find_blocks(network.module, set(start.layers), next(shown()))
    kept = KeptCodes(folder, start, key, repr(effort))
    layers = dict(start.layers)
    module = simulate(network, start, Emission.PORTABLE)
    todo = []
    for block in blocks:
        codes = kept.read(block.name, block.layers)
        if codes is None:
            todo.append(block)
        else:
            _put(network, module, layers, codes)
    rows = sum(len(call.weights) for call in shown())
    title = f"reconstruction at {start.precision}"
    with progress(len(todo) * (rows + effort.iterations * effort.batch), title, "row") as bar:
        for block in todo:
            bar.set_postfix_str(block.name)
            examples = Examples(block, network.module, module, shown(), folder, bar.update)
            try:
                codes = _round_block(network, layers, block, examples, effort, bar.update)
            finally:
                examples.close()
            kept.write(block.name, codes)
            _put(network, module, layers, codes)
    return dataclasses.replace(start, layers=layers)


def _shown(network: Network, sampling: Sampling, trajectories: Trajectories, rows: int) -> Iterator[Call]:
    """Calls of at most about `rows` rows: every class, and steps in turn over the batches."""
    size = len(trajectories.calibration)
    most = max(1, rows // sampling.branches)
    seen = seen_trajectories(network.info, size, min(size, max(1, -(-most // len(sampling)))))
    stride = -(-len(seen) * len(sampling) // most)
    return calls(sampling, trajectories, seen, stride)


def _put(network: Network, module: nn.Module, layers: dict[str, LayerQuant], codes: Mapping[str, I8]) -> None:
    """Let the simulated network and `layers` have these codes."""
    for name, value in codes.items():
        layers[name] = dataclasses.replace(layers[name], weight=value)
        original = network.module.get_submodule(name)
        module.get_submodule(name).forward = SimulatedLayer(
            layers[name], Emission.PORTABLE, geometry_of(original)
        )


class SoftLayer:
    """A quantized layer whose weight codes lie between two neighbours; gradients pass its roundings.

    Attributes:
        v: the variable of the rectified sigmoid, in the shape of the weight.
    """

    def __init__(self, layer: LayerQuant, module: Any) -> None:
        self._simulated = SimulatedLayer(layer, Emission.PORTABLE, geometry_of(module))
        self._bits = layer.weight_bits
        weight = torch.from_numpy(smoothed_weight(module, layer.smooth))
        scale = torch.from_numpy(per_channel(layer.weight_scale, weight.ndim).copy())
        ratio = weight / scale
        self._scale, self._floor = scale, ratio.floor()
        share = (ratio - self._floor).clamp(1e-4, 1 - 1e-4)
        self.v = (-torch.log((ZETA - GAMMA) / (share - GAMMA) - 1)).requires_grad_()
        self._bias = None if layer.bias is None else torch.from_numpy(layer.bias.copy())
        conv = layer.kind == "conv"
        self._geometry = (module.stride, module.padding, module.dilation, module.groups) if conv else None
        grid, ends = layer.input, (-torch.inf, torch.inf)
        self._low, self._high = ends if grid is None else (grid.lo * grid.scale, grid.hi * grid.scale)
        smooth = layer.smooth
        self._smooth = None if smooth is None else torch.from_numpy(np.float32(1) / smooth)[:, None, None]

    def share(self) -> Tensor:
        """h(V), from 0 to 1: the way from the code below to the code above."""
        return (torch.sigmoid(self.v) * (ZETA - GAMMA) + GAMMA).clamp(0, 1)

    def codes(self) -> I8:
        """The nearer of both codes."""
        with torch.no_grad():
            codes = (self._floor + (self.share() >= 0.5)).clamp(qmin(self._bits), qmax(self._bits))
        return np.ascontiguousarray(codes.numpy().astype(np.int8))

    def __call__(self, input: Tensor) -> Tensor:
        weight = (self._floor + self.share()).clamp(qmin(self._bits), qmax(self._bits)) * self._scale
        inside = (input if self._smooth is None else input * self._smooth).clamp(self._low, self._high)
        with torch.no_grad():
            rounding = self._simulated.input_values(input) - inside
        values = inside + rounding
        if self._geometry is None:
            return F.linear(values, weight, self._bias)
        return F.conv2d(values, weight, self._bias, *self._geometry)


def _round_block(
    network: Network,
    layers: Mapping[str, LayerQuant],
    block: Block,
    examples: Examples,
    effort: Effort,
    tell: Any,
) -> dict[str, I8]:
    """Codes of a block's layers: those of the optimisation where they lower the error, else those it had."""
    original = network.module.get_submodule(block.name)
    module = copy.deepcopy(original).requires_grad_(False)
    soft: dict[str, SoftLayer] = {}
    for name in block.layers:
        soft[name] = SoftLayer(layers[name], network.module.get_submodule(name))
        _inside(module, block, name).forward = soft[name]
    _optimise(module, list(soft.values()), examples, _generator(effort.seed, block.name), effort, tell)
    codes = {name: layer.codes() for name, layer in soft.items()}
    errors = []
    for rounded in ({name: layers[name].weight for name in codes}, codes):
        for name, value in rounded.items():
            layer = dataclasses.replace(layers[name], weight=value)
            simulated = SimulatedLayer(
                layer, Emission.PORTABLE, geometry_of(network.module.get_submodule(name))
            )
            _inside(module, block, name).forward = simulated
        errors.append(_error(module, examples))
    return codes if errors[1] < errors[0] else {name: layers[name].weight.view(np.int8) for name in codes}


def _inside(module: nn.Module, block: Block, name: str) -> Any:
    """The layer `name` of the network, in a copy of the block."""
    return module.get_submodule(name.removeprefix(block.name).removeprefix("."))


def _generator(seed: int, name: str) -> np.random.Generator:
    return np.random.default_rng([seed, int.from_bytes(hashlib.sha256(name.encode()).digest()[:8], "little")])


def _squared(got: Tensor, target: Tensor, weights: Tensor) -> Tensor:
    """Squared difference, summed over channels, averaged over positions and weighted rows."""
    error = (got - target).square()
    channels = 1 if error.ndim == 4 else -1
    return (error.sum(channels).flatten(1).mean(1) * weights).mean()


def _optimise(
    module: nn.Module,
    soft: list[SoftLayer],
    examples: Examples,
    generator: np.random.Generator,
    effort: Effort,
    tell: Any,
) -> None:
    n, batch = effort.iterations, min(effort.batch, len(examples))
    adam = torch.optim.Adam([layer.v for layer in soft], lr=TRAVEL / n)
    order = np.empty(0, np.int64)
    for iteration in range(n):
        if len(order) < batch:
            order = generator.permutation(len(examples))
        rows, order = order[:batch], order[batch:]
        args, kwargs, target, weights = examples.take(rows)
        loss = _squared(module(*args, **kwargs), target, weights)
        done = (iteration / n - WARM_UP) / (1 - WARM_UP)
        if done >= 0:
            b = LAST_B + (FIRST_B - LAST_B) * (1 - done)
            for layer in soft:
                loss = loss + REGULARISER * (1 - (2 * layer.share() - 1).abs().pow(b)).sum()
        adam.zero_grad()
        loss.backward()  # type: ignore[no-untyped-call]
        adam.step()
        tell(effort.batch)


def _error(module: nn.Module, examples: Examples) -> float:
    """The weighted squared error over all rows."""
    total = 0.0
    with torch.inference_mode():
        for start in range(0, len(examples), CHECK_BATCH):
            rows = np.arange(start, min(start + CHECK_BATCH, len(examples)))
            args, kwargs, target, weights = examples.take(rows)
            total += float(_squared(module(*args, **kwargs), target, weights)) * len(rows)
    return total / len(examples)
