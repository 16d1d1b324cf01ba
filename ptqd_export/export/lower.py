"""Rewrites for the runtimes of an emission: they change how a graph is computed, not what it computes.

The half emission is rewritten by `halve`. The rewrites below are for ONNX Runtime's CPU kernels.

GroupNorm. ONNX Runtime has no CPU kernel for GroupNormalization and inlines it into dozens of nodes. With
x (B, C, H, W) and G groups:

    GroupNormalization(x) = gamma * N(x) + beta
    N = reshape^-1 . InstanceNormalization(1, 0) . reshape to (B, G, C H W / G)

One BatchNormalization with mean 0, variance 1 and epsilon 0 applies gamma and beta: one pass where Mul and
Add take two (5 % of a small w8a8 UNet, with the same bits). LayerNormalization with a broadcast scale does
everything in one node, but is slower.

Attention. Softmax(Q K^T s) V over heads becomes one com.microsoft.MultiHeadAttention, which takes Q, K, V as
(B, S, heads * d) and splits the heads itself. The pattern, with s = a b:

    Q, K, V -> Reshape (B, S, h, d) -> Transpose (B, h, S, d)
    MatMul(Q a, K^T b) -> Softmax -> MatMul V -> Transpose -> Reshape

It is matched only inside what torch exported as scaled_dot_product_attention without a mask; anything else
is left alone.
"""

from __future__ import annotations

import math

import numpy as np
import onnx_ir as ir

from ..core.backend import Emission
from ..core.precision import FP32, Precision
from .dialect import ATTENTION
from .graph import Builder, producer, prune, static_dims, take_over
from .half import halve

FLOAT = ir.DataType.FLOAT
MICROSOFT = "com.microsoft"
HEADS_FIRST = [0, 2, 1, 3]


def lower(model: ir.Model, emission: Emission, precision: Precision) -> ir.Model:
    """A new model for the runtimes of an emission, equal to the given one up to float rounding.

    A PORTABLE graph suits every runtime and stays as it is. Call this before `fold`. fp32 computes in float32
    in every emission; every other precision, including fp16, computes in float16 in HALF only.

    Raises:
        GraphError: the graph holds an operator that cannot be converted to float16.
    """
    if emission is Emission.HALF and precision != FP32:
        return halve(model)
    copy = model.clone()
    if emission is not Emission.ORT_CPU:
        return copy
    build = Builder(copy.graph)
    for node in list(copy.graph):
        if node.op_type == "GroupNormalization" and node.domain == "":
            _group_norm(build, node)
        elif node.op_type == "Softmax" and ATTENTION in node.metadata_props and _attention(build, node):
            copy.graph.opset_imports[MICROSOFT] = 1
    return prune(copy)


