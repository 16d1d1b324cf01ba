"""Operators and attributes that the exporter does not write."""

from __future__ import annotations

from typing import Any

import numpy as np
import onnx
from onnx import AttributeProto, TensorProto, helper

from ..base import Draft, NotApplicable
from . import mutation
from .graphs import Model, behind, constant, pick, result

TRIPS = (3, 10**6, 2**40, 2**62)
SIMPLE: tuple[tuple[str, str, dict[str, Any]], ...] = (
    ("", "NonZero", {}), ("", "Unique", {}), ("", "Bernoulli", {"seed": 1.0}), ("", "RandomNormalLike", {}),
    ("", "Dropout", {}),
    ("", "StringNormalizer", {}), ("", "SequenceConstruct", {}), ("", "Optional", {}), ("", "Det", {}), ("",
    "ImageDecoder", {}),
    ("", "DynamicQuantizeLinear", {}), ("", "LSTM", {"hidden_size": 2**30}), ("", "Multinomial",
    {"sample_size": 2**40}),
    ("", "RegexFullMatch", {"pattern": "(a+)+$"}), ("", "StringSplit", {}), ("", "Print", {}), ("", "", {}),
    ("", "\x1b[31m", {}),
    ("", "x" * 1_000_000, {}), ("ai.onnx.ml", "LabelEncoder", {"keys_int64s": [0], "values_int64s": [1]}),
    ("evil", "Run", {}),
    ("com.microsoft", "EPContext", {"ep_cache_context": "../canary/secret.bin", "embed_mode": 0,
    "main_context": 1}),
    ("com.microsoft", "QMoE", {}), ("com.microsoft", "Inverse", {}), ("com.microsoft", "NGramRepeatBlock",
    {"ngram_size": 1}),
    ("com.microsoft", "PyOp", {}), ("com.microsoft", "FusedMatMul", {}), ("com.microsoft", "Tokenizer", {}),
    ("com.microsoft", "Gelu", {}),
    ("com.ms.internal.nhwc", "Conv", {}), ("com.microsoft.nchwc", "ReorderInput", {}),
    ("ai.onnx.preview.training", "Adagrad", {}),
    ("ai.onnx.contrib", "PyOp", {}), ("ai.onnx.training", "Gradient", {}), ("ai.onnx", "Abs", {}),
)  # fmt: skip


def domain(model: Model, name: str) -> None:
    if name not in {opset.domain for opset in model.opset_import}:
        model.opset_import.append(helper.make_opsetid(name, 1))


def body(kind: str) -> onnx.GraphProto:
    """A subgraph that gives its input back, as Loop or If take one."""
    scalar = helper.make_tensor_value_info
    if kind == "If":
        node = helper.make_node("Identity", ["fuzz.before"], ["fuzz.inner"])
        return helper.make_graph([node], "body", [], [scalar("fuzz.inner", TensorProto.FLOAT, None)])
    if kind == "Scan":
        node = helper.make_node("Identity", ["x"], ["y"])
        return helper.make_graph(
            [node], "body", [scalar("x", TensorProto.FLOAT, None)], [scalar("y", TensorProto.FLOAT, None)]
        )
    nodes = [helper.make_node("Identity", ["go"], ["going"]), helper.make_node("Identity", ["x"], ["y"])]
    inputs = [
        scalar("i", TensorProto.INT64, []),
        scalar("go", TensorProto.BOOL, []),
        scalar("x", TensorProto.FLOAT, None),
    ]
    return helper.make_graph(
        nodes, "body", inputs, [scalar("going", TensorProto.BOOL, []), scalar("y", TensorProto.FLOAT, None)]
    )


@mutation("graph/control-flow", refuse=True, weight=3)
def control_flow(draft: Draft) -> object:
    """Loop, If, Scan or SequenceMap around the result."""
    name, model = pick(draft)
    kind = draft.rng.choice(["Loop", "Loop", "If", "Scan", "SequenceMap"])
    trips = draft.rng.choice(TRIPS)
    true = constant(model, "fuzz.true", np.array(True))
    if kind == "Loop":
        times = constant(model, "fuzz.trips", np.array(trips, np.int64))
        node = helper.make_node("Loop", [times, true, "fuzz.before"], ["fuzz.loop"], body=body(kind))
    elif kind == "If":
        node = helper.make_node("If", [true], ["fuzz.loop"], then_branch=body(kind), else_branch=body(kind))
    else:
        extra = {"num_scan_inputs": 1} if kind == "Scan" else {}
        node = helper.make_node(kind, ["fuzz.before"], ["fuzz.loop"], body=body("Scan"), **extra)
    nodes = [node, helper.make_node("ReduceMax", ["fuzz.loop"], ["fuzz.max"], keepdims=0)]
    zero = constant(model, "fuzz.zero", np.array(0, np.float32))
    nodes.append(helper.make_node("Mul", ["fuzz.max", zero], ["fuzz.nothing"]))
    behind(model, nodes, "fuzz.nothing")
    draft.put_model(name, model)
    return name, kind, trips


