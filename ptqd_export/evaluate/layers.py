"""The layers of each precision, for people: their bits, what they cost, and which carry most of the noise."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np

from ..bundle.manifest import Manifest
from ..core.bits import LayerSensitivity
from ..core.precision import Precision
from .plots import plot_layers

MOST = 10
"""How many of the most sensitive layers the page names."""


def layer_lines(manifest: Manifest) -> list[str]:
    """Lines on bit operations and bits of layers per precision, and on the layers of mixed precisions."""
    title = "bit operations of one evaluation (10^9), by the width of float parts, and layers by their bits:"
    lines = [title, f"  {'':<12}{'32 bits':>10}{'16 bits':>10}"]
    for precision, bops in manifest.bops.items():
        half = manifest.half_bops[precision]
        counts = [f"{b} {len(names)}" for b, names in manifest.layers.get(precision, {}).items() if names]
        lines.append(
            f"  {precision!s:<12}{bops / 1e9:>10.4g}{half / 1e9:>10.4g}  {', '.join(counts)}".rstrip()
        )
    for precision, found in manifest.layer_sensitivity.items():
        lines += _sensitive(precision, found, manifest.layers[precision])
    return lines


def _sensitive(
    precision: Precision, found: LayerSensitivity, layers: Mapping[str, Sequence[str]]
) -> list[str]:
    """Lines on the layers that make most noise at the base of a mixed precision, quantized alone."""
    totals = {level: found.total(level) for level in precision.levels if level in found.noise}
    base = totals[precision.base]
    order = sorted(range(len(found.layers)), key=lambda i: -base[i])[:MOST]
    bits = _bits(layers)
    width = max(len(found.layers[i]) for i in order)
    steps = ", ".join(map(str, found.steps))
    title = f"layers of {precision} that make most noise, {len(order)} of {len(found.layers)}: "
    title += f"c^2 E D^2 / E e^2 of each alone, a weighted sum of steps {steps}"
    head = f"  {'layer':<{width}}  {'bits':<6}" + "".join(f"{level!s:>10}" for level in totals)
    lines = ["", title, head]
    for i in order:
        name = found.layers[i]
        noise = "".join(f"{total[i]:>10.2g}" for total in totals.values())
        lines.append(f"  {name:<{width}}  {bits[name]:<6}{noise}")
    return lines


def plot_sensitivities(manifest: Manifest, path: Path) -> None:
    """Draw a map of layers and steps to `<name>-layers-<precision>.png` for each mixed precision.

    Its colour is the noise that a layer makes at the precision's base, its label has the bits that it got.
    """
    for precision, found in manifest.layer_sensitivity.items():
        bits, level = _bits(manifest.layers[precision]), precision.base
        plot_layers(
            path.with_name(f"{path.stem}-layers-{precision.stem}{path.suffix}"),
            [f"{name}  {bits[name]}" for name in found.layers],
            found.steps,
            np.asarray(found.noise[level], np.float64),
            label=f"noise of the layer alone at {level}: E D^2 / E e^2",
            title=f"{manifest.sampling.model.name}: layers of {precision} and the bits they got",
        )


def _bits(layers: Mapping[str, Sequence[str]]) -> dict[str, str]:
    return {name: bits for bits, names in layers.items() for name in names}
