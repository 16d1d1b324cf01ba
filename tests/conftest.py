"""What all tests share: seeded numbers, small values of the core, small models and the bundles built from
them."""

from __future__ import annotations

import os

# Before numpy and torch are loaded: small tests gain nothing from threads, which only wait for each other on
# a busy machine.
os.environ.setdefault("OMP_NUM_THREADS", "1")

import contextlib
import gc
import io
import json
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from helpers import (
    MIXED,
    PRECISIONS,
    RTX,
    SEVERAL,
    Built,
    Invoke,
    Launch,
    Result,
    copied,
    environment,
    listing,
)

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


def _build(
    invoke: Invoke,
    recipe: Path,
    *options: str,
    precisions: tuple[str, ...] = PRECISIONS,
    kind: str = "bundle",
) -> Built:
    path = recipe.with_name(f"{recipe.name}.{kind}")
    every = (*options, *(word for p in precisions for word in ("--precision", p)))
    result = invoke("build", recipe, "--out", path, *every, "--json")
    assert (result.code, result.err) == (0, ""), result
    return Built(recipe, every, path, result.json)


def _save_unet(folder: Path, scheduler: Any, **config: Any) -> Path:
    """A diffusers folder with seeded random weights."""
    import torch
    from diffusers import UNet2DModel

    small = {"block_out_channels": (8,), "layers_per_block": 1, "norm_num_groups": 4, "attention_head_dim": 8}
    blocks = {"down_block_types": ("DownBlock2D",), "up_block_types": ("UpBlock2D",), "add_attention": False}
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        UNet2DModel(**{**small, **blocks, **config}).save_pretrained(folder / "unet")
    scheduler.save_pretrained(folder / "scheduler")
    return folder


@pytest.fixture(scope="session")
def rgb(tmp_path_factory: pytest.TempPathFactory, invoke: Invoke) -> Built:
    """3x16x16 with attention, no classes; a DDPM config with fixed_large variance that clips; four steps, eta
    1, all precisions in turn."""
    from diffusers import DDPMScheduler

    folder = _save_unet(
        tmp_path_factory.mktemp("models") / "rgb",
        DDPMScheduler(variance_type="fixed_large"),
        sample_size=16, in_channels=3, out_channels=3, block_out_channels=(8, 16),
        down_block_types=("DownBlock2D", "AttnDownBlock2D"), up_block_types=("AttnUpBlock2D", "UpBlock2D"),
    )  # fmt: skip
    return _build(
        invoke,
        folder,
        "--calib-size",
        "4",
        "--n-steps",
        "4",
        "--solver",
        "ddim",
        "--eta",
        "1",
        "--plan",
        MIXED,
    )


@pytest.fixture(scope="session")
def classes(tmp_path_factory: pytest.TempPathFactory, invoke: Invoke) -> Built:
    """1x8x8, five classes and no null class; three steps, eta 0.5, plan by SNR."""
    from diffusers import DDIMScheduler

    folder = _save_unet(
        tmp_path_factory.mktemp("models") / "classes",
        DDIMScheduler(clip_sample=False),
        sample_size=8, in_channels=1, out_channels=1, num_class_embeds=5,
    )  # fmt: skip
    return _build(
        invoke,
        folder,
        "--calib-size",
        "4",
        "--batch-size",
        "1",
        "--n-steps",
        "3",
        "--eta",
        "0.5",
        "--plan",
        "snr",
    )


@pytest.fixture(scope="session")
def guided(tmp_path_factory: pytest.TempPathFactory, invoke: Invoke) -> Built:
    """1x8x8, four classes and a null class, from a recipe: guidance 2, DDPM solver, budget in bit
    operations. Not gated: of four trajectories nothing is significant."""
    from diffusers import DDIMScheduler

    folder = _save_unet(
        tmp_path_factory.mktemp("models") / "guided",
        DDIMScheduler(clip_sample=True, timestep_spacing="trailing"),
        sample_size=8, in_channels=1, out_channels=1, num_class_embeds=5, add_attention=True,
    )  # fmt: skip
    (folder / "recipe.toml").write_text(
        """
        [model]
        source = "."
        null_class = 4
        [sampler]
        solver = "ddpm"
        eta = 1.0
        n_steps = 3
        guidance_scale = 2.0
        [calibration]
        size = 4
        held_out = 2
        seed = 7
        [quantization]
        gate = false
        [plan]
        rule = "budget"
        cost = "bops"
        budget = 0.3
        """
    )
    return _build(invoke, folder)


