"""Graphs on disk: one ONNX file each, and one safetensors file that holds every weight once.

A safetensors file is 8 bytes of header length, a JSON header, then the raw little-endian tensors. ONNX
external data is a file, an offset and a length. So one file serves as both: ONNX Runtime reads it as external
data, safetensors reads it by name.
"""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx_ir as ir
from safetensors import SafetensorError
from safetensors.numpy import save_file

from ..errors import GraphError

MIN_EXTERNAL_BYTES = 257
"""Smaller tensors (scales, shapes) stay inside the ONNX file."""
AS_BYTES = (ir.DataType.FLOAT8E4M3FN, ir.DataType.INT4)


def save(models: Mapping[str, ir.Model], folder: Path, weights_name: str | None) -> dict[str, str]:
    """Write `<key>.onnx` for every model, and their weights to `weights_name`, into an existing folder.

    With `weights_name` None, the weights go into the ONNX files. Every distinct tensor above 256 bytes (same
    dtype, shape and content) is stored once, whichever graphs use it, as "<name of its first
    initializer>-<12 digits of its SHA-256>". safetensors or numpy do not know FP8 and INT4: they are stored
    as the uint8 bytes that ONNX stores (INT4: two codes per byte, the first in the low half). The models are
    not changed, and the same models give the same bytes. Writing is not atomic: a reader must not see the
    folder before this returns.

    Returns:
        key -> SHA-256, in hex, of the graph and its weights; equal graphs have equal digests wherever their
        weights are stored.
    Raises:
        GraphError: an initializer has no data or a type that safetensors cannot hold, or a file cannot be
            written.
    """
    arrays: dict[str, npt.NDArray[Any]] = {}
    names: dict[tuple[str, tuple[int, ...], str], str] = {}
    known: dict[
        int, str
    ] = {}  # by identity: the graphs of one export share their tensors, so each is hashed only once
    stored: dict[int, str] = {}
    copies = {key: model.clone() for key, model in models.items()}
    for model in copies.values():
        for value in model.graph.initializers.values():
            tensor = value.const_value
            if tensor is None:
                raise GraphError(
                    f"initializer {value.name!r} has no data: save graphs that hold their weights"
                )
            if id(tensor) in known:
                continue
            data = tensor.tobytes()
            known[id(tensor)] = digest = hashlib.sha256(data).hexdigest()
            if weights_name is None or len(data) < MIN_EXTERNAL_BYTES:
                continue
            content = (tensor.dtype.name, tuple(tensor.shape.numpy()), digest)
            if content not in names:
                names[content] = f"{value.name}-{digest[:12]}"
                raw = tensor.dtype in AS_BYTES
                arrays[names[content]] = (
                    np.frombuffer(data, np.uint8) if raw else np.ascontiguousarray(tensor.numpy())
                )
            stored[id(tensor)] = names[content]
    places = {} if weights_name is None else _write_weights(arrays, folder / weights_name)
    digests: dict[str, str] = {}
    for key, model in copies.items():
        contents = []
        for value in model.graph.initializers.values():
            tensor = value.const_value
            assert tensor is not None
            contents.append(
                [str(value.name), tensor.dtype.name, list(tensor.shape.numpy()), known[id(tensor)]]
            )
            if weights_name is None or id(tensor) not in stored:
                continue
            start, length = places[stored[id(tensor)]]
            value.const_value = ir.ExternalTensor(
                weights_name,
                start,
                length,
                tensor.dtype,
                shape=ir.Shape(tensor.shape.numpy()),
                name=str(value.name),
                base_dir=folder,
            )
        proto = ir.to_proto(model)
        (folder / f"{key}.onnx").write_bytes(proto.SerializeToString(deterministic=True))
        if weights_name is not None:
            shutil.copymode(
                folder / f"{key}.onnx", folder / weights_name
            )  # safetensors makes its file readable by the owner only
        proto.graph.ClearField("initializer")
        digests[key] = hashlib.sha256(
            proto.SerializeToString(deterministic=True) + json.dumps(sorted(contents)).encode()
        ).hexdigest()
    return digests


def _write_weights(arrays: Mapping[str, npt.NDArray[Any]], path: Path) -> dict[str, tuple[int, int]]:
    """Write the tensors; returns {name: (offset in the file, length)}, read from the header."""
    try:
        save_file(dict(arrays), path)
    except (SafetensorError, KeyError) as error:
        raise GraphError(f"{path} cannot be written: {error}") from error
    with path.open("rb") as file:
        size = int.from_bytes(file.read(8), "little")
        header = json.loads(file.read(size))
    return {
        name: (8 + size + entry["data_offsets"][0], entry["data_offsets"][1] - entry["data_offsets"][0])
        for name, entry in header.items()
    }
