"""Quantized graphs: containers, sharing, names, and what is refused; the forms for FP8 and for weights
alone."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import numpy as np
import onnx_ir as ir
import onnxruntime
import pytest
from torch import nn
from toy import (
    FLOAT32,
    HALVED,
    PRECISIONS,
    calibrated,
    emitted,
    feeds_of,
    forward,
    graph_of,
    layers_of,
    rms,
    run,
    schedule_of,
    session,
)

from ptqd_export.bundle.bundle import WEIGHTS
from ptqd_export.core.backend import Emission
from ptqd_export.core.precision import FP32, Precision
from ptqd_export.core.quant import QuantizedNetwork
from ptqd_export.errors import GraphError
from ptqd_export.export import calls, fold, insert_qdq, lint, lower, op_counts, quantized_nodes, save

FP8, W4A16, W8A16 = Precision(8, 8, "fp8"), Precision(4, 16), Precision(8, 16)


@pytest.mark.parametrize("emission", FLOAT32)
def test_quantized_graphs_are_close_to_float_and_closer_with_more_bits(
    toy: nn.Module, base: ir.Model, emission: Emission
) -> None:
    exact = forward(toy, feeds_of(3))
    errors = [
        rms(run(insert_qdq(base, calibrated(toy, p), emission), feeds_of(3))["output"] - exact) / rms(exact)
        for p in PRECISIONS
    ]
    assert 0 < errors[0] < 0.1 and errors[0] < errors[1] < errors[2] < 1


def test_bits_and_containers(toy: nn.Module, base: ir.Model) -> None:
    network = calibrated(toy, Precision(4, 4))
    grids = {layer.input for layer in network.layers.values() if layer.input and layer.activation_bits == 4}
    assert len({grid.lo for grid in grids}) > 1
    for emission, dtype in (
        (Emission.PORTABLE, np.int8),
        (Emission.ORT_CPU, np.uint8),
        (Emission.HALF, np.int8),
    ):
        graph = insert_qdq(base, network, emission).graph
        clips = [n for n in graph if n.op_type == "Clip"]
        limits = {
            tuple(int(v.const_value.numpy()) for v in n.inputs[1:] if v and v.const_value) for n in clips
        }
        points = {grid: grid.zero_point(dtype) for grid in grids}
        assert limits == {(zero + grid.lo, zero + grid.hi) for grid, zero in points.items()}
        zeros = [
            n.inputs[2].const_value.numpy()
            for n in graph
            if n.op_type == "QuantizeLinear" and n.inputs[2] and n.inputs[2].const_value
        ]
        assert {zero.dtype for zero in zeros} == {np.dtype(dtype)}
        # Windows of 4 bits fit into int8 as they are; those of the first and last conv, at 8 bits, do not.
        assert all((zero == 0).all() for zero in zeros) == (emission is Emission.HALF)
        narrow = [layer for layer in network.layers.values() if layer.activation_bits == 4]
        assert (
            0 < len(clips) <= len(narrow) + 1
        )  # to_q, to_k and to_v see one value; one conv is called twice
        assert all(np.abs(layer.weight).max() <= 8 for layer in narrow)
        assert all(grid.zero_point(np.int8) == 0 for grid in grids)


def test_one_value_is_quantized_once(toy: nn.Module, base: ir.Model) -> None:
    graph = insert_qdq(base, calibrated(toy, Precision(8, 8)), Emission.PORTABLE).graph
    quantized = [n.inputs[0].name for n in graph if n.op_type == "QuantizeLinear" and n.inputs[0]]
    assert len(quantized) == len(set(quantized))
    assert len(
        [n for n in graph if n.op_type in ("Conv", "MatMul") and "ptqd.layer" in n.metadata_props]
    ) > len(quantized)


def test_base_is_left_alone(toy: nn.Module, base: ir.Model) -> None:
    before = ir.to_proto(base).SerializeToString(deterministic=True)
    graph = insert_qdq(base, calibrated(toy, Precision(4, 4)), Emission.ORT_CPU)
    fold(lower(graph, Emission.ORT_CPU, Precision(4, 4)), schedule_of(), HALVED)
    lower(base, Emission.HALF, Precision(16, 16))
    assert ir.to_proto(base).SerializeToString(deterministic=True) == before


def test_a_layer_that_the_graph_lacks_is_named(toy: nn.Module, base: ir.Model) -> None:
    network = calibrated(toy, Precision(8, 8))
    ghost = dataclasses.replace(network.layers["twice"], name="down.ghost")
    with pytest.raises(GraphError, match=r"'down\.ghost' is not in the exported graph"):
        insert_qdq(
            base,
            QuantizedNetwork(network.precision, {**network.layers, "down.ghost": ghost}),
            Emission.PORTABLE,
        )
    swapped = dataclasses.replace(network.layers["grouped"], name="twice")
    with pytest.raises(GraphError, match="'twice' has weight codes of shape"):
        insert_qdq(base, QuantizedNetwork(network.precision, {"twice": swapped}), Emission.PORTABLE)


def test_float_network_is_the_base(base: ir.Model) -> None:
    same = insert_qdq(base, QuantizedNetwork(FP32, {}), Emission.ORT_CPU)
    assert ir.to_proto(same).SerializeToString(deterministic=True) == ir.to_proto(base).SerializeToString(
        deterministic=True
    )


@pytest.mark.parametrize("precision", [FP8, W4A16, W8A16], ids=str)
def test_ort_cpu_optimised_computes_the_portable_numbers(
    toy: nn.Module, base: ir.Model, precision: Precision, tmp_path: Path
) -> None:
    """Float sums in another order: 1e-5 of the largest value, but where one of the 4000 inputs of FP8 rounds
    the other way (6 % of it)."""
    portable, ours = (graph_of(toy, base, precision, e) for e in (Emission.PORTABLE, Emission.ORT_CPU))
    save({"q": ours}, tmp_path, WEIGHTS)
    for n in (1, 3):
        exact = run(portable, feeds_of(n), optimise=False)["output"]
        difference = np.abs(run(tmp_path / "q.onnx", feeds_of(n))["output"] - exact) / np.abs(exact).max()
        assert (difference > 1e-5).mean() < (0.02 if precision == FP8 else 1e-9) and difference.max() < 0.01
    session(tmp_path / "q.onnx", tmp_path / "optimised.onnx")
    ops = op_counts(tmp_path / "optimised.onnx")
    assert not {"MatMulIntegerToFloat", "MatMulNBits", "QLinearConv", "DequantizeLinear"} & set(ops)
    assert calls(tmp_path / "q.onnx").integer_convs == 0 and quantized_nodes(tmp_path / "q.onnx") == {}


def test_onnx_runtime_would_break_the_portable_forms(toy: nn.Module, base: ir.Model) -> None:
    """Why ORT_CPU has forms of its own: if this fails, onnxruntime's defaults have learned them, and they can
    go."""
    portable, feeds = graph_of(toy, base, W8A16, Emission.PORTABLE), feeds_of(1)
    exact = run(portable, feeds, optimise=False)["output"]
    with pytest.raises(Exception, match="MatMulIntegerToFloat"):
        default_session(graph_of(toy, base, FP8, Emission.PORTABLE))
    loaded = default_session(portable)
    got = loaded.run(None, {i.name: feeds[i.name] for i in loaded.get_inputs()})[0]
    assert rms(got - exact) > 1e-4 * rms(exact)


def default_session(model: ir.Model) -> onnxruntime.InferenceSession:
    """ONNX Runtime as it comes, but for the thread pool, which is the one that OrtEngine made for the
    process."""
    options = onnxruntime.SessionOptions()
    options.use_per_session_threads = False
    options.log_severity_level = 4
    return onnxruntime.InferenceSession(
        ir.to_proto(model).SerializeToString(), options, providers=["CPUExecutionProvider"]
    )


@pytest.mark.parametrize("emission", list(Emission))
def test_more_bits_are_closer_to_float(toy: nn.Module, base: ir.Model, emission: Emission) -> None:
    """Weights in 8 bits are closer than in 4, without quantized inputs closer than with them (which saturate
    here), and INT8 closer than FP8."""
    exact = run(base, feeds_of(3), optimise=False)["output"]
    native = emission is Emission.ORT_CPU
    order = [W8A16, W4A16, Precision(8, 8), FP8]
    errors = [
        rms(run(graph_of(toy, base, p, emission), feeds_of(3), optimise=native)["output"] - exact)
        / rms(exact)
        for p in order
    ]
    assert 0 < errors[0] < errors[1] < errors[2] < errors[3] < 0.2


@pytest.mark.parametrize("emission", [Emission.PORTABLE, Emission.HALF])
def test_containers(toy: nn.Module, base: ir.Model, emission: Emission) -> None:
    for precision, weights, inputs in (
        (FP8, {ir.DataType.FLOAT8E4M3FN}, {ir.DataType.FLOAT8E4M3FN}),
        (W4A16, {ir.DataType.INT4, ir.DataType.INT8}, set()),  # first and last conv have 8 bits
        (W8A16, {ir.DataType.INT8}, set()),
        (Precision(4, 8), {ir.DataType.INT8}, {ir.DataType.INT8}),
    ):
        graph = graph_of(toy, base, precision, emission)
        lint(graph, emission)
        assert graph.opset_imports[""] == 21
        assert {n.outputs[0].dtype for n in graph.graph if n.op_type == "QuantizeLinear"} == inputs
        codes = [
            n.inputs[0]
            for n in graph.graph
            if n.op_type == "DequantizeLinear" and n.inputs[0] is not None and n.inputs[0].is_initializer()
        ]
        assert {v.dtype for v in codes} == weights
        packed = {str(v.name) for v in codes if v.dtype is ir.DataType.INT4}
        assert ("grouped.weight.codes" in packed) == (
            precision == W4A16
        ) and "conv_in.weight.codes" not in packed


@pytest.mark.parametrize("precision", [Precision(8, 8), FP8, W4A16], ids=str)
@pytest.mark.parametrize("emission", list(Emission))
def test_layers_are_called_by_their_module_paths(
    toy: nn.Module, base: ir.Model, emission: Emission, precision: Precision
) -> None:
    graph = fold(graph_of(toy, base, precision, emission), schedule_of(), HALVED)
    names = [n.name for n in graph.graph]
    assert len(names) == len(set(names))
    layers = {
        n.name for n in graph.graph if "ptqd.layer" in n.metadata_props and n.op_type in ("Conv", "MatMul")
    }
    assert layers == {*layers_of(toy), "twice.2"}


@pytest.mark.parametrize("precision", [Precision(8, 8), FP8, W4A16], ids=str)
def test_one_weight_scale_is_a_scalar(toy: nn.Module, base: ir.Model, precision: Precision) -> None:
    """A vector of equal values would still be per channel to TensorRT."""
    network = calibrated(toy, precision)
    single = {
        n: dataclasses.replace(layer, weight_scale=np.full_like(layer.weight_scale, 0.01))
        for n, layer in network.layers.items()
    }
    for emission, dims in (
        (Emission.PORTABLE, 0),
        (Emission.HALF, 0),
        *([(Emission.ORT_CPU, 1)] if precision == Precision(8, 8) else []),
    ):
        for layers, expected in ((single, dims), (network.layers, 1)):
            graph = emitted(base, dataclasses.replace(network, layers=layers), emission)
            lint(graph, emission)
            scales = {
                v.name: v.const_value
                for v in graph.graph.initializers.values()
                if str(v.name).endswith(".weight.scale")
            }

            assert {np.asarray(scale.numpy()).ndim for scale in scales.values()} == {expected}
