"""Everything that goes wrong is one clear line on stderr and exit code 1, and leaves what was there as it was."""

from __future__ import annotations

import json
import os
import re
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import onnx
import pytest
from conftest import Built, Invoke, Launch, full_disk
from onnx import TensorProto, helper
from safetensors.numpy import load_file, save_file

from ptqd_export.bundle import MANIFEST, TABLES, WEIGHTS, Bundle, write_manifest
from ptqd_export.errors import BundleError
from ptqd_export.manifest import Manifest
from ptqd_export.verify import verify_engines

UNET = "unet/diffusion_pytorch_model.safetensors"
SMALL = ("--calib-size", "2", "--n-steps", "2")


def listing(folder: Path) -> dict[str, tuple[int, int]]:
    """Every file and folder below, with inode, and for files the time of the last change."""
    return {str(p.relative_to(folder)): (p.stat().st_ino, 0 if p.is_dir() else p.stat().st_mtime_ns) for p in sorted(folder.rglob("*"))}


@pytest.fixture
def place(tmp_path: Path, own: Built) -> Path:
    """A folder with an older bundle in it."""
    shutil.copytree(own.path, tmp_path / "place" / "bundle")
    return tmp_path / "place"


@pytest.fixture
def refused(place: Path, invoke: Invoke) -> Callable[..., str]:
    """Run a command that must fail, and check that it changed nothing; returns its one line."""

    def call(*words: object) -> str:
        before = listing(place)
        line = invoke(*words).error
        assert listing(place) == before
        Bundle.open(place / "bundle")
        return line

    return call


@pytest.fixture
def model(tmp_path: Path, rgb: Built) -> Path:
    """A copy of a sound model folder, to be spoilt."""
    shutil.copytree(rgb.recipe, tmp_path / "model")
    return tmp_path / "model"


# --- recipes and options ---


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (None, "recipe.toml does not exist: give a recipe file"),
        ("[model\n", "recipe.toml is not valid TOML"),
        ("\x00\xff", "recipe.toml is not valid TOML"),
        ("[sampler]\nn_step = 3\n", "unknown key 'n_step': did you mean 'n_steps'?"),
        ("[sampler]\nn_steps = 'many'\n", "recipe.sampler.n_steps: expected int, got 'many'"),
        ("[sampler]\nn_steps = 0\n", "sampler.n_steps is 0: give at least 1"),
        ("[quantization]\nprecisions = ['w9a8']\n", "precision 'w9a8' is not known: give fp32, fp16, wXaY"),
        ("[model]\nsource = 'net.py:make'\n", "net.py does not exist"),
    ],
)
def test_recipes(tmp_path: Path, place: Path, refused: Callable[..., str], text: str | None, message: str) -> None:
    recipe = tmp_path / "recipe.toml"
    if text is not None:
        recipe.write_bytes(text.encode("latin-1"))
    for out in (place / "bundle", place / "new" / "deep"):
        assert message in refused("build", recipe, "--out", out)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--precision", "int8"], "precision 'int8' is not known: give fp32, fp16, wXaY with 2 to 8 bits each"),
        (["--precision", "w8a8", "--precision", "w8a8"], "holds a precision twice"),
        (["--plan", "best"], "precision 'best' is not known"),
        (["--plan", "w8a8*x"], "plan step 'w8a8*x': expected a precision with a count"),
        (["--plan", "w8a8*3", "--n-steps", "2"], "the fixed plan has 3 steps, the sampler 2"),
        (["--plan", "w8a8,w3a3", "--n-steps", "2", "--precision", "w8a8"], "the fixed plan uses w3a3, which is not built"),
        (["--guidance-scale", "2"], "guidance_scale is 2.0, but classes has no null class: set model.null_class in the recipe"),
        (["--guidance-scale", "nan"], "sampler.guidance_scale is nan"),
        (["--eta", "2"], "sampler.eta is 2.0: give a value in [0, 1]"),
        (["--n-steps", "1001"], "n_steps is 1001: give 1 to 1000"),
        (["--calib-size", "1"], "calibration.size is 1: give at least 2"),
        (["--batch-size", "0"], "calibration.batch_size is 0: give at least 1"),
        (["--budget", "0"], "plan.budget is 0.0: give a fraction in (0, 1]"),
        (["--seed", "-1"], "calibration.seed is -1"),
        (["--batch-size", "100000000", "--calib-size", "100000000"], "calibration.batch_size 100000000 needs about"),
    ],
)
def test_options_of_build(classes: Built, place: Path, refused: Callable[..., str], words: list[str], message: str) -> None:
    for out in (place / "bundle", place / "new" / "deep"):
        assert message in refused("build", classes.recipe, "--out", out, *words)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--num-samples", "0"], "--num-samples is 0: give at least 1"),
        (["--batch-size", "0"], "--batch-size is 0: give at least 1"),
        (["--workers", "0"], "--workers is 0: give at least 1"),
        (["--seed", "-1"], "--seed is -1: give a value from 0 to 2^64 - 1"),
        (["--class-labels", "5"], "class label 5 is out of range: classes has classes 0 to 4"),
        (["--class-labels", "1,9", "--num-samples", "3"], "class label 9 is out of range"),
        (["--class-labels", "shirt"], "--class-labels 'shirt': expected numbers"),
        (["--class-labels", "1.5"], "--class-labels '1.5': expected numbers"),
        (["--class-labels", "-1"], "--class-labels '-1': expected numbers"),
        (["--class-labels", "4-2"], "--class-labels '4-2' names no class"),
        (["--class-labels", ","], "--class-labels ',' names no class"),
        (["--condition", "text=nowhere.npy"], "--condition text=nowhere.npy: cannot read nowhere.npy as .npy"),
        (["--num-samples", "1000000000000000"], "out of memory"),
    ],
)
def test_options_of_run(classes: Built, place: Path, refused: Callable[..., str], words: list[str], message: str) -> None:
    for workers in ("1", "2"):
        assert message in refused("run", classes.path, "--out", place / "pictures", "--workers", workers, *words)


