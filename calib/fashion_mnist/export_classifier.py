"""Write the classifier as `classifier.onnx` for `ptqd-export eval`: outputs `features` and `logits`.

    python calib/fashion_mnist/export_classifier.py

The graph is written node by node from `classifier.safetensors`, without torch: the same weights give the same
bytes.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper
from safetensors.numpy import load_file

HERE = Path(__file__).parent
OPSET, IR_VERSION = 18, 10
BLOCKS, NORM = 3, ("weight", "bias", "running_mean", "running_var")


def graph(weights: dict[str, np.ndarray]) -> onnx.ModelProto:
    """Three blocks of convolution, normalisation, ReLU and pooling; a bottleneck; ten classes."""
    nodes: list[onnx.NodeProto] = []

    def add(op: str, inputs: list[str], output: str, **attributes: object) -> str:
        nodes.append(helper.make_node(op, inputs, [output], name=output, **attributes))
        return output

    def normalised(value: str, name: str, output: str) -> str:
        return add("BatchNormalization", [value, *(f"{name}.{part}" for part in NORM)], output, epsilon=1e-5)

    value = "sample"
    for block in range(BLOCKS):
        value = add("Conv", [value, f"body.{4 * block}.weight"], f"conv{block}", pads=[1, 1, 1, 1])
        value = normalised(value, f"body.{4 * block + 1}", f"norm{block}")
        value = add("Relu", [value], f"relu{block}")
        value = add("MaxPool", [value], f"pool{block}", kernel_shape=[2, 2], strides=[2, 2])
    value = add("Flatten", [value], "flat")
    value = add("Gemm", [value, "neck.0.weight"], "neck", transB=1)
    value = normalised(value, "neck.1", "features")
    add("Gemm", [value, "head.weight", "head.bias"], "logits", transB=1)
    used = dict.fromkeys(name for node in nodes for name in node.input if name in weights)
    arrays = [numpy_helper.from_array(weights[name], name) for name in used]
    width, classes = weights["neck.0.weight"].shape[0], weights["head.weight"].shape[0]

    def rows(name: str, *shape: int) -> onnx.ValueInfoProto:
        return helper.make_tensor_value_info(name, TensorProto.FLOAT, ["batch", *shape])

    outputs = [rows("features", width), rows("logits", classes)]
    found = helper.make_graph(nodes, "classifier", [rows("sample", 1, 32, 32)], outputs, arrays)
    opsets = [helper.make_opsetid("", OPSET)]
    return helper.make_model(found, opset_imports=opsets, ir_version=IR_VERSION, producer_name="ptqd-export")


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--out", type=Path, default=HERE / "classifier.onnx")
    args = parser.parse_args()
    model = graph(load_file(HERE / "classifier.safetensors"))
    onnx.checker.check_model(model)
    args.out.write_bytes(model.SerializeToString(deterministic=True))
    print(f"{args.out}: {args.out.stat().st_size:,} bytes")


if __name__ == "__main__":
    main()
