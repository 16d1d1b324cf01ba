"""Runtimes behind the one face of `core.engine.Engine`; each imports its library when it is first used."""

from ..core.engine import Device, DeviceEngine
from .ort import OrtDevice, OrtEngine, exact_integers, set_threads
from .ort_device import saturates, threads
from .registry import available, check, open_device, open_engine

__all__ = [
    "Device",
    "DeviceEngine",
    "OrtDevice",
    "OrtEngine",
    "available",
    "check",
    "exact_integers",
    "open_device",
    "open_engine",
    "saturates",
    "set_threads",
    "threads",
]
