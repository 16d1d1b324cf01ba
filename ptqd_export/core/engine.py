"""Engine: the one interface of everything that predicts noise.

That is ONNX Runtime, TensorRT, the torch simulation, and a fake for tests.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from types import TracebackType
from typing import Any, Protocol, Self, runtime_checkable

import numpy as np
import numpy.typing as npt

from .closing import Closing

Array = npt.NDArray[np.generic]
Feeds = Mapping[str, Array]

SAMPLE, TIMESTEP, STEP, EPSILON = "sample", "timestep", "step", "epsilon"
"""Names of the inputs and the output of every graph.

sample f32 (B, C, H, W); timestep int64 (B,), or f32 where a solver evaluates between train timesteps; step
int64 (1,), the row of the tables; epsilon f32 (B, C, H, W).
"""

NOISE, NEXT_SAMPLE, NEXT_TIMESTEP, NEXT_STEP = "noise", "next_sample", "next_timestep", "next_step"
KEPT, NEXT_KEPT = "kept.", "next_kept."
"""Further names in the graph of the sampler's update (`export.sampler_update`); the last two are numbered."""


@dataclass(frozen=True)
class TensorSpec:
    """Name, numpy dtype name and shape of a graph input or output; None is the batch."""

    name: str
    dtype: str
    shape: tuple[int | None, ...]


@runtime_checkable
class Engine(Protocol):
    """A network that predicts epsilon.

    `inputs` and `outputs` name the tensors. A call takes a mapping that holds at least `inputs` (further keys
    are ignored) and returns a dict of fresh arrays that the caller owns. Engines are context managers;
    `close` may be called twice.
    """

    @property
    def inputs(self) -> tuple[str, ...]: ...
    @property
    def outputs(self) -> tuple[str, ...]: ...
    def __call__(self, feeds: Feeds) -> dict[str, Array]: ...
    def close(self) -> None: ...
    def __enter__(self) -> Self: ...
    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None: ...


@runtime_checkable
class Device(Protocol):
    """The memory that engines run in: a context manager.

    Buffers are opaque: only the backend knows what one is.
    """

    def empty(self, shape: tuple[int, ...], dtype: str) -> Any:
        """A buffer of arbitrary content; `dtype` is numpy's name.

        Raises:
            BackendUnavailable: the memory has run out.
        """

    def write(self, buffer: Any, array: Array) -> None:
        """Copy `array` into `buffer`, after everything that was launched before.

        `array` has the buffer's dtype and shape; the caller may reuse it on return.
        """

    def read(self, buffer: Any) -> Array:
        """A fresh copy of `buffer`, once everything that was launched before is done."""

    def synchronize(self) -> None:
        """Wait for everything that was launched."""

    def close(self) -> None:
        """Free the device; close its engines and free its buffers first. A second call does nothing."""

    def __enter__(self) -> Self: ...
    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None: ...


@runtime_checkable
class DeviceEngine(Engine, Protocol):
    """An engine that also runs on buffers of its device, with no copy through the host."""

    @property
    def capture_note(self) -> str | None:
        """How many CUDA graphs its launches replay, or why none; None for a backend without CUDA graphs."""

    def launch(self, buffers: Mapping[str, Any]) -> None:
        """Run with all of `inputs` and `outputs` in these buffers; may return before the run is done.

        Launches run in the order in which they are made.
        """


class FakeEngine(Closing):
    """An engine made of a numpy function, for tests: `FakeEngine(lambda f: 0.1 * f["sample"])`."""

    inputs: tuple[str, ...] = (SAMPLE, TIMESTEP)
    outputs: tuple[str, ...] = (EPSILON,)

    def __init__(
        self, function: Callable[[Feeds], Array], inputs: tuple[str, ...] = (SAMPLE, TIMESTEP)
    ) -> None:
        self.function, self.inputs, self.closed, self.calls = function, inputs, False, 0

    def __call__(self, feeds: Feeds) -> dict[str, Array]:
        self.calls += 1
        return {EPSILON: np.array(self.function(feeds))}

    def close(self) -> None:
        self.closed = True
