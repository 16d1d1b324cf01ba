"""Graphs, by what they say: inputs, outputs, names, notes, versions, wiring."""

from __future__ import annotations

from typing import Any

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper

from ..base import Draft, NotApplicable
from . import mutation
from .manifest import TEXTS

Model = onnx.ModelProto
HUGE = (2**28, 2**30, 2**31, 2**40, 2**62)


def pick(draft: Draft) -> tuple[str, Model]:
    """A graph of the network, or the update."""
    update = draft.data["update"]["file"]
    name = update if draft.rng.random() < 0.2 else draft.rng.choice(draft.base.graphs)
    return name, draft.model(name)


def result(model: Model) -> str:
    return model.graph.output[0].name


def behind(model: Model, nodes: list[onnx.NodeProto], extra: str) -> None:
    """Put `nodes` at the end, and add `extra`, a value of theirs that broadcasts, to the graph's first
    result; the result that the graph had is "fuzz.before" to them."""
    name, before = result(model), "fuzz.before"
    for node in model.graph.node:
        for names in (node.input, node.output):
            for i, value in enumerate(names):
                if value == name:
                    names[i] = before
    model.graph.node.extend(nodes)
    model.graph.node.append(helper.make_node("Add", [before, extra], [name], name="fuzz.add"))


def constant(model: Model, name: str, array: Any) -> str:
    model.graph.initializer.append(numpy_helper.from_array(np.asarray(array), name))
    return name


def external(tensor: TensorProto, **about: object) -> TensorProto:
    tensor.ClearField("raw_data")
    del tensor.external_data[:]
    tensor.data_location = TensorProto.EXTERNAL
    for key, value in about.items():
        tensor.external_data.add(key=key, value=str(value))
    return tensor


def tensor(name: str, dims: list[int], kind: int = TensorProto.FLOAT) -> TensorProto:
    return TensorProto(name=name, data_type=kind, dims=dims)


@mutation("graph/extra-input", refuse=True, weight=2)
def extra_input(draft: Draft) -> object:
    """An input that the manifest does not know, or that it knows as well; used or not."""
    rng = draft.rng
    name, model = pick(draft)
    shape: list[Any] = rng.choice(
        [[2**28], ["batch", 2**28], [16384, 16384], [1], ["batch", 1], [], ["n"] * 8, [2**62, 4], [0], [-1]]
    )
    kind = rng.choice([TensorProto.FLOAT, TensorProto.STRING, TensorProto.INT64, TensorProto.DOUBLE, 0, 99])
    called = rng.choice(["more", "noise", "context", "__init__", "\x1b[31m", "x" * 100_000, "sample"])
    value = helper.make_tensor_value_info(called, kind or TensorProto.FLOAT, shape)
    if kind in (0, 99):
        value.type.tensor_type.elem_type = kind
    model.graph.input.insert(rng.randrange(len(model.graph.input) + 1), value)
    if rng.random() < 0.4:
        nodes = [helper.make_node("ReduceMax", [called], ["fuzz.max"], keepdims=0)]
        behind(model, nodes, "fuzz.max")
    if rng.random() < 0.4:
        sizes = [size for size in shape if isinstance(size, int)]
        draft.data["sampling"]["model"]["inputs"].append(
            {
                "name": called,
                "dtype": "float32",
                "shape": sizes,
                "num_classes": None,
                "null_class": None,
                "values": None,
            }
        )
    draft.put_model(name, model)
    return name, shape, kind, called[:20]


@mutation("graph/input", refuse=True, weight=2)
def changed_input(draft: Draft) -> object:
    """An input or an output of another name, type or shape, or none."""
    rng = draft.rng
    name, model = pick(draft)
    values = rng.choice([model.graph.input, model.graph.output])
    value = rng.choice(values)
    kind = rng.choice(["name", "type", "dim", "symbol", "rank", "none", "missing", "sequence", "twice"])
    dims = value.type.tensor_type.shape.dim
    if kind == "name":
        value.name = rng.choice([text for text in TEXTS if "\ud800" not in text])
    elif kind == "type":
        old = value.type.tensor_type.elem_type
        value.type.tensor_type.elem_type = rng.choice(
            [t for t in (1, 6, 7, 8, 10, 11, 16, 0, 99) if t != old]
        )
    elif kind == "dim":
        dims[rng.randrange(len(dims))].dim_value = rng.choice([*HUGE, 3, 0, -1])
    elif kind == "symbol":
        fixed = [dim for dim in dims if dim.HasField("dim_value")] or list(dims)
        rng.choice(fixed).dim_param = rng.choice(["n", "\x1b[31m", "x" * 10_000, ""])
    elif kind == "rank":
        dims.add(dim_value=1)
    elif kind == "none":
        value.ClearField("type")
    elif kind == "missing":
        values.remove(value)
    elif kind == "sequence":
        value.type.sequence_type.elem_type.tensor_type.elem_type = 1
    else:
        values.add().CopyFrom(value)
    draft.put_model(name, model)
    return name, value.name[:20], kind


