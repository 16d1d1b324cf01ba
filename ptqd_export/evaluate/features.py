"""What the user brings to judge samples by: a classifier as an ONNX file, and statistics of data.

The classifier is a graph and the statistics are arrays: nothing of them is code that Python runs.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt
from safetensors import SafetensorError
from safetensors.numpy import load_file

from ..backends import OrtEngine
from ..errors import GraphError, RecipeError
from ..files import sha256_file
from .metrics import feature_stats, pixels

F64 = npt.NDArray[np.float64]
FEATURES, LOGITS = "features", "logits"
"""Outputs of a classifier: (N, D), and (N, K) where it has classes."""
BATCH = 250


@dataclass(frozen=True)
class Judged:
    """What a classifier says of samples.

    Attributes:
        features: (N, D).
        classes: (N,), or None where it has no classes.
    """

    features: F64
    classes: npt.NDArray[np.int64] | None


class Classifier:
    """An ONNX file with one input, float32 (N, C, H, W) in [-1, 1], and the output `features`, float32
    (N, D); with the output `logits`, (N, K), it also names classes. The batch N is free.

    Attributes:
        sha256: of the file.
    Raises:
        RecipeError: no such file, it does not load, or has another interface.
        BackendUnavailable: onnxruntime is not installed.
    """

    def __init__(self, path: Path, sample_shape: tuple[int, ...]) -> None:
        if not path.is_file():
            raise RecipeError(f"the classifier {path} does not exist: give an ONNX file")
        self.sha256 = sha256_file(path)
        try:
            self._engine = OrtEngine(path)
        except GraphError as error:
            raise RecipeError(f"the classifier {path} is no ONNX file that runs here: give one") from error
        wanted = [(None, *sample_shape)]
        shapes = [spec.shape for spec in self._engine.specs]
        if shapes != wanted or FEATURES not in self._engine.outputs:
            raise RecipeError(
                f"the classifier {path} has inputs {shapes} and outputs {list(self._engine.outputs)}: "
                f"expected one input {wanted[0]}, with a free batch, and the output {FEATURES!r} "
                f"({LOGITS!r} for classes)"
            )

    def __call__(self, x: npt.NDArray[np.floating]) -> Judged:
        """Judge samples (N, C, H, W) as they look in 8-bit pictures."""
        features, logits = [], []
        name = self._engine.inputs[0]
        for i in range(0, len(x), BATCH):
            found = self._engine({name: pixels(x[i : i + BATCH])})
            features.append(np.asarray(found[FEATURES], np.float64))
            if LOGITS in found:
                logits.append(np.argmax(found[LOGITS], axis=1))
        return Judged(np.concatenate(features), np.concatenate(logits) if logits else None)

    def close(self) -> None:
        self._engine.close()


@dataclass(frozen=True)
class Data:
    """Features of data in the same classifier.

    Attributes:
        mean, covariance: (D,) and (D, D).
        features: (M, D), or None where there are their moments alone, which give no kernel distance.
        sha256: of the file that they come from.
    """

    mean: F64
    covariance: F64
    features: F64 | None
    sha256: str

    @classmethod
    def load(cls, path: Path) -> Data:
        """From a safetensors file with `features` (M, D), or with `mean` (D,) and `covariance` (D, D).

        Raises:
            RecipeError: it is none.
        """
        try:
            arrays = {name: np.asarray(a, np.float64) for name, a in load_file(path).items()}
        except (OSError, SafetensorError, ValueError) as error:
            raise RecipeError(
                f"{path} cannot be read as safetensors ({error}): give a file with features, or with mean "
                "and covariance"
            ) from error
        features = arrays.get("features")
        if features is not None:
            return cls(*feature_stats(features), features, sha256_file(path))
        mean, covariance = arrays.get("mean"), arrays.get("covariance")
        if mean is None or covariance is None or mean.ndim != 1 or covariance.shape != (len(mean),) * 2:
            shapes = {name: array.shape for name, array in arrays.items()}
            raise RecipeError(
                f"{path} holds {shapes}: expected features (M, D), or mean (D,) and covariance (D, D)"
            )
        return cls(mean, covariance, None, sha256_file(path))
