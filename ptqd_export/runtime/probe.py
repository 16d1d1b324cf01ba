"""Probe: does an engine compute here what its graph computed where the bundle was built?"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from ..bundle.bundle import Bundle
from ..core.backend import Emission
from ..core.engine import Engine
from ..core.precision import Precision
from ..core.sampling import Sampling
from ..errors import ParityError


def probe(engine: Engine, sampling: Sampling) -> npt.NDArray[np.float32]:
    """The guided epsilon at step 0 for one fixed noise and the first two conditions, float32 (2, C, H, W)."""
    x = np.random.default_rng(0).standard_normal((2, *sampling.model.sample_shape))
    with np.errstate(over="ignore", invalid="ignore"):  # `check_probe` refuses values that are not finite
        return sampling.predict_singly(engine, x, 0, sampling.model.conditions(None, 2)).astype(np.float32)


def check_probe(bundle: Bundle, precision: Precision, emission: Emission, engine: Engine) -> None:
    """Check that an engine computes here what its graph computed where the bundle was built.

    A processor may lack the instructions that an integer kernel needs to be correct: ONNX Runtime's U8 x S8
    products saturate on x86 without VNNI (microsoft/onnxruntime#14642), and no hash can show that. A GPU
    engine is compared with the portable graph's probe.

    Raises:
        ParityError: the engine computes something else; the message gives both figures.
        BundleError: the bundle holds no probe.
    """
    sampling, name = bundle.manifest.sampling, f"{precision}.{emission}"
    got = probe(engine, sampling).astype(np.float64)
    if got.shape != (2, *sampling.model.sample_shape) or not np.isfinite(got).all():
        raise ParityError(
            f"{name} returns NaN, infinite values or a wrong shape {got.shape}: "
            "the bundle or this machine computes nonsense; rebuild"
        )
    expected = bundle.probe(precision, emission)
    rms = float(np.sqrt((expected.epsilon.astype(np.float64) ** 2).mean()))
    allowed = float(np.hypot(expected.allowed, getattr(engine, "float_error", 0.0) * rms))
    difference = float(np.sqrt(((got - expected.epsilon) ** 2).mean()))
    if not difference <= allowed:
        raise ParityError(
            f"{name} computes something else here than where the bundle was built "
            f"(RMS difference {difference:.3g}, allowed {allowed:.3g}): this processor, or the "
            "runtime's version, "
            "differs: rebuild the bundle on this machine (finished engines: run with --rebuild)"
        )
