"""Files of a bundle, which may come from anywhere: names of a fixed pattern, sizes that make sense, content
as hashed.

What is used of a file is what was hashed: small files are read once, and used from memory. Others are opened
by a runtime later, by their names: `Reader.check_unchanged` then tells whether they are still the files that
were hashed.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
import re
import stat
from collections.abc import Callable, Collection, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, BinaryIO

import numpy.typing as npt

from ..errors import BundleError
from ..typed import brief
from .stored import Picked

NAME = re.compile(r"(?!\.)[\w.-]{1,120}\.(json|txt|onnx|safetensors|engine)", re.ASCII)
FOLDERS = (
    "unet",
    "vae_decoder",
    "text_encoder",
    "text_encoder_2",
    "tokenizer",
    "tokenizer_2",
    "scheduler",
)
"""Folders that a bundle of a whole pipeline may have, one level deep."""
MIB = 1 << 20
MAX_BYTES = {"json": 4 * MIB, "txt": 16 * MIB, "onnx": 64 * MIB, "safetensors": 1 << 38, "engine": 1 << 38}
"""By suffix. Graphs hold no weights; the large kinds are compared with what the graphs take of them."""
PIECE = 4 * MIB
COPY_AGAIN = "copy the bundle again or rebuild it"


@dataclass(frozen=True)
class FileEntry:
    """SHA-256, in hex, and size in bytes of a file."""

    sha256: str
    size: int


def check_name(name: str) -> None:
    """Raise BundleError for a name that no bundle holds."""
    folder, _, file = name.rpartition("/")
    if folder not in ("", *FOLDERS) or not NAME.fullmatch(file) or name.startswith("/"):
        raise BundleError(f"it names a file {brief(name)}, which no bundle holds: do not trust it")


@dataclass(frozen=True)
class Reader:
    """Reads the files of a bundle's folder, and holds them to their hashes.

    Symbolic links are followed, as a cache of downloads has them: what counts is the content.
    """

    root: Path
    files: Mapping[str, FileEntry]
    _stamps: dict[str, tuple[int, ...]] = field(default_factory=dict)

    def read(self, name: str) -> bytes:
        """The content of a file, hashed.

        Raises:
            BundleError: it is missing, has another size or content than the manifest says, or is no regular
                file.
        """
        pieces: list[bytes] = []
        self._hash(name, pieces.append)
        return b"".join(pieces)

    def tensors(self, name: str, wanted: Collection[str]) -> dict[str, npt.NDArray[Any]]:
        """Some tensors of a safetensors file, int8 or uint8, from the content that is hashed.

        Raises:
            BundleError: as `read`, or the file does not hold them.
        """
        picked = Picked(self.root / name, frozenset(wanted), self.files[name].size)
        self._hash(name, picked.take)
        return picked.arrays()

    def check(self, name: str) -> None:
        """Hash a file.

        Raises:
            BundleError: as `read`.
        """
        self._hash(name, lambda piece: None)

    def _hash(self, name: str, take: Callable[[bytes], object]) -> None:
        path, entry = self.root / name, self.files[name]
        try:
            with _opened(path) as (file, found):
                if found.st_size != entry.size:
                    raise BundleError(
                        f"{path} has {found.st_size} bytes, the manifest says {entry.size}: {COPY_AGAIN}"
                    )
                digest, left = hashlib.sha256(), entry.size + 1
                while left > 0 and (piece := file.read(min(PIECE, left))):
                    digest.update(piece)
                    take(piece)
                    left -= len(piece)
                self._stamps[name] = _stamp(os.fstat(file.fileno()))
        except FileNotFoundError as error:
            raise BundleError(f"{path} is missing: {COPY_AGAIN}") from error
        except OSError as error:
            raise BundleError(f"{path} cannot be read ({error.strerror}): {COPY_AGAIN}") from error
        if digest.hexdigest() != entry.sha256:
            raise BundleError(
                f"{path} does not match its SHA-256 in the manifest: it was changed or damaged; {COPY_AGAIN}"
            )

    def check_unchanged(self) -> None:
        """The files under these names are those that were hashed.

        Raises:
            BundleError: another bundle has taken their place, or one of them was changed.
        """
        for name, stamp in self._stamps.items():
            try:
                same = _stamp(os.stat(self.root / name)) == stamp
            except OSError:
                same = False
            if not same:
                raise BundleError(
                    f"{self.root} was replaced or changed while it was being read: run the command again"
                )


def _stamp(found: os.stat_result) -> tuple[int, ...]:
    return found.st_dev, found.st_ino, found.st_size, found.st_mtime_ns


@contextlib.contextmanager
def _opened(path: Path) -> Iterator[tuple[BinaryIO, os.stat_result]]:
    """A regular file, open for reading, and what the system knows of it; a FIFO does not hold us up.

    Raises:
        BundleError: it is no regular file.
        OSError: it cannot be opened.
    """
    fd = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_NOCTTY | os.O_CLOEXEC)
    try:
        found = os.fstat(fd)
        if not stat.S_ISREG(found.st_mode):
            raise BundleError(f"{path} is no regular file: {COPY_AGAIN}")
    except BaseException:
        os.close(fd)
        raise
    with open(fd, "rb") as file:
        yield file, found


def read_small(path: Path, most: int) -> bytes:
    """The content of a file of at most `most` bytes.

    Raises:
        BundleError: it is larger, or no regular file.
        OSError: it cannot be read.
    """
    with _opened(path) as (file, found):
        if found.st_size > most:
            raise BundleError(f"{path} has {found.st_size} bytes: expected at most {most}")
        return file.read(most)
