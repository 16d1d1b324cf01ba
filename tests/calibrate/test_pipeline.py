"""Text encoders, tokenizers and decoders of a diffusers folder."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from text_models import save_text_pipeline, tiny_vae

from ptqd_export.calibrate import Parts, collect, open_model, open_parts, open_source, prompts_of
from ptqd_export.calibrate.captions import CAPTIONS
from ptqd_export.calibrate.pipeline import decoder_part
from ptqd_export.core.sampling import Sampling
from ptqd_export.errors import ModelError, RecipeError
from ptqd_export.recipe import Recipe

TEXT = "encoder_hidden_states"


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    pytest.importorskip("transformers")
    return save_text_pipeline(tmp_path_factory.mktemp("models") / "sd")


@pytest.fixture
def folder(whole: Path, tmp_path: Path) -> Path:
    shutil.copytree(whole, tmp_path / "sd")
    return tmp_path / "sd"


def recipe_of(folder: Path, **sections: Any) -> Recipe:
    return Recipe.from_dict({"model": {"source": "."}, **sections}, folder)


def parts_of(recipe: Recipe) -> Parts:
    return open_parts(recipe, open_source(recipe))


def test_parts_of_a_folder(whole: Path) -> None:
    import transformers

    parts = parts_of(recipe_of(whole))
    (spec,) = open_model(recipe_of(whole)).info.inputs
    assert (spec.name, spec.dtype, spec.shape) == (TEXT, "float32", (8, 8))
    assert parts.shapes == {TEXT: (8, 8)}
    states = parts.encode(["a cat", ""])[TEXT]
    module = transformers.CLIPTextModel.from_pretrained(whole / "text_encoder")
    ids = transformers.CLIPTokenizer.from_pretrained(whole / "tokenizer")(
        ["a cat", ""], padding="max_length", max_length=8, return_tensors="pt"
    ).input_ids
    with torch.no_grad():
        expected = module(ids).last_hidden_state.numpy()
    assert np.abs(states - expected).max() < 1e-5 and np.abs(states[0] - states[1]).max() > 0.1
    assert parts.latent and parts.decoder is not None
    assert (parts.decoder.scaling_factor, parts.decoder.picture_shape) == (0.5, (3, 8, 8))


def test_weights_of_a_variant(folder: Path, whole: Path) -> None:
    """As `save_pretrained(variant="fp16")` names them."""
    (folder / "text_encoder" / "model.safetensors").rename(folder / "text_encoder" / "model.fp16.safetensors")
    states = (parts_of(recipe_of(place)).encode(["a cat"])[TEXT] for place in (folder, whole))
    assert (next(states) == next(states)).all()


def test_parts_that_are_not_wanted(whole: Path) -> None:
    parts = parts_of(recipe_of(whole, pipeline={"text": False, "decoder": False}))
    assert parts == Parts(latent=True)


def test_a_vq_decoder_is_diffusers(whole: Path) -> None:
    """Its nearest codes are those that diffusers takes."""
    from diffusers import VQModel

    torch.manual_seed(0)
    model = VQModel(
        block_out_channels=(4, 4), down_block_types=("DownEncoderBlock2D",) * 2, norm_num_groups=2,
        up_block_types=("UpDecoderBlock2D",) * 2, num_vq_embeddings=40, mid_block_add_attention=False,
    ).eval()  # fmt: skip
    part = decoder_part(model, "VQModel", (3, 4, 4), "x")
    latent = torch.randn(5, 3, 4, 4) / 40
    with torch.no_grad():
        expected = model.decode(latent, return_dict=False)[0]
        assert torch.allclose(part.module(latent), expected, atol=1e-6)
        other = model.decode(latent, force_not_quantize=True, return_dict=False)[0]
    assert not torch.allclose(other, expected, atol=1e-3)


def test_weights_of_eight_bits(whole: Path) -> None:
    """Half a step off at most, a scale per output channel."""
    exact, rounded = (
        parts_of(recipe_of(whole, pipeline={"weights": weights})) for weights in ("fp32", "w8a16")
    )
    assert exact.decoder is not None and rounded.decoder is not None and not exact.decoder.layers
    for before, after in ((exact.decoder, rounded.decoder), (exact.texts[0], rounded.texts[0])):
        old, new = (dict(part.module.get_submodule("module").named_modules()) for part in (before, after))
        assert len(after.layers) > 5
        for name, layer in after.layers.items():
            weight, codes = old[name].weight.numpy(), layer.weight
            scale = layer.weight_scale.reshape(-1, *[1] * (weight.ndim - 1))
            assert codes.dtype == np.int8 and np.abs(codes).reshape(len(codes), -1).max(1).min() == 127
            assert (np.abs(codes * scale - weight) <= 0.501 * scale).all()
            assert (new[name].weight.numpy() == codes.astype(np.float32) * scale).all()
    assert (rounded.encode(["a cat"])[TEXT] != exact.encode(["a cat"])[TEXT]).any()


def unlink(*names: str) -> Callable[[Path], None]:
    return lambda folder: [(folder / name).unlink() for name in names] and None


def config(file: str, **changes: Any) -> Callable[[Path], None]:
    def change(folder: Path) -> None:
        data = json.loads((folder / file).read_text())
        (folder / file).write_text(json.dumps(data | changes))

    return change


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda folder: shutil.rmtree(folder / "tokenizer"), "holds no tokenizer: expected vocab.json"),
        (unlink("tokenizer/merges.txt"), "holds no tokenizer: expected vocab.json"),
        (lambda f: (f / "tokenizer" / "vocab.json").write_text("{"), "holds no tokenizer"),
        (config("tokenizer/tokenizer_config.json", tokenizer_class="T5Tokenizer"), "holds a 'T5Tokenizer'"),
        (config("tokenizer/tokenizer_config.json", pad_token="<pad>"), "pad_token is '<pad>'"),
        (lambda f: (f / "tokenizer" / "added_tokens.json").write_text('{"<x>": 9}'), "adds tokens"),
        (config("text_encoder/config.json", architectures=["T5EncoderModel"]), "is a 'T5EncoderModel'"),
        (config("text_encoder/config.json", hidden_size=16), "mismatched|cannot be read"),
        (config("text_encoder/config.json", num_hidden_layers=2), "missing keys"),
        (unlink("text_encoder/model.safetensors"), "cannot be read as a CLIPTextModel"),
        (unlink("text_encoder/config.json"), "cannot be read"),
        (
            config("vae/config.json", _class_name="AutoencoderDC"),
            "_class_name 'AutoencoderDC': expected one",
        ),
        (config("vae/config.json", scaling_factor="much"), "scaling_factor is 'much'"),
        (config("vae/config.json", latents_mean=[1.0]), "latents_mean, which is not supported"),
        (config("vae/config.json", latent_channels=3), "config expects|different models"),
        (unlink("vae/diffusion_pytorch_model.safetensors"), "has no weights"),
    ],
)
def test_one_line(folder: Path, damage: Callable[[Path], object], message: str) -> None:
    damage(folder)
    with pytest.raises(ModelError, match=message) as caught:
        parts_of(recipe_of(folder))
    assert "\n" not in str(caught.value)


def test_a_tokenizer_json_alone(folder: Path) -> None:
    """As transformers 5 saves tokenizers."""
    import transformers

    before = parts_of(recipe_of(folder)).texts[0].tokenizer
    transformers.CLIPTokenizer.from_pretrained(folder / "tokenizer").save_pretrained(folder / "new")
    shutil.rmtree(folder / "tokenizer")
    (folder / "new").rename(folder / "tokenizer")
    assert (folder / "tokenizer" / "tokenizer.json").exists()
    after = parts_of(recipe_of(folder)).texts[0].tokenizer
    assert after == before


def test_prompts_of_calibration(whole: Path, tmp_path: Path) -> None:
    (tmp_path / "p.txt").write_text("a\nb\n")

    def of(**calibration: Any) -> object:
        return prompts_of(Recipe.from_dict({"calibration": calibration}, tmp_path))

    assert of() == CAPTIONS and len(set(CAPTIONS)) == len(CAPTIONS)
    assert of(prompts=["x", "y"]) == ("x", "y") and of(prompts_file="p.txt") == ("a", "b")
    with pytest.raises(RecipeError, match="both given"):
        of(prompts=["x"], prompts_file="p.txt")


def test_trajectories_of_prompts(whole: Path, tmp_path: Path) -> None:
    """In turn; other prompts are other trajectories, also in a folder of kept ones."""
    recipe = recipe_of(whole, calibration={"size": 2, "held_out": 2, "batch_size": 2})
    network = open_model(recipe)
    sampling = Sampling.of(network.info, network.scheduler_config, n_steps=1)
    rng = np.random.default_rng(0)
    table = {TEXT: rng.standard_normal((3, 8, 8)).astype(np.float32)}
    got = [b.conditions[TEXT] for b in collect(network, sampling, recipe, tmp_path, table)]
    assert (np.concatenate(got) == table[TEXT][[0, 1, 2, 0]]).all()
    other = {TEXT: table[TEXT][::-1].copy()}
    again = [b.conditions[TEXT] for b in collect(network, sampling, recipe, tmp_path, other)]
    assert (np.concatenate(again) == table[TEXT][[2, 1, 0, 2]]).all()


def test_a_decoder_that_does_not_run() -> None:
    with pytest.raises(ModelError, match="does not run on latents"):
        decoder_part(tiny_vae().eval(), "AutoencoderKL", (5, 4, 4), "x")
