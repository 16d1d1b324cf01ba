"""Graphs on disk: one ONNX file each, and one safetensors file that holds every weight once.

A safetensors file is 8 bytes of header length, a JSON header, then the raw little-endian tensors; ONNX external data is a
file, an offset and a length. So the same file serves as both: ONNX Runtime reads it as external data, safetensors by name.
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
from .graph import first_line, layer_sites, with_outputs

WEIGHTS = "weights.safetensors"
MIN_EXTERNAL_BYTES = 257
"""Smaller tensors (scales, shapes) stay inside the ONNX file."""


def save(models: Mapping[str, ir.Model], folder: Path, weights_name: str = WEIGHTS) -> None:
    """Write `<key>.onnx` for every model, and their weights to `weights_name`, into an existing folder.

    Every distinct tensor above 256 bytes (same dtype, shape and content) is stored once, whichever graphs use it, as
    "<name of its first initializer>-<12 digits of its SHA-256>". The models are left as they are; the same models give the same
    bytes. Not atomic: a reader must not see the folder before this returns.

    Raises:
        GraphError: an initializer without data, of a type that safetensors cannot hold, or a file that cannot be written.
    """
    arrays: dict[str, npt.NDArray[Any]] = {}
    names: dict[tuple[str, tuple[int, ...], bytes], str] = {}
    stored: dict[int, str] = {}  # by identity: the graphs of one export share their tensors, which need to be hashed once only
    copies = {key: model.clone() for key, model in models.items()}
    for model in copies.values():
        for value in model.graph.initializers.values():
            tensor = value.const_value
            if tensor is None:
                raise GraphError(f"initializer {value.name!r} has no data: save graphs that hold their weights")
            if tensor.nbytes < MIN_EXTERNAL_BYTES or id(tensor) in stored:
                continue
            array = np.ascontiguousarray(tensor.numpy())
            digest = hashlib.sha256(array.tobytes()).digest()
            content = (array.dtype.name, array.shape, digest)
            if content not in names:
                names[content] = f"{value.name}-{digest.hex()[:12]}"
                arrays[names[content]] = array
            stored[id(tensor)] = names[content]
    try:
        save_file(arrays, folder / weights_name)
    except (SafetensorError, KeyError) as error:
        raise GraphError(f"{folder / weights_name} cannot be written: {error}") from error
    places = _places(folder / weights_name)
    for key, model in copies.items():
        for value in model.graph.initializers.values():
            tensor = value.const_value
            if tensor is None or id(tensor) not in stored:
                continue
            start, length = places[stored[id(tensor)]]
            assert isinstance(tensor.shape, ir.Shape)
            value.const_value = ir.ExternalTensor(
                weights_name, start, length, tensor.dtype, shape=tensor.shape, name=str(value.name), base_dir=folder
            )
        _write(model, folder / f"{key}.onnx")
        shutil.copymode(folder / f"{key}.onnx", folder / weights_name)  # safetensors makes its file readable for the owner alone


def expose_layers(source: Path, target: Path) -> dict[str, tuple[str, str]]:
    """Copy a saved graph with the float input and output of every quantized layer as further outputs.

    Args:
        target: in the folder of `source`, whose weights it refers to.
    Returns:
        module path -> (name of the layer's input, name of its output), see `layer_sites`.
    Raises:
        GraphError: `source` is not an ONNX graph, or `target` is in another folder.
    """
    if source.resolve().parent != target.resolve().parent:
        raise GraphError(f"{target} is not in the folder of {source.name}: the copy shares its weights, write it beside the graph")
    try:
        model = ir.load(source)
    except Exception as error:  # an OSError or protobuf's DecodeError, by the protobuf build
        raise GraphError(f"{source} cannot be read as an ONNX graph: {first_line(error)}") from error
    sites = layer_sites(model)
    _write(with_outputs(model, dict.fromkeys(name for pair in sites.values() for name in pair)), target)
    return sites


def _write(model: ir.Model, path: Path) -> None:
    path.write_bytes(ir.to_proto(model).SerializeToString(deterministic=True))


def _places(path: Path) -> dict[str, tuple[int, int]]:
    """(offset in the file, length) of every tensor, from the header."""
    with path.open("rb") as file:
        size = int.from_bytes(file.read(8), "little")
        header = json.loads(file.read(size))
    return {name: (8 + size + entry["data_offsets"][0], entry["data_offsets"][1] - entry["data_offsets"][0]) for name, entry in header.items()}