@mutation("graph/operator", refuse=True, weight=4)
def operator(draft: Draft) -> object:
    """An operator of another kind or domain, in the way of the result or beside it."""
    name, model = pick(draft)
    space, op, attributes = draft.rng.choice(SIMPLE)
    if space:
        domain(model, space)
    node = helper.make_node(op, ["fuzz.before"], ["fuzz.out"], name="fuzz", domain=space, **attributes)
    if draft.rng.random() < 0.5:
        behind(
            model, [node, helper.make_node("ReduceMax", ["fuzz.out"], ["fuzz.max"], keepdims=0)], "fuzz.max"
        )
    else:
        node.input[0] = result(model)
        model.graph.node.append(node)
    draft.put_model(name, model)
    return name, space, op[:20]


@mutation("graph/function", refuse=True)
def function(draft: Draft) -> object:
    """A function of the model's own: one that shadows a known operator, calls itself, or is called."""
    name, model = pick(draft)
    kind = draft.rng.choice(["shadow", "recursive", "used", "unused"])
    space, op = ("", "Add") if kind == "shadow" else ("fuzz", "f")
    inner = helper.make_node(
        "f" if kind == "recursive" else "Identity", ["x"], ["y"], domain="fuzz" if kind == "recursive" else ""
    )
    made = helper.make_function(
        space, op, ["x"], ["y"], [inner], [helper.make_opsetid("", 21), helper.make_opsetid("fuzz", 1)]
    )
    model.functions.append(made)
    if kind in ("recursive", "used"):
        domain(model, "fuzz")
        behind(model, [helper.make_node("f", ["fuzz.before"], ["fuzz.out"], domain="fuzz")], "fuzz.out")
    draft.put_model(name, model)
    return name, kind


@mutation("graph/attribute", weight=3)
def attribute(draft: Draft) -> object:
    """Attributes that are unknown, doubled, of another type, absurdly long, or none of an operator's."""
    rng = draft.rng
    name, model = pick(draft)
    node = rng.choice(model.graph.node)
    kind = rng.choice(
        [
            "unknown",
            "long ints",
            "long text",
            "graph",
            "graphs",
            "type",
            "twice",
            "missing",
            "strings",
            "ref",
            "value",
            "none",
        ]
    )
    held = node.attribute
    if kind == "unknown":
        held.add(
            name=rng.choice(["fuzz", "\x1b[31m", "x" * 100_000, "", "body"]), type=AttributeProto.INT, i=1
        )
    elif kind == "long ints":
        held.add(
            name=rng.choice(["axes", "perm", "pads", "value_ints"]), type=AttributeProto.INTS
        ).ints.extend([1] * 1_500_000)
    elif kind == "long text":
        held.add(
            name="mode",
            type=AttributeProto.STRING,
            s=rng.choice([b"x" * 2_000_000, b"\xff\xfe", b"\x1b[31m"]),
        )
    elif kind == "graph":
        held.add(name="body", type=AttributeProto.GRAPH).g.CopyFrom(body("Scan"))
    elif kind == "graphs":
        held.add(name="bodies", type=AttributeProto.GRAPHS).graphs.add().CopyFrom(body("Scan"))
    elif kind == "strings":
        held.add(name="names", type=AttributeProto.STRINGS).strings.extend([b"x"] * 100_000)
    elif kind == "ref":
        held.add(name="axis", type=AttributeProto.INT, ref_attr_name="fuzz")
    elif kind == "none":
        held.add(name="axis")
    else:
        nodes = [n for n in model.graph.node if n.attribute]
        if not nodes:
            raise NotApplicable("no attributes")
        chosen = rng.choice(rng.choice(nodes).attribute)
        if kind == "type":
            chosen.type = rng.choice(
                [t for t in (0, 1, 2, 3, 4, 5, 6, 7, 8, 11, 14, 99) if t != chosen.type and t in range(15)]
            )
        elif kind == "twice":
            node = rng.choice(nodes)
            node.attribute.add().CopyFrom(node.attribute[0])
        elif kind == "missing":
            node = rng.choice(nodes)
            del node.attribute[0]
        elif chosen.type == AttributeProto.INT:
            chosen.i = rng.choice([-1, 0, 2, 7, 99, 2**31, 2**62, -(2**63)])
        elif chosen.type == AttributeProto.INTS:
            chosen.ints[:] = [rng.choice([-1, 0, 2, 100, 2**31, 2**62])] * len(chosen.ints)
        elif chosen.type == AttributeProto.FLOAT:
            chosen.f = rng.choice([float("nan"), float("inf"), -1.0, 0.0, 1e38])
        else:
            raise NotApplicable("a text or tensor")
    draft.refuse |= kind not in ("missing", "value")
    draft.put_model(name, model)
    return name, node.op_type, kind


@mutation("graph/cast")
def cast(draft: Draft) -> object:
    """The result goes through another type and back: texts, halves, integers, types that are none."""
    name, model = pick(draft)
    to = draft.rng.choice([8, 2, 3, 6, 7, 9, 10, 11, 16, 17, 22, 0, 14, 99, 2**31, -1])
    nodes = [
        helper.make_node("Cast", ["fuzz.before"], ["fuzz.to"], to=to),
        helper.make_node("Cast", ["fuzz.to"], ["fuzz.from"], to=1),
    ]
    nodes.append(
        helper.make_node(
            "Mul", ["fuzz.from", constant(model, "fuzz.zero", np.array(0, np.float32))], ["fuzz.nothing"]
        )
    )
    behind(model, nodes, "fuzz.nothing")
    draft.put_model(name, model)
    return name, to
