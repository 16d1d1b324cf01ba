"""Every kind of wrong graph is refused, by the check that is for it; the right one is not."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from onnx import numpy_helper

from ptqd_export.calibrate import TorchEngine, measure, simulate
from ptqd_export.core.backend import Emission
from ptqd_export.core.noise import NoiseStats
from ptqd_export.errors import ParityError
from ptqd_export.parity import gate
from ptqd_export.parity.gate import judge_graph

Case = Any
"""That of conftest."""
LAYER = "down_blocks.1.resnets.0.conv1"
CPU, PORTABLE, HALF = Emission.ORT_CPU, Emission.PORTABLE, Emission.HALF


class Graph:
    """A graph that holds its weights, to be spoilt."""

    def __init__(self, path: Path) -> None:
        self.model = onnx.load(path)
        self.made = {name: node for node in self.model.graph.node for name in node.output}
        self.constants = {tensor.name: tensor for tensor in self.model.graph.initializer}
        (self.conv,) = [node for node in self.model.graph.node if node.name == LAYER]

    def up(self, name: str, *ops: str) -> onnx.NodeProto:
        """The nearest node of one of these operators on the way up from a value."""
        node = self.made[name]
        return node if node.op_type in ops else self.up(node.input[0], *ops)

    def change(self, name: str, change: Callable[[Any], Any]) -> None:
        """Change a constant, for all that read it."""
        tensor = self.constants[name]
        array = numpy_helper.to_array(tensor).copy()
        tensor.CopyFrom(numpy_helper.from_array(np.asarray(change(array)).astype(array.dtype), name))

    def change_here(self, node: onnx.NodeProto, i: int, change: Callable[[Any], Any]) -> None:
        """Change a constant for one node alone."""
        copy = onnx.TensorProto()
        copy.CopyFrom(self.constants[node.input[i]])
        node.input[i] = copy.name = f"{copy.name}.spoilt"
        self.model.graph.initializer.append(copy)
        self.constants[copy.name] = self.model.graph.initializer[-1]
        self.change(copy.name, change)


def scale(factor: float) -> Callable[[Graph], None]:
    def spoil(graph: Graph) -> None:
        graph.change(graph.up(graph.conv.input[0], "QuantizeLinear").input[1], lambda s: s * factor)

    return spoil


def one_code(graph: Graph) -> None:
    """A single weight code of the layer, by one step."""

    def change(codes: Any) -> Any:
        codes[3, 2, 1, 1] += 1 if codes[3, 2, 1, 1] < 0 else -1
        return codes

    graph.change(graph.up(graph.conv.input[1], "DequantizeLinear").input[0], change)


def bias(graph: Graph) -> None:
    del graph.conv.input[2:]


def clip(graph: Graph) -> None:
    """The upper bound of the codes: behind a SiLU none reaches the lower one."""
    graph.change_here(graph.up(graph.conv.input[0], "Clip"), 2, lambda code: code.astype(int) - 1)


def in_float(graph: Graph) -> None:
    graph.conv.input[0] = graph.up(graph.conv.input[0], "QuantizeLinear").input[0]


def zero_point(graph: Graph) -> None:
    graph.change_here(graph.up(graph.conv.input[0], "DequantizeLinear"), 2, lambda zero: zero.astype(int) - 1)


def output_scale(graph: Graph) -> None:
    (quantizer,) = [n for n in graph.model.graph.node if n.input and n.input[0] == graph.conv.output[0]]
    graph.change_here(quantizer, 1, lambda s: s * 1.1)


def padding(graph: Graph) -> None:
    (pads,) = [attribute for attribute in graph.conv.attribute if attribute.name == "pads"]
    del pads.ints[:]
    pads.ints.extend((2, 2, 0, 0))


def rows(change: Callable[[Any], Any]) -> Callable[[Graph], None]:
    """Rows of both folded tables."""

    def spoil(graph: Graph) -> None:
        tables = [node.input[0] for node in graph.model.graph.node if node.op_type == "Gather"]
        folded = [name for name in tables if name in graph.constants and graph.constants[name].dims[0] == 3]
        assert len(folded) == 2, tables
        for name in folded:
            graph.change(name, change)

    return spoil


def elsewhere(graph: Graph) -> None:
    """A float operator between layers: no layer is wrong, and no table."""
    norms = [node for node in graph.model.graph.node if node.op_type == "GroupNormalization"]
    graph.change_here(norms[-1], 1, lambda weight: weight * 1.5)


def judged(case: Case, emission: Emission, file: Path) -> gate.Case:
    with TorchEngine(simulate(case.network, case.quantized, emission), case.sampling) as engine:
        held_out: list[NoiseStats] = measure(engine, case.sampling, case.trajectories, "held_out")
    precision, quantized = case.quantized.precision, case.quantized
    return gate.Case("w4a4", file, precision, emission, quantized, case.correction, held_out)


DIFFERS = rf"layer {LAYER} at step 0 differs from its simulation"
FUSION = "calls of quantized convs run as QLinearConv"
EITHER = f"{DIFFERS}|{FUSION}"
"""ONNX Runtime makes an integer conv only where the scale of the bias is that of the products."""
TABLE = r"the correction of step \d in the graph is not its table's"
KINDS = {
    "scale a step off": (scale(1 + 1 / 7), EITHER, (PORTABLE, HALF, CPU)),
    "scale 10 % off": (scale(1.1), EITHER, (PORTABLE, CPU)),
    "scale 1 % off": (scale(1.01), EITHER, (PORTABLE, CPU)),
    "one weight code": (one_code, DIFFERS, (PORTABLE, HALF, CPU)),
    "bias dropped": (bias, DIFFERS, (PORTABLE, HALF, CPU)),
    "bound of the codes": (clip, DIFFERS, (PORTABLE, HALF, CPU)),
    "layer in float": (in_float, DIFFERS, (PORTABLE,)),  # test_gate has it of an optimiser
    "zero point": (zero_point, EITHER, (CPU,)),
    "scale of the output": (output_scale, EITHER, (CPU,)),
    "padding": (padding, DIFFERS, (PORTABLE, CPU)),
    "rows swapped": (rows(lambda t: t[[1, 0, 2]]), TABLE, (PORTABLE, HALF, CPU)),
    "rows of another step": (rows(lambda t: np.roll(t, 1, 0)), TABLE, (PORTABLE, CPU)),
    "between the layers": (elsewhere, r"at step \d is .* standard errors apart", (PORTABLE,)),
}


@pytest.mark.parametrize(
    ("kind", "emission"), [(kind, e) for kind, (_, _, several) in KINDS.items() for e in several], ids=str
)
def test_a_wrong_graph_is_refused(case: Case, kind: str, emission: Emission, tmp_path: Path) -> None:
    spoil, says, _ = KINDS[kind]
    graph, file = Graph(case.graph(emission)), tmp_path / "graph.onnx"
    spoil(graph)
    onnx.save(graph.model, file)
    with pytest.raises(ParityError, match=says):
        judge_graph(judged(case, emission, file), case.sampling, case.trajectories, case.network)


@pytest.mark.parametrize("emission", list(Emission))
def test_a_graph_that_holds_its_weights_is_not(case: Case, emission: Emission, tmp_path: Path) -> None:
    """The same steps without a change."""
    onnx.save(Graph(case.graph(emission)).model, tmp_path / "graph.onnx")
    judge_graph(
        judged(case, emission, tmp_path / "graph.onnx"), case.sampling, case.trajectories, case.network
    )
