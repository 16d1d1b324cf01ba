"""A small classifier as an ONNX file, of known weights."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import numpy.typing as npt
import onnx
from onnx import TensorProto, helper, numpy_helper


def write_classifier(
    path: Path, shape: tuple[int, ...], width: int = 4, outputs: tuple[str, ...] = ("features", "logits")
) -> npt.NDArray[np.float32]:
    """Features that are linear in the pixels, and logits equal to them; returns the weights."""
    size = int(np.prod(shape))
    weight = np.random.default_rng(1).standard_normal((size, width)).astype(np.float32) / 8
    nodes = [
        helper.make_node("Flatten", ["x"], ["flat"]),
        helper.make_node("MatMul", ["flat", "w"], ["found"]),
        *(helper.make_node("Identity", ["found"], [name]) for name in outputs),
    ]
    graph = helper.make_graph(
        nodes,
        "classifier",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, ["n", *shape])],
        [helper.make_tensor_value_info(name, TensorProto.FLOAT, ["n", width]) for name in outputs],
        [numpy_helper.from_array(weight, "w")],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=10)
    onnx.save(model, path)
    return weight
