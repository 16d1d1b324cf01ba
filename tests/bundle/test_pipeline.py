"""The parts around the network: what a manifest may say of them, and what their files may be."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from helpers import Built, reseal, seal

from ptqd_export.bundle import Bundle
from ptqd_export.bundle.pipeline import Decoder, Pipeline, Tensors, TextEncoder
from ptqd_export.bundle.tokenizer import Special
from ptqd_export.core.model import InputSpec, ModelInfo
from ptqd_export.core.precision import FP32
from ptqd_export.errors import BundleError, RecipeError
from ptqd_export.typed import read_typed, to_plain

ENCODER = TextEncoder(
    "text", "text_encoder", "tokenizer", "0" * 64, FP32, 8, 6, 100, -1, True, Special(98, 99, 99, 99)
)
DECODER = Decoder("VQModel", "1" * 64, FP32, (4, 4, 4), (3, 8, 8), 0.5, 0.0, (-1.0, 1.0))
INFO = ModelInfo("m", (4, 4, 4), (InputSpec("text", "float32", (8, 6)),), "0" * 64)


def test_round_trip() -> None:
    pipeline = Pipeline(True, DECODER, (ENCODER,))
    pipeline.check(INFO)
    assert read_typed(Pipeline, to_plain(pipeline), "pipeline") == pipeline
    assert pipeline.files == (
        "text_encoder/model.onnx", "vae_decoder/model.onnx", "tokenizer/vocab.json", "tokenizer/merges.txt",
    )  # fmt: skip
    assert pipeline.text_inputs == ("text",)
    assert DECODER.tensors == Tensors(
        {"latent_sample": ("float32", (4, 4, 4))}, {"sample": ("float32", (3, 8, 8))}
    )
    assert (ENCODER.tensors.positions, DECODER.tensors.positions) == (8, 64)


def test_two_encoders_lie_side_by_side() -> None:
    second = replace(ENCODER, folder="text_encoder_2", tokenizer="tokenizer_2", width=10)
    pipeline = Pipeline(True, None, (ENCODER, second))
    pipeline.check(replace(INFO, inputs=(InputSpec("text", "float32", (8, 16)),)))
    with pytest.raises(RecipeError, match=r"text encoders give \(8, 16\)"):
        pipeline.check(INFO)


@pytest.mark.parametrize(
    "change",
    [
        {"digest": "x"},
        {"tokens": 2},
        {"tokens": 5000},
        {"width": 0},
        {"tokens": 4096, "width": 4096},
        {"vocabulary": 99},
        {"hidden_layer": 0},
        {"special": Special(-1, 99, 99, 99)},
    ],
)
def test_encoders_out_of_range(change: dict[str, Any]) -> None:
    with pytest.raises(RecipeError):
        replace(ENCODER, **change)


@pytest.mark.parametrize(
    "change",
    [
        {"digest": "A" * 64},
        {"latent_shape": (0, 4, 4)},
        {"picture_shape": (4, 8, 8)},
        {"picture_shape": (3, 1 << 13, 1 << 13)},
        {"scaling_factor": 0.0},
        {"scaling_factor": 1e9},
        {"shift_factor": -1e9},
        {"image_range": (1.0, 1.0)},
        {"image_range": (1.0, -1.0)},
    ],
)
def test_decoders_out_of_range(change: dict[str, Any]) -> None:
    with pytest.raises(RecipeError):
        replace(DECODER, **change)


def test_parts_that_do_not_go_together() -> None:
    with pytest.raises(RecipeError, match="samples pictures"):
        Pipeline(False, DECODER)
    with pytest.raises(RecipeError, match="two text encoders in one folder"):
        Pipeline(True, None, (ENCODER, replace(ENCODER, tokenizer="tokenizer_2")))
    with pytest.raises(RecipeError, match="the network samples"):
        Pipeline(True, DECODER).check(replace(INFO, sample_shape=(4, 8, 8)))
    with pytest.raises(RecipeError, match="the network takes None"):
        Pipeline(False, None, (ENCODER,)).check(replace(INFO, inputs=()))


@pytest.fixture
def copy(texts: Built, tmp_path: Path) -> Path:
    shutil.copytree(texts.path, tmp_path / "copy")
    return tmp_path / "copy"


def refused(bundle: Path, message: str) -> None:
    with pytest.raises(BundleError, match=message) as caught:
        Bundle.open(bundle)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("part", ["text_encoder", "vae_decoder"])
def test_graphs_of_parts_are_checked(copy: Path, part: str) -> None:
    """As the network's are: interface, operators, weights."""
    file = copy / part / "model.onnx"
    whole = file.read_bytes()

    def twist(change: Callable[[Any], object], message: str) -> None:
        import onnx

        model = onnx.load_from_string(whole)
        change(model.graph)
        file.write_bytes(model.SerializeToString())
        reseal(copy)
        refused(copy, message)

    def location(graph: Any) -> None:
        tensor = next(t for t in graph.initializer if t.external_data)
        next(e for e in tensor.external_data if e.key == "location").value = "../weights.safetensors"

    def loop(graph: Any) -> None:
        graph.node[0].op_type = "If"

    def fused(graph: Any) -> None:
        graph.node[0].domain = "com.microsoft"

    twist(location, "takes weights from")
    twist(loop, "holds the operator 'If'")
    twist(fused, "holds the operator 'com.microsoft")
    twist(lambda graph: setattr(graph.input[0], "name", "other"), "inputs")
    twist(lambda graph: graph.output.append(graph.input[0]), "outputs")
    shutil.copyfile(copy / "update.onnx", file)
    reseal(copy)
    refused(copy, "inputs")


def test_files_of_parts_are_checked(copy: Path) -> None:
    weights = copy / "text_encoder" / "weights.safetensors"
    weights.write_bytes(weights.read_bytes() + b"more")
    refused(copy, "bytes, the manifest says")
    reseal(copy)
    refused(copy, "of which the graphs take")


@pytest.mark.parametrize("name", ["tokenizer/vocab.json", "tokenizer/merges.txt", "vae_decoder/model.onnx"])
def test_missing_files(copy: Path, name: str) -> None:
    (copy / name).unlink()
    refused(copy, "is missing")
    reseal(copy)
    refused(copy, f"it names '{name}' but has no hash of it")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda p: p["decoder"].update(latent_shape=[4, 4, 5]), "the network samples"),
        (lambda p: p["decoder"].update(picture_shape=[3, 8, 9]), "computes sample in another shape|shape"),
        (lambda p: p["encoders"][0].update(tokens=9), "text encoders give"),
        (lambda p: p["encoders"][0].update(folder="../x"), "expected one of text_encoder"),
        (lambda p: p["encoders"][0].update(tokenizer="/etc"), "expected one of tokenizer"),
        (lambda p: p.update(encoders=[]), "unknown table 'null.encoder_hidden_states'"),
        (lambda p: p.update(latent=False), "samples pictures"),
        (lambda p: p.update(decoder=None, surprise=1), "unknown key 'surprise'"),
    ],
)
def test_manifests_that_do_not_fit(
    copy: Path, change: Callable[[dict[str, Any]], object], message: str
) -> None:
    seal(copy, lambda data: change(data["pipeline"]))
    refused(copy, message)
