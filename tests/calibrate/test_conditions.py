"""Conditions of diffusers UNets: what is declared by itself, and that it reaches the network."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import UNet2DConditionModel
from models import assert_one_line, edit_config, recipe_of, save_pipeline, tiny_unet

from ptqd_export.calibrate import open_model
from ptqd_export.core.model import InputSpec, ModelInfo
from ptqd_export.core.sampling import Sampling
from ptqd_export.core.schedule import NoiseSchedule
from ptqd_export.errors import RecipeError


def text_unet(**changes: Any) -> UNet2DConditionModel:
    """A seeded 8x8 UNet with cross-attention of width 12."""
    settings: dict[str, Any] = {
        "sample_size": 8,
        "in_channels": 4,
        "out_channels": 4,
        "block_out_channels": (16, 32),
        "layers_per_block": 1,
        "down_block_types": ("CrossAttnDownBlock2D", "DownBlock2D"),
        "up_block_types": ("UpBlock2D", "CrossAttnUpBlock2D"),
        "cross_attention_dim": 12,
        "attention_head_dim": 4,
        "norm_num_groups": 8,
    }
    torch.manual_seed(5)
    return UNet2DConditionModel(**(settings | changes)).eval()


def text_pipeline(folder: Path, unet: torch.nn.Module, tokens: int | None = 5, **encoder: Any) -> Path:
    save_pipeline(folder, unet)
    if tokens is not None:
        (folder / "text_encoder").mkdir()
        config = {"max_position_embeddings": tokens} | encoder
        (folder / "text_encoder" / "config.json").write_text(json.dumps(config))
    return folder


def plain(folder: Path, **model: Any) -> Any:
    return recipe_of(folder, model={"null_class": None} | model)


def both(folder: Path, unet: torch.nn.Module, given: dict[str, torch.Tensor], **kwargs: Any) -> None:
    """Opened from its folder, a UNet computes of `given` what diffusers' own computes of `kwargs`."""
    network = open_model(plain(folder))
    assert {s.name for s in network.info.inputs} == given.keys()
    torch.manual_seed(0)
    x, t = torch.randn(2, *network.info.sample_shape), torch.tensor([3, 700])
    with torch.no_grad():
        found = network.module(x, t, **given)
        sample = torch.cat([x, given["extra_channels"]], 1) if "extra_channels" in given else x
        expected = unet(sample, t, **kwargs).sample
    assert torch.equal(found, expected)


def test_text_is_declared_by_the_text_encoder(tmp_path: Path) -> None:
    unet, text = text_unet(), torch.randn(2, 5, 12)
    folder = text_pipeline(tmp_path / "m", unet)
    both(folder, unet, {"encoder_hidden_states": text}, encoder_hidden_states=text)
    (folder / "text_encoder" / "config.json").write_text('{"max_position_embeddings": 1e30}')
    assert_one_line(plain(folder), r"encoder_hidden_states is not declared.*\[tokens, 12\]")
    (folder / "tokenizer").mkdir()
    (folder / "tokenizer" / "tokenizer_config.json").write_text('{"model_max_length": 7}')
    assert open_model(plain(folder)).info.inputs[0].shape == (7, 12)


def test_sdxl(tmp_path: Path) -> None:
    unet = text_unet(
        addition_embed_type="text_time", addition_time_embed_dim=4, projection_class_embeddings_input_dim=40
    )
    folder = text_pipeline(tmp_path / "xl", unet, projection_dim=16)
    network = open_model(plain(folder))
    text, pooled, sizes = network.info.inputs
    assert (pooled.name, pooled.shape, pooled.kept) == ("text_embeds", (16,), False)
    assert (sizes.name, sizes.default, sizes.kept) == ("time_ids", (64.0, 64.0, 0.0, 0.0, 64.0, 64.0), True)
    given = {
        "encoder_hidden_states": torch.randn(2, *text.shape),
        "text_embeds": torch.randn(2, 16),
        "time_ids": torch.tensor([[64.0, 64, 0, 0, 64, 64], [32, 64, 0, 8, 64, 64]]),
    }
    added = {name: given[name] for name in ("text_embeds", "time_ids")}
    both(folder, unet, given, encoder_hidden_states=given[text.name], added_cond_kwargs=added)
    other = [{"name": "time_ids", "dtype": "float32", "shape": [5]}]
    assert_one_line(plain(folder, inputs=other), r"declares time_ids as float32 \[5\]: by .* float32 \[6\]")
    edit_config(folder, projection_class_embeddings_input_dim=18)
    assert_one_line(plain(folder), "leaves no whole pooled text of 16")


