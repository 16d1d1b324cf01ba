"""Shapes: what the rules say is what ONNX Runtime computes; operators and attributes are those of onnx."""

from __future__ import annotations

import random
from typing import Any

import numpy as np
import onnx
import onnxruntime
import onnxruntime.capi.onnxruntime_pybind11_state as onnx_state
import pytest
from onnx import helper, numpy_helper

from ptqd_export.backends.ort_device import share_pool
from ptqd_export.bundle.graph import operators
from ptqd_export.bundle.graph.limits import Limits
from ptqd_export.bundle.graph.onnx_file import FIELD_OF, read_graph
from ptqd_export.bundle.graph.shapes import RULES, check_shapes
from ptqd_export.bundle.graph.sizes import Batch, Shape, Untraceable

LIMITS = Limits(1 << 24, 1 << 26, 1 << 40)
BATCH = 3


def session_of(model: onnx.ModelProto) -> onnxruntime.InferenceSession:
    """On the threads that all sessions of a process share: ONNX Runtime refuses others beside them."""
    share_pool(onnxruntime)
    options = onnxruntime.SessionOptions()
    options.use_per_session_threads = False
    return onnxruntime.InferenceSession(
        model.SerializeToString(), options, providers=["CPUExecutionProvider"]
    )


def shapes_of(model: onnx.ModelProto, **inputs: Shape) -> dict[str, Shape]:
    return check_shapes(read_graph(model.SerializeToString(), 1 << 16), inputs, LIMITS)[0]


def model_of(text: str) -> onnx.ModelProto:
    model = onnx.parser.parse_model(f'<ir_version: 10, opset_import: ["" : 21]> g {text}')
    for node in model.graph.node:  # the parser's own tensors hold their numbers otherwise
        for attribute in node.attribute:
            attribute.ClearField("doc_string")
    for tensor in model.graph.initializer:
        tensor.CopyFrom(onnx.numpy_helper.from_array(onnx.numpy_helper.to_array(tensor), tensor.name))
    return model


def agree(text: str, **inputs: tuple[str, Shape]) -> None:
    """For every batch, if there is one."""
    model = model_of(text)
    del model.graph.output[0].type.tensor_type.shape.dim[:]
    model.graph.output[0].type.tensor_type.ClearField("shape")
    said = None
    bare = onnx.ModelProto.FromString(model.SerializeToString())
    del bare.graph.output[:]
    del bare.graph.input[:]
    said = shapes_of(bare, **{name: shape for name, (_, shape) in inputs.items()})
    session = session_of(model)
    for batch in (1, BATCH):

        def real(shape: Shape, n: int = batch) -> tuple[int, ...]:
            return tuple(int(size.count * n) if isinstance(size, Batch) else size for size in shape)

        feeds = {name: np.ones(real(shape), dtype) for name, (dtype, shape) in inputs.items()}
        for value, array in zip(model.graph.output, session.run(None, feeds), strict=True):
            assert array.shape == real(said[value.name]), (text, batch)


