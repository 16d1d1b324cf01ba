"""Graphs of allowed operators that ask for absurdly much memory or time."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
from onnx import AttributeProto, NodeProto, TensorProto, helper

from ..base import Draft, NotApplicable
from . import mutation
from .graphs import Model, behind, constant, pick

Made = tuple[list[NodeProto], str]
LARGE = (2**26, 2**28, 2**31, 2**34, 2**40, 2**62)


def ints(model: Model, name: str, *values: int) -> str:
    return constant(model, name, np.array(values, np.int64))


def flat(model: Model) -> list[NodeProto]:
    """ "fuzz.flat": the result as one row."""
    return [helper.make_node("Reshape", ["fuzz.before", ints(model, "fuzz.row", -1)], ["fuzz.flat"])]


def expand(model: Model, n: int) -> Made:
    one = helper.make_node("ReduceMax", ["fuzz.before"], ["fuzz.one"], keepdims=0)
    return [
        one,
        helper.make_node("Expand", ["fuzz.one", ints(model, "fuzz.shape", n)], ["fuzz.big"]),
    ], "fuzz.big"


def tile(model: Model, n: int) -> Made:
    return [
        *flat(model),
        helper.make_node("Tile", ["fuzz.flat", ints(model, "fuzz.times", n)], ["fuzz.big"]),
    ], "fuzz.big"


def constant_of_shape(model: Model, n: int) -> Made:
    return [helper.make_node("ConstantOfShape", [ints(model, "fuzz.shape", n)], ["fuzz.big"])], "fuzz.big"


def of_input(model: Model, n: int) -> Made:
    """As large as a number that only the input gives."""
    step = next(
        (i.name for i in model.graph.input if i.type.tensor_type.elem_type == TensorProto.INT64), None
    )
    if step is None:
        raise NotApplicable("no integer input")
    nodes = [
        helper.make_node("ReduceMax", [step], ["fuzz.top"], keepdims=0),
        helper.make_node("Add", ["fuzz.top", constant(model, "fuzz.n", np.array(n, np.int64))], ["fuzz.sum"]),
        helper.make_node("Unsqueeze", ["fuzz.sum", ints(model, "fuzz.axis", 0)], ["fuzz.shape"]),
        helper.make_node("ConstantOfShape", ["fuzz.shape"], ["fuzz.big"]),
    ]
    return nodes, "fuzz.big"


def spread(model: Model, n: int) -> Made:
    nodes = [
        helper.make_node(
            "Range", [constant(model, f"fuzz.{x}", np.array(x, np.int64)) for x in (0, n, 1)], ["fuzz.range"]
        )
    ]
    return [*nodes, helper.make_node("Cast", ["fuzz.range"], ["fuzz.big"], to=1)], "fuzz.big"


def resize(model: Model, n: int) -> Made:
    scales = constant(
        model, "fuzz.scales", np.array([1, 1, min(n, 2**30) ** 0.5, min(n, 2**30) ** 0.5], np.float32)
    )
    return [helper.make_node("Resize", ["fuzz.before", "", scales], ["fuzz.big"], mode="nearest")], "fuzz.big"


def sizes(model: Model, n: int) -> Made:
    shape = ints(model, "fuzz.sizes", 2, 1, min(n, 2**31), 4)
    return [
        helper.make_node("Resize", ["fuzz.before", "", "", shape], ["fuzz.big"], mode="linear")
    ], "fuzz.big"


def pad(model: Model, n: int) -> Made:
    pads = ints(model, "fuzz.pads", 0, 0, 0, 0, 0, 0, 0, n)
    return [helper.make_node("Pad", ["fuzz.before", pads], ["fuzz.big"])], "fuzz.big"


def doubling(model: Model, n: int) -> Made:
    nodes, name = flat(model), "fuzz.flat"
    for i in range(max(1, n.bit_length() - 2)):
        nodes.append(helper.make_node("Concat", [name, name], [f"fuzz.twice{i}"], axis=0))
        name = f"fuzz.twice{i}"
    return nodes, name


def outer(model: Model, n: int) -> Made:
    """A row times a column."""
    nodes = flat(model)
    nodes.append(
        helper.make_node("Tile", ["fuzz.flat", ints(model, "fuzz.times", min(n, 2**14))], ["fuzz.long"])
    )
    nodes.append(helper.make_node("Reshape", ["fuzz.long", ints(model, "fuzz.r", 1, -1)], ["fuzz.rows"]))
    nodes.append(helper.make_node("Reshape", ["fuzz.long", ints(model, "fuzz.c", -1, 1)], ["fuzz.columns"]))
    kind = "MatMul" if n % 3 else "Mul"
    nodes.append(helper.make_node(kind, ["fuzz.columns", "fuzz.rows"], ["fuzz.big"]))
    return nodes, "fuzz.big"


def einsum(model: Model, n: int) -> Made:
    letters = "abcdefgh"[: 2 + n.bit_length() // 8]
    equation = ",".join(letters) + "->" + letters
    return [
        *flat(model),
        helper.make_node("Einsum", ["fuzz.flat"] * len(letters), ["fuzz.big"], equation=equation),
    ], "fuzz.big"


def one_hot(model: Model, n: int) -> Made:
    nodes = [*flat(model), helper.make_node("Cast", ["fuzz.flat"], ["fuzz.index"], to=7)]
    depth, values = (
        constant(model, "fuzz.depth", np.array(n, np.int64)),
        constant(model, "fuzz.pair", np.zeros(2, np.float32)),
    )
    return [*nodes, helper.make_node("OneHot", ["fuzz.index", depth, values], ["fuzz.big"])], "fuzz.big"


def upsampling(model: Model, n: int) -> Made:
    """A transposed convolution with strides."""
    channels = model.graph.output[0].type.tensor_type.shape.dim[1].dim_value or 1
    weight = constant(model, "fuzz.weight", np.ones((channels, 1, 1, 1), np.float32))
    stride = min(n, 2**20)
    return [
        helper.make_node("ConvTranspose", ["fuzz.before", weight], ["fuzz.big"], strides=[stride, stride])
    ], "fuzz.big"


def window(model: Model, n: int) -> Made:
    """A pool with a window, and pads, of many."""
    size = min(n, 2**16)
    node = helper.make_node(
        "AveragePool",
        ["fuzz.before"],
        ["fuzz.big"],
        kernel_shape=[size, size],
        pads=[size - 1] * 4,
        strides=[1, 1],
    )
    return [node], "fuzz.big"


def gather(model: Model, n: int) -> Made:
    """Each row many times, by an index that is itself spread."""
    nodes = [helper.make_node("ConstantOfShape", [ints(model, "fuzz.shape", n)], ["fuzz.index"],
                              value=helper.make_tensor("v", TensorProto.INT64, [1], [0]))]  # fmt: skip
    return [
        *nodes,
        helper.make_node("Gather", ["fuzz.before", "fuzz.index"], ["fuzz.big"], axis=0),
    ], "fuzz.big"


def depth(model: Model, n: int) -> Made:
    """Very many nodes, one after another."""
    nodes, name = [], "fuzz.before"
    for i in range(min(n, 50_000)):
        nodes.append(helper.make_node("Sin", [name], [f"fuzz.{i}"]))
        name = f"fuzz.{i}"
    return nodes, name


def cumulative(model: Model, n: int) -> Made:
    nodes, name = expand(model, min(n, 2**26))
    nodes.append(
        helper.make_node("TopK", [name, ints(model, "fuzz.k", min(n, 2**26))], ["fuzz.top", "fuzz.where"])
    )
    return nodes, "fuzz.top"


BOMBS: tuple[Callable[[Model, int], Made], ...] = (
    expand, tile, constant_of_shape, of_input, spread, resize, sizes, pad, doubling, outer, einsum, one_hot,
    upsampling, window,
    gather, depth, cumulative,
)  # fmt: skip


@mutation("graph/bomb", weight=6)
def bomb(draft: Draft) -> object:
    """A value of gigabytes in the way of the result, to which it adds nothing."""
    name, model = pick(draft)
    make, n = draft.rng.choice(BOMBS), draft.rng.choice(LARGE)
    nodes, big = make(model, n)
    zero = constant(model, "fuzz.zero", np.array(0, np.float32))
    nodes.append(helper.make_node("ReduceMax", [big], ["fuzz.max"], keepdims=0))
    nodes.append(helper.make_node("Mul", ["fuzz.max", zero], ["fuzz.nothing"]))
    behind(model, nodes, "fuzz.nothing")
    draft.put_model(name, model)
    return name, make.__name__, n


@mutation("graph/growth", weight=3)
def growth(draft: Draft) -> object:
    """An attribute or a constant of a node that is there makes its result grow: pads, scales, shapes."""
    rng = draft.rng
    name = rng.choice(draft.base.graphs)
    model = draft.model(name)
    large = rng.choice([8, 64, 4096, 2**16, 2**31, 2**62])
    kind = rng.choice(["pads", "dilations", "strides", "Reshape", "Resize", "Slice", "Expand", "group"])
    attributes = [
        a for n in model.graph.node for a in n.attribute if a.name == kind and a.type == AttributeProto.INTS
    ]
    if kind in ("pads", "dilations", "strides"):
        if not attributes:
            raise NotApplicable(kind)
        chosen = rng.choice(attributes)
        chosen.ints[:] = [large] * len(chosen.ints)
    elif kind == "group":
        rng.choice([n for n in model.graph.node if n.op_type == "Conv"]).attribute.add(
            name="group", type=AttributeProto.INT, i=large
        )
    else:
        shapes = {n.input[-1] for n in model.graph.node if n.op_type == kind and len(n.input) > 1}
        held = [t for t in model.graph.initializer if t.name in shapes and t.raw_data]
        if not held:
            raise NotApplicable(kind)
        chosen = rng.choice(held)
        array: Any = np.frombuffer(chosen.raw_data, {1: np.float32, 7: np.int64}[chosen.data_type]).copy()
        array[rng.randrange(array.size)] = large
        chosen.raw_data = array.tobytes()
    draft.put_model(name, model)
    return name, kind, large
