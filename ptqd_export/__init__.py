"""ptqd-export: post-training quantized diffusion models as engine bundles, corrected and switched per
denoising step (PTQD).

Importing this package imports neither torch nor onnx nor any runtime.
"""

from __future__ import annotations

from .assemble import build, rebuild
from .bundle import Bundle, Manifest
from .core.engine import Engine, FakeEngine
from .core.noise import Correction, NoiseStats
from .core.plan import Plan
from .core.precision import Precision
from .core.sampling import Sampling
from .core.schedule import NoiseSchedule
from .errors import (
    BackendUnavailable,
    BundleError,
    GraphError,
    ModelError,
    ParityError,
    PTQDError,
    RecipeError,
)
from .recipe import Recipe
from .runtime import Runtime, run
from .version import __version__ as __version__

__all__ = [
    "BackendUnavailable",
    "Bundle",
    "BundleError",
    "Correction",
    "Engine",
    "FakeEngine",
    "GraphError",
    "Manifest",
    "ModelError",
    "NoiseSchedule",
    "NoiseStats",
    "PTQDError",
    "ParityError",
    "Plan",
    "Precision",
    "Recipe",
    "RecipeError",
    "Runtime",
    "Sampling",
    "build",
    "rebuild",
    "run",
]
