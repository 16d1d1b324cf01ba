"""One node, what is known of its inputs, and what the rules of all operators share."""

from __future__ import annotations

import struct
from collections.abc import Sequence
from typing import Any

from .onnx_file import FLOAT32, Node, Tensor
from .sizes import Batch, Number, Numbers, Shape, Size, Untraceable


class Call:
    """One node and what is known of its inputs.

    Attributes:
        shapes, values, constants: per input; None where there is no such input, or nothing is known.
        outputs: how many there are.
        work: multiplications per element of the result.
        buffer: elements that a kernel may need beside inputs and outputs, per sample.
    """

    def __init__(
        self,
        node: Node,
        shapes: Sequence[Shape | None],
        values: Sequence[Numbers | None],
        constants: Sequence[Tensor | None],
    ) -> None:
        self.node, self.shapes, self.values, self.constants = node, shapes, values, constants
        self.outputs, self.work, self.buffer = len(node.outputs), 1, 0

    def attribute(self, name: str, default: Any) -> Any:
        found = self.node.attributes.get(name)
        return default if found is None else found[1]

    def needed(self, name: str) -> Any:
        if name not in self.node.attributes:
            raise Untraceable(f"has no {name}")
        return self.node.attributes[name][1]

    def has(self, i: int) -> bool:
        return i < len(self.shapes) and self.shapes[i] is not None

    def shape(self, i: int = 0, rank: int | None = None) -> Shape:
        shape = self.shapes[i] if i < len(self.shapes) else None
        if shape is None or (rank is not None and len(shape) < rank):
            raise Untraceable("lacks an input, or has one of too few dimensions")
        return shape

    def numbers(self, i: int) -> list[Number]:
        """An integer tensor of one dimension, or of none, that must be known."""
        value = self.values[i] if i < len(self.values) else None
        if value is None or value.ndim > 1:
            raise Untraceable("takes sizes that are not known beforehand")
        return list(value.reshape(-1))

    def ints(self, i: int) -> list[int]:
        """`numbers`, all of them plain."""
        found = self.numbers(i)
        plain = [number for number in found if isinstance(number, int)]
        if len(plain) < len(found):
            raise Untraceable("takes sizes that are not known beforehand")
        return plain

    def floats(self, i: int) -> list[float]:
        tensor = self.constants[i] if i < len(self.constants) else None
        if tensor is None or tensor.dtype != FLOAT32 or not isinstance(tensor.data, bytes):
            raise Untraceable("takes numbers that are no constants of the file")
        return list(struct.unpack(f"<{len(tensor.data) // 4}f", tensor.data))

    def axis(self, axis: int, rank: int) -> int:
        if not -rank <= axis < rank:
            raise Untraceable("has an axis that its input has not")
        return axis % rank


def plain(size: Size) -> int:
    """A size that is not the batch's."""
    if isinstance(size, Batch):
        raise Untraceable("computes along the batch")
    return size


def known(size: Number) -> Size:
    """A size that is one."""
    if size is None or (isinstance(size, int) and size < 0):
        raise Untraceable("has a size that is negative or not known beforehand")
    return size


def replaced(shape: Shape, axis: int, *sizes: Size) -> Shape:
    """`shape` with other sizes in the place of one."""
    return (*shape[:axis], *sizes, *shape[axis + 1 :])
