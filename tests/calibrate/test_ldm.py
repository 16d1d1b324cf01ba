"""Latent diffusion models in CompVis' layout: equal to their original definition, or refused by name."""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from ldm_models import CONFIGURATIONS, Original, edit, ldm_recipe, original, shallow, small, write
from ldm_original import UNetModel
from models import assert_one_line
from torch import Tensor, nn

from ptqd_export.calibrate import open_model, open_source
from ptqd_export.calibrate.source import Source
from ptqd_export.core.sampling import Sampling

FIRST = "model.diffusion_model.input_blocks.0.0.weight"
CROSS = "model.diffusion_model.input_blocks.1.1.transformer_blocks.0.attn2.to_k.weight"
CLOSE = 1e-5
"""Largest relative distance (L2) of outputs that are computed in float32 in another order."""
SHAPES = {"cin256-v2": (3, 16, 16), "lsun_beds256": (3, 16, 16), "lsun_churches256": (4, 16, 16),
          "v1-inference": (4, 16, 16)}  # fmt: skip
SCALES = {"cin256-v2": 1.0, "lsun_beds256": 1.0, "v1-inference": 0.18215}


def distance(found: Tensor, expected: Tensor) -> float:
    return float((found - expected).norm() / expected.norm())


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], tuple[Path, Original]]:
    """A small model of each configuration: its folder, and its original."""
    kept: dict[str, tuple[Path, Original]] = {}

    def make(name: str) -> tuple[Path, Original]:
        if name not in kept:
            config = small(name)
            model, folder = original(config), tmp_path_factory.mktemp("ldm") / name
            write(folder, config, model.state)
            kept[name] = folder, model
        return kept[name]

    return make


def feeds(source: Source, model: Original) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """The same input for the import and for the original."""
    torch.manual_seed(1)
    info = source.network.info
    ours = {"sample": torch.randn(2, *info.sample_shape), "timestep": torch.tensor([3, 801])}
    theirs = {"x": ours["sample"], "t": ours["timestep"]}
    for spec in info.inputs:
        if spec.num_classes is not None:
            ours[spec.name] = torch.tensor([7, spec.num_classes - 1])
            assert model.table is not None
            theirs["context"] = model.table(ours[spec.name])[:, None]
        else:
            ours[spec.name] = theirs["context"] = torch.randn(2, *spec.shape)
    return ours, theirs


@pytest.mark.parametrize("name", CONFIGURATIONS)
def test_equal_to_the_original(name: str, made: Callable[[str], tuple[Path, Original]]) -> None:
    folder, model = made(name)
    source = open_source(ldm_recipe(folder))
    info = source.network.info
    assert (info.name, info.sample_shape) == (name, SHAPES[name])
    ours, theirs = feeds(source, model)
    with torch.no_grad():
        found, expected = source.network.module(**ours), model.unet(**theirs)
        assert distance(found, expected) < CLOSE
        scale = SCALES.get(name) or float(model.state["scale_factor"])
        assert source.scaling_factor == pytest.approx(scale, rel=1e-7)
        assert source.read_first_stage is not None
        encoder: Any = source.read_first_stage()
        z = ours["sample"][:1] / scale
        assert distance(encoder.decode(z).sample, model.first_stage.decode(z)) < CLOSE
        picture = torch.rand(1, 3, 64, 64) * 2 - 1
        encoded = encoder.quant_conv(encoder.encoder(picture))
        assert distance(encoded, model.first_stage.encode(picture)) < CLOSE
    alphas = model.state["alphas_cumprod"].numpy()
    sampling = Sampling.of(info, source.network.scheduler_config, n_steps=20)
    np.testing.assert_array_equal(sampling.schedule.timesteps, np.arange(951, 0, -50))
    np.testing.assert_allclose(sampling.schedule.alphas_cumprod, alphas[951:0:-50], rtol=1e-6)
    assert sampling.schedule.alphas_cumprod_prev[-1] == pytest.approx(alphas[0])
    assert not sampling.schedule.clip_sample


def test_a_wrong_import_would_be_seen(made: Callable[[str], tuple[Path, Original]]) -> None:
    """What the configurations hide is large: head counts, and weights that are not averaged."""
    folder, model = made("lsun_churches256")
    source = open_source(ldm_recipe(folder))
    ours, theirs = feeds(source, model)
    with torch.no_grad():
        expected = model.unet(**theirs)
        for module in source.network.module.modules():
            if type(module).__name__ == "Attention":
                module.heads //= 2  # type: ignore[operator]
        assert distance(source.network.module(**ours), expected) > 100 * CLOSE
        write(folder / "trained", small("lsun_churches256") | {}, model.state)
        edit(folder / "trained", "scale_by_std: true", "scale_by_std: true\n    use_ema: false")
        last = open_source(ldm_recipe(folder / "trained"))
        assert distance(last.network.module(**ours), expected) > 100 * CLOSE


