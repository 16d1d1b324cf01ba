"""Layers that a wrong kernel would compute."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import onnx
from onnx import numpy_helper

from ptqd_export.backends import OrtEngine
from ptqd_export.core.engine import Engine

Open = Callable[[Path], Engine]


def changed(layer: str, constant: str, change: Callable[[np.ndarray], np.ndarray]) -> Open:
    """Opens a layer's graph, of one layer with a constant changed: what a wrong kernel would compute."""

    def opened(file: Path) -> Engine:
        if not file.stem.endswith(f"-{layer}"):
            return OrtEngine(file)
        model = onnx.load(file)
        (tensor,) = [tensor for tensor in model.graph.initializer if tensor.name.endswith(constant)]
        tensor.CopyFrom(numpy_helper.from_array(change(numpy_helper.to_array(tensor).copy()), tensor.name))
        onnx.save(model, file.with_name("changed.onnx"))
        return OrtEngine(file.with_name("changed.onnx"), optimise=False)

    return opened
