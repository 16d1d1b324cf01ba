"""Bundles: round trip, and what one that is incomplete or from elsewhere is refused for."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from helpers import rewrite

from ptqd_export.bundle import Bundle, Manifest, check_target
from ptqd_export.bundle.bundle import MANIFEST, WEIGHTS
from ptqd_export.bundle.reading import Reader
from ptqd_export.bundle.tables import QUANTIZATION, TABLES
from ptqd_export.core.backend import Emission
from ptqd_export.core.model import ModelInfo
from ptqd_export.core.precision import Precision
from ptqd_export.core.schedule import NoiseSchedule
from ptqd_export.errors import BundleError, RecipeError

W8A8 = Precision(8, 8)


def test_round_trip(bundle: Path, schedule: NoiseSchedule, class_info: ModelInfo) -> None:
    opened = Bundle.open(bundle)
    m = opened.manifest
    assert m.sampling.model == class_info
    np.testing.assert_array_equal(m.sampling.schedule.alphas_cumprod, schedule.alphas_cumprod)
    np.testing.assert_array_equal(m.sampling.schedule.timesteps, schedule.timesteps)
    assert (m.sampling.guidance_scale, m.sampling.solver) == (2.0, "ddim")
    assert m.plan.steps == (W8A8,) * len(schedule)
    assert m.artifact(W8A8, "ort-cpu").time_ms == 1.5
    assert m.backends == ("tensorrt-rtx", "ort-cpu")  # best first
    assert [engine.name for engine in m.engines] == ["w8a8.tensorrt-rtx", "update.tensorrt-rtx"]
    assert Manifest.from_dict(json.loads(json.dumps(m.to_dict()))).to_dict() == m.to_dict()
    np.testing.assert_array_equal(
        opened.correction(W8A8, Emission.ORT_CPU).gain, np.full((len(schedule), 1), 0.5)
    )
    np.testing.assert_allclose(
        opened.sigmas("ort-cpu"), schedule.recalibrated_sigmas(np.full(len(schedule), 1e-3))
    )
    assert sorted(p.name for p in bundle.parent.iterdir()) == ["bundle"]


def test_the_manifest_s_first_entries_are_its_hash_and_its_format(bundle: Path) -> None:
    data = json.loads((bundle / MANIFEST).read_text())
    assert list(data)[:2] == ["sha256", "format_version"] and data["format_version"] == 5
    assert Bundle.open(bundle).seal == data["sha256"]


@pytest.mark.parametrize("name", ["w8a8.ort-cpu.onnx", "update.onnx", WEIGHTS, QUANTIZATION, TABLES])
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
        ({"format_version": 99}, "format version 99, this ptqd-export reads 5: upgrade ptqd-export"),
        ({"format_version": 3}, "format version 3, this ptqd-export reads 5: rebuild the bundle"),
        ({"format_version": 1}, "format version 1, this ptqd-export reads 5: rebuild the bundle"),
        ({"format_version": "1"}, "no format_version"),
        ({"plan": "w8a8*1"}, "1 plan steps for 10"),
        ({"plan": {}}, "damaged"),
        ({"sampling": 3}, "damaged"),
        ({"artifacts": [{}]}, "damaged"),
        ({"files": {}}, "no hash"),
    ],
)
def test_a_wrong_manifest_is_refused(bundle: Path, changes: dict[str, object], message: str) -> None:
    rewrite(bundle, **changes)
    with pytest.raises(BundleError, match=message) as caught:
        Bundle.open(bundle)
    assert "\n" not in str(caught.value)


def test_a_manifest_of_an_older_format_is_refused_whatever_it_holds(bundle: Path) -> None:
    """Nothing of it is read but its format: an older one has other entries."""
    old = {"format_version": 2, "model": {"name": "toy"}, "schedule": {}, "plan": {"steps": ["w8a8"]}}
    (bundle / MANIFEST).write_text(json.dumps(old))
    with pytest.raises(BundleError) as caught:
        Bundle.open(bundle)
    assert str(caught.value) == (
        f"{bundle} has format version 2, this ptqd-export reads 5: rebuild the bundle"
    )


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
    rewrite(bundle, files={**files, name: {"sha256": "0" * 64, "size": 1}})
    with pytest.raises(BundleError, match="which no bundle holds: do not trust it"):
        Bundle.open(bundle)


def test_links_are_followed_where_the_hashes_hold(bundle: Path, tmp_path: Path) -> None:
    """As a cache of downloads lays them: names that are links to files called by their content."""
    blobs, cache = tmp_path / "blobs", tmp_path / "snapshots" / "1"
    blobs.mkdir()
    cache.mkdir(parents=True)
    for i, file in enumerate(sorted(bundle.iterdir())):
        file.rename(blobs / str(i))
        (cache / file.name).symlink_to(Path("..", "..", "blobs", str(i)))
    assert Bundle.open(cache).manifest.plan == Bundle.open(cache).manifest.plan
    other = tmp_path / "other"
    other.write_bytes(bytes((cache / WEIGHTS).stat().st_size))
    (cache / WEIGHTS).unlink()
    (cache / WEIGHTS).symlink_to(other)
    with pytest.raises(BundleError, match="does not match its SHA-256"):
        Bundle.open(cache)
    for target, message in (
        ("/dev/zero", "no regular file"),
        (tmp_path, "no regular file"),
        ("gone", "missing"),
    ):
        (cache / WEIGHTS).unlink()
        (cache / WEIGHTS).symlink_to(target)
        with pytest.raises(BundleError, match=message):
            Bundle.open(cache)
    (cache / WEIGHTS).unlink()
    os.mkfifo(cache / WEIGHTS)
    with pytest.raises(BundleError, match="no regular file"):
        Bundle.open(cache)


def test_a_bundle_that_is_replaced_meanwhile(
    bundle: Path, write: Callable[..., Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    """While it is opened, and after: one line that says so, and never that it is damaged."""
    opened = Bundle.open(bundle)
    opened.check_unchanged()
    write("other")
    with pytest.raises(BundleError, match="was replaced or changed while it was being read: run the command"):
        opened.check_unchanged()
    with pytest.raises(BundleError, match="does not match its SHA-256"):
        opened.read(opened.manifest.graphs[0].file)
    check, done = Reader.check, []

    def replace_first(reader: Reader, name: str) -> None:
        if not done:
            done.append(write("a third"))
        check(reader, name)

    monkeypatch.setattr(Reader, "check", replace_first)
    first = Bundle.open(bundle)  # what is read after the exchange is the same in both
    with pytest.raises(BundleError, match="was replaced or changed"):
        first.check_unchanged()
    read = Reader.read

    def replace_before(reader: Reader, name: str) -> bytes:
        write(f"before {name}")
        return read(reader, name)

    monkeypatch.setattr(Reader, "read", replace_before)
    with pytest.raises(BundleError, match="was replaced while it was being read: run the command again"):
        Bundle.open(bundle)


def test_asking_for_an_engine_that_is_not_there(bundle: Path) -> None:
    manifest = Bundle.open(bundle).manifest
    with pytest.raises(
        BundleError, match=r"no graph w4a8.ort-cpu: it holds w8a8.ort-cpu; rebuild it with --precision w4a8"
    ):
        manifest.artifact(Precision(4, 8), "ort-cpu")
    with pytest.raises(BundleError, match=r"no engines for backend 'tensorrt'.*--backend tensorrt --rebuild"):
        manifest.artifact(W8A8, "tensorrt")
    with pytest.raises(BundleError, match=r"no engines for backend 'tensorrt'.*--backend tensorrt --rebuild"):
        manifest.update_engine("tensorrt")
    with pytest.raises(BundleError, match=r"no w4a8 engine for backend 'tensorrt-rtx'"):
        manifest.artifact(Precision(4, 8), "tensorrt-rtx")


def test_targets_that_must_not_be_written(tmp_path: Path, bundle: Path) -> None:
    assert check_target(bundle) == bundle
    assert check_target(tmp_path / "new" / ".." / "other") == tmp_path / "other"
    check_target(tmp_path / "new" / "deep")
    assert not (tmp_path / "new").exists()
    (tmp_path / "file").write_text("x")
    with pytest.raises(RecipeError, match="is a file"):
        check_target(tmp_path / "file")
    (tmp_path / "holiday").mkdir()
    (tmp_path / "holiday" / "photo.jpg").write_text("x")
    with pytest.raises(RecipeError, match="other things"):
        check_target(tmp_path / "holiday")
    with pytest.raises(RecipeError, match="cannot write"):
        check_target(Path("/proc/nothing/bundle"))
    (tmp_path / "page").mkdir()
    for name in (MANIFEST, "index.html"):  # a manifest.json is no proof of a bundle
        (tmp_path / "page" / name).write_text("{}")
    (tmp_path / "loop").symlink_to(tmp_path / "loop")
    for odd, message in (
        ("page", "other things"),
        ("loop", "cannot write"),
        ("a\0b", "cannot write"),
        ("a" * 300, "cannot write"),
    ):
        with pytest.raises(RecipeError, match=message) as caught:
            check_target(tmp_path / odd)
        assert "\n" not in str(caught.value)


@pytest.mark.parametrize("target", [".", "", "..", "../..", "/", "below/..", "link"])
def test_the_current_folder_is_no_target(
    tmp_path: Path, bundle: Path, monkeypatch: pytest.MonkeyPatch, target: str
) -> None:
    """Even where an older bundle stands in it."""
    (tmp_path / "link").symlink_to(bundle)
    (bundle / "link").symlink_to(bundle)
    monkeypatch.chdir(bundle)
    with pytest.raises(RecipeError, match="is the current folder or one above it"):
        check_target(Path(target))
