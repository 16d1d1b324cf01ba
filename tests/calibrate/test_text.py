"""Text encoders of Stable Diffusion 2 and XL, and of Stable Diffusion 1 in one file."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from ldm_models import ldm_recipe, original, shallow, write
from text_models import (
    TOKENS,
    save_sd2_pipeline,
    save_sdxl_pipeline,
    text_config,
    tiny_text,
    write_tokenizer,
)

from ptqd_export.calibrate import Parts, open_parts, open_source, text
from ptqd_export.errors import ModelError, RecipeError
from ptqd_export.recipe import Recipe

STATES, POOLED = "encoder_hidden_states", "text_embeds"
TEXTS = ["a photo of a cat", "", "dog"]


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    pytest.importorskip("transformers")
    return save_sdxl_pipeline(tmp_path_factory.mktemp("models") / "sdxl")


@pytest.fixture
def folder(whole: Path, tmp_path: Path) -> Path:
    shutil.copytree(whole, tmp_path / "sdxl")
    return tmp_path / "sdxl"


def parts_of(folder: Path, **pipeline: Any) -> Parts:
    recipe = Recipe.from_dict({"model": {"source": "."}, "pipeline": pipeline}, folder)
    return open_parts(recipe, open_source(recipe))


def encoded(folder: Path, end: str, kind: str) -> Any:
    """What transformers makes of TEXTS."""
    import transformers

    tokenizer = transformers.CLIPTokenizer.from_pretrained(folder / f"tokenizer{end}")
    ids = tokenizer(TEXTS, padding="max_length", max_length=TOKENS, return_tensors="pt").input_ids
    module = getattr(transformers, kind).from_pretrained(folder / f"text_encoder{end}")
    with torch.no_grad():
        return module(ids, output_hidden_states=True)


def test_parts_of_sdxl(whole: Path) -> None:
    """Penultimate states side by side, without the last norm; the second's projected output."""
    parts = parts_of(whole)
    assert parts.shapes == {STATES: (TOKENS, 20), POOLED: (6,)}
    assert [(part.folder, part.tokenizer_folder) for part in parts.texts] == [
        ("text_encoder", "tokenizer"), ("text_encoder_2", "tokenizer_2"),
    ]  # fmt: skip
    first, second = encoded(whole, "", text.ENCODER), encoded(whole, "_2", text.PROJECTING)
    expected = torch.cat([first.hidden_states[-2], second.hidden_states[-2]], -1).numpy()
    got = parts.encode(TEXTS)
    assert np.abs(got[STATES] - expected).max() < 1e-6 * max(1, np.abs(expected).max())
    assert np.abs(got[POOLED] - second.text_embeds.numpy()).max() < 1e-6 * np.abs(got[POOLED]).max()
    assert parts.force_zeros and parts.null == {}
    assert not parts_of(whole, text=False).force_zeros


def test_text_of_stable_diffusion_2(tmp_path: Path) -> None:
    """One encoder, its last states; another token pads."""
    pytest.importorskip("transformers")
    folder = save_sd2_pipeline(tmp_path / "sd2")
    parts = parts_of(folder)
    assert parts.shapes == {STATES: (TOKENS, 8)} and not parts.force_zeros
    expected = encoded(folder, "", text.ENCODER).last_hidden_state.numpy()
    got = parts.encode(TEXTS)[STATES]
    assert np.abs(got - expected).max() < 1e-6 * max(1, np.abs(expected).max())
    assert (parts.null[STATES] == parts.encode([""])[STATES][0]).all()


def test_zeros_are_what_the_pipeline_says(folder: Path) -> None:
    def say(value: Any) -> Parts:
        (folder / "model_index.json").write_text(json.dumps({"force_zeros_for_empty_prompt": value}))
        return parts_of(folder)

    off, on = say(False), say(True)
    assert not off.force_zeros and off.null.keys() == {STATES, POOLED} and off.null[POOLED].shape == (6,)
    assert off.digest != on.digest and on.force_zeros
    with pytest.raises(ModelError, match="force_zeros_for_empty_prompt is 'no'"):
        say("no")


