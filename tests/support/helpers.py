"""What tests share besides fixtures: results of commands, bundles and what they were built from, changed
ones, a full disk."""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import re
import resource
import shutil
import subprocess
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from ptqd_export.backends import OrtEngine
from ptqd_export.backends.registry import OPENERS, Opener
from ptqd_export.bundle import Bundle, Manifest, write_manifest
from ptqd_export.bundle.bundle import MANIFEST, SEAL
from ptqd_export.bundle.manifest import Artifact, UpdateEngine
from ptqd_export.core.backend import ORT_CPU, ORT_CUDA, TENSORRT_RTX
from ptqd_export.core.plan import fixed

RTX = TENSORRT_RTX
PRECISIONS = ("fp32", "w8a8", "w4a8", "w4a4")
MIXED = "w4a4,w4a8,w8a8,fp32"
SEVERAL = ("fp32", "fp16", "w8a8", "w4a8", "w4a4", "w8a8-fp8", "w4a16")
"""Precisions of the bundle with engines."""
SMALL = ("--calib-size", "2", "--n-steps", "2")
"""Options of a quick build."""
NO_GPU = re.compile(
    r"Error: (the bundle has its engines for [a-z-]+ now, but they do not run here: )?"
    r"(no NVIDIA GPU that CUDA can use here|a GPU needs cuda-bindings) .*\n"
)


@dataclass(frozen=True)
class Result:
    """What a command left: exit code, stdout, stderr."""

    code: int
    out: str
    err: str

    @property
    def json(self) -> Any:
        return json.loads(self.out)

    @property
    def error(self) -> str:
        """The one line of a failure, which is all that it may print."""
        assert self.code == 1, self
        assert self.out == ""
        assert self.err.startswith("Error: ") and self.err.endswith("\n") and self.err.count("\n") == 1, (
            self.err
        )
        return self.err


Invoke = Callable[..., Result]


Launch = Callable[..., "subprocess.Popen[str]"]


def environment(**more: str) -> dict[str, str]:
    """For subprocesses: this package, wherever it stands, on one thread."""
    return {**os.environ, "PYTHONPATH": str(Path(__file__).parents[2]), "OMP_NUM_THREADS": "1", **more}


@dataclass(frozen=True)
class Built:
    """A bundle and what it was built from.

    Attributes:
        recipe: recipe or model folder.
        options: of the build command.
        report: what `build --json` printed.
    """

    recipe: Path
    options: tuple[str, ...]
    path: Path
    report: Any

    @property
    def bundle(self) -> Bundle:
        return Bundle.open(self.path)


Once = Callable[[str, Callable[[Invoke, Path], Built]], Built]


def rms(x: npt.NDArray[np.floating]) -> float:
    return float(np.sqrt((x**2).mean()))


def with_plan(bundle: Bundle, *runs: str) -> Bundle:
    """The opened bundle with another plan, such as "w8a8*3", "fp32"; a single precision is for all steps."""
    plan = fixed(runs, len(bundle.manifest.sampling))
    return replace(bundle, manifest=replace(bundle.manifest, plan=plan))


def content(folder: Path) -> dict[str, bytes]:
    """Every file below."""
    return {str(p.relative_to(folder)): p.read_bytes() for p in sorted(folder.rglob("*")) if p.is_file()}


def listing(folder: Path) -> dict[str, tuple[int, int]]:
    """Every file and folder below, with inode, and for files the time of the last change."""
    return {
        str(p.relative_to(folder)): (p.stat().st_ino, 0 if p.is_dir() else p.stat().st_mtime_ns)
        for p in sorted(folder.rglob("*"))
    }


def copied(built: Built, folder: Path) -> Path:
    """A copy of a bundle as `<folder>/place/bundle`, to be changed."""
    shutil.copytree(built.path, folder / "place" / "bundle")
    return folder / "place" / "bundle"


def rewrite(bundle: Path, **changes: object) -> None:
    """Replace entries of a manifest, whose hash is then not its own."""
    data = json.loads((bundle / MANIFEST).read_text())
    (bundle / MANIFEST).write_text(json.dumps(data | changes))


def reseal(bundle: Path, change: Callable[[dict[str, Any]], object] = lambda data: None) -> None:
    """Give a changed bundle, and a changed manifest that can be read, matching hashes, as an attacker
    would."""
    data = json.loads((bundle / MANIFEST).read_text())
    change(data)
    write_manifest(bundle, Manifest.from_dict(data))


def seal(bundle: Path, change: Callable[[dict[str, Any]], object]) -> None:
    """Change a manifest in any way and give it its own hash again."""
    data = json.loads((bundle / MANIFEST).read_text())
    change(data)
    text = json.dumps(data | {SEAL: "0" * 64}).encode()
    (bundle / MANIFEST).write_bytes(text.replace(b"0" * 64, hashlib.sha256(text).hexdigest().encode(), 1))


def engines_of(bundle: Bundle) -> dict[str, Artifact | UpdateEngine]:
    """The finished TensorRT-RTX engines, by precision, and "update"."""
    m = bundle.manifest
    assert all(engine.build is not None for engine in m.engines)
    return {e.name.rpartition(".")[0]: e for e in m.engines if e.backend == RTX}


def has_gpu() -> bool:
    """Whether TensorRT-RTX engines run here."""
    from ptqd_export.backends import trt
    from ptqd_export.errors import BackendUnavailable

    try:
        trt.check(RTX)
    except BackendUnavailable:
        return False
    return True


@contextlib.contextmanager
def full_disk(limit: int) -> Iterator[None]:
    """No file may grow beyond `limit` bytes: a write fails half-way, as on a full disk (EFBIG in place of
    ENOSPC; Python ignores SIGXFSZ)."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (limit, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


def cuda_on_the_cpu() -> dict[str, Opener]:
    """All backends, with ONNX Runtime's CPU provider in the place of its CUDA provider."""

    def open_engine(path: Path, device: Any, **about: object) -> OrtEngine:
        return OrtEngine(path, device=device, optimise=False)  # 8-bit products that do not saturate

    return {**OPENERS, ORT_CUDA: replace(OPENERS[ORT_CPU], open_engine=open_engine)}
