"""Classifiers and statistics that the user brings: what is taken, and what is refused in one line."""

from __future__ import annotations

import importlib.util
from pathlib import Path

import numpy as np
import onnx
import pytest
from classifiers import write_classifier
from safetensors.numpy import load_file, save_file

from ptqd_export.errors import RecipeError
from ptqd_export.evaluate.features import Classifier, Data
from ptqd_export.evaluate.metrics import feature_stats, pixels

SHAPE = (1, 8, 8)


def test_features_and_classes_of_pictures(tmp_path: Path) -> None:
    """Of the samples as 8-bit pictures show them, in pieces."""
    weight = write_classifier(tmp_path / "c.onnx", SHAPE)
    x = np.random.default_rng(0).uniform(-2, 2, (600, *SHAPE))
    classifier = Classifier(tmp_path / "c.onnx", SHAPE)
    found = classifier(x)
    expected = pixels(x).reshape(600, -1) @ weight
    np.testing.assert_allclose(found.features, expected, atol=1e-5)
    assert found.classes is not None
    np.testing.assert_array_equal(found.classes, found.features.argmax(1))
    assert np.abs(found.features - x.reshape(600, -1) @ weight).max() > 0.1
    classifier.close()


def test_a_classifier_without_classes(tmp_path: Path) -> None:
    write_classifier(tmp_path / "c.onnx", SHAPE, outputs=("features",))
    assert Classifier(tmp_path / "c.onnx", SHAPE)(np.zeros((2, *SHAPE))).classes is None


def test_what_is_no_classifier(tmp_path: Path) -> None:
    path = tmp_path / "c.onnx"
    with pytest.raises(RecipeError, match="does not exist: give an ONNX file"):
        Classifier(path, SHAPE)
    path.write_bytes(b"nothing")
    with pytest.raises(RecipeError, match=r"c\.onnx is no ONNX file that runs here"):
        Classifier(path, SHAPE)
    write_classifier(path, SHAPE)
    with pytest.raises(RecipeError, match=r"expected one input \(None, 3, 8, 8\)"):
        Classifier(path, (3, 8, 8))
    write_classifier(path, SHAPE, outputs=("logits",))
    with pytest.raises(RecipeError, match="the output 'features'"):
        Classifier(path, SHAPE)


def test_statistics_of_data(tmp_path: Path) -> None:
    rows = np.random.default_rng(0).standard_normal((50, 4))
    mean, covariance = feature_stats(rows)
    save_file({"features": rows.astype(np.float32)}, tmp_path / "a.safetensors")
    save_file({"mean": mean, "covariance": covariance}, tmp_path / "b.safetensors")
    a, b = Data.load(tmp_path / "a.safetensors"), Data.load(tmp_path / "b.safetensors")
    assert a.features is not None and b.features is None and a.sha256 != b.sha256
    np.testing.assert_allclose(a.covariance, b.covariance, atol=1e-5)


@pytest.mark.parametrize("arrays", [{"mean": 4}, {"mean": 4, "covariance": (4, 3)}, {"other": 2}])
def test_what_are_no_statistics(arrays: dict[str, int | tuple[int, ...]], tmp_path: Path) -> None:
    path = tmp_path / "a.safetensors"
    save_file({name: np.zeros(shape) for name, shape in arrays.items()}, path)
    with pytest.raises(RecipeError, match=r"expected features \(M, D\), or mean"):
        Data.load(path)
    path.write_bytes(b"x")
    for file in (path, tmp_path / "nowhere"):
        with pytest.raises(RecipeError, match="cannot be read as safetensors"):
            Data.load(file)


def test_the_committed_classifier_is_its_weights() -> None:
    """calib/fashion_mnist/export_classifier.py writes the same bytes again."""
    folder = Path(__file__).parents[2] / "calib" / "fashion_mnist"
    spec = importlib.util.spec_from_file_location("export_classifier", folder / "export_classifier.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    made = module.graph(load_file(folder / "classifier.safetensors"))
    held = onnx.load(folder / "classifier.onnx")
    assert [n.SerializeToString() for n in made.graph.node] == [
        n.SerializeToString() for n in held.graph.node
    ]
    for a, b in zip(made.graph.initializer, held.graph.initializer, strict=True):
        assert (a.name, a.raw_data) == (b.name, b.raw_data)
