"""Model intake: what loads, what is refused and with which line."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import DDIMScheduler, UNet2DConditionModel, UNet2DModel
from safetensors.torch import load_file, save_file

from ptqd_export.calibrate import Network, TorchEngine, open_model
from ptqd_export.engine import Engine
from ptqd_export.errors import ModelError
from ptqd_export.recipe import Recipe
from ptqd_export.schedule import NoiseSchedule

WEIGHTS = "diffusion_pytorch_model.safetensors"


def tiny_unet(**changes: Any) -> UNet2DModel:
    """A seeded 8x8 UNet with attention, 3 classes and a null class."""
    settings: dict[str, Any] = {
        "sample_size": 8,
        "in_channels": 1,
        "out_channels": 1,
        "block_out_channels": (16, 32),
        "layers_per_block": 1,
        "down_block_types": ("DownBlock2D", "AttnDownBlock2D"),
        "up_block_types": ("AttnUpBlock2D", "UpBlock2D"),
        "attention_head_dim": 8,
        "norm_num_groups": 8,
        "num_class_embeds": 4,
    }
    torch.manual_seed(7)
    return UNet2DModel(**(settings | changes))


def save_pipeline(folder: Path, unet: torch.nn.Module | None = None, **scheduler: Any) -> Path:
    """A pipeline folder: unet/ and scheduler/."""
    (unet or tiny_unet()).save_pretrained(folder / "unet", safe_serialization=True)
    DDIMScheduler(clip_sample=False, **scheduler).save_pretrained(folder / "scheduler")
    return folder


def recipe_of(folder: Path, **sections: Any) -> Recipe:
    model = {"source": ".", "null_class": 3} | sections.pop("model", {})
    calibration = {"size": 4, "held_out": 2, "batch_size": 3} | sections.pop("calibration", {})
    sampler = {"n_steps": 4, "eta": 1.0, "guidance_scale": 2.0} | sections.pop("sampler", {})
    return Recipe.from_dict({"model": model, "calibration": calibration, "sampler": sampler, **sections}, folder)


@pytest.fixture(scope="session")
def pipeline(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_pipeline(tmp_path_factory.mktemp("pipeline") / "tiny")


@pytest.fixture
def copy(pipeline: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(pipeline, tmp_path / "tiny"))


def edit_weights(folder: Path, change: Callable[[dict[str, torch.Tensor]], None]) -> None:
    state = load_file(folder / "unet" / WEIGHTS)
    change(state)
    save_file(state, folder / "unet" / WEIGHTS)


def edit_config(folder: Path, **changes: Any) -> None:
    file = folder / "unet" / "config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | changes))


def forward(network: Network, n: int = 2) -> torch.Tensor:
    torch.manual_seed(0)
    conditions = {name: torch.from_numpy(value) for name, value in network.info.conditions(None, n).items()}
    with torch.inference_mode():
        output: torch.Tensor = network.module(torch.randn(n, *network.info.sample_shape), torch.full((n,), 500), **conditions)
    return output


def test_pipeline_folder(pipeline: Path) -> None:
    network = open_model(recipe_of(pipeline))
    info = network.info
    assert (info.name, info.sample_shape, len(info.labels)) == ("tiny", (1, 8, 8), 3)
    (labels,) = info.inputs
    assert (labels.name, labels.dtype, labels.shape, labels.num_classes, labels.null_class) == ("class_labels", "int64", (), 4, 3)
    assert network.scheduler_config["_class_name"] == "DDIMScheduler"
    assert not network.module.training and not any(p.requires_grad for p in network.module.parameters())
    unet = tiny_unet().eval()
    torch.manual_seed(0)
    with torch.no_grad():
        expected = unet(torch.randn(2, 1, 8, 8), torch.full((2,), 500), class_labels=torch.arange(2)).sample
    assert torch.equal(forward(network), expected)
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
    assert forward(network).dtype == torch.float32


def test_old_attention_names(pipeline: Path, copy: Path) -> None:
    names = {".to_q.": ".query.", ".to_k.": ".key.", ".to_v.": ".value.", ".to_out.0.": ".proj_attn."}

    def rename(state: dict[str, torch.Tensor]) -> None:
        for key in list(state):
            for new, old in names.items():
                if new in key:
                    state[key.replace(new, old)] = state.pop(key)

    edit_weights(copy, rename)
    assert torch.equal(forward(open_model(recipe_of(copy))), forward(open_model(recipe_of(pipeline))))


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
    assert network.info.inputs[0].shape == (5, 12) and forward(network).shape == (2, 3, 8, 8)
    with pytest.raises(ModelError, match=r"encoder_hidden_states is not declared.*\[tokens, 12\]"):
        open_model(Recipe.from_dict({"model": {"source": "."}}, folder))
    with pytest.raises(ModelError, match=r"is declared as float32 \[5, 13\].*\[tokens, 12\]"):
        open_model(Recipe.from_dict({"model": {"source": ".", "inputs": [text | {"shape": [5, 13]}]}}, folder))


SOURCE = """
import torch
from torch import nn

