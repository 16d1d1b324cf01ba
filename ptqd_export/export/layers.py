"""Every quantized layer of a saved graph as a graph of its own: layers are compared on the same inputs, which a whole network does not give them."""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt
import onnx_ir as ir

from .graph import LAYER, LAYER_INPUT, LAYER_OUTPUT, layer_sites, load, producer, uncast, with_outputs
from .save import save

F64 = npt.NDArray[np.float64]
FP8_SPACING = 32
"""Between the largest numbers of E4M3, 416 and 448."""


@dataclass(frozen=True)
class LayerGraph:
    """A layer from its float input to its output: [Q, DQ] -> Conv or MatMul, bias [-> Q, DQ].

    Attributes:
        file: ONNX graph with the one input `source` and the one output `target`, named as in the whole graph.
        step: one quantization step of the output, float64, of its rank, with one value per channel: of its own codes where it is
            quantized, else the largest change that one input code makes; of a weight where only weights are quantized.
    """

    file: Path
    source: str
    target: str
    step: F64


def cut_layers(source: Path, folder: Path) -> tuple[Path, dict[str, LayerGraph]]:
    """Write each quantized layer of `source`, and the graph itself with the layers' inputs as further outputs, into an empty folder.

    Returns:
        the whole graph; module path -> its layer, in the order of the graph.
    Raises:
        GraphError: `source` is not an ONNX graph, or the folder cannot be written.
    """
    model = load(source)
    sites = layer_sites(model)
    parts = {f"layer-{i}-{re.sub(r'[^A-Za-z0-9.]', '_', name)}": name for i, name in enumerate(sites)}
    models = {
        file: ir.Model(ir.convenience.extract(model.graph, *([v] for v in sites[name])), ir_version=model.ir_version) for file, name in parts.items()
    }
    save({"whole": with_outputs(model, (x for x, _ in sites.values())), **models}, folder)
    layers = {name: LayerGraph(folder / f"{file}.onnx", *sites[name], _step(models[file].graph)) for file, name in parts.items()}
    return folder / "whole.onnx", layers


def _step(graph: ir.Graph) -> F64:
    """See LayerGraph.step."""
    node = next(node for node in graph if LAYER in node.metadata_props)
    conv = node.op_type == "Conv"
    weight = producer(uncast(node.inputs[1]), "DequantizeLinear", "Mul")
    assert weight is not None
    scale = _array(weight.inputs[1]).reshape(-1)
    last = next(node for node in graph if LAYER_OUTPUT in node.metadata_props)
    quantizer = next((node for node in graph if LAYER_INPUT in node.metadata_props), None)
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


def _rank(value: ir.Value) -> int:
    assert value.shape is not None
    return len(value.shape)


def _array(value: ir.Value | None) -> F64:
    assert value is not None and value.const_value is not None
    return value.const_value.numpy().astype(np.float64)
