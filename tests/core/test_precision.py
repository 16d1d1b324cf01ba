"""Precision: its names, and what they refuse."""

from __future__ import annotations

import pytest

from ptqd_export.core.precision import FP32, Precision
from ptqd_export.errors import RecipeError
from ptqd_export.typed import read_typed, to_plain


@pytest.mark.parametrize(
    "text", ["fp32", "fp16", "w8a8", "w4a8", "w4a4", "w2a3", "w4a16", "w8a16", "w8a8-fp8"]
)
def test_precision_round_trip(text: str) -> None:
    precision = Precision.parse(text)
    assert str(precision) == text
    assert precision.is_float == text.startswith("fp")
    assert precision.weight_only == text.endswith("a16")
    assert precision.number == ("fp8" if text.endswith("-fp8") else "int")


@pytest.mark.parametrize(
    "text",
    [
        "",
        "w8",
        "w9a8",
        "w1a8",
        "W8A8",
        "w8a8 ",
        "int8",
        "w16a16",
        "w9a16",
        "w8a15",
        "fp8",
        "fp16 ",
        "w4a8-fp8",
        "w8a16-fp8",
        "w8a8-fp4",
        "w8a8++",
        "w4a16+",
        "w8a8-fp8+",
        "w4a4++",
        "+",
    ],
)
def test_precision_refuses(text: str) -> None:
    with pytest.raises(RecipeError, match="w8a8"):
        Precision.parse(text)


def test_precision_order_and_fp32() -> None:
    assert sorted([FP32, Precision(8, 8), Precision(4, 8), Precision(4, 4)]) == [
        Precision(4, 4),
        Precision(4, 8),
        Precision(8, 8),
        FP32,
    ]
    assert len({Precision(8, 8), Precision(8, 8, "fp8"), Precision.parse("w8a8-fp8")}) == 2


@pytest.mark.parametrize(
    ("text", "levels"),
    [
        ("w4a4+", ["w3a4", "w3a5", "w4a4", "w3a6", "w4a5", "w3a8", "w4a6", "w4a8", "w8a8"]),
        ("w4a8+", ["w3a8", "w4a8", "w8a8"]),
        ("w8a4+", ["w7a4", "w8a4", "w7a5", "w8a5", "w7a6", "w8a6", "w7a8", "w8a8"]),
        ("w3a4+", ["w3a4", "w3a5", "w3a6", "w3a8", "w8a8"]),
        ("w2a6+", ["w2a6", "w2a7", "w2a8", "w8a8"]),
        ("w8a8+", ["w8a8", "fp32"]),
        ("w4a4", ["w4a4"]),
        ("w8a8-fp8", ["w8a8-fp8"]),
        ("w4a16", ["w4a16"]),
        ("fp32", ["fp32"]),
    ],
)
def test_levels_of_a_mixed_precision(text: str, levels: list[str]) -> None:
    """Each costs as many bit operations as the one before, or more, and none is mixed."""
    precision = Precision.parse(text)
    assert precision.mixed == text.endswith("+") and str(precision) == text
    assert [str(level) for level in precision.levels] == levels
    assert not any(level.mixed for level in precision.levels)
    costs = [level.weight_bits * level.activation_bits for level in precision.levels]
    assert costs == sorted(costs) == [level.operations for level in precision.levels]
    assert len(set(precision.levels)) == len(costs) and precision.base in precision.levels


def test_a_mixed_precision_is_none_of_its_levels() -> None:
    mixed, plain = Precision.parse("w4a4+"), Precision.parse("w4a4")
    assert Precision(8, 8) < Precision.parse("w8a8+") < FP32 and not Precision.parse("w8a8+").is_float
    assert mixed != plain and len({mixed, plain}) == 2 and not mixed.is_float and not mixed.weight_only
    assert sorted([Precision(4, 8), mixed, plain]) == [plain, mixed, Precision(4, 8)]


def test_plain_form_is_the_name() -> None:
    for text in ("w8a8", "w4a16", "w8a8-fp8", "fp16", "w4a4+"):
        precision = Precision.parse(text)
        assert to_plain(precision) == precision.to_plain() == text
        assert read_typed(Precision, text, "p") == Precision.from_plain(text) == precision
    for value in (8, None, ["w8a8"], {"weight_bits": 8}):
        with pytest.raises(RecipeError, match="give its name, such as w8a8"):
            Precision.from_plain(value)


def test_what_is_refused_is_quoted_in_a_bounded_line() -> None:
    for value in ("w8a8" * 100_000, "\x1b[31mw8a8\r\n", "w8a8\u202e"):
        with pytest.raises(RecipeError) as caught:
            Precision.from_plain(value)
        message = str(caught.value)
        assert len(message) < 400 and message.isascii() and message.isprintable()
