"""build, from the outside: models it was not written for, the same bytes every time, and builds that are stopped half-way."""

from __future__ import annotations

import itertools
import json
import os
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from conftest import MIXED, PRECISIONS, Built, Invoke, Launch, environment

from ptqd_export.bundle import MANIFEST, QUANTIZATION, TABLES, WEIGHTS, Bundle, exclusive, writing
from ptqd_export.evaluate.parity import MAX_FLOAT_ERROR, MAX_SHARE_APART
from ptqd_export.precision import FP32, Precision
from ptqd_export.quant import Emission

NUMERICS = (Emission.PORTABLE, Emission.ORT_CPU)
MODELS = ("rgb", "classes", "guided", "own")
Snapshot = dict[str, bytes]


def snapshot(folder: Path) -> Snapshot:
    return {str(file.relative_to(folder)): file.read_bytes() for file in sorted(folder.rglob("*")) if file.is_file()}


def reproducible(folder: Path) -> Snapshot:
    """The files that must come out alike: graphs, weights, tables. The manifest holds times."""
    return {name: data for name, data in snapshot(folder).items() if name != MANIFEST}


@pytest.fixture(params=MODELS)
def built(request: pytest.FixtureRequest) -> Built:
    found: Built = request.getfixturevalue(request.param)
    return found


def test_a_bundle_holds_every_engine(built: Built) -> None:
    bundle = built.bundle
    m = bundle.manifest
    graphs = {f"{p}.{e}.onnx" for p in PRECISIONS for e in Emission} - {"fp32.half.onnx"}  # which is fp32.portable.onnx
    assert {file.name for file in built.path.iterdir()} == {*graphs, "update.onnx", WEIGHTS, TABLES, QUANTIZATION, MANIFEST}
    assert {(str(g.precision), g.emission) for g in m.graphs} == {*itertools.product(PRECISIONS, Emission), ("None", Emission.HALF)}
    assert m.graph(FP32, Emission.HALF).file == "fp32.portable.onnx"
    for p in (Precision.parse(text) for text in PRECISIONS):
        artifact, graph = m.artifact(p, "ort-cpu"), m.graph(p, Emission.ORT_CPU)
        assert artifact.time_ms is not None and artifact.time_ms > 0 and artifact.file == graph.file
        assert (graph.ops.get("QLinearConv", 0) > 0) is not p.is_float
        assert set(graph.quantized.values()) == (set() if p.is_float else {"int8"})
    assert not [path for path in built.path.parent.iterdir() if ".tmp-" in path.name or path.suffix == ".work"]
    umask = os.umask(0)
    os.umask(umask)
    assert {file.stat().st_mode & 0o777 for file in built.path.iterdir()} == {0o666 & ~umask}


def test_parity_figures_are_those_of_a_right_build(built: Built) -> None:
    m = built.bundle.manifest
    assert set(m.parity) == {f"{p}.{e}" for p in PRECISIONS for e in Emission}
    for name, figures in m.parity.items():
        if name.startswith("fp32"):
            assert 0 < figures["largest_relative_error"] < MAX_FLOAT_ERROR
            continue
        layers, noise = figures["layers"], figures["noise"]
        assert layers["layers"] > 0 and layers["outputs"] > 1000 and layers["share_apart"] <= MAX_SHARE_APART
        assert max(noise["largest_z"].values()) <= noise["limit_z"]
        assert len(noise["snr_q_corrected"]) == len(noise["mse_ratio"]) == len(m.schedule)
    # Fewer bits, more noise: by a factor of about 16^2 / 2 where 4-bit activations are quantized instead of 8-bit ones.
    pooled = {p: [built.bundle.stats(Precision.parse(p), e).snr.mean() for e in NUMERICS] for p in PRECISIONS[1:]}
    for emission in range(len(NUMERICS)):
        assert pooled["w8a8"][emission] > 2 * pooled["w4a8"][emission] > 4 * pooled["w4a4"][emission]
    assert m.bops[Precision(32, 32)] > m.bops[Precision(8, 8)] > m.bops[Precision(4, 8)] > m.bops[Precision(4, 4)]


