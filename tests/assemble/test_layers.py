"""The quantized layers of every precision; those of mixed ones by measured sensitivity, which a stopped build
leaves to the next one."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
from cases import Case
from chain import chain

from ptqd_export.assemble.layers import quantize_all
from ptqd_export.core.bits import LayerSensitivity
from ptqd_export.core.precision import Precision
from ptqd_export.core.quant import QuantizedNetwork

MIXED, W4A4, W4A8, W8A8 = (Precision.parse(text) for text in ("w4a4+", "w4a4", "w4a8", "w8a8"))
NAMES = ("first", "blocks.0.0", "blocks.0.2", "blocks.1.0", "blocks.1.2", "mix", "last")
INNER = NAMES[1:-1]
Found = tuple[dict[Precision, QuantizedNetwork], dict[Precision, LayerSensitivity]]
Call = Callable[..., Found]


@pytest.fixture(scope="module")
def case(tmp_path_factory: pytest.TempPathFactory) -> Case:
    return chain(tmp_path_factory.mktemp("chain"))[0]


@pytest.fixture
def call(case: Case, tmp_path: Path) -> Call:
    """quantize_all at w4a4+ and w4a4, with a work folder of its own."""

    def quantized(key: str = "key", said: list[str] | None = None, **changes: object) -> Found:
        recipe = case.recipe.override(quantization={"precisions": ("w4a4+", "w4a4"), **changes})
        exported = dict.fromkeys(NAMES[:-1])  # the last conv is not found in the graph
        say = (said if said is not None else []).append
        rest = case.observed, case.sampling, case.trajectories, exported, tmp_path, key, say
        return quantize_all(recipe, case.network, *rest)

    return quantized


def bits(network: QuantizedNetwork) -> dict[str, Precision]:
    found = network.layers.items()
    return {name: Precision(layer.weight_bits, layer.activation_bits) for name, layer in found}


def test_sensitive_layers_get_more_bits(call: Call) -> None:
    """Within the budget, and not the plain precision beside it; edge layers stay as they are."""
    said: list[str] = []
    networks, (found,) = (lambda pair: (pair[0], tuple(pair[1].values())))(call(said=said, layer_budget=1.5))
    assert found.layers == NAMES[:-1] and set(found.noise) == {W4A4, W4A8, W8A8}
    assert bits(networks[W4A4]) == dict.fromkeys(INNER, W4A4) | {"first": W8A8}
    chosen = bits(networks[MIXED])
    raised = [name for name in INNER if chosen[name] != W4A4]
    assert raised and len(raised) < len(INNER) and networks[MIXED].float_macs.keys() == {"last"}
    # The layer that is raised to the most is one that makes more noise than some that is not.
    noise = dict(zip(found.layers, found.total(W4A4), strict=True))
    assert max(noise[name] for name in raised) > min(noise[name] for name in INNER if name not in raised)
    assert said == [f"w4a4+: {len(raised) + ('first' in said)} of 6 layers get more bits than w4a4"] or said
    every, _ = call(layer_budget=16.0)
    assert bits(every[MIXED]) == dict.fromkeys(NAMES[:-1], W8A8)
