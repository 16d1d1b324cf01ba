"""benchmarks/false_alarms.py: right builds of some of its networks are not refused, and refusals are told."""

from __future__ import annotations

import importlib
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

from ptqd_export.errors import ParityError

ROOT = Path(__file__).resolve().parent.parent
HANDFUL = ("unet-padded-outside-plain", "conv-shared-twice", "conv-padded-oddly", "conv-norm-layer")
"""Padding outside the convs; a conv called twice in a row; little noise."""


@pytest.fixture
def script(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    monkeypatch.syspath_prepend(ROOT / "benchmarks")
    return importlib.import_module("false_alarms")


@pytest.mark.parametrize("name", HANDFUL)
def test_right_builds_are_not_refused(script: ModuleType, name: str) -> None:
    found = script.judged(script.ARCHITECTURES[name])
    assert found.refusals == {} and found.graphs >= 7 and found.layers > 0
    assert found.limit > 0 and found.z <= found.limit
    assert f"| all | 1 | {found.graphs} | 0 |" in script.report([found])


def test_refusals_and_failures_are_told(script: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    real = script.judge

    def judge(graphs: list[Any], *rest: Any) -> Any:
        if graphs[0].name == "w8a8.ort-cpu":
            raise ParityError("no reason")
        return real(graphs, *rest)

    monkeypatch.setattr(script, "judge", judge)
    architecture = script.ARCHITECTURES["conv-act-gelu"]
    assert "w8a8" in architecture.sections["quantization"]["precisions"]
    found = script.judged(architecture)
    assert found.refusals == {"w8a8.ort-cpu": "no reason"}
    assert "conv-act-gelu, w8a8.ort-cpu: no reason" in script.report([found])
    monkeypatch.setattr(script, "export_fp", lambda *a: 1 / 0)
    assert list(script.judged(architecture).refusals) == ["build"]


def test_the_networks_are_of_every_kind(script: ModuleType) -> None:
    models = importlib.import_module("random_models")
    networks = script.ARCHITECTURES.values()
    assert len(networks) >= 40 and len({a.seed for a in networks}) == len(networks)
    convs = [a.config for a in networks if a.kind == "ConvNet"]
    assert {c.get("norm", "group") for c in convs} == set(models.NORMS)
    assert {c.get("activation", "silu") for c in convs} == set(models.ACTIVATIONS)
    precisions = {p for a in networks for p in a.sections["quantization"]["precisions"]}
    assert precisions == {"fp32", "fp16", "w8a8", "w4a8", "w4a4", "w4a16", "w8a8-fp8"}
    assert {a.dtype for a in networks} == {"float32", "float16", "bfloat16"}
