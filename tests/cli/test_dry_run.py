"""build --dry-run on the command line."""

from __future__ import annotations

from pathlib import Path

import pytest
from helpers import Invoke, listing
from models import save_pipeline

from ptqd_export import assemble
from ptqd_export.cli.estimate import estimate_text
from ptqd_export.core.estimate import Estimate, PrecisionEstimate
from ptqd_export.core.precision import Precision

SAID = Estimate(
    "m",
    "ddim, 4 steps",
    2_500_000,
    1_000,
    (PrecisionEstimate(Precision.parse("w4a4+"), {"w4a4": 3, "float": 1}, 102_400, 51_200, True),),
    {"codes": 1_500_000_000, "decoder": 0},
    {"weights": 2_000_000},
    3_000_000_000,
    {"calibration": 1200, "plan": 34},
    0.0125,
    7200.0,
)


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_pipeline(tmp_path_factory.mktemp("dry") / "tiny")


def test_text_and_json_say_the_same(
    model: Path, invoke: Invoke, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(assemble, "estimate", lambda recipe, out: SAID)
    words = ("build", model, "--out", tmp_path / "b", "--dry-run")
    told, data = invoke(*words), invoke(*words, "--json").json
    assert told.code == 0 and told.err == "" and told.out.strip() == estimate_text(SAID)
    for part in (
        "w4a4+: layers 3 w4a4, 1 float; at most 10.0% of fp32's bit operations, 5.0%",
        "bundle: about 1.5 GB (codes 1.5 GB)",
        "1,234, for one sample each: 1,200 calibration, 34 plan",
        "time: about 2.0 h, an estimate: 12.5 ms per evaluation",
    ):
        assert part in told.out
    assert data["precisions"][0]["layers"] == {"w4a4": 3, "float": 1}
    assert data["evaluations"] == {"calibration": 1200, "plan": 34} and data["seconds"] == 7200.0
    assert list(tmp_path.iterdir()) == []


def test_a_dry_run_builds_nothing(
    model: Path, invoke: Invoke, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    def build(*words: object, **options: object) -> None:
        raise AssertionError("a dry run builds")

    monkeypatch.setattr(assemble, "build", build)
    before = listing(model)
    words = ("build", model, "--out", tmp_path / "b", "--dry-run", "--precision", "w8a8")
    told = invoke(*words).out
    assert "w8a8: layers" in told and "nothing was written" in told
    assert listing(model) == before and list(tmp_path.iterdir()) == []
    assert "does not exist" in invoke("build", tmp_path / "no", "--dry-run").error
