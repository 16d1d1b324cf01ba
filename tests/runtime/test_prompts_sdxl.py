"""Stable Diffusion XL: prompts to pictures, against diffusers' own pipeline."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from helpers import Built, reseal, seal

from ptqd_export import run
from ptqd_export.bundle import Bundle
from ptqd_export.core.sampling import NoiseSource
from ptqd_export.errors import BundleError
from ptqd_export.runtime import encode_prompts

PROMPTS = ("a photo of a cat", "dog", "a dog and a cat on a mat, 12 photos")
STATES, POOLED = "encoder_hidden_states", "text_embeds"
SEED = 5


@pytest.fixture(scope="module")
def pipeline(large: Built) -> Any:
    from diffusers import AutoencoderKL, DDIMScheduler, StableDiffusionXLPipeline, UNet2DConditionModel
    from transformers import CLIPTextModel, CLIPTextModelWithProjection, CLIPTokenizer

    folder = large.recipe
    made = StableDiffusionXLPipeline(
        AutoencoderKL.from_pretrained(folder / "vae"),
        CLIPTextModel.from_pretrained(folder / "text_encoder"),
        CLIPTextModelWithProjection.from_pretrained(folder / "text_encoder_2"),
        CLIPTokenizer.from_pretrained(folder / "tokenizer"),
        CLIPTokenizer.from_pretrained(folder / "tokenizer_2"),
        UNet2DConditionModel.from_pretrained(folder / "unet"),
        DDIMScheduler.from_pretrained(folder / "scheduler"),
        add_watermarker=False,
    )
    made.set_progress_bar_config(disable=True)
    return made


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("negative", [None, "dog", ""])
def test_conditions_are_those_of_diffusers(large: Built, pipeline: Any, negative: str | None) -> None:
    """States of both encoders side by side, the pooled text of the second; zeros without a negative prompt,
    which the empty one is not."""
    found = encode_prompts(large.bundle, PROMPTS, negative)
    null = large.bundle.manifest.sampling.without(found.null).model.null_conditions(3)
    given = None if negative is None else [negative] * 3
    states, no_states, pooled, no_pooled = (
        value.detach().numpy() for value in pipeline.encode_prompt(list(PROMPTS), negative_prompt=given)
    )
    assert states.shape == (3, 8, 20) and pooled.shape == (3, 6) and pooled.std() > 0.1
    assert np.abs(found.conditions[STATES] - states).max() < 1e-5 * np.abs(states).max()
    assert np.abs(found.conditions[POOLED] - pooled).max() < 1e-5 * np.abs(pooled).max()
    assert np.abs(null[STATES] - no_states).max() < 1e-5 * np.abs(states).max()
    assert np.abs(null[POOLED] - no_pooled).max() < 1e-5 * np.abs(pooled).max()
    assert (negative is None) == (not no_states.any()) == (not null[POOLED].any())


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("negative", [None, "dog"])
def test_pictures_are_those_of_diffusers(large: Built, pipeline: Any, negative: str | None) -> None:
    import torch

    noise = NoiseSource(SEED, range(3), (4, 4, 4)).draw()
    expected = pipeline(
        list(PROMPTS),
        negative_prompt=None if negative is None else [negative] * 3,
        latents=torch.from_numpy(noise).float(),
        num_inference_steps=3,
        guidance_scale=3.0,
        output_type="np",
    ).images.transpose(0, 3, 1, 2)
    got = run(large.bundle, 3, prompts=PROMPTS, negative_prompt=negative, seed=SEED, backend="ort-cpu")
    assert got.shape == (3, 3, 8, 8) and expected.std() > 0.05
    assert np.abs((np.clip(got, -1, 1) + 1) / 2 - expected).max() < 1e-4


def test_without_a_prompt_there_is_no_text(large: Built) -> None:
    model = large.bundle.manifest.sampling.model
    assert not model.null and large.bundle.manifest.pipeline.force_zeros
    assert not any(model.conditions(None, 1)[name].any() for name in (STATES, POOLED))


@pytest.fixture
def copy(large: Built, tmp_path: Path) -> Path:
    shutil.copytree(large.path, tmp_path / "copy")
    return tmp_path / "copy"


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda p: p["encoders"][1]["pooled"].update(width=7), "network takes"),
        (lambda p: p["encoders"][1]["pooled"].update(width=0), "pooled text of 0"),
        (lambda p: p["encoders"][1]["pooled"].update(input="other"), "network takes None"),
        (lambda p: p["encoders"][1]["pooled"].update(input=STATES), "for one input"),
        (lambda p: p["encoders"][0].update(pooled={"input": POOLED, "width": 6}), "for one input"),
        (lambda p: p["encoders"][1].update(pooled=None), "has 2 outputs"),
        (lambda p: p["encoders"][0].update(hidden_layer=-1), "final_norm"),
        (lambda p: p["encoders"][0].update(hidden_layer=-1, final_norm=True), "outputs"),
        (lambda p: p["encoders"].reverse(), None),
    ],
)
def test_manifests_that_do_not_fit(copy: Path, change: Any, message: str | None) -> None:
    seal(copy, lambda data: change(data["pipeline"]))
    if message is None:  # another order is found where the encoders run: their states lie side by side
        from ptqd_export.errors import ParityError

        with pytest.raises(ParityError, match="text encoder computes something else"):
            encode_prompts(Bundle.open(copy), ["cat"])
        return
    with pytest.raises(BundleError, match=message) as caught:
        Bundle.open(copy)
    assert "\n" not in str(caught.value)


def test_graphs_of_two_outputs_are_checked(copy: Path) -> None:
    import onnx

    file = copy / "text_encoder_2" / "model.onnx"
    whole = file.read_bytes()

    def refused(change: Any, message: str) -> None:
        model = onnx.load_from_string(whole)
        change(model.graph)
        file.write_bytes(model.SerializeToString())
        reseal(copy)
        with pytest.raises(BundleError, match=message):
            Bundle.open(copy)

    def swapped(graph: Any) -> None:
        graph.output.reverse()

    def wider(graph: Any) -> None:
        graph.output[1].type.tensor_type.shape.dim[1].dim_value = 7

    refused(swapped, "has 2 outputs")
    refused(lambda graph: graph.output.pop(), "has 1 outputs")
    refused(wider, "text_embeds")


def test_files(large: Built) -> None:
    inside = set(large.bundle.manifest.files)
    assert {"text_encoder_2/model.onnx", "tokenizer_2/vocab.json", "tokenizer/merges.txt"} <= inside
    assert json.loads((large.path / "manifest.json").read_text())["pipeline"]["force_zeros"] is True
