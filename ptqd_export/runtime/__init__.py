"""Sampling from a bundle: open its engines, probe them, and switch between them across timesteps."""

from .batch import check_batch, usual_batch
from .decoder import PictureDecoder
from .device_loop import check_update
from .open import open_artifact, open_update
from .probe import check_probe, probe
from .prompts import Prompted, encode_prompts
from .replaced import Replaced
from .runtime import Runtime, check_seed, check_settings
from .versions import versions
from .workers import Job, Start, draw, open_worker, run, sample_job

__all__ = [
    "Job",
    "PictureDecoder",
    "Prompted",
    "Replaced",
    "Runtime",
    "Start",
    "check_batch",
    "check_probe",
    "check_seed",
    "check_settings",
    "check_update",
    "draw",
    "encode_prompts",
    "open_artifact",
    "open_update",
    "open_worker",
    "probe",
    "run",
    "sample_job",
    "usual_batch",
    "versions",
]
