"""The small CIFAR-10 classifier that judges samples: by its classes, and by the distances between its
penultimate features. Importing it has no side effects."""

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


def _block(inputs: int, outputs: int) -> list[nn.Module]:
    return [nn.Conv2d(inputs, outputs, 3, padding=1, bias=False), nn.BatchNorm2d(outputs), nn.ReLU()]


class Residual(nn.Module):
    """Two convolutions beside an identity, (N, C, H, W) to the same."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.body = nn.Sequential(*_block(channels, channels), *_block(channels, channels))

    def forward(self, x: Tensor) -> Tensor:
        return x + self.body(x)


class Classifier(nn.Module):
    """A residual network of eight convolutions, a 64-dimensional bottleneck, ten classes.

    The bottleneck ends in BatchNorm and has no ReLU: its features have mean 0 and variance 1 over the
    training images and none of them is dead, which suits the Gaussian fit behind the Frechet distance.
    """

    def __init__(self) -> None:
        super().__init__()
        pool = nn.MaxPool2d(2)
        self.low = nn.Sequential(*_block(3, 24), pool, *_block(24, 48), pool)
        self.high = nn.Sequential(
            *_block(48, 96), Residual(96), pool, *_block(96, 192), Residual(192), pool, nn.Flatten()
        )
        self.neck = nn.Sequential(nn.Linear(192 * 2 * 2, FEATURES, bias=False), nn.BatchNorm1d(FEATURES))
        self.head = nn.Linear(FEATURES, 10)

    def features(self, x: Tensor) -> Tensor:
        """Penultimate features (N, 64) of images (N, 3, 32, 32) in [-1, 1]."""
        return self.neck(self.high(self.low(x)))

    def forward(self, x: Tensor) -> Tensor:
        """Logits (N, 10) of images (N, 3, 32, 32) in [-1, 1]."""
        return self.head(self.features(x))


class Features:
    """A trained classifier behind numpy: call it for features, then ask for the classes of those features."""

    def __init__(self, module: Classifier, batch_size: int = 250) -> None:
        self._module, self._batch = module.eval().requires_grad_(False), batch_size

    def __call__(self, x: np.ndarray) -> np.ndarray:
        """Penultimate features, float64 (N, 64), of images (N, 3, 32, 32): uint8, or floats in [-1, 1],
        computed in float32.

        Raises:
            ValueError: another shape.
        """
        if x.ndim != 4 or x.shape[1:] != (3, 32, 32):
            raise ValueError(f"images have shape {x.shape}: expected (N, 3, 32, 32)")
        out = np.empty((len(x), FEATURES))
        with torch.inference_mode():
            for i in range(0, len(x), self._batch):
                part = torch.from_numpy(x[i : i + self._batch])
                part = part.float() / 127.5 - 1 if x.dtype == np.uint8 else part.float()
                out[i : i + self._batch] = self._module.features(part).numpy()
        return out

    def classes(self, features: np.ndarray) -> np.ndarray:
        """Predicted classes, int64 (N,), from features (N, 64)."""
        head = self._module.head
        return np.argmax(features @ head.weight.numpy().T.astype(np.float64) + head.bias.numpy(), axis=1)


def load_classifier(folder: Path) -> Classifier:
    """The classifier whose weights lie in `folder` (float16 there), in float32, for inference."""
    module = Classifier()
    module.load_state_dict(load_file(Path(folder) / WEIGHTS))
    return module.eval().requires_grad_(False)


def load_features(folder: Path) -> Features:
    """The same, for features and classes of arrays."""
    return Features(load_classifier(folder))


def load_reference(folder: Path) -> tuple[np.ndarray, np.ndarray]:
    """Mean (64,) and covariance (64, 64), float64, of the test images' features."""
    stats = load_file(Path(folder) / REFERENCE)
    return stats["mean"].numpy(), stats["covariance"].numpy()
