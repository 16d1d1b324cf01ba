"""ModelInfo and InputSpec: conditions, their twins without one, and every refusal."""

from __future__ import annotations

import dataclasses
import json
from typing import Any

import numpy as np
import pytest

from ptqd_export.core.model import MAX_CLASSES, MAX_CONDITION, MAX_ELEMENTS, InputSpec, ModelInfo
from ptqd_export.errors import RecipeError
from ptqd_export.typed import read_typed, to_plain


def test_conditions(class_info: ModelInfo) -> None:
    assert class_info.labels == (0, 1, 2) and class_info.channels == 1
    assert class_info.conditions(None, 5)["class_labels"].tolist() == [0, 1, 2, 0, 1]
    feeds = class_info.conditions([2, 0], 2)["class_labels"]
    assert feeds.tolist() == [2, 0] and feeds.dtype == np.int64
    assert class_info.null_conditions(2)["class_labels"].tolist() == [3, 3]
    assert read_typed(ModelInfo, to_plain(class_info), "model") == class_info


@pytest.mark.parametrize("labels", [[0, 4], [-1, 0], [0], [0, 1, 2]])
def test_bad_labels(class_info: ModelInfo, labels: list[int]) -> None:
    with pytest.raises(RecipeError, match=r"class label"):
        class_info.conditions(labels, 2)


def test_tensor_conditions() -> None:
    info = ModelInfo("text", (3, 8, 8), (InputSpec("text", "float32", (4, 2)),), "")
    assert info.conditions(None, 2)["text"].shape == (2, 4, 2)
    value = np.ones((2, 4, 2))
    given = info.conditions(None, 2, {"text": value})["text"]
    assert given.dtype == np.float32 and given.all()
    assert not info.null_conditions(2)["text"].any()
    with pytest.raises(RecipeError, match=r"\(2, 4, 2\)"):
        info.conditions(None, 2, {"text": np.ones((2, 4))})
    with pytest.raises(RecipeError, match="'txt'"):
        info.conditions(None, 2, {"txt": value})
    with pytest.raises(RecipeError, match="no classes"):
        info.conditions([0, 1], 2)


def test_guidance_needs_a_null(class_info: ModelInfo) -> None:
    class_info.check_guidance(3.0)
    bare = ModelInfo("bare", (1, 4, 4), (), "")
    bare.check_guidance(1.0)
    with pytest.raises(RecipeError, match="no condition"):
        bare.check_guidance(2.0)
    no_null = ModelInfo("n", (1, 4, 4), (InputSpec("y", num_classes=4),), "")
    assert no_null.labels == (0, 1, 2, 3)
    with pytest.raises(RecipeError, match="no null class"):
        no_null.check_guidance(0.0)


@pytest.mark.parametrize("label", [True, 1.0, "1", None, np.float64(1)])
def test_labels_are_integers(class_info: ModelInfo, label: Any) -> None:
    with pytest.raises(RecipeError, match="is not an integer: give class numbers"):
        class_info.conditions([label, 0], 2)
    assert class_info.conditions([np.int32(1), 0], 2)["class_labels"].tolist() == [1, 0]


def test_labels_in_turn_are_those_of_the_samples(class_info: ModelInfo) -> None:
    """Whatever the batch: sample i has class i modulo their number."""
    whole = class_info.labels_in_turn(range(7))
    assert whole == [0, 1, 2, 0, 1, 2, 0]
    assert class_info.labels_in_turn([5, 3]) == [whole[5], whole[3]]
    assert ModelInfo("bare", (1, 4, 4), (), "").labels_in_turn(range(7)) is None


def test_a_null_class_in_the_middle_is_no_label() -> None:
    info = ModelInfo("m", (1, 4, 4), (InputSpec("y", num_classes=4, null_class=1),), "")
    assert info.labels == (0, 2, 3)
    assert info.conditions(None, 4)["y"].tolist() == [0, 2, 3, 0]
    assert info.null_conditions(1)["y"].tolist() == [1]
    with pytest.raises(RecipeError, match="class label 1 is out of range"):
        info.conditions([1], 1)


GOOD = {"name": "y", "num_classes": 4, "null_class": 3}
TENSOR = {"name": "text", "dtype": "float32", "shape": [4, 2]}