OWN = '''
import torch
from torch import nn
from torch.nn import functional as F


class Own(nn.Module):
    """Convs without bias, one of them called twice, a linear layer on tokens, a vector condition."""

    def __init__(self):
        super().__init__()
        self.inlet = nn.Conv2d(2, 16, 3, padding=1, bias=False)
        self.clock = nn.Linear(2, 16)
        self.context = nn.Linear(6, 16, bias=False)
        self.norm = nn.GroupNorm(4, 16)
        self.twice = nn.Conv2d(16, 16, 3, padding=1, bias=False)
        self.tokens = nn.Linear(16, 16)
        self.outlet = nn.Conv2d(16, 2, 3, padding=1)

    def forward(self, sample, timestep, context):
        t = timestep[:, None] / 1000.0
        vector = self.clock(torch.cat([t.sin(), t.cos()], 1)) + self.context(context)
        h = self.inlet(sample) + vector[:, :, None, None]
        h = h + self.twice(F.silu(self.twice(F.silu(self.norm(h)))))
        h = h + self.tokens(h.flatten(2).transpose(1, 2)).transpose(1, 2).reshape(h.shape)
        return self.outlet(F.silu(h))


def make():
    return Own()
'''


@pytest.fixture(scope="session")
def own(tmp_path_factory: pytest.TempPathFactory, invoke: Invoke) -> Built:
    """A network of no library, 2x8x8, v-prediction, conditioned on 6 floats, guidance 1.5; plan by hand;
    not gated."""
    folder = tmp_path_factory.mktemp("models") / "own"
    folder.mkdir()
    (folder / "net.py").write_text(OWN)
    (folder / "scheduler_config.json").write_text(
        json.dumps({"prediction_type": "v_prediction", "beta_schedule": "squaredcos_cap_v2"})
    )
    np.save(folder / "contexts.npy", np.random.default_rng(0).standard_normal((5, 6)))
    (folder / "recipe.toml").write_text(
        """
        [model]
        source = "net.py:make"
        sample_shape = [2, 8, 8]
        scheduler = "scheduler_config.json"
        inputs = [{name = "context", dtype = "float32", shape = [6], values = "contexts.npy"}]
        [sampler]
        n_steps = 4
        guidance_scale = 1.5
        [quantization]
        gate = false
        """
    )
    # Its engines, which only rebuilds make, are for one GPU: those take less time.
    return _build(invoke, folder, "--calib-size", "4", "--plan", MIXED, "--compute-capability", "8.9")


@pytest.fixture(scope="session")
def texts(tmp_path_factory: pytest.TempPathFactory, invoke: Invoke) -> Built:
    """A tiny Stable Diffusion: 8x8 pictures from 4x4x4 latents, prompts of 6 tokens, guidance 3; three
    steps."""
    pytest.importorskip("transformers")
    from text_models import save_text_pipeline

    folder = save_text_pipeline(tmp_path_factory.mktemp("models") / "texts")
    options = ("--calib-size", "2", "--n-steps", "3", "--guidance-scale", "3", "--plan", "w8a8,fp32,fp32")
    return _build(invoke, folder, *options, precisions=("fp32", "w8a8"))


@pytest.fixture(scope="session")
def large(tmp_path_factory: pytest.TempPathFactory, invoke: Invoke) -> Built:
    """A tiny Stable Diffusion XL: two text encoders and pooled text, whose absence is zeros."""
    pytest.importorskip("transformers")
    from text_models import save_sdxl_pipeline

    folder = save_sdxl_pipeline(tmp_path_factory.mktemp("models") / "large")
    options = ("--calib-size", "2", "--n-steps", "3", "--guidance-scale", "3", "--plan", "fp32*3")
    return _build(invoke, folder, *options, precisions=("fp32",))


@pytest.fixture(scope="session")
def several(guided: Built, invoke: Invoke) -> Built:
    """The guided model (noise in every step, two rows a sample) with engines of all kinds of precisions for
    all GPUs. Real builds, which need no GPU."""
    pytest.importorskip("tensorrt_rtx")
    options = ("--plan", "w8a8,w4a4,w8a8-fp8", "--backend", RTX, "--backend", "ort-cpu")
    return _build(invoke, guided.recipe, *options, precisions=SEVERAL, kind="several")


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
