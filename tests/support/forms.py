"""A network whose layers differ in geometry: what grids with zero points, and padding with zeros, meet."""

from __future__ import annotations

import torch
from torch import nn
from torch.nn import functional as F

CONVS = {"padded", "strided", "dilated", "uneven", "same", "grouped", "pointwise", "last"}
PADDED = CONVS - {"strided", "pointwise"}


class Forms(nn.Module):
    """Convs with and without padding, stride, dilation, groups and bias; linears of two and three dimensions.

    It takes what `toy.feeds_of` gives.
    """

    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(4, 12)
        self.padded = nn.Conv2d(2, 12, 3, padding=1)
        self.strided = nn.Conv2d(12, 8, 3, stride=2)
        self.vector = nn.Linear(8, 12)
        self.dilated = nn.Conv2d(12, 10, 3, padding=2, dilation=2)
        self.uneven = nn.Conv2d(10, 8, (3, 2), stride=(2, 1), padding=(2, 1), bias=False)
        self.plain = nn.Linear(8, 12, bias=False)
        self.same = nn.Conv2d(12, 12, 4, padding="same")
        self.grouped = nn.Conv2d(12, 12, 3, padding=1, groups=3, bias=False)
        self.pointwise = nn.Conv2d(12, 12, 1, bias=False)
        self.rows = nn.Linear(12, 12)
        self.last = nn.Conv2d(12, 2, 3, padding=1)

    def forward(
        self, sample: torch.Tensor, timestep: torch.Tensor, class_labels: torch.Tensor
    ) -> torch.Tensor:
        emb = self.embedding(class_labels) + (timestep[:, None] * 0.01).sin()
        h = F.silu(self.padded(sample) + emb[:, :, None, None])
        h = h + self.vector(F.silu(self.strided(h)).flatten(2).mean(2))[:, :, None, None]
        uneven = self.uneven(F.silu(self.dilated(h))).flatten(2).mean(2)
        h = F.silu(self.same(h) + self.plain(F.silu(uneven))[:, :, None, None])
        h = F.silu(self.pointwise(F.silu(self.grouped(h))))
        rows = self.rows(h.flatten(2).transpose(1, 2)).transpose(1, 2).reshape(h.shape)
        last: torch.Tensor = self.last(h + rows)
        return last
