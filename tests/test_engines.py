"""Finished engines in bundles: real TensorRT-RTX builds, which need no GPU; running one, over a fake GPU where that is said."""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import subprocess
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from conftest import Built, Invoke, Launch, full_disk, has_gpu
from fake_cuda import FakeCuda, FakeTensorRT
from safetensors.numpy import load_file

from ptqd_export.backends import trt
from ptqd_export.backends.trt import Report, Settings
from ptqd_export.build import build
from ptqd_export.bundle import MANIFEST, QUANTIZATION, Bundle, sha256_file, working, write_manifest
from ptqd_export.calibrate import collect, observe, open_model, quantize
from ptqd_export.engines import rebuild
from ptqd_export.errors import BundleError, RecipeError
from ptqd_export.export import export_fp, exported_layers, fold, lower, quantized_nodes, save
from ptqd_export.export import quantize as insert_qdq
from ptqd_export.manifest import Artifact, Manifest, name_of
from ptqd_export.quant import Emission
from ptqd_export.recipe import Recipe
from ptqd_export.runtime import Runtime, choose_backend
from ptqd_export.schedule import NoiseSchedule

pytest.importorskip("tensorrt_rtx")

RTX = "tensorrt-rtx"
SEVERAL = ("fp32", "fp16", "w8a8", "w4a8", "w4a4", "w8a8-fp8", "w4a16")
REFERENCE = Path(__file__).parents[1] / "calib" / "fashion_mnist"


needs_no_gpu = pytest.mark.skipif(has_gpu(), reason="says what happens where there is no GPU")
needs_proc = pytest.mark.skipif(not Path("/proc/self/stat").exists(), reason="looks for processes in /proc")
NO_GPU = re.compile(
    r"Error: (the bundle has its engines for [a-z-]+ now, but they do not run here: )?"
    r"(no NVIDIA GPU that CUDA can use here|a GPU needs cuda-bindings) .*\n"
)


