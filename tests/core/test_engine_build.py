"""Values of finished engines: settings, what a plan runs, and what is refused."""

from __future__ import annotations

import dataclasses
import json
from typing import Any

import pytest

from ptqd_export.core.engine_build import NOT_FOUND, NOT_KNOWN, EngineBuild, EngineSettings, PlanReport
from ptqd_export.errors import RecipeError
from ptqd_export.typed import read_typed, to_plain

SETTINGS = EngineSettings((1, 8, 32))
REPORT = PlanReport(3, 1, {"conv_in": "Float", "a": NOT_FOUND}, 20, {"conv": 3, "reformat": 17})
BUILD = EngineBuild("0a" * 32, ("8.9",), SETTINGS, 1.5, 1 << 30, REPORT, None, 5, "float-clip", ("a note",))


@pytest.mark.parametrize("rows", [(0, 1, 2), (2, 1, 3), (1, 3, 2)])
def test_rows_are_in_order(rows: tuple[int, int, int]) -> None:
    with pytest.raises(RecipeError, match="expected fewest, usual and most rows of a call"):
        EngineSettings(rows)
    assert EngineSettings((1, 1, 1)).rows == (1, 1, 1)


@pytest.mark.parametrize("text", ["8", "8.9 ", "8.9\n", "sm_89", "100.9", "8.95", "", "\x1b[31m" * 1000])
def test_a_compute_capability_is_major_minor(text: str) -> None:
    with pytest.raises(RecipeError, match=r"expected major\.minor, such as 8\.9") as caught:
        EngineSettings((1, 8, 32), (text,))
    assert str(caught.value).isprintable() and len(str(caught.value)) < 200
    assert EngineSettings((1, 8, 32), ("8.9", "12.0")).compute_capabilities == ("8.9", "12.0")


def test_settings_for_a_gpu() -> None:
    """The default is all but what it leaves out; a list is only what it names."""
    assert SETTINGS.for_gpu("8.9") == SETTINGS
    assert SETTINGS.for_gpu("7.5").compute_capabilities == ("7.5",)
    named = dataclasses.replace(SETTINGS, compute_capabilities=("8.6",))
    assert named.for_gpu("8.6") == named
    assert named.for_gpu("8.9").compute_capabilities == ("8.6", "8.9")


def test_what_a_plan_runs_otherwise() -> None:
    assert REPORT.complaints() == [
        "conv_in fell back: it runs in Float",
        "a is not in the plan by its name",
    ]
    unknown = PlanReport(1, 0, {"b": NOT_KNOWN}, 1, {})
    assert unknown.complaints() == ["b may or may not run in 8 bits: the plan does not say"]
    assert PlanReport(3, 3, {}, 1, {}).complaints() == []
    # Float: layers were meant to run in 8 bits, and it is known of each that it does not.
    assert (
        PlanReport(1, 0, {"a": "Half"}, 1, {}).is_float and PlanReport(1, 0, {"a": NOT_FOUND}, 1, {}).is_float
    )
    assert not REPORT.is_float and not unknown.is_float and not PlanReport(0, 0, {}, 1, {}).is_float


@pytest.mark.parametrize("key", ["", "0a" * 31, "0A" * 32, "0a" * 32 + "\n", "zz" * 32, "\x1b" * 100_000])
def test_a_key_is_a_sha256(key: str) -> None:
    with pytest.raises(RecipeError, match="expected 64 hexadecimal digits") as caught:
        dataclasses.replace(BUILD, key=key)
    assert str(caught.value).isprintable() and len(str(caught.value)) < 600


def test_plain_form_round_trip() -> None:
    plain = json.loads(json.dumps(to_plain(BUILD)))
    assert read_typed(EngineBuild, plain, "build") == BUILD
    changes: list[tuple[dict[str, Any], str]] = [
        ({"key": 1}, r"build\.key: expected str, got 1"),
        ({"seconds": None}, r"build\.seconds: expected float, got None"),
        ({"settings": {"rows": [1, 2]}}, r"build\.settings\.rows: expected an array of 3, got 2"),
        ({"settings": {"rows": [3, 2, 1]}}, "expected fewest, usual and most"),
        ({"plan": {**plain["plan"], "types": {"conv": "3"}}}, r"build\.plan\.types\.conv: expected int"),
    ]
    for change, message in changes:
        with pytest.raises(RecipeError, match=message):
            read_typed(EngineBuild, {**plain, **change}, "build")
