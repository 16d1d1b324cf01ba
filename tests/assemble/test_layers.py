"""The quantized layers of every precision; those of mixed ones by measured sensitivity, which a stopped build
leaves to the next one."""

from __future__ import annotations

import json
import re
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from cases import Case
from chain import chain, chain_recipe
from helpers import content

from ptqd_export import run
from ptqd_export.assemble import assemble, build, layers
from ptqd_export.assemble.layers import quantize_all
from ptqd_export.bundle.bundle import MANIFEST
from ptqd_export.bundle.layers import read_layers
from ptqd_export.calibrate import open_model
from ptqd_export.core.backend import Emission
from ptqd_export.core.bits import LayerSensitivity, to_measure
from ptqd_export.core.precision import Precision
from ptqd_export.core.quant import QuantizedNetwork
from ptqd_export.errors import ModelError, RecipeError
from ptqd_export.recipe import Recipe
from ptqd_export.typed import read_typed, to_plain

MIXED, W4A4, W4A8, W8A8 = (Precision.parse(text) for text in ("w4a4+", "w4a4", "w4a8", "w8a8"))
EDGES = ("first", "last")
INNER = ("blocks.0.0", "blocks.0.2", "blocks.1.0", "blocks.1.2")
"""Quantized, while `mix` is not found in the graph."""
Found = tuple[dict[Precision, QuantizedNetwork], dict[Precision, LayerSensitivity]]
Call = Callable[..., Found]


@pytest.fixture(scope="module")
def case(tmp_path_factory: pytest.TempPathFactory) -> Case:
    return chain(tmp_path_factory.mktemp("chain"))[0]


@pytest.fixture
def call(case: Case, tmp_path: Path) -> Call:
    """quantize_all at w4a4+ and w4a4, with a work folder of its own."""

    def quantized(
        key: str = "key",
        say: Callable[[str], None] = print,
        exported: Sequence[str] = (*EDGES, *INNER),
        **changes: object,
    ) -> Found:
        recipe = case.recipe.override(quantization={"precisions": ("w4a4+", "w4a4"), **changes})
        layers = dict.fromkeys(exported)
        rest = case.observed, case.sampling, case.trajectories, layers, tmp_path, key, say
        return quantize_all(recipe, case.network, *rest)

    return quantized


def bits(network: QuantizedNetwork) -> dict[str, Precision]:
    found = network.layers.items()
    return {name: Precision(layer.weight_bits, layer.activation_bits) for name, layer in found}


def test_sensitive_layers_get_more_bits(call: Call) -> None:
    """Within the budget; the plain precision beside it has one number of bits."""
    said: list[str] = []
    networks, sensitivities = call(say=said.append, layer_budget=1.2)
    found = sensitivities.pop(MIXED)
    assert not sensitivities and found.layers == INNER and set(found.noise) == set(to_measure(MIXED))
    assert bits(networks[W4A4]) == dict.fromkeys(INNER, W4A4)
    chosen = bits(networks[MIXED])
    assert len(set(chosen.values())) > 1 and {*networks[MIXED].float_macs} == {*EDGES, "mix"}
    (line,) = said
    counts = [f"{count} {level}" for level, count in sorted(Counter(chosen.values()).items())]
    assert line == f"w4a4+: of 4 layers {', '.join(counts)}"
    assert networks[W4A4].bops < networks[MIXED].bops <= 1.2 * networks[W4A4].bops
    as_much = call(layer_budget=1.0)[0]
    assert as_much[MIXED].bops <= as_much[W4A4].bops == networks[W4A4].bops
    totals = {level: dict(zip(found.layers, found.total(level), strict=True)) for level in MIXED.levels}

    def noise(used: Mapping[str, Precision]) -> float:
        return sum(totals[level][name] for name, level in used.items())

    assert noise(chosen) < noise(bits(as_much[MIXED])) < noise(dict.fromkeys(INNER, W4A4))
    assert bits(call(layer_budget=16.0)[0][MIXED]) == dict.fromkeys(INNER, W8A8)