@pytest.fixture(autouse=True)
def caches(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The user's cache folder, for this test alone."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "caches"))
    return tmp_path / "caches" / "ptqd-export"


@pytest.fixture(scope="session")
def several(tmp_path_factory: pytest.TempPathFactory, guided: Built, invoke: Invoke) -> Built:
    """The guided model (noise in every step, two rows a sample) with engines of all kinds of precisions for all GPUs."""
    words = (word for p in SEVERAL for word in ("--precision", p))
    options = (*words, "--plan", "w8a8,w4a4,w8a8-fp8", "--backend", RTX, "--backend", "ort-cpu")
    path = tmp_path_factory.mktemp("engines") / "several"
    result = invoke("build", guided.recipe, "--out", path, *options, "--json")
    assert (result.code, result.err) == (0, ""), result
    return Built(guided.recipe, options, path, result.json)


def _artifacts(bundle: Bundle) -> dict[str, Artifact]:
    """Those with engines, by precision."""
    return {name_of(a.precision): a for a in bundle.manifest.artifacts if a.backend == RTX}


def _content(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}


# What is built


def test_every_precision_has_an_engine(several: Built) -> None:
    bundle = several.bundle
    m, found = bundle.manifest, _artifacts(bundle)
    assert set(found) == {*SEVERAL, "update"} and m.backends == (RTX, "ort-cpu")
    bits = {key.removesuffix("/bits"): b for key, b in load_file(bundle.file(QUANTIZATION)).items() if key.endswith("/bits")}
    for name, artifact in found.items():
        made = artifact.build
        assert made is not None and artifact.file == f"{name}.{RTX}.engine" and bundle.file(artifact.file).stat().st_size > 100_000
        assert artifact.runtime == trt.runtime_version(RTX)
        assert has_gpu() or artifact.time_ms is None
        graph, plan = m.graph(artifact.precision, Emission.HALF), made.plan
        in_8_bits = [b for key, b in bits.items() if key.startswith(f"{name}/") and b[1] <= 8]
        assert plan["meant"] == plan["taken"] == len(graph.quantized) == len(in_8_bits), plan["fell_back"]
        assert plan["fell_back"] == {} and plan["kernels"] > 0
        assert (plan["meant"] > 0) == (name in ("w8a8", "w4a8", "w4a4", "w8a8-fp8"))
        assert made.settings["rows"] == [2, 16, 64]  # tensorrt.batch_sizes, twice for guidance
        targets = {tuple(map(int, target.split("."))) for target in made.targets}
        assert min(targets) == ((8, 9) if name == "w8a8-fp8" else (7, 5)) and (8, 9) in targets
    assert found["w8a8-fp8"].lowering == "E4M3 x E4M3 at layer inputs, float16 in between"
    assert found["w4a16"].lowering == "float16; weights stored as packed INT4"
    assert {"int8", "fp8"} == {dtype for graph in m.graphs for dtype in graph.quantized.values()}
    keys = [artifact.build.key for artifact in found.values() if artifact.build is not None]
    assert len(set(keys)) == len(keys)


def test_inspect_shows_the_plans(several: Built, invoke: Invoke) -> None:
    text = invoke("inspect", several.path).out
    found = _artifacts(several.bundle)
    for name, artifact in found.items():
        assert artifact.build is not None
        plan = artifact.build.plan
        row = re.search(rf"^{name}\.{RTX} +(\d+ of \d+|-) +(\d+) +([\d.]+) +([\d.]+) +(\d+)  (.*)$", text, re.MULTILINE)
        assert row is not None, text
        assert row[1] == (f"{plan['taken']} of {plan['meant']}" if plan["meant"] else "-") and int(row[2]) == plan["kernels"]
        assert row[6] == ", ".join(artifact.build.targets) and int(row[5]) > 50
        assert abs(float(row[4]) * 1e6 - several.path.joinpath(artifact.file).stat().st_size) <= 5e4  # a tenth of a megabyte is shown
    assert "fell back" not in text
    told = {a["precision"]: a for a in invoke("inspect", several.path, "--json").json["manifest"]["artifacts"] if a["backend"] == RTX}
    assert {name: a["build"]["plan"] for name, a in told.items()} == {n: dict(a.build.plan) for n, a in found.items() if a.build is not None}


def test_inspect_shows_what_fell_back(several: Built, tmp_path: Path, invoke: Invoke) -> None:
    bundle = _copy(several, tmp_path)

    def fall_back(artifact: Artifact) -> Artifact:
        assert artifact.build is not None
        plan = {**artifact.build.plan, "taken": 1, "meant": 2, "fell_back": {"mid.conv": "float16"}}
        return replace(artifact, build=replace(artifact.build, plan=plan))

    _change(bundle, "w8a8", fall_back)
    text = invoke("inspect", bundle).out
    assert re.search(rf"^w8a8\.{RTX} +1 of 2 .*\n    mid\.conv fell back: it runs in float16$", text, re.MULTILINE)


@dataclass(frozen=True)
class Trial:
    """An engine built for its plan: what the builder says, and the nodes of every layer of the plan."""

    report: Report
    layers: tuple[frozenset[str], ...]


def _trials(source: Path, folder: Path, precisions: tuple[str, ...], inputs: str = "") -> dict[str, Trial]:
    """Plans of a model's half-precision graphs as "<precision>.<tables>": none, "plain", those of the correction, and with the sample's too."""
    changes: dict[str, Any] = {
        "sampler": {"n_steps": 2},
        "calibration": {"size": 4, "held_out": 2},
        "quantization": {"precisions": precisions, "rounding": "nearest"},
    }
    recipe = Recipe.load(source).override(**changes)
    network = open_model(recipe)
    schedule = NoiseSchedule.from_config(network.scheduler_config, 2, recipe.sampler.eta, recipe.sampler.solver)
    base = export_fp(network.module, network.info)
    observed = observe(network, schedule, recipe, collect(network, schedule, recipe, folder / "trajectories"))
    one, rng = np.ones((2, network.info.channels)), np.random.default_rng(0)
    gain, offset, of_sample = (rng.uniform(0.5, 1.5, one.shape) for _ in range(3))
    models = {}
    for p in recipe.precisions:
        net = quantize(network, observed, p, recipe).only(exported_layers(base))
        graph = lower(insert_qdq(base, net, Emission.HALF), Emission.HALF, p)
        models |= {f"{p}.plain": fold(graph, one, 0 * one), f"{p}.correction": fold(graph, gain, offset)}
        models |= {f"{p}.sample": fold(graph, gain, offset, of_sample)}
    save(models, folder)
    trials = {}
    for name, model in models.items():
        log = folder / f"{name}.log"
        graph, settings = folder / f"{name}.onnx", Settings((1, 2, 4), ("8.9",))
        report = trt.build(RTX, graph, folder / "e.engine", settings, quantized=quantized_nodes(model), log=log)
        plan = [line for line in log.read_text(errors="replace").splitlines() if ", LayerType: " in line and "Metadata: " in line]
        trials[name] = Trial(report, tuple(frozenset(re.findall(r"\[ONNX Layer: (.*?)\]", line.rpartition("Metadata: ")[2])) for line in plan))
    return trials


@pytest.fixture(scope="session")
def reference(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Trial]:
    """The reference model."""
    return _trials(REFERENCE, tmp_path_factory.mktemp("reference"), ("w8a8", "w4a4"))


@pytest.fixture(scope="session")
def cross(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Trial]:
    """A latent model with cross attention, as of text-to-image models."""
    import torch
    from diffusers import DDIMScheduler, UNet2DConditionModel

    folder = tmp_path_factory.mktemp("models") / "cross"
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        UNet2DConditionModel(
            sample_size=16, block_out_channels=(32, 64), cross_attention_dim=32, attention_head_dim=8, norm_num_groups=8, layers_per_block=1,
            down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"), up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"),
        ).save_pretrained(folder / "unet")  # fmt: skip
    DDIMScheduler().save_pretrained(folder / "scheduler")
    text = '[model]\nsource = "."\ninputs = [{name = "encoder_hidden_states", dtype = "float32", shape = [5, 32]}]\n'
    (folder / "recipe.toml").write_text(text)
    return _trials(folder, tmp_path_factory.mktemp("cross"), ("w8a8-fp8", "w4a16"))


