"""Weight codes that took long to choose, on disk: a build that was stopped takes them up again."""

from __future__ import annotations

import dataclasses
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

import numpy as np
from safetensors import SafetensorError
from safetensors.numpy import load_file, save

from ..core.quant import I8, QuantizedNetwork
from ..files import digest, writing_file


class KeptCodes:
    """Codes of parts of a network, each part in a file of its own.

    A file's name is a digest of everything that decides what is in it.

    Args:
        folder: of intermediate results; it is made.
        start: what the parts are rounded from: all scales and ranges decide.
        parts: what else decides.
    Raises:
        OSError: the folder cannot be made.
    """

    def __init__(self, folder: Path, start: QuantizedNetwork, *parts: str) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        self._folder, self._layers = folder, start.layers
        self._key = digest(*parts, *(_content(layer) for layer in start.layers.values()))

    def _file(self, part: str) -> Path:
        return self._folder / f"codes-{digest(self._key, part)[:16]}.safetensors"

    def read(self, part: str, names: Collection[str]) -> dict[str, I8] | None:
        """The codes of the layers `names`; None where there are none, or damaged ones."""
        try:
            codes = load_file(self._file(part))
        except (OSError, SafetensorError):
            return None
        fits = codes.keys() == set(names) and all(
            value.dtype == np.int8 and value.shape == self._layers[name].weight.shape
            for name, value in codes.items()
        )
        return codes if fits else None

    def write(self, part: str, codes: Mapping[str, I8]) -> None:
        """Keep the codes of a part.

        Raises:
            OSError: they cannot be written.
        """
        with writing_file(self._file(part)) as file:
            file.write(save(dict(codes)))


def _content(value: Any) -> str:
    """Digest of every field of a layer."""
    if isinstance(value, np.ndarray):
        return digest(str(value.shape), value.tobytes())
    if dataclasses.is_dataclass(value):
        return digest(*(_content(getattr(value, field.name)) for field in dataclasses.fields(value)))
    return repr(value)
