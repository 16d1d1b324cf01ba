"""Find layers in a graph: those of the export, the ends of quantized ones, and each as its own graph."""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np
import numpy.typing as npt
import onnx_ir as ir

from ..bundle.bundle import WEIGHTS
from ..core.quant import Geometry
from ..errors import GraphError
from .dialect import LAYER, LAYER_INPUT, LAYER_OUTPUT, MACS
from .graph import code_of, dequantizer, load, producer, uncast, with_outputs
from .save import save

F64 = npt.NDArray[np.float64]
FP8_SPACING = 32
"""Distance between the largest numbers of E4M3, 416 and 448."""


def exported_layers(model: ir.Model) -> dict[str, Geometry | None]:
    """The Conv2d and Linear layers that the exported graph holds with their own weights, by module path.

    Returns:
        the geometry of each conv in the graph, at its first call; None of a linear layer.
    Raises:
        GraphError: a conv has no numbers for its padding.
    """
    found: dict[str, Geometry | None] = {}
    for node in model.graph:
        path = node.metadata_props.get(LAYER)
        if path is not None and node.op_type != "Add":
            found.setdefault(path, _geometry(node) if node.op_type == "Conv" else None)
    return found


def _geometry(conv: ir.Node) -> Geometry:
    given = conv.attributes
    if given.get_string("auto_pad", "NOTSET") != "NOTSET":
        raise GraphError(f"conv {conv.name} pads by a rule of its own: give it numbers for its padding")
    stride, dilation = (tuple(given.get_ints(name, (1, 1))) for name in ("strides", "dilations"))
    padding = tuple(given.get_ints("pads", (0, 0, 0, 0)))
    return Geometry(stride, padding, dilation, given.get_int("group", 1))  # type: ignore[arg-type]


def layer_sites(model: ir.Model) -> dict[str, tuple[str, str]]:
    """Where each quantized layer begins and ends: module path -> (name of its input, name of its output).

    The input is the float32 value that is quantized; where weights alone are quantized, it is the node's own
    input. The output is the value after the output's DequantizeLinear (convs of the ORT CPU emission), the
    Conv's own, or that of a linear layer's bias Add. In the half emission, outputs and unquantized inputs are
    float16 where the layer computes in float16. A module that is called more than once is reported at its
    first call.
    """
    quantized = {node.metadata_props.get(LAYER_OUTPUT) for node in model.graph}
    sites: dict[str, tuple[str, str]] = {}
    for node in model.graph:
        path = node.metadata_props.get(LAYER)
        if path is None or path in sites or path not in quantized:
            continue
        before, after = _before_quantization(node.inputs[0]), node
        while LAYER_OUTPUT not in after.metadata_props:
            after = after.outputs[0].consumers()[0]
        sites[path] = (str(before.name if before else None), str(after.outputs[0].name))
    return sites


def _before_quantization(value: ir.Value | None) -> ir.Value | None:
    """The value that a layer's quantized input was made from; the value itself where it is not quantized."""
    node = producer(value, "Cast")
    inner = (
        value if node is None or LAYER_INPUT in node.metadata_props else node.inputs[0]
    )  # the half emission casts the dequantized value
    before = inner
    while (step := producer(before)) is not None and LAYER_INPUT in step.metadata_props:
        before = step.inputs[0]
    return value if before is inner else before


def quantized_nodes(model: ir.Model | Path) -> dict[str, Literal["int8", "fp8"]]:
    """The nodes that are meant to run in 8 bits: {node name: "int8" | "fp8"}.

    These are the Conv, MatMul and Gemm nodes whose input and weight are both dequantized.

    Raises:
        GraphError: the path is not an ONNX graph.
    """
    if isinstance(model, Path):
        model = load(model)
    nodes: dict[str, Literal["int8", "fp8"]] = {}
    for node in model.graph:
        if (
            node.op_type in MACS
            and (x := dequantizer(node.inputs[0])) is not None
            and dequantizer(node.inputs[1]) is not None
        ):
            nodes[str(node.name)] = "fp8" if code_of(x) == "fp8" else "int8"
    return nodes


def expose_layers(source: Path, target: Path) -> dict[str, tuple[str, str]]:
    """Copy a saved graph with the input and output of every quantized layer as further outputs.

    Args:
        target: path in the folder of `source`, because the copy refers to the same weights file.
    Returns:
        module path -> (name of the layer's input, name of its output), see `layer_sites`.
    Raises:
        GraphError: `source` is not an ONNX graph, or `target` is in another folder.
    """
    if source.resolve().parent != target.resolve().parent:
        raise GraphError(
            f"{target} is not in the folder of {source.name}: the copy shares its weights, write it beside "
            "the graph"
        )
    model = load(source)
    sites = layer_sites(model)
    exposed = with_outputs(model, dict.fromkeys(name for pair in sites.values() for name in pair))
    target.write_bytes(ir.to_proto(exposed).SerializeToString(deterministic=True))
    return sites


