"""How a backend is opened: whether it works here, its device, and an engine on it (see `core.backend`)."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cache, partial
from pathlib import Path
from typing import Any, Protocol

from ..core.backend import BACKENDS, OPENVINO, OPENVINO_FP32, ORT_CPU, ORT_CUDA, TENSORRT, TENSORRT_RTX
from ..core.engine import Device, DeviceEngine
from ..errors import BackendUnavailable
from ..typed import brief
from . import ort


class OpenEngine(Protocol):
    """Loads a file on a device that the backend gave; what does not concern the backend is ignored."""

    def __call__(
        self, path: Path, device: Any, *, built: str, cache: Path | None, resident: bool
    ) -> DeviceEngine: ...


@dataclass(frozen=True)
class Opener:
    """How one backend is opened.

    Attributes:
        check: raises BackendUnavailable where it cannot work.
        open_device: opens its device of an index.
        open_engine: loads a graph or engine file.
    """

    check: Callable[[], object]
    open_device: Callable[[int], Device]
    open_engine: OpenEngine


def _ort(kind: ort.Kind) -> Opener:
    def open_engine(path: Path, device: Any, **about: object) -> DeviceEngine:
        return ort.OrtEngine(path, device=device)

    return Opener(partial(ort.OrtDevice, kind), partial(ort.OrtDevice, kind), open_engine)


def _openvino(name: str) -> Opener:
    def check() -> None:
        from . import openvino

        openvino.runtime()

    def open_device(index: int) -> Device:
        from .openvino import HostDevice

        return HostDevice(index)

    def open_engine(path: Path, device: Any, **about: object) -> DeviceEngine:
        from .openvino import OpenVinoEngine

        return OpenVinoEngine(path, floats=BACKENDS[name].floats)

    return Opener(check, open_device, open_engine)


def _tensorrt(name: str) -> Opener:
    def check() -> None:
        from . import trt

        trt.check(name)

    def open_device(index: int) -> Device:
        from .cuda import CudaDevice

        return CudaDevice(index)

    def open_engine(
        path: Path, device: Any, *, built: str, cache: Path | None, resident: bool
    ) -> DeviceEngine:
        from . import trt

        return trt.TrtEngine(trt.load(name), path, device, built=built, cache=cache, resident=resident)

    return Opener(check, open_device, open_engine)


OPENERS: Mapping[str, Opener] = {
    TENSORRT: _tensorrt(TENSORRT),
    TENSORRT_RTX: _tensorrt(TENSORRT_RTX),
    ORT_CUDA: _ort("cuda"),
    OPENVINO: _openvino(OPENVINO),
    OPENVINO_FP32: _openvino(OPENVINO_FP32),
    ORT_CPU: _ort("cpu"),
}
"""Of every backend that runs graph or engine files, by its name."""


def _opener(name: str) -> Opener:
    if name not in OPENERS:
        raise BackendUnavailable(
            f"backend {brief(name)} does not run graph files: expected one of {', '.join(OPENERS)}"
        )
    return OPENERS[name]


def check(name: str) -> None:
    """Does the backend work on this machine?

    Raises:
        BackendUnavailable: it does not, or there is no such backend.
    """
    _opener(name).check()


def available() -> dict[str, str]:
    """{name: "ok", or why it does not work on this machine} for every backend that runs files."""
    found = {}
    for name in OPENERS:
        try:
            check(name)
            found[name] = "ok"
        except BackendUnavailable as error:
            found[name] = str(error)
    return found


def open_device(name: str, index: int = 0) -> Device:
    """A device of a backend, by its place among those of its kind; the caller closes it, after its engines.

    Raises:
        BackendUnavailable: no such backend or device, or it does not work here.
    """
    return _opener(name).open_device(index)


@cache
def _own_device(name: str) -> Device:
    """The device of engines that are opened without one; it lives as long as the process."""
    return open_device(name)


def open_engine(
    name: str,
    path: Path,
    device: Device | None = None,
    *,
    built: str = "",
    cache: Path | None = None,
    resident: bool = True,
) -> DeviceEngine:
    """Load the file `path` on a backend; the caller closes the engine.

    Args:
        device: what `open_device` gave for this backend; without it, one that such engines share, for calls
            on host arrays.
        built, cache, resident: of finished engines: by what and for what they were built, a file of kernels
            compiled for this machine, and whether their weights stay on the GPU between runs (`TrtEngine`).
    Raises:
        BackendUnavailable: no such backend, or its runtime is not installed or cannot run this graph.
        BundleError: a finished engine does not fit this machine.
        GraphError: the file is missing, or is not valid.
    """
    opener = _opener(name)
    own = _own_device(name) if device is None else device
    return opener.open_engine(path, own, built=built, cache=cache, resident=resident)
