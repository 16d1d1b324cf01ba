"""A network without weights tells what one with weights does."""

from __future__ import annotations

import dataclasses
from collections import Counter
from pathlib import Path

from cases import W4A8, W8A8, Case

from ptqd_export.assemble import estimate
from ptqd_export.calibrate import quantize
from ptqd_export.calibrate.intake import open_source
from ptqd_export.calibrate.memory import largest_layer_bytes
from ptqd_export.calibrate.network import is_meta
from ptqd_export.calibrate.observe import outline
from ptqd_export.core.precision import FP32, HALF_BITS


def test_a_folder_is_opened_without_numbers(case: Case) -> None:
    empty = open_source(case.recipe, weights=False).network
    assert is_meta(empty.module) and not is_meta(case.network.module)
    assert all(value.is_meta for value in empty.module.state_dict().values())
    assert dataclasses.replace(empty.info, sha256="") == dataclasses.replace(case.network.info, sha256="")
    a, b, seen = outline(empty), outline(case.network), case.observed
    assert list(a.layers) == list(b.layers) == list(seen.layers)
    assert a.product_macs == b.product_macs == seen.product_macs > 0
    kinds = [{n: (v.kind, v.macs, v.vector) for n, v in o.layers.items()} for o in (a, b, seen)]
    assert kinds[0] == kinds[1] == kinds[2] and a.inputs == b.inputs
    assert largest_layer_bytes(empty) == largest_layer_bytes(case.network)


def test_the_estimate_decides_as_quantize_does(case: Case, tmp_path: Path) -> None:
    """Layers, multiply-accumulates and bit operations are the same, edges in float and at 8 bits."""
    precisions = (FP32, W8A8, W4A8)
    for edges in ("float", "w8a8"):
        quantization = {"precisions": tuple(map(str, precisions)), "edge_layers": edges}
        recipe = case.recipe.override(quantization=quantization)
        said = estimate(recipe, tmp_path / "none")
        for one, precision in zip(said.precisions, precisions, strict=True):
            net = quantize(case.network, case.observed, precision, recipe)
            assert (one.precision, one.bops, one.half_bops) == (precision, net.bops, net.bops_at(HALF_BITS))
            assert said.macs == net.macs
            bits = Counter(f"w{v.weight_bits}a{v.activation_bits}" for v in net.layers.values())
            assert one.layers == dict(bits) | {"float": len(net.float_macs)}
    assert list(tmp_path.iterdir()) == []