def test_sdxl_of_full_size_is_declared_from_its_config_alone() -> None:
    from ptqd_export.calibrate.conditions import declare
    from ptqd_export.recipe import ModelSpec

    config = {
        "_class_name": "UNet2DConditionModel",
        "cross_attention_dim": 2048,
        "addition_embed_type": "text_time",
        "addition_time_embed_dim": 256,
        "projection_class_embeddings_input_dim": 2816,
        "in_channels": 4,
    }
    text = InputSpec("encoder_hidden_states", "float32", (77, 2048))
    inputs = declare(ModelSpec(inputs=(text,)), config, (4, 128, 128), "config.json")
    assert [s.shape for s in inputs] == [(77, 2048), (1280,), (6,)]
    assert inputs[2].default == (1024.0, 1024.0, 0.0, 0.0, 1024.0, 1024.0)
    refiner = config | {"projection_class_embeddings_input_dim": 2560}
    shapes = [s.shape for s in declare(ModelSpec(inputs=(text,)), refiner, (4, 128, 128), "config.json")]
    assert shapes == [(77, 2048), (1280,), (5,)]


def test_inpainting(tmp_path: Path) -> None:
    unet = text_unet(in_channels=9)
    folder = text_pipeline(tmp_path / "inpainting", unet)
    info = open_model(plain(folder)).info
    assert info.sample_shape == (4, 8, 8) and info.inputs[1].shape == (5, 8, 8) and info.inputs[1].kept
    text, extra = torch.randn(2, 5, 12), torch.randn(2, 5, 8, 8)
    both(
        folder,
        unet,
        {"encoder_hidden_states": text, "extra_channels": extra},
        encoder_hidden_states=text,
    )


@pytest.mark.parametrize(
    ("kind", "shape", "settings"),
    [
        ("timestep", (), {}),
        ("identity", (64,), {}),
        ("projection", (10,), {"projection_class_embeddings_input_dim": 10}),
        ("simple_projection", (10,), {"projection_class_embeddings_input_dim": 10}),
    ],
)
def test_class_embed_types(
    tmp_path: Path, kind: str, shape: tuple[int, ...], settings: dict[str, Any]
) -> None:
    unet = text_unet(class_embed_type=kind, **settings)
    text, labels = torch.randn(2, 5, 12), torch.rand(2, *shape) * 10
    given = {"encoder_hidden_states": text, "class_labels": labels}
    both(text_pipeline(tmp_path / kind, unet), unet, given, **given)


def test_upscaling(tmp_path: Path) -> None:
    """The level of noise of the picture beside the sample is the same in both branches of guidance."""
    unet = text_unet(in_channels=7, num_class_embeds=20)
    network = open_model(plain(text_pipeline(tmp_path / "x4", unet)))
    schedule = NoiseSchedule.from_config(network.scheduler_config, 2, 0.0)
    rows = Sampling(network.info, schedule, 7.5).condition_rows(network.info.conditions([19], 1), 1)
    assert rows["class_labels"].tolist() == [19, 19]
    plain_unet = text_unet(num_class_embeds=20)
    with pytest.raises(RecipeError, match="has no null class"):
        Sampling(open_model(plain(text_pipeline(tmp_path / "m", plain_unet))).info, schedule, 7.5)


KANDINSKY: list[tuple[dict[str, Any], dict[str, tuple[int, ...]]]] = [
    (
        {"encoder_hid_dim": 6, "encoder_hid_dim_type": "image_proj", "addition_embed_type": "image"},
        {"image_embeds": (6,)},
    ),
    (
        {
            "encoder_hid_dim": 6,
            "encoder_hid_dim_type": "image_proj",
            "addition_embed_type": "image_hint",
            "in_channels": 8,
        },
        {"image_embeds": (6,), "hint": (3, 64, 64)},
    ),
    (
        {
            "encoder_hid_dim": 6,
            "encoder_hid_dim_type": "text_image_proj",
            "addition_embed_type": "text_image",
        },
        {"encoder_hidden_states": (5, 6), "text_embeds": (12,), "image_embeds": (12,)},
    ),
]