def test_the_manifest_says_what_was_asked_for(rgb: Built, classes: Built, guided: Built, own: Built) -> None:
    m = rgb.bundle.manifest
    assert (m.model.sample_shape, m.model.labels, m.solver, len(m.schedule), m.schedule.eta, m.guidance_scale) == ((3, 16, 16), (), "ddim", 4, 1, 1)
    assert m.schedule.clip_sample == 1.0
    assert [str(p) for p in m.plan.steps] == MIXED.split(",")
    m = classes.bundle.manifest
    assert (m.model.sample_shape, m.model.labels, m.schedule.eta, m.plan_info["rule"]) == ((1, 8, 8), (0, 1, 2, 3, 4), 0.5, "snr")
    assert m.schedule.clip_sample is None
    m = guided.bundle.manifest
    assert (m.model.labels, m.solver, m.guidance_scale, m.provenance["seed"]) == ((0, 1, 2, 3), "ddpm", 2.0, 7)
    cost = m.plan.total({p: float(v) for p, v in m.bops.items()})
    assert cost == m.plan_info["bops"] <= m.plan_info["budget"] and m.plan_info["front"]
    m = own.bundle.manifest
    assert (m.model.sample_shape, [s.name for s in m.model.inputs], m.schedule.prediction_type) == ((2, 8, 8), ["context"], "v_prediction")


def words(built: Built, out: Path, *options: str) -> tuple[object, ...]:
    return ("build", built.recipe, "--out", out, *built.options, *options)


def test_same_recipe_and_seed_same_bytes(own: Built, tmp_path: Path, launch: Launch) -> None:
    """In another process, with other hash seeds."""
    process = launch(*words(own, tmp_path / "again"), PYTHONHASHSEED="7")
    assert (process.communicate(timeout=300)[1], process.returncode) == ("", 0)
    assert reproducible(tmp_path / "again") == reproducible(own.path)
    again, first = Bundle.open(tmp_path / "again").manifest, own.bundle.manifest
    assert again.plan == first.plan and again.correction == first.correction and again.schedule.to_dict() == first.schedule.to_dict()


def test_another_seed_other_tables(own: Built, tmp_path: Path, invoke: Invoke) -> None:
    result = invoke("build", own.recipe, "--out", tmp_path / "b", *own.options, "--seed", "1")
    assert result.code == 0, result
    old, new = reproducible(own.path), reproducible(tmp_path / "b")
    assert {name for name in new if new[name] != old[name]} >= {TABLES, QUANTIZATION, "w8a8.ort-cpu.onnx"}


def stop(process: subprocess.Popen[str], when: Callable[[], bool], by: signal.Signals) -> tuple[int, str, str]:
    deadline = time.monotonic() + 240
    while not when():
        assert process.poll() is None, process.communicate()
        assert time.monotonic() < deadline
        time.sleep(0.001)
    process.send_signal(by)
    out, err = process.communicate(timeout=60)
    return process.returncode, out, err


def test_a_stopped_build_leaves_the_old_bundle_and_is_taken_up(classes: Built, own: Built, tmp_path: Path, launch: Launch) -> None:
    """Ctrl-C in the trajectories, kill -9 in the statistics, SIGTERM in the export; then the same command to the end."""
    out, work = tmp_path / "bundle", tmp_path / "bundle.work"
    shutil.copytree(own.path, out)
    before = snapshot(out)

    def start() -> subprocess.Popen[str]:
        return launch(*words(classes, out, "--resume"))

    def unharmed() -> None:
        assert snapshot(out) == before
        Bundle.open(out)

    def finished(pattern: str) -> dict[Path, tuple[int, int]]:
        return {file: (file.stat().st_ino, file.stat().st_mtime_ns) for file in work.glob(pattern)}

    chunks, statistics = "trajectories-*/*.safetensors", "stats-*.safetensors"
    code, printed, error = stop(start(), lambda: bool(finished(chunks)), signal.SIGINT)
    assert (code, printed) == (130, "")
    assert error.startswith("Error: interrupted: nothing was changed") and error.count("\n") == 1
    unharmed()
    first = finished(chunks)
    assert first and not list(work.glob("trajectories-*/*.tmp"))

    code, printed, error = stop(start(), lambda: bool(finished(statistics)), signal.SIGKILL)
    assert (code, printed, error) == (-signal.SIGKILL, "", "")
    unharmed()
    second = finished(chunks)
    assert len(second) == 6 and first.items() <= second.items()
    measured = finished(statistics)

    code, _, error = stop(start(), lambda: bool(list(tmp_path.glob(".bundle.tmp-*"))), signal.SIGTERM)
    assert (code, error) == (-signal.SIGTERM, "")
    unharmed()
    assert finished(chunks) == second and measured.items() <= finished(statistics).items()
    assert len(finished(statistics)) == 6
    assert list(tmp_path.glob(".bundle.tmp-*"))

    process = start()
    printed, error = process.communicate(timeout=300)
    assert (process.returncode, error) == (0, "")
    assert [path.name for path in tmp_path.iterdir()] == ["bundle"]
    assert reproducible(out) == reproducible(classes.path)
    assert Bundle.open(out).manifest.plan == classes.bundle.manifest.plan


