"""Tensors of graphs: where their bytes lie, wherever tensors can stand, and what they say of themselves."""

from __future__ import annotations

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper

from ..base import WEIGHTS, Draft, NotApplicable
from . import mutation
from .graphs import Model, behind, constant, external, pick, tensor

LOCATIONS = (
    "../canary/secret.bin", "/etc/passwd", "/dev/zero", "x/_ORT_MEM_ADDR_/x", "*/_ORT_MEM_ADDR_/*",
    "./weights.safetensors",
    "../bundle/weights.safetensors", "manifest.json", "tables.safetensors", "", ".", "..",
    "weights.safetensors\0", "\x1b[31m",
    "WEIGHTS.safetensors", "weights.safetensors/", "unet/../weights.safetensors", "a" * 100_000,
    "file:weights.safetensors",
)  # fmt: skip


def stored(draft: Draft) -> tuple[str, Model, TensorProto]:
    """A tensor of a network's graph whose bytes lie in the weights file."""
    name = draft.rng.choice(draft.base.graphs)
    model = draft.model(name)
    found = [t for t in model.graph.initializer if t.external_data]
    if not found:
        raise NotApplicable("no external data")
    return name, model, draft.rng.choice(found)


@mutation("graph/location", refuse=True, weight=3)
def location(draft: Draft) -> object:
    """Weights from another place."""
    name, model, chosen = stored(draft)
    place = draft.rng.choice(
        [*LOCATIONS, str(draft.canary / "secret.bin"), str(draft.canary / "secret.safetensors")]
    )
    next(entry for entry in chosen.external_data if entry.key == "location").value = place
    if draft.rng.random() < 0.3:
        draft.entries[place] = draft.data["files"][WEIGHTS]  # and the manifest lists it
    draft.put_model(name, model)
    return name, chosen.name, place[:60]


@mutation("graph/offset", weight=3)
def offset(draft: Draft) -> object:
    """An offset or a length that is none, out of range, or that of another tensor."""
    name, model, chosen = stored(draft)
    size = len(draft.base.read(WEIGHTS))
    key = draft.rng.choice(["offset", "length"])
    entry = next(entry for entry in chosen.external_data if entry.key == key)
    value = draft.rng.choice(
        [-1, size, size - 1, size + 1, 2**31, 2**40, 2**63 - 1, 2**63, 2**64, 2**64 + 16, 10**30, "", "x",
        "0x10", " 16", "16 ", "1e3",
         "16.0", "+16", "\u0661", "9" * 10_000, 0, 8, 1, "None", f"0{entry.value}", int(entry.value) + 4]
    )  # fmt: skip
    draft.refuse |= not (isinstance(value, int) and 0 <= value < size)
    entry.value = str(value)
    draft.put_model(name, model)
    return name, chosen.name, key, str(value)[:30]


@mutation("graph/entries", refuse=True)
def entries(draft: Draft) -> object:
    """External data whose keys are missing, doubled or more than there are."""
    name, model, chosen = stored(draft)
    kind = draft.rng.choice(["missing", "twice", "more", "raw too", "typed too", "not said", "many"])
    if kind == "missing":
        del chosen.external_data[draft.rng.randrange(len(chosen.external_data))]
    elif kind == "twice":
        chosen.external_data.add(key="location", value="../canary/secret.bin")
    elif kind == "more":
        chosen.external_data.add(key=draft.rng.choice(["basepath", "\x1b[31m", "", "Location"]), value="/etc")
    elif kind == "raw too":
        chosen.raw_data = bytes(16)
    elif kind == "typed too":
        chosen.float_data.extend([1.0] * 4)
    elif kind == "not said":
        chosen.data_location = TensorProto.DEFAULT
    else:
        for i in range(100_000):
            chosen.external_data.add(key=f"k{i}", value="v")
    draft.put_model(name, model)
    return name, chosen.name, kind


