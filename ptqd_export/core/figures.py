"""Figures of the parity gate: how a graph compares with its simulation. `ptqd_export.parity` makes them."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt


@dataclass(frozen=True)
class LayerFigures:
    """How quantized layers compare with their simulation on the same inputs.

    Attributes:
        layers: number of layers compared.
        outputs: number of output values compared.
        share_apart: share of the outputs that differ by more than float rounding, that is by one quantization
            step.
        largest_steps: the largest difference among those, in quantization steps.
    """

    layers: int
    outputs: int
    share_apart: float
    largest_steps: float


@dataclass(frozen=True)
class NoiseFigures:
    """How the noise statistics of a corrected network compare with those of its simulation.

    Both are measured on the same held-out trajectories.

    Attributes:
        largest_z: {statistic: largest difference at any step beyond what makes no difference, in standard
            errors of the difference}.
        limit_z: the limit that correct executions stay below; None where too few trajectories were held out
            for it to mean anything.
        mse_ratio: squared error of the engine divided by that of the simulation, per judged step.
        snr_q_corrected: SNR_Q of the engine after correction, per judged step; None where there is no noise.
    """

    largest_z: Mapping[str, float]
    limit_z: float | None
    mse_ratio: tuple[float, ...]
    snr_q_corrected: tuple[float | None, ...]


@dataclass(frozen=True)
class QuantizedFigures:
    """Figures of a quantized graph.

    Attributes:
        fold: largest difference that a row of the folded tables makes, relative to the largest |epsilon|.
        layers: figures of its layers.
        noise: figures of the whole network.
    """

    fold: float
    layers: LayerFigures
    noise: NoiseFigures

    def summary(self) -> str:
        """One line for people."""
        layers, noise = self.layers, self.noise
        apart = f"{layers.layers} layers, {layers.share_apart:.1e} of outputs one step apart"
        largest = max(noise.largest_z.values(), default=0.0)
        if noise.limit_z is None:
            return f"{apart}; noise not judged: too few held-out trajectories"
        return f"{apart}; noise within {largest:.2f} standard errors (limit {noise.limit_z:.1f})"


@dataclass(frozen=True)
class FloatFigures:
    """Figures of a float graph.

    Attributes:
        largest_relative_error: largest RMS difference from the torch model at any step, relative to the RMS
            of epsilon.
    """

    largest_relative_error: float

    def summary(self) -> str:
        """One line for people."""
        return f"equal to the torch model within {self.largest_relative_error:.1g} RMS"


def relative_rms(got: npt.NDArray[np.generic], expected: npt.NDArray[np.generic]) -> float:
    """RMS of the difference of two arrays, relative to the RMS of `expected`."""
    right = expected.astype(np.float64)
    error = got.astype(np.float64) - right
    return float(np.sqrt((error**2).mean() / max((right**2).mean(), 1e-30)))


Figures = FloatFigures | QuantizedFigures
