"""Shapes of what operators move: joins, cuts, paddings, and what takes its sizes from other tensors."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from fractions import Fraction

import numpy as np

from .call import Call, known, plain, replaced
from .compute import windows
from .onnx_file import Tensor
from .sizes import (
    Batch,
    Number,
    Shape,
    Size,
    Untraceable,
    add,
    broadcast,
    elements,
    multiply,
    reshape,
)

FULL = 2**31 - 1
"""An end of a Slice that means "to the end", at least: torch writes 2**63 - 1."""


def _concat(call: Call) -> Shape:
    first = call.shape(rank=1)
    axis = call.axis(call.needed("axis"), len(first))
    total: Number = 0
    for i in range(len(call.shapes)):
        shape = call.shape(i)
        if len(shape) != len(first) or replaced(shape, axis) != replaced(first, axis):
            raise Untraceable("joins shapes that do not fit")
        total = add(total, shape[axis])
    return replaced(first, axis, known(total))


def split(call: Call) -> list[Shape]:
    """Of every output."""
    shape = call.shape(rank=1)
    axis = call.axis(call.attribute("axis", 0), len(shape))
    size, parts = shape[axis], call.attribute("num_outputs", call.outputs)
    if isinstance(size, Batch):
        # The sampler's update takes its rows apart: as many without as with a condition.
        if size != Batch(1) or parts != 2 or call.outputs != 2 or call.has(1):
            raise Untraceable("splits the batch")
        return [replaced(shape, axis, Batch(Fraction(1, 2)))] * 2
    if call.has(1):
        sizes = call.ints(1)
    elif parts == call.outputs:
        each = -(-size // parts)
        sizes = [min(each, size - i * each) for i in range(parts)]
    else:
        sizes = []
    if sum(sizes) != size or min(sizes, default=-1) < 0 or len(sizes) != call.outputs:
        raise Untraceable("splits into parts that do not fit")
    return [replaced(shape, axis, part) for part in sizes]


def _slice(call: Call) -> Shape:
    shape, starts, ends = call.shape(), call.numbers(1), call.numbers(2)
    axes = call.ints(3) if call.has(3) else list(range(len(starts)))
    steps = call.ints(4) if call.has(4) else [1] * len(starts)
    if not len(starts) == len(ends) == len(axes) == len(steps):
        raise Untraceable("has starts, ends, axes and steps that do not fit")
    for start, end, axis, step in zip(starts, ends, axes, steps, strict=True):
        axis = call.axis(axis, len(shape))
        shape = replaced(shape, axis, _cut(shape[axis], start, end, step))
    return shape


def _cut(size: Size, start: Number, end: Number, step: int) -> Size:
    if size == end:
        end = FULL
    if isinstance(size, Batch) and step == 1 and start == 0 and end == 1:
        return 1
    if isinstance(size, Batch):
        whole = step == 1 and start == 0 and isinstance(end, int) and end >= FULL
        flipped = step == -1 and start == -1 and isinstance(end, int) and end <= -FULL
        if not whole and not flipped:
            raise Untraceable("cuts the batch")
        return size
    if not isinstance(start, int) or not isinstance(end, int) or step == 0:
        raise Untraceable("takes sizes that are not known beforehand")
    return len(range(size)[start:end:step])


def _gather(call: Call) -> Shape:
    shape = call.shape(rank=1)
    return replaced(shape, call.axis(call.attribute("axis", 0), len(shape)), *call.shape(1))


def _gather_nd(call: Call) -> Shape:
    shape, indices, batched = call.shape(rank=1), call.shape(1, rank=1), call.attribute("batch_dims", 0)
    depth = plain(indices[-1])
    fits = 0 <= batched < min(len(shape), len(indices)) and 1 <= depth <= len(shape) - batched
    if not fits or shape[:batched] != indices[:batched]:
        raise Untraceable("has indices that do not fit")
    return (*indices[:-1], *shape[batched + depth :])


def _expand(call: Call) -> Shape:
    return broadcast([call.shape(), tuple(map(known, call.numbers(1)))])


def _tile(call: Call) -> Shape:
    shape, times = call.shape(), call.numbers(1)
    if len(shape) != len(times):
        raise Untraceable("has repeats that do not fit")
    return tuple(known(multiply(size, known(n))) for size, n in zip(shape, times, strict=True))


def _pad(call: Call) -> Shape:
    shape, pads = call.shape(), call.ints(1)
    axes = call.ints(3) if call.has(3) else list(range(len(shape)))
    if len(pads) != 2 * len(axes):
        raise Untraceable("has pads that do not fit")
    for i, axis in enumerate(axes):
        axis = call.axis(axis, len(shape))
        shape = replaced(shape, axis, known(add(shape[axis], pads[i] + pads[i + len(axes)])))
    return shape


def _resize(call: Call) -> Shape:
    shape = call.shape()
    axes = [call.axis(axis, len(shape)) for axis in call.attribute("axes", range(len(shape)))]
    if (
        call.attribute("keep_aspect_ratio_policy", "stretch") != "stretch"
        or call.attribute("coordinate_transformation_mode", "half_pixel") == "tf_crop_and_resize"
    ):
        raise Untraceable("is of a mode that this package does not write")
    given: list[Number]
    if call.has(3):
        given = call.numbers(3)
    else:
        scales = call.floats(2)
        given = [_scaled(shape[axis], scale) for axis, scale in zip(axes, scales, strict=False)]
    if len(given) != len(axes) or len(set(axes)) < len(axes):
        raise Untraceable("has sizes that do not fit")
    for axis, size in zip(axes, given, strict=True):
        if isinstance(shape[axis], Batch) and size != shape[axis]:
            raise Untraceable("resizes the batch")
        shape = replaced(shape, axis, known(size))
    return shape


def _scaled(size: Size, scale: float) -> Size:
    if scale == 1:
        return size
    if not 0 < scale <= FULL:
        raise Untraceable("has a scale out of range")
    return int(np.float32(plain(size)) * np.float32(scale))


def _range(call: Call) -> Shape:
    if call.values[0] is not None:
        (start,), (limit,), (step,) = (call.ints(i) for i in range(3))
        return (len(range(start, limit, step)),) if step else ()
    (first,), (last,), (delta,) = (call.floats(i) for i in range(3))
    count = (last - first) / delta if delta else math.nan
    if not count < FULL:
        raise Untraceable("has a size out of range")
    return (max(0, math.ceil(count)),)


def _squeeze(call: Call) -> Shape:
    shape = call.shape()
    if call.has(1):
        dropped = {call.axis(axis, len(shape)) for axis in call.ints(1)}
    else:
        dropped = {i for i, size in enumerate(shape) if size == 1}
    if any(shape[axis] != 1 for axis in dropped):
        raise Untraceable("squeezes an axis that is not of size 1")
    return tuple(size for i, size in enumerate(shape) if i not in dropped)


def _unsqueeze(call: Call) -> Shape:
    shape, axes = call.shape(), call.ints(1)
    rank = len(shape) + len(axes)
    new = {call.axis(axis, rank) for axis in axes}
    if len(new) < len(axes):
        raise Untraceable("has an axis twice")
    rest = iter(shape)
    return tuple(1 if i in new else next(rest) for i in range(rank))


def _transpose(call: Call) -> Shape:
    shape = call.shape()
    perm = call.attribute("perm", tuple(range(len(shape)))[::-1])
    if sorted(perm) != list(range(len(shape))):
        raise Untraceable("has a perm that is none")
    return tuple(shape[axis] for axis in perm)


def _flatten(call: Call) -> Shape:
    shape, axis = call.shape(), call.attribute("axis", 1)
    if not -len(shape) <= axis <= len(shape):
        raise Untraceable("has an axis that its input has not")
    axis += len(shape) if axis < 0 else 0
    return elements(shape[:axis]), elements(shape[axis:])


def _blocks(call: Call) -> Shape:
    n, channels, height, width = call.shape(rank=4)[:4]
    block = call.needed("blocksize")
    channels, height, width = plain(channels), plain(height), plain(width)
    if not 1 <= block <= FULL or len(call.shape()) != 4:
        raise Untraceable("has a blocksize that does not fit")
    if call.node.op == "DepthToSpace":
        if channels % block**2:
            raise Untraceable("has a blocksize that does not fit")
        return n, channels // block**2, height * block, width * block
    if height % block or width % block:
        raise Untraceable("has a blocksize that does not fit")
    return n, channels * block**2, height // block, width // block


def _top_k(call: Call) -> Shape:
    shape, k = call.shape(rank=1), call.ints(1)
    axis = call.axis(call.attribute("axis", -1), len(shape))
    if len(k) != 1 or not 0 <= k[0] <= plain(shape[axis]):
        raise Untraceable("has a k that does not fit")
    return replaced(shape, axis, k[0])


def _one_hot(call: Call) -> Shape:
    shape, depth = call.shape(), call.ints(1)
    axis = call.axis(call.attribute("axis", -1), len(shape) + 1)
    if len(depth) != 1:
        raise Untraceable("has a depth that does not fit")
    return (*shape[:axis], known(depth[0]), *shape[axis:])


def _col2im(call: Call) -> Shape:
    shape, image, block = call.shape(rank=3), call.ints(1), call.ints(2)
    size = math.prod(block)
    # ONNX Runtime reads as many columns as the image has windows, however many there are.
    columns = [
        (length + pad - ((width - 1) * dilation + 1)) // stride + 1
        for length, width, stride, dilation, pad in windows(call, block, tuple(map(known, image)))
    ]
    fits = size >= 1 and len(shape) == 3 and plain(shape[1]) % size == 0 and min(columns, default=0) > 0
    if not fits or shape[2] != math.prod(columns):
        raise Untraceable("has blocks that do not fit")
    return (shape[0], plain(shape[1]) // size, *image)


def _grid_sample(call: Call) -> Shape:
    shape, grid = call.shape(rank=3), call.shape(1, rank=3)
    if len(shape) != len(grid) or shape[0] != grid[0] or grid[-1] != len(shape) - 2:
        raise Untraceable("has a grid that does not fit")
    return (*shape[:2], *grid[1:-1])


def _shape(call: Call) -> Shape:
    return (len(shape_slice(call)),)


def shape_slice(call: Call) -> Shape:
    """What Shape returns."""
    return call.shape()[call.attribute("start", 0) : call.attribute("end", None)]


def _constant(call: Call) -> Shape:
    if len(call.node.attributes) != 1:
        raise Untraceable("has not one value")
    ((_, value),) = call.node.attributes.values()
    if isinstance(value, Tensor):
        return value.dims
    return (len(value),) if isinstance(value, tuple) else ()


def _constant_of_shape(call: Call) -> Shape:
    value = call.attribute("value", None)
    if isinstance(value, Tensor) and value.size != 1:
        raise Untraceable("fills with more than one value")
    return tuple(map(known, call.numbers(0)))


def _reshape(call: Call) -> Shape:
    return reshape(call.shape(), call.numbers(1), bool(call.attribute("allowzero", 0)))


RULES: Mapping[str, Callable[[Call], Shape]] = {
    "Col2Im": _col2im,
    "Concat": _concat,
    "Constant": _constant,
    "ConstantOfShape": _constant_of_shape,
    "DepthToSpace": _blocks,
    "Expand": _expand,
    "Flatten": _flatten,
    "Gather": _gather,
    "GatherElements": lambda call: call.shape(1),
    "GatherND": _gather_nd,
    "GridSample": _grid_sample,
    "OneHot": _one_hot,
    "Pad": _pad,
    "Range": _range,
    "Reshape": _reshape,
    "Resize": _resize,
    "Shape": _shape,
    "Size": lambda call: (),
    "Slice": _slice,
    "SpaceToDepth": _blocks,
    "Squeeze": _squeeze,
    "Tile": _tile,
    "TopK": _top_k,
    "Transpose": _transpose,
    "Unsqueeze": _unsqueeze,
}