@mutation("graph/hidden-tensor", refuse=True, weight=2)
def hidden_tensor(draft: Draft) -> object:
    """Weights from elsewhere where tensors seldom stand: constants, sparse ones, subgraphs, functions."""
    rng = draft.rng
    name, model = pick(draft)
    place = rng.choice(
        ["../canary/secret.bin", str(draft.canary / "secret.bin"), "x/_ORT_MEM_ADDR_/x", "*/_ORT_MEM_ADDR_/*"]
    )
    about = {"location": place, "offset": rng.choice([0, 4096]), "length": 16}
    far = external(tensor("fuzz.far", [4]), **about)
    kind = rng.choice(
        [
            "constant",
            "sparse",
            "sparse attribute",
            "indices",
            "tensors",
            "subgraph",
            "function",
            "training",
            "unused",
        ]
    )
    node = helper.make_node("Constant", [], ["fuzz.constant"], name="fuzz.constant")
    sparse = onnx.SparseTensorProto(dims=[8])
    sparse.values.CopyFrom(far)
    sparse.indices.CopyFrom(helper.make_tensor("fuzz.indices", TensorProto.INT64, [4], [0, 1, 2, 3]))
    if kind == "indices":
        sparse.values.CopyFrom(helper.make_tensor("fuzz.far", TensorProto.FLOAT, [4], [1.0] * 4))
        sparse.indices.CopyFrom(
            external(tensor("fuzz.indices", [4], TensorProto.INT64), **{**about, "length": 32})
        )
    if kind == "constant":
        node.attribute.add(name="value", type=onnx.AttributeProto.TENSOR).t.CopyFrom(far)
    elif kind == "tensors":
        node.attribute.add(name="value", type=onnx.AttributeProto.TENSORS).tensors.add().CopyFrom(far)
    elif kind == "sparse attribute":
        node.attribute.add(
            name="sparse_value", type=onnx.AttributeProto.SPARSE_TENSOR
        ).sparse_tensor.CopyFrom(sparse)
    elif kind in ("sparse", "indices"):
        model.graph.sparse_initializer.add().CopyFrom(sparse)
        node = helper.make_node("Identity", ["fuzz.far"], ["fuzz.constant"])
    elif kind == "subgraph":
        body = helper.make_graph(
            [helper.make_node("Identity", ["fuzz.far"], ["fuzz.in"])], "body", [],
            [helper.make_tensor_value_info("fuzz.in", TensorProto.FLOAT, [4])], [far],
        )  # fmt: skip
        constant(model, "fuzz.true", np.array(True))
        node = helper.make_node("If", ["fuzz.true"], ["fuzz.constant"], then_branch=body, else_branch=body)
    elif kind == "function":
        inner = helper.make_node("Constant", [], ["y"])
        inner.attribute.add(name="value", type=onnx.AttributeProto.TENSOR).t.CopyFrom(far)
        model.functions.append(
            helper.make_function("fuzz", "f", [], ["y"], [inner], [helper.make_opsetid("", 21)])
        )
        model.opset_import.append(helper.make_opsetid("fuzz", 1))
        node = helper.make_node("f", [], ["fuzz.constant"], domain="fuzz")
    elif kind == "training":
        model.training_info.add().initialization.initializer.add().CopyFrom(far)
    else:
        model.graph.initializer.append(far)
    if kind not in ("training", "unused"):
        nodes = [node, helper.make_node("ReduceMax", ["fuzz.constant"], ["fuzz.max"], keepdims=0)]
        behind(model, nodes, "fuzz.max")
    draft.put_model(name, model)
    return name, kind, place


@mutation("graph/tensor", weight=2)
def changed_tensor(draft: Draft) -> object:
    """An initializer of another type, shape or length; its numbers as typed fields, texts or NaN."""
    rng = draft.rng
    name, model = pick(draft)
    chosen = rng.choice(model.graph.initializer)
    kind = rng.choice(
        [
            "type",
            "dims",
            "long",
            "short",
            "typed",
            "strings",
            "nan",
            "turned",
            "segment",
            "large",
            "twice",
            "none",
        ]
    )
    if kind == "type":
        chosen.data_type = rng.choice([0, 1, 2, 3, 6, 7, 8, 9, 10, 11, 16, 17, 21, 22, 23, 99, 2**31 - 1])
    elif kind == "dims":
        chosen.dims.append(rng.choice([0, 1, 2, -1, 2**31, 2**62]))
    elif kind == "typed":
        chosen.float_data.extend([float("nan")] * rng.choice([1, 100_000]))
    elif kind == "strings":
        chosen.data_type = TensorProto.STRING
        chosen.string_data.extend([b"\x1b[31m"] * 5)
    elif kind == "segment":
        chosen.segment.begin, chosen.segment.end = 0, 2**62
    elif kind == "large":
        model.graph.initializer.add().CopyFrom(
            numpy_helper.from_array(np.zeros(rng.choice([10**4, 10**7]), np.float32), "fuzz.large")
        )
    elif kind == "twice":
        model.graph.initializer.add().CopyFrom(chosen)
    elif kind == "none":
        model.graph.initializer.remove(chosen)
    else:
        inside = [t for t in model.graph.initializer if t.raw_data]
        if not inside:
            raise NotApplicable("all outside")
        chosen = rng.choice(inside)
        raw = chosen.raw_data
        chosen.raw_data = {
            "long": raw * 3,
            "short": raw[:-1],
            "nan": b"\xff" * len(raw),
            "turned": raw[::-1],
        }[kind]
    draft.refuse |= kind in ("long", "short", "typed", "strings", "segment", "twice")
    draft.put_model(name, model)
    return name, chosen.name, kind