def config(file: str, **changes: Any) -> Callable[[Path], None]:
    def change(folder: Path) -> None:
        data = json.loads((folder / file).read_text())
        (folder / file).write_text(json.dumps(data | changes))

    return change


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda f: shutil.rmtree(f / "tokenizer_2"), "tokenizer_2 holds no tokenizer: expected vocab.json"),
        (lambda f: shutil.rmtree(f / "text_encoder_2"), "has no text_encoder_2/, which makes"),
        (
            config("text_encoder_2/config.json", architectures=["T5EncoderModel"]),
            "text_encoder_2 is a 'T5EncoderModel', expected CLIPTextModelWithProjection",
        ),
        (
            config("text_encoder/config.json", architectures=["CLIPTextModelWithProjection"]),
            "expected CLIPTextModel:",
        ),
        (config("tokenizer_2/tokenizer_config.json", model_max_length=7), "take 7 and 8 tokens"),
        (config("text_encoder/config.json", vocab_size=300), "has 523 tokens, its text encoder knows 300"),
        (lambda f: (f / "text_encoder_2" / "model.safetensors").unlink(), "read as a CLIPTextModelW"),
    ],
)  # fmt: skip
def test_one_line(folder: Path, damage: Callable[[Path], object], message: str) -> None:
    damage(folder)
    with pytest.raises(ModelError, match=message) as caught:
        parts_of(folder)
    assert "\n" not in str(caught.value)


@pytest.fixture
def single(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A checkpoint of Stable Diffusion 1, small, with a text encoder, and a tokenizer beside it."""
    pytest.importorskip("transformers")
    changes = {"hidden_size": 24, "num_attention_heads": 3}
    size = write_tokenizer(tmp_path / "tokens")
    monkeypatch.setattr(text, "VIT_L_14", text_config(size, **changes))
    plain = shallow("v1-inference")
    plain["model"]["params"]["cond_stage_config"]["params"] = {"max_length": TOKENS}
    module = tiny_text(size, **changes)
    inner = {key.removeprefix("text_model."): value for key, value in module.state_dict().items()}
    head = "cond_stage_model.transformer.text_model."
    state = original(plain).state | {head + key: value for key, value in inner.items()}
    write(tmp_path, plain, state | {head + "embeddings.position_ids": torch.arange(TOKENS)})
    module.save_pretrained(tmp_path / "text_encoder")
    shutil.copytree(tmp_path / "tokens", tmp_path / "tokenizer")
    return tmp_path


def test_text_in_one_file(single: Path) -> None:
    """With a tokenizer it is a part; without, a line says so."""
    recipe = ldm_recipe(single)
    source = open_source(recipe)
    parts = open_parts(recipe.override(pipeline={"decoder": False, "tokenizer": "tokens"}), source)
    expected = encoded(single, "", text.ENCODER).last_hidden_state.numpy()
    assert np.abs(parts.encode(TEXTS)[STATES] - expected).max() < 1e-6 * max(1, np.abs(expected).max())
    assert parts.notes == () and not parts.force_zeros
    without = open_parts(recipe.override(pipeline={"decoder": False}), source)
    (note,) = without.notes
    assert without.texts == () and "takes no prompts" in note and "set pipeline.tokenizer" in note
    assert open_parts(recipe.override(pipeline={"decoder": False, "text": False}), source).notes == ()


def test_other_weights_in_one_file(single: Path) -> None:
    read = open_source(ldm_recipe(single)).read_text_state
    assert read is not None
    name = "text_model.final_layer_norm.weight"

    def refused(message: str, tokens: str = "tokens", **changes: Any) -> None:
        state = {key: value for key, value in (read() | changes).items() if value is not None}
        with pytest.raises(ModelError, match=message) as caught:
            text.text_of_state(state, single / tokens, "model.ckpt")
        assert "\n" not in str(caught.value)

    refused("lacks 1 tensors of CLIP ViT-L/14's", **{name: None})
    refused("holds unknown 1 tensors", other=torch.ones(2))
    refused(r"has shape \(2,\)", **{name: torch.ones(2)})
    refused("holds NaN", **{name: torch.full((24,), torch.nan)})
    refused("holds no tokenizer", tokens="nothing")


def test_a_tokenizer_that_nothing_needs(whole: Path) -> None:
    with pytest.raises(RecipeError, match=r"pipeline\.tokenizer is set, but sdxl is no Stable Diffusion 1"):
        parts_of(whole, tokenizer="tokenizer")
