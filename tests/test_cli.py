"""The command line: what it prints and writes, and what it leaves alone."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
from conftest import PRECISIONS, Built, Invoke, Launch, environment
from PIL import Image

from ptqd_export import __version__, cli
from ptqd_export.bundle import Bundle
from ptqd_export.recipe import Recipe

HEAVY = ("torch", "diffusers", "onnx", "onnx_ir", "onnxscript", "scipy", "matplotlib")


@pytest.mark.parametrize("name", ["rgb", "classes", "guided"])
def test_run_writes_pictures_and_a_grid(name: str, request: pytest.FixtureRequest, tmp_path: Path, invoke: Invoke) -> None:
    built: Built = request.getfixturevalue(name)
    m = built.bundle.manifest
    result = invoke("run", built.path, "--out", tmp_path / "a", "--num-samples", "5", "--batch-size", "2", "--json")
    assert (result.code, result.err) == (0, "")
    channels, height, width = m.model.sample_shape
    names = [f"{i:05d}.png" for i in range(5)]
    assert result.json["files"] == names and result.json["grid"] == "grid.png"
    assert result.json["plan"] == str(m.plan) and result.json["state"] == "float64 on the host"
    assert sorted(path.name for path in (tmp_path / "a").iterdir()) == [*names, "grid.png", "run.json"]
    about = json.loads((tmp_path / "a" / "run.json").read_text())
    in_turn = [m.model.labels[i % len(m.model.labels)] for i in range(5)] if m.model.labels else None
    assert about["files"] == [*names, "grid.png"] and about["labels"] == in_turn and about["versions"]["ptqd-export"] == __version__
    assert (about["seed"], about["plan"], about["backend"]) == (0, str(m.plan), "ort-cpu") and "onnxruntime" in about["versions"]
    pictures = [np.asarray(Image.open(tmp_path / "a" / file)) for file in names]
    assert {p.shape for p in pictures} == {(height, width, 3) if channels == 3 else (height, width)}
    assert all((a != b).any() for i, a in enumerate(pictures) for b in pictures[:i])
    grid = np.asarray(Image.open(tmp_path / "a" / "grid.png"))
    columns = len(m.model.labels) or 2  # a column per class, or about as many as rows
    assert grid.shape[:2] == (-(-5 // columns) * height, columns * width)
    for i, picture in enumerate(pictures):
        top, left = i // columns * height, i % columns * width
        np.testing.assert_array_equal(grid[top : top + height, left : left + width], picture)

    again = invoke("run", built.path, "--out", tmp_path / "b", "--num-samples", "5", "--batch-size", "2", "--seed", "0")
    assert (again.code, again.err) == (0, "") and "5 samples in" in again.out
    assert all((tmp_path / "a" / file).read_bytes() == (tmp_path / "b" / file).read_bytes() for file in [*names, "grid.png", "run.json"])
    other = invoke("run", built.path, "--out", tmp_path / "c", "--num-samples", "1", "--seed", "1")
    assert other.code == 0 and (tmp_path / "c" / names[0]).read_bytes() != (tmp_path / "a" / names[0]).read_bytes()


def test_run_writes_arrays(own: Built, tmp_path: Path, invoke: Invoke) -> None:
    """Two channels are no picture: an array and no grid. Conditions come from files."""
    np.save(tmp_path / "context.npy", np.random.default_rng(0).standard_normal((3, 6)))
    words = ("--num-samples", "3", "--format", "npy", "--json")
    result = invoke("run", own.path, "--out", tmp_path / "a", *words, "--condition", f"context={tmp_path / 'context.npy'}")
    assert (result.code, result.err) == (0, ""), result
    assert result.json["files"] == ["samples.npy"] and result.json["grid"] is None
    x = np.load(tmp_path / "a" / "samples.npy")
    assert x.shape == (3, 2, 8, 8) and x.dtype == np.float32 and abs(x).max() == pytest.approx(result.json["largest_value"], rel=1e-6)
    plain = invoke("run", own.path, "--out", tmp_path / "b", *words)
    assert plain.code == 0 and abs(np.load(tmp_path / "b" / "samples.npy") - x).max() > 1e-3
    error = invoke("run", own.path, "--out", tmp_path / "c").error
    assert "samples of 2 channels are no pictures: give --format npy" in error
    assert not (tmp_path / "c").exists()


def test_pictures_of_an_earlier_run_do_not_stay(classes: Built, tmp_path: Path, invoke: Invoke) -> None:
    """Those that run.json lists, and nothing else."""
    out = tmp_path / "x"

    def run(*words: str) -> list[str]:
        result = invoke("run", classes.path, "--out", out, *words)
        assert (result.code, result.err) == (0, "")
        return sorted(path.name for path in out.iterdir())

    out.mkdir()
    for name in ("00007.png", "notes.png"):  # of somebody else
        (out / name).write_text("mine")
    assert len(run("--num-samples", "5")) == 2 + 5 + 2
    (out / "00003.png").unlink()
    (out / "00002.png").unlink()
    (out / "00002.png").mkdir()  # in the place of a picture: not one
    kept = ["00002.png", "00007.png", "grid.png", "notes.png", "run.json"]
    assert run("--num-samples", "1") == ["00000.png", *kept]
    about = json.loads((out / "run.json").read_text())
    (tmp_path / "secret.png").write_text("mine")
    (out / "run.json").write_text(
        json.dumps(about | {"files": ["../secret.png", "notes.png", str(out / "00007.png"), "00000.png", 3, "run.json", "grid.png"]})
    )
    assert run("--num-samples", "2", "--format", "npy") == [*kept, "samples.npy"]
    assert {(out / name).read_text() for name in ("00007.png", "notes.png")} == {(tmp_path / "secret.png").read_text()} == {"mine"}
    for broken in ("[", "[]", '{"files": 3}', "[" * 100_000):
        (out / "run.json").write_text(broken)
        assert "no earlier run wrote" in invoke("run", classes.path, "--out", out, "--num-samples", "1").error
    assert sorted(path.name for path in out.iterdir()) == [*kept, "samples.npy"]


def test_pictures_stay_out_of_bundles_and_models(classes: Built, tmp_path: Path, invoke: Invoke) -> None:
    for folder, name in ((classes.path, "manifest.json"), (classes.recipe, "unet")):
        before = sorted(path.name for path in folder.iterdir())
        assert f"holds {name}" in invoke("run", classes.path, "--out", folder, "--num-samples", "1").error
        assert sorted(path.name for path in folder.iterdir()) == before
    (tmp_path / "grid.png").write_text("mine")
    assert "grid.png that no earlier run wrote" in invoke("run", classes.path, "--out", tmp_path, "--num-samples", "1").error
    assert (tmp_path / "grid.png").read_text() == "mine"


def test_a_failed_run_keeps_the_earlier_pictures(rgb: Built, tmp_path: Path, invoke: Invoke) -> None:
    assert invoke("run", rgb.path, "--out", tmp_path / "x", "--num-samples", "3").code == 0
    before = {path.name: path.read_bytes() for path in (tmp_path / "x").iterdir()}
    assert "no classes" in invoke("run", rgb.path, "--out", tmp_path / "x", "--num-samples", "1", "--class-labels", "0").error
    assert {path.name: path.read_bytes() for path in (tmp_path / "x").iterdir()} == before


def test_run_takes_labels(classes: Built, tmp_path: Path, invoke: Invoke) -> None:
    def pictures(labels: str | None, folder: str) -> np.ndarray:
        words = () if labels is None else ("--class-labels", labels)
        result = invoke("run", classes.path, "--out", tmp_path / folder, "--num-samples", "6", "--format", "npy", *words)
        assert result.code == 0, result
        assert (tmp_path / folder / "grid.png").is_file()
        return np.asarray(np.load(tmp_path / folder / "samples.npy"))

    every = pictures(None, "a")
    np.testing.assert_array_equal(pictures("0-4", "b"), every)
    np.testing.assert_array_equal(pictures("0,1,2, 3 4", "c"), every)
    third = pictures("3", "d")
    assert [bool((third[i] == every[i]).all()) for i in range(6)] == [False, False, False, True, False, False]


def test_the_torch_backend_on_the_command_line(classes: Built, own: Built, tmp_path: Path, invoke: Invoke) -> None:
    words = ("run", classes.path, "--num-samples", "3", "--format", "npy", "--backend", "torch")
    result = invoke(*words, "--out", tmp_path / "a", "--model", classes.recipe, "--json")
    assert (result.code, result.err) == (0, "") and result.json["backend"] == "torch"
    assert "give --model RECIPE_OR_MODEL" in invoke(*words, "--out", tmp_path / "b").error
    error = invoke(*words, "--out", tmp_path / "b", "--model", own.recipe).error
    assert "is not the model that" in error and "another SHA-256" in error
    assert "does not exist" in invoke(*words, "--out", tmp_path / "b", "--model", tmp_path / "nowhere").error
    assert not (tmp_path / "b").exists()


def test_inspect(rgb: Built, invoke: Invoke, tmp_path: Path) -> None:
    result = invoke("inspect", rgb.path, "--json", "--plot", tmp_path / "steps.png")
    assert (result.code, result.err) == (0, "")
    m = rgb.bundle.manifest
    assert result.json["manifest"]["plan"]["steps"] == [str(p) for p in m.plan.steps]
    assert set(result.json["manifest"]["parity"]) == set(m.parity) and "files" not in result.json["manifest"]
    rows = result.json["steps"]
    assert [row["precision"] for row in rows] == ["w4a4", "w4a8", "w8a8", "fp32"]
    assert [row["timestep"] for row in rows] == m.schedule.timesteps.tolist()
    assert rows[3]["snr_q"] is None and rows[3]["k"] == 0 and not rows[3]["corrected"]
    for row, sigma, recalibrated in zip(rows, m.schedule.sigmas, rgb.bundle.sigmas("ort-cpu"), strict=True):
        assert (row["sigma"], row["sigma_recalibrated"]) == (sigma, recalibrated)
    assert 1 < rows[0]["snr_q"] < rows[1]["snr_q"] < rows[2]["snr_q"]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["steps-pareto.png", "steps.png"]
    text = invoke("inspect", rgb.path).out
    assert "rgb: 3x16x16, no classes, epsilon prediction" in text and "measured for: ddim, 4 steps, eta 1, guidance 1" in text
    assert all(any(line.split()[:2] == [p, "ort-cpu"] for line in text.splitlines()) for p in PRECISIONS)


def test_verify(guided: Built, invoke: Invoke) -> None:
    result = invoke("verify", guided.path, "--json")
    assert (result.code, result.err) == (0, "")
    assert result.json["ok"] and result.json["files"] == 15
    assert sorted(result.json["engines"]) == sorted(["update", *(f"{p}.{e}" for p in PRECISIONS for e in ("portable", "half", "ort-cpu"))])
    assert "15 files match their SHA-256" in invoke("verify", guided.path).out


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--n-steps", "7"], "n_steps 7 was asked for, but .* was measured for n_steps 4: .*rebuild with `ptqd-export build ... --n-steps 7`"),
        (["--eta", "0.25"], "eta 0.25 was asked for, but .* was measured for eta 1.0: .*--eta 0.25`"),
        (["--guidance-scale", "3"], "guidance_scale 3.0 was asked for, but .* was measured for guidance_scale 1.0: .*--guidance-scale 3.0`"),
        (["--solver", "ddpm"], "solver ddpm was asked for, but .* was measured for solver ddim: .*--solver ddpm`"),
    ],
)
def test_another_setting_than_the_bundle_s_is_refused(rgb: Built, words: list[str], message: str, invoke: Invoke, tmp_path: Path) -> None:
    assert re.search(message, invoke("run", rgb.path, "--out", tmp_path / "x", *words).error)
    assert list(tmp_path.iterdir()) == []


def test_the_bundle_s_own_setting_is_taken(rgb: Built, invoke: Invoke, tmp_path: Path) -> None:
    words = ("--n-steps", "4", "--eta", "1", "--guidance-scale", "1", "--solver", "ddim", "--num-samples", "1")
    assert invoke("run", rgb.path, "--out", tmp_path / "x", *words).code == 0


@pytest.fixture
def no_heavy(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A PYTHONPATH with which importing any of HEAVY fails."""
    folder = tmp_path_factory.mktemp("blocked")
    for name in HEAVY:
        (folder / f"{name}.py").write_text(f"raise ImportError('{name} is blocked')\n")
    return os.pathsep.join([str(folder), str(Path(__file__).parents[1])])


