"""Quantized layers in a folder as a bundle holds them: codes in a weights file, the rest beside it."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from pathlib import Path

import numpy as np
import onnx_ir as ir

from ptqd_export.bundle.bundle import WEIGHTS
from ptqd_export.bundle.layers import write_layers
from ptqd_export.bundle.reading import FileEntry, Reader
from ptqd_export.core.precision import Precision
from ptqd_export.core.quant import QuantizedNetwork
from ptqd_export.export import save
from ptqd_export.export.graph import Builder
from ptqd_export.export.layer_terms import stored_codes


def write(folder: Path, networks: Mapping[Precision, QuantizedNetwork]) -> Reader:
    """Write both files, the codes as graphs of the networks have them."""
    graph = ir.Graph([], [], nodes=[], opset_imports={"": 21})
    build = Builder(graph)
    for network in networks.values():
        for layer in network.layers.values():
            codes = stored_codes(layer)
            build.const(f"{layer.name}.weight.codes", codes.T if layer.kind == "linear" else codes)
    build.const("some.scale", np.ones(1000, np.float32))
    save({"graph": ir.Model(graph, ir_version=10)}, folder, WEIGHTS)
    write_layers(folder, networks)
    return reader(folder)


def reader(folder: Path) -> Reader:
    """Of the files that stand there now."""
    entries = {
        file.name: FileEntry(hashlib.sha256(file.read_bytes()).hexdigest(), file.stat().st_size)
        for file in folder.iterdir()
        if file.is_file()
    }
    return Reader(folder, entries)
