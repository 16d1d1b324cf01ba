"""A diffusers folder: what loads, what is refused and with which line."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import UNet2DConditionModel
from models import (
    WEIGHTS,
    assert_one_line,
    edit_config,
    edit_weights,
    outputs_of,
    recipe_of,
    save_pipeline,
    tiny_unet,
)

from ptqd_export.calibrate import open_model
from ptqd_export.errors import ModelError, RecipeError
from ptqd_export.recipe import Recipe


def test_pipeline_folder(pipeline: Path) -> None:
    network = open_model(recipe_of(pipeline))
    info = network.info
    assert (info.name, info.sample_shape, len(info.labels)) == ("tiny", (1, 8, 8), 3)
    (labels,) = info.inputs
    assert (labels.name, labels.dtype, labels.shape, labels.num_classes, labels.null_class) == (
        "class_labels",
        "int64",
        (),
        4,
        3,
    )
    assert network.scheduler_config["_class_name"] == "DDIMScheduler"
    assert not network.module.training and not any(p.requires_grad for p in network.module.parameters())
    unet = tiny_unet().eval()
    torch.manual_seed(0)
    with torch.no_grad():
        expected = unet(torch.randn(2, 1, 8, 8), torch.full((2,), 500), class_labels=torch.arange(2)).sample
    assert torch.equal(outputs_of(network), expected)
    assert "down_blocks.0.resnets.0.conv1" in dict(network.module.named_modules())


def test_bare_unet_folder_and_scheduler_places(pipeline: Path, tmp_path: Path) -> None:
    bare = Path(shutil.copytree(pipeline / "unet", tmp_path / "bare"))
    with pytest.raises(ModelError, match="no scheduler config"):
        open_model(recipe_of(bare))
    expected = open_model(recipe_of(pipeline)).info.sha256
    shutil.copy(pipeline / "scheduler" / "scheduler_config.json", bare)
    assert open_model(recipe_of(bare)).info.sha256 == expected
    (bare / "scheduler_config.json").unlink()
    named = recipe_of(bare, model={"scheduler": str(pipeline / "scheduler")})
    assert open_model(named).scheduler_config["num_train_timesteps"] == 1000


def test_hash_tells_weights_apart_and_ignores_private_config(pipeline: Path, copy: Path) -> None:
    expected = open_model(recipe_of(pipeline)).info.sha256
    edit_config(copy, _diffusers_version="0.0.1")
    assert open_model(recipe_of(copy)).info.sha256 == expected
    edit_weights(copy, lambda s: s["conv_in.bias"].add_(1e-3))
    assert open_model(recipe_of(copy)).info.sha256 != expected


def test_fp16_weights_are_computed_in_float32(copy: Path) -> None:
    edit_weights(copy, lambda s: s.update({k: v.half() for k, v in s.items()}))
    network = open_model(recipe_of(copy))
    assert {p.dtype for p in network.module.parameters()} == {torch.float32}
    assert outputs_of(network).dtype == torch.float32


def test_old_attention_names(pipeline: Path, copy: Path) -> None:
    names = {".to_q.": ".query.", ".to_k.": ".key.", ".to_v.": ".value.", ".to_out.0.": ".proj_attn."}

    def rename(state: dict[str, torch.Tensor]) -> None:
        for key in list(state):
            for new, old in names.items():
                if new in key:
                    state[key.replace(new, old)] = state.pop(key)

    edit_weights(copy, rename)
    assert torch.equal(outputs_of(open_model(recipe_of(copy))), outputs_of(open_model(recipe_of(pipeline))))


def test_condition_unet(tmp_path: Path) -> None:
    torch.manual_seed(3)
    unet = UNet2DConditionModel(
        sample_size=8,
        in_channels=3,
        out_channels=3,
        block_out_channels=(16, 32),
        layers_per_block=1,
        down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"),
        cross_attention_dim=12,
        attention_head_dim=4,
        norm_num_groups=8,
    )
    folder = save_pipeline(tmp_path / "text", unet)
    text = {"name": "encoder_hidden_states", "dtype": "float32", "shape": [5, 12]}
    model: dict[str, Any] = {"source": ".", "inputs": [text]}
    network = open_model(Recipe.from_dict({"model": model}, folder))
    assert network.info.inputs[0].shape == (5, 12) and outputs_of(network).shape == (2, 3, 8, 8)
    with pytest.raises(ModelError, match=r"encoder_hidden_states is not declared.*\[tokens, 12\]"):
        open_model(Recipe.from_dict({"model": {"source": "."}}, folder))
    with pytest.raises(ModelError, match=r"is declared as float32 \[5, 13\].*\[tokens, 12\]"):
        open_model(
            Recipe.from_dict({"model": {"source": ".", "inputs": [text | {"shape": [5, 13]}]}}, folder)
        )


def broken_json(folder: Path) -> None:
    (folder / "unet" / "config.json").write_text("{")


def list_json(folder: Path) -> None:
    (folder / "unet" / "config.json").write_text("[1]")


def truncated(folder: Path) -> None:
    file = folder / "unet" / WEIGHTS
    file.write_bytes(file.read_bytes()[:-100])


def pickled(folder: Path) -> None:
    file = folder / "unet" / WEIGHTS
    file.rename(file.with_name("diffusion_pytorch_model.bin"))


def nan_weight(folder: Path) -> None:
    edit_weights(folder, lambda s: s["conv_in.weight"].view(-1)[3:4].fill_(float("nan")))


def zero_variance(folder: Path) -> None:
    """Finite weights whose products overflow."""
    edit_weights(folder, lambda s: (s["conv_out.weight"].fill_(3e38), None)[1])


def wider(folder: Path) -> None:
    edit_weights(folder, lambda s: s.update({"conv_in.weight": torch.zeros(16, 2, 3, 3)}))


def scheduler_text(folder: Path) -> None:
    (folder / "scheduler" / "scheduler_config.json").write_text('{"num_train_timesteps": "many"}')


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda f: shutil.rmtree(f), "does not exist"),
        (lambda f: shutil.rmtree(f / "unet"), "holds neither unet/config.json nor config.json"),
        (lambda f: shutil.rmtree(f / "scheduler"), "no scheduler config"),
        (lambda f: (f / "unet" / WEIGHTS).unlink(), "has no weights"),
        (broken_json, "is not valid JSON"),
        (list_json, "JSON list: expected an object"),
        (scheduler_text, "not a usable scheduler config"),
        (truncated, "damaged or not safetensors"),
        (pickled, "a pickle, which is never loaded"),
        (
            lambda f: edit_config(f, _class_name="Transformer2DModel"),
            "'Transformer2DModel': expected one of UNet2DModel",
        ),
        (lambda f: edit_config(f, block_out_channels=[16]), "does not describe a UNet2DModel: ValueError"),
        (lambda f: edit_config(f, norm_num_groups="x"), "does not describe a UNet2DModel"),
        (lambda f: edit_config(f, sample_size=None), "has no sample_size"),
        (lambda f: edit_config(f, sample_size="big"), "the sample shape is"),
        (lambda f: edit_config(f, class_embed_type="odd"), "class_embed_type 'odd' of size None"),
        (lambda f: edit_config(f, num_class_embeds=None), "has no num_class_embeds: leave null_class out"),
        (lambda f: edit_config(f, num_class_embeds="four"), "num_class_embeds 'four': expected an integer"),
        (
            lambda f: edit_weights(f, lambda s: (s.pop("conv_in.bias"), None)[1]),
            "lack 1 tensor, such as 'conv_in.bias'",
        ),
        (
            lambda f: edit_weights(f, lambda s: s.update(extra=torch.zeros(1))),
            "have beyond the config 1 tensor, such as 'extra'",
        ),
        *(
            (lambda f, key=key, value=value: edit_config(f, **{key: value}), f"says '{key}' {says}")
            for key, value, says in (
                ("layers_per_block", 101, "is 101: expected at most 100"),
                ("num_class_embeds", 10**12, "is 1000000000000: expected at most 1000000"),
                ("block_out_channels", [32] * 65, "of 65 items: expected at most 64"),
                ("in_channels", -2, "is -2: expected at most 1000000"),
            )
        ),
        (wider, r"'conv_in.weight'.*\(16, 2, 3, 3\).*\(16, 1, 3, 3\)"),
        (nan_weight, "'conv_in.weight'.*NaN"),
        (zero_variance, "returns NaN or infinite values"),
    ],
)
def test_folder_errors(copy: Path, damage: Callable[[Path], None], message: str) -> None:
    damage(copy)
    assert_one_line(recipe_of(copy), message)


@pytest.mark.parametrize(
    ("takes", "returns", "scheduler", "given", "channels"),
    [
        (1, 2, {}, (), 1),  # twice as many
        (2, 2, {}, (), 2),
        (2, 2, {"variance_type": "learned_range"}, (), 1),  # DeepFloyd IF's upscaler: a picture beside
        (2, 2, {}, (1, 8, 8), 1),
        (5, 4, {"variance_type": "learned"}, (), 2),  # Kandinsky's inpainting
        (5, 4, {}, (), 4),
    ],
)
def test_a_learned_variance_is_left_out(
    tmp_path: Path, takes: int, returns: int, scheduler: dict[str, Any], given: tuple[int, ...], channels: int
) -> None:
    unet = tiny_unet(in_channels=takes, out_channels=returns, num_class_embeds=None)
    folder = save_pipeline(tmp_path / "m", unet)
    file = folder / "scheduler" / "scheduler_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | scheduler))
    network = open_model(recipe_of(folder, model={"null_class": None, "sample_shape": list(given)}))
    assert network.info.sample_shape == (channels, 8, 8)
    x, rest, t = torch.randn(2, channels, 8, 8), torch.randn(2, takes - channels, 8, 8), torch.tensor([3, 9])
    more = {"extra_channels": rest} if takes > channels else {}
    assert [spec.name for spec in network.info.inputs] == [*more]
    with torch.no_grad():
        expected = unet(torch.cat([x, rest], 1), t).sample[:, :channels]
        assert torch.equal(network.module(x, t, **more), expected)


def test_null_class_errors(tmp_path: Path, pipeline: Path) -> None:
    assert_one_line(
        recipe_of(pipeline, model={"null_class": 4}),
        r"input 'class_labels': null_class is 4: give one of at least two ids below num_classes \(4\)",
        RecipeError,
    )
    assert_one_line(
        recipe_of(pipeline, model={"inputs": [{"name": "text", "dtype": "float32", "shape": [2]}]}),
        "declares 'text'",
    )
    unconditional = save_pipeline(tmp_path / "plain", tiny_unet(num_class_embeds=None))
    assert_one_line(recipe_of(unconditional), "has no num_class_embeds: leave null_class out")


def test_loading_is_quiet(copy: Path, capfd: pytest.CaptureFixture[str]) -> None:
    edit_config(copy, unknown_setting=1)
    open_model(recipe_of(copy))
    captured = capfd.readouterr()
    assert captured.out == "" and captured.err == ""
