"""How long a network takes on this machine: its costliest layers, timed on random numbers for a second."""

from __future__ import annotations

import math
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F

from .network import Network
from .observe import Outline

SECONDS = 1.0
"""Most time that is spent, but for the last layer."""
ROWS = 2
"""Samples of a timed call."""
Shape = tuple[str, tuple[int, ...], tuple[int, ...], tuple[Any, ...]]


@dataclass(frozen=True)
class Speed:
    """Times of a network in float32 on this machine.

    Attributes:
        evaluation: seconds of one evaluation for one sample.
        mac: seconds of a multiply-accumulate in its layers.
    """

    evaluation: float
    mac: float


def measure_speed(network: Network, counted: Outline) -> Speed:
    """The sum of a network's layers, timed one by one, those with the most multiply-accumulates first.

    Layers for which no time is left, and products of attention, count as the timed ones do. What lies between
    layers counts as a normalisation and an activation of every layer's input.
    """
    macs, elements = Counter[Shape](), 0
    for name, layer in counted.layers.items():
        module: Any = network.module.get_submodule(name)
        elements += math.prod(counted.inputs[name])
        macs[_shape(layer.kind, module, counted.inputs[name])] += layer.macs
    timed, seconds, begin = 0, 0.0, time.perf_counter()
    with torch.inference_mode():
        between = _time(_between) / ROWS * elements / _BETWEEN
        for shape, total in macs.most_common():
            if timed and time.perf_counter() - begin > SECONDS:
                break
            call, done = _layer(shape)
            seconds += _time(call) * total / done
            timed += total
    mac = seconds / max(timed, 1)
    return Speed(mac * (sum(macs.values()) + counted.product_macs) + between, mac)


def _shape(kind: str, module: Any, taken: tuple[int, ...]) -> Shape:
    """What decides the time of a layer's call."""
    if kind == "linear":
        return kind, tuple(module.weight.shape), taken[1:], ()
    padding = module.padding if isinstance(module.padding, str) else tuple(module.padding)
    rest = module.stride, padding, module.dilation, module.groups
    return kind, tuple(module.weight.shape), taken[1:], rest


def _layer(shape: Shape) -> tuple[Callable[[], object], int]:
    """A call of such a layer, and its multiply-accumulates."""
    kind, weight_shape, taken, rest = shape
    x, weight = torch.randn(ROWS, *taken), torch.randn(weight_shape)
    k = math.prod(weight_shape[1:])
    if kind == "linear":
        return lambda: F.linear(x, weight), x.numel() // k * weight.numel()
    out = F.conv2d(x[:1], weight, None, *rest)
    return lambda: F.conv2d(x, weight, None, *rest), ROWS * out.numel() * k


_BETWEEN = 64 * 32 * 32
"""Elements of a sample in `_between`."""


def _between() -> object:
    x = torch.ones(ROWS, 64, 32, 32)
    return F.silu(F.group_norm(x, 8)) + x


def _time(call: Callable[[], object]) -> float:
    """Seconds of a call: the mean, but for the first, which also allocates; a long call is made once.

    Of the time on the clock and that on the processors the shorter counts: other programs lengthen the first,
    threads the second.
    """
    seconds: list[float] = []
    for _ in range(4):
        begin, busy = time.perf_counter(), time.process_time()
        call()
        seconds.append(min(time.perf_counter() - begin, time.process_time() - busy))
        if sum(seconds) > SECONDS / 4:
            break
    counted = seconds[1:] or seconds
    return sum(counted) / len(counted)
