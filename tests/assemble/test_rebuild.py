"""rebuild: a bundle gets engines from its own graphs, by the settings that it holds, and keeps everything
else."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from fake_cuda import FakeCuda
from helpers import NO_GPU, RTX, SEVERAL, Built, Invoke, content, copied, engines_of, has_gpu, reseal, seal

from ptqd_export import rebuild
from ptqd_export.backends.trt import library
from ptqd_export.bundle import Bundle, write_manifest
from ptqd_export.bundle.bundle import MANIFEST
from ptqd_export.errors import BundleError, RecipeError
from ptqd_export.files import work_folder

pytest.importorskip("tensorrt_rtx")

needs_no_gpu = pytest.mark.skipif(has_gpu(), reason="says what happens where there is no GPU")
FULL = "fp32*4"
"""A plan of one engine, beside the update's: a short rebuild."""


def settings(**changes: object) -> Callable[[dict[str, Any]], object]:
    """Other settings of engines, and a short rebuild."""
    return lambda data: (data["engine_settings"].update(changes), data.update(plan=FULL))


def words(place: Path) -> tuple[object, ...]:
    """A run that asks for a rebuild."""
    return ("run", place / "bundle", "--rebuild", "--out", place.parent / "x", "--format", "npy")


@needs_no_gpu
def test_rebuild_and_then_no_gpu(place: Path, own: Built, invoke: Invoke) -> None:
    """The engines are in the bundle, which holds everything else as before, and runs elsewhere as before."""
    before = content(place / "bundle")
    options = ("--out", place.parent / "x", "--format", "npy", "--num-samples", "2")
    assert (
        "it was built for ort-cpu; build it here from the bundle's own graphs "
        f"with `ptqd-export run ... --backend {RTX} --rebuild`"
    ) in invoke("run", place / "bundle", "--backend", RTX, *options).error
    assert NO_GPU.fullmatch(invoke("run", place / "bundle", "--backend", RTX, "--rebuild", *options).error)
    after = content(place / "bundle")
    new = {f"{name}.{RTX}.engine" for name in ("fp32", "w8a8", "w4a8", "w4a4", "update")}
    assert set(after) == {*before, *new} and {path.name for path in place.iterdir()} == {"bundle"}
    assert all(after[name] == data for name, data in before.items() if name != MANIFEST)
    m = Bundle.open(place / "bundle").manifest
    assert m.backends == (RTX, "ort-cpu")
    assert [engine.name for engine in m.update_engines] == [f"update.{RTX}"]
    old = own.bundle.manifest.to_dict()
    changed = {name for name, value in m.to_dict().items() if value != old[name]}
    assert changed == {"artifacts", "update_engines", "files"}
    assert invoke("verify", place / "bundle").code == 0
    assert f"w4a8.{RTX}" in invoke("inspect", place / "bundle").out
    for more in ((), ("--backend", "ort-cpu")):
        assert invoke("run", place / "bundle", *options, *more).code == 0
    assert invoke("run", own.path, *options).code == 0
    assert NO_GPU.fullmatch(invoke("run", place / "bundle", "--backend", RTX, *options).error)


@needs_no_gpu
def test_auto_passes_over_engines(several: Built, tmp_path: Path, invoke: Invoke) -> None:
    options = ("--out", tmp_path / "x", "--num-samples", "3")
    result = invoke("run", several.path, *options, "--json")
    assert (result.code, result.err) == (0, "")
    assert (result.json["backend"], result.json["state"]) == ("ort-cpu", "float64 on the host")
    assert len(result.json["files"]) == 3 and "tensorrt" not in result.json["passed_over"]
    assert NO_GPU.fullmatch(f"Error: {result.json['passed_over'][RTX]}\n")
    told = invoke("run", several.path, *options).out
    assert told.count(f"\nnote: not on {RTX}: ") == told.count("note: ") == 1


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ((), "--rebuild builds engines of one backend: say which, as in --backend tensorrt-rtx"),
        (
            ("--backend", "ort-cpu"),
            "backend ort-cpu loads the graphs as they are: leave out --rebuild, which is for tensorrt and "
            "tensorrt-rtx",
        ),
    ],
)
def test_rebuild_of_nothing(place: Path, invoke: Invoke, options: tuple[str, ...], message: str) -> None:
    before = content(place)
    assert message in invoke(*words(place), *options).error
    assert content(place) == before


def test_a_batch_that_no_engine_takes(several: Built, tmp_path: Path, invoke: Invoke) -> None:
    run = ("run", several.path, "--backend", RTX, "--out", tmp_path / "x", "--num-samples", "50")
    line = invoke(*run, "--batch-size", "33").error
    assert (
        f"33 samples per batch were asked for, but the {RTX} engines take at most 32: lower --batch-size"
        in line
    )
    if not has_gpu():
        assert NO_GPU.fullmatch(invoke(*run, "--batch-size", "32").error)
    assert not (tmp_path / "x" / "00000.png").exists()