@pytest.mark.parametrize(("settings", "shapes"), KANDINSKY, ids=["2.2", "2.2 hint", "2.1"])
def test_pictures_as_conditions(
    tmp_path: Path, settings: dict[str, Any], shapes: dict[str, tuple[int, ...]]
) -> None:
    unet = text_unet(**settings)
    torch.manual_seed(7)
    given = {name: torch.randn(2, *shape) for name, shape in shapes.items()}
    added = {name: value for name, value in given.items() if name != "encoder_hidden_states"}
    text = given.get("encoder_hidden_states")
    folder = text_pipeline(tmp_path / "m", unet)
    both(folder, unet, given, encoder_hidden_states=text, added_cond_kwargs=added)
    assert {s.name: s.shape for s in open_model(plain(folder)).info.inputs} == shapes


def test_text_beside_the_timestep(tmp_path: Path) -> None:
    """DeepFloyd IF, whose older configs leave out encoder_hid_dim_type."""
    unet = text_unet(encoder_hid_dim=6, addition_embed_type="text", addition_embed_type_num_heads=2)
    folder = text_pipeline(tmp_path / "if", unet)
    edit_config(folder, encoder_hid_dim_type=None)
    text = torch.randn(2, 5, 6)
    both(folder, unet, {"encoder_hidden_states": text}, encoder_hidden_states=text)


def test_guidance_of_distilled_models(tmp_path: Path) -> None:
    """LCM: its default is diffusers' embedding of the guidance, 1000 (8.5 - 1)."""
    from diffusers.models.embeddings import get_timestep_embedding

    unet = text_unet(time_cond_proj_dim=8)
    folder = text_pipeline(tmp_path / "lcm", unet)
    text = torch.randn(2, 5, 12)
    embedding = get_timestep_embedding(torch.full((2,), 7500.0), 8, downscale_freq_shift=1)
    info = open_model(plain(folder)).info
    np.testing.assert_allclose(info.inputs[1].default, embedding[0], atol=2e-4)  # of angles up to 7500
    given = {"encoder_hidden_states": text, "timestep_cond": embedding}
    both(folder, unet, given, **given)


def test_what_is_kept_is_the_same_in_both_branches(schedule: NoiseSchedule) -> None:
    size = InputSpec("size", "float32", (2,), default=(3.0, 4.0), kept=True)
    text = InputSpec("text", "float32", (1,), default=(5.0,))
    sampling = Sampling(ModelInfo("m", (1, 2, 2), (size, text), "0" * 64), schedule, 2.0)
    rows = sampling.condition_rows(sampling.model.conditions(None, 1), 1)
    assert rows["size"].tolist() == [[3, 4], [3, 4]] and rows["text"].tolist() == [[0], [5]]
    given = {"size": np.array([[7.0, 8.0]])}
    rows = sampling.condition_rows(sampling.model.conditions(None, 1, given), 1)
    assert rows["size"].tolist() == [[7, 8], [7, 8]]
    with pytest.raises(RecipeError, match="takes no condition"):
        Sampling(ModelInfo("m", (1, 2, 2), (size,), "0" * 64), schedule, 2.0)


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        (
            {"dtype": "float32", "shape": (2,), "default": (1.0,)},
            "default of 1 numbers: expected 2",
        ),
        (
            {"dtype": "float32", "default": (float("nan"),)},
            "default of 1 numbers: expected 1, finite",
        ),
        ({"num_classes": 3, "default": (1.0,)}, "class label and has a default"),
    ],
)
def test_defaults_that_do_not_fit(wrong: dict[str, Any], message: str) -> None:
    with pytest.raises(RecipeError, match=message):
        InputSpec("a", **wrong)


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"addition_embed_type": "sound"}, r"addition_embed_type 'sound', which is not supported \(text, "),
        ({"addition_embed_type": "text_time"}, "it is no config of SDXL"),
        ({"encoder_hid_dim_type": "ip_image_proj", "encoder_hid_dim": 3}, "hid_dim_type 'ip_image_proj', w"),
        ({"cross_attention_dim": [12, 16]}, r"cross_attention_dim \[12, 16\]: expected one integer"),
    ],
)
def test_conditions_that_are_refused(tmp_path: Path, config: dict[str, Any], message: str) -> None:
    folder = text_pipeline(tmp_path / "m", text_unet())
    edit_config(folder, **config)
    assert_one_line(plain(folder), message)


