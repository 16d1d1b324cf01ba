"""build on the command line: options, where the bundle goes, and what is refused before any work."""

from __future__ import annotations

import json
import re
import shlex
import shutil
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
from helpers import SMALL, Built, Invoke, Launch, content, rewrite

from ptqd_export import assemble
from ptqd_export.bundle import Bundle
from ptqd_export.cli import build as command
from ptqd_export.cli.build import override
from ptqd_export.recipe import Recipe


def test_build_prints_one_object_and_is_quiet_when_piped(own: Built, tmp_path: Path, launch: Launch) -> None:
    words = ("build", own.recipe, "--out", tmp_path / "b", "--precision", "w8a8", *SMALL, "--json")
    process = launch(*words)
    printed, error = process.communicate(timeout=300)
    assert (process.returncode, error) == (0, "")
    report = json.loads(printed)
    assert report["plan"] == "w8a8*2" and {e["precision"] for e in report["engines"]} == {"w8a8"}
    assert report["update_engines"] == [] and report["bundle"] == str(tmp_path / "b")
    assert report["bytes"] == sum(
        file.stat().st_size for file in (tmp_path / "b").iterdir() if file.name != "manifest.json"
    )


def test_build_options_reach_the_recipe() -> None:
    words = (
        "model --checkpoint a.ckpt --ldm-config b.yaml --out o "
        "--precision w4a8 --precision fp32 --solver ddpm --n-steps 7 --calib-size 6 "
        "--batch-size 3 --seed 5 --budget 0.5 --cost bops "
        "--rounding adaround --iterations 7 "
        "--plan w4a8*6,fp32 --correction affine --no-recalibrate-variance --backend ort-cuda "
        "--compute-capability 8.9"
    )
    params = command.make_context("build", words.split()).params
    for name in ("recipe_or_model", "out", "as_json", "resume", "dry_run"):
        params.pop(name)
    recipe = override(Recipe(), **params)
    assert recipe.model.checkpoint == str(Path("a.ckpt").absolute())
    assert recipe.model.ldm_config == str(Path("b.yaml").absolute())
    s, c, q, p = recipe.sampler, recipe.calibration, recipe.quantization, recipe.plan
    assert (s.solver, s.n_steps, s.eta) == ("ddpm", 7, 0.0)
    assert (c.size, c.held_out, c.batch_size, c.seed) == (6, 3, 3, 5)
    assert (q.precisions, q.correction, q.recalibrate_variance) == (("w4a8", "fp32"), "affine", False)
    assert (p.rule, p.steps, p.budget, p.cost, recipe.backends) == (
        "fixed",
        ("w4a8*6", "fp32"),
        0.5,
        "bops",
        ("ort-cuda",),
    )
    assert (q.rounding, q.iterations) == ("adaround", 7)
    assert recipe.tensorrt.compute_capabilities == ("8.9",)
    nothing = {name: () if isinstance(value, tuple) else None for name, value in params.items()}
    assert override(Recipe(), **nothing) == Recipe()


# --- what it prints


@pytest.fixture
def stub(own: Built, monkeypatch: pytest.MonkeyPatch) -> list[Path]:
    """In place of a build: a bundle that is there already; the folders that were to be built."""
    asked: list[Path] = []

    def build(recipe: Recipe, out: Path, **options: object) -> Bundle:
        asked.append(out)
        return own.bundle

    monkeypatch.setattr(assemble, "build", build)
    return asked


def test_the_command_that_is_printed_can_be_pasted(
    own: Built, tmp_path: Path, invoke: Invoke, stub: list[Path]
) -> None:
    """Also where the folder has a space and a quote in its name; where not, it is printed as it is."""
    for name, quoted in (("it's a bundle", True), ("bundle", False)):
        out = tmp_path / name
        told = invoke("build", own.recipe, "--out", out).out
        (line,) = re.findall(r"sample with `(.*)`", told)
        assert shlex.split(line) == ["ptqd-export", "run", str(out), "--out", "DIR"]
        assert (str(out) not in line) is quoted
    assert stub == [tmp_path / "it's a bundle", tmp_path / "bundle"]


