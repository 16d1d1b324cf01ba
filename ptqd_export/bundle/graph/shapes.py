"""The shape of every value of a graph, from the shapes of its inputs alone, so that its size is known before
a runtime allocates it. Nothing that the file says of shapes is believed: it has to agree.
"""

from __future__ import annotations

import struct
from collections.abc import Callable, Mapping

import numpy as np

from . import compute, layout
from .call import Call
from .limits import Limits
from .onnx_file import INT64, MAX_RANK, Dims, Node, OnnxGraph, Tensor
from .operators import BROADCAST, SAME
from .sizes import (
    ARITHMETIC,
    MAX_KNOWN,
    Batch,
    Number,
    Numbers,
    Shape,
    Untraceable,
    broadcast,
    numbers,
    per_sample,
)

RULES: Mapping[str, Callable[[Call], Shape]] = {
    **dict.fromkeys(SAME, lambda call: call.shape()),
    **dict.fromkeys(BROADCAST, lambda call: broadcast([call.shape(i) for i in range(len(call.shapes))])),
    **compute.RULES,
    **layout.RULES,
}
TWO_RESULTS = {"MaxPool", "TopK"}
"""What they find, and where; both of one shape."""


def check_shapes(
    graph: OnnxGraph, inputs: Mapping[str, Shape], limits: Limits
) -> tuple[dict[str, Shape], int]:
    """The shape of every value, and how many elements are needed at one time, per sample, beside constants.

    Args:
        inputs: shapes of the graph's inputs.
    Raises:
        Untraceable: a value that cannot be followed, is larger than allowed, or is of another shape than the
            file says; the text begins with the operator.
    """
    walk = _Walk(graph, inputs, limits)
    for i, node in enumerate(graph.nodes):
        try:
            walk.node(i, node)
        except Untraceable as error:
            raise Untraceable(f"{node.op} {error}") from None
        except (ArithmeticError, IndexError, TypeError, ValueError) as error:
            # An operator's own rules are broken in a way that its shape rule does not name.
            raise Untraceable(f"{node.op} has inputs or attributes that do not fit") from error
    return walk.shapes, walk.most


class _Walk:
    def __init__(self, graph: OnnxGraph, inputs: Mapping[str, Shape], limits: Limits) -> None:
        self.graph, self.limits = graph, limits
        self.shapes: dict[str, Shape] = {**inputs, **{name: t.dims for name, t in graph.initializers.items()}}
        self.values: dict[str, Numbers] = {}
        self.constants = dict(graph.initializers)
        for name, tensor in graph.initializers.items():
            self.remember(name, tensor)
        last = {name: i for i, node in enumerate(graph.nodes) for name in node.inputs}
        for value in graph.outputs:
            last.pop(value.name, None)
        self.ending: dict[int, list[str]] = {}
        for name, i in last.items():
            self.ending.setdefault(i, []).append(name)
        self.outputs = {value.name: value for value in graph.outputs}
        # Results of constants alone are computed when the graph is loaded, and kept.
        self.fixed = set(graph.initializers)
        self.held: dict[str, int] = {}
        self.live = self.most = self.kept = self.work = 0

    def remember(self, name: str, tensor: Tensor) -> None:
        if tensor.dtype == INT64 and isinstance(tensor.data, bytes) and tensor.size <= MAX_KNOWN:
            self.values[name] = numbers(struct.unpack(f"<{tensor.size}q", tensor.data), tensor.dims)

    def node(self, i: int, node: Node) -> None:
        shapes = self.shapes
        for name in node.inputs:
            if name and name not in shapes:
                raise Untraceable("reads a value that no earlier node makes")
        call = Call(
            node,
            [shapes.get(name) for name in node.inputs],
            [self.values.get(name) for name in node.inputs],
            [self.constants.get(name) for name in node.inputs],
        )
        if node.op == "Split":
            results = layout.split(call)
        else:
            results = [RULES[node.op](call)] * (2 if node.op in TWO_RESULTS else 1)
        if not 1 <= len(node.outputs) <= len(results):
            raise Untraceable("has more results than it can have")
        fixed = all(name in self.fixed for name in node.inputs if name) and bool(node.inputs)
        for name, shape in zip(node.outputs, results, strict=False):
            self.result(name, shape, fixed)
        size = per_sample(results[0])
        self.work += size * call.work
        if self.work > self.limits.work:
            raise Untraceable(f"brings the graph's work to more than {self.limits.work} products per sample")
        self.most = max(self.most, self.live - self.kept + call.buffer)
        if self.live + call.buffer > self.limits.live:
            raise Untraceable(f"needs more than {self.limits.live} elements of memory per sample")
        value = _value(call, results[0])
        if value is not None and node.outputs[0]:
            self.values[node.outputs[0]] = value
        for name in self.ending.pop(i, ()):
            self.live -= self.held.pop(name, 0)

    def result(self, name: str, shape: Shape, fixed: bool) -> None:
        size = per_sample(shape)
        if size > self.limits.value:
            raise Untraceable(
                f"makes a value of {size} elements per sample, expected {self.limits.value} at most"
            )
        if len(shape) > MAX_RANK:
            raise Untraceable(f"makes a value of more than {MAX_RANK} dimensions")
        self.live += size
        if not name:
            return
        if name in self.shapes:
            raise Untraceable("makes a value that is there already")
        self.shapes[name] = shape
        if fixed:
            self.fixed.add(name)
            self.kept += size
        else:
            self.held[name] = size
        said, output = self.graph.infos.get(name), self.outputs.get(name)
        if (said and not agrees(said[1], shape)) or (output and not agrees(output.dims, shape)):
            raise Untraceable("makes a value of another shape than the file says")


