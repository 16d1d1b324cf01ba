"""What the tests of this folder share: small quantized graphs, real builds of them, and a fake to run on."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper

from ptqd_export.backends.cuda import Buffer, CudaDevice
from ptqd_export.core.backend import TENSORRT_RTX
from ptqd_export.core.engine import Feeds
from ptqd_export.core.engine_build import EngineBuild, EngineSettings
from ptqd_export.errors import PTQDError

RTX = TENSORRT_RTX
SETTINGS = EngineSettings((1, 2, 4), ("8.9",))
KEY = "0123456789abcdef" * 4
E4M3 = TensorProto.FLOAT8E4M3FN

Build = Callable[..., EngineBuild]


def conv_graph(
    path: Path, *, input_scale: np.ndarray | float = 0.1, code: int = TensorProto.INT8, op: str = "Conv"
) -> Path:
    """A quantized 3x3 convolution "conv_a" of 16 channels, 8x8, and a float one "conv_b" after it."""
    scale = np.asarray(input_scale, np.float32)
    # As E4M3 patterns: all finite.
    weight = np.random.default_rng(0).integers(0, 100, (16, 16, 3, 3)).astype(np.int8)
    constants = [
        helper.make_tensor("codes", code, weight.shape, weight.tobytes(), raw=True),
        helper.make_tensor("weight_zero", code, (16,), bytes(16), raw=True),
        helper.make_tensor("zero", code, scale.shape, bytes(max(scale.size, 1)), raw=True),
        numpy_helper.from_array(scale, "scale"),
        numpy_helper.from_array(np.full(16, 0.01, np.float32), "weight_scale"),
        numpy_helper.from_array(np.full((16, 16, 1, 1), 0.01, np.float32), "plain"),
    ]
    axis = {"axis": 1} if scale.ndim else {}
    nodes = [
        helper.make_node("QuantizeLinear", ["sample", "scale", "zero"], ["q"], "quantize", **axis),
        helper.make_node("DequantizeLinear", ["q", "scale", "zero"], ["d"], "dequantize", **axis),
        helper.make_node(
            "DequantizeLinear", ["codes", "weight_scale", "weight_zero"], ["w"], "weights", axis=0
        ),
        helper.make_node(op, ["d", "w"], ["h"], "conv_a", pads=[1, 1, 1, 1]),
        helper.make_node("Conv", ["h", "plain"], ["epsilon"], "conv_b"),
    ]
    ends = [
        helper.make_tensor_value_info(name, TensorProto.FLOAT, ["B", 16, 8, 8])
        for name in ("sample", "epsilon")
    ]
    return save(path, helper.make_graph(nodes, "g", ends[:1], ends[1:], constants))


def save(path: Path, graph: onnx.GraphProto) -> Path:
    onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 21)], ir_version=10), path)
    return path


def crashing_graph(path: Path) -> Path:
    """`conv_graph` with a scale that comes from a table, which ends the builder by a signal."""
    model = onnx.load(conv_graph(path))
    graph = model.graph
    scale = next(item for item in graph.initializer if item.name == "scale")
    graph.initializer.remove(scale)
    graph.initializer.append(numpy_helper.from_array(np.full(4, 0.1, np.float32), "table"))
    graph.input.append(helper.make_tensor_value_info("step", TensorProto.INT64, [1]))
    graph.node.insert(0, helper.make_node("Gather", ["table", "step"], ["row"], "gather"))
    graph.node.insert(1, helper.make_node("Squeeze", ["row"], ["scale"], "squeeze"))
    onnx.save(model, path)
    return path


def one_line(caught: pytest.ExceptionInfo[PTQDError]) -> str:
    """The text of an error, which is one line."""
    text = str(caught.value)
    assert "\n" not in text and "Traceback" not in text
    return text


def toy_feeds(n: int, start: int = 0) -> dict[str, np.ndarray]:
    """Of n rows, for `fake_tensorrt.TOY`."""
    sample = np.arange(start, start + 4 * n, dtype=np.float32).reshape(n, 4)
    return {"sample": sample, "timestep": np.arange(n)}


def expected(feeds: Feeds) -> np.ndarray:
    return np.asarray(2 * feeds["sample"] + feeds["timestep"][:, None])


def toy_buffers(device: CudaDevice, feeds: Feeds) -> dict[str, Buffer]:
    """Buffers that hold the feeds, and one for the output."""
    buffers = {name: device.empty(value.shape, value.dtype.name) for name, value in feeds.items()}
    for name, value in feeds.items():
        device.write(buffers[name], value)
    return {**buffers, "epsilon": device.empty(feeds["sample"].shape, "float32")}