@mutation("graph/about", weight=2)
def about(draft: Draft) -> object:
    """Versions, producers, notes and texts of the model."""
    rng = draft.rng
    name, model = pick(draft)
    text = rng.choice(["\x1b[31m", "x" * 3_000_000, "\u202e", "plain", "a\nb"])
    kind = rng.choice(
        [
            "ir",
            "opset",
            "no opset",
            "domain",
            "producer",
            "doc",
            "props",
            "name",
            "version",
            "node doc",
            "training",
            "value",
        ]
    )
    if kind == "ir":
        model.ir_version = rng.choice([0, 1, 2, 3, 7, 14, 99, 2**31 - 1, 2**62])
    elif kind == "opset":
        model.opset_import[0].version = rng.choice([0, 1, 7, 20, 22, 99, 2**31, -1, 2**62])
    elif kind == "no opset":
        del model.opset_import[:]
    elif kind == "domain":
        model.opset_import.append(
            helper.make_opsetid(rng.choice(["ai.onnx.ml", "evil", text[:5000], "", "com.microsoft.nchwc"]), 1)
        )
    elif kind == "producer":
        model.producer_name = text
    elif kind == "doc":
        rng.choice([model, model.graph]).doc_string = text
    elif kind == "props":
        rng.choice([model, model.graph]).metadata_props.add(key=rng.choice(["k", text]), value=text)
    elif kind == "name":
        model.graph.name = text
    elif kind == "version":
        model.model_version = 2**62
    elif kind == "node doc":
        rng.choice(model.graph.node).doc_string = text
    elif kind == "training":
        model.training_info.add().algorithm.name = text
    else:
        info = model.graph.value_info
        if not info:
            raise NotApplicable("no value_info")
        rng.choice(info).doc_string = text
    draft.refuse |= len(text) > 2000 and kind in ("producer", "doc", "props", "name", "node doc", "value")
    draft.put_model(name, model)
    return name, kind, text[:8]


@mutation("graph/wiring", weight=3)
def wiring(draft: Draft) -> object:
    """Nodes that are missing, doubled, in another order, in a circle; values without a source or with two."""
    rng = draft.rng
    name, model = pick(draft)
    nodes = model.graph.node
    node = rng.choice(nodes)
    kind = rng.choice(
        [
            "missing",
            "twice",
            "order",
            "circle",
            "input",
            "swap",
            "no input",
            "fewer inputs",
            "fewer inputs",
            "many inputs",
            "output",
            "many",
            "long",
            "empty",
        ]
    )
    if kind == "missing":
        nodes.remove(node)
    elif kind == "twice":
        nodes.add().CopyFrom(node)
    elif kind == "order":
        held = list(nodes)
        rng.shuffle(held)
        del nodes[:]
        nodes.extend(held)
    elif kind == "circle":
        node.input[0] = node.output[0]
    elif kind == "input":
        node.input[rng.randrange(len(node.input))] = rng.choice(
            ["", "missing", "\x1b[31m", result(model), rng.choice(nodes).output[0]]
        )
    elif kind == "swap":
        other = rng.choice(nodes)
        node.output[0], other.output[0] = other.output[0], node.output[0]
    elif kind == "no input":
        del node.input[:]
    elif kind == "fewer inputs":
        del node.input[rng.randrange(len(node.input)) :]
    elif kind == "many inputs":
        node.input.extend([node.input[0]] * rng.choice([1, 20, 300_000]))
    elif kind == "output":
        node.output.extend(["fuzz.second"] * rng.choice([1, 50]))
    elif kind == "many":
        nodes.extend(
            helper.make_node("Identity", [result(model)], [f"fuzz.{i}"])
            for i in range(rng.choice([100, 30_000]))
        )
    elif kind == "long":
        node.name = rng.choice(["x" * 3_000_000, "\x1b[31m" * 50, "\u202e"])
    else:
        del nodes[:]
    draft.put_model(name, model)
    return name, node.op_type, kind


@mutation("graph/value-info")
def value_info(draft: Draft) -> object:
    """What the graph says of its values is not so."""
    rng = draft.rng
    name, model = pick(draft)
    info = model.graph.value_info
    if not info:
        raise NotApplicable("none")
    value = rng.choice(info)
    kind = rng.choice(["dim", "type", "name", "none", "many", "annotation"])
    if kind == "dim":
        value.type.tensor_type.shape.dim.add(dim_value=rng.choice([*HUGE, 1, -1]))
    elif kind == "type":
        value.type.tensor_type.elem_type = rng.choice([0, 7, 8, 11, 99])
    elif kind == "name":
        value.name = rng.choice(["\x1b[31m", "x" * 100_000, "", model.graph.input[0].name])
    elif kind == "none":
        del info[:]
    elif kind == "many":
        for i in range(100_000):
            info.add().name = f"fuzz.{i}"
    else:
        model.graph.quantization_annotation.add(tensor_name=value.name).quant_parameter_tensor_names.add(
            key="SCALE_TENSOR", value="x"
        )
    draft.put_model(name, model)
    return name, value.name[:20], kind


@mutation("graph/swapped")
def swapped(draft: Draft) -> object:
    """Another graph's content: of another precision or emission, or the update's."""
    names = [*draft.base.graphs, draft.data["update"]["file"]]
    name, other = draft.rng.sample(names, 2)
    draft.contents[name] = draft.read(other)
    draft.refuse |= draft.data["update"]["file"] in (name, other)
    return name, other
