"""What all commands share: usage, one line per failure, and what they need and load."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
from helpers import Built, Invoke, Launch, environment

from ptqd_export.bundle import Bundle
from ptqd_export.cli.common import in_one_line

HEAVY = ("torch", "diffusers", "onnx", "onnx_ir", "onnxscript", "scipy", "matplotlib")


@pytest.fixture
def no_heavy(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A PYTHONPATH with which importing any of HEAVY fails."""
    folder = tmp_path_factory.mktemp("blocked")
    for name in HEAVY:
        (folder / f"{name}.py").write_text(f"raise ImportError('{name} is blocked')\n")
    return os.pathsep.join([str(folder), environment()["PYTHONPATH"]])


def test_the_torch_backend_without_torch(
    classes: Built, tmp_path: Path, launch: Launch, no_heavy: str
) -> None:
    """The same line, whoever finds out."""
    for workers in ("1", "2"):
        words = (
            "run",
            classes.path,
            "--out",
            tmp_path / "x",
            "--backend",
            "torch",
            "--model",
            classes.recipe,
        )
        process = launch(*words, "--batch-size", "2", "--workers", workers, PYTHONPATH=no_heavy)
        _, error = process.communicate(timeout=120)
        line = (
            "Error: backend torch is not installed (torch is blocked): "
            "in a checkout of ptqd-export: pip install '.[build]'\n"
        )
        assert (process.returncode, error) == (1, line)
    assert list(tmp_path.iterdir()) == []


def test_build_without_torch(classes: Built, tmp_path: Path, launch: Launch, no_heavy: str) -> None:
    process = launch("build", classes.recipe, "--out", tmp_path / "x", PYTHONPATH=no_heavy)
    _, error = process.communicate(timeout=120)
    assert process.returncode == 1 and re.fullmatch(
        r"Error: build needs torch, diffusers and onnx \(\w+ is blocked\): "
        r"in a checkout of ptqd-export: pip install '\.\[build\]'\n",
        error,
    ), error
    assert list(tmp_path.iterdir()) == []


def test_run_needs_no_heavy_package(rgb: Built, tmp_path: Path, launch: Launch, no_heavy: str) -> None:
    """In a process, and in its workers, where importing any of them fails."""
    blocked = subprocess.run(
        [sys.executable, "-c", "import torch"],
        env=environment(PYTHONPATH=no_heavy),
        capture_output=True,
        text=True,
    )
    assert "torch is blocked" in blocked.stderr
    for workers in ("1", "2"):
        words = (
            "run",
            rgb.path,
            "--out",
            tmp_path / workers,
            "--num-samples",
            "4",
            "--batch-size",
            "2",
            "--backend",
            "ort-cpu",
        )
        process = launch(*words, "--workers", workers, "--json", PYTHONPATH=no_heavy)
        printed, error = process.communicate(timeout=120)
        assert (process.returncode, error) == (0, "")
        assert json.loads(printed)["grid"] == "grid.png" and len(list((tmp_path / workers).iterdir())) == 6
    assert all(
        (tmp_path / "1" / f"{i:05d}.png").read_bytes() == (tmp_path / "2" / f"{i:05d}.png").read_bytes()
        for i in range(4)
    )


def test_bench_needs_no_heavy_package(rgb: Built, launch: Launch, no_heavy: str) -> None:
    """But for what it times beside a bundle's engines."""
    words = ("bench", rgb.path, "--backend", "ort-cpu", "--batch-size", "1", "--rounds", "5", "--runs", "0")
    process = launch(*words, "--json", PYTHONPATH=no_heavy)
    printed, error = process.communicate(timeout=120)
    assert (process.returncode, error) == (0, "")
    assert {row["kind"] for row in json.loads(printed)["rows"]} == {"engine"}
    process = launch(*words, "--model", rgb.recipe, PYTHONPATH=no_heavy)
    _, error = process.communicate(timeout=120)
    line = r"Error: --model needs torch, diffusers and onnx \(\w+ is blocked\): in a checkout of .*\n"
    assert process.returncode == 1 and re.fullmatch(line, error), error


def test_run_imports_no_heavy_package(rgb: Built, tmp_path: Path) -> None:
    """Though all of them are there."""
    code = f"""
import sys
from ptqd_export.cli import main
words = ["--num-samples", "1", "--backend", "ort-cpu"]
main(["run", {str(rgb.path)!r}, "--out", {str(tmp_path / "x")!r}, *words])
main(["inspect", {str(rgb.path)!r}])
main(["verify", {str(rgb.path)!r}])
print(sorted(set({HEAVY!r}) & set(sys.modules)))
main(["inspect", {str(rgb.path)!r}, "--plot", {str(tmp_path / "plot.png")!r}])
print(sorted(set({HEAVY!r}) & set(sys.modules)))
"""
    done = subprocess.run(
        [sys.executable, "-c", code], env=environment(), capture_output=True, text=True, timeout=120
    )
    assert (done.returncode, done.stderr) == (0, "")
    found = [line for line in done.stdout.splitlines() if line.startswith("[")]
    assert found == ["[]", "['matplotlib']"]  # only a plot needs one, which the same check finds


def test_debug_shows_the_traceback(tmp_path: Path, invoke: Invoke) -> None:
    result = invoke("inspect", tmp_path, "--debug")
    assert result.code == 1 and "Traceback (most recent call last)" in result.err
    assert result.err.splitlines()[-1] == invoke("inspect", tmp_path).error.rstrip("\n")


def test_an_unexpected_error_is_one_line(rgb: Built, invoke: Invoke, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(path: Path) -> Bundle:
        raise KeyError("a bug\nof two lines")

    monkeypatch.setattr(Bundle, "open", broken)
    line = invoke("verify", rgb.path).error
    assert re.fullmatch(
        r"Error: internal error: KeyError: .*bug.*"
        r"\(run again with --debug for the traceback; please report it\)\n",
        line,
    )
    assert "Traceback (most recent call last)" in invoke("verify", rgb.path, "--debug").err


def test_what_is_known_of_other_errors() -> None:
    """Of a file, of memory, and of nothing that anybody foresaw."""
    missing = FileNotFoundError(2, "No such file or directory", "/a b/c")
    assert in_one_line(missing) == "No such file or directory: /a b/c: nothing was changed"
    for error in (MemoryError(), RuntimeError("DefaultCPUAllocator: can't allocate memory: 9 bytes")):
        assert re.fullmatch(
            r"out of memory \(.*\): lower --batch-size, or the number of samples", in_one_line(error)
        )
    assert in_one_line(RuntimeError("can't")).startswith("internal error: RuntimeError: can't (run again")


def test_usage_errors_are_one_line(invoke: Invoke) -> None:
    assert "nothing to build: give a recipe" in invoke("build").error
    assert "--quick" in invoke("verify", "x", "--quick").error
    assert (
        "'best' is not one of 'ddim', 'ddpm'" in invoke("build", "x", "--out", "y", "--solver", "best").error
    )
    assert "No such command 'quantize'" in invoke("quantize").error
    result = invoke()
    assert result.code == 0 and "build" in result.out and result.err == ""


def test_output_that_cannot_be_written_is_one_line(rgb: Built) -> None:
    with Path("/dev/full").open("w") as full:
        words = [sys.executable, "-m", "ptqd_export", "inspect", str(rgb.path)]
        done = subprocess.run(
            words, env=environment(), stdout=full, stderr=subprocess.PIPE, text=True, timeout=60
        )
    assert done.returncode == 1 and done.stderr.splitlines()[0].startswith("Error: No space left on device")
