"""The plan's text and JSON, and the memory that the log tells of."""

from __future__ import annotations

import json

import pytest

from ptqd_export.backends.trt.plan import Memory, read_inspector, read_memory, read_plan
from ptqd_export.core.engine_build import PlanReport
from ptqd_export.typed import read_typed, to_plain

FULL = """Engine Layer Information:
Name: Reformatting CopyNode for Input Tensor 0 to a, LayerType: Reformat, Inputs: [ { Name: x, Location: \
Device, Dimensions: [1,8], Format/Datatype: Row major linear FP32 format }], Outputs: [], ParameterType: \
Reformat, Metadata: [ONNX Layer: a]
Name: a + b[0], LayerType: CaskConvolution, Inputs: [ { Name: q[1], Location: Device, Dimensions: [1,8], \
Format/Datatype: Thirty-two wide channel vectorized row major Int8 format }, { Name: r, Format/Datatype: \
Channel major FP16 format where channel % 8 == 0 }], Outputs: [ { Name: y, Format/Datatype: Row major \
linear FP16 format }], Weights: {"Type": "Int8", "Count": 64}, Metadata: [ONNX Layer: a]\x1e[ONNX Layer: \
b[0]]\x1e[ONNX Layer: relu]
Name: c, LayerType: CaskConvolution, Inputs: [ { Name: y, Format/Datatype: Channel major FP16 format where \
channel % 8 == 0 }], Outputs: [], Metadata: [ONNX Layer: c]
Name: w, LayerType: wait, Inputs: [], Outputs: [], Metadata:
"""
"""The wording of TensorRT 8 to 10 as quoted in NVIDIA/TensorRT#4020 and #3583."""


def test_plan_of_full_tensorrt() -> None:
    for name in ("a", "b[0]", "relu"):
        plan = read_plan(FULL.split("\n"), {name: "int8", "c": "int8"})
        assert (plan.meant, plan.taken, plan.fell_back) == (2, 1, {"c": "float16"})
    assert plan.kernels == 3 and plan.types == {"CaskConvolution": 2, "Reformat": 1, "wait": 1}
    assert not plan.is_float and read_plan(FULL.split("\n"), {"c": "int8"}).is_float
    assert json.loads(json.dumps(to_plain(plan)))["taken"] == 1
    assert read_typed(PlanReport, json.loads(json.dumps(to_plain(plan))), "plan") == plan


def test_only_the_finished_plan_counts() -> None:
    """Layers told of before the last header are of another plan."""
    later = (
        "VERBOSE Layers:\nName: c, LayerType: gemm, Inputs: [ { Name: y, Datatype: FP8, Format: (Linear) }], "
        "Outputs: [], Metadata: [ONNX Layer: c]\n"
    )
    plan = read_plan((FULL + later).splitlines(), {"a": "int8", "c": "fp8"})
    assert plan.fell_back == {"a": "not found"} and plan.types == {"gemm": 1}


def test_a_kernel_around_a_layer_is_not_the_layer() -> None:
    """What only prepares or ends a conv names its node too, and may read 8 bits where the conv does not."""
    around = (
        "Name: k, LayerType: kgen, Inputs: [ { Name: x, Datatype: Int8 }], Outputs: [], "
        "Metadata: [ONNX Layer: a]"
    )
    conv = (
        "Name: a, LayerType: correlation, Inputs: [ { Name: y, Datatype: Half }], Outputs: [], "
        "Metadata: [ONNX Layer: a]"
    )
    assert read_plan([around, conv], {"a": "int8"}).fell_back == {"a": "float16"}
    assert read_plan([around], {"a": "int8"}).fell_back == {"a": "not found"}


def _layer(kind: str, dtype: str, *nodes: str) -> str:
    metadata = "\x1e".join(f"[ONNX Layer: {node}]" for node in nodes)
    return (
        f"Name: {{ForeignNode[a...c]}}, LayerType: {kind}, Inputs: [ {{ Name: x, Datatype: {dtype} }}], "
        f"Outputs: [], Metadata: {metadata}"
    )


@pytest.mark.parametrize("kind", ["Myelin", "ForeignNode"])
@pytest.mark.parametrize("nodes", [("a",), ("a", "b", "softmax")])
def test_a_layer_of_a_whole_subgraph(kind: str, nodes: tuple[str, ...]) -> None:
    """Its first input is that of its first node, and of this alone (as in NVIDIA/TensorRT#4397)."""
    plan = read_plan([_layer(kind, "Int8", *nodes)], dict.fromkeys(("a", "b"), "int8"))
    assert plan.taken == 0
    assert plan.fell_back == {"a": "not known", "b": "not known" if "b" in nodes else "not found"}
    assert plan.kernels == 1 and plan.types == {kind: 1}
    assert not plan.is_float, "it may run in 8 bits"


