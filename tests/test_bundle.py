"""Bundles: round trip, atomic writing, and everything a damaged or hostile one is refused for."""

from __future__ import annotations

import contextlib
import json
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import save_file

from ptqd_export.bundle import MANIFEST, QUANTIZATION, SEAL, TABLES, WEIGHTS, Bundle, _seal, check_target, write_manifest, writing
from ptqd_export.conditioning import ModelInfo
from ptqd_export.errors import BundleError
from ptqd_export.manifest import Artifact, EngineBuild, Graph, Manifest
from ptqd_export.plan import Plan
from ptqd_export.precision import Precision
from ptqd_export.quant import Emission
from ptqd_export.schedule import NoiseSchedule

W8A8 = Precision(8, 8)
PLAN_INFO = {"rule": "fixed", "objective": "paired", "cost": "bops", "bops": 10, "bops_fp32": 40, "front": [], "timed_on": "ort-cpu"}
PARITY = {"fp32.ort-cpu": {"largest_relative_error": 1e-7}}


def write(path: Path, schedule: NoiseSchedule, info: ModelInfo, marker: str = "graph") -> None:
    """A bundle whose one graph is an ONNX model without nodes, by the producer `marker`."""
    t, c = len(schedule), info.channels
    with writing(path) as tmp:
        (tmp / "w8a8.ort-cpu.onnx").write_bytes(bytes([0x12, len(marker)]) + marker.encode())
        save_file({"w": np.arange(4.0)}, tmp / WEIGHTS)
        save_file({"s": np.arange(4.0)}, tmp / QUANTIZATION)
        table = np.full((t, c), 0.5)
        save_file(
            {f"w8a8.ort-cpu.{k}": table for k in ("gain", "offset", "e", "d", "ee", "ed", "dd")}
            | {f"w8a8.ort-cpu.{k}": np.full(t, 1e-3) for k in ("var", "count")},
            tmp / TABLES,
        )
        (tmp / "w8a8.tensorrt-rtx.engine").write_bytes(b"not opened")
        graph = Graph(W8A8, Emission.ORT_CPU, "w8a8.ort-cpu.onnx", "0" * 64, {"Conv": 3}, {"conv": "int8"})
        made = EngineBuild("1" * 64, ("8.9",), {"rows": [1, 8, 32]}, 1.5, 10**9, {"meant": 1, "taken": 1, "kernels": 9, "fell_back": {}})
        artifacts = (
            Artifact(W8A8, "ort-cpu", graph.file, "test", "none", 1.5),
            Artifact(W8A8, "tensorrt-rtx", "w8a8.tensorrt-rtx.engine", "test", "none", None, made),
        )
        manifest = Manifest(info, schedule, "ddim", 2.0, True, Plan((W8A8,) * t), PLAN_INFO, (graph,), artifacts, {}, PARITY, {W8A8: 10}, {}, {})
        write_manifest(tmp, manifest)


@pytest.fixture
def bundle(tmp_path: Path, schedule: NoiseSchedule, class_info: ModelInfo) -> Path:
    write(tmp_path / "bundle", schedule, class_info)
    return tmp_path / "bundle"


def edit(path: Path, **changes: object) -> None:
    data = json.loads((path / MANIFEST).read_text())
    data.update(changes)
    (path / MANIFEST).write_text(json.dumps(data))


def test_round_trip(bundle: Path, schedule: NoiseSchedule, class_info: ModelInfo) -> None:
    opened = Bundle.open(bundle)
    m = opened.manifest
    assert m.model == class_info
    np.testing.assert_array_equal(m.schedule.alphas_cumprod, schedule.alphas_cumprod)
    np.testing.assert_array_equal(m.schedule.timesteps, schedule.timesteps)
    assert m.plan.steps == (W8A8,) * len(schedule)
    assert m.artifact(W8A8, "ort-cpu").time_ms == 1.5
    assert m.backends == ("tensorrt-rtx", "ort-cpu")  # best first
    assert Manifest.from_dict(json.loads(json.dumps(m.to_dict()))).to_dict() == m.to_dict()
    np.testing.assert_array_equal(opened.correction(W8A8, Emission.ORT_CPU).gain, np.full((len(schedule), 1), 0.5))
    np.testing.assert_allclose(opened.sigmas("ort-cpu"), schedule.recalibrated_sigmas(np.full(len(schedule), 1e-3)))
    assert sorted(p.name for p in bundle.parent.iterdir()) == ["bundle"]


