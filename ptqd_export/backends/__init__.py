"""Runtimes behind the one face of `ptqd_export.engine.Engine`; each imports its own library when it is first used."""

from .base import available, open_engine
from .ort import OrtEngine, set_threads

__all__ = ["OrtEngine", "available", "open_engine", "set_threads"]
