"""build, from the outside: what a bundle holds, for models it was not written for, and the same bytes every
time."""

from __future__ import annotations

import itertools
import os
from pathlib import Path

import pytest
from helpers import MIXED, PRECISIONS, SMALL, Built, Invoke, Launch, content

from ptqd_export import build
from ptqd_export.backends import OrtEngine
from ptqd_export.bundle import Bundle
from ptqd_export.bundle.bundle import MANIFEST, WEIGHTS
from ptqd_export.bundle.tables import QUANTIZATION, TABLES
from ptqd_export.core.backend import Emission
from ptqd_export.core.figures import FloatFigures, QuantizedFigures
from ptqd_export.core.precision import FP32, Precision
from ptqd_export.errors import BundleError, RecipeError
from ptqd_export.export import op_counts
from ptqd_export.files import exclusive
from ptqd_export.parity.judgement import MAX_FLOAT_ERROR, MAX_SHARE_APART
from ptqd_export.parity.noise import FEW, max_standard_errors
from ptqd_export.recipe import Recipe
from ptqd_export.typed import to_plain

NUMERICS = (Emission.PORTABLE, Emission.ORT_CPU)
MODELS = ("rgb", "classes", "guided", "own")


def reproducible(folder: Path) -> dict[str, bytes]:
    """The files that must come out alike: graphs, weights, tables. The manifest holds times."""
    return {name: data for name, data in content(folder).items() if name != MANIFEST}


@pytest.fixture(params=MODELS)
def built(request: pytest.FixtureRequest) -> Built:
    found: Built = request.getfixturevalue(request.param)
    return found


def test_a_bundle_holds_every_engine(built: Built, tmp_path: Path) -> None:
    bundle = built.bundle
    m = bundle.manifest
    # fp32.half is fp32.portable.
    graphs = {f"{p}.{e}.onnx" for p in PRECISIONS for e in Emission} - {"fp32.half.onnx"}
    rest = {"update.onnx", WEIGHTS, TABLES, QUANTIZATION, MANIFEST}
    assert {file.name for file in built.path.iterdir()} == graphs | rest
    assert [(str(g.precision), g.emission) for g in m.graphs] == [*itertools.product(PRECISIONS, Emission)]
    assert m.update.file == "update.onnx" and m.update_engines == m.engines == ()
    assert m.graph(FP32, Emission.HALF).file == "fp32.portable.onnx"
    for p in (Precision.parse(text) for text in PRECISIONS):
        artifact, graph = m.artifact(p, "ort-cpu"), m.graph(p, Emission.ORT_CPU)
        assert artifact.time_ms is not None and artifact.time_ms > 0 and artifact.file == graph.file
        OrtEngine(bundle.file(graph.file), optimised_path=tmp_path / "optimised.onnx").close()
        assert (op_counts(tmp_path / "optimised.onnx")["QLinearConv"] > 0) is not p.is_float
        assert set(graph.quantized.values()) == (set() if p.is_float else {"int8"})
    assert not [p for p in built.path.parent.iterdir() if ".tmp-" in p.name or p.suffix == ".work"]
    umask = os.umask(0)
    os.umask(umask)
    assert {file.stat().st_mode & 0o777 for file in built.path.iterdir()} == {0o666 & ~umask}


def test_parity_figures_are_those_of_a_right_build(built: Built) -> None:
    m = built.bundle.manifest
    assert set(m.parity) == {f"{p}.{e}" for p in PRECISIONS for e in Emission}
    for name, figures in m.parity.items():
        if name.startswith("fp32"):
            assert isinstance(figures, FloatFigures)
            assert 0 < figures.largest_relative_error < MAX_FLOAT_ERROR
            continue
        assert isinstance(figures, QuantizedFigures)
        layers, noise = figures.layers, figures.noise
        assert layers.layers > 0 and layers.outputs > 1000 and layers.share_apart <= MAX_SHARE_APART
        # Two trajectories were held out: a limit is kept, and is too wide to be called a check.
        assert (
            max(noise.largest_z.values()) <= max_standard_errors(2, len(m.sampling)) and noise.limit_z is None
        )
        assert len(noise.snr_q_corrected) == len(noise.mse_ratio) == len(m.sampling)
    # Fewer bits, more noise: by a factor of about 16^2 / 2 where 4-bit activations are quantized instead of
    # 8-bit ones.
    pooled = {
        p: [built.bundle.stats(Precision.parse(p), e).snr.mean() for e in NUMERICS] for p in PRECISIONS[1:]
    }
    for emission in range(len(NUMERICS)):
        assert pooled["w8a8"][emission] > 2 * pooled["w4a8"][emission] > 4 * pooled["w4a4"][emission]
    assert (
        m.bops[Precision(32, 32)]
        > m.bops[Precision(8, 8)]
        > m.bops[Precision(4, 8)]
        > m.bops[Precision(4, 4)]
    )


