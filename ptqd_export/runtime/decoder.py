"""Latents to pictures, by a bundle's decoder."""

from __future__ import annotations

import math

import numpy as np
import numpy.typing as npt

from ..backends import open_engine
from ..bundle.bundle import Bundle
from ..bundle.pipeline import LATENT, PICTURE, graph_file
from ..core.backend import ORT_CPU
from ..core.closing import Closing
from ..errors import ModelError, RecipeError

PIXELS_AT_ONCE = 1 << 18
"""Of the pictures of one call: one of 512 x 512."""
F64 = npt.NDArray[np.float64]


class PictureDecoder(Closing):
    """The decoder of a bundle, loaded on the CPU; a context manager.

    Raises:
        RecipeError: the bundle has none.
        BackendUnavailable: onnxruntime is not installed.
    """

    def __init__(self, bundle: Bundle) -> None:
        record = bundle.manifest.pipeline.decoder
        if record is None:
            raise RecipeError(f"{bundle.path} has no decoder: its samples stay as they are")
        self._record = record
        self._batch = max(1, PIXELS_AT_ONCE // math.prod(record.picture_shape[1:]))
        self._engine = open_engine(ORT_CPU, bundle.file(graph_file(record)))

    def __call__(self, x: F64) -> F64:
        """Pictures (N, channels, H, W), black at -1 and white at 1, not clamped, of latents (N, C, h, w).

        Raises:
            ModelError: a picture is not finite.
        """
        r = self._record
        latents = (x / r.scaling_factor + r.shift_factor).astype(np.float32)
        out = np.empty((len(x), *r.picture_shape))
        low, high = r.image_range
        for i in range(0, len(x), self._batch):
            part = self._engine({LATENT: latents[i : i + self._batch]})[PICTURE]
            out[i : i + self._batch] = (np.asarray(part, np.float64) - low) * (2 / (high - low)) - 1
        if not np.isfinite(out).all():
            raise ModelError("a picture holds NaN or infinite values: the decoder computes nonsense; rebuild")
        return out

    def close(self) -> None:
        self._engine.close()
