"""The committed Stable Diffusion folder: complete, float16, small, and no pickle in it; its tokenizer's files
fit each other."""

from __future__ import annotations

import json
import struct
from pathlib import Path

import pytest

FOLDER = Path(__file__).resolve().parents[1] / "calib" / "cifar10_text"
WEIGHTS = {
    "unet": "unet/diffusion_pytorch_model.safetensors",
    "vae": "vae/diffusion_pytorch_model.safetensors",
    "text_encoder": "text_encoder/model.safetensors",
}
LIMIT = 50 * 10**6  # bytes


def committed() -> list[Path]:
    return [
        path for path in FOLDER.rglob("*") if path.is_file() and not {"work", "__pycache__"} & {*path.parts}
    ]


def test_the_folder_is_small_and_holds_no_pickle() -> None:
    assert sum(path.stat().st_size for path in committed()) <= LIMIT
    assert not {path.suffix for path in committed()} & {".bin", ".pt", ".pth", ".ckpt", ".pkl"}


def test_every_part_of_the_pipeline_is_there() -> None:
    index = json.loads((FOLDER / "model_index.json").read_text("utf-8"))
    assert index["_class_name"] == "StableDiffusionPipeline"
    parts = {name for name, value in index.items() if isinstance(value, list) and value[0] is not None}
    assert parts == {"unet", "vae", "text_encoder", "tokenizer", "scheduler"}
    assert all((FOLDER / name).is_dir() for name in parts)


@pytest.mark.parametrize("part", [*WEIGHTS, "classifier"])
def test_weights_are_float16(part: str) -> None:
    raw = (FOLDER / WEIGHTS.get(part, "classifier.safetensors")).read_bytes()
    (size,) = struct.unpack("<Q", raw[:8])
    header = json.loads(raw[8 : 8 + size])
    kinds = {entry["dtype"] for name, entry in header.items() if name != "__metadata__"}
    assert kinds <= {"F16", "I64"} and "F16" in kinds


def test_every_merge_of_the_tokenizer_makes_a_token() -> None:
    vocabulary = json.loads((FOLDER / "tokenizer" / "vocab.json").read_text("utf-8"))
    first, *merges = (FOLDER / "tokenizer" / "merges.txt").read_text("utf-8").splitlines()
    assert first.startswith("#version") and sorted(vocabulary.values()) == [*range(len(vocabulary))]
    for merge in merges:
        assert {*merge.split(), merge.replace(" ", "")} <= vocabulary.keys()
    assert {"horse</w>", "photo</w>", "airplane</w>"} <= vocabulary.keys()
