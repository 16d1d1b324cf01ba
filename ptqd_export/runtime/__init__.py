"""Sampling from a bundle: open its engines, probe them, and switch between them across timesteps."""

from .decoder import PictureDecoder
from .device_loop import check_update
from .open import open_artifact, open_update
from .probe import check_probe, probe
from .prompts import Prompted, encode_prompts
from .replaced import Replaced
from .runtime import Runtime, check_settings
from .workers import draw, run

__all__ = [
    "PictureDecoder",
    "Prompted",
    "Replaced",
    "Runtime",
    "check_probe",
    "check_settings",
    "check_update",
    "draw",
    "encode_prompts",
    "open_artifact",
    "open_update",
    "probe",
    "run",
]
