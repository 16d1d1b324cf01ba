"""Prompts to pictures, against diffusers' own pipeline."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import numpy.typing as npt
import pytest
from helpers import Built, with_plan

from ptqd_export import run
from ptqd_export.bundle import Bundle
from ptqd_export.core.sampling import NoiseSource
from ptqd_export.errors import ParityError, RecipeError
from ptqd_export.runtime import Prompted, draw, encode_prompts
from ptqd_export.runtime.decoder import PictureDecoder

PROMPTS = ("a photo of a cat", "dog", "a dog and a cat on a mat, 12 photos")
SEED = 5
F64 = npt.NDArray[np.float64]


@pytest.fixture(scope="module")
def exact(texts: Built) -> Bundle:
    """The bundle, in full precision at every step."""
    return with_plan(texts.bundle, "fp32")


@pytest.fixture(scope="module")
def pictures(exact: Bundle) -> F64:
    return run(exact, 4, prompts=PROMPTS, seed=SEED, backend="ort-cpu", batch_size=3)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("negative", [None, "dog"])
def test_pictures_are_those_of_diffusers(
    texts: Built, exact: Bundle, pictures: F64, negative: str | None
) -> None:
    import torch
    from diffusers import AutoencoderKL, DDIMScheduler, StableDiffusionPipeline, UNet2DConditionModel
    from transformers import CLIPTextModel, CLIPTokenizer

    folder = texts.recipe
    pipeline = StableDiffusionPipeline(
        AutoencoderKL.from_pretrained(folder / "vae"),
        CLIPTextModel.from_pretrained(folder / "text_encoder"),
        CLIPTokenizer.from_pretrained(folder / "tokenizer"),
        UNet2DConditionModel.from_pretrained(folder / "unet"),
        DDIMScheduler.from_pretrained(folder / "scheduler"),
        None,
        None,
        requires_safety_checker=False,
    )
    pipeline.set_progress_bar_config(disable=True)
    noise = NoiseSource(SEED, range(4), (4, 4, 4)).draw()
    expected = pipeline(
        [PROMPTS[i % 3] for i in range(4)],
        negative_prompt=None if negative is None else [negative] * 4,
        latents=torch.from_numpy(noise).float(),
        num_inference_steps=3,
        guidance_scale=3.0,
        output_type="np",
    ).images.transpose(0, 3, 1, 2)
    got = pictures
    if negative is not None:
        got = run(exact, 4, prompts=PROMPTS, negative_prompt=negative, seed=SEED, backend="ort-cpu")
        assert np.abs(got - pictures).max() > 1e-3
    assert got.shape == (4, 3, 8, 8)
    assert np.abs((np.clip(got, -1, 1) + 1) / 2 - expected).max() < 1e-5
    assert expected.std() > 0.05


def test_each_text_is_encoded_once(exact: Bundle, monkeypatch: pytest.MonkeyPatch) -> None:
    from ptqd_export.runtime import prompts as module

    rows: list[int] = []
    real = module.open_engine

    def opened(*args: object, **more: object) -> object:
        engine = real(*args, **more)  # type: ignore[arg-type]

        class Counted:
            def __call__(self, feeds: dict[str, npt.NDArray[np.int64]]) -> object:
                rows.append(len(feeds["input_ids"]))
                return engine(feeds)

            def close(self) -> None:
                engine.close()

        return Counted()

    monkeypatch.setattr(module, "open_engine", opened)
    found = encode_prompts(exact, ["cat", "dog", "cat"], "dog")
    assert rows == [3]  # and the empty prompt, by which the encoder is checked
    states = found.conditions["encoder_hidden_states"]
    assert states.shape == (3, 8, 8)
    assert (states[0] == states[2]).all() and (found.null["encoder_hidden_states"] == states[1]).all()
    drawn = found.of(range(2, 5))["encoder_hidden_states"]
    assert (drawn == states[[2, 0, 1]]).all()


def test_the_null_condition_is_the_empty_prompt(texts: Built) -> None:
    bundle = texts.bundle
    states = encode_prompts(bundle, [""]).conditions["encoder_hidden_states"][0]
    null = bundle.manifest.sampling.model.null["encoder_hidden_states"]
    assert np.abs(null - states).max() < 1e-5 and np.abs(null).max() > 0.1
    assert (bundle.manifest.sampling.model.null_conditions(2)["encoder_hidden_states"] == null).all()


def test_without_a_prompt_it_is_the_empty_one(exact: Bundle, pictures: F64) -> None:
    none = run(exact, 2, seed=SEED, backend="ort-cpu")
    empty = run(exact, 2, prompts=[""], seed=SEED, backend="ort-cpu")
    assert np.abs(none - empty).max() < 1e-5 and np.abs(none - pictures[:2]).max() > 1e-3


def test_latents_and_their_pictures(exact: Bundle, pictures: F64) -> None:
    latents = run(exact, 4, prompts=PROMPTS, latents=True, seed=SEED, backend="ort-cpu")
    assert latents.shape == (4, 4, 4, 4)
    with PictureDecoder(exact) as decode:
        assert np.abs(decode(latents) - pictures).max() < 1e-5


def test_workers_decode_their_own(exact: Bundle, texts: Built, pictures: F64) -> None:
    prompted = encode_prompts(exact, PROMPTS)
    parts = dict(
        draw(
            texts.bundle, [range(0, 2), range(2, 4)], prompted=prompted, seed=SEED, workers=2,
            plan=exact.manifest.plan, backend="ort-cpu",
        )
    )  # fmt: skip
    got = np.concatenate([parts[range(0, 2)], parts[range(2, 4)]])
    assert np.abs(got - pictures).max() < 1e-5


def test_long_prompts_are_cut_with_a_note(texts: Built) -> None:
    found = encode_prompts(texts.bundle, ["cat " * 9, "cat " * 6])
    assert found.notes == (f"the prompt {'cat ' * 9!r} has 9 tokens, of which the first 6 count",)
    first, second = found.conditions["encoder_hidden_states"]
    assert (first == second).all()


def test_what_is_refused(texts: Built, guided: Built, own: Built) -> None:
    def refused(bundle: Bundle, message: str, *prompts: str, negative: str | None = None) -> None:
        with pytest.raises(RecipeError, match=message) as caught:
            encode_prompts(bundle, prompts, negative)
        assert "\n" not in str(caught.value)

    refused(guided.bundle, "takes no text: give --class-labels", "a cat")
    refused(own.bundle, "takes no text: give its conditions by --condition", "a cat")
    refused(texts.bundle, "0 prompts")
    refused(texts.bundle, "not valid UTF-8", "\udcff")
    with pytest.raises(RecipeError, match="give a list"):
        run(texts.bundle, 1, prompts="a cat")
    with pytest.raises(RecipeError, match="without a prompt"):
        run(texts.bundle, 1, negative_prompt="dog")
    prompted = encode_prompts(texts.bundle, ["cat"])
    tensors = {"encoder_hidden_states": np.zeros((1, 8, 8), np.float32)}
    with pytest.raises(RecipeError, match="both given"):
        run(texts.bundle, 1, prompts=prompted, tensors=tensors)
    with pytest.raises(RecipeError, match="no decoder"):
        PictureDecoder(guided.bundle)


def test_another_encoder_is_found(texts: Built) -> None:
    """Another result for the empty prompt than where the bundle was built."""
    bundle = texts.bundle
    name = "null.encoder_hidden_states"
    tables = replace(bundle.tables, arrays={**bundle.tables.arrays, name: bundle.tables.arrays[name] * 1.01})
    bundle = replace(bundle, tables=tables)
    with pytest.raises(ParityError, match="text encoder computes something else"):
        encode_prompts(bundle, ["cat"])


def test_prompted_in_turn() -> None:
    table = {"text": np.arange(6, dtype=np.float32).reshape(2, 3)}
    prompted = Prompted(("a", "b"), None, table, {}, ())
    assert prompted.of([0, 3, 4])["text"].tolist() == [[0, 1, 2], [3, 4, 5], [0, 1, 2]]


def test_files(texts: Built) -> None:
    inside = {str(Path(name)) for name in texts.bundle.manifest.files}
    assert {
        "text_encoder/model.onnx", "text_encoder/weights.safetensors", "vae_decoder/model.onnx",
        "vae_decoder/weights.safetensors", "tokenizer/vocab.json", "tokenizer/merges.txt",
        "tokenizer/tokenizer_config.json",
    } <= inside  # fmt: skip