@pytest.mark.parametrize(
    ("files", "message"),
    [
        (
            {"transformer": "FluxTransformer2DModel"},
            r"a pipeline 'FluxPipeline' with transformer/ \('FluxTransformer2DModel'\): supported are",
        ),
        ({}, "a pipeline 'FluxPipeline' with no unet/"),
        ({"unet": "UNetSpatioTemporalConditionModel"}, "'UNetSpatioTemporalConditionModel': expected one of"),
        (
            {"unet": "UNet2DModel", "controlnet": "ControlNetModel"},
            "holds controlnet/, which steers the UNet",
        ),
    ],
)
def test_pipelines_that_are_refused(tmp_path: Path, files: dict[str, str], message: str) -> None:
    (tmp_path / "model_index.json").write_text('{"_class_name": "FluxPipeline"}')
    for name, kind in files.items():
        (tmp_path / name).mkdir()
        (tmp_path / name / "config.json").write_text(json.dumps({"_class_name": kind}))
    assert_one_line(plain(tmp_path), message)


def test_a_pipeline_that_scales_around_its_unet_is_refused(tmp_path: Path) -> None:
    folder = text_pipeline(tmp_path / "m", text_unet())
    (folder / "model_index.json").write_text('{"_class_name": "StableDiffusionLatentUpscalePipeline"}')
    assert_one_line(plain(folder), "StableDiffusionLatentUpscalePipeline, which scales its UNet's inputs and")


def test_parts_of_a_latent_pipeline(tmp_path: Path) -> None:
    """The autoencoder is read when asked for, and decodes as diffusers' own does."""
    from diffusers import AutoencoderKL

    from ptqd_export.calibrate import open_source

    torch.manual_seed(2)
    blocks = {"down_block_types": ("DownEncoderBlock2D",) * 2, "up_block_types": ("UpDecoderBlock2D",) * 2}
    settings = {"block_out_channels": (8, 8), "norm_num_groups": 4, "latent_channels": 1}
    vae = AutoencoderKL(**blocks, **settings, scaling_factor=0.5).eval()
    folder = save_pipeline(tmp_path / "latent", tiny_unet(num_class_embeds=None))
    assert open_source(plain(folder)).read_first_stage is None
    vae.save_pretrained(folder / "vae")
    source = open_source(plain(folder))
    assert source.read_first_stage is not None and source.scaling_factor == 0.5
    first: Any = source.read_first_stage()
    x = torch.randn(1, 1, 8, 8)
    with torch.no_grad():
        assert torch.equal(first.decode(x).sample, vae.decode(x).sample)


def test_all_conditions_are_inputs_of_the_graph(tmp_path: Path) -> None:
    """With a batch of another size than that of the export."""
    import onnx_ir as ir

    from ptqd_export.backends import OrtEngine
    from ptqd_export.export import export_fp

    blocks = {"block_out_channels": (16,), "mid_block_type": None}
    blocks |= {"down_block_types": ("DownBlock2D",), "up_block_types": ("UpBlock2D",)}
    added = {"addition_embed_type": "text_time", "addition_time_embed_dim": 4}
    added |= {"projection_class_embeddings_input_dim": 40, "class_embed_type": "timestep"}
    unet = text_unet(**blocks, **added, in_channels=9, time_cond_proj_dim=8)
    network = open_model(plain(text_pipeline(tmp_path / "m", unet, projection_dim=16)))
    info = network.info
    assert len(info.inputs) == 6
    ir.save(export_fp(network.module, info), tmp_path / "m.onnx")
    torch.manual_seed(0)
    feeds = {"sample": torch.randn(3, 4, 8, 8), "timestep": torch.tensor([3, 40, 700])}
    feeds |= {spec.name: torch.rand(3, *spec.shape) for spec in info.inputs}
    with OrtEngine(tmp_path / "m.onnx") as engine:
        (found,) = engine({name: value.numpy() for name, value in feeds.items()}).values()
    with torch.no_grad():
        np.testing.assert_allclose(found, network.module(**feeds), atol=1e-4)