def test_a_layer_of_several_nodes() -> None:
    """One product for all of them has one type; of another layer only one node can be told."""
    meant = dict.fromkeys("ab", "int8")
    for kind in ("gemm", "correlation"):
        assert read_plan([_layer(kind, "Int8", "a", "b", "relu")], meant).taken == 2
    for kind in ("fusion", "CaskConvolution"):
        plan = read_plan([_layer(kind, "Int8", "a", "b", "relu")], meant)
        assert (plan.taken, plan.fell_back) == (0, dict.fromkeys("ab", "not known"))
        lines = [_layer(kind, "Int8", "a", "relu"), _layer(kind, "Half", "b")]
        assert read_plan(lines, meant).fell_back == {"b": "float16"}
    lines = [_layer("fusion", "Half", "a", "b"), _layer("gemm", "Int8", "a")]
    assert read_plan(lines, meant).fell_back == {"b": "not known"}


@pytest.mark.parametrize("text", ["", "VERBOSE Layers:\nEngine Metadata:\n", "VERBOSE Name: but no layer\n"])
def test_no_plan(text: str) -> None:
    plan = read_plan(text.splitlines(), {"a": "int8"})
    assert plan == PlanReport(1, 0, {"a": "not known"}, 0, {}) and not plan.is_float


def test_odd_lines_do_not_break_the_reading() -> None:
    line = "Name: a, LayerType: gemm, Inputs: [ { Name: open, Datatype: Int8"
    other = "Name: b, LayerType: gemm, Inputs: [ { Name: x }], Metadata: [ONNX Layer: b]"
    plan = read_plan([line, other], {"a": "int8", "b": "int8"})
    assert plan.fell_back == {"a": "not found", "b": "none"}


def test_nothing_was_meant() -> None:
    assert not read_plan(FULL.split("\n"), {}).is_float


def _inspected(kind: str, dtype_key: str, dtype: str, *nodes: str) -> dict[str, object]:
    inputs = [{"Name": "x", "Location": "Device", "Dimensions": [1, 8], dtype_key: dtype}]
    return {
        "Name": "n",
        "LayerType": kind,
        "Inputs": inputs,
        "Metadata": "\x1e".join(f"[ONNX Layer: {n}]" for n in nodes),
    }


@pytest.mark.parametrize("dtype_key", ["Format/Datatype", "Datatype"])
def test_the_inspector_s_json(dtype_key: str) -> None:
    """As NVIDIA's trex reads it: {"Layers": [...], "Bindings": [...]}, judged as the text is."""
    layers = [
        _inspected("Reformat", dtype_key, "Row major linear FP32 format", "a"),
        _inspected(
            "CaskConvolution",
            dtype_key,
            "Thirty-two wide channel vectorized row major Int8 format",
            "a",
            "relu",
        ),
        _inspected("gemm", dtype_key, "Half", "b"),
        {"Name": "w", "LayerType": "wait", "Inputs": [], "Metadata": ""},
        {"Name": "s", "LayerType": "Constant"},
    ]
    text = json.dumps({"Layers": layers, "Bindings": ["x"]})
    plan = read_inspector(text, {"a": "int8", "b": "int8", "c": "int8"})
    assert (plan.taken, plan.fell_back) == (1, {"b": "float16", "c": "not found"})
    assert plan.kernels == 3 and plan.types["CaskConvolution"] == 1


@pytest.mark.parametrize("text", ["", "no", "[]", "{}", '{"Layers": 3}', '{"Layers": ["a name alone"]}'])
def test_an_inspector_that_does_not_tell(text: str) -> None:
    assert read_inspector(text, {"a": "int8"}) == PlanReport(1, 0, {"a": "not known"}, 0, {})


def test_memory() -> None:
    lines = [
        "INFO Total Activation Memory: 1 bytes",
        "INFO Total Weights Memory: 4548 bytes",
        "VERBOSE Total Weights Memory of the rest",
        "INFO Total Activation Memory: 8224768 bytes",
    ]
    assert read_memory(lines) == Memory(4548, 8224768)
    assert read_memory([]) == Memory()
    assert Memory(1).or_else(Memory(2, 3)) == Memory(1, 3) and Memory().or_else(Memory(0, 3)) == Memory(0, 3)