def test_layers_that_stay_float(call: Call) -> None:
    """At w8a8+: by their noise at w8a8, as far as their time goes. Not all of them can."""
    mixed, precisions = Precision.parse("w8a8+"), ("w8a8", "w8a8+")
    networks, sensitivities = call(precisions=precisions, layer_budget=1.9)
    found = sensitivities.pop(mixed)
    assert not sensitivities and found.layers == INNER and set(found.noise) == {W8A8}
    kept = bits(networks[mixed])
    left = [name for name in INNER if name not in kept]
    assert 0 < len(kept) < len(INNER) and set(kept.values()) == {W8A8}
    macs = dict(zip(found.layers, found.macs, strict=True))
    assert sum(macs[name] for name in left) <= 0.45 * sum(macs.values())
    assert max(INNER, key=lambda name: found.total(W8A8)[INNER.index(name)] / macs[name]) in left
    assert {*networks[mixed].float_macs} == {*EDGES, "mix", *left}
    assert bits(networks[W8A8]) == dict.fromkeys(INNER, W8A8)
    assert bits(call(precisions=precisions, layer_budget=1.0)[0][mixed]) == bits(networks[W8A8])
    with pytest.raises(RecipeError, match=r"leaves all layers of w8a8\+ in float: give less than 3"):
        call(precisions=precisions, layer_budget=3.0)


def test_edges_that_stay_float(call: Call) -> None:
    """Where they are in 8 bits otherwise, they may be what makes most noise."""
    mixed, said = Precision.parse("w8a8+"), list[str]()
    networks, found = call(
        say=said.append, precisions=("w8a8", "w8a8+"), edge_layers="w8a8", layer_budget=1.5
    )
    left = set(networks[W8A8].layers) - set(networks[mixed].layers)
    noise = dict(zip(found[mixed].layers, found[mixed].total(W8A8), strict=True))
    assert max(noise, key=lambda name: noise[name]) in left & {*EDGES}
    assert said == [f"w8a8+: of 6 layers {6 - len(left)} w8a8, {len(left)} float"]


def test_edges_in_8_bits_are_none_of_the_choice(call: Call) -> None:
    """Neither what they cost nor what is said."""
    said: list[str] = []
    networks, _ = call(say=said.append, edge_layers="w8a8", layer_budget=1.2)
    plain, _ = call(layer_budget=1.2)
    chosen = bits(networks[MIXED])
    assert {chosen.pop(name) for name in EDGES} == {W8A8} and chosen == bits(plain[MIXED])
    assert sum(map(int, re.findall(r"(\d+) w", said[0].partition("layers")[2]))) == len(INNER)


def test_bits_by_hand(call: Call) -> None:
    """The last glob that matches counts; nothing is left of the budget for others."""
    given = ("blocks.*=w8a8", "blocks.1.*=w3a5")
    networks, _ = call(layer_budget=1.0, layer_bits=given)
    by_hand = {name: W8A8 if name.startswith("blocks.0") else Precision(3, 5) for name in INNER}
    assert bits(networks[MIXED]) == by_hand and bits(networks[W4A4]) == dict.fromkeys(INNER, W4A4)


def test_a_graph_without_the_layers_is_refused(call: Call) -> None:
    with pytest.raises(ModelError, match=r"no layer left to quantize at w4a4\+: the exported graph"):
        call(exported=())


def test_globs_that_match_nothing_are_told(call: Call) -> None:
    said: list[str] = []
    call(say=said.append, skip=("blocks.0.*", "blokcs.*"), layer_bits=("*.9=w8a8",))
    told = [line for line in said if "matches none" in line]
    assert [line.partition(" of ")[0] for line in told] == ["'blokcs.*'", "'*.9'"]