def test_the_manifest_says_what_was_asked_for(rgb: Built, classes: Built, guided: Built, own: Built) -> None:
    m = rgb.bundle.manifest
    s, model, schedule = m.sampling, m.sampling.model, m.sampling.schedule
    assert (model.sample_shape, model.labels, s.solver, len(s)) == ((3, 16, 16), (), "ddim", 4)
    assert (schedule.eta, s.guidance_scale, schedule.clip_sample) == (1, 1, 1.0)
    assert [str(p) for p in m.plan.steps] == MIXED.split(",")
    m = classes.bundle.manifest
    model, schedule = m.sampling.model, m.sampling.schedule
    assert (model.sample_shape, model.labels, schedule.eta) == ((1, 8, 8), (0, 1, 2, 3, 4), 0.5)
    assert m.choice.rule == "snr" and schedule.clip_sample is None
    m = guided.bundle.manifest
    assert (m.sampling.model.labels, m.sampling.solver) == ((0, 1, 2, 3), "ddpm")
    assert (m.sampling.guidance_scale, m.provenance.seed) == (2.0, 7)
    cost = m.plan.total({p: float(v) for p, v in m.bops.items()})
    assert cost == m.choice.bops <= m.choice.budget and m.choice.front
    m = own.bundle.manifest
    model = m.sampling.model
    assert (model.sample_shape, [s.name for s in model.inputs]) == ((2, 8, 8), ["context"])
    assert m.sampling.schedule.prediction_type == "v_prediction"
    assert m.engine_settings.rows == (2, 16, 64) and m.engine_settings.compute_capabilities == ("8.9",)


def test_same_recipe_and_seed_same_bytes(own: Built, tmp_path: Path, launch: Launch) -> None:
    """In another process, with other hash seeds."""
    process = launch("build", own.recipe, "--out", tmp_path / "again", *own.options, PYTHONHASHSEED="7")
    assert (process.communicate(timeout=300)[1], process.returncode) == ("", 0)
    assert reproducible(tmp_path / "again") == reproducible(own.path)
    again, first = Bundle.open(tmp_path / "again").manifest, own.bundle.manifest
    assert again.plan == first.plan and again.correction == first.correction
    assert to_plain(again.sampling) == to_plain(first.sampling)


def test_another_seed_other_tables(own: Built, tmp_path: Path, invoke: Invoke) -> None:
    result = invoke("build", own.recipe, "--out", tmp_path / "b", *own.options, "--seed", "1")
    assert result.code == 0, result
    old, new = reproducible(own.path), reproducible(tmp_path / "b")
    assert {name for name in new if new[name] != old[name]} >= {TABLES, QUANTIZATION, "w8a8.ort-cpu.onnx"}


def test_two_builds_into_one_target(own: Built, tmp_path: Path, invoke: Invoke) -> None:
    out = tmp_path / "bundle"
    (tmp_path / "bundle.work").mkdir()
    with exclusive(tmp_path / "bundle.work"):
        error = invoke("build", own.recipe, "--out", out, *own.options).error
    assert "is in use by another build" in error and "--out" in error
    assert "bundle" not in [path.name for path in tmp_path.iterdir()]


# --- from Python


