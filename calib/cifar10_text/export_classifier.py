"""Write the classifier as `classifier.onnx` for `ptqd-export eval`: outputs `features` and `logits`.

python calib/cifar10_text/export_classifier.py
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch
from classifier import load_classifier
from torch import Tensor, nn

from ptqd_export.export import save
from ptqd_export.export.from_torch import export_part

HERE = Path(__file__).parent


class Judge(nn.Module):
    """Features (N, 64) and logits (N, 10) of images (N, 3, 32, 32) in [-1, 1]."""

    def __init__(self) -> None:
        super().__init__()
        self.module = load_classifier(HERE)

    def forward(self, sample: Tensor) -> tuple[Tensor, Tensor]:
        features = self.module.features(sample)
        return features, self.module.head(features)


if __name__ == "__main__":
    torch.manual_seed(0)
    feed = ("sample", np.zeros((2, 3, 32, 32), np.float32))
    model = export_part(Judge(), "the classifier", feed, ("features", "logits"))
    save({"classifier": model}, HERE, None)