@pytest.mark.parametrize("model", ["reference", "cross"])
def test_the_tables_add_no_kernel(model: str, request: pytest.FixtureRequest) -> None:
    """Correction, and v- and x0-prediction besides: all that they do is done in one kernel, which is there without them too."""
    trials: dict[str, Trial] = request.getfixturevalue(model)
    for name, trial in trials.items():
        p, tables = name.split(".")
        plan, plain = trial.report.plan, trials[f"{p}.plain"]
        assert plan.meant == plan.taken and plan.fell_back == {} and (plan.meant > 0) == (p != "w4a16"), name
        assert plan.kernels == plain.report.plan.kernels and plan.types == plain.report.plan.types, name
        with_tables = [nodes for nodes in trial.layers if any("ptqd." in node and "ptqd.zero" not in node for node in nodes)]
        names = {"plain": (), "correction": ("gain", "offset"), "sample": ("gain", "offset", "sample_gain")}[tables]
        assert len(with_tables) == (tables != "plain"), name
        for table in names:
            assert any(f"ptqd.{table}.row" in node for node in with_tables[0]) and any(f"ptqd.{table}.applied" in node for node in with_tables[0])


def test_a_kernel_more_is_seen(several: Built, tmp_path: Path) -> None:
    """A convolution of the output cannot be done in the kernel that makes it: it is counted."""
    bundle = _copy(several, tmp_path)
    model = onnx.load(bundle / "w8a8.half.onnx", load_external_data=False)
    graph = model.graph
    graph.initializer.append(onnx.numpy_helper.from_array(np.full((1, 1, 3, 3), 0.1, np.float32), "blur.weight"))
    graph.node.append(onnx.helper.make_node("Conv", ["epsilon", "blur.weight"], ["blurred"], "blur", pads=[1, 1, 1, 1]))
    graph.output[0].name = "blurred"
    onnx.save(model, bundle / "more.onnx")
    kernels = []
    for name in ("w8a8.half", "more"):
        engine, log = tmp_path / "e.engine", tmp_path / "e.log"
        made = trt.build(RTX, bundle / f"{name}.onnx", engine, Settings((1, 2, 4), ("8.9",)), quantized={}, log=log)
        kernels.append(made.plan.kernels)
    assert kernels[1] > kernels[0]


# What is built again


def test_only_what_changed_is_built_again(classes: Built, tmp_path: Path, launch: Launch) -> None:
    """By keys that another folder and another process give too."""
    said: list[str] = []

    def built(precisions: tuple[str, ...], capability: str, plan: str) -> tuple[Bundle, dict[str, bytes], dict[str, str], list[str]]:
        sections: dict[str, Any] = {
            "sampler": {"n_steps": 2},
            "calibration": {"size": 2, "held_out": 2},
            "quantization": {"precisions": precisions},
            "plan": {"rule": "fixed", "steps": (plan,)},
            "tensorrt": {"compute_capabilities": (capability,)},
        }
        said.clear()
        bundle = build(Recipe.load(classes.recipe).override(**sections, backends=(RTX,)), tmp_path / "bundle", say=said.append)
        found = _artifacts(bundle)
        engines = {name: bundle.file(a.file).read_bytes() for name, a in found.items()}
        return bundle, engines, {n: a.build.key for n, a in found.items() if a.build}, sorted(s for s in said if s.startswith("engine "))

    _, first, keys, told = built(("w8a8",), "8.9", "w8a8*2")
    assert [re.sub(r"[\d.]+ (s|MB)", r"# \1", line) for line in told] == [
        f"engine update.{RTX}: # s, # MB",
        f"engine w8a8.{RTX}: {told[1].split()[2]} of {told[1].split()[2]} layers in 8 bits, # s, # MB",
    ]
    bundle, second, more, told = built(("w8a8", "w4a8"), "8.9", "w8a8*2")
    assert {name: second[name] for name in first} == first and {name: more[name] for name in keys} == keys
    assert [line for line in told if "unchanged" in line] == [f"engine {n}.{RTX}: unchanged, not built again" for n in ("update", "w8a8")]
    assert len(told) == 3

    options = ("--n-steps", "2", "--calib-size", "2", "--precision", "w8a8", "--precision", "w4a8", "--plan", "w8a8*2")
    words = ("build", classes.recipe, "--out", tmp_path / "other", *options, "--backend", RTX, "--compute-capability", "8.9")
    process = launch(*words, PYTHONHASHSEED="12")
    out, error = process.communicate(timeout=300)
    assert (process.returncode, error) == (0, ""), out
    other = _artifacts(Bundle.open(tmp_path / "other"))
    assert {name: a.build.key for name, a in other.items() if a.build is not None} == more
    graphs = {(g.precision, g.emission): g.digest for g in bundle.manifest.graphs}
    assert graphs == {(g.precision, g.emission): g.digest for g in Bundle.open(tmp_path / "other").manifest.graphs}

    changed, third, newer, told = built(("w8a8",), "8.6", "w8a8*2")
    assert not any("unchanged" in line for line in told) and not set(newer.values()) & set(more.values())
    assert third["w8a8"] != second["w8a8"] and all(a.build is not None and a.build.targets == ("8.6",) for a in _artifacts(changed).values())


# Rebuilding


def _copy(built: Built, folder: Path) -> Path:
    shutil.copytree(built.path, folder / "place" / "bundle")
    return folder / "place" / "bundle"


def _reseal(bundle: Path, change: Callable[[dict[str, Any]], object] = lambda data: None) -> None:
    """Give a changed bundle matching hashes."""
    data = json.loads((bundle / MANIFEST).read_text())
    change(data)
    write_manifest(bundle, Manifest.from_dict(data))


