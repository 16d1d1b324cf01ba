"""Tensors out of a safetensors file whose content comes in pieces, as it is hashed: no more of a large file
is held than is asked for."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from ..errors import BundleError
from ..typed import brief
from .tables import MALFORMED

MOST_HEADER = 8 << 20
"""Most bytes that the header of a weights file has: some 50,000 tensors."""
TYPES = {"I8": np.dtype(np.int8), "U8": np.dtype(np.uint8)}


class Picked:
    """Tensors of integers of one byte, named by `wanted`, out of what `take` is called with."""

    def __init__(self, file: Path, wanted: frozenset[str], size: int) -> None:
        """Args:
        file: for messages.
        size: of the whole file.
        """
        self._file, self._wanted, self._size = file, wanted, size
        self._head = bytearray()
        self._places: list[tuple[int, int, npt.NDArray[Any]]] | None = None
        self._arrays: dict[str, npt.NDArray[Any]] = {}
        self._at = 0

    def take(self, piece: bytes) -> None:
        """The file's next bytes.

        Raises:
            BundleError: the header is none, lacks a tensor, or has it with another type, or where it cannot
                lie.
        """
        if self._places is None:
            self._head += piece
            length = int.from_bytes(self._head[:8], "little")
            if len(self._head) >= 8 and length > min(MOST_HEADER, self._size - 8):
                raise self._damaged(f"a header of {length} bytes")
            if len(self._head) < 8 + length:
                return
            self._places = self._places_in(bytes(self._head[8 : 8 + length]), self._size - 8 - length)
            piece = bytes(self._head[8 + length :])
            self._head.clear()
        for first, last, data in self._places:
            start, end = max(first, self._at), min(last, self._at + len(piece))
            if start < end:
                part = np.frombuffer(piece, data.dtype, end - start, start - self._at)
                data[start - first : end - first] = part
        self._at += len(piece)

    def arrays(self) -> dict[str, npt.NDArray[Any]]:
        """What was asked for, int8 or uint8, when the file has been taken to its end.

        Raises:
            BundleError: the file ended in its header.
        """
        if self._places is None:
            raise self._damaged("it ends in its header")
        return self._arrays

    def _damaged(self, reason: str) -> BundleError:
        return BundleError(f"{self._file} is damaged ({reason}): rebuild the bundle")

    def _places_in(self, header: bytes, size: int) -> list[tuple[int, int, npt.NDArray[Any]]]:
        """Where each tensor lies among the `size` bytes after the header, and the array that it goes to."""
        try:
            found = json.loads(header)
            entries = {name: found[name] for name in sorted(self._wanted) if name in found}
            described = {
                name: (str(entry["dtype"]), _integers(entry["shape"]), _integers(entry["data_offsets"]))
                for name, entry in entries.items()
            }
        except MALFORMED as error:
            raise self._damaged(type(error).__name__) from error
        if lacking := sorted(self._wanted - described.keys()):
            raise BundleError(f"{self._file} has no tensor {brief(lacking[0])}: rebuild the bundle")
        places = []
        for name, (kind, shape, offsets) in described.items():
            if kind not in TYPES:
                raise self._damaged(
                    f"tensor {brief(name)} is of type {brief(kind)}, expected {' or '.join(TYPES)}"
                )
            first, last = offsets if len(offsets) == 2 else (1, 0)
            if not (first <= last <= size and math.prod(shape) == last - first):
                raise self._damaged(f"tensor {brief(name)} of shape {brief(shape)} lies at {brief(offsets)}")
            places.append((name, first, last, kind, shape))
        if sum(last - first for _, first, last, _, _ in places) > size:
            raise self._damaged("its tensors overlap")
        filled = []
        for name, first, last, kind, shape in places:
            flat = np.zeros(last - first, TYPES[kind])
            self._arrays[name] = flat.reshape(shape)
            filled.append((first, last, flat))
        return filled


def _integers(value: object) -> tuple[int, ...]:
    """A list of integers from 0 up, of which a shape or a place is made."""
    if not isinstance(value, list) or len(value) > 8:
        raise ValueError
    if not all(type(number) is int and 0 <= number < 1 << 48 for number in value):
        raise ValueError
    return tuple(value)
