"""Samples as pictures: 8-bit arrays, grids and PNG files.

The same array gives the same bytes: files hold no time stamp.
"""

from __future__ import annotations

import io
import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from PIL import Image

from .errors import ModelError, PTQDError, RecipeError
from .files import check_target, replacing
from .typed import brief

U8 = npt.NDArray[np.uint8]


def to_uint8(x: npt.NDArray[np.floating]) -> U8:
    """Pixels of samples in [-1, 1]: clamped, then (x + 1) * 127.5, rounded half to even.

    The array has any shape; axis 0 is the samples.

    Raises:
        ModelError: a sample holds NaN.
    """
    nan = np.isnan(x)
    if nan.any():
        raise ModelError(
            f"sample {np.argwhere(nan)[0][0]} holds NaN: the model or its engine computes nonsense, run "
            "`verify` on the bundle"
        )
    return np.asarray(np.rint((np.clip(x, -1.0, 1.0).astype(np.float64) + 1.0) * 127.5), np.uint8)


def image_grid(x: npt.NDArray[np.floating], columns: int, gap: int = 0) -> U8:
    """One picture of many samples, row by row; empty cells and gaps are black.

    Args:
        x: (N, C, H, W) in [-1, 1], C 1 or 3, N at least 1.
        columns: samples per row, at least 1.
        gap: pixels between samples.
    Returns:
        uint8 (height, width) for C = 1, (height, width, 3) for C = 3.
    Raises:
        RecipeError: the samples are no pictures, or there is no column.
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
    """Samples (N, C, H, W) in [-1, 1] as PNG files `00000.png`, ..., numbered from `start` on.

    Raises:
        RecipeError: the samples are no pictures.
        ModelError: a sample holds NaN.
    """
    return {
        f"{start + i:05d}.png": encode_png(p[..., 0] if p.shape[-1] == 1 else p)
        for i, p in enumerate(_pixels(x))
    }


def encode_array(x: npt.NDArray[np.floating]) -> bytes:
    """Samples as the bytes of a float32 .npy file, not clamped."""
    buffer = io.BytesIO()
    np.save(buffer, np.asarray(x, np.float32), allow_pickle=False)
    return buffer.getvalue()


RUN = "run.json"
"""File beside the pictures that holds their names and what they were made with."""
PICTURE = re.compile(r"[0-9]{5,}\.png|grid\.png|samples\.npy")
"""Names of the files that a run writes."""
LEFTOVER = re.compile(rf"\.({PICTURE.pattern}|run\.json)\.[0-9]+\.part|\.probe\.[0-9]+")
"""Names of files that a run of an older version may have left behind when it was killed."""


def check_folder(folder: Path) -> Path:
    """Refuse, before any sampling, a folder that holds anything but the pictures of an earlier run.

    Returns:
        the folder, absolute and without links.
    Raises:
        RecipeError: something is in the way; names it.
    """

    return check_target(folder, "a set of pictures", _in_the_way)


def _in_the_way(inside: list[Path]) -> str | None:
    own = _listed(inside[0].parent)
    inside = [file for file in inside if not LEFTOVER.fullmatch(file.name)]
    other = next((file.name for file in inside if not (file.name in own and file.is_file())), None)
    if other is None:
        return None
    return f"{brief(other)} is not of an earlier run (by its {RUN}): give another --out for the pictures"


def _listed(folder: Path) -> set[str]:
    """A folder's run.json, and the pictures that it lists; empty where there is no run.json.

    Names that a run could not have written are left out.
    """
    try:
        files = json.loads((folder / RUN).read_bytes())["files"]
    except (OSError, LookupError, TypeError, ValueError, RecursionError):
        return set()
    if not isinstance(files, list):
        return set()
    return {RUN, *(name for name in files if isinstance(name, str) and PICTURE.fullmatch(name))}


def write_pictures(folder: Path, pictures: Mapping[str, bytes], about: Mapping[str, Any]) -> None:
    """Write a set of pictures and its run.json, in place of an earlier set and in one step.

    Raises:
        RecipeError: the folder holds something else by now.
        PTQDError: the folder cannot be written.
    """
    try:
        with replacing(folder, _in_the_way) as part:
            for name, data in pictures.items():
                (part / name).write_bytes(data)
            text = json.dumps({**about, "files": list(pictures)}, indent=1)
            (part / RUN).write_bytes(text.encode() + b"\n")
    except OSError as error:
        raise PTQDError(
            f"cannot write {folder}: {error.strerror}: choose another place or free some space"
        ) from error


def _pixels(x: npt.NDArray[np.floating]) -> U8:
    """uint8 (N, H, W, C) of samples (N, C, H, W)."""
    if x.ndim != 4 or len(x) == 0 or x.shape[1] not in (1, 3):
        raise RecipeError(
            f"samples of shape {x.shape} are no pictures: expected (N, 1 or 3, H, W); save them as .npy "
            "instead"
        )
    return np.moveaxis(to_uint8(x), 1, -1)
