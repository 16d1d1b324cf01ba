"""How much a graph may take, by the model that it belongs to: far above any network known, far below harm."""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass

from ...core.sampling import Sampling
from .onnx_file import Tensor

SMALLEST, LARGEST = 1 << 22, 1 << 31
"""Elements of a value, per sample, that any model may have, and that none may have."""
CHANNELS = 8
"""Elements per position (channels, times the window of a convolution), by the root of the largest weight's
size: a square of so many has 64 times its size."""
HEADS = 16
"""Of attention over all positions, whose scores are the largest value of most networks."""
AT_ONCE = 3
"""How many of the largest values may be needed at one time."""
REUSE = 1 << 14
"""Multiplications, in all, per element of the largest value."""


@dataclass(frozen=True)
class Limits:
    """What a graph may make a runtime take.

    Attributes:
        value: elements of a value, per sample.
        live: elements of all values that are needed at one time, per sample.
        work: multiplications, per sample.
    """

    value: int
    live: int
    work: int


def network_limits(sampling: Sampling, constants: Iterable[Tensor]) -> Limits:
    """Of a network's graph: by its positions (pixels, or tokens of a condition) and by the weights it has."""
    model = sampling.model
    tokens = (math.prod(spec.shape[:-1]) for spec in model.inputs)
    return part_limits(max(math.prod(model.sample_shape[1:]), *tokens, 1), constants)


def part_limits(positions: int, constants: Iterable[Tensor]) -> Limits:
    """Of any graph, by the most positions of a value that goes in or comes out, and by the weights it has."""
    sizes = [tensor.size for tensor in constants]
    most = max(sizes, default=0)
    channels = CHANNELS * math.isqrt(most)
    value = min(LARGEST, max(SMALLEST, channels * positions, HEADS * positions**2))
    return Limits(max(value, most), AT_ONCE * value + 4 * sum(sizes), REUSE * value)


def update_limits(sampling: Sampling) -> Limits:
    """Of the sampler's update, in which nothing is larger than the sample and the tables."""
    value = max(math.prod(sampling.model.sample_shape), len(sampling), 8)
    states = 1 + sampling.schedule.kept
    return Limits(value, 16 * states * value, 64 * states * value)
