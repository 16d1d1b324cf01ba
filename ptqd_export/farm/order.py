"""What a sampling by many workers makes: an order, its shards, and what is known of a finished one."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

from ..errors import RecipeError

Format = Literal["parquet", "webdataset"]
Content = Literal["png", "npy", "latents"]
SUFFIX: Mapping[str, str] = {"parquet": ".parquet", "webdataset": ".tar"}
USUAL_ROWS, USUAL_SHARDS = 1024, 256
"""Samples of a shard where no size is given: at most so many, and fewer where the order has few samples."""


@dataclass(frozen=True)
class Order:
    """All that decides the bytes of a shard, besides which samples it holds.

    Attributes:
        bundle: its seal, which stands for every file of it.
        model: the name that people read.
        seed: of the noise; that of sample i is drawn by (seed, i).
        plan: a precision per step, as text.
        backend: that computes.
        batch_size: samples of one call; sums over a batch of another size may be rounded otherwise.
        shard_size: samples of a shard, a multiple of batch_size, so that batches are those of `run`.
        format, content: of the files; what a row holds of its sample: a PNG file, or float32 values (of
            "latents": not decoded).
        shape: (C, H, W) of a sample.
        labels: classes in turn; empty where every class, or none, is meant.
        prompts: in turn.
        negative_prompt: in place of the empty prompt in guidance.
        conditions: SHA-256 of the dataset of conditions.
        versions: of the packages that compute.
    """

    bundle: str
    model: str
    seed: int
    plan: str
    backend: str
    batch_size: int
    shard_size: int
    format: Format
    content: Content
    shape: tuple[int, int, int]
    labels: tuple[int, ...]
    prompts: tuple[str, ...]
    negative_prompt: str | None
    conditions: str | None
    versions: Mapping[str, str]

    def __post_init__(self) -> None:
        if self.batch_size < 1 or self.shard_size < 1 or self.shard_size % self.batch_size:
            raise RecipeError(
                f"shards of {self.shard_size} samples in batches of {self.batch_size}: expected a multiple"
            )

    def shards(self, num_samples: int) -> list[Shard]:
        """The shards of samples 0 .. num_samples - 1; all but the last have shard_size."""
        size = self.shard_size
        return [
            Shard(n, range(start, min(start + size, num_samples)))
            for n, start in enumerate(range(0, num_samples, size))
        ]

    def file(self, shard: Shard) -> str:
        """The name of a shard's file."""
        return f"shard-{shard.number:06d}{SUFFIX[self.format]}"

    def batches(self, shard: Shard) -> list[range]:
        """The indices of each batch of a shard."""
        first, last, size = shard.samples.start, shard.samples.stop, self.batch_size
        return [range(i, min(i + size, last)) for i in range(first, last, size)]


@dataclass(frozen=True)
class Shard:
    """Consecutive samples that one file holds."""

    number: int
    samples: range


@dataclass(frozen=True)
class Done:
    """A shard that is written: its file, the indices start .. start + rows - 1, size and hash."""

    shard: int
    file: str
    start: int
    rows: int
    bytes: int
    sha256: str


def usual_shard_size(num_samples: int, batch_size: int) -> int:
    """Samples per shard where none are asked for: a multiple of batch_size."""
    rows = min(USUAL_ROWS, -(-num_samples // USUAL_SHARDS))
    return -(-rows // batch_size) * batch_size