def test_notes_are_printed_once(
    own: Built, several: Built, tmp_path: Path, invoke: Invoke, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Those of the plan and those of engines, on a terminal too, where other lines tell of progress."""
    bundle = several.bundle
    m = bundle.manifest
    note = "NOTHING RUNS IN 8 BITS: it seems"
    engines = [replace(a, build=a.build and replace(a.build, notes=(note,))) for a in m.artifacts[:1]]
    noted = replace(bundle, manifest=replace(m, artifacts=(*engines, *m.artifacts[1:])))

    def build(recipe: Recipe, out: Path, say: Callable[[str], None], **options: object) -> Bundle:
        say("a line of progress")
        return noted

    monkeypatch.setattr(assemble, "build", build)
    monkeypatch.setattr(sys.modules["ptqd_export.cli.build"], "say", print)
    told = invoke("build", own.recipe, "--out", tmp_path / "b")
    assert m.choice.notes and "a line of progress" in told.out
    for text in (*m.choice.notes, f"engine {engines[0].name}: {note}"):
        assert told.out.splitlines().count(f"note: {text}") == told.out.count(text) == 1


# --- where the bundle goes


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    folder = tmp_path / "here"
    folder.mkdir()
    monkeypatch.chdir(folder)
    return folder


@pytest.mark.parametrize(
    ("file", "text", "name"),
    [
        ("x/recipe.toml", "", "x"),
        ("x", "", "x"),
        ("x/recipe.toml", 'name = "mine"', "mine"),
        ("x/other.toml", "", "x"),
        ("x/other.toml", 'source = "../y"', "y"),
        ("x/recipe.toml", 'source = "net.py:make"', "net"),
        ("x/recipe.toml", 'checkpoint = "beds/model.ckpt"', "beds"),
        ("x/recipe.toml", 'checkpoint = "v1-5.safetensors"', "v1-5"),
    ],
)
def test_a_bundle_is_named_after_its_model(
    here: Path, invoke: Invoke, stub: list[Path], file: str, text: str, name: str
) -> None:
    """Not after the recipe's file."""
    (here / "x").mkdir()
    recipe = here / file if file.endswith(".toml") else here / file / "recipe.toml"
    recipe.write_text(f"[model]\n{text}\n")
    told = invoke("build", file)
    assert (told.code, told.err) == (0, "") and f"ptqd-export run engines/{name} --out DIR" in told.out
    assert stub == [here / "engines" / name]


def test_a_checkpoint_in_place_of_a_recipe(here: Path, invoke: Invoke, stub: list[Path]) -> None:
    (here / "beds").mkdir()
    for words in (["v1-4.ckpt"], ["--checkpoint", "v1-4.safetensors"], ["--checkpoint", "beds/last.ckpt"]):
        assert invoke("build", *words).code == 0
    assert [out.name for out in stub] == ["v1-4", "v1-4", "beds"]
    assert "nothing to build: give a recipe, a model's folder, or --checkpoint" in invoke("build").error
    assert "but model.checkpoint is not set" in invoke("build", here, "--ldm-config", "a.yaml").error


def test_the_bundle_of_another_model_is_not_replaced_unasked(
    here: Path, own: Built, classes: Built, invoke: Invoke, stub: list[Path]
) -> None:
    """One of the same model is, and one of another where --out says so; whatever its format."""
    (here / "net").mkdir()
    (here / "net" / "recipe.toml").write_text("")
    shutil.copytree(own.path, here / "engines" / "net")  # its model is called "net" too: net.py
    assert invoke("build", own.recipe).code == invoke("build", "net").code == 0
    assert stub == 2 * [here / "engines" / "net"]
    shutil.rmtree(here / "engines" / "net")
    shutil.copytree(classes.path, here / "engines" / "net")
    before = content(here)
    model = json.loads((here / "engines" / "net" / "manifest.json").read_text())["sampling"]["model"]
    for _ in range(2):
        line = invoke("build", own.recipe).error
        assert (
            "engines/net holds the bundle of another model, 'classes': "
            "give --out engines/net to replace it, or another folder"
        ) in line
        rewrite(here / "engines" / "net", format_version=2, sampling=None, model=model)  # as older formats
    assert len(stub) == 2 and content(here).keys() == before.keys()
    assert invoke("build", own.recipe, "--out", "engines/net").code == 0
    assert stub[2:] == [here / "engines" / "net"]


def test_a_folder_that_is_no_bundle_is_not_replaced(here: Path, own: Built, invoke: Invoke) -> None:
    (here / "engines" / "net").mkdir(parents=True)
    (here / "engines" / "net" / "photo.jpg").write_text("mine")
    assert "engines/net is a folder with other things in it" in invoke("build", own.recipe).error
    assert content(here) == {"engines/net/photo.jpg": b"mine"}


# --- what is refused


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
        ("[quantization]\nlayer_bits = ['*.conv2']\n", "layer_bits holds '*.conv2': give glob=precision"),
        ("[quantization]\nsmoothing = 2\n", "quantization.smoothing is 2.0: give a value in [0, 1]"),
        ("[model]\nsource = 'net.py:make'\n", "net.py does not exist"),
    ],
)
def test_recipes(
    tmp_path: Path, place: Path, refused: Callable[..., str], text: str | None, message: str
) -> None:
    recipe = tmp_path / "recipe.toml"
    if text is not None:
        recipe.write_bytes(text.encode("latin-1"))
    for out in (place / "bundle", place / "new" / "deep"):
        assert message in refused("build", recipe, "--out", out)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (
            ["--precision", "int8"],
            "precision 'int8' is not known: give fp32, fp16, wXaY with 2 to 8 bits each",
        ),
        (["--precision", "w8a8", "--precision", "w8a8"], "holds a precision twice"),
        (["--precision", "w4a16+"], "wXaY+ where layers have bits of their own, wXa16 for weights alone"),
        (["--precision", "w8a8-fp8", "--rounding", "adaround"], "leave w8a8-fp8 out, or set it to gptq"),
        (["--plan", "paper", "--precision", "w8a8"], "the paper's plan is of w4a4 and w4a8"),
        (["--plan", "best"], "precision 'best' is not known"),
        (["--plan", "w8a8*x"], "plan step 'w8a8*x': expected a precision with a count"),
        (["--plan", "w8a8*3", "--n-steps", "2"], "the fixed plan has 3 steps, the sampler 2"),
        (
            ["--plan", "w8a8,w3a3", "--n-steps", "2", "--precision", "w8a8"],
            "the fixed plan uses w3a3, which is not built",
        ),
        (["--plan", "w4a4+", "--precision", "w4a4"], "the fixed plan uses w4a4+, which is not built"),
        (
            ["--guidance-scale", "2"],
            "guidance_scale is 2.0, but classes has no null class: set model.null_class in the recipe",
        ),
        (["--guidance-scale", "nan"], "recipe.sampler.guidance_scale: expected a finite number, got nan"),
        (["--eta", "2"], "sampler.eta is 2.0: give a value in [0, 1]"),
        (["--n-steps", "1001"], "n_steps is 1001: give 1 to 1000"),
        (["--calib-size", "1"], "calibration.size is 1: give at least 2"),
        (["--batch-size", "0"], "calibration.batch_size is 0: give at least 1"),
        (["--budget", "0"], "plan.budget is 0.0: give a fraction in (0, 1]"),
        (["--seed", "-1"], "calibration.seed is -1"),
        (
            ["--batch-size", "100000000", "--calib-size", "100000000"],
            "calibration.batch_size 100000000 needs about",
        ),
    ],
)
def test_options(
    classes: Built, place: Path, refused: Callable[..., str], words: list[str], message: str
) -> None:
    for out in (place / "bundle", place / "new" / "deep"):
        assert message in refused("build", classes.recipe, "--out", out, *words)


def test_targets(classes: Built, place: Path, refused: Callable[..., str]) -> None:
    (place / "file").write_text("x")
    (place / "holiday").mkdir()
    (place / "holiday" / "photo.jpg").write_text("x")
    for target, message in {
        place / "file": "is a file: give a folder for a bundle",
        place / "file" / "below": "cannot write to",
        place / "holiday": "is a folder with other things in it",
        Path("/proc/bundle"): "cannot write to /proc",
        Path("/sys/some/bundle"): "cannot write to /sys",
    }.items():
        assert message in refused("build", classes.recipe, "--out", target, *SMALL)


def test_the_current_folder_is_no_target(
    classes: Built, place: Path, refused: Callable[..., str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Not even where an older bundle stands in it: it would be exchanged under the feet of whoever works
    there."""
    monkeypatch.chdir(place / "bundle")
    for target in (".", "..", "../bundle", place):
        assert "is the current folder or one above it" in refused(
            "build", classes.recipe, "--out", target, *SMALL
        )
