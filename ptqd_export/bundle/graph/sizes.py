"""Sizes that may depend on the batch, and small integer tensors made of them, such as the target of a
Reshape.

A size is a whole number, or a multiple of the batch; whatever else a graph could make of the batch (its
square, its remainder, a choice by it) is unknown, None, and cannot be the size of anything.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from fractions import Fraction
from typing import Any

import numpy as np
import numpy.typing as npt

MAX_KNOWN = 1024
"""Elements of the largest integer tensor whose content is followed."""
INT64_MAX = 2**63 - 1


class Untraceable(ValueError):
    """A shape that cannot be followed, or that no graph may have; the text says why, with nothing of the
    file."""


@dataclass(frozen=True, slots=True)
class Batch:
    """`count` times the batch; a half in the sampler's update, which halves its rows."""

    count: int | Fraction


Size = int | Batch
Shape = tuple[Size, ...]
Number = int | Batch | None
Numbers = npt.NDArray[np.object_]
"""Of `Number`: what is known of an integer tensor."""


def numbers(values: Sequence[Any], shape: tuple[int, ...]) -> Numbers:
    result = np.empty(len(values), object)
    for i, value in enumerate(values):
        result[i] = value
    return result.reshape(shape)


def elements(shape: Shape) -> Size:
    """Product of the sizes.

    Raises:
        Untraceable: the batch counts twice.
    """
    total: int | Fraction = 1
    batches = 0
    for size in shape:
        if isinstance(size, Batch):
            batches += 1
            total *= size.count
        else:
            total *= size
    if batches > 1:
        raise Untraceable("grows with the square of the batch")
    return Batch(total) if batches else int(total)


def per_sample(shape: Shape) -> int:
    """Elements for a batch of one."""
    total = elements(shape)
    return math.ceil(total.count) if isinstance(total, Batch) else total


def add(a: Number, b: Number) -> Number:
    if isinstance(a, int) and isinstance(b, int):
        return _int64(a + b)
    if a == 0 or b == 0:
        return b if a == 0 else a
    if isinstance(a, Batch) and isinstance(b, Batch):
        return _multiple(a.count + b.count)
    return None


def subtract(a: Number, b: Number) -> Number:
    if isinstance(a, int) and isinstance(b, int):
        return _int64(a - b)
    return a if b == 0 else 0 if a is not None and a == b else None


def multiply(a: Number, b: Number) -> Number:
    if isinstance(a, int) and isinstance(b, int):
        return _int64(a * b)
    if isinstance(a, int):
        a, b = b, a
    if not isinstance(a, Batch) or not isinstance(b, int) or b < 0:
        return None
    return _multiple(a.count * b) if b else 0


def divide(a: Number, b: Number) -> Number:
    """As ONNX divides integers, towards zero; of the batch only what leaves no remainder."""
    if isinstance(a, int) and isinstance(b, int):
        return None if b == 0 else abs(a) // abs(b) * (1 if (a < 0) == (b < 0) else -1)
    if isinstance(a, Batch) and isinstance(b, int) and b > 0 and a.count % b == 0:
        return _multiple(Fraction(a.count) / b)
    if isinstance(a, Batch) and isinstance(b, Batch) and a.count % b.count == 0:
        return int(a.count / b.count)
    return None


def equal(a: Number, b: Number) -> Number:
    """1 or 0; a multiple of the batch is never negative, so that torch's test for -1 can be answered."""
    if a is None or b is None:
        return None
    if isinstance(a, Batch) == isinstance(b, Batch):
        return int(a == b)
    other = b if isinstance(a, Batch) else a
    return 0 if isinstance(other, int) and other <= 0 else None


def where(condition: Number, a: Number, b: Number) -> Number:
    return None if not isinstance(condition, int) else a if condition else b


ARITHMETIC: dict[str, Callable[..., Number]] = {
    "Add": add,
    "Sub": subtract,
    "Mul": multiply,
    "Div": divide,
    "Equal": equal,
    "Where": where,
}


def broadcast(shapes: Sequence[Shape]) -> Shape:
    """The common shape.

    Raises:
        Untraceable: there is none.
    """
    rank = max(map(len, shapes))
    result: list[Size] = [1] * rank
    for shape in shapes:
        for i, size in enumerate(shape, rank - len(shape)):
            if size == 1 or size == result[i]:
                continue
            if result[i] != 1:
                raise Untraceable("takes inputs whose shapes do not go together")
            result[i] = size
    return tuple(result)


def reshape(shape: Shape, target: Sequence[Number], allow_zero: bool) -> Shape:
    """The shape that Reshape gives.

    Raises:
        Untraceable: a size that is not known, or another number of elements.
    """
    result: list[Size | None] = []
    for i, size in enumerate(target):
        if size is None or (isinstance(size, int) and size < -1):
            raise Untraceable("has a target shape that is not known beforehand")
        if size == 0 and not allow_zero:
            if i >= len(shape):
                raise Untraceable("has a target shape that does not fit")
            size = shape[i]
        result.append(None if size == -1 else size)
    total, open_ends = elements(shape), result.count(None)
    known = elements(tuple(size for size in result if size is not None))
    if open_ends > 1 or (open_ends == 0 and known != total):
        raise Untraceable("has a target shape that does not fit")
    if open_ends:
        rest = 0 if total == 0 else divide(total, known)
        if rest is None or multiply(rest, known) != total:
            raise Untraceable("has a target shape that does not fit")
        result[result.index(None)] = rest
    return tuple(size for size in result if size is not None)


def _multiple(count: int | Fraction) -> Batch | None:
    """Of the batch, a whole number of times where it is one."""
    whole = int(count)
    return None if whole > INT64_MAX else Batch(whole if whole == count else count)


def _int64(value: int) -> int | None:
    """None where a runtime would go on with another number."""
    return value if -INT64_MAX <= value <= INT64_MAX else None
