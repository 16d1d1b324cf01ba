"""What the parity gate of a build found: each graph against its simulation, and the noise of the emissions.

    python benchmarks/parity.py [BUNDLE] [--write]

Portable and half graphs ran on ONNX Runtime's CPU provider as they are written, the ort-cpu ones as it
optimises them. Measures nothing: the figures are those that the bundle holds.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import numpy as np
from report import REFERENCE_BUNDLE, machine, table, write_section

from ptqd_export.bundle.bundle import Bundle
from ptqd_export.core.figures import QuantizedFigures

HEADER = (
    "precision",
    "graph",
    "layers",
    "outputs a step apart",
    "noise, standard errors apart",
    "error, engine / simulation",
    "SNR_Q before correction, dB",
)


def rows(bundle: Bundle) -> list[list[str]]:
    """A row per quantized graph."""
    m = bundle.manifest
    found = []
    for graph in m.graphs:
        figures = m.parity[graph.name]
        if not isinstance(figures, QuantizedFigures):
            continue
        layers, noise = figures.layers, figures.noise
        limit = "not judged" if noise.limit_z is None else f"{noise.limit_z:.2f}"
        snr = np.mean(10 * np.log10(bundle.stats(graph.precision, graph.emission).snr))
        own = graph.emission.numerics(graph.precision) is graph.emission
        found.append(
            [
                str(graph.precision),
                str(graph.emission),
                str(layers.layers),
                f"{layers.share_apart:.1e}",
                f"{max(noise.largest_z.values()):.2f} of {limit}",
                f"{min(noise.mse_ratio):.3f} to {max(noise.mse_ratio):.3f}",
                f"{snr:.1f}" if own else "portable's",
            ]
        )
    return found


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("bundle", nargs="?", type=Path, default=REFERENCE_BUNDLE)
    parser.add_argument("--write", action="store_true", help="put the table into docs/benchmarks.md")
    options = parser.parse_args()
    bundle = Bundle.open(options.bundle)
    sampling = bundle.manifest.sampling
    text = f"{table(HEADER, rows(bundle))}\n\n{sampling.model.name}, {len(sampling)} steps. {machine()}."
    print(text)
    if options.write:
        write_section("parity", text)


if __name__ == "__main__":
    main()