def test_a_null_class_is_no_label(guided: Built, place: Path, refused: Callable[..., str]) -> None:
    assert "class label 4 is out of range: guided has classes 0 to 3" in refused("run", guided.path, "--out", place / "x", "--class-labels", "4")


def test_labels_for_a_model_without_classes(rgb: Built, place: Path, refused: Callable[..., str]) -> None:
    assert "class labels were given, but rgb has no classes" in refused("run", rgb.path, "--out", place / "x", "--class-labels", "0")


def test_conditions(own: Built, place: Path, tmp_path: Path, refused: Callable[..., str]) -> None:
    """A pickle is not loaded: its code would have made a file."""
    flag = tmp_path / "was-here"

    class Bomb:
        def __reduce__(self) -> tuple[object, tuple[str, str]]:
            return (Path.write_text, (flag, "x"))  # type: ignore[return-value]

    np.save(tmp_path / "pickle.npy", np.array([Bomb()], object), allow_pickle=True)
    np.save(tmp_path / "wide.npy", np.zeros((2, 7)))
    (tmp_path / "text.npy").write_text("no array")
    words = ("run", own.path, "--out", place / "x", "--format", "npy", "--num-samples", "2", "--condition")
    assert "pickle.npy as .npy (Object arrays cannot be loaded when allow_pickle=False)" in refused(*words, f"context={tmp_path / 'pickle.npy'}")
    assert not flag.exists()
    np.load(tmp_path / "pickle.npy", allow_pickle=True)
    assert flag.exists()
    assert "condition 'context' has shape (2, 7): expected (2, 6)" in refused(*words, f"context={tmp_path / 'wide.npy'}")
    assert "cannot read" in refused(*words, f"context={tmp_path / 'text.npy'}")
    assert "no tensor condition 'text': it takes context" in refused(*words, f"text={tmp_path / 'wide.npy'}")
    assert "give NAME=FILE.npy" in refused(*words, "context")


# --- models ---


def _config(**changes: object) -> Callable[[Path], None]:
    def spoil(model: Path) -> None:
        file = model / "unet" / "config.json"
        file.write_text(json.dumps(json.loads(file.read_text()) | changes))

    return spoil


