"""How layers are judged: on the same inputs, outputs are equal up to float rounding or a rare step apart.

A rare output may be one quantization step off. Two correct executions of a whole quantized network drift
apart: a float difference of 1e-7 flips a rounding, and more follow. So networks are judged layer by layer,
and end to end by statistics (`parity.noise`).
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from ..core.backend import FLOAT_ERROR, Emission, Floats
from ..core.engine import Array
from ..core.precision import FP32, Precision

F64 = npt.NDArray[np.float64]

MAX_SHARE_APART = 1e-3
"""Largest share of a layer's outputs that may be one quantization step off: rounding ties."""
MAX_STEPS_APART = 1.5
"""Most quantization steps that any output may be off: one, plus rounding of the size of a step."""
FLOAT_TOLERANCE = 2e-5
"""Largest difference from float32 accumulation in one layer, relative to a channel's largest output."""
HALF = 2.0**-11
"""Largest relative error of one rounding to float16."""
ROUNDING: dict[Floats, float] = {"float32": 0.0, "float16": HALF, "bfloat16": 2.0**-8}
"""Largest relative error of one rounding; that of float32 is counted in FLOAT_TOLERANCE."""
JUDGED_STEPS = 50
"""At most so many steps of a run are judged one by one."""
ROUNDINGS = 6.0
"""Standard deviations of a sum of roundings that are allowed."""
MAX_FLOAT_ERROR, MAX_HALF_ERROR = FLOAT_ERROR["float32"], FLOAT_ERROR["float16"]
"""Largest RMS difference of an fp32 and of an fp16 engine from the torch model, relative to the RMS of
epsilon."""


def judged_steps(n: int) -> list[int]:
    """The steps of `n` that are judged: all, or JUDGED_STEPS evenly from the first to the last."""
    return [int(step) for step in np.linspace(0, n - 1, min(n, JUDGED_STEPS)).round()]


@dataclass(frozen=True)
class Apart:
    """How a layer's outputs differ from the expected ones; `a + b` pools two sets.

    Attributes:
        size: number of outputs.
        apart: number of those that differ by more than rounding explains.
        largest_steps: the largest difference beyond that rounding, in quantization steps.
    """

    size: int = 0
    apart: int = 0
    largest_steps: float = 0.0

    def __add__(self, other: Apart) -> Apart:
        largest = max(self.largest_steps, other.largest_steps)
        return Apart(self.size + other.size, self.apart + other.apart, largest)

    @property
    def share(self) -> float:
        return self.apart / max(self.size, 1)

    @property
    def tolerable(self) -> bool:
        """Whether only rounding ties differ; even in a small layer one output may."""
        return self.apart <= max(MAX_SHARE_APART * self.size, 1) and self.largest_steps <= MAX_STEPS_APART


def judge(got: Array, expected: Array, step: F64, tolerance: F64) -> Apart:
    """How far outputs are from the expected ones.

    Args:
        step: one quantization step; broadcasts to the outputs.
        tolerance: the difference that float rounding may make; broadcasts to the outputs.
    """
    beyond = np.abs(np.asarray(got, np.float64) - np.asarray(expected, np.float64)) - tolerance
    off = beyond > 0
    return Apart(off.size, int(off.sum()), float(np.max(beyond / step, initial=0.0, where=off)))


def float_tolerance(expected: Array, step: F64, rounding: float, added: F64 | float = 0.0) -> F64:
    """`rounding` times a channel's largest output and what was added to it, or times its step if that is
    larger.

    Products are rounded before a bias is added to them, or after: as onnxruntime's CUDA provider and its CPU
    provider do in float16. Where the bias cancels most of them, the output tells little of their size.

    Args:
        step: has the channels along its only axis that is not of size 1.
        added: like `step`; see `export.LayerGraph`.
    """
    others = tuple(axis for axis, size in enumerate(step.shape) if size == 1)
    largest = np.abs(np.asarray(expected, np.float64)).max(axis=others, keepdims=True)
    return np.asarray(rounding * np.maximum(largest + added, step))


def max_float_error(precision: Precision, emission: Emission) -> float:
    """Largest RMS difference of a float graph from the torch model, relative to the RMS of epsilon."""
    return MAX_HALF_ERROR if emission is Emission.HALF and precision != FP32 else MAX_FLOAT_ERROR
