"""The classifier behind the Frechet distance of the reference model."""

from __future__ import annotations

import importlib.util
import json
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest

from ptqd_export.evaluate.metrics import feature_stats, frechet_distance

FASHION = Path(__file__).parents[2] / "calib" / "fashion_mnist"


def load_module(path: Path) -> ModuleType:
    spec = importlib.util.spec_from_file_location(f"fashion_mnist_{path.stem}", path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_classifier_knows_the_test_images_and_sees_when_they_are_spoilt() -> None:
    data = load_module(FASHION / "data.py")
    if not data.DEBIAN_PATH.is_dir():
        pytest.skip("the Debian package dataset-fashion-mnist is not installed")
    classifier = load_module(FASHION / "classifier.py")
    figures = json.loads((FASHION / "classifier.json").read_text())
    assert figures["test_accuracy"] >= 0.91
    images, labels = data.load(split="t10k")
    # A share of the 10,000 keeps this quick; its accuracy has a standard error of 0.6 %.
    x = (images[:2000].astype(np.float32) / 127.5 - 1)[:, None]
    extract = classifier.load_features(FASHION)
    features = extract(x)
    assert features.shape == (2000, 64) and features.dtype == np.float64
    assert abs((extract.classes(features) == labels[:2000]).mean() - figures["test_accuracy"]) < 0.02
    reference = classifier.load_reference(FASHION)
    clean = frechet_distance(*feature_stats(features), *reference)
    noisy = np.clip(x + 0.2 * np.random.default_rng(0).standard_normal(x.shape), -1, 1)
    spoilt = frechet_distance(*feature_stats(extract(noisy)), *reference)
    assert clean < 1.0 and spoilt > 5 * clean
    with pytest.raises(ValueError, match=r"\(N, 1, 32, 32\)"):
        extract(x[:, 0])
