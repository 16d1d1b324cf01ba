"""The small models of tests/conftest.py, which says what they are, and their bundles, each made in an empty
folder."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
from helpers import MIXED, PRECISIONS, RTX, SEVERAL, Built, Invoke


def build(
    invoke: Invoke,
    model: Path,
    options: str = "",
    plan: str | None = None,
    precisions: tuple[str, ...] = PRECISIONS,
    at: Path | None = None,
) -> Built:
    """A bundle `at` a place, beside the model unless said."""
    path = at or model.with_name(f"{model.name}.bundle")
    every = (*options.split(), *(("--plan", plan) if plan else ()))
    every += tuple(word for p in precisions for word in ("--precision", p))
    result = invoke("build", model, "--out", path, *every, "--json")
    assert (result.code, result.err) == (0, ""), result
    return Built(model, every, path, result.json)


def save_unet(folder: Path, scheduler: Any, **config: Any) -> Path:
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


def rgb(invoke: Invoke, folder: Path) -> Built:
    from diffusers import DDPMScheduler

    model = save_unet(
        folder / "rgb",
        DDPMScheduler(variance_type="fixed_large"),
        sample_size=16, in_channels=3, out_channels=3, block_out_channels=(8, 16),
        down_block_types=("DownBlock2D", "AttnDownBlock2D"), up_block_types=("AttnUpBlock2D", "UpBlock2D"),
    )  # fmt: skip
    return build(invoke, model, "--calib-size 4 --n-steps 4 --solver ddim --eta 1", MIXED)


def classes(invoke: Invoke, folder: Path) -> Built:
    from diffusers import DDIMScheduler

    model = save_unet(
        folder / "classes",
        DDIMScheduler(clip_sample=False),
        sample_size=8, in_channels=1, out_channels=1, num_class_embeds=5,
    )  # fmt: skip
    return build(invoke, model, "--calib-size 4 --batch-size 1 --n-steps 3 --eta 0.5", "snr")


GUIDED = """
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


def guided(invoke: Invoke, folder: Path) -> Built:
    from diffusers import DDIMScheduler

    model = save_unet(
        folder / "guided",
        DDIMScheduler(clip_sample=True, timestep_spacing="trailing"),
        sample_size=8, in_channels=1, out_channels=1, num_class_embeds=5, add_attention=True,
    )  # fmt: skip
    (model / "recipe.toml").write_text(GUIDED)
    return build(invoke, model)


def several(guided: Built, invoke: Invoke, folder: Path) -> Built:
    options = f"--backend {RTX} --backend ort-cpu"
    at = folder / "several"
    return build(invoke, guided.recipe, options, "w8a8,w4a4,w8a8-fp8", precisions=SEVERAL, at=at)


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
OWN_RECIPE = """
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


def own(invoke: Invoke, folder: Path) -> Built:
    model = folder / "own"
    model.mkdir()
    (model / "net.py").write_text(OWN)
    (model / "scheduler_config.json").write_text(
        json.dumps({"prediction_type": "v_prediction", "beta_schedule": "squaredcos_cap_v2"})
    )
    np.save(model / "contexts.npy", np.random.default_rng(0).standard_normal((5, 6)))
    (model / "recipe.toml").write_text(OWN_RECIPE)
    # Its engines, which only rebuilds make, are for one GPU: those take less time.
    return build(invoke, model, "--calib-size 4 --compute-capability 8.9", MIXED)


TEXT_OPTIONS = "--calib-size 2 --n-steps 3 --guidance-scale 3"


def texts(invoke: Invoke, folder: Path) -> Built:
    from text_models import save_text_pipeline

    model = save_text_pipeline(folder / "texts")
    return build(invoke, model, TEXT_OPTIONS, "w8a8,fp32,fp32", precisions=("fp32", "w8a8"))


def large(invoke: Invoke, folder: Path) -> Built:
    from text_models import save_sdxl_pipeline

    model = save_sdxl_pipeline(folder / "large")
    return build(invoke, model, TEXT_OPTIONS, "fp32*3", precisions=("fp32",))
