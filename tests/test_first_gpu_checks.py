"""The checks of benchmarks/first_gpu.py over fakes of a GPU, and those of engines on the CPU too."""

from __future__ import annotations

import ctypes
import dataclasses
import importlib
import json
from collections.abc import Callable, Iterator
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import numpy as np
import pytest
from fake_cuda import OK, FakeCuda
from fake_tensorrt import FakeTensorRT
from helpers import Built

from ptqd_export import backends
from ptqd_export.backends import cuda, trt
from ptqd_export.backends.trt import library
from ptqd_export.core.backend import ORT_CPU, TENSORRT_RTX
from ptqd_export.core.engine_build import EngineBuild, EngineSettings, PlanReport
from ptqd_export.errors import BackendUnavailable

ROOT = Path(__file__).resolve().parent.parent


@pytest.fixture
def script(monkeypatch: pytest.MonkeyPatch) -> Callable[[str], ModuleType]:
    """A script of benchmarks/ as a module."""
    monkeypatch.syspath_prepend(ROOT / "benchmarks")
    return importlib.import_module


class Told(dict[str, Any]):
    """The figures that a check tells, as JSON would hold them."""

    def __call__(self, name: str, value: Any) -> None:
        self[name] = importlib.import_module("first_gpu_process").clean(value)
        json.dumps(self[name], allow_nan=False)


@pytest.fixture
def gpu(monkeypatch: pytest.MonkeyPatch) -> Iterator[FakeCuda]:
    """A fake GPU, with the functions of the runtime that the script alone calls."""
    fake: Any = FakeCuda()
    wait = fake.cudaStreamSynchronize

    def synchronize(stream: Any) -> Any:
        if not fake.is_capturing:
            return wait(stream)
        fake.fail = "cudaStreamEndCapture"
        return (fake.fail_with,)

    def fill(ptr: int, value: int, size: int, stream: Any) -> Any:
        fake.fail = ""
        fake.enqueue(lambda: ctypes.memset(ptr, value, size))
        return (OK,)

    fake.cudaStreamSynchronize, fake.cudaMemsetAsync = synchronize, fill
    fake.cudaMemGetInfo = lambda: (OK, fake.limit - sum(fake.live().values()), fake.limit)
    monkeypatch.setattr(cuda, "runtime", lambda: fake)
    yield fake
    assert fake.live() == {}


@pytest.mark.parametrize("count", [1, 2])
def test_the_cuda_side_over_a_fake(
    script: Callable[[str], ModuleType], tmp_path: Path, gpu: FakeCuda, count: int
) -> None:
    checks, process = script("first_gpu_checks"), script("first_gpu_process")
    gpu.devices, told = count, Told()
    job = process.Job(tmp_path, tmp_path / "bundle")
    for name in ("machine", "cuda_memory", "cuda_graphs", "cuda_scratch", "cuda_devices"):
        assert getattr(checks, f"check_{name}")(job, told)
        assert gpu.live() == {}
    assert told["cuda"] == {"driver": "13.0", "bindings": "13.0"} and told["gpus"] == count
    assert "did not end well" in told["spoilt"] and "memory ran out" in told["too_much"]
    assert ("second_gpu" in told) == (count == 1)


