"""PtqdScheduler in the pipelines of diffusers: the runtime's own samples, and its noise."""

from __future__ import annotations

import warnings

import numpy as np
import pytest
import torch
from diffusers import DDIMPipeline
from helpers import Built

from ptqd_export import RecipeError, Runtime
from ptqd_export.core.sampling import NoiseSource
from ptqd_export.dropin import PtqdScheduler, PtqdUNet


def test_a_pipeline_with_both_draws_the_runtimes_samples(rgb: Built, monkeypatch: pytest.MonkeyPatch) -> None:
    """With noise in every step: both draw it from the same source."""
    bundle = rgb.bundle
    source = NoiseSource(3, range(2), bundle.manifest.sampling.model.sample_shape)

    def draw(*_: object, **__: object) -> torch.Tensor:
        return torch.from_numpy(source.draw())

    monkeypatch.setattr("diffusers.pipelines.ddim.pipeline_ddim.randn_tensor", draw)
    monkeypatch.setattr("ptqd_export.dropin.scheduler.randn_tensor", draw)
    unet, scheduler = PtqdUNet(bundle, "ort-cpu"), PtqdScheduler(bundle)
    pipe = DDIMPipeline(unet=unet, scheduler=scheduler)
    pipe.scheduler = scheduler  # the pipeline's constructor makes a DDIMScheduler of the config
    pipe.set_progress_bar_config(disable=True)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        images = pipe(batch_size=2, num_inference_steps=4, output_type="np").images
    unet.close()
    with Runtime(bundle, "ort-cpu") as runtime:
        expected = runtime.sample(range(2), seed=3)
    expected = np.clip(expected / 2 + 0.5, 0, 1).transpose(0, 2, 3, 1)
    assert (bundle.manifest.sampling.schedule.sigmas > 0).any()
    np.testing.assert_allclose(images, expected, atol=1e-5)


def test_noise_is_recalibrated(rgb: Built) -> None:
    scheduler, x = PtqdScheduler(rgb.bundle), torch.zeros(1, 3, 16, 16)
    injected = []
    for t in scheduler.timesteps[:-1]:
        a, b = (
            scheduler.step(x, t, x, generator=torch.Generator().manual_seed(seed)).prev_sample
            for seed in (1, 2)
            if scheduler.set_begin_index(int((scheduler.timesteps == t).nonzero()[0])) is None
        )
        z = [torch.randn(1, 3, 16, 16, generator=torch.Generator().manual_seed(seed)) for seed in (1, 2)]
        injected.append(float(((a - b) / (z[0] - z[1])).median()))
    np.testing.assert_allclose(injected, rgb.bundle.sigmas("ort-cpu")[:-1], rtol=1e-4)
    assert (rgb.bundle.sigmas("ort-cpu") < rgb.bundle.manifest.sampling.schedule.sigmas).any()


def test_wrong_use_is_one_line(rgb: Built) -> None:
    scheduler, x = PtqdScheduler(rgb.bundle), torch.zeros(1, 3, 16, 16)
    with pytest.raises(RecipeError, match="50 steps were asked for, but the bundle was measured for 4"):
        scheduler.set_timesteps(50)
    with pytest.raises(RecipeError, match="timestep 3 is none of the bundle's"):
        scheduler.step(x, 3, x)


def test_a_run_may_begin_later(rgb: Built) -> None:
    scheduler = PtqdScheduler(rgb.bundle)
    clean, noise = torch.ones(2, 3, 16, 16), torch.full((2, 3, 16, 16), 2.0)
    abar = rgb.bundle.manifest.sampling.schedule.alphas_cumprod[1]
    x = scheduler.add_noise(clean, noise, scheduler.timesteps[1:2].repeat(2))
    assert torch.allclose(x, torch.tensor(np.sqrt(abar) + 2 * np.sqrt(1 - abar), dtype=torch.float32))
    after = scheduler.step(x, scheduler.timesteps[1], x).prev_sample
    assert after.shape == x.shape and len(scheduler) == 4
