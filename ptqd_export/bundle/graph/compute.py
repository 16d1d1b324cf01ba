"""Shapes of what operators compute: reductions, windows, products."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence

from .call import Call, known, plain
from .operators import ARG, ATTENTION, GLOBAL, POOL, REDUCE
from .sizes import Shape, Size, Untraceable, broadcast, per_sample


def _reduce(call: Call) -> Shape:
    shape = call.shape()
    if call.node.op in ARG:
        axes = [call.attribute("axis", 0)]
    elif call.has(1):
        axes = call.ints(1)
    else:
        axes = []
    if not axes:
        if call.attribute("noop_with_empty_axes", 0):
            return shape
        axes = list(range(len(shape)))
    dropped = {call.axis(axis, len(shape)) for axis in axes}
    if call.attribute("keepdims", 1):
        return tuple(1 if i in dropped else size for i, size in enumerate(shape))
    return tuple(size for i, size in enumerate(shape) if i not in dropped)


def windows(call: Call, kernel: Sequence[int], spatial: Shape) -> list[tuple[int, int, int, int, int]]:
    """(size, kernel, stride, dilation, pads of both ends) per dimension."""
    n = len(spatial)
    strides, dilations = call.attribute("strides", (1,) * n), call.attribute("dilations", (1,) * n)
    pads = call.attribute("pads", (0,) * 2 * n)
    explicit = call.attribute("auto_pad", "NOTSET") == "NOTSET"
    if not explicit or not len(kernel) == len(strides) == len(dilations) == n or len(pads) != 2 * n:
        raise Untraceable("has a window of another form than this package writes")
    if min((*kernel, *strides, *dilations), default=1) < 1 or min(pads, default=0) < 0:
        raise Untraceable("has a window with sizes out of range")
    return [(plain(spatial[i]), kernel[i], strides[i], dilations[i], pads[i] + pads[i + n]) for i in range(n)]


def _pool(call: Call) -> Shape:
    shape, kernel = call.shape(rank=3), call.needed("kernel_shape")
    result: list[Size] = []
    for size, width, stride, dilation, pad in windows(call, kernel, shape[2:]):
        room = size + pad - ((width - 1) * dilation + 1)
        count = room // stride + 1
        if call.attribute("ceil_mode", 0):
            count = -(-room // stride) + 1
            # The last window must begin inside the input or its left padding.
            count -= (count - 1) * stride >= size + call.attribute("pads", (0,))[len(result)]
        result.append(count)
    call.work = math.prod(kernel)
    return tuple(known(size) for size in (*shape[:2], *result))


def _conv(call: Call) -> Shape:
    shape, weight = call.shape(rank=3), tuple(map(plain, call.shape(1, rank=3)))
    groups, kernel = call.attribute("group", 1), weight[2:]
    transposed = call.node.op == "ConvTranspose"
    if call.attribute("kernel_shape", kernel) != kernel or groups < 1:
        raise Untraceable("has another kernel_shape than its weight")
    if len(shape) != len(weight) or shape[1] != weight[0 if transposed else 1] * (
        1 if transposed else groups
    ):
        raise Untraceable("has a weight that does not fit its input")
    found = windows(call, kernel, shape[2:])
    _bias(call, weight[1] * groups if transposed else weight[0])
    call.work = math.prod(weight[1:])
    if transposed:
        more = call.attribute("output_padding", (0,) * len(kernel))
        if len(more) != len(kernel) or min(more, default=0) < 0:
            raise Untraceable("has an output_padding that does not fit")
        sizes = [
            (size - 1) * stride + (width - 1) * dilation + 1 - pad + extra
            for (size, width, stride, dilation, pad), extra in zip(found, more, strict=True)
        ]
        call.buffer = per_sample((shape[0], *shape[2:])) * math.prod(weight[1:])
        return tuple(known(size) for size in (shape[0], weight[1] * groups, *sizes))
    sizes = [
        (size + pad - ((width - 1) * dilation + 1)) // stride + 1
        for size, width, stride, dilation, pad in found
    ]
    call.buffer = per_sample((shape[0], *sizes)) * math.prod(weight[1:])
    return tuple(known(size) for size in (shape[0], weight[0], *sizes))


def _bias(call: Call, channels: int) -> None:
    # ONNX Runtime reads as many numbers as there are channels, however many there are.
    if call.has(2) and call.shape(2) != (channels,):
        raise Untraceable("has a bias that does not fit")


def _matmul(call: Call) -> Shape:
    a, b = call.shape(0, rank=1), call.shape(1, rank=1)
    left, right = (1, *a) if len(a) == 1 else a, (*b, 1) if len(b) == 1 else b
    if left[-1] != right[-2]:
        raise Untraceable("multiplies matrices that do not fit")
    call.work = plain(left[-1])
    shape = broadcast([left[:-2], right[:-2]]) if len(left) > 2 or len(right) > 2 else ()
    return (*shape, *(left[-2:-1] if len(a) > 1 else ()), *(right[-1:] if len(b) > 1 else ()))


def _gemm(call: Call) -> Shape:
    a, b = call.shape(0, rank=2), call.shape(1, rank=2)
    a, b = (a[::-1] if call.attribute("transA", 0) else a), (b[::-1] if call.attribute("transB", 0) else b)
    if len(a) != 2 or len(b) != 2 or a[1] != b[0]:
        raise Untraceable("multiplies matrices that do not fit")
    call.work = plain(a[1])
    return a[0], b[1]


def _einsum(call: Call) -> Shape:
    left, arrow, right = call.needed("equation").replace(" ", "").partition("->")
    terms = left.split(",")
    if not arrow or len(terms) != len(call.shapes) or not all(t.isalpha() for t in (*terms, right or "a")):
        raise Untraceable("has an equation of another form than a,b->c")
    known: dict[str, Size] = {}
    for i, term in enumerate(terms):
        shape = call.shape(i)
        if len(shape) != len(term) or any(
            known.setdefault(c, s) != s for c, s in zip(term, shape, strict=True)
        ):
            raise Untraceable("has an equation that does not fit its inputs")
    if not set(right) <= known.keys():
        raise Untraceable("has an equation that does not fit its inputs")
    call.work = per_sample(tuple(size for letter, size in known.items() if letter not in right))
    if len(terms) > 2:
        call.buffer = per_sample(tuple(known.values()))
    return tuple(known[letter] for letter in right)


def _global(call: Call) -> Shape:
    shape = call.shape(rank=3)
    return (*shape[:2], *[1] * (len(shape) - 2))


def _per_channel(call: Call) -> Shape:
    """Normalisations with parameters per channel."""
    shape = call.shape(rank=2)
    if any(call.shape(i) != (shape[1],) for i in range(1, len(call.shapes))):
        raise Untraceable("has parameters that do not fit")
    return shape


def _within(call: Call) -> Shape:
    """The further inputs are spread over the first."""
    shape = call.shape()
    if any(broadcast([shape, call.shape(i)]) != shape for i in range(1, len(call.shapes)) if call.has(i)):
        raise Untraceable("has parameters that do not fit")
    return shape


def _quantization(call: Call) -> Shape:
    shape, scale = call.shape(), call.shape(1)
    if scale not in ((), (1,)):
        axis = call.axis(call.attribute("axis", 1), len(shape))
        if scale != (shape[axis],):
            raise Untraceable("has scales that do not fit")
    if call.has(2) and call.shape(2) != scale:
        raise Untraceable("has a zero point that does not fit")
    return shape


def _local_response(call: Call) -> Shape:
    shape, size = call.shape(rank=3), call.needed("size")
    channels = plain(shape[1])
    if not 1 <= size <= 2 * channels + 1:
        raise Untraceable("has a size that does not fit")
    call.work = size
    return shape


def _attention(call: Call) -> Shape:
    if len(call.shapes) != 3:
        raise Untraceable("has other inputs than query, key and value")
    query, key, value = (call.shape(i, rank=3) for i in range(3))
    heads = call.needed("num_heads")
    fits = query[0] == key[0] == value[0] and query[2] == key[2] and key[1] == value[1]
    if not fits or heads < 1 or plain(query[2]) % heads or plain(value[2]) % heads:
        raise Untraceable("has query, key and value that do not fit")
    call.work = 2 * plain(key[1])
    call.buffer = per_sample((query[0], heads, query[1], key[1]))
    return *query[:2], value[2]


RULES: Mapping[str, Callable[[Call], Shape]] = {
    **dict.fromkeys((*REDUCE, *ARG), _reduce),
    **dict.fromkeys(GLOBAL, _global),
    **dict.fromkeys(POOL, _pool),
    **dict.fromkeys(("BatchNormalization", "GroupNormalization", "InstanceNormalization"), _per_channel),
    **dict.fromkeys(("Clip", "LayerNormalization", "PRelu"), _within),
    **dict.fromkeys(("DequantizeLinear", "QuantizeLinear"), _quantization),
    "Conv": _conv,
    "ConvTranspose": _conv,
    "Einsum": _einsum,
    "Gemm": _gemm,
    "LRN": _local_response,
    "MatMul": _matmul,
    ATTENTION: _attention,
}