def test_class_labels_are_looked_up_in_the_network(made: Callable[[str], tuple[Path, Original]]) -> None:
    folder, _ = made("cin256-v2")
    network = open_model(ldm_recipe(folder))
    (labels,) = network.info.inputs
    assert (labels.name, labels.num_classes, labels.null_class) == ("class_labels", 1001, 1000)
    assert len(network.info.labels) == 1000 and "label_table" in dict(network.module.named_modules())
    assert open_model(ldm_recipe(folder, null_class=5)).info.inputs[0].null_class == 5


def test_text_of_stable_diffusion(made: Callable[[str], tuple[Path, Original]]) -> None:
    folder, _ = made("v1-inference")
    (text,) = open_model(ldm_recipe(folder)).info.inputs
    assert (text.name, text.shape) == ("encoder_hidden_states", (77, 24))


def test_the_weights_of_the_text_encoder(tmp_path: Path) -> None:
    config = shallow("v1-inference")
    state = original(config).state
    name = "cond_stage_model.transformer.text_model.embeddings."
    state |= {name + "position_ids": torch.arange(77), name + "token_embedding.weight": torch.ones(4, 2)}
    write(tmp_path, config, state)
    read = open_source(ldm_recipe(tmp_path)).read_text_state
    assert read is not None and list(read()) == ["text_model.embeddings.token_embedding.weight"]


class Crossed(nn.Module):
    """The least network that a token of width 4 conditions."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.linear = nn.Conv2d(2, 2, 3, padding=1), nn.Linear(4, 2)

    def forward(self, sample: Tensor, timestep: Tensor, encoder_hidden_states: Tensor) -> Tensor:
        token = self.linear(encoder_hidden_states).mean(1)
        return self.conv(sample) * token[:, :, None, None] + timestep[:, None, None, None]


def test_the_table_is_in_the_graph(tmp_path: Path) -> None:
    import onnx_ir as ir

    from ptqd_export.backends import OrtEngine
    from ptqd_export.calibrate.conditions import adapted
    from ptqd_export.core.model import InputSpec, ModelInfo
    from ptqd_export.export import export_fp

    torch.manual_seed(0)
    plain_module, table = Crossed(), nn.Embedding(6, 4)
    labels, x, t = torch.tensor([0, 5, 2]), torch.randn(3, 2, 4, 4), torch.tensor([1, 2, 3])
    with torch.no_grad():
        expected = plain_module(x, t, table(labels)[:, None])
    info = ModelInfo("m", (2, 4, 4), (InputSpec("class_labels", num_classes=6, null_class=5),), "0" * 64)
    graph = export_fp(adapted(plain_module, table), info)
    ir.save(graph, tmp_path / "m.onnx")
    assert [value.name for value in graph.graph.inputs] == ["sample", "timestep", "class_labels"]
    given = {"sample": x.numpy(), "timestep": t.numpy(), "class_labels": labels.numpy()}
    with OrtEngine(tmp_path / "m.onnx") as engine:
        (found,) = engine(given).values()
    np.testing.assert_allclose(found, expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    ("name", "changes"),
    [
        ("lsun_beds256", {"use_new_attention_order": True}),
        ("lsun_beds256", {"in_channels": 7, "resblock_updown": True}),
        ("lsun_beds256", {"num_classes": 5}),
        ("v1-inference", {"use_linear_in_transformer": True, "num_heads": -1, "num_head_channels": 32}),
        ("v1-inference", {"in_channels": 9, "transformer_depth": 2}),
    ],
)
def test_other_settings(name: str, changes: dict[str, Any], tmp_path: Path) -> None:
    """The new order of qkv, residual resampling, inpainting, labels in the UNet, SD 2's attention."""
    config = shallow(name)
    config["model"]["params"]["unet_config"]["params"] |= changes
    model = original(config)
    write(tmp_path, config, model.state)
    network = open_model(ldm_recipe(tmp_path))
    torch.manual_seed(1)
    x, t = torch.randn(2, *network.info.sample_shape), torch.tensor([3, 801])
    ours = {s.name: torch.randn(2, *s.shape) for s in network.info.inputs if s.num_classes is None}
    theirs: dict[str, Tensor] = {}
    if "extra_channels" in ours:
        assert ours["extra_channels"].shape[1] == changes["in_channels"] - network.info.channels
    if "encoder_hidden_states" in ours:
        theirs["context"] = ours["encoder_hidden_states"]
    if network.info.class_input is not None:
        ours["class_labels"] = theirs["y"] = torch.tensor([0, 4])
    sample = torch.cat([x, ours["extra_channels"]], 1) if "extra_channels" in ours else x
    with torch.no_grad():
        assert distance(network.module(x, t, **ours), model.unet(sample, t, **theirs)) < CLOSE


