"""Runtimes behind the one face of `ptqd_export.engine.Engine`; each imports its own library when it is first used."""

from .base import Device, DeviceEngine, available, check, open_device, open_engine
from .ort import OrtDevice, OrtEngine, set_threads

__all__ = ["Device", "DeviceEngine", "OrtDevice", "OrtEngine", "available", "check", "open_device", "open_engine", "set_threads"]