def _change(bundle: Path, name: str, change: Callable[[Artifact], Artifact]) -> None:
    m = Bundle.open(bundle).manifest
    artifacts = tuple(change(a) if (name_of(a.precision), a.backend) == (name, RTX) else a for a in m.artifacts)
    write_manifest(bundle, replace(m, artifacts=artifacts))


@pytest.fixture
def place(own: Built, tmp_path: Path) -> Path:
    """A folder with a bundle that has no engines yet: plan w4a4, w4a8, w8a8, fp32."""
    _copy(own, tmp_path)
    return tmp_path / "place"


@needs_no_gpu
def test_rebuild_and_then_no_gpu(place: Path, own: Built, invoke: Invoke) -> None:
    """The engines are in the bundle, which holds everything else as before, and runs elsewhere as before."""
    before = _content(place / "bundle")
    words = ("--out", place.parent / "x", "--format", "npy", "--num-samples", "2")
    assert f"it was built for ort-cpu; build it here from the bundle's own graphs with `ptqd-export run ... --backend {RTX} --rebuild`" in (
        invoke("run", place / "bundle", "--backend", RTX, *words).error
    )
    assert NO_GPU.fullmatch(invoke("run", place / "bundle", "--backend", RTX, "--rebuild", *words).error)
    after = _content(place / "bundle")
    new = {f"{name}.{RTX}.engine" for name in ("fp32", "w8a8", "w4a8", "w4a4", "update")}
    assert set(after) == {*before, *new} and {path.name for path in place.iterdir()} == {"bundle"}
    assert all(after[name] == content for name, content in before.items() if name != MANIFEST)
    bundle = Bundle.open(place / "bundle")
    assert bundle.manifest.backends == (RTX, "ort-cpu")
    assert {**bundle.manifest.to_dict(), "artifacts": 0, "files": 0} == {**own.bundle.manifest.to_dict(), "artifacts": 0, "files": 0}
    assert invoke("verify", place / "bundle").code == 0
    assert f"w4a8.{RTX}" in invoke("inspect", place / "bundle").out
    for options in ((), ("--backend", "ort-cpu")):
        assert invoke("run", place / "bundle", *words, *options).code == 0
    assert invoke("run", own.path, *words).code == 0
    assert NO_GPU.fullmatch(invoke("run", place / "bundle", "--backend", RTX, *words).error)


@needs_no_gpu
def test_auto_passes_over_engines(several: Built, tmp_path: Path, invoke: Invoke) -> None:
    result = invoke("run", several.path, "--out", tmp_path / "x", "--num-samples", "3", "--json")
    assert (result.code, result.err) == (0, "")
    assert (result.json["backend"], result.json["state"], len(result.json["files"])) == ("ort-cpu", "float64 on the host", 3)
    assert NO_GPU.fullmatch(f"Error: {result.json['passed_over'][RTX]}\n") and "tensorrt" not in result.json["passed_over"]


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ((), "--rebuild builds engines of one backend: say which, as in --backend tensorrt-rtx"),
        (("--backend", "ort-cpu"), "backend ort-cpu loads the graphs as they are: leave out --rebuild, which is for tensorrt and tensorrt-rtx"),
    ],
)
def test_rebuild_of_nothing(place: Path, invoke: Invoke, words: tuple[str, ...], message: str) -> None:
    before = _content(place)
    assert message in invoke("run", place / "bundle", "--out", place / "x", "--format", "npy", "--rebuild", *words).error
    assert _content(place) == before


def test_a_batch_that_no_engine_takes(several: Built, tmp_path: Path, invoke: Invoke) -> None:
    words = ("run", several.path, "--backend", RTX, "--out", tmp_path / "x", "--num-samples", "50")
    line = invoke(*words, "--batch-size", "33").error
    assert f"33 samples per batch were asked for, but the {RTX} engines take at most 32: lower --batch-size" in line
    if not has_gpu():
        assert NO_GPU.fullmatch(invoke(*words, "--batch-size", "32").error)
    assert not (tmp_path / "x" / "00000.png").exists()


def test_rebuild_builds_what_it_holds_anew(place: Path) -> None:
    """An engine that its own key cannot tell from a sound one may be why it is asked for."""
    _reseal(place / "bundle", lambda data: data["plan"].update(steps=["fp32"] * 4))
    for _ in range(2):
        said: list[str] = []
        rebuild(Bundle.open(place / "bundle"), RTX, said.append)
        assert len(said) == 2 and not any("unchanged" in line for line in said)


def test_rebuild_keeps_what_was_there(several: Built, tmp_path: Path) -> None:
    """Also engines that the plan does not use; settings are the recipe's, out of range the defaults."""
    path, said = _copy(several, tmp_path), list[str]()
    _reseal(path, lambda data: data["provenance"]["recipe"].update(tensorrt={"batch_sizes": [1, 2, 3], "compute_capabilities": ["8.9"]}))
    before = _content(path)
    bundle = rebuild(Bundle.open(path), RTX, said.append)
    assert len(said) == len(SEVERAL) + 1
    assert all(a.build is not None and a.build.settings["rows"] == [2, 4, 6] and "8.9" in a.build.targets for a in _artifacts(bundle).values())
    after = _content(path)
    assert set(after) == set(before) and {n for n in after if after[n] != before[n]} == {MANIFEST, *(n for n in after if n.endswith(".engine"))}
    assert bundle.manifest.backends == (RTX, "ort-cpu")


