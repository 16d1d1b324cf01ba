"""Files of weights: shards, checkpoints of Lightning, and files that are made to do harm."""

from __future__ import annotations

import json
import os
import shutil
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from models import WEIGHTS, assert_one_line, outputs_of, recipe_of
from safetensors.torch import load_file, save_file

from ptqd_export.calibrate import open_model
from ptqd_export.calibrate.weights import read_checkpoint
from ptqd_export.errors import ModelError

INDEX = WEIGHTS + ".index.json"


def shard(folder: Path) -> dict[str, str]:
    """Split the weights of a UNet into two files and an index."""
    state = load_file(folder / "unet" / WEIGHTS)
    (folder / "unet" / WEIGHTS).unlink()
    names = sorted(state)
    parts = {"part-1.safetensors": names[::2], "part-2.safetensors": names[1::2]}
    for name, keys in parts.items():
        save_file({key: state[key] for key in keys}, folder / "unet" / name)
    listed = {key: name for name, keys in parts.items() for key in keys}
    write_index(folder, listed)
    return listed


def write_index(folder: Path, listed: Any) -> None:
    (folder / "unet" / INDEX).write_text(json.dumps({"metadata": {}, "weight_map": listed}))


def test_shards(pipeline: Path, copy: Path) -> None:
    shard(copy)
    whole, split = open_model(recipe_of(pipeline)), open_model(recipe_of(copy))
    assert split.info.sha256 == whole.info.sha256
    assert torch.equal(outputs_of(split), outputs_of(whole))


def test_links_within_a_cache(copy: Path, tmp_path: Path) -> None:
    """As a hub's cache holds them: the folder's files are links to files elsewhere."""
    shard(copy)
    blobs = tmp_path / "blobs"
    shutil.move(copy / "unet", blobs)
    (copy / "unet").mkdir()
    for file in blobs.iterdir():
        (copy / "unet" / file.name).symlink_to(file)
    open_model(recipe_of(copy))


@pytest.mark.parametrize(
    ("listed", "message"),
    [
        ({"a": "../unet/part-1.safetensors"}, "names the shard .*expected the name of a .safetensors file"),
        ({"a": "/etc/passwd"}, "names the shard '/etc/passwd'"),
        ({"a": ".."}, "names the shard '..'"),
        ({"a": 3}, "names the shard 3"),
        ({"a": "part-3.safetensors"}, "1 are not there, such as 'part-3.safetensors'"),
        ({"a": "part-1.safetensors"}, "tensor 'a' is not in part-1.safetensors"),
        ({}, "has no weight_map"),
        ([1], "has no weight_map"),
    ],
)
def test_wrong_indexes(copy: Path, listed: Any, message: str) -> None:
    right = shard(copy)
    write_index(copy, right | listed if isinstance(listed, dict) and listed else listed)
    assert_one_line(recipe_of(copy), message)


def test_a_tensor_that_the_index_does_not_list(copy: Path) -> None:
    listed = shard(copy)
    listed.pop("conv_in.bias")
    write_index(copy, listed)
    assert_one_line(recipe_of(copy), "tensor 'conv_in.bias' is in part-.*shards are of different models")


class Touch:
    """Creates a file when it is unpickled."""

    def __init__(self, file: Path) -> None:
        self.file = file

    def __reduce__(self) -> Any:
        return (os.mkdir, (str(self.file),))


def lightning() -> Any:
    """An object of a class that is called pytorch_lightning.callbacks.ModelCheckpoint."""
    kind = type("ModelCheckpoint", (), {"__module__": "pytorch_lightning.callbacks"})
    return kind


def test_what_lightning_leaves_is_inert(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import sys
    import types

    kind = lightning()
    module = types.ModuleType("pytorch_lightning.callbacks")
    module.ModelCheckpoint = kind  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "pytorch_lightning", types.ModuleType("pytorch_lightning"))
    monkeypatch.setitem(sys.modules, "pytorch_lightning.callbacks", module)
    one = kind()
    one.best = 3
    torch.save(
        {"epoch": 4, "callbacks": {kind: {"x": one}}, "state_dict": {"w": torch.arange(3.0), "n": 3}},
        tmp_path / "m.ckpt",
    )
    monkeypatch.undo()
    state = read_checkpoint(tmp_path / "m.ckpt")
    assert list(state) == ["w"] and state["w"].tolist() == [0, 1, 2]


def code(file: Path) -> None:
    torch.save({"state_dict": {"w": torch.zeros(2)}, "more": Touch(file.with_name("touched"))}, file)


def compressed(file: Path) -> None:
    torch.save({"w": torch.zeros(2)}, file)
    with zipfile.ZipFile(file) as whole:
        held = {name: whole.read(name) for name in whole.namelist()}
    with zipfile.ZipFile(file, "w", zipfile.ZIP_DEFLATED) as packed:
        for name, data in held.items():
            packed.writestr(name, data)


def cut(file: Path) -> None:
    torch.save({"w": torch.zeros(100_000)}, file)
    file.write_bytes(file.read_bytes()[:200_000])


@pytest.mark.parametrize(
    ("write", "message"),
    [
        (code, "asks for 'posix.mkdir', which would run code: it was not loaded"),
        (compressed, "is compressed, which torch.save never does"),
        (cut, "is damaged"),
        (lambda f: f.write_bytes(b"x" * 100), "is damaged, or was saved by a torch before 1.6"),
        (lambda f: torch.save([torch.zeros(2)], f), "holds no tensors by name"),
        (lambda f: torch.save({"a": torch.zeros(2).to_sparse()}, f), "is torch.sparse_coo: expected plain"),
        (lambda f: None, "does not exist"),
    ],
)
def test_wrong_checkpoints(tmp_path: Path, write: Callable[[Path], Any], message: str) -> None:
    write(tmp_path / "m.ckpt")
    with pytest.raises(ModelError, match=message) as caught:
        read_checkpoint(tmp_path / "m.ckpt")
    assert "\n" not in str(caught.value) and not (tmp_path / "touched").exists()


def test_other_endings(tmp_path: Path) -> None:
    (tmp_path / "m.onnx").write_bytes(b"")
    with pytest.raises(ModelError, match=r"ends with '.onnx': expected .safetensors or .ckpt"):
        read_checkpoint(tmp_path / "m.onnx")
