"""PtqdUNet in the pipelines of diffusers, against the network that the bundle was built from."""

from __future__ import annotations

import warnings
from collections.abc import Iterator

import numpy as np
import pytest
import torch
from diffusers import DDIMPipeline, DDIMScheduler, UNet2DModel
from helpers import Built

from ptqd_export import Plan, Precision, RecipeError
from ptqd_export.dropin import PtqdUNet

FULL = Precision.parse("fp32")


def drawn(unet: object, steps: int = 4) -> np.ndarray:
    """Two pictures by diffusers' pipeline, (2, 16, 16, 3)."""
    pipe = DDIMPipeline(unet=unet, scheduler=DDIMScheduler())
    pipe.set_progress_bar_config(disable=True)
    noise = torch.Generator().manual_seed(5)
    images = pipe(batch_size=2, generator=noise, num_inference_steps=steps, output_type="np").images
    return np.asarray(images)


@pytest.fixture(scope="module")
def full(rgb: Built) -> Iterator[PtqdUNet]:
    unet = PtqdUNet(rgb.bundle, "ort-cpu", Plan((FULL,) * 4))
    yield unet
    unet.close()


def test_a_pipeline_draws_with_a_bundle_what_it_draws_with_the_network(rgb: Built, full: PtqdUNet) -> None:
    network = UNet2DModel.from_pretrained(rgb.recipe / "unet")
    np.testing.assert_allclose(drawn(full), drawn(network), atol=1e-4)


def test_every_step_gets_the_engine_of_the_plan(rgb: Built, monkeypatch: pytest.MonkeyPatch) -> None:
    unet = PtqdUNet(rgb.path, "ort-cpu")
    used: list[Precision] = []
    at = unet.runtime.engine_at
    monkeypatch.setattr(
        unet.runtime, "engine_at", lambda step: (used.append(unet.runtime.plan.steps[step]), at(step))[1]
    )
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        quantized = drawn(unet)
    assert used == list(rgb.bundle.manifest.plan.steps) and len(set(used)) > 1
    assert np.isfinite(quantized).all()
    unet.close()


def test_other_timesteps_take_the_nearest_step_and_say_so_once(full: PtqdUNet) -> None:
    x = torch.zeros(1, 3, 16, 16)
    known = int(full.sampling.schedule.timesteps[1])
    with pytest.warns(UserWarning, match=f"timestep {known + 1} is not one of the 4 .* of {known} are used"):
        full(x, known + 1)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        full(x, known + 2)


def test_it_answers_as_the_network_was_trained(own: Built) -> None:
    """v, although the graphs give epsilon."""
    unet = PtqdUNet(own.path, "ort-cpu")
    spec = own.bundle.manifest.sampling.model.inputs[0]
    x, step = torch.full((2, 2, 8, 8), 0.5), 1
    context = torch.ones(2, *spec.shape)
    t = int(unet.sampling.schedule.timesteps[step])
    (v,) = unet(x, t, **{spec.name: context}, return_dict=False)
    feeds = {
        "sample": x.numpy(),
        "timestep": np.full(2, t),
        "step": np.array([step]),
        spec.name: context.numpy(),
    }
    epsilon = unet.runtime.engine_at(step)(feeds)["epsilon"]
    gain, offset = (row[step] for row in unet.sampling.schedule.epsilon_coefficients())
    assert unet.sampling.schedule.prediction_type == "v_prediction"
    np.testing.assert_allclose(gain * v.numpy() + offset * x.numpy(), epsilon, atol=1e-5)
    unet.close()


def test_labels_are_taken_and_what_is_wrong_is_one_line(classes: Built) -> None:
    unet = PtqdUNet(classes.path, "ort-cpu")
    x, t = torch.zeros(2, 1, 8, 8), torch.tensor(int(unet.sampling.schedule.timesteps[0]))
    a, b = (unet(x, t, class_labels=torch.full((2,), label)).sample for label in (0, 1))
    assert not torch.equal(a, b)
    assert unet.config.num_class_embeds == 5 and unet.config.in_channels == 1
    for wrong, words in (
        ({}, r"needs class_labels of shape \[2\]"),
        ({"class_labels": torch.zeros(3)}, r"class_labels has shape \[3\]: expected \[2\]"),
        ({"encoder_hidden_states": x}, "takes no encoder_hidden_states: it takes class_labels"),
    ):
        with pytest.raises(RecipeError, match=words):
            unet(x, t, **wrong)
    unet.close()


def test_to_moves_what_it_returns(full: PtqdUNet) -> None:
    moved = full.to(torch.float64)
    try:
        x = torch.zeros(1, 3, 16, 16, dtype=torch.float64)
        t = int(full.sampling.schedule.timesteps[0])
        assert moved is full and full.dtype == torch.float64 and moved(x, t).sample.dtype == torch.float64
    finally:
        full.to(torch.float32)