@pytest.mark.parametrize("tensorrt", [None, {"batch_sizes": [3]}, {"batch_sizes": []}, {"compute_capabilities": ["\u202e"]}, [1]])
def test_rebuild_of_a_bundle_with_odd_settings(place: Path, tensorrt: object) -> None:
    _reseal(place / "bundle", lambda data: data["provenance"]["recipe"].update(tensorrt=tensorrt) or data["plan"].update(steps=["fp32"] * 4))
    made = _artifacts(rebuild(Bundle.open(place / "bundle"), RTX))
    assert set(made) == {"fp32", "update"} and all(a.build is not None and a.build.settings["rows"] == [2, 16, 64] for a in made.values())


def test_two_rebuilds_at_once(place: Path) -> None:
    before = _content(place)
    with working(place / "bundle"), pytest.raises(BundleError, match="is in use by another build: wait until"):
        rebuild(Bundle.open(place / "bundle"), RTX)
    assert _content(place) == before


def test_a_stopped_build_keeps_its_work(place: Path) -> None:
    stats = place / "bundle.work" / "stats-0.safetensors"
    stats.parent.mkdir()
    stats.write_bytes(b"of a build")
    rebuild(Bundle.open(place / "bundle"), RTX)
    assert [path.name for path in stats.parent.iterdir()] == [stats.name]


# Failures


class Stop(Exception):
    pass


def _stopped(place: Path, after: str) -> dict[str, tuple[Path, Path]]:
    """Rebuild until an engine is finished; {name of the engine: its file, its report} of what is left."""
    files: dict[str, tuple[Path, Path]] = {}
    seen: set[Path] = set()

    def say(line: str) -> None:
        (engine,) = set((place / "bundle.work" / "engines").glob("*.engine")) - seen
        seen.add(engine)
        files[line.split()[1].partition(".")[0]] = engine, engine.with_suffix(".json")
        if line.startswith(f"engine {after}."):
            raise Stop

    with pytest.raises(Stop):
        rebuild(Bundle.open(place / "bundle"), RTX, say)
    return files


def _cut(engine: Path, report: Path) -> None:
    os.truncate(engine, 1000)


