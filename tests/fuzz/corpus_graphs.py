"""Known holes of graphs, each as its smallest case."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import onnx
from onnx import AttributeProto, TensorProto, helper, numpy_helper

from .base import TABLES, WEIGHTS, Draft
from .corpus import graph, known
from .mutations.graphs import behind, constant, external, tensor
from .mutations.operators import body
from .mutations.serialized import field, ort_format, varint

ADDRESS = "*/_ORT_MEM_ADDR_/*"
"""As a location, an address in memory to some versions of ONNX Runtime."""


def changed(draft: Draft, change: Callable[[onnx.ModelProto], object], name: str | None = None) -> None:
    name = name or graph(draft)
    model = draft.model(name)
    change(model)
    draft.put_model(name, model)


def located(draft: Draft, location: str) -> None:
    """The first stored tensor of a graph from elsewhere."""

    def change(model: onnx.ModelProto) -> None:
        chosen = next(t for t in model.graph.initializer if t.external_data)
        next(entry for entry in chosen.external_data if entry.key == "location").value = location

    changed(draft, change)


@known
def location_is_a_memory_address(draft: Draft) -> None:
    located(draft, ADDRESS)
    draft.entries[ADDRESS] = draft.data["files"][WEIGHTS]


@known
def file_named_like_a_memory_address(draft: Draft) -> None:
    """A segmentation fault of ONNX Runtime 1.23.2."""
    name = "x/_ORT_MEM_ADDR_/x"
    draft.contents[name] = draft.read(WEIGHTS)
    located(draft, name)


@known
def sparse_values_at_a_memory_address(draft: Draft) -> None:
    """A segmentation fault of ONNX Runtime 1.24.4."""

    def change(model: onnx.ModelProto) -> None:
        sparse = onnx.SparseTensorProto(dims=[8])
        far = external(tensor("far", [4]), location=ADDRESS, offset=4096, length=16)
        sparse.values.CopyFrom(far)
        sparse.indices.CopyFrom(helper.make_tensor("at", TensorProto.INT64, [4], [0, 1, 2, 3]))
        model.graph.sparse_initializer.add().CopyFrom(sparse)

    changed(draft, change)


@known
def constant_takes_a_file_of_the_user(draft: Draft) -> None:
    def change(model: onnx.ModelProto) -> None:
        far = external(tensor("", [4]), location="../canary/secret.bin", offset=0, length=16)
        node = helper.make_node("Constant", [], ["far"])
        node.attribute.add(name="value", type=AttributeProto.TENSOR).t.CopyFrom(far)
        behind(model, [node, helper.make_node("ReduceMax", ["far"], ["most"], keepdims=0)], "most")

    changed(draft, change)


@known
def location_is_a_file_of_the_user(draft: Draft) -> None:
    located(draft, "../canary/secret.bin")


@known
def location_is_absolute(draft: Draft) -> None:
    located(draft, str(draft.canary / "secret.bin"))


@known
def location_is_another_file_of_the_bundle(draft: Draft) -> None:
    located(draft, TABLES)


@known
def subgraph_takes_a_file_of_the_user(draft: Draft) -> None:
    def change(model: onnx.ModelProto) -> None:
        far = external(tensor("far", [1]), location="../canary/secret.bin", offset=0, length=4)
        inner = helper.make_graph(
            [helper.make_node("Identity", ["far"], ["in"])], "body", [],
            [helper.make_tensor_value_info("in", TensorProto.FLOAT, [1])], [far],
        )  # fmt: skip
        true = constant(model, "true", np.array(True))
        behind(model, [helper.make_node("If", [true], ["out"], then_branch=inner, else_branch=inner)], "out")

    changed(draft, change)


@known
def loop_without_end(draft: Draft) -> None:
    """2^62 trips, beyond the reach of Ctrl-C."""

    def change(model: onnx.ModelProto) -> None:
        trips, true = (
            constant(model, "trips", np.array(2**62, np.int64)),
            constant(model, "true", np.array(True)),
        )
        behind(
            model, [helper.make_node("Loop", [trips, true, "fuzz.before"], ["out"], body=body("Loop"))], "out"
        )

    changed(draft, change)


@known
def update_with_a_loop(draft: Draft) -> None:
    def change(model: onnx.ModelProto) -> None:
        trips, true = (
            constant(model, "trips", np.array(2**62, np.int64)),
            constant(model, "true", np.array(True)),
        )
        behind(
            model, [helper.make_node("Loop", [trips, true, "fuzz.before"], ["out"], body=body("Loop"))], "out"
        )

    changed(draft, change, draft.data["update"]["file"])


@known
def file_of_two_formats(draft: Draft) -> None:
    """Protobuf to the check, ONNX Runtime's own format to the runtime."""
    content = b"\0\0ORTM" + ort_format(draft.base.read(draft.base.manifest["update"]["file"]))[8:]
    size = varint(len(content))
    content = content[len(size) - 1 :]
    draft.contents[graph(draft)] = b"\x12" + varint(len(content)) + content + draft.read(graph(draft))


@known
def graph_in_the_format_of_the_runtime(draft: Draft) -> None:
    draft.contents[graph(draft)] = ort_format(draft.base.read(draft.base.manifest["update"]["file"]))