@pytest.mark.parametrize("name", ["w8a8.ort-cpu.onnx", WEIGHTS, QUANTIZATION, TABLES])
def test_a_flipped_byte_is_found(bundle: Path, name: str) -> None:
    data = bytearray((bundle / name).read_bytes())
    data[len(data) // 2] ^= 1
    (bundle / name).write_bytes(data)
    with pytest.raises(BundleError, match=f"{name}.*SHA-256"):
        Bundle.open(bundle)


def test_missing_and_truncated_files(bundle: Path) -> None:
    (bundle / WEIGHTS).write_bytes(b"x")
    with pytest.raises(BundleError, match="has 1 bytes"):
        Bundle.open(bundle)
    (bundle / WEIGHTS).unlink()
    with pytest.raises(BundleError, match="missing"):
        Bundle.open(bundle)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"format_version": 99}, "format version 99.*upgrade"),
        ({"format_version": 1}, "format version 1.*rebuild"),
        ({"format_version": "1"}, "no format_version"),
        ({"plan": {"steps": ["w8a8"], **PLAN_INFO}}, "1 plan steps for 10"),
        ({"plan": {}}, "damaged"),
        ({"schedule": 3}, "damaged"),
        ({"artifacts": [{}]}, "damaged"),
        ({"files": {}}, "no hash"),
    ],
)
def test_a_wrong_manifest_is_refused(bundle: Path, changes: dict[str, object], message: str) -> None:
    edit(bundle, **changes)
    with pytest.raises(BundleError, match=message):
        Bundle.open(bundle)


def test_not_json_and_not_there(bundle: Path, tmp_path: Path) -> None:
    (bundle / MANIFEST).write_bytes((bundle / MANIFEST).read_bytes()[:100])
    with pytest.raises(BundleError, match="not valid JSON"):
        Bundle.open(bundle)
    with pytest.raises(BundleError, match="not a bundle"):
        Bundle.open(tmp_path / "nothing")


def sealed(path: Path, change: Callable[[dict[str, Any]], object]) -> None:
    """Change a manifest and seal it again, as an attacker would."""
    data = json.loads((path / MANIFEST).read_text())
    change(data)
    content = json.dumps(data | {SEAL: "0" * 64}).encode()
    (path / MANIFEST).write_bytes(content.replace(b"0" * 64, _seal(content, "0" * 64).encode(), 1))


def test_a_sealed_manifest_opens(bundle: Path) -> None:
    """The helper of the next test is not what that one's manifests are refused for."""
    sealed(bundle, lambda m: m["model"].update(name="another"))
    assert Bundle.open(bundle).manifest.model.name == "another"