B = Batch(1)
X = {"x": ("float32", (B, 4, 6, 6))}
CASES = [
    "ReduceSum<keepdims = 0>(x, a) <int64[2] a = {1, -1}>",
    "ReduceMax<keepdims = 1>(x, a) <int64[1] a = {2}>",
    "ReduceMean(x)",
    "ReduceMin<noop_with_empty_axes = 1>(x)",
    "ArgMax<axis = 1, keepdims = 0>(x)",
    "GlobalAveragePool(x)",
    "Flatten<axis = 2>(x)",
    "Flatten<axis = 0>(x)",
    "Flatten<axis = -1>(x)",
    "Transpose<perm = [0, 2, 3, 1]>(x)",
    "Transpose(x)",
    "Unsqueeze(x, a) <int64[2] a = {0, -1}>",
    "Reshape(x, a) <int64[3] a = {0, -1, 12}>",
    "Reshape(x, a) <int64[2] a = {-1, 36}>",
    "Reshape<allowzero = 1>(x, a) <int64[3] a = {-1, 4, 36}>",
    "Concat<axis = -1>(x, x, x)",
    "Concat<axis = 0>(x, x)",
    "Expand(x, a) <int64[5] a = {2, 1, 1, 6, 1}>",
    "Tile(x, a) <int64[4] a = {2, 3, 1, 1}>",
    "Pad(x, a) <int64[8] a = {0, 0, 1, 2, 0, 0, 3, -1}>",
    "Pad(x, a, , b) <int64[2] a = {1, 4}, int64[1] b = {-1}>",
    "Resize(x, , a) <float[4] a = {1.0, 1.0, 2.0, 1.5}>",
    "Resize(x, , a) <float[4] a = {1.0, 1.0, 0.7, 0.34}>",
    'Resize<axes = [2, 3], mode = "linear">(x, , , a) <int64[2] a = {9, 5}>',
    'DepthToSpace<blocksize = 2, mode = "CRD">(x)',
    "SpaceToDepth<blocksize = 3>(x)",
    "Gather<axis = 2>(x, a) <int64[2, 2] a = {0, 1, 2, 3}>",
    "Gather<axis = -1>(x, a) <int64 a = {1}>",
    "Slice(x, a, b, c, d) <int64[2] a = {5, 0}, int64[2] b = {-9, 99}, int64[2] c = {2, 1}, "
    "int64[2] d = {-2, 3}>",
    "Slice(x, a, b, a) <int64[1] a = {0}, int64[1] b = {1}>",
    "Slice(x, a, b) <int64[1] a = {0}, int64[1] b = {9223372036854775807}>",
    "Trilu(x)",
    "CumSum(x, a) <int64 a = {1}>",
    "Softmax<axis = 1>(x)",
    "Max(x, a) <float a = {-1.0}>",
    "Sub(x, a) <float[4, 1, 1] a = {1, 2, 3, 4}>",
    "EyeLike(f) <float[3, 5] f = {0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0}>",
    "OneHot<axis = 1>(a, b, c) <int64[2] a = {0, 1}, int64 b = {5}, float[2] c = {0.0, 1.0}>",
    "Shape<start = 1, end = -1>(x)",
    "Size(x)",
    "Range(a, b, c) <int64 a = {7}, int64 b = {-4}, int64 c = {-3}>",
    "Range(a, b, c) <float a = {0.0}, float b = {1.0}, float c = {0.3}>",
    "ConstantOfShape(a) <int64[3] a = {2, 0, 3}>",
    "Constant<value_ints = [1, 2, 3]>()",
    "MatMul(x, a) <float[6] a = {1, 1, 1, 1, 1, 1}>",
    "MatMul(x, x)",
    'Einsum<equation = "bchw,bdhw->bcd">(x, x)',
    "Gemm<transB = 1>(a, b) <float[2, 3] a = {1,1,1,1,1,1}, float[1, 3] b = {1,1,1}>",
    "Where(a, x, x) <bool[1] a = {1}>",
    "Squeeze(a) <float[1, 2, 1] a = {1, 1}>",
    "Squeeze(a, b) <float[1, 2, 1] a = {1, 1}, int64[1] b = {-1}>",
    "MaxPool<kernel_shape = [2, 2], strides = [2, 2]>(x)",
    "GatherND<batch_dims = 0>(x, a) <int64[2, 2] a = {0, 1, 0, 2}>",
    "GatherElements<axis = 3>(f, a) <float[1, 1, 1, 2] f = {1, 1}, int64[1, 1, 1, 3] a = {0, 0, 1}>",
    "LayerNormalization<axis = -1>(x, a) <float[6] a = {1, 1, 1, 1, 1, 1}>",
    "Col2Im<strides = [1, 1]>(a, b, c) <float[1, 4, 1] a = {1, 1, 1, 1}, int64[2] b = {2, 2}, "
    "int64[2] c = {2, 2}>",
]


@pytest.mark.parametrize("case", CASES)
def test_rules_say_what_the_runtime_computes(case: str) -> None:
    call, _, constants = case.partition(" <")
    head = f"<{constants}" if constants else ""
    whole = call.startswith(("Shape", "Size", "ArgMax", "Constant<")) or "int64 a = {7}" in case
    dtype = "int64" if whole else "float"
    agree(f"(float[N, 4, 6, 6] x) => ({dtype}[M] y) {head} {{ y = {call} }}", **X)


def test_several_results() -> None:
    text = """(float[N, 4, 6, 6] x) => (float[A] p, float[B] q, float[C] v, int64[D] i)
        <int64[2] s = {1, 3}, int64[1] k = {2}> {
        p, q = Split<axis = 1>(x, s) v, i = TopK<axis = 2>(x, k) }"""
    model = model_of(text)
    del model.graph.output[:]
    del model.graph.input[:]
    said = shapes_of(model, x=(B, 4, 6, 6))
    assert [said[n] for n in "pqvi"] == [(B, 1, 6, 6), (B, 3, 6, 6), (B, 4, 2, 6), (B, 4, 2, 6)]


def test_sizes_made_of_the_batch_are_followed() -> None:
    """As torch writes a view: the batch, times 4, over 2, joined with constants."""
    agree(
        """(float[N, 4, 6, 6] x) => (float[M] y) 
        <int64[1] four = {4}, int64[1] two = {2}, int64[1] rest = {-1}> {
        b = Shape<start = 0, end = 1>(x) c = Mul(b, four) d = Div(c, two)
        e = Concat<axis = 0>(d, rest) y = Reshape(x, e) }""",
        **X,
    )


