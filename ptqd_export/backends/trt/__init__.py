"""TensorRT and TensorRT-RTX: engines built in a process of their own, and run on a GPU."""

from .build import build
from .engine import TrtEngine
from .library import check, check_build, kernel_cache, key, load, runtime_version, timing_cache

__all__ = [
    "TrtEngine",
    "build",
    "check",
    "check_build",
    "kernel_cache",
    "key",
    "load",
    "runtime_version",
    "timing_cache",
]