def _flip(engine: Path, report: Path) -> None:
    data = bytearray(engine.read_bytes())
    data[len(data) // 2] ^= 1
    engine.write_bytes(data)


def _lose(engine: Path, report: Path) -> None:
    engine.unlink()


def _garble(engine: Path, report: Path) -> None:
    report.write_bytes(b'{"build": {"key": 3, "targets": null}, "sha256": []}')


def _empty(engine: Path, report: Path) -> None:
    report.write_bytes(b"")


def _mix_up(engine: Path, report: Path) -> None:
    """The engine and report of another graph, under this one's name."""
    other = next(path for path in engine.parent.glob("*.engine") if path != engine)
    shutil.copyfile(other, engine)
    shutil.copyfile(other.with_suffix(".json"), report)


@pytest.mark.parametrize("spoil", [None, _cut, _flip, _lose, _garble, _empty, _mix_up])
def test_what_a_stopped_build_left(place: Path, spoil: Callable[[Path, Path], None] | None) -> None:
    """Whole engines are taken up; others are built again, and never get into the bundle."""
    before = _content(place / "bundle")
    left = _stopped(place, "w8a8")
    assert list(left) == ["fp32", "w8a8"] and _content(place / "bundle") == before
    whole = {name: engine.read_bytes() for name, (engine, _) in left.items()}
    if spoil is not None:
        spoil(*left["w8a8"])
    spoilt = left["w8a8"][0].read_bytes() if left["w8a8"][0].exists() else b""
    said: list[str] = []
    bundle = rebuild(Bundle.open(place / "bundle"), RTX, said.append)
    taken = {line.split()[1].partition(".")[0] for line in said if line.endswith("unchanged, not built again")}
    assert taken == ({"fp32", "w8a8"} if spoil is None else {"fp32"})
    made = {name: bundle.file(f"{name}.{RTX}.engine").read_bytes() for name in whole}
    assert made["fp32"] == whole["fp32"]
    if spoil is None:
        assert made["w8a8"] == whole["w8a8"]
    else:
        assert made["w8a8"] != spoilt or spoil in (_garble, _empty)
        assert abs(len(made["w8a8"]) / len(whole["w8a8"]) - 1) < 0.01  # not the same bytes, but the same kernels
    assert {path.name for path in place.iterdir()} == {"bundle"}


def test_caches_that_are_damaged(place: Path, caches: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A file that is no cache, a file in the place of the folder, and no home at all."""
    _reseal(place / "bundle", lambda data: data["plan"].update(steps=["fp32"] * 4))
    caches.mkdir(parents=True)
    (caches / "tensorrt.timing").write_bytes(b"no timings")
    rebuild(Bundle.open(place / "bundle"), RTX)
    shutil.rmtree(caches)
    caches.write_bytes(b"")
    rebuild(Bundle.open(place / "bundle"), RTX)
    monkeypatch.delenv("XDG_CACHE_HOME")
    monkeypatch.setattr(Path, "home", _no_home)
    assert set(_artifacts(rebuild(Bundle.open(place / "bundle"), RTX))) == {"fp32", "update"}


def _no_home() -> Path:
    raise RuntimeError("Could not determine home directory.")


def _parent(pid: int) -> int:
    """0 where there is no such process any more."""
    try:
        state, parent = Path(f"/proc/{pid}/stat").read_text().rpartition(") ")[2].split()[:2]
    except OSError:
        return 0
    return 0 if state in "ZX" else int(parent)


def _wait(until: Callable[[], Any], what: str) -> Any:
    end = time.monotonic() + 120
    while not (found := until()):
        assert time.monotonic() < end, f"waited in vain until {what}"
        time.sleep(0.002)
    return found


def _builder(process: subprocess.Popen[str], work: Path, finished: int) -> int:
    """The builder that works after so many engines, stopped while it does."""

    def found() -> int:
        assert process.poll() is None, process.communicate()
        done = len(list(work.glob("engines/*.json"))) if work.exists() else 0
        if done < finished:
            return 0
        for pid in (int(path.name) for path in Path("/proc").iterdir() if path.name.isdecimal()):
            # Before exec it is a copy of its parent, which waits for it to become another.
            if _parent(pid) == process.pid and b"_child(request)" in Path(f"/proc/{pid}/cmdline").read_bytes():
                os.kill(pid, signal.SIGSTOP)
                return pid
        return 0

    return int(_wait(found, "a builder worked"))


@pytest.fixture
def start(place: Path, launch: Launch) -> Iterator[Callable[[], subprocess.Popen[str]]]:
    """`run --rebuild` as a process; whatever becomes of it, the bundle is as it was."""
    before = _content(place / "bundle")
    words = ("run", place / "bundle", "--backend", RTX, "--rebuild", "--out", place.parent / "x", "--format", "npy")
    yield lambda: launch(*words)
    assert _content(place / "bundle") == before
    Bundle.open(place / "bundle")
    assert not (place.parent / "x").exists()


@needs_proc
def test_the_builder_is_killed(place: Path, start: Callable[[], subprocess.Popen[str]]) -> None:
    process = start()
    os.kill(_builder(process, place / "bundle.work", 1), signal.SIGKILL)
    out, error = process.communicate(timeout=60)
    assert (process.returncode, out) == (1, "")
    found = re.fullmatch(r"Error: the builder of (\S+) was ended, most likely because memory ran out: .*; its log is (\S+)\n", error)
    assert found is not None, error
    assert found[1] == "w8a8.half.onnx" and Path(found[2]).is_file() and Path(found[2]).parent == place / "bundle.work" / "engines"
    assert {path.name for path in place.iterdir()} == {"bundle", "bundle.work"}
    assert not list(place.rglob(".*"))


@needs_proc
def test_ctrl_c_while_an_engine_is_built(place: Path, start: Callable[[], subprocess.Popen[str]]) -> None:
    process = start()
    builder = _builder(process, place / "bundle.work", 0)
    os.killpg(process.pid, signal.SIGINT)
    out, error = process.communicate(timeout=60)
    assert (process.returncode, out) == (130, "") and error.startswith("Error: interrupted: nothing was changed") and error.count("\n") == 1
    assert not _parent(builder)
    assert not list(place.rglob(".*"))


@needs_proc
def test_killed_while_an_engine_is_built(place: Path, tmp_path: Path, start: Callable[[], subprocess.Popen[str]]) -> None:
    process = start()
    builder = _builder(process, place / "bundle.work", 2)
    process.kill()
    process.wait(60)
    os.kill(builder, signal.SIGCONT)
    _wait(lambda: not _parent(builder), "the builder ended too")
    process.communicate()
    shutil.copytree(place, tmp_path / "again")
    said: list[str] = []
    bundle = rebuild(Bundle.open(tmp_path / "again" / "bundle"), RTX, said.append)
    assert [line.endswith("unchanged, not built again") for line in said] == [True, True, False, False, False]
    assert len(_artifacts(bundle)) == 5
    assert {path.name for path in (tmp_path / "again").iterdir()} == {"bundle"}


@needs_proc
def test_a_build_that_is_killed_and_resumed(classes: Built, tmp_path: Path, launch: Launch, invoke: Invoke) -> None:
    """`build`, over an older bundle: it stays until the new one is whole."""
    bundle = _copy(classes, tmp_path)
    before = _content(bundle)
    options = ("--n-steps", "2", "--calib-size", "2", "--precision", "w8a8", "--precision", "w4a8", "--plan", "w8a8,w4a8")
    words = ("build", classes.recipe, "--out", bundle, *options, "--backend", RTX, "--compute-capability", "8.9", "--json")
    process = launch(*words)
    builder = _builder(process, bundle.with_name("bundle.work"), 1)
    process.kill()
    os.kill(builder, signal.SIGCONT)
    _wait(lambda: not _parent(builder), "the builder ended too")
    process.communicate()
    assert _content(bundle) == before
    left = {sha256_file(path) for path in bundle.with_name("bundle.work").glob("engines/*.engine")}
    assert len(left) == 1
    result = invoke(*words)
    assert (result.code, result.err) == (0, "") and {a["precision"] for a in result.json["engines"]} == {"w8a8", "w4a8", "update"}
    assert left == {sha256_file(bundle / f"w8a8.{RTX}.engine")}
    assert {path.name for path in bundle.parent.iterdir()} == {"bundle"}
    assert Bundle.open(bundle).manifest.backends == (RTX,)


@pytest.mark.parametrize(
    ("limit", "message"),
    [(20_000, r"cannot write \S*/fp32\.tensorrt-rtx\.log: File too large"), (1_000_000, r"cannot write the engine of \d+ bytes into \S*engines")],
)
def test_a_disk_that_fills_up_under_the_builder(place: Path, invoke: Invoke, limit: int, message: str) -> None:
    before = _content(place / "bundle")
    with full_disk(limit):
        line = invoke("run", place / "bundle", "--backend", RTX, "--rebuild", "--out", place / "x", "--format", "npy").error
    assert re.search(message, line) and "free some space" in line
    assert _content(place / "bundle") == before
    assert {path.name for path in place.iterdir()} == {"bundle", "bundle.work"} and not list(place.rglob("*.engine"))


def test_a_disk_that_is_really_full(own: Built, tmp_path: Path, invoke: Invoke) -> None:
    """At every point of the road, and then with room enough; needs the right to mount."""
    disk = tmp_path / "disk"
    disk.mkdir()

    def mount(size: str, *options: str) -> bool:
        words = ["mount", "-t", "tmpfs", "-o", ",".join((*options, f"size={size}")), "none", str(disk)]
        return shutil.which("mount") is not None and subprocess.run(words, capture_output=True, check=False).returncode == 0

    if not mount("2m"):
        pytest.skip("no file system can be mounted here")
    try:
        shutil.copytree(own.path, disk / "bundle")
        before = _content(disk / "bundle")
        finished = []
        for size in ("2m", "6m"):
            assert mount(size, "remount")
            line = invoke("run", disk / "bundle", "--backend", RTX, "--rebuild", "--out", tmp_path / "x", "--format", "npy").error
            assert "cannot write" in line and "No space left on device" in line and "free some space" in line, line
            assert _content(disk / "bundle") == before and {path.name for path in disk.iterdir()} == {"bundle", "bundle.work"}
            finished.append({path.stem for path in disk.glob("bundle.work/engines/*.json") if path.stat().st_size})
        assert mount("200m", "remount")
        said: list[str] = []
        bundle = rebuild(Bundle.open(disk / "bundle"), RTX, said.append)
        assert sum("unchanged" in line for line in said) >= len(finished[-1]) >= len(finished[0])
        assert len(_artifacts(bundle)) == 5 and {path.name for path in disk.iterdir()} == {"bundle"}
    finally:
        subprocess.run(["umount", str(disk)], check=True)


REFUSED = '''
import torch
from torch import nn


class Refused(nn.Module):
    """A determinant: an operator that TensorRT does not have."""

    def __init__(self):
        super().__init__()
        self.inlet = nn.Conv2d(2, 16, 3, padding=1)
        self.middle = nn.Conv2d(16, 16, 3, padding=1)
        self.outlet = nn.Conv2d(16, 2, 3, padding=1)

    def forward(self, sample, timestep):
        h = self.middle(self.inlet(sample) + timestep[:, None, None, None] / 1000.0)
        return self.outlet(h) + 1e-6 * torch.linalg.det(sample)[:, :, None, None]


def make():
    return Refused()
'''


def test_a_graph_that_the_builder_refuses(tmp_path: Path, invoke: Invoke) -> None:
    (tmp_path / "net.py").write_text(REFUSED)
    (tmp_path / "scheduler_config.json").write_text("{}")
    model = '[model]\nsource = "net.py:make"\nsample_shape = [2, 8, 8]\nscheduler = "scheduler_config.json"\n'
    (tmp_path / "recipe.toml").write_text(model)
    options = ("--n-steps", "1", "--calib-size", "2", "--precision", "w8a8", "--backend", RTX, "--plan", "w8a8")
    line = invoke("build", tmp_path / "recipe.toml", "--out", tmp_path / "bundle", *options).error
    found = re.fullmatch(r"Error: tensorrt-rtx cannot read w8a8\.half\.onnx: node '.*' \(Det\): .*; the log is (\S+)\n", line)
    assert found is not None and Path(found[1]).is_file(), line
    assert not (tmp_path / "bundle").exists() and not list(tmp_path.glob(".bundle*"))


def test_a_gpu_that_the_library_does_not_know(place: Path) -> None:
    _reseal(place / "bundle", lambda data: data["provenance"]["recipe"].update(tensorrt={"compute_capabilities": ["9.0"]}))
    before = _content(place / "bundle")
    with pytest.raises(RecipeError, match=r"tensorrt\.compute_capabilities holds 9\.0: tensorrt_rtx .* knows 7\.5, "):
        rebuild(Bundle.open(place / "bundle"), RTX)
    assert _content(place / "bundle") == before


# Engines that do not fit


def _put(bundle: Path, content: bytes, **about: Any) -> None:
    """Other engines into a bundle, its hashes made to match."""
    for artifact in _artifacts(Bundle.open(bundle)).values():
        (bundle / artifact.file).write_bytes(content)
    _reseal(bundle, lambda data: [a.update(about) for a in data["artifacts"] if a["backend"] == RTX])


@needs_no_gpu
def test_an_engine_of_another_version_and_no_gpu(several: Built, tmp_path: Path, invoke: Invoke) -> None:
    """The GPU is what is missing first."""
    bundle = _copy(several, tmp_path)
    for name, artifact in _artifacts(Bundle.open(bundle)).items():
        file = bundle / artifact.file
        file.write_bytes(bytes(64) + file.read_bytes()[64:])
        with pytest.raises(BundleError, match=f"{name}.{RTX}.engine does not match its SHA-256"):
            Bundle.open(bundle)
        _reseal(bundle)
    assert NO_GPU.fullmatch(invoke("run", bundle, "--backend", RTX, "--out", tmp_path / "x").error)
    assert invoke("run", bundle, "--out", tmp_path / "x", "--num-samples", "1").code == 0


@pytest.fixture
def fake(monkeypatch: pytest.MonkeyPatch) -> FakeCuda:
    """A fake GPU of compute capability 8.9, and a fake of the library that runs engines; builders are processes of their own, and real."""
    from ptqd_export.backends import cuda

    fake_cuda = FakeCuda()
    monkeypatch.setattr(cuda, "runtime", lambda: fake_cuda)
    return fake_cuda


@pytest.fixture
def fake_library(fake: FakeCuda, monkeypatch: pytest.MonkeyPatch) -> FakeTensorRT:
    library = FakeTensorRT(fake)
    monkeypatch.setattr(trt, "load", lambda name: library)
    return library


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"old", "was built by another version of TensorRT"),
        (b"foreign", "was not built for this GPU"),
        (b"noise", "is damaged"),
    ],
)
def test_engines_that_do_not_fit(several: Built, tmp_path: Path, fake: FakeCuda, fake_library: FakeTensorRT, content: bytes, message: str) -> None:
    """Over a fake. `auto` runs something else instead, and says why."""
    path = _copy(several, tmp_path)
    _put(path, content, runtime="tensorrt-rtx 0.9")
    bundle = Bundle.open(path)
    built = ", ".join(_artifacts(bundle)["w8a8"].build.targets)  # type: ignore[union-attr]
    with pytest.raises(BundleError) as caught:
        Runtime(bundle, RTX)
    here = "this machine has fake_tensorrt 1.0 on Fake GPU (8.9): run with --rebuild"
    assert str(caught.value) == f"{path / f'w8a8.{RTX}.engine'} {message}: it was built by tensorrt-rtx 0.9 for {built}, {here}"
    name, passed_over = choose_backend(bundle)
    assert name == "ort-cpu" and f"{message}: it was built by tensorrt-rtx 0.9 for" in passed_over[RTX]
    assert fake.live() == {}


def test_rebuild_for_the_gpu_at_hand(place: Path, fake: FakeCuda) -> None:
    """It is added to those that the recipe names: a rebuild is what an engine that was not built for it asks for. (The GPU is a fake.)"""
    for named in (["8.6"], ["8.6", "8.9"]):
        change = {"tensorrt": {"compute_capabilities": named}}
        _reseal(place / "bundle", lambda data, change=change: data["provenance"]["recipe"].update(change))
        made = _artifacts(rebuild(Bundle.open(place / "bundle"), RTX))
        assert {a.build.targets for a in made.values() if a.build is not None} == {("8.6", "8.9")}


def test_the_cache_of_kernels(several: Built, tmp_path: Path, fake: FakeCuda, fake_library: FakeTensorRT, caches: Path) -> None:
    """One per engine, by its key, in the user's cache folder and nowhere else. Over a fake."""
    from ptqd_export.backends import open_device
    from ptqd_export.engines import open_artifact

    path = _copy(several, tmp_path)
    _put(path, b"good")
    bundle = Bundle.open(path)
    update = bundle.manifest.artifact(None, RTX)
    assert update.build is not None
    file = caches / f"{update.build.key}.kernels"
    for content in (None, b"garbage"):
        if content is not None:
            file.write_bytes(content)
        with open_device(RTX) as device, open_artifact(bundle, update, device):
            pass
        assert file.read_bytes() == b"cache+" and list(caches.iterdir()) == [file]


def test_a_library_that_is_not_there(place: Path, invoke: Invoke, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(trt.MODULES, RTX, "tensorrt_that_nobody_has")
    before = _content(place)
    line = invoke("run", place / "bundle", "--backend", RTX, "--rebuild", "--out", place / "x", "--format", "npy").error
    assert "backend tensorrt-rtx needs tensorrt_that_nobody_has, which is not installed: pip install 'ptqd-export[tensorrt-rtx]'" in line
    assert _content(place) == before and {path.name for path in place.iterdir()} == {"bundle"}


@needs_no_gpu
def test_a_damaged_engine_is_built_anew(several: Built, tmp_path: Path, invoke: Invoke) -> None:
    """It blocks every command but the one that cures it, and verify says what it did not look at."""
    path = _copy(several, tmp_path)
    said = invoke("verify", path, "--json").json
    assert said["ok"] and list(said["not_evaluated"]) == [f"{len(SEVERAL) + 1} {RTX} engines"]
    engine = path / f"w8a8.{RTX}.engine"
    engine.write_bytes(b"damaged")
    assert "the manifest says" in invoke("verify", path).error
    assert NO_GPU.fullmatch(invoke("run", path, "--backend", RTX, "--rebuild", "--out", tmp_path / "x", "--format", "npy").error)
    assert len(engine.read_bytes()) > 1000 and invoke("verify", path).code == 0
    (path / "w8a8.half.onnx").write_bytes(b"damaged")
    assert "w8a8.half.onnx has 7 bytes" in invoke("run", path, "--backend", RTX, "--rebuild", "--out", tmp_path / "x", "--format", "npy").error
