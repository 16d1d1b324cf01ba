"""inspect and verify on the command line."""

from __future__ import annotations

import re
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
from helpers import PRECISIONS, RTX, SEVERAL, SMALL, Built, Invoke, engines_of, full_disk, has_gpu

from ptqd_export.core.backend import Emission
from ptqd_export.typed import to_plain


def test_inspect(rgb: Built, invoke: Invoke, tmp_path: Path) -> None:
    result = invoke("inspect", rgb.path, "--json", "--plot", tmp_path / "steps.png")
    assert (result.code, result.err) == (0, "")
    m = rgb.bundle.manifest
    assert result.json["bundle"] == rgb.bundle.seal
    assert result.json["manifest"]["plan"] == str(m.plan) == "w4a4*1 w4a8*1 w8a8*1 fp32*1"
    assert set(result.json["manifest"]["parity"]) == set(m.parity) and "files" not in result.json["manifest"]
    rows = result.json["steps"]
    schedule = m.sampling.schedule
    assert [row["precision"] for row in rows] == ["w4a4", "w4a8", "w8a8", "fp32"]
    assert [row["timestep"] for row in rows] == schedule.timesteps.tolist()
    assert rows[3]["snr_q"] is None and rows[3]["k"] == 0 and rows[3]["kept"] == "nothing"
    for row, sigma, recalibrated in zip(rows, schedule.sigmas, rgb.bundle.sigmas("ort-cpu"), strict=True):
        assert (row["sigma"], row["sigma_recalibrated"]) == (sigma, recalibrated)
    assert 1 < rows[0]["snr_q"] < rows[1]["snr_q"] < rows[2]["snr_q"]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["steps-pareto.png", "steps.png"]
    text = invoke("inspect", rgb.path).out
    assert "rgb: 3x16x16, no classes, epsilon prediction" in text
    assert "measured for: ddim, 4 steps, eta 1, guidance 1" in text
    assert all(any(line.split()[:2] == [p, "ort-cpu"] for line in text.splitlines()) for p in PRECISIONS)


def test_inspect_shows_the_layers_of_a_mixed_precision(own: Built, invoke: Invoke, tmp_path: Path) -> None:
    """One layer has its bits by hand."""
    model = shutil.copytree(own.recipe, tmp_path / "model")
    with (model / "recipe.toml").open("a") as recipe:
        recipe.write('layer_bits = ["tokens=w8a8"]\n')
    words = ("--precision", "w4a4+", "--precision", "fp32", "--plan", "w4a4+", *SMALL)
    built = invoke("build", model, "--out", tmp_path / "mixed", *words)
    assert (built.code, built.err) == (0, "")
    pictures = tmp_path / "pictures"
    pictures.mkdir()
    shown = invoke("inspect", tmp_path / "mixed", "--plot", pictures / "x.png").out
    bits = r"(?=.*w8a8 1\b)(w\da\d 1), .*float 4"
    row = re.search(rf"^  w4a4\+ +([\d.]+) +([\d.]+)  {bits}$", shown, re.MULTILINE)
    assert row is not None and 0 < float(row[2]) < float(row[1]), shown
    assert "layers of w4a4+ that make most noise, 2 of 2" in shown
    assert re.search(r"^  tokens +w8a8 ", shown, re.MULTILINE)
    assert re.search(r"^  twice +w[34]a[4568] ", shown, re.MULTILINE)
    assert sorted(p.name for p in pictures.iterdir()) == ["x-layers-w4a4-mixed.png", "x-pareto.png", "x.png"]
    told = invoke("inspect", tmp_path / "mixed", "--json").json["manifest"]
    assert told["layers"]["w4a4+"]["w8a8"] == ["tokens"] and told["plan"] == "w4a4+*2"
    assert set(told["layer_sensitivity"]["w4a4+"]["layers"]) == {"tokens", "twice"}


def test_inspect_shows_the_plans_of_engines(several: Built, invoke: Invoke) -> None:
    text = invoke("inspect", several.path).out
    found = engines_of(several.bundle)
    assert set(found) == {*SEVERAL, "update"}
    for name, engine in found.items():
        assert engine.build is not None
        plan = engine.build.plan
        row = re.search(
            rf"^{name}\.{RTX} +(\d+ of \d+|-) +(\d+) +([\d.]+) +([\d.]+) +(\d+)  (.*)$", text, re.MULTILINE
        )
        assert row is not None, text
        assert row[1] == (f"{plan.taken} of {plan.meant}" if plan.meant else "-")
        assert int(row[2]) == plan.kernels
        assert row[6] == ", ".join(engine.build.targets) and int(row[5]) > 50
        # A tenth of a megabyte is shown.
        assert abs(float(row[4]) * 1e6 - several.path.joinpath(engine.file).stat().st_size) <= 5e4
    assert "fell back" not in text
    shown = invoke("inspect", several.path, "--json").json["manifest"]
    told = {a["precision"]: a["build"]["plan"] for a in shown["artifacts"] if a["backend"] == RTX}
    told["update"] = shown["update_engines"][0]["build"]["plan"]
    assert told == {name: to_plain(e.build.plan) for name, e in found.items() if e.build is not None}


def test_verify(guided: Built, invoke: Invoke) -> None:
    result = invoke("verify", guided.path, "--json")
    assert (result.code, result.err) == (0, "")
    assert result.json["ok"] and result.json["files"] == 15
    assert sorted(result.json["engines"]) == sorted(
        ["update", *(f"{p}.{e}" for p in PRECISIONS for e in Emission)]
    )
    assert "15 files match their SHA-256" in invoke("verify", guided.path).out


@pytest.mark.skipif(has_gpu(), reason="says what happens where there is no GPU")
def test_verify_says_what_it_did_not_look_at(several: Built, invoke: Invoke) -> None:
    said = invoke("verify", several.path, "--json").json
    assert said["ok"] and list(said["not_evaluated"]) == [f"{len(SEVERAL) + 1} {RTX} engines"]
    assert f"\nnot evaluated here: {len(SEVERAL) + 1} {RTX} engines: " in invoke("verify", several.path).out


def test_plots_that_cannot_be_written(classes: Built, place: Path, refused: Callable[..., str]) -> None:
    assert "cannot write /proc/plot.png" in refused("inspect", classes.path, "--plot", "/proc/plot.png")
    with full_disk(1500):
        refused("inspect", classes.path, "--plot", place / "plot.png")
