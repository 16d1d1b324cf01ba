"""The schema of others, read and written: what they refuse is refused."""

from __future__ import annotations

import json
from typing import Any

import pytest

from ptqd_export.core.plan import Plan, fixed
from ptqd_export.core.precision import FP32, Precision
from ptqd_export.core.step_policy import modes, read_policy, write_policy
from ptqd_export.errors import RecipeError

W8A8, W4A8, W4A4 = Precision(8, 8), Precision(4, 8), Precision(4, 4)
PUBLISHED: dict[str, Any] = {
    "schema_version": 1,
    "type": "first_last_n",
    "index_space": "denoising_loop_iteration",
    "scope": ["transformer"],
    "default_mode": "native",
    "first_steps": {"count": 3, "mode": "a16"},
    "last_steps": {"count": 2, "mode": "a16"},
    "overlap": "a16",
    "reasoner": "a16",
}


def plan(policy: dict[str, Any], n: int) -> str:
    return str(read_policy(json.dumps(policy)).plan(n, W8A8, FP32))


def test_a_published_policy() -> None:
    assert plan(PUBLISHED, 20) == "fp32*3 w8a8*15 fp32*2"
    assert plan(PUBLISHED, 5) == "fp32*5"
    assert plan(PUBLISHED, 4) == "fp32*4"  # both ends: a16
    assert plan(PUBLISHED | {"overlap": "native"}, 4) == "fp32*2 w8a8*1 fp32*1"
    assert plan(PUBLISHED, 1) == "w8a8*1"  # one step stays native
    nothing = {"first_steps": {"count": 0, "mode": "a16"}, "last_steps": {"count": 0, "mode": "a16"}}
    assert plan(PUBLISHED | nothing, 6) == "w8a8*6"


def test_it_lies_in_a_config() -> None:
    inner: dict[str, Any] = PUBLISHED
    for name in ("diffusion_step_policy", "runtime", "quantization_config"):
        inner = {name: inner, "other": 3}
        assert read_policy(json.dumps(inner)) == read_policy(json.dumps(PUBLISHED))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"schema_version": 2}, "has schema_version 2: expected 1"),
        ({"schema_version": True}, "schema_version: expected int"),
        ({"type": "every_other"}, "type: got 'every_other', expected one of first_last_n"),
        ({"index_space": "timestep"}, "index_space: got 'timestep'"),
        ({"default_mode": "a16"}, "default_mode: got 'a16', expected one of native"),
        ({"scope": ["text_encoder"]}, r"is for \['text_encoder'\]: expected transformer or unet"),
        ({"scope": []}, "expected transformer or unet"),
        ({"first_steps": {"count": -1, "mode": "a16"}}, "has -1 steps at an end"),
        ({"first_steps": {"count": 10**9, "mode": "a16"}}, "has 1000000000 steps at an end"),
        ({"first_steps": {"count": 1.5, "mode": "a16"}}, "first_steps.count: expected int"),
        ({"last_steps": {"count": 1, "mode": "a8"}}, "last_steps.mode: got 'a8'"),
        ({"last_steps": {"count": 1}}, "last_steps: 'mode' is missing"),
        ({"middle_steps": 3}, "unknown key 'middle_steps'"),
    ],
)
def test_what_others_refuse_is_refused(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(RecipeError, match=message):
        read_policy(json.dumps(PUBLISHED | changes))


@pytest.mark.parametrize("name", list(PUBLISHED))
def test_nothing_may_be_missing(name: str) -> None:
    with pytest.raises(RecipeError, match=f"diffusion_step_policy: '{name}' is missing"):
        read_policy(json.dumps({key: value for key, value in PUBLISHED.items() if key != name}))


@pytest.mark.parametrize(
    "text",
    ["", "{", "[" * 100_000, "null", "3", "[]", b"\xff\xfe", '{"quantization_config": 3}', '{"runtime": {}}'],
)
def test_files_that_hold_none(text: str | bytes) -> None:
    with pytest.raises(RecipeError) as caught:
        read_policy(text)
    assert "\n" not in str(caught.value) and len(str(caught.value)) < 400


@pytest.mark.parametrize("runs", ["fp32*3 w8a8*15 fp32*2", "fp32*4 w8a8*16", "w8a8*17 fp32*3", "w8a8*20"])
def test_there_and_back(runs: str) -> None:
    text = write_policy(fixed(runs.split(), 20))
    assert str(read_policy(text).plan(20, W8A8, FP32)) == runs
    outer = json.loads(text)["quantization_config"]["runtime"]["diffusion_step_policy"]
    assert outer.keys() == PUBLISHED.keys() and outer["scope"] == ["transformer"]


@pytest.mark.parametrize(
    "runs",
    [
        "w4a4*4 w8a8*16",  # no 16-bit activations
        "w8a8*4 fp32*2 w8a8*14",  # not at the ends
        "fp32*2 w8a8*2 w4a8*2 fp32*1",
        "fp16*2 w8a8*2 fp32*1",
        "fp32*3",  # nothing native
        "fp32*1",
    ],
)
def test_plans_that_the_schema_does_not_know(runs: str) -> None:
    with pytest.raises(RecipeError, match="cannot be written as a diffusion_step_policy"):
        write_policy(Plan.from_plain(runs))


def test_what_stands_for_the_modes() -> None:
    w8a16, w4a16, fp16 = (Precision.parse(text) for text in ("w8a16", "w4a16", "fp16"))
    assert modes([FP32, W8A8, W4A8, W4A4]) == (W8A8, FP32)
    assert modes([FP32, fp16, W8A8, w4a16]) == (W8A8, fp16)
    assert modes([FP32, fp16, W8A8, w8a16]) == (W8A8, w8a16)
    assert modes([W4A8, W4A4, w4a16]) == (W4A8, w4a16)
    mixed, fp8 = Precision.parse("w8a8+"), Precision.parse("w8a8-fp8")
    assert modes([fp16, fp8, W8A8]) == (W8A8, fp16) and modes([fp16, W8A8, mixed, fp8]) == (mixed, fp16)
    for lacking, what in (([W8A8, W4A4], "16-bit activations"), ([FP32, w8a16], "quantized activations")):
        with pytest.raises(RecipeError, match=f"needs a precision with {what}"):
            modes(lacking)
