"""Quantized layers beside their simulation: equal but for ties, and a wrong one is named."""

from __future__ import annotations

import dataclasses
from typing import Any

import numpy as np
import pytest
from cases import rescaled

from ptqd_export.calibrate import LayerSimulator
from ptqd_export.core.backend import Emission
from ptqd_export.core.figures import LayerFigures
from ptqd_export.core.quant import Grid, LayerQuant, QuantizedNetwork
from ptqd_export.errors import ParityError
from ptqd_export.parity import layers
from ptqd_export.parity.judgement import MAX_SHARE_APART, Apart, judge
from ptqd_export.parity.layers import check_layers

Case = Any
"""That of conftest."""


@pytest.mark.parametrize("emission", list(Emission))
def test_layers_agree_and_a_wrong_scale_is_named(case: Case, emission: Emission) -> None:
    def check(net: QuantizedNetwork) -> LayerFigures:
        return check_layers("w4a4", case.graph(emission), net, emission, case.sampling, case.trajectories)

    found = check(case.quantized)
    assert found.layers == len(case.quantized.layers) and found.share_apart <= MAX_SHARE_APART
    assert found.outputs > 1000 and found.largest_steps <= 1.5
    name = "down_blocks.1.resnets.0.conv1"
    layer = case.quantized.layers[name]
    wrong = rescaled(layer, 1.05)
    with pytest.raises(ParityError, match=rf"layer {name} at step 0"):
        check(dataclasses.replace(case.quantized, layers={**case.quantized.layers, name: wrong}))
    with pytest.raises(ParityError, match="not in the graph"):
        check(dataclasses.replace(case.quantized, layers={**case.quantized.layers, "ghost": layer}))
    assert not list(case.folder.glob(".layers*"))


@pytest.mark.parametrize(("apart", "right"), [(Apart(100, 1, 1.0), True), (Apart(100, 2, 1.0), False)])
def test_one_tie_in_a_small_layer_is_let_pass(
    case: Case, apart: Apart, right: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It is a larger share than that of a usual layer may be."""
    monkeypatch.setattr(layers, "_compare", lambda *a: apart)
    graph, net = case.graph(Emission.PORTABLE), case.quantized
    arguments = ("w4a4", graph, net, Emission.PORTABLE, case.sampling, case.trajectories)
    if right:
        assert check_layers(*arguments).share_apart == 0.01
    else:
        with pytest.raises(ParityError, match=r"2\.00% of outputs"):
            check_layers(*arguments)


def test_samples_are_judged_together(case: Case, monkeypatch: pytest.MonkeyPatch) -> None:
    """What rounding may do goes by a channel's largest output, which one of them alone may lack."""
    judged, compare = list[tuple[int, int]](), layers._compare

    def counted(layer: Any, emission: Any, simulator: Any, source: Any, target: Any) -> Apart:
        judged.append((len(source), len(target)))
        return compare(layer, emission, simulator, source, target)

    monkeypatch.setattr(layers, "_compare", counted)
    graph = case.graph(Emission.PORTABLE)
    check_layers("w4a4", graph, case.quantized, Emission.PORTABLE, case.sampling, case.trajectories)
    first = case.trajectories.first(2)
    rows = {len(first.x[0])}
    assert rows == {2} and {size % 2 for pair in judged for size in pair} == {0}
    steps = {0, len(case.sampling) // 2, len(case.sampling) - 1}
    assert len(judged) == len(steps) * len(case.quantized.layers)


def test_a_bias_that_cancels_the_products_leaves_their_rounding() -> None:
    """As happens where a layer has an output of one position: the largest output tells little of it."""
    rng = np.random.default_rng(0)
    weight = rng.integers(-127, 128, (64, 256)).astype(np.int8)
    x = np.tile(rng.standard_normal((1, 1, 256)), (2, 1, 1)).astype(np.float32)
    scale = np.full(64, 1 / 256, np.float32)
    codes = np.clip(np.rint(x / np.float32(0.05)), -128, 127)
    products = (codes.astype(np.float64) * 0.05) @ (weight.astype(np.float64).T / 256)
    layer = LayerQuant(
        "l",
        "linear",
        weight,
        scale,
        8,
        Grid(0.05, -128, 127),
        8,
        None,
        (1e-3 - products[0, 0]).astype("f4"),
        64,
    )
    assert layer.bias is not None
    right = (products + layer.bias.astype(np.float64)).astype(np.float32)
    simulator = LayerSimulator(layer, Emission.PORTABLE)

    def found(target: np.ndarray) -> Apart:
        return layers._compare(layer, Emission.PORTABLE, simulator, x, target)

    alone = judge(right, simulator(x), np.ones((1, 1, 64)) * 1e-3, np.array(2e-5 * np.abs(right).max()))
    assert alone.share > 10 * MAX_SHARE_APART  # the largest output alone would refuse it
    assert found(right).tolerable
    assert not found(right + 1e-3 * np.abs(layer.bias)).tolerable
