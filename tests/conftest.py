"""What all tests share: seeded numbers, small values of the core, small models and the bundles built from
them."""

from __future__ import annotations

import os

# Before numpy and torch are loaded: small tests gain nothing from threads, which only wait for each other on
# a busy machine.
os.environ.setdefault("OMP_NUM_THREADS", "1")

import contextlib
import fcntl
import gc
import io
import json
import shutil
import signal
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import bundles
import numpy as np
import pytest
from helpers import Built, Invoke, Launch, Once, Result, copied, environment, listing

from ptqd_export import cli
from ptqd_export.bundle import Bundle
from ptqd_export.core.backend import AUTOMATIC, OPENVINO
from ptqd_export.core.model import InputSpec, ModelInfo
from ptqd_export.core.schedule import NoiseSchedule

# Tracing a network makes millions of objects, and every collection looks at all that torch and diffusers
# hold: a sixth of the tests' time.
gc.set_threshold(100_000, 50, 100)


@pytest.fixture
def rng() -> np.random.Generator:
    return np.random.default_rng(20231210)


@pytest.fixture(autouse=True)
def one_on_the_cpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """Where no backend is named, ONNX Runtime is taken, also where OpenVINO is installed: no times decide."""
    monkeypatch.setattr(
        "ptqd_export.runtime.runtime.AUTOMATIC", tuple(name for name in AUTOMATIC if name != OPENVINO)
    )


@pytest.fixture
def schedule() -> NoiseSchedule:
    """Ten steps of the linear schedule, eta 1."""
    return NoiseSchedule.from_config({"clip_sample": False}, 10, 1.0)


@pytest.fixture
def class_info() -> ModelInfo:
    """A model of 1x4x4 samples with classes 0 to 2 and the null class 3."""
    return ModelInfo("toy", (1, 4, 4), (InputSpec("class_labels", num_classes=4, null_class=3),), "0" * 64)


@pytest.fixture(scope="session")
def invoke() -> Invoke:
    """The command line in this process: invoke("run", bundle, "--out", out). Anything but SystemExit is
    passed on."""

    def call(*arguments: object) -> Result:
        out, err = io.StringIO(), io.StringIO()
        code = 0
        with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
            try:
                cli.main([str(argument) for argument in arguments])
            except SystemExit as end:
                code = int(end.code or 0)
        return Result(code, out.getvalue(), err.getvalue())

    return call


@pytest.fixture
def launch() -> Iterator[Launch]:
    """The command line as a process group of its own: launch("run", bundle, "--out", out,
    PYTHONHASHSEED="1"). Killed in the end if it still runs."""
    started: list[subprocess.Popen[str]] = []

    def start(*arguments: object, **more: str) -> subprocess.Popen[str]:
        words = [sys.executable, "-m", "ptqd_export", *map(str, arguments)]
        pipe = subprocess.PIPE
        process = subprocess.Popen(
            words, env=environment(**more), stdout=pipe, stderr=pipe, text=True, start_new_session=True
        )
        started.append(process)
        return process

    yield start
    for process in started:
        with process:
            if process.poll() is None:
                os.killpg(process.pid, signal.SIGKILL)


@pytest.fixture(scope="session")
def once(tmp_path_factory: pytest.TempPathFactory, invoke: Invoke) -> Once:
    """once("rgb", make): what `make` builds in an empty folder, which nothing may change.

    Processes with the same folder in PTQD_TEST_BUNDLES, as the two of `make test`, build it once for both.
    """

    shared = os.environ.get("PTQD_TEST_BUNDLES") or tmp_path_factory.mktemp("bundles")

    def call(name: str, make: Callable[[Invoke, Path], Built]) -> Built:
        note = Path(shared, f"{name}.json")
        with Path(shared, f"{name}.lock").open("w") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            if not note.exists():
                built = make(invoke, Path(tempfile.mkdtemp(prefix=f"{name}-", dir=shared)))
                note.write_text(json.dumps([str(built.recipe), built.options, str(built.path), built.report]))
        recipe, options, path, report = json.loads(note.read_text())
        return Built(Path(recipe), tuple(options), Path(path), report)

    return call


@pytest.fixture(scope="session")
def rgb(once: Once) -> Built:
    """3x16x16 with attention, no classes; a DDPM config with fixed_large variance that clips; four steps, eta
    1, all precisions in turn."""
    return once("rgb", bundles.rgb)


@pytest.fixture(scope="session")
def classes(once: Once) -> Built:
    """1x8x8, five classes and no null class; three steps, eta 0.5, plan by SNR."""
    return once("classes", bundles.classes)


@pytest.fixture(scope="session")
def guided(once: Once) -> Built:
    """1x8x8, four classes and a null class, from a recipe: guidance 2, DDPM solver, budget in bit
    operations. Not gated: of four trajectories nothing is significant."""
    return once("guided", bundles.guided)


@pytest.fixture(scope="session")
def own(once: Once) -> Built:
    """A network of no library, 2x8x8, v-prediction, conditioned on 6 floats, guidance 1.5; plan by hand;
    not gated."""
    return once("own", bundles.own)


@pytest.fixture(scope="session")
def texts(once: Once) -> Built:
    """A tiny Stable Diffusion: 8x8 pictures from 4x4x4 latents, prompts of 6 tokens, guidance 3; three
    steps."""
    pytest.importorskip("transformers")
    return once("texts", bundles.texts)


@pytest.fixture(scope="session")
def large(once: Once) -> Built:
    """A tiny Stable Diffusion XL: two text encoders and pooled text, whose absence is zeros."""
    pytest.importorskip("transformers")
    return once("large", bundles.large)


@pytest.fixture(scope="session")
def several(once: Once, guided: Built) -> Built:
    """The guided model (noise in every step, two rows a sample) with engines of all kinds of precisions for
    all GPUs. Real builds, which need no GPU."""
    pytest.importorskip("tensorrt_rtx")
    return once("several", partial(bundles.several, guided))


@pytest.fixture
def place(tmp_path: Path, own: Built) -> Path:
    """A folder with a bundle in it that has no engines: plan w4a4, w4a8, w8a8, fp32."""
    return copied(own, tmp_path).parent


@pytest.fixture
def refused(place: Path, invoke: Invoke) -> Callable[..., str]:
    """Run a command that must fail, and check that it changed nothing in `place`; returns its one line."""

    def call(*words: object) -> str:
        before = listing(place)
        line = invoke(*words).error
        assert listing(place) == before
        Bundle.open(place / "bundle")
        return line

    return call


@pytest.fixture
def spoilt(tmp_path: Path, own: Built) -> Path:
    """A copy of a sound bundle, to be spoilt."""
    shutil.copytree(own.path, tmp_path / "spoilt")
    return tmp_path / "spoilt"


@pytest.fixture
def caches(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The user's cache folder, for this test alone."""
    folder = tmp_path_factory.mktemp("caches")
    monkeypatch.setenv("XDG_CACHE_HOME", str(folder))
    return folder / "ptqd-export"


@pytest.fixture(scope="module")
def toy() -> Iterator[Any]:
    """The network of support/toy.py, on one thread."""
    import torch
    from toy import Toy

    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    torch.manual_seed(0)
    yield Toy().eval()
    torch.set_num_threads(threads)


@pytest.fixture(scope="module")
def base(toy: Any) -> Any:
    """Its export in full precision, an onnx_ir.Model."""
    from toy import INFO

    from ptqd_export.export import export_fp

    return export_fp(toy, INFO)
