"""Engine: the one face of everything that predicts noise (ONNX Runtime, TensorRT, the torch simulation, a fake)."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from types import TracebackType
from typing import Protocol, Self, runtime_checkable

import numpy as np
import numpy.typing as npt

Array = npt.NDArray[np.generic]
Feeds = Mapping[str, Array]

SAMPLE, TIMESTEP, STEP, EPSILON = "sample", "timestep", "step", "epsilon"
"""Names in every graph: sample f32 (B, C, H, W), timestep int64 (B,), step int64 (1,) = row of the tables, epsilon f32 (B, C, H, W)."""

NOISE, NEXT_SAMPLE, NEXT_TIMESTEP, NEXT_STEP = "noise", "next_sample", "next_timestep", "next_step"
"""Names in the graph of the sampler's update, besides those above (`export.sampler_update`)."""


@dataclass(frozen=True)
class TensorSpec:
    """Name, numpy dtype name and shape of a graph input or output; None is the batch."""

    name: str
    dtype: str
    shape: tuple[int | None, ...]


@runtime_checkable
class Engine(Protocol):
    """A network that predicts epsilon.

    `inputs` and `outputs` name the tensors; a call takes a mapping that holds at least `inputs` (more is ignored) and
    returns a dict of fresh arrays which the caller owns. Engines are context managers; `close` may be called twice.
    """

    @property
    def inputs(self) -> tuple[str, ...]: ...
    @property
    def outputs(self) -> tuple[str, ...]: ...
    def __call__(self, feeds: Feeds) -> dict[str, Array]: ...
    def close(self) -> None: ...
    def __enter__(self) -> Self: ...
    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None: ...


class FakeEngine:
    """An engine made of a numpy function, for tests: `FakeEngine(lambda f: 0.1 * f["sample"])`."""

    inputs: tuple[str, ...] = (SAMPLE, TIMESTEP)
    outputs: tuple[str, ...] = (EPSILON,)

    def __init__(self, function: Callable[[Feeds], Array], inputs: tuple[str, ...] = (SAMPLE, TIMESTEP)) -> None:
        self.function, self.inputs, self.closed, self.calls = function, inputs, False, 0

    def __call__(self, feeds: Feeds) -> dict[str, Array]:
        self.calls += 1
        return {EPSILON: np.array(self.function(feeds))}

    def close(self) -> None:
        self.closed = True

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self.close()