def _wide_input(model: onnx.ModelProto) -> None:
    model.graph.input.append(helper.make_tensor_value_info("more", TensorProto.FLOAT, ["batch", 2**28]))


@known
def input_of_a_gigabyte(draft: Draft) -> None:
    changed(draft, _wide_input)


@known
def input_of_a_gigabyte_in_the_manifest_too(draft: Draft) -> None:
    for name in draft.base.graphs:
        changed(draft, _wide_input, name)
    draft.data["sampling"]["model"]["inputs"].append({"name": "more", "dtype": "float32", "shape": [2**28]})


@known
def samples_of_a_gigabyte(draft: Draft) -> None:
    draft.data["sampling"]["model"]["sample_shape"] = [1, 16384, 16384]


@known
def samples_of_a_gigabyte_in_every_graph(draft: Draft) -> None:
    def change(model: onnx.ModelProto) -> None:
        for value in (*model.graph.input, *model.graph.output):
            dims = value.type.tensor_type.shape.dim
            if len(dims) == 4:
                dims[2].dim_value = dims[3].dim_value = 16384

    draft.data["sampling"]["model"]["sample_shape"][1:] = [16384, 16384]
    for name in (*draft.base.graphs, draft.data["update"]["file"]):
        changed(draft, change, name)


@known
def padding_that_grows(draft: Draft) -> None:
    def change(model: onnx.ModelProto) -> None:
        for node in model.graph.node:
            if node.op_type == "Conv":
                pads = next(a for a in node.attribute if a.name == "pads")
                pads.ints[:] = [4000] * len(pads.ints)

    changed(draft, change)


def _doubled(model: onnx.ModelProto) -> None:
    nodes, name = [], "fuzz.before"
    for i in range(26):
        nodes.append(helper.make_node("Concat", [name, name], [f"twice{i}"], axis=0))
        name = f"twice{i}"
    zero = constant(model, "zero", np.array(0, np.float32))
    nodes.append(helper.make_node("ReduceMax", [name], ["most"], keepdims=0))
    behind(model, [*nodes, helper.make_node("Mul", ["most", zero], ["nothing"])], "nothing")


@known
def result_doubled_many_times(draft: Draft) -> None:
    changed(draft, _doubled)


@known
def row_as_large_as_the_input_says(draft: Draft) -> None:
    def change(model: onnx.ModelProto) -> None:
        far = constant(model, "far", np.array([2**31], np.int64))
        zero = constant(model, "zero", np.array(0, np.float32))
        nodes = [
            helper.make_node("Add", ["step", far], ["size"]),
            helper.make_node("ConstantOfShape", ["size"], ["row"]),
            helper.make_node("ReduceMax", ["row"], ["most"], keepdims=0),
            helper.make_node("Mul", ["most", zero], ["nothing"]),
        ]
        behind(model, nodes, "nothing")

    changed(draft, change)


@known
def graph_of_very_many_fields(draft: Draft) -> None:
    """The walk through them took 0.18 s per MiB."""
    draft.contents[graph(draft)] = field(7, field(1, b"") * 10_000_000) + field(8, b"\x10\x15")


@known
def graph_of_very_many_nodes(draft: Draft) -> None:
    node = helper.make_node("Sin", ["a"], ["b"], name="n").SerializeToString()
    draft.contents[graph(draft)] = draft.read(graph(draft)) + field(7, field(1, node) * 2_000_000)


@known
def terminal_escapes_in_a_graph(draft: Draft) -> None:
    def change(model: onnx.ModelProto) -> None:
        model.graph.input[0].name = "\x1b[31mowned\nError: forged"

    changed(draft, change)


@known
def node_without_its_inputs(draft: Draft) -> None:
    """The check looked for the inputs that the operator has: it was an internal error."""

    def change(model: onnx.ModelProto) -> None:
        del next(node for node in model.graph.node if node.op_type == "Gather").input[:]

    changed(draft, change, draft.data["update"]["file"])


@known
def node_of_very_many_inputs(draft: Draft) -> None:
    """The runtime's complaint about it was printed whole."""

    def change(model: onnx.ModelProto) -> None:
        node = next(node for node in model.graph.node if node.op_type == "Reshape")
        node.input.extend([node.input[0]] * 300_000)

    changed(draft, change)


@known
def training_info(draft: Draft) -> None:
    changed(
        draft, lambda model: model.training_info.add().initialization.initializer.append(tensor("x", [2**40]))
    )


@known
def function_of_its_own(draft: Draft) -> None:
    def change(model: onnx.ModelProto) -> None:
        node = helper.make_node("Identity", ["x"], ["y"])
        model.functions.append(
            helper.make_function("", "Add", ["x"], ["y"], [node], [helper.make_opsetid("", 21)])
        )

    changed(draft, change)


@known
def subgraphs_in_subgraphs(draft: Draft) -> None:
    inner = b""
    for _ in range(3000):
        inner = field(
            1, field(4, b"If") + field(5, field(1, b"then_branch") + field(6, inner) + b"\xa0\x01\x05")
        )
    draft.contents[graph(draft)] = b"\x08\x0a" + field(7, inner) + field(8, b"\x10\x15")


@known
def initializer_of_megabytes_inside(draft: Draft) -> None:
    zeros = numpy_helper.from_array(np.zeros(5_000_000, np.float32), "large")
    changed(draft, lambda model: model.graph.initializer.append(zeros))
