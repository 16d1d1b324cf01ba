"""Plain values to typed ones and back: round trips, and every refusal."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from enum import StrEnum
from typing import Any, Literal

import pytest

from ptqd_export.core.figures import Figures, FloatFigures, LayerFigures, NoiseFigures, QuantizedFigures
from ptqd_export.core.model import InputSpec, ModelInfo
from ptqd_export.core.precision import FP32, Precision
from ptqd_export.core.sampling import Sampling
from ptqd_export.errors import RecipeError
from ptqd_export.recipe import Recipe
from ptqd_export.typed import SHOWN, brief, read_typed, to_plain, visible


class Colour(StrEnum):
    RED = "red"
    BLUE = "dark-blue"


@dataclass(frozen=True)
class Leaf:
    size: int
    share: float = 0.5


@dataclass(frozen=True)
class Tree:
    """Every kind of value that a file holds."""

    name: str
    colour: Colour
    leaf: Leaf
    leaves: tuple[Leaf, ...] = ()
    pair: tuple[int, str] = (0, "")
    kind: Literal["oak", "ash"] = "oak"
    maybe: float | None = None
    on: bool = False
    table: Mapping[Precision, Leaf] = field(default_factory=dict)
    texts: Mapping[str, tuple[float, ...]] = field(default_factory=dict)
    place: str = field(default="", metadata={"plain": False})


FULL = Tree(
    name="a",
    colour=Colour.BLUE,
    leaf=Leaf(3, 0.25),
    leaves=(Leaf(1), Leaf(2, -1e-300)),
    pair=(7, "ü"),
    kind="ash",
    maybe=0.1,
    on=True,
    table={Precision(4, 8): Leaf(4), FP32: Leaf(32)},
    texts={"w8a8.onnx": (1.0, 2.0), "": ()},
)
PLAIN: dict[str, Any] = {"name": "a", "colour": "red", "leaf": {"size": 1}}


def test_round_trip_of_every_kind() -> None:
    plain = to_plain(FULL)
    assert plain == {
        "name": "a",
        "colour": "dark-blue",
        "leaf": {"size": 3, "share": 0.25},
        "leaves": [{"size": 1, "share": 0.5}, {"size": 2, "share": -1e-300}],
        "pair": [7, "ü"],
        "kind": "ash",
        "maybe": 0.1,
        "on": True,
        "table": {"w4a8": {"size": 4, "share": 0.5}, "fp32": {"size": 32, "share": 0.5}},
        "texts": {"w8a8.onnx": [1.0, 2.0], "": []},
    }
    assert type(plain["colour"]) is str
    assert read_typed(Tree, json.loads(json.dumps(plain)), "tree") == FULL
    assert read_typed(Tree, {**plain, "on": False}, "tree") != FULL


def test_defaults_stand_for_missing_keys_and_what_is_not_plain_stays_out() -> None:
    tree = read_typed(Tree, PLAIN, "tree")
    assert tree == Tree("a", Colour.RED, Leaf(1, 0.5))
    assert "place" not in to_plain(dataclasses.replace(tree, place="here"))
    with pytest.raises(RecipeError, match="tree: unknown key 'place'"):
        read_typed(Tree, {**PLAIN, "place": "here"}, "tree")


def test_round_trips_of_the_package_s_own(class_info: ModelInfo) -> None:
    text = InputSpec("text", "float32", (4, 2))
    info = dataclasses.replace(class_info, inputs=(*class_info.inputs, text))
    sampling = Sampling.of(info, {"clip_sample": True}, n_steps=4, eta=1.0, guidance_scale=2.0)
    back = read_typed(Sampling, json.loads(json.dumps(to_plain(sampling))), "sampling")
    assert to_plain(back) == to_plain(sampling)
    assert (back.model, back.guidance_scale, back.solver) == (info, 2.0, "ddim")
    recipe = Recipe().override(model={"inputs": [to_plain(text)]})
    assert read_typed(Recipe, json.loads(json.dumps(recipe.to_dict())), "recipe") == recipe


def test_an_integer_is_read_as_a_float_and_nothing_else_is_converted() -> None:
    tree = read_typed(Tree, {**PLAIN, "maybe": 1}, "tree")
    assert tree.maybe == 1.0 and isinstance(tree.maybe, float)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"leaf": {"size": 1, "shere": 1.0}}, "tree.leaf: unknown key 'shere': did you mean 'share'?"),
        ({"leaf": {"size": 1, "zzz": 1}}, "tree.leaf: unknown key 'zzz': expected one of size, share"),
        ({"colour ": "red"}, "tree: unknown key 'colour ': did you mean 'colour'?"),
        ({"leaf": {}}, "tree.leaf: 'size' is missing"),
        ({"leaf": 1}, "tree.leaf: expected a table, got 1"),
        ({"leaf": None}, "tree.leaf: expected a table, got None"),
        ({"leaf": [["size", 1]]}, "tree.leaf: expected a table, got [['size', 1]]"),
        ({"name": 1}, "tree.name: expected str, got 1"),
        ({"name": None}, "tree.name: expected str, got None"),
        ({"leaf": {"size": 1.0}}, "tree.leaf.size: expected int, got 1.0"),
        ({"leaf": {"size": True}}, "tree.leaf.size: expected int, got True"),
        ({"leaf": {"size": "1"}}, "tree.leaf.size: expected int, got '1'"),
        ({"leaf": {"size": 1, "share": False}}, "tree.leaf.share: expected float, got False"),
        ({"leaf": {"size": 1, "share": "1"}}, "tree.leaf.share: expected float, got '1'"),
        ({"leaf": {"size": 1, "share": float("nan")}}, "tree.leaf.share: expected a finite number, got nan"),
        ({"maybe": float("-inf")}, "tree.maybe: expected a finite number, got -inf"),
        ({"maybe": 10**400}, "tree.maybe: expected a finite number, got 1000"),
        ({"maybe": [1.0]}, "tree.maybe: expected float, got [1.0]"),
        ({"on": 1}, "tree.on: expected bool, got 1"),
        ({"on": None}, "tree.on: expected bool, got None"),
        ({"colour": "green"}, "tree.colour: got 'green', expected one of red, dark-blue"),
        ({"colour": ["red"]}, "tree.colour: got ['red'], expected one of red, dark-blue"),
        ({"kind": "elm"}, "tree.kind: got 'elm', expected one of oak, ash"),
        ({"kind": ["oak"]}, "tree.kind: got ['oak'], expected one of oak, ash"),
        ({"leaves": {"size": 1}}, "tree.leaves: expected an array, got {'size': 1}"),
        ({"leaves": "abc"}, "tree.leaves: expected an array, got 'abc'"),
        ({"leaves": [{"size": 1}, {}]}, "tree.leaves[1]: 'size' is missing"),
        ({"pair": [1]}, "tree.pair: expected an array of 2, got 1"),
        ({"pair": [1, "a", 2]}, "tree.pair: expected an array of 2, got 3"),
        ({"pair": ["a", 1]}, "tree.pair[0]: expected int, got 'a'"),
        ({"table": []}, "tree.table: expected a table, got []"),
        ({"table": {"w4a8": 1}}, "tree.table.w4a8: expected a table, got 1"),
        ({"table": {"int4": {"size": 1}}}, "precision 'int4' is not known"),
        ({"texts": {"a b": [1, "2"]}}, "tree.texts.a b[1]: expected float, got '2'"),
        ({"texts": {1: [1.0]}}, "tree.texts (key): expected str, got 1"),
    ],
)
def test_a_refusal_says_where_and_what(change: dict[str, Any], message: str) -> None:
    with pytest.raises(RecipeError) as caught:
        read_typed(Tree, {**PLAIN, **change}, "tree")
    assert str(caught.value).startswith(message)


LAYERS = LayerFigures(2, 100, 0.0, 1.0)
QUANTIZED = QuantizedFigures(1e-7, LAYERS, NoiseFigures({"k": 0.5}, None, (1.0, 1.1), (None, 3.0)))


@pytest.mark.parametrize("figures", [FloatFigures(1e-6), QUANTIZED])
def test_a_union_of_dataclasses_is_told_by_its_keys(figures: Figures) -> None:
    plain = json.loads(json.dumps(to_plain(figures)))
    back = read_typed(Figures, plain, "parity")
    assert back == figures and type(back) is type(figures)
    assert read_typed(Mapping[str, Figures], {"a": plain}, "parity") == {"a": figures}


@pytest.mark.parametrize(
    ("plain", "message"),
    [
        ({}, "parity: 'largest_relative_error' is missing"),
        ({"fold": 1.0}, "parity: unknown key 'fold'"),
        ({"fold": 1.0, "layers": {}, "noise": {}}, r"parity\.layers: 'layers' is missing"),
        ({"largest_relative_error": "1"}, r"parity\.largest_relative_error: expected float, got '1'"),
        ([1.0], "parity: expected a table, got"),
        (None, "parity: expected a table, got None"),
    ],
)
def test_what_fits_no_dataclass_of_a_union_is_refused(plain: Any, message: str) -> None:
    with pytest.raises(RecipeError, match=message):
        read_typed(Figures, plain, "parity")


ESCAPES = "\x1b]0;title\x07\x1b[2J\r\n\x00\u202e\u2028"
HUGE: list[Any] = [
    ESCAPES,
    ESCAPES * 10_000,
    "x" * 1_000_000,
    ["x"] * 100_000,
    {ESCAPES: ESCAPES},
    {f"{i}": i for i in range(100_000)},
    10**4000,
    1 << 100_000,  # more digits than Python writes
    b"\xff" * 100_000,
    object(),
]


def deep(n: int) -> list[Any]:
    value: list[Any] = []
    for _ in range(n):
        value = [value]
    return value


@pytest.mark.parametrize("value", [*HUGE, deep(100_000)], ids=lambda v: type(v).__name__)
def test_nothing_of_a_value_reaches_a_terminal_as_it_is(value: Any) -> None:
    text = brief(value)
    assert len(text) <= SHOWN + len("...") and text.isascii() and text.isprintable()
    kinds = (Leaf, str, int, float, bool, Colour, Literal["oak"], tuple[int, ...], tuple[int, int])
    refused = 0
    for kind in (*kinds, Mapping[str, int], int | None, Precision):
        try:
            read_typed(kind, value, "place")
        except RecipeError as error:
            refused += 1
            message = str(error)
            assert len(message) < 500 and message.isascii() and message.isprintable(), (kind, message)
    assert refused >= len(kinds)


@pytest.mark.parametrize("key", [ESCAPES, "k" * 1_000_000, "ü" * 10])
def test_nothing_of_a_key_reaches_a_terminal_as_it_is(key: str) -> None:
    for kind, value in (
        (Leaf, {"size": 1, key: 1}),
        (Mapping[str, int], {key: "a"}),
        (Mapping[str, tuple[int, ...]], {key: [1, "a"]}),
        (Mapping[Precision, int], {key: 1}),
        (Tree, {**PLAIN, "texts": {key: 1}}),
    ):
        with pytest.raises(RecipeError) as caught:
            read_typed(kind, value, "place")
        message = str(caught.value)
        assert len(message) < 500 and message.isascii() and message.isprintable(), message


def test_visible_text() -> None:
    """Line ends stay, and every script that can be printed."""
    assert visible("a\nb \u00e9 \u4e2d \U0001f40e") == "a\nb \u00e9 \u4e2d \U0001f40e"
    shown = visible(ESCAPES * 2)
    assert shown.isascii() and all(c.isprintable() or c == "\n" for c in shown)
    assert r"\x1b[2J\r" in shown and r"\u202e\u2028" in shown


def test_brief_shows_short_values_whole() -> None:
    assert brief("w8a8") == "'w8a8'" and brief(None) == "None" and brief([1, "ü"]) == "[1, '\\xfc']"
    exact = "x" * (SHOWN - 2)
    assert brief(exact) == f"'{exact}'" and brief(exact + "x") == f"'{exact}x" + "..."