def test_two_builds_into_one_target(own: Built, tmp_path: Path, invoke: Invoke) -> None:
    out = tmp_path / "bundle"
    with exclusive(tmp_path / "bundle.work"):
        error = invoke("build", own.recipe, "--out", out, *own.options).error
    assert "is in use by another build" in error and "--out" in error
    assert [path.name for path in tmp_path.iterdir()] == ["bundle.work"]


def test_a_writer_spares_the_temporary_folder_of_another_that_lives(own: Built, tmp_path: Path) -> None:
    target = tmp_path / "bundle"
    code = f"""
import shutil, sys
from pathlib import Path
from ptqd_export.bundle import writing
with writing(Path({str(target)!r})) as tmp:
    shutil.copytree({str(own.path)!r}, tmp, dirs_exist_ok=True)
    print(tmp, flush=True)
    sys.stdin.readline()
"""
    with subprocess.Popen([sys.executable, "-c", code], env=environment(), stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as other:
        assert other.stdout is not None and other.stdin is not None
        theirs = Path(other.stdout.readline().strip())
        (tmp_path / ".bundle.tmp-1").mkdir()  # left by a writer that is gone
        with writing(target) as ours:
            shutil.copytree(own.path, ours, dirs_exist_ok=True)
        assert snapshot(theirs) == snapshot(own.path)
        assert {path.name for path in tmp_path.iterdir()} == {"bundle", theirs.name}
        other.stdin.write("\n")
        other.stdin.close()
        assert other.wait(60) == 0
    assert [path.name for path in tmp_path.iterdir()] == ["bundle"]
    Bundle.open(target)


def test_a_lock_is_of_threads_too_and_ends_with_its_block(tmp_path: Path) -> None:
    found: list[Any] = []

    def attempt() -> None:
        try:
            with exclusive(tmp_path / "x"):
                found.append("in")
        except Exception as error:
            found.append(str(error))

    with exclusive(tmp_path / "x"):
        thread = threading.Thread(target=attempt)
        thread.start()
        thread.join()
    attempt()
    assert "in use" in found[0] and found[1] == "in"


def test_the_gate_keeps_what_helps(classes: Built) -> None:
    """On the trajectories it was judged by, the corrected error of no kept step is above the plain one."""
    steps = classes.bundle.manifest.correction["steps"]
    assert set(steps) == {f"{p}.{e}" for p in PRECISIONS[1:] for e in NUMERICS}
    for figures in steps.values():
        assert [ratio > 1 for ratio in figures["mse_drop_over_standard_error"]] == figures["kept"]
    data = json.loads((classes.path / MANIFEST).read_text())
    assert data["correction"]["mode"] == "ptqd"
    for p in PRECISIONS[1:]:
        for e in NUMERICS:
            correction = classes.bundle.correction(Precision.parse(p), e)
            touched = (correction.gain != 1).any(1) | (correction.offset != 0).any(1)
            np.testing.assert_array_equal(touched, steps[f"{p}.{e}"]["kept"])