@dataclass(frozen=True)
class LayerGraph:
    """A layer as its own graph, from float input to output: [Q, DQ] -> Conv or MatMul, bias [-> Q, DQ].

    Attributes:
        file: ONNX graph with the single input `source` and the single output `target`, named as in the whole
            graph.
        step: one quantization step of the output, float64, of the output's rank, with one value per channel.
            For a quantized output it is the step of its codes; otherwise it is the largest change that one
            input code makes. Where only weights are quantized, it is the step of a weight.
        added: the largest constant that is added to a channel's products (bias and shift, which may cancel
            most of them), like `step`.
    """

    file: Path
    source: str
    target: str
    step: F64
    added: F64


def cut_layers(source: Path, folder: Path) -> tuple[Path, dict[str, LayerGraph]]:
    """Write each quantized layer of `source` as a graph of its own, into an empty folder.

    The whole graph is written there too, with the layers' inputs as further outputs.

    Returns:
        the path of the whole graph; module path -> its layer, in the order of the graph.
    Raises:
        GraphError: `source` is not an ONNX graph, or the folder cannot be written.
    """
    model = load(source)
    sites = layer_sites(model)
    parts = {f"layer-{i}-{re.sub(r'[^A-Za-z0-9.]', '_', name)}": name for i, name in enumerate(sites)}
    models = {
        file: ir.Model(
            ir.convenience.extract(model.graph, *([v] for v in sites[name])), ir_version=model.ir_version
        )
        for file, name in parts.items()
    }
    save({"whole": with_outputs(model, (x for x, _ in sites.values())), **models}, folder, WEIGHTS)
    layers = {}
    for file, name in parts.items():
        step = _step(models[file].graph)
        added = _added(models[file].graph, step)
        layers[name] = LayerGraph(folder / f"{file}.onnx", *sites[name], step, added)
    return folder / "whole.onnx", layers


def _step(graph: ir.Graph) -> F64:
    """See LayerGraph.step."""
    node = next(node for node in graph if LAYER in node.metadata_props)
    conv = node.op_type == "Conv"
    weight = producer(uncast(node.inputs[1]), "DequantizeLinear", "Mul")
    assert weight is not None
    scale = _array(weight.inputs[1]).reshape(-1)
    last = next(node for node in graph if LAYER_OUTPUT in node.metadata_props)
    quantizer = next(
        (n for n in graph if LAYER_INPUT in n.metadata_props and n.op_type in ("DequantizeLinear", "Div")),
        None,
    )
    if last.op_type == "Reshape":
        last = producer(last.inputs[0], "DequantizeLinear") or last
    if last.op_type == "DequantizeLinear":
        step = np.broadcast_to(_array(last.inputs[1]), scale.shape)
    elif quantizer is None:
        step = scale
    else:
        codes = uncast(weight.inputs[0])
        largest = np.abs(_array(codes)).max(axis=(1, 2, 3) if conv else 0)
        fp8 = codes is not None and codes.dtype is ir.DataType.FLOAT8E4M3FN
        step = np.maximum(largest, 1.0) * scale * _array(quantizer.inputs[1]) * (FP8_SPACING if fp8 else 1)
    return step.reshape((1, -1, 1, 1) if conv else [1] * (_rank(last.outputs[0]) - 1) + [-1])


def _added(graph: ir.Graph, step: F64) -> F64:
    """See LayerGraph.added; `step` is the layer's."""
    node = next(node for node in graph if LAYER in node.metadata_props)
    terms = list(node.inputs[2:])
    while LAYER_OUTPUT not in node.metadata_props:
        node = node.outputs[0].consumers()[0]
        terms += node.inputs if node.op_type == "Add" else ()
    others = tuple(axis for axis, size in enumerate(step.shape) if size == 1)
    added = np.zeros(step.shape)
    for term in terms:
        if term is not None and term.const_value is not None:
            constant = np.abs(_array(term))
            if constant.ndim < step.ndim:  # one value per channel, not a map of positions
                constant = np.broadcast_to(constant, step.size).reshape(step.shape)
            added += constant.max(axis=others, keepdims=True)
    return added


def _rank(value: ir.Value) -> int:
    assert value.shape is not None
    return len(value.shape)


def _array(value: ir.Value | None) -> F64:
    assert value is not None and value.const_value is not None
    return value.const_value.numpy().astype(np.float64)
