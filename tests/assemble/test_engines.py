"""Finished engines in bundles: real TensorRT-RTX builds, which need no GPU. What is built, and what is built
again."""

from __future__ import annotations

import re
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from helpers import RTX, SEVERAL, Built, Invoke, Launch, copied, engines_of, has_gpu
from safetensors.numpy import load_file

from ptqd_export import build
from ptqd_export.backends import trt
from ptqd_export.bundle import Bundle, write_manifest
from ptqd_export.bundle.tables import QUANTIZATION
from ptqd_export.core.backend import Emission
from ptqd_export.core.engine_build import NOT_BY_DEFAULT
from ptqd_export.recipe import Recipe

pytest.importorskip("tensorrt_rtx")


def test_every_precision_has_an_engine(several: Built) -> None:
    bundle = several.bundle
    m, found = bundle.manifest, engines_of(bundle)
    assert set(found) == {*SEVERAL, "update"} and m.backends == (RTX, "ort-cpu")
    bits = {
        key.removesuffix("/bits"): b
        for key, b in load_file(bundle.file(QUANTIZATION)).items()
        if key.endswith("/bits")
    }
    quantized = {str(a.precision): m.graph(a.precision, Emission.HALF).quantized for a in m.artifacts}
    for name, engine in found.items():
        made = engine.build
        assert made is not None and engine.file == f"{name}.{RTX}.engine"
        assert bundle.file(engine.file).stat().st_size > 100_000
        assert engine.runtime == trt.runtime_version(RTX)
        plan = made.plan
        in_8_bits = [b for key, b in bits.items() if key.startswith(f"{name}/") and b[1] <= 8]
        meant = len(quantized.get(name, {}))
        assert plan.meant == plan.taken == meant == len(in_8_bits), plan.fell_back
        assert plan.fell_back == {} and plan.kernels > 0
        assert (plan.meant > 0) == (name in ("w8a8", "w4a8", "w4a4", "w8a8-fp8"))
        assert made.settings == m.engine_settings
        assert made.settings.rows == (2, 16, 64)  # tensorrt.batch_sizes, twice for guidance
        assert (made.variant, made.notes) == ("", ())
        targets = {tuple(map(int, target.split("."))) for target in made.targets}
        assert min(targets) == ((8, 9) if name == "w8a8-fp8" else (8, 0)) and (8, 9) in targets
        assert not {*made.targets} & {*NOT_BY_DEFAULT}
    artifacts = {str(a.precision): a for a in m.artifacts if a.backend == RTX}
    assert has_gpu() or all(a.time_ms is None for a in artifacts.values())
    assert artifacts["w8a8-fp8"].lowering == "E4M3 x E4M3 at layer inputs, float16 in between"
    assert artifacts["w4a16"].lowering == "float16; weights stored as packed INT4"
    assert {"int8", "fp8"} == {dtype for graph in m.graphs for dtype in graph.quantized.values()}
    keys = [engine.build.key for engine in found.values() if engine.build is not None]
    assert len(set(keys)) == len(keys) == len(found)


def test_inspect_shows_what_fell_back(several: Built, tmp_path: Path, invoke: Invoke) -> None:
    path = copied(several, tmp_path)
    m = Bundle.open(path).manifest
    (old,) = [a for a in m.artifacts if a.name == f"w8a8.{RTX}"]
    assert old.build is not None
    plan = replace(old.build.plan, taken=1, meant=2, fell_back={"mid.conv": "float16"})
    new = replace(old, build=replace(old.build, plan=plan, notes=("a note",)))
    write_manifest(path, replace(m, artifacts=tuple(new if a == old else a for a in m.artifacts)))
    text = invoke("inspect", path).out
    lines = r"\n    mid\.conv fell back: it runs in float16\n    a note$"
    assert re.search(rf"^w8a8\.{RTX} +1 of 2 .*{lines}", text, re.MULTILINE)