def test_rebuild_builds_what_it_holds_anew(place: Path) -> None:
    """An engine that its own key cannot tell from a sound one may be why it is asked for. The bundle is a
    value or a path."""
    reseal(place / "bundle", settings())
    for bundle in (Bundle.open(place / "bundle"), place / "bundle", str(place / "bundle")):
        said: list[str] = []
        rebuild(bundle, RTX, said.append)
        assert len(said) == 2 and not any("unchanged" in line for line in said)


def test_rebuild_keeps_what_was_there(several: Built, tmp_path: Path) -> None:
    """Also engines that the plan does not use. Settings are the bundle's own, whatever the recipe says that
    it was built from."""
    path, said = copied(several, tmp_path), list[str]()
    reseal(
        path,
        lambda data: (
            data["engine_settings"].update(rows=[2, 4, 6], compute_capabilities=["8.9"]),
            data["provenance"]["recipe"].update(tensorrt={"batch_sizes": [3], "compute_capabilities": "all"}),
        ),
    )
    before = content(path)
    bundle = rebuild(Bundle.open(path), RTX, said.append)
    assert len(said) == len(SEVERAL) + 1
    for engine in engines_of(bundle).values():
        assert engine.build is not None and "8.9" in engine.build.targets
        assert engine.build.settings.rows == (2, 4, 6)
    after = content(path)
    assert set(after) == set(before) and {n for n in after if after[n] != before[n]} == {
        MANIFEST,
        *(n for n in after if n.endswith(".engine")),
    }
    assert bundle.manifest.backends == (RTX, "ort-cpu")


@pytest.mark.parametrize(
    ("value", "message"),
    [
        (None, "engine_settings: expected a table, got None"),
        ({"rows": [3]}, "engine_settings.rows: expected an array of 3, got 1"),
        ({"rows": []}, "engine_settings.rows: expected an array of 3, got 0"),
        ({"rows": [1, 2, 4], "compute_capabilities": ["\u202e"]}, r"compute capability '\\u202e'"),
        ([1], r"engine_settings: expected a table, got \[1\]"),
        ("missing", "'engine_settings' is missing"),
    ],
)
def test_odd_settings_are_refused_and_not_guessed(place: Path, value: object, message: str) -> None:
    seal(
        place / "bundle",
        lambda data: (
            data.pop("engine_settings") if value == "missing" else data.update(engine_settings=value)
        ),
    )
    before = content(place)
    for bundle in (place / "bundle", str(place / "bundle")):
        with pytest.raises(BundleError, match=message):
            rebuild(bundle, RTX)
    assert content(place) == before


def test_a_rebuild_reads_its_settings_from_the_bundle(place: Path) -> None:
    reseal(place / "bundle", settings(rows=[1, 3, 5]))
    made = engines_of(rebuild(place / "bundle", RTX))
    assert set(made) == {"fp32", "update"}
    assert all(e.build is not None and e.build.settings.rows == (1, 3, 5) for e in made.values())


def test_two_rebuilds_at_once(place: Path) -> None:
    before = content(place)
    with (
        work_folder(place / "bundle"),
        pytest.raises(BundleError, match="is in use by another build: wait until"),
    ):
        rebuild(Bundle.open(place / "bundle"), RTX)
    assert content(place) == before


def test_a_stopped_build_keeps_its_work(place: Path) -> None:
    reseal(place / "bundle", settings())
    with work_folder(place / "bundle") as work:
        (work / "stats-0.safetensors").write_bytes(b"of a build")
    before = content(work)
    rebuild(Bundle.open(place / "bundle"), RTX)
    assert content(work) == before and before["stats-0.safetensors"] == b"of a build"


@pytest.fixture
def fake(monkeypatch: pytest.MonkeyPatch) -> FakeCuda:
    """A fake GPU of compute capability 8.9; builders are processes of their own, and real."""
    from ptqd_export.backends import cuda

    fake_cuda = FakeCuda()
    monkeypatch.setattr(cuda, "runtime", lambda: fake_cuda)
    return fake_cuda


@pytest.mark.parametrize("named", [["8.6"], ["8.6", "8.9"]])
def test_rebuild_for_the_gpu_at_hand(place: Path, fake: FakeCuda, named: list[str]) -> None:
    """It is added to those that the bundle names: a rebuild is what an engine that was not built for it asks
    for."""
    reseal(place / "bundle", settings(compute_capabilities=named))
    made = engines_of(rebuild(Bundle.open(place / "bundle"), RTX))
    assert {e.build.targets for e in made.values() if e.build is not None} == {("8.6", "8.9")}