@pytest.mark.parametrize("op", ["Conv", "ConvTranspose", "AveragePool", "MaxPool", "Slice"])
def test_windows_of_any_form(op: str) -> None:
    """Sizes, strides, dilations, pads and groups at random; where the runtime refuses, nothing is said."""
    rng, tried = random.Random(0), 0
    for _ in range(60):
        size, k, s, d = rng.randint(3, 9), rng.randint(1, 3), rng.randint(1, 3), rng.randint(1, 2)
        pads, ceil, more = [rng.randint(0, k - 1) for _ in range(4)], rng.randint(0, 1), rng.randint(0, s - 1)
        if op == "Slice":
            a, b = rng.randint(-12, 12), rng.randint(-12, 12)
            step = rng.choice((-2, -1, 1, 3))
            call, head = (
                "Slice(x, a, b, c, d)",
                "".join(f", int64[1] {n} = {{{v}}}" for n, v in zip("abcd", (a, b, 2, step), strict=True)),
            )
        elif "Conv" in op:
            extra = f", output_padding = [{more}, {more}]" if op == "ConvTranspose" else ""
            shape = (4, 2, k, k) if op == "Conv" else (4, 3, k, k)
            call = (
                f"{op}<group = 2, strides = [{s}, {s}], dilations = [{d}, {d}], pads = {pads}{extra}>(x, w)"
            )
            head = f", float{list(shape)} w = {{{', '.join(['1'] * int(np.prod(shape)))}}}"
        else:
            call = (
                f"{op}<kernel_shape = [{k}, {k}], strides = [{s}, {s}], pads = {pads}, ceil_mode = {ceil}>(x)"
            )
            head = ""
        text = f"(float[N, 4, {size}, {size}] x) => (float[M] y) <float one = {{1.0}}{head}> {{ y = {call} }}"
        try:
            agree(text, x=("float32", (B, 4, size, size)))
            tried += 1
        except Untraceable:
            with pytest.raises(Exception, match=r"."):
                session_of(model_of(text))
        except (onnx_state.Fail, onnx_state.InvalidArgument):
            pass  # a window larger than the input
    assert tried > 30


def test_operators_are_those_of_onnx() -> None:
    """Names, and attributes with their types, of opset 21; none holds a subgraph."""
    types: dict[Any, str] = {onnx.defs.OpSchema.AttrType(number): name for number, name in FIELD_OF.items()}
    for op, attributes in operators.DEFAULT.items():
        schema = onnx.defs.get_schema(op, operators.OPSET, "")
        assert not schema.deprecated
        for name, kind in attributes.items():
            assert types[schema.attributes[name].type] == kind, (op, name)
    assert {*operators.DEFAULT} - {"Split"} == RULES.keys() - {operators.ATTENTION}
    assert operators.DEFAULT.keys() >= operators.UPDATE


@pytest.mark.parametrize("kind", ["SUBGRAPH", "STRING", "RANDOM", "SEQUENCE"])
def test_what_is_left_out(kind: str) -> None:
    found = set()
    for schema in onnx.defs.get_all_schemas_with_history():
        if schema.domain or schema.since_version > operators.OPSET:
            continue
        types = [t for c in schema.type_constraints for t in c.allowed_type_strs]
        graphs = any("GRAPH" in str(a.type) for a in schema.attributes.values())
        texts = {t for v in schema.inputs[:1] for t in v.types} == {"tensor(string)"}
        sequences = any(v.type_str.startswith(("seq", "optional")) for v in (*schema.inputs, *schema.outputs))
        wrong = {
            "SUBGRAPH": graphs,
            "STRING": texts,
            "RANDOM": "seed" in schema.attributes,
            "SEQUENCE": sequences or (bool(types) and all(t.startswith(("seq", "optional")) for t in types)),
        }[kind]
        found |= {schema.name} if wrong else set()
    assert found and not found & operators.DEFAULT.keys()
    with pytest.raises(KeyError):
        _ = RULES[min(found)]


def test_helper_makes_what_is_read() -> None:
    node = helper.make_node("Relu", ["x"], ["y"])
    graph = onnx.GraphProto(node=[node])
    assert shapes_of(onnx.ModelProto(graph=graph), x=(B, 2)) == {"x": (B, 2), "y": (B, 2)}


def test_elements_that_are_there_at_one_time() -> None:
    """Counted by hand, per sample: of constants, and what is computed of them, none."""
    weight = numpy_helper.from_array(np.zeros((8, 4), np.int8), "codes")
    scale = numpy_helper.from_array(np.float32(0.5), "scale")
    model = model_of(
        """(float[N, 3, 4] x) => (float[N, 3, 8] y) {
            w = DequantizeLinear(codes, scale)
            t = Transpose<perm = [1, 0]>(w)
            a = Relu(x)
            b = MatMul(a, t)
            c = Sigmoid(b)
            y = Mul(b, c)
        }"""
    )
    model.graph.initializer.extend([weight, scale])
    shapes, most = check_shapes(
        read_graph(model.SerializeToString(), 1 << 16), {"x": (Batch(1), 3, 4)}, LIMITS
    )
    assert shapes["y"] == (Batch(1), 3, 8) and most == 3 * 24  # b, c and y
