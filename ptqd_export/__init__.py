"""ptqd-export: post-training quantized diffusion models as engine bundles, corrected and switched per denoising step (PTQD).

Importing this package imports neither torch nor onnx nor any runtime.
"""

from __future__ import annotations

from .build import build
from .bundle import Bundle
from .engine import Engine, FakeEngine
from .engines import rebuild
from .errors import BackendUnavailable, BundleError, GraphError, ModelError, ParityError, PTQDError, RecipeError
from .manifest import Manifest
from .noise import Correction, NoiseStats
from .plan import Plan
from .precision import Precision
from .recipe import Recipe
from .runtime import Runtime, run
from .sampler import sample
from .schedule import NoiseSchedule

__version__ = "0.1.0"

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
    "build",
    "rebuild",
    "run",
    "sample",
]
