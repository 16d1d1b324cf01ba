"""The small Fashion-MNIST classifier whose penultimate features give a Frechet distance. Importing it has no
side effects."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch
from safetensors.torch import load_file
from torch import Tensor, nn

FEATURES = 64
WEIGHTS = "classifier.safetensors"
REFERENCE = "reference_stats.safetensors"
"""Tensors `mean` float64 (64,) and `covariance` float64 (64, 64): the features of the 10,000 test images."""


class Classifier(nn.Module):
    """Three convolution blocks, a 64-dimensional bottleneck, ten classes.

    The bottleneck ends in BatchNorm and has no ReLU: its features have mean 0 and variance 1 over the
    training images and none of them is dead, which suits the Gaussian fit behind the Frechet distance.
    """

    def __init__(self) -> None:
        super().__init__()

        def block(inputs: int, outputs: int) -> list[nn.Module]:
            return [
                nn.Conv2d(inputs, outputs, 3, padding=1, bias=False),
                nn.BatchNorm2d(outputs),
                nn.ReLU(),
                nn.MaxPool2d(2),
            ]

        self.body = nn.Sequential(*block(1, 32), *block(32, 64), *block(64, 128), nn.Flatten())
        self.neck = nn.Sequential(nn.Linear(128 * 4 * 4, FEATURES, bias=False), nn.BatchNorm1d(FEATURES))
        self.head = nn.Linear(FEATURES, 10)

    def features(self, x: Tensor) -> Tensor:
        """Penultimate features (N, 64) of images (N, 1, 32, 32) in [-1, 1]."""
        return self.neck(self.body(x))

    def forward(self, x: Tensor) -> Tensor:
        """Logits (N, 10) of images (N, 1, 32, 32) in [-1, 1]."""
        return self.head(self.features(x))


class Features:
    """A trained classifier behind numpy: call it for features, then ask for the classes of those features."""

    def __init__(self, module: Classifier, batch_size: int = 250) -> None:
        self._module, self._batch = module.eval().requires_grad_(False), batch_size

    def __call__(self, x: np.ndarray) -> np.ndarray:
        """Penultimate features, float64 (N, 64), of images float32 (N, 1, 32, 32) in [-1, 1], computed in
        float32.

        Raises:
            ValueError: another shape.
        """
        if x.ndim != 4 or x.shape[1:] != (1, 32, 32):
            raise ValueError(f"images have shape {x.shape}: expected (N, 1, 32, 32)")
        x = np.ascontiguousarray(x, np.float32)
        out = np.empty((len(x), FEATURES))
        with torch.inference_mode():
            for i in range(0, len(x), self._batch):
                out[i : i + self._batch] = self._module.features(
                    torch.from_numpy(x[i : i + self._batch])
                ).numpy()
        return out

    def classes(self, features: np.ndarray) -> np.ndarray:
        """Predicted classes, int64 (N,), from features (N, 64)."""
        head = self._module.head
        return np.argmax(features @ head.weight.numpy().T.astype(np.float64) + head.bias.numpy(), axis=1)


def load_features(folder: Path) -> Features:
    """The classifier whose weights lie in `folder`."""
    module = Classifier()
    module.load_state_dict(load_file(Path(folder) / WEIGHTS))
    return Features(module)


def load_reference(folder: Path) -> tuple[np.ndarray, np.ndarray]:
    """Mean (64,) and covariance (64, 64), float64, of the test images' features."""
    stats = load_file(Path(folder) / REFERENCE)
    return stats["mean"].numpy(), stats["covariance"].numpy()
