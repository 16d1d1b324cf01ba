"""ONNX files from ONNX's text."""

from __future__ import annotations

from pathlib import Path

import onnx


def save_text(path: Path, text: str, *initializers: onnx.TensorProto) -> Path:
    """Save a graph of opset 21, with these constants, at `path`."""
    model = onnx.parser.parse_model(f'<ir_version: 10, opset_import: ["": 21]>\n{text}')
    model.graph.initializer.extend(initializers)
    onnx.save(model, path)
    return path
