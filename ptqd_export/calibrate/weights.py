"""Read the tensors of a checkpoint: safetensors, whole or in shards, and pickles that hold only data.

Nothing of a file is run: pickles go through torch's weights_only reader, in which what Lightning and
OmegaConf left in them becomes an inert object.
"""

from __future__ import annotations

import json
import zipfile
from collections.abc import Mapping
from pathlib import Path
from pickle import UnpicklingError
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from ..errors import ModelError
from ..typed import brief
from .network import one_line

WEIGHTS = ("diffusion_pytorch_model.safetensors", "diffusion_pytorch_model.fp16.safetensors")
INDEXES = (
    "diffusion_pytorch_model.safetensors.index.json",
    "diffusion_pytorch_model.safetensors.index.fp16.json",
)
PICKLES = (".bin", ".pt", ".pth", ".ckpt", ".pkl")
SAFETENSORS = ".safetensors"
MAX_SHARDS, MAX_INDEX = 1000, 2**26
"""Most files of a sharded checkpoint, and most bytes of its index: far above any model's."""
INERT_MODULES = ("pytorch_lightning.", "lightning.", "lightning_fabric.", "omegaconf.", "ldm.", "sgm.")
INERT_NAMES = (
    "numpy.core.multiarray.scalar",
    "numpy.core.multiarray._reconstruct",
    "numpy._core.multiarray.scalar",
    "numpy._core.multiarray._reconstruct",
    "numpy.dtype",
    "numpy.ndarray",
    "typing.Any",
    "_codecs.encode",
)
"""What training scripts leave in a checkpoint beside the tensors; `_Inert` stands for all of it."""


class _Inert:
    """Takes the place of any object in a pickle; does nothing, whatever it is given."""

    def __new__(cls, *args: Any, **kwargs: Any) -> _Inert:
        return super().__new__(cls)

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        """Forget the arguments."""

    def __setstate__(self, state: Any) -> None:
        """Forget the state."""


def read_folder(folder: Path) -> dict[str, Tensor]:
    """The tensors of a diffusers folder, from one safetensors file or from the shards of an index.

    Raises:
        ModelError: there are none, a file is damaged, the only weights are a pickle, or the index and its
            shards do not fit.
    """
    file = next((folder / name for name in WEIGHTS if (folder / name).is_file()), None)
    if file is not None:
        return read_safetensors(file)
    index = next((folder / name for name in INDEXES if (folder / name).is_file()), None)
    if index is not None:
        return _read_shards(index)
    pickled = sorted(f.name for f in folder.iterdir() if f.suffix in PICKLES)
    if pickled:
        raise ModelError(
            f"{folder} holds {pickled[0]}, a pickle, which is never loaded: save the model with "
            "safe_serialization=True"
        )
    raise ModelError(f"{folder} has no weights: expected {WEIGHTS[0]}, or {INDEXES[0]} and its shards")


def read_checkpoint(file: Path) -> dict[str, Tensor]:
    """The tensors of a single file: .safetensors, or a pickle such as .ckpt (its state_dict if it has one).

    Raises:
        ModelError: the file is missing or damaged, holds no tensors, or asks for code.
    """
    if not file.is_file():
        raise ModelError(f"the checkpoint {file} does not exist: give a file on disk (nothing is downloaded)")
    if file.suffix == SAFETENSORS:
        return read_safetensors(file)
    if file.suffix in PICKLES:
        return _read_pickle(file)
    raise ModelError(f"the checkpoint {file} ends with {brief(file.suffix)}: expected .safetensors or .ckpt")


def read_safetensors(file: Path) -> dict[str, Tensor]:
    try:
        return load_file(file)
    except (SafetensorError, OSError, ValueError) as error:
        raise ModelError(f"{file} is damaged or not safetensors: {one_line(error)}: copy it again") from error


def read_json(file: Path) -> dict[str, Any]:
    """A JSON object.

    Raises:
        ModelError: the file cannot be read, or holds something else.
    """
    try:
        data = json.loads(file.read_text("utf-8"))
    except OSError as error:
        raise ModelError(f"{file} cannot be read: {one_line(error)}") from error
    except (ValueError, RecursionError) as error:  # JSONDecodeError and UnicodeDecodeError are ValueErrors
        raise ModelError(f"{file} is not valid JSON: {one_line(error)}") from error
    if not isinstance(data, dict):
        raise ModelError(f"{file} holds a JSON {type(data).__name__}: expected an object")
    return data