FILE = {"sha256": "0" * 64, "size": 1}
FIGURES = {"layers": {"layers": 3, "share_apart": 0.0}, "noise": {"limit_z": 5.0, "largest_z": {"k": 1.0}}}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda m: m["files"].update({"a\x00b": FILE}), r"control characters in 'a\\x00b'"),
        (lambda m: m["files"].update({"a\ud800b": FILE}), r"control characters in 'a\\ud800b'"),
        (lambda m: m["files"].update({"a" * 5000: FILE}), "cannot be read .OSError"),
        (lambda m: m["files"].update(x=3), "expected dict, got 3"),
        (lambda m: m["model"].update(name="a\n\x1b[2Jb"), "control characters"),
        (lambda m: m["model"].update(sample_shape=[1, 4]), "expected 3 positive dimensions"),
        (lambda m: m["model"].update(sample_shape=[1, 0, 4]), "expected 3 positive dimensions"),
        (lambda m: m["model"].update(sample_shape=[1, 1 << 15, 1 << 14]), "at most 268435456 elements"),
        (lambda m: m["model"].update(sample_shape="144"), "expected an array, got '144'"),
        (lambda m: m["model"]["inputs"][0].update(num_classes="x"), "num_classes: expected int, got 'x'"),
        (lambda m: m["model"]["inputs"][0].update(num_classes=10**10), "has 10000000000 classes: expected 1 to 1000000"),
        (lambda m: m["model"]["inputs"][0].update(num_classes=0), "has 0 classes"),
        (lambda m: m["model"]["inputs"][0].update(null_class=4), "null class 4 of 4"),
        (lambda m: m["model"]["inputs"][0].update(null_class=None), "has no null class"),  # guidance 2 has nothing to fall back to
        (lambda m: m["model"]["inputs"][0].update(dtype="float32"), "is no int64 number per sample"),
        (lambda m: m["model"]["inputs"][0].update(name="sample"), "two inputs of one name"),
        (lambda m: m["model"]["inputs"][0].update(colour="red"), "unknown key 'colour'"),
        (lambda m: m["model"]["inputs"].append({"name": "t", "dtype": "float32", "shape": [1 << 29]}), "at most 268435456 elements"),
        (lambda m: m["model"].update(inputs={}), "model.inputs: expected an array"),
        (lambda m: m["schedule"].update(timesteps=[[t] for t in m["schedule"]["timesteps"]]), "expected int, got \\[900\\]"),
        (lambda m: m["schedule"].update(timesteps=[-1, *m["schedule"]["timesteps"][1:]]), "a timestep is negative"),
        (lambda m: m["schedule"].update(timesteps=[2**70, *m["schedule"]["timesteps"][1:]]), "OverflowError"),
        (lambda m: m["schedule"].update(alphas_cumprod=[[0.5] * 10]), r"alphas_cumprod\[0\]: expected float"),
        (lambda m: m["schedule"].update(alphas_cumprod=[float("nan")] * 10), "a number is nan"),
        (lambda m: m["schedule"].update(alphas_cumprod=[0.5] * 9), "10 timesteps, 9 alphas_cumprod and 10"),
        (lambda m: m["schedule"].update(alphas_cumprod=[1.0] * 10), r"alphas_cumprod leaves \(0, 1\)"),
        (lambda m: m["schedule"].update(alphas_cumprod_prev=[0.0] * 10), r"alphas_cumprod_prev leaves \(0, 1\]"),
        (lambda m: m["schedule"].update(timesteps=[], alphas_cumprod=[], alphas_cumprod_prev=[]), "has 0 timesteps"),
        (lambda m: m["schedule"].update(eta=1.5), r"eta 1.5 leaves \[0, 1\]"),
        (lambda m: m["schedule"].update(eta=10**400), "OverflowError"),
        (lambda m: m["schedule"].update(clip_sample=-1), "clip_sample is -1"),
        (lambda m: m["schedule"].update(rederive_epsilon="no"), "rederive_epsilon: expected bool"),
        (lambda m: m["schedule"].update(prediction_type="flow"), "prediction_type 'flow'"),
        (lambda m: m["sampler"].update(guidance_scale=float("inf")), "a number is inf"),
        (lambda m: m["sampler"].update(solver="euler"), "solver: got 'euler'"),
        *(((lambda m, key=key: m["plan"].pop(key)), f"KeyError: '{key}'") for key in PLAN_INFO),
        (lambda m: m["plan"].update(bops_fp32=0), "bit operations 10.0 of 0.0"),
        (lambda m: m["plan"].update(bops="many"), "plan.bops: expected float, got 'many'"),
        (lambda m: m["plan"].update(front=[{"cost": 1.0}]), "KeyError: 'error'"),
        (lambda m: m["plan"].update(steps=[3] * 10), r"plan.steps\[0\]: expected str"),
        (lambda m: m["graphs"][0].update(emission="cuda"), "'cuda' is not a valid Emission"),
        (lambda m: m["graphs"][0].update(digest=3), "digest: expected str"),
        (lambda m: m["graphs"][0].update(ops={"Conv": "many"}), "ops: expected int"),
        (lambda m: m["graphs"][0].update(quantized={"conv": "int4"}), "quantized: got 'int4'"),
        (lambda m: m["graphs"][0].update(file="../x"), "names ../x but has no hash"),
        (lambda m: m["artifacts"][0].update(backend="vulkan"), "backend 'vulkan'"),
        (lambda m: m["artifacts"][0].update(backend=["ort-cpu"]), "TypeError"),
        (lambda m: m["artifacts"][0].update(time_ms="fast"), "time_ms: expected float"),
        (lambda m: m["artifacts"][1].update(build=None), "of tensorrt-rtx has no build"),
        (lambda m: m["artifacts"][0].update(build=m["artifacts"][1]["build"]), "of ort-cpu has a build"),
        (lambda m: m["artifacts"][1]["build"].update(key="../../x"), r"key '\.\./\.\./x'"),
        (lambda m: m["artifacts"][1]["build"].update(targets="8.9"), "targets: expected an array"),
        (lambda m: m["artifacts"][1]["build"].update(settings={}), "KeyError: 'rows'"),
        (lambda m: m["artifacts"][1]["build"].update(settings={"rows": [1, 2]}), "settings.rows"),
        (lambda m: m["artifacts"][1]["build"]["plan"].pop("kernels"), "KeyError: 'kernels'"),
        (lambda m: m["artifacts"][1]["build"]["plan"].update(fell_back={"conv": 1}), "plan.fell_back: expected str"),
        (lambda m: m.update(artifacts=[]), "no artifact that a backend runs"),
        (lambda m: m.update(correction=[]), "correction: expected dict"),
        (lambda m: m.update(provenance="me"), "provenance: expected dict"),
        (lambda m: m.update(parity={"w8a8": {}}), "KeyError: 'layers'"),
        (lambda m: m.update(parity={"w8a8": {**FIGURES, "layers": {"layers": 3}}}), "KeyError: 'share_apart'"),
        (lambda m: m.update(parity={"w8a8": {**FIGURES, "noise": {"limit_z": 5.0, "largest_z": {}}}}), "has no statistics"),
        (lambda m: m.update(parity={"w8a8": {"largest_relative_error": "small"}}), "expected float, got 'small'"),
        (lambda m: m.update(bops={"w8a8": None}), "bops: expected int"),
        (lambda m: m.update(bops={"int8": 3}), "precision 'int8' is not known"),
        (lambda m: m.update(files=[]), "AttributeError"),
        (lambda m: m["artifacts"][0].update(file="x" * 10**6), "names x{100} but has no hash"),
    ],
)
def test_a_hostile_manifest_is_one_line(bundle: Path, change: Callable[[dict[str, Any]], object], message: str) -> None:
    """With a right seal: the seal is no secret."""
    sealed(bundle, change)
    with pytest.raises(BundleError, match=message) as caught:
        Bundle.open(bundle)
    line = str(caught.value)
    assert "\n" not in line and len(line) < 800
    line.encode()


