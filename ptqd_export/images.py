"""Samples as pictures: 8-bit arrays, grids and PNG files. Same array, same bytes: files carry no time stamp."""

from __future__ import annotations

import contextlib
import io
import os
from pathlib import Path

import numpy as np
import numpy.typing as npt
from PIL import Image

from .errors import ModelError, PTQDError, RecipeError

U8 = npt.NDArray[np.uint8]


def to_uint8(x: npt.NDArray[np.floating]) -> U8:
    """Pixels of samples in [-1, 1]: clamped, then (x + 1) * 127.5 rounded half to even. Any shape, axis 0 the samples.

    Raises:
        ModelError: a sample holds NaN.
    """
    nan = np.isnan(x)
    if nan.any():
        raise ModelError(f"sample {np.argwhere(nan)[0][0]} holds NaN: the model or its engine computes nonsense, run `verify` on the bundle")
    return np.asarray(np.rint((np.clip(x, -1.0, 1.0).astype(np.float64) + 1.0) * 127.5), np.uint8)


def image_grid(x: npt.NDArray[np.floating], columns: int, gap: int = 0) -> U8:
    """One picture of many samples, row by row; cells that are left over and gaps are black.

    Args:
        x: (N, C, H, W) in [-1, 1], C 1 or 3, N at least 1.
        columns: samples per row, at least 1.
        gap: pixels between samples.
    Returns:
        uint8 (height, width) for C = 1, (height, width, 3) for C = 3.
    Raises:
        RecipeError: samples that are no pictures, or no column.
        ModelError: a sample holds NaN.
    """
    pixels = _pixels(x)
    if columns < 1:
        raise RecipeError(f"a grid of {columns} columns: give at least 1")
    n, height, width, channels = pixels.shape
    rows, columns = -(-n // columns), min(n, columns)
    grid = np.zeros((rows * (height + gap) - gap, columns * (width + gap) - gap, channels), np.uint8)
    for i, picture in enumerate(pixels):
        top, left = i // columns * (height + gap), i % columns * (width + gap)
        grid[top : top + height, left : left + width] = picture
    return grid[..., 0] if channels == 1 else grid


def save_png(array: U8, path: Path) -> None:
    """Write uint8 (H, W) or (H, W, 3) as PNG, whole or not at all.

    Raises:
        PTQDError: the file cannot be written.
    """
    buffer = io.BytesIO()
    Image.fromarray(np.ascontiguousarray(array)).save(buffer, "PNG", optimize=False)
    write_atomic(path, buffer.getvalue())


def save_images(folder: Path, x: npt.NDArray[np.floating], start: int = 0) -> list[Path]:
    """Write samples (N, C, H, W) in [-1, 1] as `00000.png`, ... from number `start` on; the folder is made if need be.

    Raises:
        RecipeError: samples that are no pictures.
        ModelError: a sample holds NaN.
        PTQDError: a file cannot be written.
    """
    pixels = _pixels(x)
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise PTQDError(f"cannot make the folder {folder}: {error.strerror}: choose another one") from error
    paths = [folder / f"{start + i:05d}.png" for i in range(len(pixels))]
    for path, picture in zip(paths, pixels, strict=True):
        save_png(picture[..., 0] if picture.shape[-1] == 1 else picture, path)
    return paths


def save_array(x: npt.NDArray[np.floating], path: Path) -> Path:
    """Write samples as float32 .npy, unclamped, whole or not at all."""
    buffer = io.BytesIO()
    np.save(buffer, np.asarray(x, np.float32), allow_pickle=False)
    write_atomic(path, buffer.getvalue())
    return path


def check_folder(folder: Path) -> None:
    """Make a folder and write to it, before any work is done for it.

    Raises:
        PTQDError: it cannot be made or written.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
        probe = folder / f".probe.{os.getpid()}"
        probe.touch()
        probe.unlink()
    except OSError as error:
        raise PTQDError(f"cannot write to the folder {folder}: {error.strerror}: choose another one") from error


def write_atomic(path: Path, data: bytes) -> None:
    """Write a file beside its final place, then move it there: a crash leaves the old file or none.

    Raises:
        PTQDError: the file cannot be written.
    """
    part = path.with_name(f".{path.name}.{os.getpid()}.part")
    try:
        part.write_bytes(data)
        os.replace(part, path)
    except OSError as error:
        raise PTQDError(f"cannot write {path}: {error.strerror}: choose another place or free some space") from error
    finally:
        # Nothing is left to remove after the move; Ctrl-C and a full disk pass here too.
        with contextlib.suppress(OSError):
            part.unlink(missing_ok=True)


def _pixels(x: npt.NDArray[np.floating]) -> U8:
    """uint8 (N, H, W, C) of samples (N, C, H, W)."""
    if x.ndim != 4 or len(x) == 0 or x.shape[1] not in (1, 3):
        raise RecipeError(f"samples of shape {x.shape} are no pictures: expected (N, 1 or 3, H, W); save them as .npy instead")
    return np.moveaxis(to_uint8(x), 1, -1)
