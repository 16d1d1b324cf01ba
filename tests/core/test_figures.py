"""Figures of the parity gate, as lines for people."""

from __future__ import annotations

from ptqd_export.core.figures import FloatFigures, LayerFigures, NoiseFigures, QuantizedFigures

LAYERS = LayerFigures(layers=12, outputs=1000, share_apart=0.0005, largest_steps=1.0)


def test_one_line_each() -> None:
    noise = NoiseFigures({"k": 1.25, "var": 2.5}, 4.0, (1.0,), (None,))
    apart = "12 layers, 5.0e-04 of outputs one step apart"
    assert QuantizedFigures(0.0, LAYERS, noise).summary() == (
        f"{apart}; noise within 2.50 standard errors (limit 4.0)"
    )
    few = NoiseFigures({"k": 1.25}, None, (1.0,), (None,))
    assert QuantizedFigures(0.0, LAYERS, few).summary() == (
        f"{apart}; noise not judged: too few held-out trajectories"
    )
    assert FloatFigures(3.21e-6).summary() == "equal to the torch model within 3e-06 RMS"