def _group_norm(build: Builder, node: ir.Node) -> None:
    x, gamma, beta = node.inputs
    old = node.outputs[0]
    dims = static_dims(x)
    if x is None or x.shape is None or len(dims) < 3 or None in dims[1:]:
        return
    channels, *size = (int(dim) for dim in dims[1:] if dim is not None)
    groups, epsilon = node.attributes["num_groups"].as_int(), node.attributes.get_float("epsilon", 1e-5)
    per_group = ir.Shape([x.shape[0], groups, channels * math.prod(size) // groups])
    split = build.const(f"{old.name}.groups", np.array([0, groups, -1], np.int64))
    joined = build.const(f"{old.name}.shape", np.array([0, channels, *size], np.int64))
    ones, zeros = (
        build.const(f"{old.name}.{name}", np.full(groups, v, np.float32))
        for name, v in (("ones", 1), ("zeros", 0))
    )
    mean, var = (
        build.const(f"{old.name}.{name}", np.full(channels, v, np.float32))
        for name, v in (("mean", 0), ("var", 1))
    )
    h = build.node(node, "Reshape", [x, split], f"{old.name}.grouped", FLOAT, per_group)
    h = build.node(
        node,
        "InstanceNormalization",
        [h, ones, zeros],
        f"{old.name}.normalised",
        FLOAT,
        per_group,
        {"epsilon": epsilon},
    )
    h = build.node(node, "Reshape", [h, joined], f"{old.name}.joined", FLOAT, x.shape)
    h = build.node(
        node,
        "BatchNormalization",
        [h, gamma, beta, mean, var],
        f"{old.name}.affine",
        FLOAT,
        x.shape,
        {"epsilon": 0.0},
    )
    take_over(old, h)


def _attention(build: Builder, softmax: ir.Node) -> bool:
    """Fuse the attention around one Softmax; False where the pattern does not match."""
    scores = producer(softmax.inputs[0], "MatMul")
    weighted = _only_consumer(softmax, "MatMul")
    transposed = None if weighted is None else _only_consumer(weighted, "Transpose")
    merged = None if transposed is None else _only_consumer(transposed, "Reshape")
    if (
        scores is None
        or weighted is None
        or transposed is None
        or merged is None
        or _perm(transposed) != HEADS_FIRST
    ):
        return False
    query, query_factor = _scaled(scores.inputs[0])
    key_t, key_factor = _scaled(scores.inputs[1])
    heads = [_split_heads(v) for v in (query, _untransposed(key_t), weighted.inputs[1])]
    found = [h for h in heads if h is not None]
    out = merged.outputs[0]
    if len(found) != 3 or len({count for _, count in found}) != 1 or len(static_dims(out)) != 3:
        return False
    attributes: dict[str, int | float] = {"num_heads": found[0][1], "scale": query_factor * key_factor}
    new = build.node(
        merged,
        "MultiHeadAttention",
        [value for value, _ in found],
        f"{out.name}.attention",
        FLOAT,
        out.shape,
        attributes,
        MICROSOFT,
    )
    take_over(out, new)
    return True


def _only_consumer(node: ir.Node, op: str) -> ir.Node | None:
    consumers = node.outputs[0].consumers()
    return (
        consumers[0]
        if len(consumers) == 1 and consumers[0].op_type == op and not node.outputs[0].is_graph_output()
        else None
    )


def _perm(node: ir.Node) -> list[int]:
    return list(node.attributes.get_ints("perm", []))


def _scaled(value: ir.Value | None) -> tuple[ir.Value | None, float]:
    """(v, a) of a value a * v with a constant a; (value, 1) where there is no factor."""
    node = producer(value, "Mul")
    if (
        node is not None
        and (factor := node.inputs[1]) is not None
        and factor.const_value is not None
        and factor.const_value.size == 1
    ):
        return node.inputs[0], float(factor.const_value.numpy().reshape(()))
    return value, 1.0


def _untransposed(value: ir.Value | None) -> ir.Value | None:
    """K of K^T.

    torch writes the transposition of the last two axes as Reshape (-1, L, d) -> Transpose -> Reshape
    (B, h, d, L).
    """
    node = producer(value, "Transpose")
    if node is not None and _perm(node) == [0, 1, 3, 2]:
        return node.inputs[0]
    back = producer(value, "Reshape")
    swap = None if back is None else producer(back.inputs[0], "Transpose")
    flat = None if swap is None else producer(swap.inputs[0], "Reshape")
    if swap is None or flat is None or _perm(swap) != [0, 2, 1] or ATTENTION not in flat.metadata_props:
        return None
    return flat.inputs[0]


def _split_heads(value: ir.Value | None) -> tuple[ir.Value, int] | None:
    """(x, heads) of Transpose(Reshape(x, (B, S, heads, d)), (0, 2, 1, 3)) with x (B, S, heads * d)."""
    node = producer(value, "Transpose")
    reshape = None if node is None or _perm(node) != HEADS_FIRST else producer(node.inputs[0], "Reshape")
    if reshape is None or reshape.inputs[0] is None:
        return None
    x, split = static_dims(reshape.inputs[0]), static_dims(reshape.outputs[0])
    if (
        len(x) != 3
        or len(split) != 4
        or split[2] is None
        or split[3] is None
        or x[2] != split[2] * split[3]
        or x[1] != split[1]
    ):
        return None
    return reshape.inputs[0], split[2]
