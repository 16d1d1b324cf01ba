"""Fashion-MNIST from its IDX files (Debian package `dataset-fashion-mnist`, or any folder that holds
them)."""

from __future__ import annotations

import gzip
import struct
from pathlib import Path

import numpy as np

DEBIAN_PATH = Path("/usr/share/datasets/fashion-mnist")
CLASSES = (
    "T-shirt/top", "Trouser", "Pullover", "Dress", "Coat",
    "Sandal", "Shirt", "Sneaker", "Bag", "Ankle boot",
)  # fmt: skip


def read_idx(path: Path) -> np.ndarray:
    """Read one IDX file, gzipped or not, as uint8.

    Raises:
        SystemExit: no such file, or not an IDX file of unsigned bytes.
    """
    for candidate in (path, path.with_name(path.name + ".gz")):
        if candidate.is_file():
            raw = candidate.read_bytes()
            if candidate.suffix == ".gz":
                raw = gzip.decompress(raw)
            zero, dtype, ndim = struct.unpack(">HBB", raw[:4])
            if zero != 0 or dtype != 8:
                raise SystemExit(f"{candidate}: not an IDX file of unsigned bytes (magic {raw[:4].hex()})")
            shape = struct.unpack(f">{ndim}I", raw[4 : 4 + 4 * ndim])
            return np.frombuffer(raw, np.uint8, offset=4 + 4 * ndim).reshape(shape)
    raise SystemExit(
        f"{path}[.gz] not found: install the Debian package `dataset-fashion-mnist`, or name the folder of "
        "the IDX files with --data"
    )


def load(folder: Path = DEBIAN_PATH, split: str = "train") -> tuple[np.ndarray, np.ndarray]:
    """Images uint8 (N, 32, 32), zero-padded from 28x28, and labels int64 (N,). `split` is "train" or
    "t10k"."""
    images = read_idx(folder / f"{split}-images-idx3-ubyte")
    labels = read_idx(folder / f"{split}-labels-idx1-ubyte")
    return np.pad(images, ((0, 0), (2, 2), (2, 2))), labels.astype(np.int64)
