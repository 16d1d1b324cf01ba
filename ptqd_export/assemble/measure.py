"""Noise statistics of every precision on the simulated networks, and the corrections fitted to them."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, fields
from pathlib import Path

import numpy as np
import numpy.typing as npt
from safetensors import SafetensorError
from safetensors.numpy import load_file, save

from ..bundle.manifest import GateRecord
from ..bundle.tables import Key
from ..calibrate import Network, TorchEngine, Trajectories, Workers, measure, measure_own, simulate
from ..core.backend import Emission
from ..core.engine import Engine
from ..core.gate import LEVEL, Gated, gate
from ..core.noise import Correction, NoiseStats
from ..core.precision import Precision
from ..core.quant import QuantizedNetwork
from ..core.sampling import Sampling
from ..files import digest, writing_file
from ..recipe import QuantizationSpec, Recipe

F64 = npt.NDArray[np.float64]


@dataclass(frozen=True)
class Measured:
    """Noise of one precision and numerics: sums of single trajectories, and the correction fitted to them.

    Attributes:
        calibration, held_out: sums per trajectory; the correction was fitted on the first.
        gated: the correction, with what the gate decided.
    """

    calibration: Sequence[NoiseStats]
    held_out: Sequence[NoiseStats]
    gated: Gated

    @property
    def correction(self) -> Correction:
        """The correction that goes into the graph."""
        return self.gated.correction

    @property
    def pooled(self) -> NoiseStats:
        """The sums that the correction was fitted on."""
        return NoiseStats.pool(self.calibration)

    def error(self) -> F64:
        """Squared error against full precision, after correction, on held-out trajectories, (T,)."""
        return NoiseStats.pool(self.held_out).mse(self.correction.gain, self.correction.offset)

    def first_step_rms(self) -> float:
        """RMS of the noise D at step 0, before correction."""
        pooled = self.pooled
        return float(np.sqrt(pooled.dd[0].mean() / pooled.count[0]))

    def record(self) -> GateRecord:
        """The gate's decisions, for the manifest."""
        z_k, z_bias = (tuple(z.round(2).tolist()) for z in (self.gated.z_k, self.gated.z_bias))
        return GateRecord(self.gated.kept, z_k, z_bias, round(self.gated.limit, 2))


def measure_all(
    recipe: Recipe,
    network: Network,
    sampling: Sampling,
    trajectories: Trajectories,
    quantized: Mapping[Precision, QuantizedNetwork],
    work: Path,
    key: str,
    workers: Workers | None = None,
    say: Callable[[str], None] = lambda text: None,
) -> dict[Key, Measured]:
    """Measure the noise per precision and numerics on the simulated network, and fit gated corrections.

    See PTQD, section 4.2.

    Args:
        work: folder of intermediate results, from which those of a stopped build are reused.
        key: key of everything before quantization that decides the sums.
        workers: measure in place of this process, on full precision's trajectories.
    """
    n_fit = recipe.calibration.size
    measured: dict[Key, Measured] = {}
    for precision, net in quantized.items():
        if precision.is_float:
            continue
        for emission in dict.fromkeys(emission.numerics(precision) for emission in Emission):
            name = digest(key, recipe.digest("quantization"), str(precision), str(emission))[:16]
            file = work / f"stats-{name}.safetensors"
            parts = _load_stats(file)
            what = f"noise of {precision}.{emission}"
            if parts is not None:
                say(f"{what} is taken up from a stopped build")
            else:
                if workers is not None and recipe.calibration.trajectory == "full_precision":
                    parts = workers.sums(net, emission, sampling, trajectories, what)
                else:
                    with (
                        TorchEngine(simulate(network, net, emission), sampling) as engine,
                        TorchEngine(network.module, sampling) as reference,
                    ):
                        parts = _measure(recipe, engine, reference, sampling, trajectories, what)
                _save_stats(file, parts)
            measured[precision, emission] = conclude(recipe.quantization, parts[:n_fit], parts[n_fit:])
    return measured


def _measure(
    recipe: Recipe,
    engine: Engine,
    reference: Engine,
    sampling: Sampling,
    trajectories: Trajectories,
    what: str,
) -> list[NoiseStats]:
    """Sums of the calibration and of the held-out trajectories; these are always full precision's, on which
    the parity gate runs the graphs."""
    spec = recipe.quantization
    if recipe.calibration.trajectory == "full_precision":
        return measure(engine, sampling, trajectories, "all", what)
    own = measure_own(
        engine,
        reference,
        sampling,
        trajectories,
        recipe.calibration.seed,
        lambda parts: conclude(spec, parts, ()).correction,
        spec.recalibrate_variance,
        f"{what}, own trajectory",
    )
    return [*own, *measure(engine, sampling, trajectories, "held_out", what)]


def conclude(
    spec: QuantizationSpec, calibration: Sequence[NoiseStats], held_out: Sequence[NoiseStats]
) -> Measured:
    """Fit and gate the correction on the calibration trajectories."""
    level = LEVEL if spec.gate else None
    return Measured(calibration, held_out, gate(calibration, spec.correction, spec.clamp_k, level))


def _save_stats(file: Path, parts: Sequence[NoiseStats]) -> None:
    arrays = {f.name: np.stack([getattr(part, f.name) for part in parts]) for f in fields(NoiseStats)}
    with writing_file(file) as target:
        target.write(save(arrays))


def _load_stats(file: Path) -> list[NoiseStats] | None:
    try:
        data = load_file(file)
        return [NoiseStats(*(data[f.name][i] for f in fields(NoiseStats))) for i in range(len(data["count"]))]
    except (OSError, KeyError, SafetensorError):
        return None


def key_of(*parts: object) -> str:
    """SHA-256 of JSON-ready values: the key of intermediate results."""
    return digest(json.dumps(parts, sort_keys=True))
