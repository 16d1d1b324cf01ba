"""The operators in a graph file, to check that layers meant to run as integers do.

The file to check is the graph that a runtime saved after fusion.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import onnx

from ..errors import GraphError
from .dialect import MACS

FLOAT_CONVS = frozenset({"Conv", "FusedConv", "NhwcFusedConv"})
"""Float convolutions of ONNX and of ONNX Runtime's domains; integer ones are QLinearConv and ConvInteger."""


def op_counts(path: Path) -> Counter[str]:
    """How often each operator of any domain occurs, subgraphs and functions included.

    Raises:
        GraphError: the file is missing or is not an ONNX graph.
    """
    return Counter(node.op_type for node in _nodes(path))


def float_convs(path: Path) -> list[str]:
    """Names of the convolutions that compute in float, in graph order.

    A node without a name is given by its first output. The result is meaningful for the graph that a runtime
    saved: before fusion, a quantized convolution is a Conv between Q and DQ.

    Raises:
        GraphError: the file is missing or is not an ONNX graph.
    """
    return [node.name or node.output[0] for node in _nodes(path) if node.op_type in FLOAT_CONVS]


@dataclass(frozen=True)
class Calls:
    """How often an emitted graph calls its layers; a runtime computes equal calls on equal inputs once.

    Attributes:
        integer_convs, integer_linears: Conv, MatMul and Gemm nodes that take dequantized inputs and weights.
        float_convs: all other Conv nodes.
    """

    integer_convs: int
    integer_linears: int
    float_convs: int


def calls(path: Path) -> Calls:
    """The calls of layers in an emitted graph.

    Raises:
        GraphError: the file is missing or is not an ONNX graph.
    """
    known: dict[tuple[object, ...], str] = {}
    same: dict[str, str] = {}
    dequantized: set[str] = set()
    found: Counter[tuple[bool, bool]] = Counter()
    for node in _nodes(path):
        inputs = [same.get(name, name) for name in node.input]
        about = sorted(attribute.SerializeToString(deterministic=True) for attribute in node.attribute)
        key = (node.op_type, node.domain, *about, *inputs)
        for i, name in enumerate(node.output):
            same[name] = known.get((*key, i), name)
        if (*key, 0) in known:
            continue
        known |= {(*key, i): name for i, name in enumerate(node.output)}
        if node.op_type == "DequantizeLinear":
            dequantized.add(node.output[0])
        elif node.op_type in MACS:
            found[node.op_type == "Conv", set(inputs[:2]) <= dequantized] += 1
    return Calls(found[True, True], found[False, True], found[True, False])


def _nodes(path: Path) -> Iterator[onnx.NodeProto]:
    try:
        model = onnx.load(path, load_external_data=False)
    except Exception as error:  # protobuf's DecodeError or an OSError, depending on the protobuf build
        raise GraphError(f"{path} cannot be read as an ONNX graph: {' '.join(str(error).split())}") from error
    if not model.graph.node:
        raise GraphError(f"{path} holds no nodes: expected an ONNX graph")
    yield from _walk(model.graph.node)
    for function in model.functions:
        yield from _walk(function.node)


def _walk(nodes: object) -> Iterator[onnx.NodeProto]:
    for node in nodes:  # type: ignore[attr-defined]
        yield node
        for attribute in node.attribute:
            yield from _walk(attribute.g.node)
            for graph in attribute.graphs:
                yield from _walk(graph.node)
