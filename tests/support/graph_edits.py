"""Hand-made bytes of protobuf messages and changes to ONNX graphs, for tests of the check of graph files."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
from onnx import ModelProto, helper, numpy_helper

from ptqd_export.bundle.graph_check import Expected, check_graph
from ptqd_export.errors import BundleError

FILE = "weights.safetensors"


def number(value: int) -> bytes:
    """As protobuf writes a varint."""
    value &= (1 << 64) - 1
    out = bytearray()
    while value > 127:
        out.append(value & 127 | 128)
        value >>= 7
    return bytes((*out, value))


def field(key: int, wire: int, content: bytes | int) -> bytes:
    head = number(key << 3 | wire)
    if isinstance(content, int):
        return head + number(content)
    return head + (number(len(content)) if wire == 2 else b"") + content


def add(
    model: ModelProto, op: str, inputs: list[str], outputs: list[str], domain: str = "", **attributes: Any
) -> None:
    model.graph.node.append(helper.make_node(op, inputs, outputs, domain=domain, **attributes))


def const(model: ModelProto, name: str, values: Any, dtype: Any = np.int64) -> str:
    model.graph.initializer.append(numpy_helper.from_array(np.asarray(values, dtype), name))
    return name


def external(m: ModelProto) -> Any:
    return next(t for t in m.graph.initializer if t.external_data)


def place(**changes: str | None) -> Callable[[ModelProto], None]:
    def change(m: ModelProto) -> None:
        tensor = external(m)
        entries = {e.key: e.value for e in tensor.external_data} | changes
        del tensor.external_data[:]
        for key, value in entries.items():
            if value is not None:
                tensor.external_data.add(key=key, value=value)

    return change


def refused(data: bytes, expected: Expected, message: str) -> None:
    with pytest.raises(BundleError, match=message) as caught:
        check_graph(data, "w8a8.half.onnx", expected)
    line = str(caught.value)
    assert line.startswith("w8a8.half.onnx ") and line.isprintable() and line.isascii() and len(line) < 500, (
        line
    )
    assert "do not trust it" in line or "do not help" in line, line