def test_a_manifest_of_any_depth_is_one_line(bundle: Path) -> None:
    """Whether the parser or a check of the package runs into the limit."""
    refused = 0
    for depth in (10, *range(800, 1100, 5), 100_000):
        sealed(bundle, lambda m: m.update(nested="here"))
        text = (bundle / MANIFEST).read_text()
        (bundle / MANIFEST).write_text(text.replace('"here"', "[" * depth + "]" * depth))
        with pytest.raises(BundleError, match=r"SHA-256|RecursionError|not valid JSON") as caught:
            Bundle.open(bundle)
        refused += "SHA-256" not in str(caught.value)
        (bundle / MANIFEST).write_text(text)
    assert refused > 1


def test_tables_that_are_none(bundle: Path) -> None:
    for tables, message in (({"a": np.array([np.nan])}, "table 'a' holds NaN"), ({"a": np.zeros(1)}, "no table w8a8.ort-cpu.gain")):
        save_file(tables, bundle / TABLES)
        write_manifest(bundle, Manifest.from_dict(json.loads((bundle / MANIFEST).read_text())))
        with pytest.raises(BundleError, match=message):
            Bundle.open(bundle).correction(W8A8, Emission.ORT_CPU)


def test_a_graph_s_numbers_end_after_ten_bytes(bundle: Path) -> None:
    """A number without end would grow for as long as the file is."""
    for content, message in ((b"\x08" + b"\x80" * 9 + b"\x01", None), (b"\x08" + b"\x80" * 10 + b"\x01", "more than ten bytes")):
        (bundle / "w8a8.ort-cpu.onnx").write_bytes(content)
        write_manifest(bundle, Manifest.from_dict(json.loads((bundle / MANIFEST).read_text())))
        with contextlib.nullcontext() if message is None else pytest.raises(BundleError, match=message):
            Bundle.open(bundle)


@pytest.mark.parametrize("name", ["../secret", "/etc/hostname", "a/../../secret", "..\\secret", ""])
def test_a_path_that_leaves_the_bundle_is_refused(bundle: Path, name: str) -> None:
    (bundle.parent / "secret").write_text("s")
    files = json.loads((bundle / MANIFEST).read_text())["files"]
    edit(bundle, files={**files, name: {"sha256": "0" * 64, "size": 1}})
    with pytest.raises(BundleError, match="leaves the bundle"):
        Bundle.open(bundle)


