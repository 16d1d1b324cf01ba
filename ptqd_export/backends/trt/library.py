"""The TensorRT library on this machine: module, versions, GPUs that it serves, and what a process shares.

Both libraries have one Python interface, so everything in this folder takes the module. What differs is asked
for where it is used:

    TensorRT-RTX     target compute capabilities, runtime cache, kernel specialization, weights loaded later,
                     `Runtime.get_engine_validity`
    TensorRT         timing cache; it builds for the GPU at hand and needs one
    TensorRT 10      networks are strongly typed on request only (11: always; the flag may be gone)
"""

from __future__ import annotations

import hashlib
import importlib
import json
import re
import threading
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ...core.backend import BACKENDS, TENSORRT, TENSORRT_RTX, install_hint
from ...core.engine_build import NOT_BY_DEFAULT, EngineSettings
from ...errors import BackendUnavailable, RecipeError
from ...typed import to_plain
from .. import cuda
from .logs import Errors, make_logger, one_line

MODULES = {TENSORRT: "tensorrt", TENSORRT_RTX: "tensorrt_rtx"}
"""The module of each backend."""
FP8_CAPABILITY = (8, 9)
"""The first compute capability that computes in FP8."""
BUILDER_REVISION = 2
"""Raise it when a choice of the builder that no setting names changes: older engines are then built again."""
DTYPES = {
    "FLOAT": "float32",
    "HALF": "float16",
    "INT64": "int64",
    "INT32": "int32",
    "INT8": "int8",
    "UINT8": "uint8",
    "BOOL": "bool",
}
"""numpy's names of the library's types."""


def load(name: str) -> Any:
    """The library's module.

    Raises:
        BackendUnavailable: not installed, or it does not load.
    """
    module, hint = MODULES[name], install_hint(BACKENDS[name].extra)
    try:
        return importlib.import_module(module)
    except Exception as error:  # a missing driver or library arrives as ImportError, OSError or RuntimeError
        if isinstance(error, ModuleNotFoundError) and error.name == module:
            raise BackendUnavailable(
                f"backend {name} needs {module}, which is not installed; {hint}"
            ) from error
        raise BackendUnavailable(
            f"{module} is installed but does not load ({one_line(error)}): install it again; {hint}"
        ) from error


def runtime_version(name: str) -> str:
    """Such as "tensorrt-rtx 1.7.1.116".

    Raises:
        BackendUnavailable: not installed, or it does not load.
    """
    return f"{name} {load(name).__version__}"


def check(name: str, index: int = 0) -> None:
    """That engines run here, on the GPU of this index.

    Raises:
        BackendUnavailable: the library, the driver or the GPU is missing, or this GPU is not served.
    """
    trt = load(name)
    device = cuda.gpu(index)
    known = (
        capabilities(trt) if hasattr(trt, "ComputeCapability") else {}
    )  # TensorRT-RTX alone chooses its targets
    if known and device.capability not in known:
        raise BackendUnavailable(
            f"{name} {trt.__version__} does not serve {device}: it knows compute capabilities "
            f"{', '.join(known)}; choose another backend"
        )


def check_build(name: str, wanted: tuple[str, ...]) -> None:
    """That engines can be built here, for GPUs of these compute capabilities.

    Raises:
        BackendUnavailable: the library is missing; for TensorRT, which builds for the GPU at hand, the GPU.
        RecipeError: a compute capability that the library does not know.
    """
    trt = load(name)
    if name == TENSORRT:
        cuda.gpu()
    else:
        choose_targets(trt, wanted, fp8=False)


def capabilities(trt: Any) -> dict[str, Any]:
    """{compute capability, such as "8.9": the module's name for it}, of all that TensorRT-RTX knows."""
    members = {
        name: m for name, m in trt.ComputeCapability.__members__.items() if re.fullmatch(r"SM\d+", name)
    }
    return {f"{int(name[2:]) // 10}.{int(name[2:]) % 10}": m for name, m in members.items()}


def choose_targets(trt: Any, wanted: tuple[str, ...], fp8: bool) -> tuple[str, ...]:
    """Compute capabilities to build for: those wanted, or the library's default as far as the numbers allow.

    Raises:
        RecipeError: one of those wanted is not known, or does not compute in FP8.
    """
    known = capabilities(trt)
    able = [c for c in known if not fp8 or tuple(map(int, c.split("."))) >= FP8_CAPABILITY]
    for capability in wanted:
        if capability not in able:
            why = "computes in FP8 for" if capability in known else "knows"
            raise RecipeError(
                f"tensorrt.compute_capabilities holds {capability}: {trt.__name__} {trt.__version__} {why} "
                f"{', '.join(able)}"
            )
    return wanted or tuple(c for c in able if c not in NOT_BY_DEFAULT)


def key(name: str, graph_digest: str, settings: EngineSettings, gpu: cuda.Gpu | None = None) -> str:
    """SHA-256 of what decides an engine: graph, settings, library, builder and, for TensorRT, the GPU here.

    Raises:
        BackendUnavailable: the library is not installed; for TensorRT, `gpu` is not given and there is none.
    """
    at_hand = str(gpu or cuda.gpu()) if name == TENSORRT else ""
    parts = [graph_digest, to_plain(settings), runtime_version(name), BUILDER_REVISION, at_hand]
    return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()


def timing_cache(name: str, folder: Path | None) -> Path | None:
    """The file in `folder` of kernel times measured on this GPU with this version; None where there are none.

    Raises:
        BackendUnavailable: the library or the GPU is missing.
    """
    # TensorRT-RTX measures nothing.
    return folder / f"{_of_this_machine(name, 0)}.timing" if folder is not None and name == TENSORRT else None


def kernel_cache(name: str, engine_key: str, folder: Path | None, index: int = 0) -> Path | None:
    """The file in `folder` of an engine's kernels, per GPU and version; None: there are none to keep.

    Raises:
        BackendUnavailable: the library or the GPU is missing.
    """
    if folder is None or name != TENSORRT_RTX:
        return None
    return folder / f"{engine_key}.{_of_this_machine(name, index)}.kernels"


def _of_this_machine(name: str, index: int) -> str:
    """Library, version and GPU as part of a file's name."""
    return re.sub(r"[^A-Za-z0-9.]+", "-", f"{runtime_version(name)} {cuda.gpu(index)}").strip("-")


@dataclass(frozen=True)
class Shared:
    """What all engines of a process share of a library.

    The library keeps a pointer to the first logger that it is given, and ignores those that follow: there is
    one, and it is never freed.

    Attributes:
        runtime: loads engines; take `lock` around a call that depends on its settings.
        errors: what its logger heard.
    """

    runtime: Any
    errors: Errors
    lock: threading.Lock


_loggers: dict[Any, tuple[Any, Errors]] = {}
_shared: dict[Any, Shared] = {}
_lock = threading.Lock()


def shared(trt: Any) -> Shared:
    """What this process has of the library: made once, by whoever asks first.

    Raises:
        BackendUnavailable: the library does not work here, for want of a driver that serves it.
    """
    with _lock:
        if trt not in _shared:
            if trt not in _loggers:
                errors = Errors()
                _loggers[trt] = make_logger(trt, errors), errors
            logger, errors = _loggers[trt]
            errors.forget()
            try:
                runtime = trt.Runtime(logger)
            except TypeError as error:  # pybind11's "factory function returned nullptr"
                raise BackendUnavailable(
                    f"{trt.__name__} {trt.__version__} does not work here ({errors.told()}): update the "
                    "NVIDIA driver"
                ) from error
            _shared[trt] = Shared(runtime, errors, threading.Lock())
        return _shared[trt]