def _read_shards(index: Path) -> dict[str, Tensor]:
    """All shards of an index, whose names may not leave its folder."""
    if index.stat().st_size > MAX_INDEX:
        raise ModelError(f"{index} has {index.stat().st_size} bytes: expected at most {MAX_INDEX}")
    listed = read_json(index).get("weight_map")
    if not isinstance(listed, dict) or not listed:
        raise ModelError(f"{index} has no weight_map: expected {{tensor: file}}")
    for name in listed.values():
        if not isinstance(name, str) or Path(name).name != name or not name.endswith(SAFETENSORS):
            raise ModelError(
                f"{index} names the shard {brief(name)}: expected the name of a {SAFETENSORS} file beside it"
            )
    names = sorted(set(listed.values()))
    if len(names) > MAX_SHARDS:
        raise ModelError(f"{index} names {len(names)} shards: expected at most {MAX_SHARDS}")
    absent = [name for name in names if not (index.parent / name).is_file()]
    if absent:
        raise ModelError(
            f"{index} names {len(names)} shards, of which {len(absent)} are not there, such as "
            f"{brief(absent[0])}: copy the folder again"
        )
    tensors: dict[str, Tensor] = {}
    for name in names:
        held = read_safetensors(index.parent / name)
        expected = {key for key, file in listed.items() if file == name}
        different = held.keys() ^ expected
        if different:
            key = min(different)
            where = "is in" if key in held else "is not in"
            raise ModelError(
                f"tensor {brief(key)} {where} {name}, against {index}: the shards are of different models"
            )
        tensors |= held
    return tensors


def _read_pickle(file: Path) -> dict[str, Tensor]:
    """The tensors of a file of torch.save, mapped from the disk and never larger than the file."""
    try:
        with zipfile.ZipFile(file) as archive:
            packed = [entry.filename for entry in archive.infolist() if entry.compress_type]
        if packed:
            raise ModelError(f"{file} is compressed, which torch.save never does: convert it to safetensors")
        needed = torch.serialization.get_unsafe_globals_in_checkpoint(file)
        code = sorted(name for name in needed if not _may_be_inert(name))
        if code:
            raise ModelError(
                f"{file} asks for {brief(code[0])}, which would run code: it was not loaded; give a file of "
                "tensors alone, or safetensors"
            )
        inert: list[Any] = [(_Inert, name) for name in needed]
        with torch.serialization.safe_globals(inert):
            data = torch.load(file, map_location="cpu", weights_only=True, mmap=True)
    except zipfile.BadZipFile as error:
        raise ModelError(
            f"{file} is damaged, or was saved by a torch before 1.6: save it again, or convert it to "
            "safetensors"
        ) from error
    except (UnpicklingError, RuntimeError, OSError, ValueError, EOFError, KeyError) as error:
        raise ModelError(f"{file} is not a checkpoint of tensors: {one_line(error)}") from error
    except (TypeError, AttributeError, IndexError, RecursionError, OverflowError, MemoryError) as error:
        raise ModelError(f"{file} is damaged: {one_line(error)}: copy it again") from error
    return _tensors(data, file)


def _may_be_inert(name: str) -> bool:
    return name.startswith(INERT_MODULES) or name in INERT_NAMES


def _tensors(data: Any, file: Path) -> dict[str, Tensor]:
    if isinstance(data, Mapping) and isinstance(data.get("state_dict"), Mapping):
        data = data["state_dict"]
    held = (
        {key: value for key, value in data.items() if isinstance(key, str) and isinstance(value, Tensor)}
        if isinstance(data, Mapping)
        else {}
    )
    if not held:
        raise ModelError(f"{file} holds no tensors by name: expected a checkpoint with a state_dict")
    for key, value in held.items():
        if value.device.type != "cpu" or value.layout != torch.strided or value.is_quantized:
            raise ModelError(f"tensor {brief(key)} of {file} is {value.layout}: expected plain numbers")
    return {key: value.detach() for key, value in held.items()}