def test_first_stage_with_attention_in_its_levels(tmp_path: Path) -> None:
    """VQ-f8 of the older ImageNet model."""
    config = shallow("lsun_beds256")
    config["model"]["params"]["first_stage_config"]["params"]["ddconfig"]["attn_resolutions"] = [128, 64]
    model = original(config)
    write(tmp_path, config, model.state)
    read = open_source(ldm_recipe(tmp_path)).read_first_stage
    assert read is not None
    first: Any = read()
    z = torch.randn(1, 3, 8, 8)
    with torch.no_grad():
        assert distance(first.decode(z).sample, model.first_stage.decode(z)) < CLOSE


@pytest.mark.parametrize("name", ["cin256-v2", "v1-inference"])
def test_names_are_those_of_the_converter_of_diffusers(name: str) -> None:
    """Where diffusers has a converter: the same tensors by the same names."""
    from diffusers.loaders import single_file_utils as tools

    from ptqd_export.calibrate.ldm_names import first_stage_name, unet_name

    config = small(name)
    with torch.device("meta"):
        state = original(config).state
    params = config["model"]["params"]
    unet = {"layers_per_block": params["unet_config"]["params"]["num_res_blocks"]}
    ids = {key: id(value) for key, value in state.items()}
    converted = tools.convert_ldm_unet_checkpoint(dict(state), unet)
    levels = params["unet_config"]["params"]["channel_mult"]
    attends = [2**i in params["unet_config"]["params"]["attention_resolutions"] for i in range(len(levels))]
    assert len(converted) > 100
    for key, value in converted.items():
        own, part = unet_name(key, unet["layers_per_block"], attends[::-1])
        assert part is None and ids["model.diffusion_model." + own] == id(value), key
    n = len(params["first_stage_config"]["params"]["ddconfig"]["ch_mult"])
    stage = {"down_block_types": [""] * n, "up_block_types": [""] * n}
    for key in tools.convert_ldm_vae_checkpoint(dict(state), stage):
        assert "first_stage_model." + first_stage_name(key, n) in state, key


def test_another_schedule_is_taken_from_the_checkpoint(tmp_path: Path) -> None:
    config = shallow("lsun_beds256")
    config["model"]["params"]["beta_schedule"] = "cosine"
    state = original(config).state
    betas = torch.linspace(0.001, 0.5, 1000, dtype=torch.float64)
    state |= {"betas": betas.float(), "alphas_cumprod": torch.cumprod(1 - betas.float().double(), 0).float()}
    write(tmp_path, config, state)
    scheduler = open_model(ldm_recipe(tmp_path)).scheduler_config
    assert scheduler["trained_betas"] == betas.float().double().tolist()
    del state["betas"]
    write(tmp_path, config, state)
    assert_one_line(ldm_recipe(tmp_path), "says beta_schedule cosine, and .* holds no betas")


def test_stable_diffusion_1_has_the_published_configuration() -> None:
    from ptqd_export.calibrate.ldm_config import LdmConfig
    from ptqd_export.calibrate.ldm_known import recognise

    held = {FIRST: torch.zeros(320, 4, 3, 3), CROSS: torch.zeros(320, 768)}
    found = recognise(held, Path("m.safetensors"))
    published = LdmConfig.from_plain(CONFIGURATIONS["v1-inference"], found.where)
    for part in ("first_stage", "condition", "scheduler", "size"):
        assert getattr(found, part) == getattr(published, part)
    assert found.unet.to_diffusers(64) == published.unet.to_diffusers(64)
    assert found.params == published.params


def test_full_sizes_without_memory() -> None:
    """Parameters of the four UNets and first stages, as published."""
    from ptqd_export.calibrate.construct import construct
    from ptqd_export.calibrate.ldm_config import LdmConfig

    counts = {
        "cin256-v2": (400_920_579, 55_322_782),
        "lsun_beds256": (274_056_163, 55_322_782),
        "lsun_churches256": (294_966_916, 83_653_863),
        "v1-inference": (859_520_964, 83_653_863),
    }

    def parameters(module: nn.Module) -> int:
        return sum(p.numel() for p in module.parameters())

    for name, plain in copy.deepcopy(CONFIGURATIONS).items():
        config = LdmConfig.from_plain(plain, name)
        assert config.first_stage is not None
        ours = construct(config.unet.to_diffusers(config.size), name)
        first = construct(config.first_stage.to_diffusers(1.0), name)
        assert (parameters(ours), parameters(first)) == counts[name]
        with torch.device("meta"):
            theirs = UNetModel(**plain["model"]["params"]["unet_config"]["params"])
        assert parameters(theirs) == counts[name][0]