@pytest.mark.parametrize(
    ("spec", "change", "message"),
    [
        (GOOD, {"name": "a\x1b[2J"}, "the input name .* holds characters that cannot be printed"),
        (GOOD, {"name": "a\nb"}, "cannot be printed"),
        (GOOD, {"num_classes": None}, "input 'y' is int64: a class label needs num_classes >= 1 and shape"),
        (GOOD, {"shape": [1]}, "a class label needs num_classes >= 1 and shape"),
        (GOOD, {"num_classes": 0, "null_class": None}, f"num_classes is 0: give 1 to {MAX_CLASSES}"),
        (GOOD, {"num_classes": -1, "null_class": None}, "num_classes is -1: give 1 to"),
        (GOOD, {"num_classes": MAX_CLASSES + 1}, f"num_classes is {MAX_CLASSES + 1}: give 1 to"),
        (GOOD, {"null_class": 4}, r"null_class is 4: give one of at least two ids below num_classes \(4\)"),
        (GOOD, {"null_class": -1}, "null_class is -1: give one of at least two ids"),
        (GOOD, {"num_classes": 1, "null_class": 0}, "null_class is 0: give one of at least two ids"),
        (GOOD, {"dtype": "int32"}, "got 'int32', expected one of int64, float32"),
        (TENSOR, {"num_classes": 4}, "input 'text' is float32 and has num_classes"),
        (TENSOR, {"null_class": 0}, r"null_class is 0: .*num_classes \(None\)"),
        (TENSOR, {"shape": [4, 0]}, r"input 'text' has shape \[4, 0\]: expected positive sizes"),
        (TENSOR, {"shape": [-4, -2]}, r"has shape \[-4, -2\]: expected positive sizes"),
        (TENSOR, {"shape": [MAX_CONDITION + 1]}, f"at most {MAX_CONDITION} elements"),
        (TENSOR, {"shape": [2**14, 2**15]}, f"at most {MAX_CONDITION} elements"),
    ],
)
def test_an_input_refuses(spec: dict[str, Any], change: dict[str, Any], message: str) -> None:
    assert to_plain(read_typed(InputSpec, spec, "input"))["name"] == spec["name"]  # it is the change
    with pytest.raises(RecipeError, match=message) as caught:
        read_typed(InputSpec, spec | change, "input")
    text = str(caught.value)
    assert text.isprintable() and len(text) < 300


def test_the_bounds_of_an_input_are_allowed() -> None:
    assert InputSpec("y", num_classes=MAX_CLASSES, null_class=MAX_CLASSES - 1).shape == ()
    assert InputSpec("x", "float32", (2**11, 2**11)).num_classes is None
    assert InputSpec("x", "float32", ()).shape == ()


LABELS = InputSpec("y", num_classes=4)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"sample_shape": (1, 4)}, r"sample_shape is \[1, 4\]: expected \[channels, height, width\]"),
        ({"sample_shape": (1, 0, 4)}, r"sample_shape is \[1, 0, 4\]"),
        ({"sample_shape": (1, -4, -4)}, r"sample_shape is \[1, -4, -4\]"),
        ({"sample_shape": (1, 2**14, 2**15)}, f"at most {MAX_ELEMENTS} elements"),
        ({"inputs": (LABELS, LABELS)}, "two inputs are called 'y'"),
        ({"inputs": (InputSpec("x", "float32"),) * 65}, "65 inputs: expected 64 at most"),
        ({"inputs": (LABELS, InputSpec("z", num_classes=2))}, "declares two class-label inputs"),
        *(
            ({"inputs": (InputSpec(name, "float32"),)}, f"two inputs are called '{name}'")
            for name in ("sample", "timestep", "step", "epsilon")
        ),
    ],
)
def test_a_model_refuses(change: dict[str, Any], message: str) -> None:
    good = ModelInfo("m", (1, 4, 4), (LABELS, InputSpec("text", "float32", (3,))), "")
    with pytest.raises(RecipeError, match=message):
        dataclasses.replace(good, **change)


def test_names_and_shapes_are_quoted_in_a_bounded_line() -> None:
    long = "n" * 100_000
    for spec in (
        {"name": long},
        {"name": "\u202e" * 100_000},
        {"name": "x", "dtype": "float32", "shape": [0] * 100_000},
        {"name": "y", "num_classes": 10**4000},
        {"name": "y", "num_classes": 2, "null_class": 10**4000},
    ):
        with pytest.raises(RecipeError) as caught:
            read_typed(InputSpec, spec, "input")
        assert str(caught.value).isprintable() and len(str(caught.value)) < 400
    with pytest.raises(RecipeError) as caught:
        ModelInfo("m", (1, 4, 4), (InputSpec(long, "float32"),) * 2, "")
    assert len(str(caught.value)) < 400


def test_plain_form_round_trip(class_info: ModelInfo) -> None:
    text = InputSpec("text", "float32", (4, 2), values="contexts.npy")
    info = dataclasses.replace(class_info, inputs=(*class_info.inputs, text))
    plain = json.loads(json.dumps(to_plain(info)))
    assert read_typed(ModelInfo, plain, "model") == info != class_info
    with pytest.raises(RecipeError, match=r"model\.sample_shape: expected an array of 3, got 2"):
        read_typed(ModelInfo, {**plain, "sample_shape": [1, 4]}, "model")