def _scheduler(**changes: object) -> Callable[[Path], None]:
    def spoil(model: Path) -> None:
        file = model / "scheduler" / "scheduler_config.json"
        file.write_text(json.dumps(json.loads(file.read_text()) | changes))

    return spoil


def _nan(model: Path) -> None:
    weights = load_file(model / UNET)
    weights["conv_in.weight"][0, 0, 0, 0] = np.nan
    save_file(weights, model / UNET)


def _huge(model: Path) -> None:
    weights = load_file(model / UNET)
    weights["conv_out.weight"][:] = 1e38
    save_file(weights, model / UNET)


def _lacking(model: Path) -> None:
    weights = load_file(model / UNET)
    del weights["conv_in.bias"]
    save_file(weights, model / UNET)


def _truncated(model: Path) -> None:
    os.truncate(model / UNET, (model / UNET).stat().st_size - 100)


def _two_outputs(model: Path) -> None:
    """What a model with a learned variance looks like: twice the channels."""
    _config(out_channels=6)(model)
    weights = load_file(model / UNET)
    for name in ("conv_out.weight", "conv_out.bias"):
        weights[name] = np.concatenate([weights[name]] * 2)
    save_file(weights, model / UNET)


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (lambda model: shutil.rmtree(model), "does not exist"),
        (lambda model: (model / "unet" / "config.json").unlink(), "holds neither unet/config.json nor config.json"),
        (lambda model: (model / "unet" / "config.json").write_text("{"), "config.json is not valid JSON"),
        (lambda model: (model / "unet" / "config.json").write_text("[]"), "config.json holds a JSON list: expected an object"),
        (_config(_class_name="FluxTransformer2DModel"), "says _class_name 'FluxTransformer2DModel': expected one of UNet2DModel"),
        (_config(block_out_channels=[8]), "does not describe a UNet2DModel"),
        (_config(block_out_channels=[8, 24]), "has shape|lack|hold unexpected"),
        (_config(in_channels=4), "has shape .*: the config expects"),
        (_config(sample_size=None), "has no sample_size: set model.sample_shape"),
        (lambda model: shutil.rmtree(model / "scheduler"), "no scheduler config at"),
        (_scheduler(beta_schedule="sigmoid"), "says beta_schedule 'sigmoid': expected linear"),
        (_scheduler(prediction_type="flow"), "says prediction_type 'flow'"),
        (_scheduler(variance_type="learned_range"), "says a learned variance, which is not supported"),
        (_scheduler(num_train_timesteps="many"), "is not a usable scheduler config"),
        (lambda model: (model / UNET).unlink(), "has no weights: expected diffusion_pytorch_model.safetensors"),
        (_truncated, "is damaged or not safetensors"),
        (_lacking, "lack 1 tensors, such as 'conv_in.bias'"),
        (_nan, "weight 'conv_in.weight' of .* holds NaN or infinite values"),
        (_huge, "returns NaN or infinite values|runs into NaN or infinite values"),
        (_two_outputs, "returns 6 channels for 3: a learned variance is not supported"),
    ],
)
def test_models(model: Path, place: Path, refused: Callable[..., str], spoil: Callable[[Path], object], message: str) -> None:
    spoil(model)
    line = refused("build", model, "--out", place / "bundle", *SMALL)
    assert re.search(message, line), line


@pytest.mark.parametrize(
    ("code", "message"),
    [
        ("def make(:\n", "net.py:make failed: SyntaxError"),
        ("import nothing_of_this_name\n", "net.py:make failed: ModuleNotFoundError"),
        ("x = 1\n", "has no function 'make'"),
        ("def make():\n    return 3\n", "returned int: expected a torch.nn.Module"),
        ("from torch import nn\ndef make():\n    return nn.Conv2d(1, 1, 1)\n", "does not run on samples of shape \\(2, 8, 8\\)"),
    ],
)
def test_modules(tmp_path: Path, place: Path, refused: Callable[..., str], own: Built, code: str, message: str) -> None:
    folder = tmp_path / "module"
    shutil.copytree(own.recipe, folder)
    (folder / "net.py").write_text(code)
    line = refused("build", folder, "--out", place / "bundle", *SMALL)
    assert re.search(message, line), line


