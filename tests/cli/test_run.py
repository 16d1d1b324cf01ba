"""run on the command line: what it writes, from what, and whose files it leaves alone."""

from __future__ import annotations

import hashlib
import json
import re
import time
from pathlib import Path

import numpy as np
import pytest
from helpers import Built, Invoke, content
from PIL import Image

from ptqd_export import __version__, runtime


@pytest.mark.parametrize("name", ["rgb", "classes", "guided"])
def test_run_writes_pictures_and_a_grid(
    name: str, request: pytest.FixtureRequest, tmp_path: Path, invoke: Invoke
) -> None:
    built: Built = request.getfixturevalue(name)
    m = built.bundle.manifest
    model = m.sampling.model
    words = ("--num-samples", "5", "--batch-size", "2")
    result = invoke("run", built.path, "--out", tmp_path / "a", *words, "--json")
    assert (result.code, result.err) == (0, "")
    channels, height, width = model.sample_shape
    names = [f"{i:05d}.png" for i in range(5)]
    assert result.json["files"] == names and result.json["grid"] == "grid.png"
    assert result.json["plan"] == str(m.plan) and result.json["state"] == "float64 on the host"
    assert sorted(path.name for path in (tmp_path / "a").iterdir()) == [*names, "grid.png", "run.json"]
    about = json.loads((tmp_path / "a" / "run.json").read_text())
    in_turn = [model.labels[i % len(model.labels)] for i in range(5)] if model.labels else None
    assert about["files"] == [*names, "grid.png"] and about["labels"] == in_turn
    assert about["versions"]["ptqd-export"] == __version__ and "onnxruntime" in about["versions"]
    assert (about["seed"], about["plan"], about["backend"]) == (0, str(m.plan), "ort-cpu")
    pictures = [np.asarray(Image.open(tmp_path / "a" / file)) for file in names]
    assert {p.shape for p in pictures} == {(height, width, 3) if channels == 3 else (height, width)}
    assert all((a != b).any() for i, a in enumerate(pictures) for b in pictures[:i])
    grid = np.asarray(Image.open(tmp_path / "a" / "grid.png"))
    columns = len(model.labels) or 2  # a column per class, or about as many as rows
    assert grid.shape[:2] == (-(-5 // columns) * height, columns * width)
    for i, picture in enumerate(pictures):
        top, left = i // columns * height, i % columns * width
        np.testing.assert_array_equal(grid[top : top + height, left : left + width], picture)

    again = invoke("run", built.path, "--out", tmp_path / "b", *words, "--seed", "0")
    assert (again.code, again.err) == (0, "") and "5 samples in" in again.out
    assert content(tmp_path / "a") == content(tmp_path / "b")
    other = invoke("run", built.path, "--out", tmp_path / "c", "--num-samples", "1", "--seed", "1")
    assert (
        other.code == 0
        and (tmp_path / "c" / names[0]).read_bytes() != (tmp_path / "a" / names[0]).read_bytes()
    )


def test_run_with_another_plan(rgb: Built, tmp_path: Path, invoke: Invoke) -> None:
    """At eta 1, with commas or spaces; run.json says which plan it was."""
    own = rgb.bundle.manifest.plan
    drawn = {}
    for name, plan in (("a", "fp32*1,w4a4*3"), ("b", "fp32 w4a4*3"), ("c", str(own))):
        result = invoke(
            "run", rgb.path, "--out", tmp_path / name, "--num-samples", "2", "--plan", plan, "--json"
        )
        assert (result.code, result.err) == (0, "")
        about = json.loads((tmp_path / name / "run.json").read_text())
        drawn[name] = content(tmp_path / name)
        assert about["plan"] == result.json["plan"] == (str(own) if name == "c" else "fp32*1 w4a4*3")
    assert drawn["a"] == drawn["b"] and drawn["a"]["00000.png"] != drawn["c"]["00000.png"]
    assert invoke("run", rgb.path, "--out", tmp_path / "d", "--num-samples", "2").code == 0
    assert content(tmp_path / "d") == drawn["c"]


@pytest.mark.parametrize(
    ("plan", "message"),
    [
        ("w8a8*3", "plan has 3 steps, the sampler 4"),
        ("w8a8*3,w6a6", "the plan asks for w6a6, but the bundle holds fp32, w8a8, w4a8, w4a4: "),
        ("int8*4", "precision 'int8' is not known: give fp32"),
        ("w8a8*x", "expected a precision with a count"),
        ("", "plan has 0 steps, the sampler 4"),
    ],
)
def test_a_plan_that_does_not_fit(
    rgb: Built, plan: str, message: str, invoke: Invoke, tmp_path: Path
) -> None:
    assert message in invoke("run", rgb.path, "--out", tmp_path / "x", "--plan", plan).error
    assert list(tmp_path.iterdir()) == []


def test_run_writes_arrays(own: Built, tmp_path: Path, invoke: Invoke) -> None:
    """Two channels are no picture: an array and no grid. Conditions come from files."""
    np.save(tmp_path / "context.npy", np.random.default_rng(0).standard_normal((3, 6)))
    words = ("--num-samples", "3", "--format", "npy", "--json")
    condition = ("--condition", f"context={tmp_path / 'context.npy'}")
    result = invoke("run", own.path, "--out", tmp_path / "a", *words, *condition)
    assert (result.code, result.err) == (0, ""), result
    assert result.json["files"] == ["samples.npy"] and result.json["grid"] is None
    x = np.load(tmp_path / "a" / "samples.npy")
    assert x.shape == (3, 2, 8, 8) and x.dtype == np.float32
    assert abs(x).max() == pytest.approx(result.json["largest_value"], rel=1e-6)
    plain = invoke("run", own.path, "--out", tmp_path / "b", *words)
    assert plain.code == 0 and abs(np.load(tmp_path / "b" / "samples.npy") - x).max() > 1e-3
    error = invoke("run", own.path, "--out", tmp_path / "c").error
    assert "samples of 2 channels are no pictures: give --format npy" in error
    assert not (tmp_path / "c").exists()


def test_run_json_names_the_bundle_and_the_conditions(own: Built, tmp_path: Path, invoke: Invoke) -> None:
    """By their hashes: those of other conditions differ."""
    values = np.random.default_rng(0).standard_normal((2, 6))
    found = []
    for name, value in (("a", values), ("b", values), ("c", values + 1), ("d", values.astype(np.float32))):
        np.save(tmp_path / f"{name}.npy", value)
        words = ("--num-samples", "2", "--format", "npy", "--condition", f"context={tmp_path / name}.npy")
        assert invoke("run", own.path, "--out", tmp_path / name, *words).code == 0
        found.append(json.loads((tmp_path / name / "run.json").read_text()))
    assert {about["bundle"] for about in found} == {own.bundle.seal}
    sums = [about["conditions"].pop("context") for about in found]
    assert all(about["conditions"] == {} for about in found)
    assert sums[0] == sums[1] and len(set(sums)) == 3 and all(re.fullmatch("[0-9a-f]{64}", s) for s in sums)
    assert invoke("run", own.path, "--out", tmp_path / "e", "--num-samples", "2", "--format", "npy").code == 0
    assert json.loads((tmp_path / "e" / "run.json").read_text())["conditions"] == {}


def test_the_bundle_s_hash_is_that_of_its_manifest(rgb: Built, own: Built) -> None:
    """Without the hash itself: zeros in its place. Another bundle has another."""
    for built in (rgb, own):
        text = (built.path / "manifest.json").read_text()
        seal = built.bundle.seal
        assert text.count(seal) == 1
        assert hashlib.sha256(text.replace(seal, "0" * 64).encode()).hexdigest() == seal
    assert rgb.bundle.seal != own.bundle.seal


def test_run_takes_labels(classes: Built, tmp_path: Path, invoke: Invoke) -> None:
    def pictures(labels: str | None, folder: str) -> np.ndarray:
        words = () if labels is None else ("--class-labels", labels)
        result = invoke(
            "run", classes.path, "--out", tmp_path / folder, "--num-samples", "6", "--format", "npy", *words
        )
        assert result.code == 0, result
        assert (tmp_path / folder / "grid.png").is_file()
        return np.asarray(np.load(tmp_path / folder / "samples.npy"))

    every = pictures(None, "a")
    np.testing.assert_array_equal(pictures("0-4", "b"), every)
    np.testing.assert_array_equal(pictures("0,1,2, 3 4", "c"), every)
    third = pictures("3", "d")
    assert [bool((third[i] == every[i]).all()) for i in range(6)] == [False, False, False, True, False, False]


def test_a_range_of_labels_is_refused_before_it_is_expanded(
    classes: Built, tmp_path: Path, invoke: Invoke
) -> None:
    """Twenty million numbers would take a second and most of a gigabyte; the last is more than could be
    held."""
    for last in ("20000000", "9" * 30):
        started = time.monotonic()
        line = invoke("run", classes.path, "--out", tmp_path / "x", "--class-labels", f"0-{last}").error
        assert time.monotonic() - started < 0.5
        assert f"class label {last[:20]}" in line and "is out of range: classes has classes 0 to 4" in line
    assert list(tmp_path.iterdir()) == []


def test_the_torch_backend_on_the_command_line(
    classes: Built, own: Built, tmp_path: Path, invoke: Invoke
) -> None:
    words = ("run", classes.path, "--num-samples", "3", "--format", "npy", "--backend", "torch")
    result = invoke(*words, "--out", tmp_path / "a", "--model", classes.recipe, "--json")
    assert (result.code, result.err) == (0, "") and result.json["backend"] == "torch"
    assert "give --model RECIPE_OR_MODEL" in invoke(*words, "--out", tmp_path / "b").error
    error = invoke(*words, "--out", tmp_path / "b", "--model", own.recipe).error
    assert "is not the model that" in error and "another SHA-256" in error
    assert "does not exist" in invoke(*words, "--out", tmp_path / "b", "--model", tmp_path / "nowhere").error
    assert not (tmp_path / "b").exists()


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (
            ["--n-steps", "7"],
            "n_steps 7 was asked for, but .* was measured for n_steps 4: "
            ".*rebuild with `ptqd-export build ... --n-steps 7`",
        ),
        (["--eta", "0.25"], "eta 0.25 was asked for, but .* was measured for eta 1.0: .*--eta 0.25`"),
        (
            ["--guidance-scale", "3"],
            "guidance_scale 3.0 was asked for, but .* was measured for guidance_scale 1.0: "
            ".*--guidance-scale 3.0`",
        ),
        (
            ["--solver", "ddpm"],
            "solver ddpm was asked for, but .* was measured for solver ddim: .*--solver ddpm`",
        ),
    ],
)
def test_another_setting_than_the_bundle_s_is_refused(
    rgb: Built, words: list[str], message: str, invoke: Invoke, tmp_path: Path
) -> None:
    assert re.search(message, invoke("run", rgb.path, "--out", tmp_path / "x", *words).error)
    assert list(tmp_path.iterdir()) == []


