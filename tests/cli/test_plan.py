"""plan on the command line."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

from helpers import Built, Invoke, copied, listing

from ptqd_export.bundle import Bundle
from ptqd_export.core.plan import fixed
from ptqd_export.core.step_policy import write_policy


def test_it_prints_a_plan_and_changes_nothing(guided: Built, tmp_path: Path, invoke: Invoke) -> None:
    path = copied(guided, tmp_path)
    before = listing(path)
    result = invoke("plan", path, "--budget", "0.6", "--json")
    assert (result.code, result.err) == (0, "")
    told, m = result.json, guided.bundle.manifest
    assert told["own"] == str(m.plan) and told["rule"] == "budget" and told["written"] is None
    assert [r["kind"] for r in told["compared"]] == ["chosen", "uniform", "first-last"]
    assert told["compared"][0]["plan"] == told["plan"] != told["own"] and told["front"]
    assert told["bops_of_fp32"] <= 0.6 + 1e-9
    text = invoke("plan", path, "--rule", "paper").out
    assert text.startswith("plan (paper, paired error, cost in bops): w4a4*1 w4a8*2\n")
    assert f"\nthe bundle's own: {m.plan}\n" in text and "\nnote: " in text
    assert listing(path) == before


def test_out_and_write(guided: Built, tmp_path: Path, invoke: Invoke) -> None:
    path = copied(guided, tmp_path)
    seal = Bundle.open(path).seal
    other = path.parent / "other"
    result = invoke("plan", path, "--plan", "w8a8*2,fp32", "--out", other, "--json")
    assert (result.code, result.json["written"]) == (0, str(other))
    assert str(Bundle.open(other).manifest.plan) == "w8a8*2 fp32*1" and Bundle.open(path).seal == seal
    assert invoke("verify", other).code == 0
    assert invoke("plan", path, "--rule", "snr", "--write").code == 0
    m = Bundle.open(path).manifest
    assert m.choice.rule == "snr"
    assert invoke("inspect", path).out.splitlines()[2].startswith("plan (snr, ")
    assert sorted(p.name for p in path.parent.iterdir()) == ["bundle", "other"]


def test_policies_of_others(own: Built, tmp_path: Path, invoke: Invoke) -> None:
    n = len(own.bundle.manifest.plan)
    policy = tmp_path / "config.json"
    policy.write_text(write_policy(fixed([f"fp32*1 w8a8*{n - 2} fp32*1"], n)))
    out = tmp_path / "policy.json"
    told = invoke("plan", own.path, "--import", policy, "--export", out, "--json").json
    assert told["plan"] == f"fp32*1 w8a8*{n - 2} fp32*1" and told["rule"] == "fixed"
    assert out.read_text() == policy.read_text() and told["exported"] == str(out)


def test_what_is_refused(own: Built, place: Path, refused: Callable[..., str], tmp_path: Path) -> None:
    bundle = place / "bundle"
    (tmp_path / "policy.json").write_text(json.dumps({"schema_version": 1}))
    for words, message in (
        (("--budget", "0"), "plan.budget is 0.0: give a fraction"),
        (("--budget", "2"), "plan.budget is 2.0"),
        (("--rule", "best"), "'best' is not one of"),
        (("--rule", "snr", "--plan", "w8a8"), "--rule, --plan and --import each give a plan"),
        (("--write", "--out", place / "other"), "give one of the two"),
        (("--plan", "w8a8*3", "--write"), "has 3 steps"),
        (("--plan", "w2a2", "--write"), "w2a2"),
        (("--cost", "bops"), "give --budget too"),
        (("--import", tmp_path / "none.json"), "cannot be read"),
        (("--import", tmp_path / "policy.json"), "'type' is missing"),
        (("--plan", "w4a4*2,w8a8*2", "--export", place / "x.json"), "cannot be written as a diffusion_step"),
        (("--plan", "w8a8", "--out", tmp_path), "is a folder with other things in it"),
    ):
        assert message in refused("plan", bundle, *words), words
    assert "is not a bundle" in refused("plan", place)
