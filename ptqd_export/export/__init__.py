"""Graphs: one full-precision ONNX export, and every precision as a rewrite of it.

Only this folder imports onnx.
"""

from .fold import fold
from .from_torch import export_fp, export_part
from .insert_qdq import insert_qdq
from .lint import lint
from .lower import lower
from .save import save
from .sites import LayerGraph, cut_layers, exported_layers, expose_layers, layer_sites, quantized_nodes
from .stock import STOCK_OUTPUT, stock_unet, with_offset
from .structure import Calls, calls, float_convs, op_counts
from .update import sampler_update
from .variants import write_variants

__all__ = [
    "STOCK_OUTPUT",
    "Calls",
    "LayerGraph",
    "calls",
    "cut_layers",
    "export_fp",
    "export_part",
    "exported_layers",
    "expose_layers",
    "float_convs",
    "fold",
    "insert_qdq",
    "layer_sites",
    "lint",
    "lower",
    "op_counts",
    "quantized_nodes",
    "sampler_update",
    "save",
    "stock_unet",
    "with_offset",
    "write_variants",
]