def agrees(dims: Dims, shape: Shape) -> bool:
    """Whether a value can be of the shape that the file gives, where it gives a number."""
    return len(dims) == len(shape) and all(
        dim == size for dim, size in zip(dims, shape, strict=True) if isinstance(dim, int)
    )


def _value(call: Call, shape: Shape) -> Numbers | None:
    """What is known of the integers that a node yields; None where nothing is, or they are no sizes."""
    node = call.node
    if any(isinstance(size, Batch) for size in shape) or per_sample(shape) > MAX_KNOWN:
        return None
    if node.op == "Shape":
        return numbers(layout.shape_slice(call), (-1,))
    if node.op == "Constant":
        return _constant(call)
    inputs = call.values
    if not inputs or inputs[0] is None:
        return None
    first = inputs[0]
    plain = tuple(size for size in shape if isinstance(size, int))
    if node.op in ARITHMETIC and all(value is not None for value in inputs):
        result = np.frompyfunc(ARITHMETIC[node.op], len(inputs), 1)(*inputs)
        return numbers([result], ()) if plain == () else np.asarray(result, object)
    if node.op == "Concat" and all(value is not None for value in inputs):
        return np.concatenate([value for value in inputs if value is not None], call.needed("axis"))
    if node.op == "Gather" and len(inputs) > 1 and inputs[1] is not None:
        taken = np.take(first, inputs[1].astype(np.int64), axis=call.attribute("axis", 0))
        return numbers([taken], ()) if plain == () else np.asarray(taken, object)
    if node.op in ("Identity", "Reshape", "Squeeze", "Unsqueeze") or (
        node.op == "Cast" and call.needed("to") == INT64
    ):
        return first.reshape(plain)
    if node.op == "Slice" and first.ndim == 1 and len(call.ints(1)) == 1:
        step = call.ints(4)[0] if call.has(4) else 1
        return first[call.ints(1)[0] : call.ints(2)[0] : step]
    if node.op == "ConstantOfShape":
        value = call.attribute("value", None)
        if isinstance(value, Tensor) and value.dtype == INT64 and isinstance(value.data, bytes):
            filled: Number = struct.unpack("<q", value.data)[0]
            return numbers([filled] * per_sample(shape), plain)
    if node.op == "Expand":
        return np.broadcast_to(first, plain)
    return None


def _constant(call: Call) -> Numbers | None:
    field, value = next(iter(call.node.attributes.values()))
    if field == "i":
        return numbers([value], ())
    if field == "ints" and isinstance(value, tuple):
        return numbers(value, (len(value),))
    if isinstance(value, Tensor) and value.dtype == INT64 and isinstance(value.data, bytes):
        return numbers(struct.unpack(f"<{value.size}q", value.data), value.dims)
    return None
