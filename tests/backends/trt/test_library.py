"""The library on this machine: loading it, GPUs that it serves, targets, keys and names of caches."""

from __future__ import annotations

import importlib
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from fake_cuda import FakeCuda
from fake_tensorrt import FakeTensorRT

from ptqd_export.backends import cuda, trt
from ptqd_export.backends.cuda import Gpu
from ptqd_export.backends.trt import library
from ptqd_export.core.backend import TENSORRT
from ptqd_export.core.engine_build import EngineSettings
from ptqd_export.errors import BackendUnavailable, RecipeError

from .shared import RTX, SETTINGS, one_line


def test_not_installed(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setitem(library.MODULES, TENSORRT, "tensorrt_that_nobody_has")
    with pytest.raises(BackendUnavailable, match=r"which is not installed; .*pip install '\.\[tensorrt\]'"):
        trt.load(TENSORRT)
    for text in (
        "import nothing_of_this_name",
        "raise OSError('libnvinfer.so: cannot open\\nshared object')",
    ):
        (tmp_path / "tensorrt_that_fails.py").write_text(text)
        monkeypatch.syspath_prepend(tmp_path)
        importlib.invalidate_caches()
        monkeypatch.setitem(library.MODULES, TENSORRT, "tensorrt_that_fails")
        wanted = r"is installed but does not load \((No module named|libnvinfer)"
        with pytest.raises(BackendUnavailable, match=wanted) as caught:
            trt.load(TENSORRT)
        assert "pip install '.[tensorrt]'" in one_line(caught)


def test_a_gpu_that_the_library_does_not_serve(rtx: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """No rebuild would help."""
    monkeypatch.setattr(cuda, "gpu", lambda index=0: Gpu("NVIDIA H100", "9.0"))
    wanted = (
        r"does not serve NVIDIA H100 \(9\.0\): it knows compute capabilities .*8\.9.*; choose another backend"
    )
    with pytest.raises(BackendUnavailable, match=wanted):
        trt.check(RTX)
    monkeypatch.setattr(cuda, "gpu", lambda index=0: Gpu("NVIDIA L4", "8.9"))
    trt.check(RTX)


def test_default_targets(rtx: Any) -> None:
    """All that the library knows but 7.5, which it builds for only where that is named."""
    assert "7.5" in library.capabilities(rtx), "no longer known: this shows nothing"
    chosen = library.choose_targets(rtx, (), fp8=False)
    assert {"8.0", "8.6", "8.9", "12.0"} <= set(chosen) and "7.5" not in chosen
    assert library.choose_targets(rtx, ("7.5",), fp8=False) == ("7.5",)
    assert library.choose_targets(rtx, (), fp8=True)[0] == "8.9"


def test_a_rebuild_on_turing_names_it(rtx: Any) -> None:
    """The end of a loop: an engine of the default targets does not load there, and its rebuild must."""
    default = EngineSettings((1, 2, 4))
    for capability in ("7.5", "8.9"):
        settings = default.for_gpu(capability)
        assert capability in library.choose_targets(rtx, settings.compute_capabilities, fp8=False)
    assert trt.key(RTX, "a", default.for_gpu("7.5")) != trt.key(RTX, "a", default)


def test_targets_that_there_are_not(rtx: Any) -> None:
    with pytest.raises(
        RecipeError, match=r"tensorrt\.compute_capabilities holds 9\.0: .* knows 7\.5, .*8\.9"
    ):
        trt.check_build(RTX, ("9.0",))
    with pytest.raises(RecipeError, match=r"holds 7\.5: .* computes in FP8 for 8\.9"):
        library.choose_targets(rtx, ("7.5",), fp8=True)


def test_key(rtx: Any) -> None:
    settings = EngineSettings((1, 2, 4))
    others = [settings, EngineSettings((1, 2, 8)), SETTINGS, EngineSettings((1, 2, 4), (), 3)]
    keys = {trt.key(RTX, "a", each) for each in others} | {trt.key(RTX, "b", settings)}
    assert len(keys) == 5 and all(len(key) == 64 for key in keys)
    assert trt.key(RTX, "a", settings) == trt.key(RTX, "a", EngineSettings((1, 2, 4)), Gpu("x", "8.9"))
    assert trt.runtime_version(RTX) == f"{RTX} {rtx.__version__}"


def test_key_of_the_builder_s_revision(rtx: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    before = trt.key(RTX, "a", SETTINGS)
    monkeypatch.setattr(library, "BUILDER_REVISION", library.BUILDER_REVISION + 1)
    assert trt.key(RTX, "a", SETTINGS) != before


def test_key_of_the_gpu_at_hand(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "tensorrt", SimpleNamespace(__version__="10.9"))
    keys = {trt.key(TENSORRT, "a", SETTINGS, Gpu("x", capability)) for capability in ("8.9", "9.0")}
    assert len(keys) == 2
    monkeypatch.setitem(sys.modules, "tensorrt", SimpleNamespace(__version__="11.0"))
    assert trt.key(TENSORRT, "a", SETTINGS, Gpu("x", "8.9")) not in keys


def test_caches_per_gpu_and_version(rtx: Any, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Kernel times of one GPU, or of one version, say nothing of another's; no file serves two."""
    found = set()
    for version in ("10.9", "11.4"):
        monkeypatch.setitem(sys.modules, "tensorrt", SimpleNamespace(__version__=version))
        monkeypatch.setattr(rtx, "__version__", version)
        for gpu in (Gpu("NVIDIA L4", "8.9"), Gpu("NVIDIA RTX 5090 D/v2", "12.0")):
            monkeypatch.setattr(cuda, "gpu", lambda index=0, gpu=gpu: gpu)
            found |= {trt.timing_cache(TENSORRT, tmp_path), trt.kernel_cache(RTX, "k", tmp_path)}
    assert len(found) == 8
    for path in found:
        assert (
            path is not None
            and path.parent == tmp_path
            and path.name.replace("-", "").replace(".", "").isalnum()
        )
    assert trt.timing_cache(RTX, tmp_path) is None and trt.kernel_cache(TENSORRT, "k", tmp_path) is None
    assert trt.timing_cache(TENSORRT, None) is None and trt.kernel_cache(RTX, "k", None) is None


def test_shared_by_a_process(cuda: FakeCuda) -> None:
    one, two = FakeTensorRT(cuda), FakeTensorRT(cuda)
    assert library.shared(one) is library.shared(one) and library.shared(one) is not library.shared(two)
    assert (one.runtimes, two.runtimes) == (1, 1)


def test_a_library_that_does_not_work_here(cuda: FakeCuda, monkeypatch: pytest.MonkeyPatch) -> None:
    """It is asked again the next time, with the same logger: the library may hold on to that."""
    fake, loggers = FakeTensorRT(cuda), []
    works = fake.Runtime

    def fails(logger: Any) -> Any:
        loggers.append(logger)
        logger.log(SimpleNamespace(name="ERROR"), "CUDA initialization failure with error: 35")
        raise TypeError("factory function returned nullptr")

    monkeypatch.setattr(fake, "Runtime", fails)
    for _ in range(2):
        wanted = (
            r"fake_tensorrt 1\.0 does not work here \(CUDA initialization failure.*update the NVIDIA driver"
        )
        with pytest.raises(BackendUnavailable, match=wanted) as caught:
            library.shared(fake)
        one_line(caught)
    assert loggers[0] is loggers[1]
    monkeypatch.setattr(fake, "Runtime", works)
    library.shared(fake)
    assert fake._logger is loggers[0]
