"""What the builder makes of a network's graph: every layer in 8 bits that was meant to, and no kernel for the
tables."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from helpers import RTX, Built, copied

from ptqd_export.backends import trt
from ptqd_export.bundle.bundle import WEIGHTS
from ptqd_export.calibrate import collect, observe, open_model, quantize
from ptqd_export.core.backend import Emission
from ptqd_export.core.engine_build import EngineBuild, EngineSettings
from ptqd_export.core.noise import Correction
from ptqd_export.core.sampling import Sampling
from ptqd_export.core.schedule import NoiseSchedule
from ptqd_export.export import export_fp, exported_layers, fold, insert_qdq, lower, quantized_nodes, save
from ptqd_export.recipe import Recipe

pytest.importorskip("tensorrt_rtx")

REFERENCE = Path(__file__).parents[2] / "calib" / "fashion_mnist"
KEY = "0" * 64
SETTINGS = EngineSettings((1, 2, 4), ("8.9",))


@dataclass(frozen=True)
class Trial:
    """An engine built for its plan: what the builder says, and the nodes of every layer of the plan."""

    build: EngineBuild
    layers: tuple[frozenset[str], ...]


def _build(graph: Path, folder: Path, quantized: Mapping[str, str]) -> Trial:
    log = folder / "e.log"
    made = trt.build(RTX, graph, folder / "e.engine", SETTINGS, key=KEY, quantized=quantized, log=log)
    lines = (line for line in log.read_text(errors="replace").splitlines() if ", LayerType: " in line)
    plan = (line.rpartition("Metadata: ")[2] for line in lines if "Metadata: " in line)
    return Trial(made, tuple(frozenset(re.findall(r"\[ONNX Layer: (.*?)\]", nodes)) for nodes in plan))


def _trials(source: Path, folder: Path, precisions: tuple[str, ...]) -> dict[str, Trial]:
    """Plans of a model's half-precision graphs as "<precision>.<tables>": none, "plain", those of the
    correction, and with the sample's too, as v-prediction has them."""
    changes: dict[str, Any] = {
        "sampler": {"n_steps": 2},
        "calibration": {"size": 4, "held_out": 2},
        "quantization": {"precisions": precisions, "rounding": "nearest"},
    }
    recipe = Recipe.load(source).override(**changes)
    network = open_model(recipe)
    sampler = recipe.sampler
    sampling = Sampling.of(
        network.info, network.scheduler_config, n_steps=2, eta=sampler.eta, solver=sampler.solver
    )
    base = export_fp(network.module, network.info)
    observed = observe(network, sampling, recipe, collect(network, sampling, recipe, folder / "trajectories"))
    rng, shape = np.random.default_rng(0), (2, network.info.channels)
    identity = Correction.identity(*shape)
    correction = replace(identity, gain=rng.uniform(0.5, 1.5, shape), offset=rng.uniform(0.5, 1.5, shape))
    of_noise, of_v = (
        NoiseSchedule.from_config({**network.scheduler_config, "prediction_type": kind}, 2, 0.0)
        for kind in ("epsilon", "v_prediction")
    )
    models = {}
    for p in recipe.precisions:
        net = quantize(network, observed, p, recipe).exported(exported_layers(base))
        graph = lower(insert_qdq(base, net, Emission.HALF), Emission.HALF, p)
        models[f"{p}.plain"] = fold(graph, of_noise, identity)
        models[f"{p}.correction"] = fold(graph, of_noise, correction)
        models[f"{p}.sample"] = fold(graph, of_v, correction)
    save(models, folder, WEIGHTS)
    return {
        name: _build(folder / f"{name}.onnx", folder, quantized_nodes(model))
        for name, model in models.items()
    }


@pytest.fixture(scope="module")
def reference(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Trial]:
    """The reference model."""
    return _trials(REFERENCE, tmp_path_factory.mktemp("reference"), ("w8a8", "w4a4"))


@pytest.fixture(scope="module")
def cross(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Trial]:
    """A latent model with cross attention, as of text-to-image models."""
    import torch
    from diffusers import DDIMScheduler, UNet2DConditionModel

    folder = tmp_path_factory.mktemp("models") / "cross"
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        UNet2DConditionModel(
            sample_size=16,
            block_out_channels=(32, 64),
            cross_attention_dim=32,
            attention_head_dim=8,
            norm_num_groups=8,
            layers_per_block=1,
            down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"),
            up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"),
        ).save_pretrained(folder / "unet")
    DDIMScheduler().save_pretrained(folder / "scheduler")
    inputs = 'inputs = [{name = "encoder_hidden_states", dtype = "float32", shape = [5, 32]}]'
    (folder / "recipe.toml").write_text(f'[model]\nsource = "."\n{inputs}\n')
    return _trials(folder, tmp_path_factory.mktemp("cross"), ("w8a8-fp8", "w4a16"))


TABLES = {"plain": (), "correction": ("gain", "offset"), "sample": ("gain", "offset", "sample_gain")}


@pytest.mark.parametrize("model", ["reference", "cross"])
def test_the_tables_add_no_kernel(model: str, request: pytest.FixtureRequest) -> None:
    """Correction, and v- and x0-prediction besides: all that they do is done in one kernel, which is there
    without them too."""
    trials: dict[str, Trial] = request.getfixturevalue(model)
    assert len(trials) == 6
    for name, trial in trials.items():
        p, tables = name.split(".")
        plan, plain = trial.build.plan, trials[f"{p}.plain"].build.plan
        assert plan.meant == plan.taken and plan.fell_back == {} and (plan.meant > 0) == (p != "w4a16"), name
        assert plan.kernels == plain.kernels and plan.types == plain.types, name
        with_tables = [
            nodes
            for nodes in trial.layers
            if any("ptqd." in node and "ptqd.zero" not in node for node in nodes)
        ]
        assert len(with_tables) == (tables != "plain"), name
        for table in TABLES[tables]:
            for part in ("row", "applied"):
                assert any(f"ptqd.{table}.{part}" in node for node in with_tables[0])


def test_a_kernel_more_is_seen(several: Built, tmp_path: Path) -> None:
    """A convolution of the output cannot be done in the kernel that makes it: it is counted."""
    bundle = copied(several, tmp_path)
    model = onnx.load(bundle / "w8a8.half.onnx", load_external_data=False)
    graph = model.graph
    graph.initializer.append(
        onnx.numpy_helper.from_array(np.full((1, 1, 3, 3), 0.1, np.float32), "blur.weight")
    )
    graph.node.append(
        onnx.helper.make_node("Conv", ["epsilon", "blur.weight"], ["blurred"], "blur", pads=[1, 1, 1, 1])
    )
    graph.output[0].name = "blurred"
    onnx.save(model, bundle / "more.onnx")
    one, more = (_build(bundle / f"{name}.onnx", tmp_path, {}).build.plan for name in ("w8a8.half", "more"))
    assert more.kernels > one.kernels