def test_paths_as_well_as_values(own: Built, tmp_path: Path) -> None:
    """A recipe's file, its folder, a recipe; and text. What is said has no note in it: those are in the
    bundle."""
    said: list[str] = []
    changes = {"sampler": {"n_steps": 1}, "calibration": {"size": 2, "held_out": 2}}
    recipe = Recipe.load(own.recipe).override(**changes, quantization={"precisions": ("w8a8",)})
    bundle = build(recipe, str(tmp_path / "a b"), say=said.append)
    assert bundle.path == tmp_path / "a b" and str(bundle.manifest.plan) == "w8a8*1"
    assert bundle.manifest.choice.notes and not {*said} & {*bundle.manifest.choice.notes}
    assert not any(note in line for line in said for note in bundle.manifest.choice.notes)
    for given in (own.recipe / "recipe.toml", str(own.recipe / "recipe.toml"), own.recipe):
        with pytest.raises(RecipeError, match="is a file: give a folder for a bundle"):
            build(given, tmp_path / "a b" / MANIFEST)
    for missing in (tmp_path / "nowhere.toml", str(tmp_path / "nowhere")):
        with pytest.raises(RecipeError, match=r"nowhere.* does not exist: give a recipe file"):
            build(missing, tmp_path / "b")
    assert [path.name for path in tmp_path.iterdir()] == ["a b"]


@pytest.mark.parametrize(
    ("sections", "message"),
    [
        (
            {"quantisation": {"gate": True}},
            "the recipe has no section 'quantisation': expected one of model, ",
        ),
        ({"sampler": {"steps": 3}}, "recipe.sampler: unknown key 'steps': did you mean 'n_steps'"),
        ({"sampler": {"n_steps": "3"}}, "recipe.sampler.n_steps: expected int, got '3'"),
        ({"backends": ("vulkan",)}, "vulkan"),
    ],
)
def test_sections_that_a_recipe_does_not_have(sections: dict[str, object], message: str) -> None:
    with pytest.raises(RecipeError, match=message):
        Recipe().override(**sections)  # type: ignore[arg-type]
    assert Recipe().override(sampler={"n_steps": 3}).sampler.n_steps == 3


# --- what is concluded


def test_the_gate_keeps_what_is_significant(classes: Built) -> None:
    """The tables are those of the record."""
    correction = classes.bundle.manifest.correction
    assert set(correction.steps) == {f"{p}.{e}" for p in PRECISIONS[1:] for e in NUMERICS}
    assert correction.mode == "ptqd"
    for p in PRECISIONS[1:]:
        for e in NUMERICS:
            record = correction.steps[f"{p}.{e}"]
            table = classes.bundle.correction(Precision.parse(p), e)
            for i, kept in enumerate(record.kept):
                has = abs(record.z_k[i]) > record.limit, abs(record.z_bias[i]) > record.limit
                assert has == (kept in ("k", "both"), kept in ("bias", "both"))
                assert has == ((table.gain[i] != 1).any(), table.offset[i].any())


def test_few_held_out_trajectories_are_no_check(own: Built, tmp_path: Path, invoke: Invoke) -> None:
    """Nor are they shown as one; with as many as are needed, the limit is."""
    told = invoke("inspect", own.path).out
    assert (
        "standard errors" not in told and told.count("noise not judged: too few held-out trajectories") == 9
    )
    words = (*SMALL, "--precision", "w8a8", "--calib-size", str(2 * FEW))
    result = invoke("build", own.recipe, "--out", tmp_path / "b", *words, "--json")
    assert result.code == 0 and not any("held-out" in note for note in result.json["notes"])
    assert any(f"give --calib-size {2 * FEW} or more" in note for note in own.report["notes"])
    manifest = Bundle.open(tmp_path / "b").manifest
    # k, variance and error per step, the bias per step and channel
    limit = max_standard_errors(FEW, 2 * (3 + manifest.sampling.model.channels))
    for figures in manifest.parity.values():
        assert isinstance(figures, QuantizedFigures) and figures.noise.limit_z is not None
        assert figures.noise.limit_z == pytest.approx(limit, abs=1e-3)
        assert max(figures.noise.largest_z.values()) <= figures.noise.limit_z < 10
    told = invoke("inspect", tmp_path / "b").out
    assert "not judged" not in told and told.count(f"standard errors (limit {limit:.1f})") == 3


def test_a_rebuild_of_no_bundle(tmp_path: Path) -> None:
    from ptqd_export import rebuild

    for path in (tmp_path, str(tmp_path)):
        with pytest.raises(BundleError, match="backend ort-cpu loads the graphs as they are"):
            rebuild(path, "ort-cpu")