def test_sensitivity_is_taken_up(call: Call, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """From the work folder, under what decides it; a file that is none is measured again."""
    measured: list[Precision] = []
    original = layers.sensitivity

    def counting(*arguments: Any) -> LayerSensitivity:
        measured.append(arguments[4])
        return original(*arguments)

    monkeypatch.setattr(layers, "sensitivity", counting)
    networks, found = call()
    (file,) = tmp_path.glob("layer-sensitivity-*.json")
    content = file.read_bytes()
    again, same = call()
    assert measured == [MIXED] and same == found and bits(again[MIXED]) == bits(networks[MIXED])
    assert read_typed(LayerSensitivity, json.loads(content), "") == found[MIXED]
    for spoilt in (content[:-9], b"[]", content.replace(b'"steps": [', b'"steps": [7, ')):
        file.write_bytes(spoilt)
        assert call()[1] == found and file.read_bytes() == content
    assert measured == [MIXED] * 4
    call(key="another")
    call(smoothing=0.0)
    assert measured == [MIXED] * 6 and len([*tmp_path.glob("layer-sensitivity-*.json")]) == 3


def test_what_lies_there_decides(call: Call, tmp_path: Path) -> None:
    """The other way round: the test above could not tell whether the file is used."""
    _, found = call(layer_budget=2.0)
    (file,) = tmp_path.glob("layer-sensitivity-*.json")
    quiet = {p: tuple((0.0,) * len(row) for row in rows) for p, rows in found[MIXED].noise.items()}
    file.write_text(json.dumps(to_plain(replace(found[MIXED], noise=quiet))))
    assert bits(call(layer_budget=2.0)[0][MIXED]) == dict.fromkeys(INNER, MIXED.levels[0])


def recipe_at(folder: Path) -> Recipe:
    plan = {"rule": "fixed", "steps": ("w4a4+", "w4a4", "w4a4+"), "sensitivity": "uniform"}
    quantization = {"precisions": ("w4a4+", "w4a4"), "gate": False, "layer_budget": 1.2}
    return chain_recipe(folder, "nearest").override(quantization=quantization, plan=plan)


def test_a_bundle_of_a_mixed_precision(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """It says the bits of every layer, holds them, runs, and comes out the same; a build that was stopped
    after the sensitivity does not measure it again."""
    recipe = recipe_at(tmp_path)
    first = build(recipe, tmp_path / "a b")
    m = first.manifest
    by_bits, found = m.layers[MIXED], m.layer_sensitivity[MIXED]
    assert set(m.layers) == {MIXED, W4A4} and set(m.layer_sensitivity) == {MIXED}
    assert len(by_bits) > 2 and "float" in by_bits and set(by_bits["float"]) == set(EDGES)
    assert set(m.layers[W4A4]) == {"float", "w4a4"} and set(found.layers) == {*INNER, "mix"}
    assert m.bops[W4A4] < m.bops[MIXED] and m.half_bops[MIXED] < m.bops[MIXED]

    network = open_model(recipe)

    def weight(name: str) -> dict[str, np.ndarray]:
        return {"weight": network.module.get_parameter(f"{name}.weight").detach().numpy()}

    held = read_layers(first.reader, [MIXED], weight)[MIXED]
    assert {f"w{q.weight_bits}a{q.activation_bits}" for q in held.values()} == {*by_bits} - {"float"}
    for name, layer in held.items():
        assert name in by_bits[f"w{layer.weight_bits}a{layer.activation_bits}"]
    assert run(first.path, 2, seed=0).shape == (2, 1, 6, 6)

    def stop(*arguments: Any) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patched:
        patched.setattr(assemble, "measure_all", stop)
        with pytest.raises(KeyboardInterrupt):
            build(recipe, tmp_path / "b")
    monkeypatch.setattr(layers, "sensitivity", stop)
    second = build(recipe, tmp_path / "b")
    assert second.manifest.layer_sensitivity == m.layer_sensitivity and second.manifest.layers == m.layers
    unlike = {name for name, data in content(first.path).items() if content(second.path)[name] != data}
    assert unlike == {MANIFEST}


def test_a_bundle_with_layers_left_float(tmp_path: Path) -> None:
    """Less noise than w8a8 by whatever backend, and the layers listed as what they are."""
    mixed = Precision.parse("w8a8+")
    quantization = {"precisions": ("w8a8", "w8a8+"), "gate": False, "layer_budget": 1.9}
    plan = {"rule": "fixed", "steps": ("w8a8+", "w8a8", "w8a8+"), "sensitivity": "uniform"}
    bundle = build(
        chain_recipe(tmp_path, "nearest").override(quantization=quantization, plan=plan), tmp_path / "b"
    )
    m = bundle.manifest
    left = set(m.layers[mixed]["float"]) - set(m.layers[W8A8]["float"])
    assert left and left < set(m.layer_sensitivity[mixed].layers) and m.bops[W8A8] < m.bops[mixed]
    assert {g.file for g in m.graphs if g.precision == mixed} > {"w8a8-mixed.half.onnx"}
    for emission in (Emission.PORTABLE, Emission.ORT_CPU):
        assert (bundle.stats(mixed, emission).snr > 1.1 * bundle.stats(W8A8, emission).snr).all()
    assert run(bundle.path, 2, seed=0).shape == (2, 1, 6, 6)
