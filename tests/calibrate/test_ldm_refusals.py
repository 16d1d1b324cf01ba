"""Checkpoints and configurations of latent diffusion models that do not fit: each is refused by name."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from ldm_models import edit, ldm_recipe, original, shallow, write
from models import assert_one_line
from safetensors.torch import save_file
from torch import Tensor

from ptqd_export.calibrate import open_model
from ptqd_export.errors import RecipeError
from ptqd_export.recipe import Recipe

CHURCHES = shallow("lsun_churches256")


@pytest.fixture(scope="module")
def state() -> dict[str, Tensor]:
    return original(CHURCHES).state


@pytest.fixture(scope="module")
def saved(state: dict[str, Tensor], tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("ldm") / "churches"
    write(folder, CHURCHES, state)
    (folder / "model.ckpt").rename(folder / "blob")
    return folder


@pytest.fixture
def churches(tmp_path: Path, saved: Path) -> Path:
    """A folder whose configuration may be changed; its checkpoint is a link, as in a hub's cache."""
    (tmp_path / "config.yaml").write_bytes((saved / "config.yaml").read_bytes())
    (tmp_path / "model.ckpt").symlink_to(saved / "blob")
    return tmp_path


NAME = "model_ema.diffusion_modelout2bias"


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda s: s.pop(NAME), f"lacks 1 tensors of the UNet of .*, such as '{NAME}'"),
        (
            lambda s: s.update({"model_ema.diffusion_modelmore": torch.zeros(1)}),
            "holds 1 tensors that are of no part of the UNet.*such as 'model_ema.diffusion_modelmore'",
        ),
        (lambda s: s.update({NAME: torch.zeros(5)}), rf"'{NAME}' .* has shape \(5,\): .* expects \(4,\)"),
        (
            lambda s: s.update({NAME: torch.zeros(1).expand(10**6, 10**6)}),
            r"has shape \(1000000, 1000000\): .* expects \(4,\)",
        ),
        (lambda s: s.update({NAME: torch.full((4,), float("nan"))}), "'conv_out.bias' .* holds NaN"),
        (lambda s: s.pop("scale_factor"), "says scale_by_std, but .* holds no positive scale_factor"),
        (
            lambda s: s.update(alphas_cumprod=s["alphas_cumprod"] * 0.99),
            "was trained with alphas_cumprod 0.98.* gives 0.9985 to 0.00066867 in 1000",
        ),
        (lambda s: s.update(alphas_cumprod=s["alphas_cumprod"][:500]), "in 500 steps, but"),
        (
            lambda s: [s.pop(key) for key in list(s) if key.startswith("model_ema")],
            "says use_ema .* holds no model_ema",
        ),
    ],
)
def test_wrong_checkpoints(
    state: dict[str, Tensor], tmp_path: Path, damage: Callable[[dict[str, Tensor]], Any], message: str
) -> None:
    held = dict(state)
    damage(held)
    write(tmp_path, CHURCHES, held)
    assert_one_line(ldm_recipe(tmp_path), message)


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ("num_heads: 8", "num_heads: 7", "num_heads 7 and num_head_channels -1 for channels"),
        ("num_heads: 8", "num_hats: 8", "unknown key 'num_hats'"),
        ("model_channels: 32", "model_channels: 64", "has shape .* expects"),
        ("model_channels: 32", "model_channels: wide", "model_channels: expected int, got 'wide'"),
        ("num_res_blocks: 1", "num_res_blocks: 1000000000", "layers_per_block' is 1000000000: expected"),
        ("channel_mult:\n", "ch_mults:\n", "unknown key 'ch_mults'"),
        ("linear_end: 0.0155", "linear_end: 0.0195", "the configuration is another model's"),
        ("ddpm.LatentDiffusion", "ddpm.LatentUpscaleDiffusion", "model 'LatentUpscaleDiffusion', which"),
        ("openaimodel.UNetModel", "dit.DiT", "unet_config 'DiT', which is not supported"),
        ("embed_dim: 4", "embed_dim: 3", "says embed_dim 3: expected the UNet's 4"),
        ("double_z: true", "double_z: false", "double_z False: expected true for KL"),
        ("timesteps: 1000", "timesteps: &a 1000\n    x: *a", "holds YAML aliases"),
        ("timesteps: 1000", "timesteps: !!python/object/apply:os.getcwd []", "is not plain YAML"),
        ("timesteps: 1000", "timesteps: [", "is not plain YAML"),
        ("model:", "network:", "has no model with a target"),
    ],
)
def test_wrong_configurations(churches: Path, old: str, new: str, message: str) -> None:
    edit(churches, old, new)
    assert_one_line(ldm_recipe(churches), message)


def single(tmp_path: Path, shapes: dict[str, tuple[int, ...]]) -> Recipe:
    save_file({key: torch.zeros(shape) for key, shape in shapes.items()}, tmp_path / "m.safetensors")
    return Recipe.from_dict({"model": {"checkpoint": "m.safetensors"}}, tmp_path)


FIRST = "model.diffusion_model.input_blocks.0.0.weight"
CROSS = "model.diffusion_model.input_blocks.1.1.transformer_blocks.0.attn2.to_k.weight"


@pytest.mark.parametrize(
    ("shapes", "message"),
    [
        # recognised, and so asked for the rest
        ({FIRST: (320, 9, 3, 3), CROSS: (320, 768)}, "lacks 684 tensors of the UNet of v1-inference.yaml"),
        ({FIRST: (320, 4, 3, 3), CROSS: (320, 1024)}, "looks like Stable Diffusion 2.*give --ldm-config v2"),
        ({FIRST: (320, 4, 3, 3), "conditioner.x": (1,)}, "Stable Diffusion XL in one file: give its"),
        ({FIRST: (192, 3, 3, 3)}, "is not Stable Diffusion 1 .*: give its configuration, --ldm-config"),
        ({"model.diffusion_model.double_blocks.0.x": (1,)}, r"holds a transformer \(Flux, SD 3\)"),
        ({"x": (1,)}, "it is no checkpoint in CompVis' layout"),
    ],
)
def test_files_without_a_configuration(
    tmp_path: Path, shapes: dict[str, tuple[int, ...]], message: str
) -> None:
    assert_one_line(single(tmp_path, shapes), message)


def test_a_link_in_a_cache(churches: Path) -> None:
    info = open_model(ldm_recipe(churches)).info
    assert (info.name, info.sample_shape) == (churches.name, (4, 16, 16))


def test_recipes_that_do_not_go_together(tmp_path: Path) -> None:
    with pytest.raises(RecipeError, match=r"model.ldm_config is 'a.yaml', but model.checkpoint is not set"):
        Recipe.from_dict({"model": {"ldm_config": "a.yaml"}}, tmp_path)
    assert_one_line(ldm_recipe(tmp_path), "the configuration .* cannot be read")