def test_only_what_changed_is_built_again(classes: Built, tmp_path: Path, launch: Launch) -> None:
    """By keys that another folder and another process give too."""
    said: list[str] = []

    def built(
        precisions: tuple[str, ...], capability: str
    ) -> tuple[Bundle, dict[str, bytes], dict[str, str]]:
        sections: dict[str, Any] = {
            "sampler": {"n_steps": 2},
            "calibration": {"size": 2, "held_out": 2},
            "quantization": {"precisions": precisions},
            "plan": {"rule": "fixed", "steps": ("w8a8*2",)},
            "tensorrt": {"compute_capabilities": (capability,)},
        }
        said.clear()
        recipe = Recipe.load(classes.recipe).override(**sections, backends=(RTX,))
        bundle = build(recipe, tmp_path / "bundle", say=said.append)
        said[:] = sorted(line for line in said if line.startswith("engine "))
        found = engines_of(bundle)
        engines = {name: bundle.file(e.file).read_bytes() for name, e in found.items()}
        return bundle, engines, {name: e.build.key for name, e in found.items() if e.build}

    words = ("--n-steps", "2", "--calib-size", "2", "--precision", "w8a8", "--plan", "w8a8*2")
    words = (*words, "--backend", RTX, "--compute-capability", "8.9")
    process = launch("build", classes.recipe, "--out", tmp_path / "other", *words, PYTHONHASHSEED="12")
    out, error = process.communicate(timeout=300)
    assert (process.returncode, error) == (0, ""), out
    other = Bundle.open(tmp_path / "other")
    first = {name: other.file(e.file).read_bytes() for name, e in engines_of(other).items()}
    assert set(first) == {"update", "w8a8"}

    shutil.copytree(tmp_path / "other", tmp_path / "bundle")
    bundle, second, keys = built(("w8a8", "w4a8"), "8.9")
    assert {name: second[name] for name in first} == first
    assert [re.sub(r"[\d.]+ (s|MB)", r"# \1", line) for line in said] == [
        f"engine update.{RTX}: unchanged, not built again",
        f"engine w4a8.{RTX}: {said[1].split()[2]} of {said[1].split()[2]} layers in 8 bits, # s, # MB",
        f"engine w8a8.{RTX}: unchanged, not built again",
    ]
    assert {name: e.build.key for name, e in engines_of(other).items() if e.build} == {
        name: keys[name] for name in first
    }
    digests = {(g.precision, g.emission): g.digest for g in bundle.manifest.graphs}
    assert {(g.precision, g.emission): g.digest for g in other.manifest.graphs}.items() <= digests.items()
    assert bundle.manifest.update.digest == other.manifest.update.digest

    changed, third, newer = built(("w8a8",), "8.6")
    assert [re.sub(r"[\d.]+ (s|MB)", r"# \1", line) for line in said] == [
        f"engine update.{RTX}: # s, # MB",
        f"engine w8a8.{RTX}: {said[1].split()[2]} of {said[1].split()[2]} layers in 8 bits, # s, # MB",
    ]
    assert not set(newer.values()) & set(keys.values()) and third["w8a8"] != second["w8a8"]
    assert all(e.build is not None and e.build.targets == ("8.6",) for e in engines_of(changed).values())


REFUSED = '''
import torch
from torch import nn


class Refused(nn.Module):
    """A determinant: an operator that TensorRT does not have."""

    def __init__(self):
        super().__init__()
        self.inlet = nn.Conv2d(2, 16, 3, padding=1)
        self.middle = nn.Conv2d(16, 16, 3, padding=1)
        self.outlet = nn.Conv2d(16, 2, 3, padding=1)

    def forward(self, sample, timestep):
        h = self.middle(self.inlet(sample) + timestep[:, None, None, None] / 1000.0)
        return self.outlet(h) + 1e-6 * torch.linalg.det(sample)[:, :, None, None]


def make():
    return Refused()
'''


def test_a_graph_that_the_builder_refuses(tmp_path: Path, invoke: Invoke) -> None:
    (tmp_path / "net.py").write_text(REFUSED)
    (tmp_path / "scheduler_config.json").write_text("{}")
    model = '[model]\nsource = "net.py:make"\nsample_shape = [2, 8, 8]\nscheduler = "scheduler_config.json"\n'
    (tmp_path / "recipe.toml").write_text(model)
    words = ("--n-steps", "1", "--calib-size", "2", "--precision", "w8a8", "--backend", RTX, "--plan", "w8a8")
    line = invoke("build", tmp_path / "recipe.toml", "--out", tmp_path / "bundle", *words).error
    found = re.fullmatch(
        r"Error: tensorrt-rtx cannot read w8a8\.half\.onnx: node '.*' \(Det\): .*; the log is (\S+)\n", line
    )
    assert found is not None and Path(found[1]).is_file(), line
    assert not (tmp_path / "bundle").exists() and not list(tmp_path.glob(".bundle*"))