def test_the_torch_backend_without_torch(classes: Built, tmp_path: Path, launch: Launch, no_heavy: str) -> None:
    """The same line, whoever finds out."""
    for workers in ("1", "2"):
        words = ("run", classes.path, "--out", tmp_path / "x", "--backend", "torch", "--model", classes.recipe, "--batch-size", "2")
        process = launch(*words, "--workers", workers, PYTHONPATH=no_heavy)
        _, error = process.communicate(timeout=120)
        line = "Error: backend torch needs torch and diffusers (torch is blocked): pip install 'ptqd-export[build]'\n"
        assert (process.returncode, error) == (1, line)
    assert list(tmp_path.iterdir()) == []


def test_run_needs_no_heavy_package(rgb: Built, tmp_path: Path, launch: Launch, no_heavy: str) -> None:
    """In a process, and in its workers, where importing any of them fails."""
    path = no_heavy
    blocked = subprocess.run([sys.executable, "-c", "import torch"], env=environment(PYTHONPATH=path), capture_output=True, text=True)
    assert "torch is blocked" in blocked.stderr
    for workers in ("1", "2"):
        out = tmp_path / workers
        words = ("run", rgb.path, "--out", out, "--num-samples", "4", "--batch-size", "2", "--workers", workers, "--json")
        process = launch(*words, PYTHONPATH=path)
        printed, error = process.communicate(timeout=120)
        assert (process.returncode, error) == (0, "")
        assert json.loads(printed)["grid"] == "grid.png" and len(list(out.iterdir())) == 6
    assert all((tmp_path / "1" / f"{i:05d}.png").read_bytes() == (tmp_path / "2" / f"{i:05d}.png").read_bytes() for i in range(4))


