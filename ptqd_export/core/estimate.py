"""What a build will do and take, as far as shapes say it: the value that `build --dry-run` prints."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from .precision import Precision


@dataclass(frozen=True)
class PrecisionEstimate:
    """One precision.

    Attributes:
        precision: its name.
        layers: number of layers by their bits, such as {"w8a8": 60, "float": 9}; those of a mixed precision
            at its base.
        bops, half_bops: bit operations of one evaluation for one sample, with float parts of 32 and of 16
            bits; of a mixed precision what its budget allows.
        open: what single layers get is decided by measured noise.
    """

    precision: Precision
    layers: Mapping[str, int]
    bops: int
    half_bops: int
    open: bool


@dataclass(frozen=True)
class Estimate:
    """What a build will do and take; nothing of it was tried.

    Attributes:
        model: its name.
        sampler: solver, steps and guidance in words.
        parameters: of the network.
        macs: multiply-accumulates of one evaluation for one sample.
        precisions: in the order of the recipe.
        bundle_bytes: of the bundle, by what takes them; without finished engines.
        memory_bytes: of the build at its peak, by what takes them.
        free_bytes: memory that is free here.
        evaluations: of the network for one sample in one branch of guidance, by what they are for.
        evaluation_seconds: time of one, from its layers' shapes and a short measurement on this machine.
        seconds: time of the build.
    """

    model: str
    sampler: str
    parameters: int
    macs: int
    precisions: tuple[PrecisionEstimate, ...]
    bundle_bytes: Mapping[str, int]
    memory_bytes: Mapping[str, int]
    free_bytes: int
    evaluations: Mapping[str, int]
    evaluation_seconds: float
    seconds: float
