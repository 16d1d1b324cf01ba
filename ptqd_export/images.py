"""Samples as pictures: 8-bit arrays, grids and PNG files. Same array, same bytes: files carry no time stamp."""

from __future__ import annotations

import contextlib
import io
import os
from collections.abc import Iterator, Mapping
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


def encode_png(array: U8) -> bytes:
    """uint8 (H, W) or (H, W, 3) as a PNG file's bytes."""
    buffer = io.BytesIO()
    Image.fromarray(np.ascontiguousarray(array)).save(buffer, "PNG", optimize=False)
    return buffer.getvalue()


def encode_images(x: npt.NDArray[np.floating], start: int = 0) -> dict[str, bytes]:
    """Samples (N, C, H, W) in [-1, 1] as PNG files `00000.png`, ... from number `start` on.

    Raises:
        RecipeError: samples that are no pictures.
        ModelError: a sample holds NaN.
    """
    return {f"{start + i:05d}.png": encode_png(p[..., 0] if p.shape[-1] == 1 else p) for i, p in enumerate(_pixels(x))}


def encode_array(x: npt.NDArray[np.floating]) -> bytes:
    """Samples as the bytes of a float32 .npy file, unclamped."""
    buffer = io.BytesIO()
    np.save(buffer, np.asarray(x, np.float32), allow_pickle=False)
    return buffer.getvalue()


def save_png(array: U8, path: Path) -> None:
    """Write uint8 (H, W) or (H, W, 3) as PNG, whole or not at all.

    Raises:
        PTQDError: the file cannot be written.
    """
    write_atomic(path, encode_png(array))


def save_images(folder: Path, x: npt.NDArray[np.floating], start: int = 0) -> list[Path]:
    """Write `encode_images(x, start)` into a folder, which is made if need be: all files or none.

    Raises:
        RecipeError: samples that are no pictures.
        ModelError: a sample holds NaN.
        PTQDError: a file cannot be written.
    """
    files = encode_images(x, start)
    with output_folder(folder):
        write_files(folder, files)
    return [folder / name for name in files]


@contextlib.contextmanager
def output_folder(folder: Path) -> Iterator[None]:
    """Make a folder and write to it, before any work is done for it; what was made goes again if the work fails and left nothing.

    Raises:
        PTQDError: it cannot be made or written.
    """
    made = [f for f in (folder, *folder.parents) if not f.exists()]
    probe = folder / f".probe.{os.getpid()}"
    try:
        try:
            folder.mkdir(parents=True, exist_ok=True)
            probe.touch()
        except OSError as error:
            raise PTQDError(f"cannot write to the folder {folder}: {error.strerror}: choose another one") from error
        finally:
            with contextlib.suppress(OSError):
                probe.unlink()
        yield
    except BaseException:
        for f in made:
            with contextlib.suppress(OSError):  # what holds something stays
                f.rmdir()
        raise


def write_files(folder: Path, files: Mapping[str, bytes]) -> None:
    """Write files beside their final places, then move them there, all when all are written: a crash leaves the old files or none.

    Raises:
        PTQDError: a file cannot be written.
    """
    parts = {name: folder / f".{name}.{os.getpid()}.part" for name in files}
    target = folder
    try:
        for name, data in files.items():
            target = folder / name
            parts[name].write_bytes(data)
        for name, part in parts.items():
            target = folder / name
            os.replace(part, target)
    except OSError as error:
        raise PTQDError(f"cannot write {target}: {error.strerror}: choose another place or free some space") from error
    finally:
        # Nothing is left to remove after the move; Ctrl-C and a full disk pass here too.
        for part in parts.values():
            with contextlib.suppress(OSError):
                part.unlink(missing_ok=True)


def write_atomic(path: Path, data: bytes) -> None:
    """Write a file, whole or not at all.

    Raises:
        PTQDError: the file cannot be written.
    """
    write_files(path.parent, {path.name: data})


def _pixels(x: npt.NDArray[np.floating]) -> U8:
    """uint8 (N, H, W, C) of samples (N, C, H, W)."""
    if x.ndim != 4 or len(x) == 0 or x.shape[1] not in (1, 3):
        raise RecipeError(f"samples of shape {x.shape} are no pictures: expected (N, 1 or 3, H, W); save them as .npy instead")
    return np.moveaxis(to_uint8(x), 1, -1)