def test_run_imports_no_heavy_package(rgb: Built, tmp_path: Path) -> None:
    """Though all of them are there."""
    code = f"""
import sys
from ptqd_export.cli import main
main(["run", {str(rgb.path)!r}, "--out", {str(tmp_path / "x")!r}, "--num-samples", "1"])
main(["inspect", {str(rgb.path)!r}])
main(["verify", {str(rgb.path)!r}])
print(sorted(set({HEAVY!r}) & set(sys.modules)))
main(["inspect", {str(rgb.path)!r}, "--plot", {str(tmp_path / "plot.png")!r}])
print(sorted(set({HEAVY!r}) & set(sys.modules)))
"""
    done = subprocess.run([sys.executable, "-c", code], env=environment(), capture_output=True, text=True, timeout=120)
    assert (done.returncode, done.stderr) == (0, "")
    found = [line for line in done.stdout.splitlines() if line.startswith("[")]
    assert found == ["[]", "['matplotlib']"]  # only a plot needs one, which the same check finds


def test_build_prints_one_object_and_is_quiet_when_piped(own: Built, tmp_path: Path, launch: Launch) -> None:
    process = launch("build", own.recipe, "--out", tmp_path / "b", "--precision", "w8a8", "--calib-size", "2", "--n-steps", "2", "--json")
    printed, error = process.communicate(timeout=300)
    assert (process.returncode, error) == (0, "")
    report = json.loads(printed)
    assert report["plan"] == "w8a8*2" and {e["precision"] for e in report["engines"]} == {"w8a8"}
    assert report["bytes"] == sum(file.stat().st_size for file in (tmp_path / "b").iterdir() if file.name != "manifest.json")