class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(2, 2, 3, padding=1)
    def forward(self, sample, timestep, y):
        out = self.conv(sample) + y[:, None, None, None] + 0.001 * timestep[:, None, None, None]
        return {returned}

def make():
    return Net()

def text():
    return "no module"

def broken():
    raise ValueError("first line\\nsecond line")
"""


def write_function(folder: Path, returned: str) -> dict[str, Any]:
    (folder / "net.py").write_text(SOURCE.replace("{returned}", returned))
    DDIMScheduler().save_pretrained(folder / "scheduler")
    labels = {"name": "y", "num_classes": 5, "null_class": 4}
    return {"source": "net.py:make", "sample_shape": [2, 6, 4], "inputs": [labels], "scheduler": "scheduler", "null_class": None}


@pytest.mark.parametrize("returned", ["out", "(out, 1)", "type('Output', (), {'sample': out})()"])
def test_function_source(tmp_path: Path, returned: str) -> None:
    recipe = recipe_of(tmp_path, model=write_function(tmp_path, returned))
    first, second = open_model(recipe), open_model(recipe)
    assert first.info.name == "net" and first.info.sha256 == second.info.sha256  # seeded, though its weights are random
    assert "conv" in dict(first.module.named_modules())
    assert torch.equal(forward(first), forward(second)) and forward(first).shape == (2, 2, 6, 4)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"source": "net.py:absent"}, "has no function 'absent'"),
        ({"source": "gone.py:make"}, "does not exist"),
        ({"source": "net.py:text"}, "returned str: expected a torch.nn.Module"),
        ({"source": "net.py:broken"}, "ValueError: first line second line"),
        ({"sample_shape": []}, "model.sample_shape is"),
        ({"sample_shape": [3, 6, 4]}, "does not run on samples of shape"),
        ({"scheduler": ""}, "model.scheduler is not set"),
        ({"inputs": [{"name": "y"}]}, "num_classes >= 1"),
        ({"inputs": [{"name": "y", "num_classes": 3}], "null_class": 3}, "expected 0 to 2"),
        ({"inputs": [{"name": "z", "num_classes": 3}]}, "does not run.*unexpected keyword"),
    ],
)
def test_function_errors(tmp_path: Path, change: dict[str, Any], message: str) -> None:
    model = write_function(tmp_path, "out") | change
    assert_one_line(recipe_of(tmp_path, model=model), message)


def assert_one_line(recipe: Recipe, message: str) -> None:
    with pytest.raises(ModelError, match=message) as caught:
        open_model(recipe)
    assert "\n" not in str(caught.value)


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
        (lambda f: edit_config(f, _class_name="Transformer2DModel"), "'Transformer2DModel': expected one of UNet2DModel"),
        (lambda f: edit_config(f, block_out_channels=[16]), "does not describe a UNet2DModel: ValueError"),
        (lambda f: edit_config(f, norm_num_groups="x"), "does not describe a UNet2DModel"),
        (lambda f: edit_config(f, sample_size=None), "has no sample_size"),
        (lambda f: edit_config(f, sample_size="big"), "the sample shape is"),
        (lambda f: edit_config(f, class_embed_type="timestep"), "class_embed_type"),
        (lambda f: edit_config(f, num_class_embeds=None), "has no num_class_embeds: leave null_class out"),
        (lambda f: edit_config(f, num_class_embeds="four"), "num_class_embeds 'four': expected an integer"),
        (lambda f: edit_weights(f, lambda s: (s.pop("conv_in.bias"), None)[1]), "lack 1 tensors, such as 'conv_in.bias'"),
        (lambda f: edit_weights(f, lambda s: s.update(extra=torch.zeros(1))), "hold unexpected 1 tensors, such as 'extra'"),
        (wider, r"'conv_in.weight'.*\(16, 2, 3, 3\).*\(16, 1, 3, 3\)"),
        (nan_weight, "'conv_in.weight'.*NaN"),
        (zero_variance, "returns NaN or infinite values"),
    ],
)
def test_folder_errors(copy: Path, damage: Callable[[Path], None], message: str) -> None:
    damage(copy)
    assert_one_line(recipe_of(copy), message)


def test_learned_variance_and_null_class_errors(tmp_path: Path, pipeline: Path) -> None:
    folder = save_pipeline(tmp_path / "learned", tiny_unet(out_channels=2))
    assert_one_line(recipe_of(folder), "2 channels for 1: a learned variance is not supported")
    assert_one_line(recipe_of(pipeline, model={"null_class": 4}), "null class of 'class_labels' is 4: expected 0 to 3")
    assert_one_line(recipe_of(pipeline, model={"inputs": [{"name": "text", "dtype": "float32", "shape": [2]}]}), "declares 'text'")
    unconditional = save_pipeline(tmp_path / "plain", tiny_unet(num_class_embeds=None))
    assert_one_line(recipe_of(unconditional), "has no num_class_embeds: leave null_class out")


def test_loading_is_quiet(copy: Path, capfd: pytest.CaptureFixture[str]) -> None:
    edit_config(copy, unknown_setting=1)
    open_model(recipe_of(copy))
    captured = capfd.readouterr()
    assert captured.out == "" and captured.err == ""


@pytest.mark.parametrize("prediction_type", ["epsilon", "v_prediction", "sample"])
def test_engine_converts_to_epsilon(copy: Path, prediction_type: str, rng: np.random.Generator) -> None:
    network = open_model(recipe_of(copy))
    schedule = NoiseSchedule.from_config({"prediction_type": prediction_type, "clip_sample": False}, 5, 0.0)
    x = rng.standard_normal((2, 1, 8, 8)).astype(np.float32)
    x.flags.writeable = False  # memory-mapped arrays are not
    labels = np.array([0, 2])
    with TorchEngine(network, schedule) as engine:
        assert isinstance(engine, Engine)
        step = 3
        timestep = np.full(2, schedule.timesteps[step])
        got = engine({"sample": x, "timestep": timestep, "step": np.array([step]), "class_labels": labels, "more": labels})["epsilon"]
    with torch.no_grad():
        output = network.module(torch.tensor(x), torch.tensor(timestep), class_labels=torch.tensor(labels)).double().numpy()
    alpha, sigma = np.sqrt(schedule.alphas_cumprod[step]), np.sqrt(1 - schedule.alphas_cumprod[step])
    expected = {"epsilon": output, "v_prediction": alpha * output + sigma * x, "sample": (x - alpha * output) / sigma}[prediction_type]
    assert got.dtype == np.float32
    np.testing.assert_allclose(got, expected, rtol=1e-5, atol=1e-5)
