"""Graphs: one full-precision ONNX export, every precision a rewrite of it. Only this folder imports onnx and onnx_ir."""

from .fold import fold
from .from_torch import export_fp
from .graph import exported_layers, layer_sites, quantized_nodes, with_outputs
from .layers import LayerGraph, cut_layers
from .lint import lint
from .lower import lower
from .quantize import quantize
from .save import expose_layers, save
from .structure import float_convs, op_counts, quantized_convs
from .update import sampler_update

__all__ = [
    "LayerGraph",
    "cut_layers",
    "export_fp",
    "exported_layers",
    "expose_layers",
    "float_convs",
    "fold",
    "layer_sites",
    "lint",
    "lower",
    "op_counts",
    "quantize",
    "quantized_convs",
    "quantized_nodes",
    "sampler_update",
    "save",
    "with_outputs",
]