def test_debug_shows_the_traceback(tmp_path: Path, invoke: Invoke) -> None:
    result = invoke("inspect", tmp_path, "--debug")
    assert result.code == 1 and "Traceback (most recent call last)" in result.err
    assert result.err.splitlines()[-1] == invoke("inspect", tmp_path).error.rstrip("\n")


def test_an_unexpected_error_is_one_line(rgb: Built, invoke: Invoke, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(path: Path) -> Bundle:
        raise KeyError("a bug\nof two lines")

    monkeypatch.setattr(Bundle, "open", broken)
    line = invoke("verify", rgb.path).error
    assert re.fullmatch(r"Error: internal error: KeyError: .*bug.*\(run again with --debug for the traceback; please report it\)\n", line)
    assert "Traceback (most recent call last)" in invoke("verify", rgb.path, "--debug").err


def test_usage_errors_are_one_line(invoke: Invoke) -> None:
    assert "Missing argument 'RECIPE_OR_MODEL'" in invoke("build").error
    assert "--quick" in invoke("verify", "x", "--quick").error
    assert "'best' is not one of 'ddim', 'ddpm'" in invoke("build", "x", "--out", "y", "--solver", "best").error
    assert "No such command 'quantize'" in invoke("quantize").error
    result = invoke()
    assert result.code == 0 and "build" in result.out and result.err == ""


def test_output_that_cannot_be_written_is_one_line(rgb: Built) -> None:
    with Path("/dev/full").open("w") as full:
        words = [sys.executable, "-m", "ptqd_export", "inspect", str(rgb.path)]
        done = subprocess.run(words, env=environment(), stdout=full, stderr=subprocess.PIPE, text=True, timeout=60)
    assert done.returncode == 1 and done.stderr.splitlines()[0].startswith("Error: No space left on device")


def workers_of(process: subprocess.Popen[str]) -> list[int]:
    """The worker processes that have loaded the runtime."""
    children = Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()
    found = []
    for pid in children:
        try:
            # Between fork and exec a child has its parent's maps, but not yet its own arguments.
            if "onnxruntime" in Path(f"/proc/{pid}/maps").read_text() and "spawn_main" in Path(f"/proc/{pid}/cmdline").read_text():
                found.append(int(pid))
        except OSError:
            continue
    return found


@pytest.mark.parametrize("workers", ["1", "2"])
def test_ctrl_c_ends_a_run_with_one_line(rgb: Built, tmp_path: Path, launch: Launch, workers: str) -> None:
    out = tmp_path / "x"
    process = launch("run", rgb.path, "--out", out, "--num-samples", "100000", "--batch-size", "4", "--workers", workers)
    deadline = time.monotonic() + 120
    while not (out.is_dir() if workers == "1" else len(workers_of(process)) == 2):
        assert process.poll() is None and time.monotonic() < deadline
        time.sleep(0.01)
    os.killpg(process.pid, signal.SIGINT)
    printed, error = process.communicate(timeout=60)
    assert (process.returncode, printed) == (130, "")
    assert error.startswith("Error: interrupted") and error.count("\n") == 1
    assert list(tmp_path.iterdir()) == []


def test_a_dead_worker_is_one_line(rgb: Built, tmp_path: Path, launch: Launch) -> None:
    process = launch("run", rgb.path, "--out", tmp_path / "x", "--num-samples", "100000", "--batch-size", "4", "--workers", "2")
    deadline = time.monotonic() + 120
    while not (found := workers_of(process)):
        assert process.poll() is None and time.monotonic() < deadline
        time.sleep(0.01)
    os.kill(found[0], signal.SIGKILL)
    printed, error = process.communicate(timeout=60)
    assert (process.returncode, printed) == (1, "")
    assert error.startswith("Error: a worker process died") and error.count("\n") == 1
    assert list(tmp_path.iterdir()) == []


def test_build_options_reach_the_recipe() -> None:
    words = (
        "model --out o --precision w4a8 --precision fp32 --solver ddpm --n-steps 7 --calib-size 6 --batch-size 3 --seed 5 --budget 0.5 --cost bops"
    )
    words += " --plan w4a8*6,fp32 --correction affine --no-recalibrate-variance --backend ort-cuda --compute-capability 8.9"
    params = cli.build.make_context("build", words.split()).params
    for name in ("recipe_or_model", "out", "as_json", "resume"):
        params.pop(name)
    recipe = cli._override(Recipe(), **params)
    s, c, q, p = recipe.sampler, recipe.calibration, recipe.quantization, recipe.plan
    assert (s.solver, s.n_steps, s.eta) == ("ddpm", 7, 1.0)
    assert (c.size, c.held_out, c.batch_size, c.seed) == (6, 3, 3, 5)
    assert (q.precisions, q.correction, q.recalibrate_variance) == (("w4a8", "fp32"), "affine", False)
    assert (p.rule, p.steps, p.budget, p.cost, recipe.backends) == ("fixed", ("w4a8*6", "fp32"), 0.5, "bops", ("ort-cuda",))
    assert recipe.tensorrt.compute_capabilities == ("8.9",)
    assert cli._override(Recipe(), **{name: () if isinstance(value, tuple) else None for name, value in params.items()}) == Recipe()
