"""Engines are loaded with what the bundle knows of them: once each, their kernels cached by their keys."""

from __future__ import annotations

import shutil
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from fake_cuda import FakeCuda
from fake_tensorrt import FakeTensorRT
from helpers import RTX, Built, Invoke, copied, engines_of, reseal

from ptqd_export import backends
from ptqd_export.backends import cuda, open_device, registry, trt
from ptqd_export.bundle import Bundle, Manifest
from ptqd_export.bundle.manifest import Artifact
from ptqd_export.core.backend import Emission
from ptqd_export.core.precision import FP32, Precision
from ptqd_export.errors import BundleError
from ptqd_export.runtime import Runtime, open_artifact, open_update, run
from ptqd_export.runtime import open as opening


class Opened(Counter[str]):
    """How often each file was opened."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        super().__init__()
        real = backends.open_engine

        def counted(name: str, path: Path, *rest: Any, **more: Any) -> Any:
            self[path.name] += 1
            return real(name, path, *rest, **more)

        monkeypatch.setattr(opening, "open_engine", counted)


def files_of(built: Built, emission: str) -> dict[str, int]:
    """The files of the plan's engines, once each."""
    m = built.bundle.manifest
    return {m.graph(p, Emission(emission)).file: 1 for p in m.plan.precisions}


def test_engines_are_opened_once(rgb: Built, monkeypatch: pytest.MonkeyPatch) -> None:
    """For all batches of a run, whether the backend is named or found; and again by the next run."""
    opened = Opened(monkeypatch)
    for backend in ("ort-cpu", None):
        opened.clear()
        run(rgb.bundle, 5, batch_size=2, backend=backend)
        assert dict(opened) == files_of(rgb, "ort-cpu") and len(opened) == 4
    run(rgb.bundle, 1)
    assert set(opened.values()) == {2}


def test_a_command_opens_engines_once(
    rgb: Built, tmp_path: Path, invoke: Invoke, monkeypatch: pytest.MonkeyPatch
) -> None:
    opened = Opened(monkeypatch)
    assert (
        invoke("run", rgb.path, "--out", tmp_path / "x", "--num-samples", "5", "--batch-size", "2").code == 0
    )
    assert dict(opened) == files_of(rgb, "ort-cpu")


def test_engines_on_a_device_are_opened_once(rgb: Built, monkeypatch: pytest.MonkeyPatch) -> None:
    """With the update, and its device: the host's memory in the place of a GPU's."""
    openers, devices = dict(registry.OPENERS), list[int]()
    openers["ort-cuda"] = openers["ort-cpu"]
    monkeypatch.setattr(registry, "OPENERS", openers)
    real = backends.open_device

    def open_device(name: str, index: int = 0) -> Any:
        devices.append(index)
        return real(name, index)

    monkeypatch.setattr(backends, "open_device", open_device)
    opened = Opened(monkeypatch)
    run(rgb.bundle, 5, batch_size=2, backend="ort-cuda")
    assert dict(opened) == {**files_of(rgb, "half"), "update.onnx": 1} and devices == [0]


def test_a_backend_that_is_passed_over_is_tried_once(rgb: Built, monkeypatch: pytest.MonkeyPatch) -> None:
    """One that does not pass the probe is closed again, and the next is opened."""
    openers = dict(registry.OPENERS)
    openers["ort-cuda"] = openers["ort-cpu"]
    monkeypatch.setattr(registry, "OPENERS", openers)
    m = rgb.bundle.manifest
    wrong, real = m.artifact(Precision(4, 4), "ort-cuda"), type(m).artifact

    def artifact(self: Manifest, precision: Precision, name: str) -> Artifact:
        return wrong if (precision, name) == (FP32, "ort-cuda") else real(self, precision, name)

    monkeypatch.setattr(Manifest, "artifact", artifact)
    opened = Opened(monkeypatch)
    with Runtime(rgb.bundle) as runtime:
        assert runtime.backend == "ort-cpu"
        assert "fp32.half computes something else here" in runtime.passed_over["ort-cuda"]
        assert list(runtime.passed_over) == ["ort-cuda"]
    half = {wrong.file: 2, "w4a8.half.onnx": 1, "w8a8.half.onnx": 1}
    assert dict(opened) == {**half, **files_of(rgb, "ort-cpu")}


# Finished engines, over fakes of the GPU and of the library


@pytest.fixture
def fake(monkeypatch: pytest.MonkeyPatch) -> Iterator[FakeTensorRT]:
    """A GPU of compute capability 8.9, and a library that runs engines."""
    gpu = FakeCuda()
    monkeypatch.setattr(cuda, "runtime", lambda: gpu)
    library = FakeTensorRT(gpu)
    monkeypatch.setattr(trt, "load", lambda name: library)
    monkeypatch.setattr(trt, "check", lambda name: None)
    yield library
    assert gpu.live() == {} and library.faults == []


def put(bundle: Path, content: bytes, **about: Any) -> Bundle:
    """Other engines into a bundle, its hashes made to match."""
    for engine in engines_of(Bundle.open(bundle)).values():
        (bundle / engine.file).write_bytes(content)
    reseal(
        bundle,
        lambda data: [
            e.update(about) for e in data["artifacts"] + data["update_engines"] if e["backend"] == RTX
        ],
    )
    return Bundle.open(bundle)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"old", "was built by another version of TensorRT"),
        (b"foreign", "was not built for this GPU"),
        (b"noise", "is damaged"),
    ],
)
def test_engines_that_do_not_fit(
    several: Built, tmp_path: Path, fake: FakeTensorRT, content: bytes, message: str
) -> None:
    """Where none is named, something else runs instead, and it is said why."""
    path = copied(several, tmp_path)
    bundle = put(path, content, runtime="tensorrt-rtx 0.9")
    build = engines_of(bundle)["w8a8"].build
    assert build is not None
    with pytest.raises(BundleError) as caught:
        Runtime(bundle, RTX)
    here = "this machine has fake_tensorrt 1.0 on Fake GPU (8.9): run with --rebuild"
    built = f"it was built by tensorrt-rtx 0.9 for {', '.join(build.targets)}"
    assert str(caught.value) == f"{path / f'w8a8.{RTX}.engine'} {message}: {built}, {here}"
    with Runtime(bundle) as runtime:
        assert runtime.backend == "ort-cpu"
        assert f"{message}: it was built by tensorrt-rtx 0.9 for" in runtime.passed_over[RTX]


def test_the_cache_of_kernels(several: Built, tmp_path: Path, fake: FakeTensorRT, caches: Path) -> None:
    """One per engine, by its key, in the user's cache folder and nowhere else; one that is damaged is made
    anew."""
    bundle = put(copied(several, tmp_path), b"good")
    update = bundle.manifest.update_engine(RTX)
    for content in (None, b"garbage"):
        if content is not None:
            (file,) = caches.iterdir()
            file.write_bytes(content)
        with open_device(RTX) as device, open_artifact(bundle, update, device):
            pass
        (file,) = caches.iterdir()
        assert file.name.startswith(update.build.key) and file.read_bytes() == b"cache+"
    shutil.rmtree(caches)
    with open_device(RTX) as device, open_update(bundle, RTX, device):
        pass
    assert [path.name for path in caches.iterdir()] == [file.name]
