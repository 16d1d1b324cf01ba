"""Real builds, which need no GPU, and a fake GPU to run on."""

from __future__ import annotations

import gc
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from fake_cuda import FakeCuda
from fake_tensorrt import FakeTensorRT

from ptqd_export.backends import trt
from ptqd_export.backends.cuda import CudaDevice
from ptqd_export.core.engine_build import EngineBuild, EngineSettings

from .shared import KEY, RTX, SETTINGS, Build


@pytest.fixture(scope="package", autouse=True)
def small_heap() -> Iterator[None]:
    """A capture collects garbage before: what other tests have loaded is not looked through each time."""
    gc.collect()
    gc.freeze()
    yield
    gc.unfreeze()


@pytest.fixture(scope="session")
def rtx() -> Any:
    """The real library: for tests that build."""
    return pytest.importorskip("tensorrt_rtx")


@pytest.fixture
def build(rtx: Any, tmp_path: Path) -> Iterator[Build]:
    """Builds tmp_path/e.engine, with its log in tmp_path/e.log; nothing half-written may ever be left."""

    def call(
        graph: Path,
        settings: EngineSettings = SETTINGS,
        quantized: dict[str, str] | None = None,
        **more: Any,
    ) -> EngineBuild:
        options = {"log": tmp_path / "e.log", "key": KEY, **more}
        meant = {"conv_a": "int8"} if quantized is None else quantized
        return trt.build(RTX, graph, tmp_path / "e.engine", settings, quantized=meant, **options)

    yield call
    assert [path.name for path in tmp_path.iterdir() if path.name.endswith(".part")] == []


@pytest.fixture
def cuda() -> FakeCuda:
    return FakeCuda()


@pytest.fixture
def device(cuda: FakeCuda) -> Iterator[CudaDevice]:
    with CudaDevice(cudart=cuda) as device:
        yield device
    assert cuda.live() == {}


@pytest.fixture
def fake(cuda: FakeCuda) -> Iterator[FakeTensorRT]:
    """TensorRT-RTX; nothing of it is given back too early, and one runtime serves all engines."""
    fake = FakeTensorRT(cuda)
    yield fake
    assert fake.faults == [] and fake.runtimes <= 1


@pytest.fixture
def file(tmp_path: Path) -> Path:
    """An engine of the toy."""
    path = tmp_path / "e.engine"
    path.write_bytes(b"good")
    return path