def test_a_link_is_refused(bundle: Path) -> None:
    target = bundle.parent / "outside"
    (bundle / WEIGHTS).rename(target)
    (bundle / WEIGHTS).symlink_to(target)
    with pytest.raises(BundleError, match="link"):
        Bundle.open(bundle)


def test_an_old_bundle_survives_a_failed_write_and_is_replaced_by_a_good_one(bundle: Path, schedule: NoiseSchedule, class_info: ModelInfo) -> None:
    before = {p.name: p.read_bytes() for p in bundle.iterdir()}
    with pytest.raises(OSError, match="full"), writing(bundle) as tmp:
        (tmp / "half").write_text("x")
        raise OSError("disk full")
    assert {p.name: p.read_bytes() for p in bundle.iterdir()} == before
    write(bundle, schedule, class_info, marker="new")
    assert (bundle / "w8a8.ort-cpu.onnx").read_bytes().endswith(b"new")
    assert sorted(p.name for p in bundle.parent.iterdir()) == ["bundle"]


def test_kill_leaves_the_old_bundle_and_the_next_writer_cleans_up(bundle: Path, schedule: NoiseSchedule, class_info: ModelInfo) -> None:
    before = {p.name: p.read_bytes() for p in bundle.iterdir()}
    code = f"""
import time
from pathlib import Path
from ptqd_export.bundle import writing
with writing(Path({str(bundle)!r})) as tmp:
    (tmp / "half").write_text("x")
    print("ready", flush=True)
    time.sleep(60)
"""
    process = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    assert process.stdout.readline() == "ready\n"
    process.send_signal(signal.SIGKILL)
    process.wait()
    process.stdout.close()
    assert {p.name: p.read_bytes() for p in bundle.iterdir()} == before
    assert len(list(bundle.parent.iterdir())) == 2
    write(bundle, schedule, class_info)
    assert sorted(p.name for p in bundle.parent.iterdir()) == ["bundle"]


def test_targets_that_must_not_be_written(tmp_path: Path, bundle: Path) -> None:
    assert check_target(bundle) == bundle
    assert check_target(tmp_path / "new" / ".." / "other") == tmp_path / "other"
    check_target(tmp_path / "new" / "deep")
    (tmp_path / "file").write_text("x")
    with pytest.raises(BundleError, match="is a file"):
        check_target(tmp_path / "file")
    (tmp_path / "holiday").mkdir()
    (tmp_path / "holiday" / "photo.jpg").write_text("x")
    with pytest.raises(BundleError, match="other things"):
        check_target(tmp_path / "holiday")
    with pytest.raises(BundleError, match="cannot write"):
        check_target(Path("/proc/nothing/bundle"))
    (tmp_path / "page").mkdir()
    for name in (MANIFEST, "index.html"):  # a manifest.json is no proof of a bundle
        (tmp_path / "page" / name).write_text("{}")
    (tmp_path / "loop").symlink_to(tmp_path / "loop")
    for odd, message in (("page", "other things"), ("loop", "cannot write"), ("a\0b", "cannot write"), ("a" * 300, "cannot write")):
        with pytest.raises(BundleError, match=message) as caught:
            check_target(tmp_path / odd)
        assert "\n" not in str(caught.value)


@pytest.mark.parametrize("target", [".", "", "..", "../..", "/", "below/..", "link"])
def test_the_current_folder_is_no_target(tmp_path: Path, bundle: Path, monkeypatch: pytest.MonkeyPatch, target: str) -> None:
    """Even where an older bundle stands in it."""
    (tmp_path / "link").symlink_to(bundle)
    (bundle / "link").symlink_to(bundle)
    monkeypatch.chdir(bundle)
    with pytest.raises(BundleError, match="is the current folder or one above it"):
        check_target(Path(target))


def test_asking_for_an_engine_that_is_not_there(bundle: Path) -> None:
    manifest = Bundle.open(bundle).manifest
    with pytest.raises(BundleError, match=r"no graph w4a8.ort-cpu: it holds w8a8.ort-cpu; rebuild it with --precision w4a8"):
        manifest.artifact(Precision(4, 8), "ort-cpu")
    with pytest.raises(BundleError, match=r"no engines for backend 'tensorrt'.*--backend tensorrt --rebuild"):
        manifest.artifact(W8A8, "tensorrt")
