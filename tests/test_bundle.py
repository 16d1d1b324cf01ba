"""Bundles: round trip, atomic writing, and everything a damaged or hostile one is refused for."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import save_file

from ptqd_export.bundle import MANIFEST, QUANTIZATION, TABLES, WEIGHTS, Artifact, Bundle, Manifest, check_target, write_manifest, writing
from ptqd_export.conditioning import ModelInfo
from ptqd_export.errors import BundleError
from ptqd_export.plan import Plan
from ptqd_export.precision import Precision
from ptqd_export.quant import Emission
from ptqd_export.schedule import NoiseSchedule

W8A8 = Precision(8, 8)


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
        artifact = Artifact(W8A8, Emission.ORT_CPU, ("ort-cpu",), "w8a8.ort-cpu.onnx", "test", "none", {}, 1.5)
        manifest = Manifest(info, schedule, "ddim", 2.0, True, Plan((W8A8,) * t), {"rule": "fixed"}, (artifact,), {}, {}, {W8A8: 10}, {}, {})
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
        ({"format_version": "1"}, "no format_version"),
        ({"plan": {"steps": ["w8a8"]}}, "1 plan steps for 10"),
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
    check_target(bundle)
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


def test_asking_for_an_engine_that_is_not_there(bundle: Path) -> None:
    manifest = Bundle.open(bundle).manifest
    with pytest.raises(BundleError, match=r"no w4a8 engine.*holds ort-cpu"):
        manifest.artifact(Precision(4, 8), "ort-cpu")
    with pytest.raises(BundleError, match="--backend tensorrt"):
        manifest.artifact(W8A8, "tensorrt")