def test_a_gpu_that_the_library_does_not_know(place: Path) -> None:
    reseal(place / "bundle", settings(compute_capabilities=["9.0"]))
    before = content(place / "bundle")
    with pytest.raises(
        RecipeError, match=r"tensorrt\.compute_capabilities holds 9\.0: tensorrt_rtx .* knows 7\.5, "
    ):
        rebuild(Bundle.open(place / "bundle"), RTX)
    assert content(place / "bundle") == before


def test_a_library_that_is_not_there(place: Path, invoke: Invoke, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(library.MODULES, RTX, "tensorrt_that_nobody_has")
    before = content(place)
    line = invoke(*words(place), "--backend", RTX).error
    assert (
        "backend tensorrt-rtx needs tensorrt_that_nobody_has, which is not installed; "
        "in a checkout of ptqd-export: pip install '.[tensorrt-rtx]'"
    ) in line
    assert content(place) == before and {path.name for path in place.iterdir()} == {"bundle"}


@needs_no_gpu
def test_an_engine_of_another_version_and_no_gpu(several: Built, tmp_path: Path, invoke: Invoke) -> None:
    """The GPU is what is missing first."""
    path = copied(several, tmp_path)
    for name, engine in engines_of(Bundle.open(path)).items():
        file = path / engine.file
        file.write_bytes(bytes(64) + file.read_bytes()[64:])
        with pytest.raises(BundleError, match=f"{name}.{RTX}.engine does not match its SHA-256"):
            Bundle.open(path)
        reseal(path)
    assert NO_GPU.fullmatch(invoke("run", path, "--backend", RTX, "--out", tmp_path / "x").error)
    assert invoke("run", path, "--out", tmp_path / "x", "--num-samples", "1").code == 0


@needs_no_gpu
def test_a_damaged_engine_is_built_anew(several: Built, tmp_path: Path, invoke: Invoke) -> None:
    """It blocks every command but the one that cures it; other damage it does not cure."""
    path = copied(several, tmp_path)
    m = Bundle.open(path).manifest
    # Those of the plan alone, and for one GPU: less to build.
    (w8a8,) = [a for a in m.artifacts if a.name == f"w8a8.{RTX}"]
    narrow = replace(m.engine_settings, compute_capabilities=("8.9",))
    write_manifest(path, replace(m, artifacts=(w8a8,), engine_settings=narrow))
    engine = path / f"w8a8.{RTX}.engine"
    engine.write_bytes(b"damaged")
    assert "the manifest says" in invoke("verify", path).error
    again = ("run", path, "--backend", RTX, "--rebuild", "--out", tmp_path / "x", "--format", "npy")
    assert NO_GPU.fullmatch(invoke(*again).error)
    assert len(engine.read_bytes()) > 1000 and invoke("verify", path).code == 0
    (path / "w8a8.half.onnx").write_bytes(b"damaged")
    assert "w8a8.half.onnx has 7 bytes" in invoke(*again).error


def test_notes_of_engines_that_were_rebuilt(
    place: Path, invoke: Invoke, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A run that builds engines prints what a user should know of them, once; a run that does not prints
    nothing."""
    from ptqd_export import assemble, backends

    note = "NOTHING RUNS IN 8 BITS: it seems"
    m = rebuild(_short(place), RTX).manifest
    engines = tuple(
        a if a.build is None else replace(a, build=replace(a.build, notes=(note,))) for a in m.artifacts
    )
    write_manifest(place / "bundle", replace(m, artifacts=engines))
    monkeypatch.setattr(assemble, "rebuild", lambda bundle, backend, say: Bundle.open(place / "bundle"))
    monkeypatch.setattr(backends, "check", lambda name: None)
    monkeypatch.setattr("ptqd_export.runtime.run", _zeros)
    told = invoke(*words(place), "--backend", RTX).out
    assert told.splitlines().count(f"note: engine fp32.{RTX}: {note}") == told.count(note) == 1
    again = ("run", place / "bundle", "--out", place.parent / "x", "--format", "npy", "--backend", RTX)
    assert note not in invoke(*again).out
    assert json.loads((place / "bundle" / MANIFEST).read_text())["plan"] == FULL


def _short(place: Path) -> Path:
    reseal(place / "bundle", settings())
    return place / "bundle"


def _zeros(bundle: Bundle, num_samples: int, *rest: object, **more: Any) -> Any:
    import numpy as np

    more["batched"](num_samples)
    return np.zeros((num_samples, *bundle.manifest.sampling.model.sample_shape))