def test_the_bundle_s_own_setting_is_taken(rgb: Built, invoke: Invoke, tmp_path: Path) -> None:
    words = ("--n-steps", "4", "--eta", "1", "--guidance-scale", "1", "--solver", "ddim")
    assert invoke("run", rgb.path, "--out", tmp_path / "x", *words, "--num-samples", "1").code == 0


# --- the folder of the pictures


@pytest.fixture
def no_sampling(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Nothing is sampled: a run that would have come to it is noted."""
    came: list[str] = []

    def run(*arguments: object, **options: object) -> None:
        came.append("sampled")
        raise AssertionError("sampled")

    monkeypatch.setattr(runtime, "run", run)
    return came


def test_pictures_of_an_earlier_run_do_not_stay(classes: Built, tmp_path: Path, invoke: Invoke) -> None:
    """The whole set is replaced, also where some of it is gone by now, or was left by a killed older
    version."""
    out = tmp_path / "x"

    def run(*words: str) -> list[str]:
        result = invoke("run", classes.path, "--out", out, *words)
        assert (result.code, result.err) == (0, "")
        return sorted(path.name for path in out.iterdir())

    assert len(run("--num-samples", "5")) == 5 + 2
    (out / "00003.png").unlink()
    for leftover in (".00001.png.123.part", ".run.json.9.part", ".probe.123"):
        (out / leftover).write_text("")
    assert run("--num-samples", "1") == ["00000.png", "grid.png", "run.json"]
    assert run("--num-samples", "2", "--format", "npy") == ["grid.png", "run.json", "samples.npy"]
    assert [path.name for path in tmp_path.iterdir()] == ["x"]


@pytest.mark.parametrize(
    "theirs",
    [
        "notes.png",
        "00007.png",
        ".00007.png",
        ".notes.png.3.part",
        ".probe.txt",
        "below/photo.jpg",
        "grid.PNG",
    ],
)
def test_files_of_somebody_else_are_refused_before_any_sampling(
    classes: Built, tmp_path: Path, invoke: Invoke, no_sampling: list[str], theirs: str
) -> None:
    """Also those that look like a run's: run.json does not list them."""
    out = tmp_path / "x"
    (out / theirs).parent.mkdir(parents=True)
    (out / theirs).write_text("mine")
    about = {"files": ["00000.png", "grid.png"]}
    for run_json in (None, json.dumps(about)):
        if run_json is not None:
            (out / "run.json").write_text(run_json)
            (out / "00000.png").write_text("")
        before = content(tmp_path)
        line = invoke("run", classes.path, "--out", out, "--num-samples", "1").error
        assert (
            f"{theirs.split('/')[0]!a} is not of an earlier run (by its run.json): give another --out" in line
        )
        assert content(tmp_path) == before and no_sampling == []
    (out / theirs).rename(tmp_path / "moved")
    if "/" in theirs:
        (out / theirs).parent.rmdir()
    assert "sampled" in invoke("run", classes.path, "--out", out, "--num-samples", "1").error
    assert no_sampling == ["sampled"]


def test_a_run_json_that_lists_what_no_run_wrote(
    classes: Built, tmp_path: Path, invoke: Invoke, no_sampling: list[str]
) -> None:
    """Files of any other name, anywhere else, are not a run's, whatever it says; nor is a folder of that
    name."""
    out = tmp_path / "x"
    out.mkdir()
    (tmp_path / "secret.png").write_text("mine")
    (out / "00000.png").mkdir()
    (out / "00000.png" / "photo.jpg").write_text("mine")
    (out / "notes.png").write_text("mine")
    listed = ["../secret.png", "notes.png", str(out / "00007.png"), "00000.png", 3, "run.json", "grid.png"]
    (out / "run.json").write_text(json.dumps({"files": listed}))
    before = content(tmp_path)
    line = invoke("run", classes.path, "--out", out, "--num-samples", "1").error
    assert "'00000.png' is not of an earlier run" in line
    (out / "00000.png" / "photo.jpg").rename(tmp_path / "photo.jpg")
    (out / "00000.png").rmdir()
    assert "'notes.png' is not of" in invoke("run", classes.path, "--out", out, "--num-samples", "1").error
    (tmp_path / "photo.jpg").unlink()
    assert content(tmp_path) == {name: c for name, c in before.items() if "photo" not in name}
    assert no_sampling == []


@pytest.mark.parametrize("broken", ["[", "[]", '{"files": 3}', "[" * 100_000, "{}"])
def test_a_broken_run_json_vouches_for_nothing(
    classes: Built, tmp_path: Path, invoke: Invoke, no_sampling: list[str], broken: str
) -> None:
    """Not for itself either: it may be of another program."""
    (tmp_path / "x").mkdir()
    (tmp_path / "x" / "run.json").write_text(broken)
    for name in ("run.json", "00000.png"):
        (tmp_path / "x" / name).touch()
        before = content(tmp_path)
        line = invoke("run", classes.path, "--out", tmp_path / "x", "--num-samples", "1").error
        assert f"{min(before)[2:]!a} is not of an earlier run" in line
        assert content(tmp_path) == before
    assert no_sampling == []


def test_pictures_stay_out_of_bundles_and_models(
    classes: Built, tmp_path: Path, invoke: Invoke, no_sampling: list[str]
) -> None:
    for folder in (classes.path, classes.recipe):
        before = content(folder)
        line = invoke("run", classes.path, "--out", folder, "--num-samples", "1").error
        assert f"{folder} is a folder with other things in it" in line
        assert content(folder) == before
    (tmp_path / "grid.png").write_text("mine")
    line = invoke("run", classes.path, "--out", tmp_path, "--num-samples", "1").error
    assert "'grid.png' is not of an earlier run" in line
    assert (tmp_path / "grid.png").read_text() == "mine" and no_sampling == []


def test_what_came_into_the_folder_meanwhile_stays(
    classes: Built, tmp_path: Path, invoke: Invoke, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Sampling takes its time: the folder is looked at again before it is replaced."""
    out, sample = tmp_path / "x", runtime.run

    def run(*arguments: object, **options: object) -> object:
        (out / "notes.txt").write_text("mine")
        return sample(*arguments, **options)  # type: ignore[arg-type]

    assert invoke("run", classes.path, "--out", out, "--num-samples", "2").code == 0
    before = content(out)
    monkeypatch.setattr(runtime, "run", run)
    line = invoke("run", classes.path, "--out", out, "--num-samples", "1").error
    assert "'notes.txt' is not of an earlier run" in line
    assert content(out) == before | {"notes.txt": b"mine"}
    assert [path.name for path in tmp_path.iterdir()] == ["x"]


def test_a_failed_run_keeps_the_earlier_pictures(rgb: Built, tmp_path: Path, invoke: Invoke) -> None:
    assert invoke("run", rgb.path, "--out", tmp_path / "x", "--num-samples", "3").code == 0
    before = content(tmp_path)
    words = ("--num-samples", "1", "--class-labels", "0")
    assert "no classes" in invoke("run", rgb.path, "--out", tmp_path / "x", *words).error
    assert content(tmp_path) == before
