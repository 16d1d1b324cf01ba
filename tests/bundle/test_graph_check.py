"""The check of graph files: right ones pass, and each rule has a wrong one that is refused in one line."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnx_ir as ir
import pytest
from graph_edits import FILE, add, const, external, place, refused
from onnx import AttributeProto, ModelProto, TensorProto, numpy_helper
from torch import nn
from toy import HALVED, INFO, PORTABLE_NUMBERS, PRECISIONS, calibrated, emitted, schedule_of

from ptqd_export.bundle.graph.onnx_file import read_graph
from ptqd_export.bundle.graph_check import Expected, check_graph
from ptqd_export.core.backend import Emission
from ptqd_export.core.precision import FP32, Precision
from ptqd_export.core.quant import QuantizedNetwork
from ptqd_export.core.sampling import Sampling
from ptqd_export.errors import BundleError
from ptqd_export.export import fold, save

FP16 = Precision(16, 16)
W4A4 = Precision(4, 4)
PORTABLE = "w4a4.portable"


class Graphs:
    """Files of the toy by name, and what they are checked against."""

    def __init__(self, folder: Path, sampling: Sampling) -> None:
        self.folder, self.sampling = folder, sampling

    def data(self, name: str) -> bytes:
        return (self.folder / f"{name}.onnx").read_bytes()

    def expected(self, name: str) -> Expected:
        emission = Emission(name.rpartition(".")[2])
        return Expected(self.sampling, emission, FILE, (self.folder / FILE).stat().st_size)


@pytest.fixture(scope="module")
def graphs(toy: nn.Module, base: ir.Model, tmp_path_factory: pytest.TempPathFactory) -> Graphs:
    folder = tmp_path_factory.mktemp("graphs")
    models: dict[str, ir.Model] = {}
    for precision in (FP32, FP16, *PRECISIONS, *PORTABLE_NUMBERS):
        network = QuantizedNetwork(precision, {}) if precision.is_float else calibrated(toy, precision)
        for emission in Emission:
            models[f"{precision}.{emission}"] = fold(emitted(base, network, emission), schedule_of(), HALVED)
    save(models, folder, FILE)
    return Graphs(folder, Sampling(INFO, schedule_of()))


NAMES = [f"{p}.{e}" for p in (FP32, FP16, *PRECISIONS, *PORTABLE_NUMBERS) for e in Emission]


@pytest.mark.parametrize("name", NAMES)
def test_every_precision_and_emission_passes(graphs: Graphs, name: str) -> None:
    check_graph(graphs.data(name), name, graphs.expected(name))
    check_graph(memoryview(graphs.data(name)), name, graphs.expected(name))


def test_a_network_in_which_nothing_is_folded(base: ir.Model, tmp_path: Path) -> None:
    """fp32 without a correction has no `step`; v-prediction always has, and one more table."""
    for kind, step in (("epsilon", False), ("v_prediction", True)):
        sampling = Sampling(INFO, schedule_of(kind))
        identity = type(HALVED).identity(len(sampling), INFO.channels)
        save({"g": fold(base, sampling.schedule, identity)}, tmp_path, FILE)
        data = (tmp_path / "g.onnx").read_bytes()
        assert ("step" in [value.name for value in read_graph(data, 256).inputs]) == step
        size = (tmp_path / FILE).stat().st_size
        check_graph(data, "g", Expected(sampling, Emission.PORTABLE, FILE, size))


# --- wrong graphs


def unary(op: str, **attributes: Any) -> Callable[[ModelProto], object]:
    return lambda m: add(m, op, ["sample"], ["new"], **attributes)


def sized(op: str, values: Any, source: str = "sample") -> Callable[[ModelProto], object]:
    """An operator that takes sizes as its second input."""
    return lambda m: add(m, op, [source, const(m, "sizes", values)], ["new"])


def node_of(m: ModelProto, op: str) -> Any:
    return next(node for node in m.graph.node if node.op_type == op)


def lies_outside(m: ModelProto) -> None:
    value = onnx.TensorProto(dims=[1], data_type=1, name="v", data_location=1)
    for key, text in (("location", "/etc/passwd"), ("offset", "0"), ("length", "4")):
        value.external_data.add(key=key, value=text)
    add(m, "Constant", [], ["new"], value=value)


def subgraph(m: ModelProto) -> None:
    add(m, "If", ["sample"], ["new"], then_branch=onnx.GraphProto(name="g"), else_branch=onnx.GraphProto())


def table_rows(m: ModelProto) -> None:
    table = next(t for t in m.graph.initializer if t.name == "ptqd.gain")
    table.CopyFrom(numpy_helper.from_array(np.ones((4, 2, 1, 1), np.float32), table.name))


def lie(m: ModelProto) -> None:
    dims = m.graph.value_info[0].type.tensor_type.shape.dim
    dims[len(dims) - 1].dim_value = 12345


def square(m: ModelProto) -> None:
    shape = [1, 0]
    add(m, "Flatten", ["sample"], ["flat"])
    add(m, "Transpose", ["flat"], ["turned"], perm=shape)
    add(m, "MatMul", ["flat", "turned"], ["new"])


def by_data(m: ModelProto) -> None:
    add(m, "Cast", ["timestep"], ["as.float"], to=1)
    add(m, "Cast", ["as.float"], ["size"], to=7)
    add(m, "ConstantOfShape", ["size"], ["new"])


def by_batch(m: ModelProto) -> None:
    """Small for small batches: what depends on the batch in other ways than by a factor is not known."""
    add(m, "Shape", ["timestep"], ["b"])
    add(m, "Mul", ["b", "b"], ["b2"])
    add(m, "Expand", [const(m, "one", [1.0], np.float32), "b2"], ["new"])


def small_bias(m: ModelProto) -> None:
    """ONNX Runtime does not look at its length."""
    node_of(m, "Conv").input[2] = const(m, "bias", [1.0], np.float32)


def few_scales(m: ModelProto) -> None:
    node_of(m, "DequantizeLinear").input[1] = const(m, "scales", [1.0] * 3, np.float32)


def columns(m: ModelProto) -> None:
    x = const(m, "x", np.ones((1, 4, 1)), np.float32)
    add(m, "Col2Im", [x, const(m, "image", [99, 99]), const(m, "block", [2, 2])], ["new"])


def dtype_of_input(m: ModelProto) -> None:
    m.graph.input[1].type.tensor_type.elem_type = TensorProto.INT32


def dim(m: ModelProto, i: int, j: int) -> Any:
    return m.graph.input[i].type.tensor_type.shape.dim[j]


WRONG: dict[str, tuple[Callable[[ModelProto], object], str]] = {
    "a file of the machine": (place(location="/etc/passwd"), "takes weights from '/etc/passwd'"),
    "an address": (place(location="*/_ORT_MEM_ADDR_/*"), "takes weights from '\\*/_ORT_MEM_ADDR_"),
    "a path up": (place(location=f"../{FILE}"), "takes weights from '\\.\\./weights"),
    "the same file by another name": (place(location=f"./{FILE}"), "takes weights from './weights"),
    "beyond the file": (place(offset="99999999"), "which has"),
    "a length of its own": (place(length="4"), "has 4 bytes, expected .* by its shape and type"),
    "a negative offset": (place(offset="-8"), "not a plain number"),
    "a hexadecimal offset": (place(offset="0x10"), "not a plain number"),
    "an offset with a space": (place(offset=" 8"), "not a plain number"),
    "no length": (place(length=None), "other keys than location"),
    "an unknown key": (place(basepath="/"), "other keys than location"),
    "two locations": (
        lambda m: external(m).external_data.add(key="location", value=FILE),
        "external data twice",
    ),
    "outside, but not said to be": (lambda m: external(m).ClearField("data_location"), "more than one place"),
    "inside and outside": (lambda m: setattr(external(m), "raw_data", b"1234"), "more than one place"),
    "neither": (lambda m: m.graph.initializer.add(name="n", data_type=1, dims=[4]), "no bytes"),
    "typed data": (
        lambda m: m.graph.initializer.add(name="n", data_type=1, dims=[1], float_data=[1]),
        "a field 4",
    ),
    "an attribute from a file": (lies_outside, "takes its value from '/etc/passwd'"),
    "a sparse initializer": (lambda m: m.graph.sparse_initializer.add(), "a field 15"),
    "a quantization annotation": (lambda m: m.graph.quantization_annotation.add(), "a field 14"),
    "training": (lambda m: m.training_info.add(), "a field 20"),
    "a function": (lambda m: m.functions.add(name="f"), "a field 25"),
    "a subgraph": (subgraph, "an attribute has a field 6"),
    "a large tensor inside": (lambda m: const(m, "n", np.zeros(33)), "264 bytes stands inside the file"),
    "a text": (
        lambda m: m.graph.initializer.add(name="n", data_type=8, dims=[1], string_data=[b"x"]),
        "a field 6",
    ),
    "complex numbers": (
        lambda m: m.graph.initializer.add(name="n", data_type=14, raw_data=bytes(8)),
        "data type",
    ),
    "a negative dimension": (
        lambda m: m.graph.initializer.add(name="n", data_type=1, dims=[-1, -1]),
        "a shape",
    ),
    "Loop": (unary("Loop"), "holds the operator 'Loop'"),
    "NonZero": (unary("NonZero"), "holds the operator 'NonZero'"),
    "RandomNormalLike": (unary("RandomNormalLike"), "holds the operator 'RandomNormalLike'"),
    "ImageDecoder": (unary("ImageDecoder"), "holds the operator 'ImageDecoder'"),
    "a foreign domain": (
        lambda m: add(m, "Relu", ["sample"], ["n"], "evil"),
        "holds the operator 'evil.Relu'",
    ),
    "the fused attention": (
        lambda m: add(m, "MultiHeadAttention", ["sample"], ["n"], "com.microsoft"),
        "does not",
    ),
    "another name of the domain": (lambda m: add(m, "Relu", ["sample"], ["n"], "ai.onnx"), "'ai.onnx.Relu'"),
    "an unknown attribute": (unary("Relu", alpha=1.0), "an attribute 'alpha'"),
    "an attribute of another kind": (unary("Softmax", axis=1.0), "an attribute 'axis' of the kind 'f'"),
    "an attribute by reference": (
        lambda m: node_of(m, "Conv").attribute.append(AttributeProto(name="x", ref_attr_name="y", type=2)),
        "a field 21",
    ),
    "an attribute of no type": (
        lambda m: node_of(m, "Conv").attribute[0].ClearField("type"),
        "no number, text",
    ),
    "an attribute of two values": (
        lambda m: setattr(node_of(m, "Conv").attribute[0], "f", 1.0),
        "what its type",
    ),
    "an attribute twice": (
        lambda m: node_of(m, "Conv").attribute.append(node_of(m, "Conv").attribute[0]),
        "an attribute twice",
    ),
    "a Cast to text": (unary("Cast", to=8), "Cast to data type 8"),
    "a newer opset": (
        lambda m: setattr(m.opset_import[0], "version", 22),
        "in version 22, expected '' in 21",
    ),
    "a domain's opset": (
        lambda m: m.opset_import.add(domain="com.microsoft", version=1),
        "'com.microsoft' in version",
    ),
    "no opset": (lambda m: m.ClearField("opset_import"), "does not say which version"),
    "an old format": (lambda m: setattr(m, "ir_version", 3), "ir_version 3"),
    "a note of others": (
        lambda m: node_of(m, "Conv").metadata_props.add(key="k", value="v"),
        "a note that is not",
    ),
    "a name for a terminal": (lambda m: setattr(m.graph.node[0], "name", "a\x1b[2Jb"), "cannot be printed"),
    "a name of a megabyte": (
        lambda m: setattr(m.graph.node[0], "name", "a" * 2**16),
        "more than 1024 characters",
    ),
    "a further input": (
        lambda m: m.graph.input.append(m.graph.input[0]),
        "has 5 inputs, \\['sample', 'timestep'",
    ),
    "an input too few": (lambda m: m.graph.input.pop(), "uses step|no earlier node makes"),
    "another order": (lambda m: m.graph.input.reverse(), r"has \d inputs"),
    "another sample shape": (
        lambda m: setattr(dim(m, 0, 2), "dim_value", 1 << 28),
        "expected 1 and \\['batch', 2, 8",
    ),
    "another type": (dtype_of_input, "'timestep' of type 6"),
    "a fixed batch": (lambda m: setattr(dim(m, 0, 0), "dim_value", 2), "expected 1 and"),
    "two batches": (lambda m: setattr(dim(m, 1, 0), "dim_param", "other"), "2 symbols for the batch"),
    "a second output": (lambda m: m.graph.output.append(m.graph.output[0]), "has 2 outputs"),
    "an output of another shape": (
        lambda m: setattr(m.graph.output[0].type.tensor_type.shape.dim[1], "dim_value", 3),
        "'epsilon' of type 1 and shape",
    ),
    "a constant for an input": (lambda m: const(m, "timestep", [1]), "in the place of an input"),
    "tables of another length": (
        table_rows,
        "table 'ptqd.gain' of shape \\[4, 2, 1, 1\\], expected \\[3, 2, 1, 1\\]",
    ),
    "step used otherwise": (lambda m: add(m, "Relu", ["step"], ["n"]), "uses step in a Relu"),
    "step for a size": (
        lambda m: add(m, "ConstantOfShape", ["step"], ["n"]),
        "uses step in a ConstantOfShape",
    ),
    "a shape that is not so": (lie, "another shape than the file says|what is not so"),
    "a value of nowhere": (
        lambda m: m.graph.value_info.add(name="n").CopyFrom(named(m, "n")),
        "what is not so",
    ),
    "a value too early": (
        lambda m: add(m, "Relu", ["later"], ["new"]),
        "reads a value that no earlier node makes",
    ),
    "a value twice": (lambda m: add(m, "Relu", ["sample"], ["timestep"]), "there already"),
    "an Expand to 2^60": (
        sized("Expand", [2**30, 2**30, 1, 1, 1, 1]),
        "Expand makes a value of .* elements per sample",
    ),
    "a Tile of 2^40": (sized("Tile", [1, 2**20, 2**10, 2**10]), "Tile makes a value of .* elements"),
    "a Tile of the batch": (sized("Tile", [2**40, 1, 1, 1]), "Tile makes a value of .* elements"),
    "a Pad that grows": (sized("Pad", [0, 0, 0, 0, 0, 0, 2**20, 2**20]), "Pad makes a value of .* elements"),
    "a Reshape that does not fit": (sized("Reshape", [1, 2, 3]), "a target shape that does not fit"),
    "a ConstantOfShape of 2^62": (
        lambda m: add(m, "ConstantOfShape", [const(m, "size", [2**31, 2**31])], ["n"]),
        "ConstantOfShape makes a value of",
    ),
    "a Range of 2^62": (
        lambda m: add(m, "Range", [const(m, "r0", 0), const(m, "r1", 2**62), const(m, "r2", 1)], ["n"]),
        "Range makes a value of",
    ),
    "a Resize by 2^20": (
        lambda m: add(m, "Resize", ["sample", "", const(m, "s", [1, 1, 2**20, 2**20], np.float32)], ["n"]),
        "Resize makes a value of",
    ),
    "a pooling over 2^40": (
        unary("AveragePool", kernel_shape=[1, 1], pads=[2**30, 0, 2**30, 0]),
        "AveragePool makes",
    ),
    "pads of a Conv": (
        lambda m: node_of(m, "Conv").attribute[4].ints.__setitem__(slice(None), [2**30] * 4),
        "Conv (makes a value|needs more)",
    ),
    "the square of the batch": (square, "MatMul grows with the square of the batch"),
    "a size from data": (by_data, "ConstantOfShape takes sizes that are not known beforehand"),
    "a size from the batch's square": (by_batch, "Expand has a size that is negative or not known"),
    "an input that is none": (unary("Concat", axis=7), "Concat has an axis that its input has not"),
    "a bias too short": (small_bias, "Conv has a bias that does not fit"),
    "too few scales": (few_scales, "Linear has scales that do not fit"),
    "too few columns": (columns, "Col2Im has blocks that do not fit"),
    "a window over 2^30 channels": (unary("LRN", size=2**30), "LRN has a size that does not fit"),
    "missing inputs": (lambda m: add(m, "Conv", ["sample"], ["n"]), "Conv lacks an input"),
}


def named(m: ModelProto, name: str) -> Any:
    info = onnx.ValueInfoProto()
    info.CopyFrom(m.graph.value_info[0])
    info.name = name
    return info


@pytest.mark.parametrize("what", WRONG)
def test_each_rule_refuses_in_one_line(graphs: Graphs, what: str) -> None:
    change, message = WRONG[what]
    model = ModelProto.FromString(graphs.data(PORTABLE))
    change(model)
    refused(model.SerializeToString(), graphs.expected(PORTABLE), message)


def test_whole_files(graphs: Graphs) -> None:
    data, expected = graphs.data(PORTABLE), graphs.expected(PORTABLE)
    for wrong, message in (
        (b"", "no graph"),
        (data[:-1], "cut off"),
        (b"1234ORTM" + data, "ONNX Runtime's own format"),
        (data + data, "its ir_version twice"),
        (data + b"\x3a\x00", "its graph twice"),
        (data + b"\xf8\x01\x01", "a field 31"),
        (bytes(40 << 20), "has 41943040 bytes, expected 33554432 at most"),
    ):
        refused(wrong, expected, message)
    mixed = ModelProto.FromString(data)
    mixed.ClearField("ir_version")
    mixed.producer_name = "ORTM"  # a protobuf file that ONNX Runtime would take for a flatbuffer
    shifted = b"\x08\x0a" + mixed.SerializeToString()
    assert shifted[4:8] == b"ORTM" and ModelProto.FromString(shifted).producer_name == "ORTM"
    refused(shifted, expected, "ONNX Runtime's own format")


def test_attention_is_fused_for_one_emission_alone(graphs: Graphs) -> None:
    data = graphs.data("w8a8.ort-cpu")
    assert b"MultiHeadAttention" in data
    refused(data, graphs.expected("w8a8.portable"), "'com.microsoft' in version 1, expected '' in 21")


def test_the_name_of_a_file_is_shown_safely(graphs: Graphs) -> None:
    with pytest.raises(BundleError) as caught:
        check_graph(b"", "a\x1b[2J\n", graphs.expected(PORTABLE))
    assert str(caught.value).isprintable()
