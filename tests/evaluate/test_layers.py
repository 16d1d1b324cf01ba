"""The layers of each precision: bits, bit operations, the most sensitive, and the map of layers and steps."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
from helpers import Built

from ptqd_export.bundle import Bundle, Manifest
from ptqd_export.core.bits import LayerSensitivity
from ptqd_export.core.precision import Precision
from ptqd_export.evaluate.inspect import text
from ptqd_export.evaluate.layers import MOST, layer_lines, plot_sensitivities

MIXED = Precision.parse("w4a4+")
W4A4, W4A8, W8A8 = map(Precision.parse, ("w4a4", "w4a8", "w8a8"))


def found(n: int) -> LayerSensitivity:
    """Layer i makes i + (i + 1)^2 / 2 of noise; a hundredth with more bits."""
    noise = tuple((float(i), float(i + 1) ** 2) for i in range(n))
    less = tuple((a / 100, b / 100) for a, b in noise)
    names = tuple(f"block.{i}" for i in range(n))
    # The order of a mapping means nothing: the precision's base is looked for.
    return LayerSensitivity(names, (1,) * n, (0, 3), (1.0, 0.5), {W8A8: less, W4A8: less, W4A4: noise})


def manifest(rgb: Built, n: int) -> Manifest:
    names = found(n).layers
    return replace(
        rgb.bundle.manifest,
        bops={MIXED: 2_500_000_000},
        half_bops={MIXED: 1_250_000_000},
        layers={MIXED: {"w4a4": names[:-1], "w8a8": names[-1:], "float": ("inlet", "outlet")}},
        layer_sensitivity={MIXED: found(n)},
        correction=replace(
            rgb.bundle.manifest.correction,
            steps={
                name.replace("w4a4", "w4a4+"): record
                for name, record in rgb.bundle.manifest.correction.steps.items()
                if name.startswith("w4a4.")
            },
        ),
    )


def test_bits_of_layers_and_bit_operations(rgb: Built) -> None:
    lines = layer_lines(manifest(rgb, 12))
    assert lines[1].split() == ["32", "bits", "16", "bits"]
    assert lines[2] == "  w4a4+              2.5      1.25  w4a4 11, w8a8 1, float 2"
    shown = text(rgb.bundle, [])
    m = rgb.bundle.manifest
    for precision, bops in m.bops.items():
        row = f"  {precision!s:<12}{bops / 1e9:>10.4g}{m.half_bops[precision] / 1e9:>10.4g}"
        assert row in shown
        for bits, names in m.layers.get(precision, {}).items():
            assert (f"{bits} {len(names)}" in shown.partition(row)[2].partition("\n")[0]) == bool(names)
    assert "that make most noise" not in shown


def test_the_most_sensitive_layers_come_first(rgb: Built) -> None:
    lines = layer_lines(manifest(rgb, 12))
    start = next(i for i, line in enumerate(lines) if "that make most noise" in line)
    assert lines[start].startswith(f"layers of w4a4+ that make most noise, {MOST} of 12: ")
    assert lines[start].endswith("a weighted sum of steps 0, 3")
    assert lines[start + 1].split() == ["layer", "bits", "w4a4", "w4a8", "w8a8"]
    rows = [line.split() for line in lines[start + 2 :]]
    assert [row[0] for row in rows] == [f"block.{i}" for i in range(11, 1, -1)]
    assert [row[1] for row in rows] == ["w8a8"] + ["w4a4"] * 9
    assert float(rows[0][2]) == pytest.approx(11 + 0.5 * 12**2, rel=0.05)
    assert float(rows[0][3]) == pytest.approx(0.01 * float(rows[0][2]), rel=0.05)
    assert f"{3} of 3: " in "\n".join(layer_lines(manifest(rgb, 3)))


def test_the_map_shows_the_noise_and_the_bits(rgb: Built, tmp_path: Path) -> None:
    def draw(name: str, m: Manifest) -> bytes:
        plot_sensitivities(m, tmp_path / f"{name}.png")
        return (tmp_path / f"{name}-layers-w4a4-mixed.png").read_bytes()

    m = manifest(rgb, 4)
    first = draw("a", m)
    assert draw("b", m) == first
    other = replace(found(4), noise={**found(4).noise, W4A4: ((0.0, 1.0),) * 4})
    assert draw("c", replace(m, layer_sensitivity={MIXED: other})) != first
    assert draw("d", replace(m, layers={MIXED: {"w4a8": found(4).layers}})) != first
    other = replace(found(4), noise={**found(4).noise, W8A8: ((0.0, 1.0),) * 4})
    assert draw("e", replace(m, layer_sensitivity={MIXED: other})) == first
    odd = ("$", "$\\frac$", "a_b^c", "{")
    other, bits = replace(found(4), layers=odd), {MIXED: {"w4a4": odd}}
    assert draw("f", replace(m, layers=bits, layer_sensitivity={MIXED: other})) != first
    plain: Bundle = rgb.bundle
    plot_sensitivities(plain.manifest, tmp_path / "plain.png")
    assert not list(tmp_path.glob("plain*"))
