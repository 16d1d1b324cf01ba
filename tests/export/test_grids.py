"""What windows, output grids per channel and smoothing look like in graphs, and what ONNX Runtime makes of
them."""

from __future__ import annotations

from collections import Counter
from pathlib import Path

import numpy as np
import onnx
import onnx_ir as ir
import pytest
from onnx import numpy_helper
from torch import nn
from toy import calibrated, emitted, feeds_of, run, session

from ptqd_export.bundle.bundle import WEIGHTS
from ptqd_export.core.backend import Emission
from ptqd_export.core.precision import Precision
from ptqd_export.export import insert_qdq, op_counts, save
from ptqd_export.export.graph import producer, prune

W8A8, W4A8, W4A4 = Precision(8, 8), Precision(4, 8), Precision(4, 4)
CALLS = 5
"""Of the toy's convs."""


def ops(model: ir.Model) -> Counter[str]:
    return Counter(node.op_type for node in model.graph)


def test_grids_about_zero_are_written_as_such(toy: nn.Module, base: ir.Model) -> None:
    """No Sub, no Mul, no map and no zero point: the half graph is the portable one."""
    network = calibrated(toy, W4A4, plain=True)
    portable, half = (insert_qdq(base, network, e) for e in (Emission.PORTABLE, Emission.HALF))
    assert [(n.op_type, n.name) for n in portable.graph] == [(n.op_type, n.name) for n in half.graph]
    assert set(ops(portable) - ops(base)) == {
        "QuantizeLinear", "DequantizeLinear", "Clip", "MatMul", "Add",
    }  # fmt: skip
    for node in portable.graph:
        if node.op_type == "QuantizeLinear":
            zero = node.inputs[2]
            assert zero is not None and zero.const_value is not None and not zero.const_value.numpy().any()
    # The test can fail: windows and smoothing need more.
    uneven = calibrated(toy, W4A4)
    assert {"Mul"} <= set(ops(insert_qdq(base, uneven, Emission.PORTABLE)) - ops(portable))
    assert {"Mul", "Sub"} <= set(ops(insert_qdq(base, uneven, Emission.HALF)) - ops(portable))
    native = insert_qdq(base, uneven, Emission.ORT_CPU)
    assert {"Reshape"} <= set(ops(native) - ops(base)) and ops(native)["Mul"] == ops(base)["Mul"]


def optimised(model: ir.Model, folder: Path) -> Path:
    """The graph as ONNX Runtime runs it."""
    folder.mkdir()
    save({"q": model}, folder, WEIGHTS)
    session(folder / "q.onnx", folder / "optimised.onnx")
    return folder / "optimised.onnx"


def axes(file: Path) -> list[int]:
    """Of every QuantizeLinear and DequantizeLinear that has a vector of scales."""
    model = onnx.load(file)
    sizes = {t.name: numpy_helper.to_array(t).size for t in model.graph.initializer}
    return [
        next((a.i for a in node.attribute if a.name == "axis"), 1)
        for node in model.graph.node
        if node.op_type in ("QuantizeLinear", "DequantizeLinear") and sizes[node.input[1]] > 1
    ]


def bare(model: ir.Model) -> ir.Model:
    """The graph without the Reshapes about vectors of scales."""
    copy = model.clone()
    for node in list(copy.graph):
        if node.op_type not in ("QuantizeLinear", "DequantizeLinear"):
            continue
        before, after = producer(node.inputs[0], "Reshape"), list(node.outputs[0].consumers())
        if before is None or len(after) != 1 or after[0].op_type != "Reshape":
            continue
        node.replace_input_with(0, before.inputs[0])
        last = after[0].outputs[0]
        node.outputs[0].shape = last.shape
        last.replace_all_uses_with(node.outputs[0], replace_graph_outputs=True)
    return prune(copy)


@pytest.mark.parametrize("precision", [W8A8, W4A8, W4A4], ids=str)
def test_onnx_runtime_fuses_every_conv_and_keeps_channels_in_front(
    toy: nn.Module, base: ir.Model, precision: Precision, tmp_path: Path
) -> None:
    """Scales along another axis than the second are those of a graph that was laid out channels last, with
    kernels that are many times slower: what becomes of the same graph without its Reshapes."""
    network = calibrated(toy, precision)
    graph = emitted(base, network, Emission.ORT_CPU)
    file = optimised(graph, tmp_path / "ours")
    counts = op_counts(file)
    assert counts["QLinearConv"] == CALLS and "Conv" not in counts
    found = axes(file)
    # An output of each conv; and the input of each smoothed one, of which `grouped` is none.
    assert found == [1] * (2 * CALLS - 1)
    without = bare(graph)
    assert ops(graph)["Reshape"] - ops(without)["Reshape"] == 2 * len(found)
    file = optimised(without, tmp_path / "bare")
    assert op_counts(file)["QLinearConv"] == CALLS and set(axes(file)) != {1}
    # Both compute the same.
    feeds = feeds_of(2)
    ours, theirs = (next(iter(run(tmp_path / name / "q.onnx", feeds).values())) for name in ("ours", "bare"))
    np.testing.assert_allclose(ours, theirs, atol=1e-4 * np.abs(ours).max())
