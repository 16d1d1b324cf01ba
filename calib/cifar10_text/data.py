"""CIFAR-10 from one `.npz` file that holds the pictures as JPEG files; README.md says how to make it."""

from __future__ import annotations

import io
from pathlib import Path

import numpy as np
from PIL import Image

CLASSES = ("airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck")
KEYS = {"jpeg", "offset", "label", "is_test", "classes"}


def load(path: Path, *, test: bool = False) -> tuple[np.ndarray, np.ndarray]:
    """Images uint8 (N, 3, 32, 32) and labels int64 (N,), of the training or of the test split.

    Raises:
        SystemExit: no such file, or its arrays are not the ones that README.md describes.
    """
    if not path.is_file():
        raise SystemExit(f"{path} not found: README.md says how to make it; name it with --data")
    with np.load(path) as arrays:
        if missing := KEYS - {*arrays.files}:
            raise SystemExit(f"{path}: no array {min(missing)}")
        if tuple(arrays["classes"].tolist()) != CLASSES:
            raise SystemExit(f"{path}: its classes are {arrays['classes'].tolist()}, expected {[*CLASSES]}")
        jpeg, offset = arrays["jpeg"], arrays["offset"]
        chosen = np.flatnonzero(arrays["is_test"] == test)
        labels = arrays["label"][chosen].astype(np.int64)
    images = np.empty((len(chosen), 3, 32, 32), np.uint8)
    for image, i in zip(images, chosen, strict=True):
        with Image.open(io.BytesIO(jpeg[offset[i] : offset[i + 1]].tobytes())) as picture:
            image[:] = np.asarray(picture.convert("RGB")).transpose(2, 0, 1)
    return images, labels
