"""A bundle as a folder of stock pipelines: what they do with it, by hand, and by them where installed."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from helpers import Built, Invoke, listing

from ptqd_export import run
from ptqd_export.assemble.stock_folder import write_stock
from ptqd_export.backends import OrtEngine
from ptqd_export.bundle import Bundle
from ptqd_export.core.backend import Emission
from ptqd_export.core.plan import Plan
from ptqd_export.core.precision import FP32, Precision
from ptqd_export.core.sampling import NoiseSource
from ptqd_export.errors import RecipeError

W8A8 = Precision(8, 8)
PROMPTS = ["a cat", "a dog"]


def ours(texts: Built, precision: Precision) -> Any:
    plan = Plan((precision,) * 3)
    return np.clip(run(texts.bundle, 2, seed=0, prompts=PROMPTS, plan=plan) / 2 + 0.5, 0, 1)


def noise(texts: Built) -> Any:
    shape = texts.bundle.manifest.sampling.model.sample_shape
    return NoiseSource(0, range(2), shape).draw().astype(np.float32)


def theirs(folder: Path, start: Any, steps: int, scale: float) -> Any:
    """StableDiffusionPipeline in numpy and diffusers' scheduler: nothing of ours but the graphs."""
    import diffusers
    import torch
    from transformers import CLIPTokenizer

    index = json.loads((folder / "model_index.json").read_text())
    assert index["_class_name"] == "StableDiffusionPipeline"
    scheduler = getattr(diffusers, index["scheduler"][1]).from_pretrained(folder / "scheduler")
    tokenizer = CLIPTokenizer.from_pretrained(folder / "tokenizer")
    configs = {
        name: json.loads((folder / name / "config.json").read_text()) for name in ("unet", "vae_decoder")
    }
    assert configs["unet"]["sample_size"] == 4 and len(configs["vae_decoder"]["block_out_channels"]) == 2
    words = {"padding": "max_length", "truncation": True, "max_length": tokenizer.model_max_length}
    ids = tokenizer([""] * 2 + PROMPTS, return_tensors="np", **words)["input_ids"].astype(np.int64)
    with OrtEngine(folder / "text_encoder" / "model.onnx") as encoder:
        states = encoder({"input_ids": ids})["last_hidden_state"]
    scheduler.set_timesteps(steps)
    x = torch.from_numpy(start) * scheduler.init_noise_sigma
    with OrtEngine(folder / "unet" / "model.onnx") as unet:
        for t in scheduler.timesteps:
            both = np.concatenate([x.numpy()] * 2)
            feeds = {"sample": both, "timestep": np.float32(t), "encoder_hidden_states": states}
            null, cond = np.split(unet(feeds)["out_sample"], 2)
            x = scheduler.step(torch.from_numpy(null + scale * (cond - null)), t, x, return_dict=False)[0]
    with OrtEngine(folder / "vae_decoder" / "model.onnx") as decoder:
        latents = x.numpy() / configs["vae_decoder"]["scaling_factor"]
        pictures = decoder({"latent_sample": latents})["sample"]
    return np.clip(pictures / 2 + 0.5, 0, 1)


@pytest.fixture
def folder(texts: Built, tmp_path: Path) -> Path:
    stock = write_stock(texts.bundle, tmp_path / "pipeline", W8A8, Emission.ORT_CPU)
    assert stock.call == {"num_inference_steps": 3, "guidance_scale": 3.0}
    return tmp_path / "pipeline"


def test_the_pictures_of_the_folder_are_those_of_the_bundle(texts: Built, folder: Path) -> None:
    found = theirs(folder, noise(texts), 3, 3.0)
    np.testing.assert_allclose(found, ours(texts, W8A8), rtol=0, atol=1e-5)
    # The test can fail: other guidance, other steps, another precision.
    assert np.abs(theirs(folder, noise(texts), 3, 1.0) - found).max() > 1e-3
    assert np.abs(theirs(folder, noise(texts), 2, 3.0) - found).max() > 1e-3
    assert np.abs(ours(texts, FP32) - found).max() > 1e-4


def test_of_most_steps_and_as_other_tools_read_it(texts: Built, invoke: Invoke, tmp_path: Path) -> None:
    """The plan has two steps at fp32. A folder of ours is replaced, and nothing else."""
    out = tmp_path / "pipeline"
    for _ in range(2):
        result = invoke("export-pipeline", texts.path, "--out", out, "--json")
        assert (result.code, result.json["precision"], result.json["emission"]) == (0, "fp32", "portable")
    found = theirs(out, noise(texts), 3, 3.0)
    np.testing.assert_allclose(found, ours(texts, FP32), rtol=0, atol=1e-5)
    before = listing(out)
    (out / "ptqd_export.json").rename(out / "notes.txt")
    refused = invoke("export-pipeline", texts.path, "--out", out, "--precision", "w8a8")
    assert refused.code == 1 and "holds no older pipeline of ours" in refused.err
    (out / "notes.txt").rename(out / "ptqd_export.json")
    assert listing(out) == before


def test_what_no_stock_pipeline_takes(texts: Built, own: Built, tmp_path: Path) -> None:
    def refused(bundle: Bundle, message: str, precision: Precision | None = None) -> None:
        with pytest.raises(RecipeError, match=message):
            write_stock(bundle, tmp_path / "out", precision, Emission.PORTABLE)
        assert not (tmp_path / "out").exists()

    refused(own.bundle, "holds 0 text encoders and no decoder: a stock pipeline needs one of each")
    refused(texts.bundle, "no graph of w4a4: it has", Precision(4, 4))
    bundle, m = texts.bundle, texts.bundle.manifest
    decoder = m.pipeline.decoder
    assert decoder is not None
    pipeline = replace(m.pipeline, decoder=replace(decoder, image_range=(0.0, 1.0)))
    refused(replace(bundle, manifest=replace(m, pipeline=pipeline)), "pictures go from 0 to 1")
    provenance = replace(m.provenance, scheduler={})
    refused(replace(bundle, manifest=replace(m, provenance=provenance)), "no config of its model's scheduler")


def test_in_optimum(texts: Built, folder: Path) -> None:
    """optimum-onnx does not go with the diffusers that builds bundles: skipped where it is not installed."""
    optimum = pytest.importorskip("optimum.onnxruntime", reason="needs optimum-onnx, in its own environment")
    import torch

    pipe = optimum.ORTStableDiffusionPipeline.from_pretrained(folder)
    settings = {"num_inference_steps": 3, "guidance_scale": 3.0, "output_type": "np"}
    found = pipe(prompt=PROMPTS, latents=torch.from_numpy(noise(texts)), **settings).images
    np.testing.assert_allclose(found.transpose(0, 3, 1, 2), ours(texts, W8A8), rtol=0, atol=1e-5)
