"""export.half: types by onnx.checker, numbers against the float32 graph within what float16 rounds, and what
must stay float32."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import numpy as np
import onnx
import onnx_ir as ir
import pytest
from torch import nn
from toy import (
    calibrated,
    correction_of,
    emitted,
    feeds_of,
    graph_of,
    layers_of,
    rms,
    run,
    schedule_of,
    simulate,
)

from ptqd_export.bundle.bundle import WEIGHTS
from ptqd_export.core.backend import Emission
from ptqd_export.core.precision import FP32, Precision
from ptqd_export.core.quant import Grid, LayerQuant
from ptqd_export.errors import GraphError
from ptqd_export.export import fold, insert_qdq, layer_sites, lint, lower, quantized_nodes, save
from ptqd_export.export.dialect import LAYER_INPUT
from ptqd_export.export.graph import with_outputs
from ptqd_export.export.half import halve, to_half

ULP = 2.0**-11
"""Largest relative rounding error of float16."""
FP16 = Precision(16, 16)
QUANTIZED = [Precision(8, 8), Precision(4, 4), Precision(8, 8, "fp8"), Precision(4, 16)]


def parse(text: str, opset: int = 21) -> ir.Model:
    """A model of one graph in ONNX text, its value types inferred."""
    model = onnx.parser.parse_model(f'<ir_version: 10, opset_import: ["" : {opset}]> {text}')
    return ir.from_proto(onnx.shape_inference.infer_shapes(model, check_type=True, strict_mode=True))


def checked(model: ir.Model) -> ir.Model:
    """The model, after onnx.checker has checked that every operator gets the types it takes and every value
    has the type it is said to have."""
    onnx.checker.check_model(ir.to_proto(model), full_check=True)
    return model


def types(model: ir.Model) -> dict[str, ir.DataType]:
    """Types of the outputs of every node, by the operator that yields them."""
    return {
        f"{node.op_type}": value.dtype
        for node in model.graph
        for value in node.outputs
        if value.dtype is not None
    }


# --- whole networks


def test_fp16_computes_in_half_and_is_close(base: ir.Model) -> None:
    """ONNX Runtime's CPU computes single operators in float32 and leaves out some of the roundings between.
    The error of a chain of n roundings grows like sqrt(n): 60 nodes give 8 roundings' worth; some are
    amplified by the normalisation."""
    half = checked(lower(base, Emission.HALF, FP16))
    assert [(v.name, v.dtype) for v in half.graph.outputs] == [("output", ir.DataType.FLOAT)]
    assert {v.name: v.dtype for v in half.graph.inputs} == {v.name: v.dtype for v in base.graph.inputs}
    assert {
        n.outputs[0].dtype for n in half.graph if n.op_type in ("Conv", "GroupNormalization", "Softmax")
    } == {ir.DataType.FLOAT16}
    for n in (1, 3):
        exact = run(base, feeds_of(n), optimise=False)["output"]
        error = rms(run(half, feeds_of(n), optimise=False)["output"] - exact) / rms(exact)
        assert ULP / 100 < error < 8 * ULP, error


def test_only_the_half_emission_is_half_and_fp32_never(base: ir.Model) -> None:
    for precision, emission in ((FP32, Emission.HALF), (FP16, Emission.PORTABLE), (FP16, Emission.ORT_CPU)):
        assert not any(
            v.dtype is ir.DataType.FLOAT16 for n in lower(base, emission, precision).graph for v in n.outputs
        )


def test_the_embedding_of_the_timestep_stays_float32(base: ir.Model) -> None:
    half = lower(base, Emission.HALF, FP16)
    embedding = {
        n.op_type: n.outputs[0].dtype for n in half.graph if n.op_type in ("Sin", "Cos", "Gather", "Sigmoid")
    }
    assert embedding["Sin"] is embedding["Cos"] is ir.DataType.FLOAT
    gemms = {
        n.outputs[0].dtype for n in half.graph if n.metadata_props.get("ptqd.layer", "").startswith("time.")
    }
    assert gemms == {ir.DataType.FLOAT}


@pytest.mark.parametrize("precision", QUANTIZED, ids=str)
def test_every_layer_of_the_half_graph_equals_its_definition(
    toy: nn.Module, base: ir.Model, precision: Precision, tmp_path: Path
) -> None:
    """On the float16 graph's own inputs: input and weight of a product are rounded once each and the result
    once, so that an output is within 3 ULP of sum |w| |x| + |b|, the bias rounded as well (4 with the sum of
    a bias Add). Where x is moved by m, the product is of x - m, and W m is added."""
    network = calibrated(toy, precision)
    graph = checked(emitted(base, network, Emission.HALF))
    sites = layer_sites(graph)
    assert set(sites) == set(network.layers)
    values = run(
        with_outputs(graph, dict.fromkeys(v for pair in sites.values() for v in pair)),
        feeds_of(3),
        optimise=False,
    )
    for name, (source, target) in sites.items():
        layer, module = network.layers[name], layers_of(toy)[name]
        if not layer.weight_only:
            assert values[source].dtype == np.float32, name
        assert _share_outside(layer, module, values[source], values[target]) == 0, name
        wrong = values[target] * np.float32(1.01) + np.float32(
            0.01 * np.abs(values[target].astype(np.float32)).max()
        )
        assert _share_outside(layer, module, values[source], wrong) > 0, name  # the bound can be broken


def _share_outside(layer: LayerQuant, module: nn.Module, x: np.ndarray, got: np.ndarray) -> float:
    x = x.astype(np.float32)
    wanted = simulate(layer, module, Emission.PORTABLE, x)
    weight = layer.weight & 127 if layer.number == "fp8" else np.abs(layer.weight.astype(np.int16))
    sizes = dataclasses.replace(layer, weight=weight, bias=None if layer.bias is None else np.abs(layer.bias))
    moved, grid = 0.0, layer.input
    if grid is not None and layer.number == "int":
        moved = 2 * abs(grid.zero_point(np.int8)) * grid.scale
        sizes = dataclasses.replace(sizes, input=Grid(grid.scale, 0, max(-grid.lo, grid.hi)))
    moved = moved * np.abs(weight.astype(np.float64)).reshape(len(weight), -1).sum(1) * layer.weight_scale
    if layer.kind == "conv":
        moved = np.reshape(moved, (-1, 1, 1))
    bound = 4 * ULP * (simulate(sizes, module, Emission.PORTABLE, np.abs(x)) + moved) + 2.0**-24
    return float((np.abs(got.astype(np.float64) - wanted) > bound).mean())


@pytest.mark.parametrize("precision", QUANTIZED, ids=str)
def test_fold_takes_a_half_graph_and_keeps_its_tables_in_float32(
    toy: nn.Module, base: ir.Model, precision: Precision
) -> None:
    graph = graph_of(toy, base, precision, Emission.HALF)
    schedule = schedule_of("v_prediction")
    correction = correction_of(np.full((3, 2), 0.5), np.full((3, 2), 1e-6))
    folded = fold(graph, schedule, correction)
    lint(folded, Emission.HALF)
    assert {
        v.dtype
        for n in folded.graph
        if str(n.outputs[0].name).startswith("ptqd.")
        for v in n.outputs
        if n.op_type != "QuantizeLinear"
    } == {ir.DataType.FLOAT}
    feeds = feeds_of(2)
    raw = run(graph, feeds, optimise=False)["output"]
    alpha, sigma = np.sqrt(schedule.alphas_cumprod[0]), np.sqrt(1 - schedule.alphas_cumprod[0])
    wanted = 0.5 * (alpha * raw + sigma * feeds["sample"]) + 1e-6
    got = run(folded, feeds, optimise=False)["epsilon"]
    np.testing.assert_allclose(got, wanted, rtol=1e-6, atol=1e-6)
    # The test can fail: tables in float16 would be off by some 2^-12.
    assert np.abs(wanted * (1 + 2.0**-12) - got).max() > 1e-6 * (1 + np.abs(wanted).max())


def test_eight_bit_nodes_are_the_same_in_half(toy: nn.Module, base: ir.Model, tmp_path: Path) -> None:
    for precision, code in ((Precision(4, 8), "int8"), (Precision(8, 8, "fp8"), "fp8")):
        portable = insert_qdq(base, calibrated(toy, precision), Emission.PORTABLE)
        half = graph_of(toy, base, precision, Emission.HALF)
        assert (
            quantized_nodes(portable)
            == quantized_nodes(half)
            == {name: code for name in (*layers_of(toy), "twice.2")}
        )
        save({"q": half}, tmp_path, WEIGHTS)
        assert quantized_nodes(tmp_path / "q.onnx") == quantized_nodes(half)
    lone = insert_qdq(base, calibrated(toy, Precision(4, 16)), Emission.HALF)
    assert quantized_nodes(lone) == {} == quantized_nodes(base)


# --- single rules


def test_casts_to_float_in_a_half_region_become_casts_to_half() -> None:
    text = """g (float[N, 4] x, int64[N] i) => (float[N, 4] y) <int64[1] one = {1}> {
        a = Cast<to = 1>(x) b = Relu(a) j = Cast<to = 1>(i) k = Unsqueeze(j, one) y = Add(b, k) }"""
    graph = checked(halve(parse(text)))
    by_name = {v.name: v.dtype for n in graph.graph for v in n.outputs}
    assert by_name["a"] is by_name["b"] is by_name["y.half"] is ir.DataType.FLOAT16
    assert (
        by_name["j"] is by_name["k"] is by_name["y"] is ir.DataType.FLOAT
    )  # an integer is brought to float32 until it meets the sample


def test_an_integer_made_of_the_sample_is_made_of_the_sample() -> None:
    """Cast(x, int64) of a graph input reads the float32 input: 4097 is no float16."""
    model = parse("g (float[N, 4] x) => (float[N, 4] y, int64[N, 4] i) { i = Cast<to = 7>(x) y = Relu(x) }")
    x = np.full((1, 4), 4097.0, np.float32)
    assert run(checked(halve(model)), {"x": x}, optimise=False)["i"].max() == 4097


def test_constant_nodes_and_initializers_are_stored_in_half() -> None:
    text = """g (float[N, 4] x) => (float[N, 4] y) <float[1] big = {1e30}, float[1] low = {-1e30}> {
        c = Constant<value = float[1] {2.5}>() a = Mul(x, c) b = Min(a, big) d = Max(b, low) y = Add(d, c)
        }"""
    graph = checked(halve(parse(text)))
    assert not [n for n in graph.graph if n.op_type == "Constant"]
    assert sum(n.op_type == "Cast" for n in graph.graph) == 2  # x once, y once
    x = np.array([[1, -2, 3, 60000]], np.float32)
    y = run(graph, {"x": x}, optimise=False)["y"]
    np.testing.assert_allclose(y, np.minimum(2.5 * x, 65504) + 2.5, rtol=2 * ULP)
    assert np.isfinite(y).all()
    np.testing.assert_array_equal(to_half(np.array([np.inf, -np.inf, 1e9, 1.0])), [np.inf, -np.inf, 65504, 1])


def test_scales_of_resize_stay_float32() -> None:
    text = """g (float[N, 2, 4, 4] x) => (float[N, 2, 8, 8] y) <float[4] s = {1.0, 1.0, 2.0, 2.0}> {
        y = Resize<mode = "nearest">(x, , s) }"""
    graph = checked(halve(parse(text)))
    node = next(n for n in graph.graph if n.op_type == "Resize")
    assert [None if v is None else v.dtype for v in node.inputs] == [
        ir.DataType.FLOAT16,
        None,
        ir.DataType.FLOAT,
    ]
    x = np.arange(32, dtype=np.float32).reshape(1, 2, 4, 4)
    np.testing.assert_array_equal(run(graph, {"x": x}, optimise=False)["y"], x.repeat(2, 2).repeat(2, 3))


def test_an_output_that_is_an_input_is_left_alone() -> None:
    graph = checked(
        halve(parse("g (float[N, 4] x, float[N, 4] z) => (float[N, 4] x, float[N, 4] y) { y = Relu(x) }"))
    )
    assert [(v.name, v.dtype) for v in graph.graph.outputs] == [
        ("x", ir.DataType.FLOAT),
        ("y", ir.DataType.FLOAT),
    ]
    x = np.full((1, 4), 1.0 + 2.0**-20, np.float32)
    out = run(graph, {"x": x, "z": x}, optimise=False)
    np.testing.assert_array_equal(out["x"], x)
    np.testing.assert_allclose(out["y"], x, rtol=ULP)


def test_sums_and_powers_stay_float32_until_they_meet_the_sample() -> None:
    """A root-mean-square normalisation of values near 1000, whose squares float16 cannot hold."""
    text = """g (float[N, 8] x) => (float[N, 8] y) <float two = {2.0}, int64[1] axes = {1}, float tiny =
    {1e-12}> {
        s = Pow(x, two) m = ReduceMean<keepdims = 1>(s, axes) e = Add(m, tiny) r = Sqrt(e) y = Div(x, r) }"""
    graph = checked(halve(parse(text)))
    dtypes = types(graph)
    assert (
        all(dtypes[op] is ir.DataType.FLOAT for op in ("Pow", "ReduceMean", "Add", "Sqrt"))
        and dtypes["Div"] is ir.DataType.FLOAT16
    )
    x = np.random.default_rng(0).uniform(500, 1500, (2, 8)).astype(np.float32)
    exact = x / np.sqrt((x.astype(np.float64) ** 2).mean(1, keepdims=True))
    np.testing.assert_allclose(
        run(graph, {"x": x}, optimise=False)["y"], exact, rtol=4 * ULP
    )  # x, r and the quotient are rounded, r twice


def test_a_value_serves_half_and_float_takers() -> None:
    """The quantizer reads float32, the Add float16: one Cast each, whoever else takes the value."""
    text = """g (float[N, 4] x) => (float[N, 4] y) <float s = {0.5}, int8 z = {0}> {
        a = Relu(x) q = QuantizeLinear(a, s, z) d = DequantizeLinear(q, s, z) b = Add(a, d)
        q2 = QuantizeLinear(a, s, z) d2 = DequantizeLinear(q2, s, z) c = Add(b, d2) y = Mul(c, d) }"""
    graph = checked(halve(parse(text)))
    casts = [
        (n.inputs[0].name, n.outputs[0].dtype) for n in graph.graph if n.op_type == "Cast" and n.inputs[0]
    ]
    assert sorted(map(str, casts)) == sorted(
        map(
            str,
            [
                ("x", ir.DataType.FLOAT16),
                ("a", ir.DataType.FLOAT),
                ("d", ir.DataType.FLOAT16),
                ("d2", ir.DataType.FLOAT16),
                ("y.half", ir.DataType.FLOAT),
            ],
        )
    )
    x = np.array([[0.1, 0.3, 1.2, 3.0]], np.float32)
    d = np.rint(x / 0.5) * 0.5
    np.testing.assert_allclose(run(graph, {"x": x}, optimise=False)["y"], (x + 2 * d) * d, rtol=5 * ULP)


def test_shape_arithmetic_is_left_alone() -> None:
    text = """g (float[N, 4] x) => (float[M, 4] y) <float third = {0.25}, int64[1] four = {4}> {
        s = Shape<end = 1>(x) f = Cast<to = 1>(s) h = Mul(f, third) i = Cast<to = 7>(h) j = Mul(i, four)
        k = Concat<axis = 0>(j, four) y = Reshape(x, k) }"""
    graph = checked(halve(parse(text)))
    x = np.zeros((8196, 4), np.float32)  # 8196 is no float16
    assert run(graph, {"x": x}, optimise=False)["y"].shape == (8196, 4)


def test_control_flow_and_foreign_operators_are_refused() -> None:
    branch = """g (float[N] x, bool c) => (float[N] y) {
        y = If(c) <then_branch = t () => (float[N] a) { a = Relu(x) }, else_branch = e () => (float[N] b) { b
        = Neg(x) }> }"""
    with pytest.raises(GraphError, match=r"If .* holds a subgraph"):
        halve(parse(branch))
    model = parse("g (float[N] x) => (float[N] y) { y = Relu(x) }")
    model.graph[0].op_type, model.graph[0].domain = "Gelu", "com.microsoft"
    with pytest.raises(GraphError, match=r"com\.microsoft::Gelu .* is not an ONNX operator"):
        halve(model)


def test_halving_leaves_the_original_alone(toy: nn.Module, base: ir.Model) -> None:
    graph = insert_qdq(base, calibrated(toy, Precision(4, 4)), Emission.HALF)
    before = ir.to_proto(graph).SerializeToString(deterministic=True)
    halve(graph)
    assert ir.to_proto(graph).SerializeToString(deterministic=True) == before


@pytest.mark.parametrize("plain", [False, True], ids=["windows", "about zero"])
def test_layers_with_windows_and_smoothing_are_half_too(toy: nn.Module, base: ir.Model, plain: bool) -> None:
    """What prepares an input for its codes is float32, as they are; what takes the codes is float16."""
    graph = checked(emitted(base, calibrated(toy, Precision(8, 8), plain=plain), Emission.HALF)).graph
    prepares = [n for n in graph if LAYER_INPUT in n.metadata_props and n.op_type in ("Mul", "Sub")]
    assert all(n.outputs[0].dtype is ir.DataType.FLOAT for n in prepares)
    ops = {n.op_type for n in prepares}
    assert ops == (set() if plain else {"Mul", "Sub"})
    convs = {n.name: n.outputs[0].dtype for n in graph if n.op_type == "Conv"}
    assert len(convs) == 5 and set(convs.values()) == {ir.DataType.FLOAT16}


def test_a_single_quantized_layer_leaves_the_rest_half(toy: nn.Module, base: ir.Model) -> None:
    network = calibrated(toy, Precision(8, 8)).only(["grouped"])
    graph = checked(emitted(base, network, Emission.HALF))
    assert quantized_nodes(graph) == {"grouped": "int8"} and list(layer_sites(graph)) == ["grouped"]