# --- targets ---


def test_targets_of_build(classes: Built, place: Path, refused: Callable[..., str]) -> None:
    (place / "file").write_text("x")
    (place / "holiday").mkdir()
    (place / "holiday" / "photo.jpg").write_text("x")
    for target, message in {
        place / "file": "is a file: give a folder for the bundle",
        place / "file" / "below": "cannot write to",
        place / "holiday": "is a folder with other things in it",
        Path("/proc/bundle"): "cannot write to /proc",
        Path("/sys/some/bundle"): "cannot write to /sys",
    }.items():
        assert message in refused("build", classes.recipe, "--out", target, *SMALL)


def test_the_current_folder_is_no_target(classes: Built, place: Path, refused: Callable[..., str], monkeypatch: pytest.MonkeyPatch) -> None:
    """Not even where an older bundle stands in it: it would be exchanged under the feet of whoever works there."""
    monkeypatch.chdir(place / "bundle")
    for target in (".", "..", "../bundle", place):
        assert "is the current folder or one above it" in refused("build", classes.recipe, "--out", target, *SMALL)


def test_targets_of_run_and_plot(classes: Built, place: Path, refused: Callable[..., str]) -> None:
    (place / "file").write_text("x")
    for target in (place / "file", place / "file" / "below", Path("/proc/pictures"), Path("/sys/pictures")):
        assert f"cannot write to the folder {target}" in refused("run", classes.path, "--out", target, "--num-samples", "1")
    assert "cannot write /proc/plot.png" in refused("inspect", classes.path, "--plot", "/proc/plot.png")


# --- full disks ---


def test_a_disk_that_fills_up_in_the_trajectories(rgb: Built, place: Path, refused: Callable[..., str]) -> None:
    with full_disk(4096):
        for out in (place / "bundle", place / "new" / "deep"):
            line = refused("build", rgb.recipe, "--out", out, *SMALL)
            assert "cannot write" in line and "File too large" in line and "free some space" in line


@pytest.mark.parametrize("limit", [5000, 12_000, 20_000])
def test_a_disk_that_fills_up_later(own: Built, place: Path, invoke: Invoke, limit: int) -> None:
    """In the weights or one of the graphs: the bundle is as it was, and what is left is whole and taken up by the next build."""
    out, work = place / "bundle", place / "bundle.work"
    before = listing(out)
    words = ("build", own.recipe, "--out", out, *own.options, "--seed", "3", "--batch-size", "1")
    with full_disk(limit):
        line = invoke(*words).error
    assert "cannot write" in line or "cannot be written" in line or "cannot be loaded" in line, line
    assert listing(out) == before
    assert {path.name for path in place.iterdir()} == {"bundle", "bundle.work"}
    kept = {name: stamp for name, stamp in listing(work).items() if not (work / name).is_dir()}
    assert len(kept) == 6 + 6 and all(name.endswith(".safetensors") for name in kept)
    for name in kept:
        load_file(work / name)
    with full_disk(limit):
        assert invoke(*words).error == line
    assert {name: listing(work)[name] for name in kept} == kept


def test_a_disk_that_fills_up_in_a_run(rgb: Built, place: Path, refused: Callable[..., str], invoke: Invoke) -> None:
    """Neither a part of the pictures nor a part of one; older pictures stay."""
    with full_disk(1500):  # single pictures fit, the grid does not
        line = refused("run", rgb.path, "--out", place / "new" / "pictures", "--num-samples", "9")
        assert "cannot write" in line and "grid.png: File too large" in line
    assert invoke("run", rgb.path, "--out", place / "old", "--num-samples", "2").code == 0
    with full_disk(1500):
        refused("run", rgb.path, "--out", place / "old", "--num-samples", "9", "--seed", "1")
        refused("run", rgb.path, "--out", place / "arrays", "--num-samples", "9", "--format", "npy")
        refused("inspect", rgb.path, "--plot", place / "plot.png")


