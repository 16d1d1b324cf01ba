"""Which backends there are, whether they work here, and how to open a device and an engine of one of them."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cache, partial
from pathlib import Path
from types import TracebackType
from typing import Any, Protocol, Self, runtime_checkable

from ..engine import Array, Engine
from ..errors import BackendUnavailable
from . import ort


@runtime_checkable
class Device(Protocol):
    """The memory that engines run in, a context manager. What a buffer is, only its backend knows."""

    def empty(self, shape: tuple[int, ...], dtype: str) -> Any:
        """A buffer of arbitrary content; `dtype` is numpy's name. Raises BackendUnavailable where memory runs out."""

    def write(self, buffer: Any, array: Array) -> None:
        """Copy `array`, of the buffer's dtype and shape, into `buffer`, after all that was launched before; `array` is free again on return."""

    def read(self, buffer: Any) -> Array:
        """A fresh copy of `buffer`, once all that was launched before is done."""

    def synchronize(self) -> None:
        """Wait for all that was launched."""

    def close(self) -> None:
        """Free the device, after its engines and buffers; a second call does nothing."""

    def __enter__(self) -> Self: ...
    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None: ...


@runtime_checkable
class DeviceEngine(Engine, Protocol):
    """An engine that also runs on buffers of its device, with no copy through the host."""

    def launch(self, buffers: Mapping[str, Any]) -> None:
        """Run with all of `inputs` and `outputs` at these buffers, in the order of launches; may return before it is done."""


@dataclass(frozen=True)
class Backend:
    """A runtime of graph or engine files.

    Attributes:
        check: raises BackendUnavailable where it cannot work.
        open_device: opens its device.
        open: loads a file on a device that `open_device` gave, with the keywords of `open_engine`.
    """

    check: Callable[[], object]
    open_device: Callable[[], Device]
    open: Callable[..., DeviceEngine]


def _ort(kind: ort.Kind) -> Backend:
    return Backend(partial(ort.OrtDevice, kind), partial(ort.OrtDevice, kind), lambda path, device, **about: ort.OrtEngine(path, device=device))


def _tensorrt(name: str) -> Backend:
    def check() -> None:
        from . import trt

        trt.check(name)

    def open_device() -> Device:
        from .cuda import CudaDevice

        return CudaDevice()

    def open_engine(path: Path, device: Any, *, built: str, cache: Path | None) -> DeviceEngine:
        from . import trt

        return trt.TrtEngine(trt.load(name), path, device, built=built, cache=cache)

    return Backend(check, open_device, open_engine)


BACKENDS: Mapping[str, Backend] = {
    "tensorrt": _tensorrt("tensorrt"),
    "tensorrt-rtx": _tensorrt("tensorrt-rtx"),
    "ort-cuda": _ort("cuda"),
    "ort-cpu": _ort("cpu"),
}


def _backend(name: str) -> Backend:
    if name not in BACKENDS:
        raise BackendUnavailable(f"backend {name!r} does not run graph files: expected one of {', '.join(BACKENDS)}")
    return BACKENDS[name]


def check(backend: str) -> None:
    """Does the backend work on this machine?

    Raises:
        BackendUnavailable: it does not, or there is no such backend.
    """
    _backend(backend).check()


def _reason(name: str) -> str | None:
    """Why the backend does not work here."""
    try:
        check(name)
    except BackendUnavailable as error:
        return str(error)
    return None


def available() -> dict[str, str]:
    """{name: "ok", or the reason why it does not work on this machine} for every backend that runs graph or engine files."""
    return {name: _reason(name) or "ok" for name in BACKENDS}


def open_device(backend: str) -> Device:
    """The device of a backend; the caller closes it, after its engines.

    Raises:
        BackendUnavailable: no such backend, or it does not work here.
    """
    return _backend(backend).open_device()


@cache
def _own_device(name: str) -> Device:
    """The device of engines that are opened without one; it lives as long as the process."""
    return open_device(name)


def open_engine(backend: str, path: Path, device: Device | None = None, *, built: str = "", cache: Path | None = None) -> DeviceEngine:
    """Load the file `path` on a backend; the caller closes the engine.

    Args:
        device: what `open_device` gave for this backend; without it, one that such engines share, for calls on host arrays.
        built, cache: of finished engines: by what and for what they were built, and a file of kernels compiled for this machine.
    Raises:
        BackendUnavailable: no such backend, or its runtime is not installed or cannot run this graph.
        GraphError: the file is missing, or is not valid.
    """
    return _backend(backend).open(path, _own_device(backend) if device is None else device, built=built, cache=cache)