def test_faults_of_the_cuda_side_are_found(
    script: Callable[[str], ModuleType], tmp_path: Path, gpu: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    checks, process = script("first_gpu_checks"), script("first_gpu_process")
    job, gpu.devices = process.Job(tmp_path, tmp_path / "bundle"), 2

    def fault(name: str, message: str) -> None:
        with pytest.raises(process.Failed, match=message):
            getattr(checks, f"check_{name}")(job, Told())

    with monkeypatch.context() as patch:
        read = cuda.CudaDevice.read
        patch.setattr(cuda.CudaDevice, "read", lambda self, buffer: read(self, buffer) + 1)
        fault("cuda_memory", "came back otherwise")
    with monkeypatch.context() as patch:
        patch.setattr(cuda.CudaDevice, "replay", lambda self, graph: None)
        fault("cuda_graphs", "a replay did not do")
    with monkeypatch.context() as patch:
        patch.setattr(gpu, "cudaSetDevice", lambda device: setattr(gpu.current, "device", 0) or (OK,))
        fault("cuda_devices", "was not put back")


def test_a_gpu_that_a_library_refuses_is_skipped(
    script: Callable[[str], ModuleType], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """TensorRT-RTX on Hopper, in its own words."""
    pytest.importorskip("tensorrt_rtx")
    monkeypatch.setattr(cuda, "gpu", lambda *about: cuda.Gpu("NVIDIA H100", "9.0"))
    engines, process, told = script("first_gpu_engines"), script("first_gpu_process"), Told()
    job = process.Job(tmp_path, tmp_path / "bundle", backend=TENSORRT_RTX)
    script("first_gpu_checks").check_backends(job, told)
    assert "does not serve NVIDIA H100 (9.0): it knows" in told[TENSORRT_RTX]
    with pytest.raises(process.Skipped, match="does not serve NVIDIA H100"):
        engines.check_open(job, told)
    first_gpu = script("first_gpu")
    options = SimpleNamespace(minutes=1, out=tmp_path / "out.json")
    every = first_gpu.all_checks()
    session = first_gpu.Session(options, every)
    session.records["backends"] = process.Record("ok", "", figures=told)
    (check,) = [check for check in every if check.name == f"{TENSORRT_RTX}-build"]
    assert session._hindrance(check, "") == told[TENSORRT_RTX]


def fewer(engines: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    """Repetitions, which here prove nothing."""
    for name, number in {"REPEATS": 1, "WARMUP": 1, "RUNS": 1, "ROUNDS": 2, "WARM": 1}.items():
        monkeypatch.setattr(engines, name, number)


def test_the_engine_checks_on_the_cpu(
    script: Callable[[str], ModuleType], tmp_path: Path, rgb: Built, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The figures are real, the backend is not the one that they are for."""
    checks, engines, process = (script(f"first_gpu_{name}") for name in ("checks", "engines", "process"))
    fewer(engines, monkeypatch)
    told = Told()
    job = process.Job(tmp_path, tmp_path / "deep" / "bundle", source=rgb.path, backend=ORT_CPU)
    for check in (checks.check_bundle, engines.check_open, engines.check_parity, engines.check_times):
        assert check(job, told)
    for check in (engines.check_loop, engines.check_lifetimes):
        assert check(job, told)
    assert told["seal"] == rgb.bundle.seal and told["device_beside_host"]["psnr_db"] is None
    assert told["w8a8"]["probe_rms"] <= told["w8a8"]["probe_allowed"]
    assert told["w8a8 layers"]["compared"] > 10 and {*told["fp32 network"]["snr_db_by_step"]} == {
        "0",
        "2",
        "3",
    }
    assert {*told["batch 16"]} == {"fp32", "w8a8", "w4a8", "w4a4"} and told["rounds"] == 2
    assert told["run"]["steps"] == 4 and told["run"]["calls_ms"] > 0


@pytest.fixture
def rtx(gpu: FakeCuda, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> FakeTensorRT:
    """A fake library whose engines run the bundle's graphs, and a fake builder of them."""
    fake = FakeTensorRT(gpu)

    def build(
        name: str,
        graph: Path,
        engine: Path,
        settings: EngineSettings,
        *,
        key: str,
        quantized: Any,
        **about: Any,
    ) -> EngineBuild:
        engine.write_bytes(b"graph " + str(tmp_path / "bundle" / graph.name).encode())
        few = dataclasses.replace(settings, rows=(1, 4, 8))
        plan = PlanReport(len(quantized), len(quantized), {}, 5, {})
        return EngineBuild(key, ("8.9",), few, 1.0, 1 << 20, plan, 4321, fake.scratch)

    for module in (library, trt):
        monkeypatch.setattr(module, "load", lambda name: fake)
    monkeypatch.setattr(trt, "build", build)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "caches"))
    return fake


def test_the_engine_checks_over_a_fake(
    script: Callable[[str], ModuleType],
    tmp_path: Path,
    rgb: Built,
    rtx: FakeTensorRT,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Everything but numbers: builds, captures, the loop on the device, weights that come and go, memory."""
    checks, engines, process = (script(f"first_gpu_{name}") for name in ("checks", "engines", "process"))
    fewer(engines, monkeypatch)
    told = Told()
    job = process.Job(tmp_path, tmp_path / "bundle", source=rgb.path, backend=TENSORRT_RTX)
    checks.check_bundle(job, told)
    assert "5 engines; layers in 8 bits: w8a8" in checks.check_build(job, told).replace(
        f".{TENSORRT_RTX}", ""
    )
    for name in ("open", "parity", "times", "loop", "swap", "lifetimes"):
        assert getattr(engines, f"check_{name}")(job, told)
    assert told["w8a8"]["scratch_mib"] > 0 and told["w8a8"]["open_mib"] >= 0
    assert "fp32 network" in told and "w8a8 layers" not in told
    assert {key for key in told if key.startswith("batch")} == {"batch 1", "batch 4"}  # 8 rows are the most
    assert all("CUDA graph" in note and "captured" in note for note in told["captures"].values())
    assert told["device_beside_host"]["psnr_db"] > 50  # float32 state: roundings flip
    assert (
        told["swapped w8a8"]["largest_difference"] == 0
        and told["gpu_free_mib"][0] == told["gpu_free_mib"][-1]
    )
    assert rtx.faults == []
    with monkeypatch.context() as patch:
        patch.setattr(rtx, "rtx", False)
        patch.setattr(library, "_shared", {})
        with pytest.raises(process.Skipped, match="keeps the weights"):
            engines.check_swap(job, told)


def test_faults_of_engines_are_found(
    script: Callable[[str], ModuleType], tmp_path: Path, rgb: Built, monkeypatch: pytest.MonkeyPatch
) -> None:
    engines, process = script("first_gpu_engines"), script("first_gpu_process")
    job = process.Job(tmp_path, rgb.path, backend=ORT_CPU)
    run = backends.OrtEngine.__call__
    fewer(engines, monkeypatch)

    def off(self: Any, feeds: Any) -> Any:
        return {name: value + np.float32(1) for name, value in run(self, feeds).items()}

    with monkeypatch.context() as patch:
        patch.setattr(backends.OrtEngine, "__call__", off)
        with pytest.raises(process.Failed) as caught:
            engines.check_open(job, Told())
    assert "w4a4: " in str(caught.value) and "w8a8 again: " in str(caught.value)
    lost = iter(range(1000, 0, -30))
    monkeypatch.setattr(engines, "free_mib", lambda: float(next(lost)))
    with pytest.raises(process.Failed, match=r"30 MiB of the GPU were lost in 1 openings"):
        engines.check_lifetimes(job, Told())
    with pytest.raises(process.Skipped, match="x is not here"):
        script("first_gpu_checks").needs(lambda: (_ for _ in ()).throw(BackendUnavailable("x is not here")))