# --- damaged and hostile bundles ---


@pytest.fixture
def bundle(tmp_path: Path, own: Built) -> Path:
    """A copy of a sound bundle, to be spoilt."""
    shutil.copytree(own.path, tmp_path / "spoilt")
    return tmp_path / "spoilt"


def test_a_flipped_byte_in_any_file(bundle: Path, place: Path, refused: Callable[..., str]) -> None:
    files = sorted(bundle.iterdir())
    assert len(files) == 16
    for file in files:
        sound = file.read_bytes()
        for position in (0, len(sound) // 3, len(sound) // 2, len(sound) - 1):
            file.write_bytes(sound[:position] + bytes([sound[position] ^ 1]) + sound[position + 1 :])
            for words in (("inspect", bundle), ("verify", bundle), ("run", bundle, "--out", place / "x", "--format", "npy")):
                line = refused(*words)
                assert file.name in line or (file.name == MANIFEST and str(bundle) in line), line
        file.write_bytes(sound)
    Bundle.open(bundle)


def test_any_flipped_byte_of_the_manifest(bundle: Path) -> None:
    """A digit of the schedule that turned into another is still JSON: the manifest holds its own hash."""
    file = bundle / MANIFEST
    sound = file.read_bytes()
    digit = sound.index(b"0.", sound.index(b"alphas_cumprod")) + 3
    for position in (digit, *range(7, len(sound), len(sound) // 150)):
        file.write_bytes(sound[:position] + bytes([sound[position] ^ 1]) + sound[position + 1 :])
        with pytest.raises(BundleError) as caught:
            Bundle.open(bundle)
        assert "\n" not in str(caught.value)
        if position == digit:
            assert "does not match its own SHA-256" in str(caught.value)


def test_a_file_that_is_gone_or_cut(bundle: Path, refused: Callable[..., str]) -> None:
    os.truncate(bundle / WEIGHTS, 100)
    assert "weights.safetensors has 100 bytes, the manifest says" in refused("verify", bundle)
    (bundle / WEIGHTS).unlink()
    assert "weights.safetensors is missing" in refused("verify", bundle)
    (bundle / MANIFEST).unlink()
    assert "is not a bundle: it has no manifest.json" in refused("verify", bundle)


def rewrite(bundle: Path, **changes: object) -> None:
    data = json.loads((bundle / MANIFEST).read_text())
    (bundle / MANIFEST).write_text(json.dumps(data | changes))


def test_manifests(bundle: Path, refused: Callable[..., str]) -> None:
    files = json.loads((bundle / MANIFEST).read_text())["files"]
    (bundle.parent / "secret").write_text("secret")
    for changes, message in (
        ({"format_version": 3}, "has format version 3, this ptqd-export reads 2: upgrade ptqd-export"),
        ({"format_version": 1}, "has format version 1, this ptqd-export reads 2: rebuild the bundle"),
        ({"format_version": None}, "has no format_version"),
        ({"files": {**files, "../secret": {"sha256": "0" * 64, "size": 6}}}, "names '../secret', which leaves the bundle: do not trust it"),
        ({"files": {**files, "/etc/hostname": {"sha256": "0" * 64, "size": 6}}}, "names '/etc/hostname', which leaves the bundle"),
        ({"schedule": {}}, "is damaged (KeyError"),
        ({"guidance": 1e300}, "does not match its own SHA-256"),
    ):
        sound = (bundle / MANIFEST).read_bytes()
        rewrite(bundle, **changes)
        assert message in refused("inspect", bundle)
        (bundle / MANIFEST).write_bytes(sound)
    (bundle / MANIFEST).write_text("[" * 100_000)
    assert "is not valid JSON" in refused("inspect", bundle)
    (bundle / MANIFEST).write_text('{"format_version": ' + "9" * 5000 + "}")
    assert "is not valid JSON" in refused("inspect", bundle)


def reseal(bundle: Path) -> None:
    """Give a changed bundle matching hashes, as an attacker would."""
    write_manifest(bundle, Manifest.from_dict(json.loads((bundle / MANIFEST).read_text())))


def _external(location: str) -> onnx.TensorProto:
    tensor = TensorProto(name="w", data_type=TensorProto.FLOAT, dims=[2], data_location=TensorProto.EXTERNAL)
    for key, value in (("location", location), ("offset", "0"), ("length", "8")):
        tensor.external_data.add(key=key, value=value)
    return tensor


def _in_initializer(graph: onnx.ModelProto, location: str) -> None:
    place = next(tensor for tensor in graph.graph.initializer if tensor.external_data)
    next(entry for entry in place.external_data if entry.key == "location").value = location


def _in_constant(graph: onnx.ModelProto, location: str) -> None:
    graph.graph.node.append(helper.make_node("Constant", [], ["unused"], value=_external(location)))


def _in_subgraph(graph: onnx.ModelProto, location: str) -> None:
    branch = helper.make_graph([helper.make_node("Identity", ["w"], ["r"])], "b", [], [helper.make_tensor_value_info("r", 1, [2])])
    branch.initializer.append(_external(location))
    graph.graph.node.append(helper.make_node("If", ["c"], ["unused"], then_branch=branch, else_branch=branch))


def _in_function(graph: onnx.ModelProto, location: str) -> None:
    node = helper.make_node("Constant", [], ["y"], value=_external(location))
    graph.functions.append(helper.make_function("custom", "f", [], ["y"], [node], [helper.make_opsetid("", 21)]))


@pytest.mark.parametrize("location", ["../secret", "{parent}/secret", "a/../../secret", "*/_ORT_MEM_ADDR_/*", "w8a8.bin", ""])
@pytest.mark.parametrize("put", [_in_initializer, _in_constant, _in_subgraph, _in_function])
def test_a_graph_reads_nothing_outside_its_bundle(bundle: Path, put: Callable[[onnx.ModelProto, str], None], location: str) -> None:
    """The hashes match, so only the graph itself tells. (w8a8.bin: a file in the folder that has no hash.)"""
    (bundle.parent / "secret").write_bytes(bytes(1 << 20))
    location = location.format(parent=bundle.parent)
    graph = onnx.load(bundle / "w8a8.ort-cpu.onnx", load_external_data=False)
    put(graph, location)
    (bundle / "w8a8.ort-cpu.onnx").write_bytes(graph.SerializeToString())
    reseal(bundle)
    (bundle / "w8a8.bin").write_bytes(bytes(1 << 20))
    with pytest.raises(BundleError, match=re.escape(f"takes weights from {location!r}, which is not a file of the bundle: do not trust it")):
        Bundle.open(bundle)


def test_a_hostile_graph_is_refused_unread(bundle: Path, tmp_path: Path, launch: Launch) -> None:
    """The file it names is a pipe: whoever opened it to read would wait for ever."""
    os.mkfifo(bundle.parent / "secret")
    graph = onnx.load(bundle / "w4a4.ort-cpu.onnx", load_external_data=False)
    _in_initializer(graph, "../secret")
    (bundle / "w4a4.ort-cpu.onnx").write_bytes(graph.SerializeToString())
    reseal(bundle)
    for words in (("run", bundle, "--out", tmp_path / "x", "--format", "npy"), ("verify", bundle), ("inspect", bundle)):
        process = launch(*words)
        printed, error = process.communicate(timeout=60)
        assert (process.returncode, printed) == (1, "")
        assert "takes weights from '../secret'" in error and error.count("\n") == 1
    assert not (tmp_path / "x").exists()


def test_graphs_that_are_none(bundle: Path, refused: Callable[..., str]) -> None:
    for content in (b"not a graph", b"\x3a\xff\xff\xff\xff\x7f", b"\x3a", b"\x0b\x0c", bytes(range(256))):
        (bundle / "w8a8.ort-cpu.onnx").write_bytes(content)
        reseal(bundle)
        assert "w8a8.ort-cpu.onnx is not an ONNX graph" in refused("inspect", bundle)
    (bundle / "w8a8.ort-cpu.onnx").write_bytes(b"")  # an empty message: a graph to protobuf, none to a runtime
    reseal(bundle)
    for workers in ("1", "2"):
        words = ("run", bundle, "--out", bundle.parent / "x", "--format", "npy", "--batch-size", "4", "--workers", workers)
        assert "w8a8.ort-cpu.onnx cannot be loaded by ONNX Runtime" in refused(*words)
    assert not (bundle.parent / "x").exists()


def test_tables_that_do_not_fit(bundle: Path, refused: Callable[..., str]) -> None:
    tables = load_file(bundle / TABLES)
    (bundle / TABLES).write_bytes(b"no tables")
    reseal(bundle)
    assert "tables.safetensors is damaged" in refused("inspect", bundle)
    save_file({name: table for name, table in tables.items() if name != "w4a8.ort-cpu.var"}, bundle / TABLES)
    reseal(bundle)
    assert "has no table w4a8.ort-cpu.var" in refused("run", bundle, "--out", bundle.parent / "x", "--format", "npy")
    save_file({name: table[:2] for name, table in tables.items()}, bundle / TABLES)
    reseal(bundle)
    assert "of shape (2, 2), expected (4, 2): rebuild" in refused("inspect", bundle)


def spoil_tables(bundle: Path, change: Callable[[dict[str, np.ndarray]], object]) -> None:
    tables = load_file(bundle / TABLES)
    change(tables)
    save_file(tables, bundle / TABLES)
    reseal(bundle)


def test_an_engine_that_computes_something_else_here(bundle: Path, refused: Callable[..., str]) -> None:
    """What another processor's kernels would do is done to the probe instead: shifted by a little more, and a little less, than is allowed."""
    words = ("run", bundle, "--out", bundle.parent / "x", "--format", "npy", "--batch-size", "4", "--num-samples", "8", "--workers")
    key = "w4a8.ort-cpu.probe"
    noise, sound = load_file(bundle / TABLES)[f"{key}_noise"][0], load_file(bundle / TABLES)[key]
    spoil_tables(bundle, lambda t: t.update({key: sound + np.float32(1.02 * noise)}))
    for line in (refused("verify", bundle), refused(*words, "1"), refused(*words, "2")):
        assert re.search(
            r"w4a8.ort-cpu computes something else here than where the bundle was built \(RMS difference .*, allowed .*\): "
            r"this processor, or the runtime's version, differs: rebuild the bundle on this machine",
            line,
        )
    assert not (bundle.parent / "x").exists()
    spoil_tables(bundle, lambda t: t.update({key: sound + np.float32(0.98 * noise)}))
    assert verify_engines(Bundle.open(bundle))[0]


def test_a_bundle_without_probes(bundle: Path, refused: Callable[..., str]) -> None:
    tables = load_file(bundle / TABLES)
    for name in ("probe", "probe_noise"):
        spoil_tables(bundle, lambda t, name=name: (t.update(tables), t.pop(f"w4a8.ort-cpu.{name}")))
        for words in (("verify", bundle), ("run", bundle, "--out", bundle.parent / "x", "--format", "npy")):
            assert f"has no table w4a8.ort-cpu.{name}: rebuild the bundle" in refused(*words)
        spoil_tables(bundle, lambda t, name=name: t.update({f"w4a8.ort-cpu.{name}": np.zeros((1, 3))}))
        assert "of shape (1, 3), expected" in refused("verify", bundle)


def test_nonsense_is_not_written(bundle: Path, refused: Callable[..., str]) -> None:
    """A graph of infinite weights: no samples with NaN in them, and nothing in the folder."""
    weights = load_file(bundle / WEIGHTS)
    for name, value in weights.items():
        if value.dtype == np.float32:
            weights[name] = np.full_like(value, 1e38)
    save_file(weights, bundle / WEIGHTS)
    reseal(bundle)
    line = refused("run", bundle, "--out", bundle.parent / "x", "--format", "npy", "--num-samples", "3")
    assert "returns NaN, infinite values" in line
    assert not (bundle.parent / "x").exists()
    assert "returns NaN, infinite values" in refused("verify", bundle)
