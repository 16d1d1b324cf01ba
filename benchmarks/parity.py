"""What the parity gate of a build found: every graph against the simulation, and the noise of the emissions beside each other.

    python benchmarks/parity.py [BUNDLE] [--write]

Portable and half graphs ran on ONNX Runtime's CPU provider without optimisations, as they are written; the ort-cpu ones as it optimises them.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import numpy as np
from report import machine, table, write_section

from ptqd_export.bundle import Bundle


def rows(bundle: Bundle) -> list[list[str]]:
    """A row per quantized graph."""
    m = bundle.manifest
    found = []
    for graph in m.graphs:
        if graph.precision is None or graph.precision.is_float:
            continue
        figures = m.parity[f"{graph.precision}.{graph.emission}"]
        layers, noise = figures["layers"], figures["noise"]
        snr = np.mean(10 * np.log10(bundle.stats(graph.precision, graph.emission).snr))
        own = graph.emission.numerics(graph.precision) is graph.emission
        ratio = np.array(noise["mse_ratio"])
        found.append(
            [
                str(graph.precision),
                str(graph.emission),
                str(layers["layers"]),
                f"{layers['share_apart']:.1e}",
                f"{max(noise['largest_z'].values()):.2f} of {noise['limit_z']:.2f}",
                f"{ratio.min():.3f} to {ratio.max():.3f}",
                f"{snr:.1f}" if own else "portable's",
            ]
        )
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("bundle", nargs="?", type=Path, default=Path("engines/fashion_mnist"))
    parser.add_argument("--write", action="store_true", help="put the table into README.md")
    options = parser.parse_args()
    bundle = Bundle.open(options.bundle)
    header = [
        "precision",
        "graph",
        "layers",
        "outputs a step apart",
        "noise, standard errors apart",
        "error, engine / simulation",
        "SNR_Q before correction, dB",
    ]
    text = f"{table(header, rows(bundle))}\n\n{bundle.manifest.model.name}, {len(bundle.manifest.schedule)} steps. {machine()}."
    print(text)
    if options.write:
        write_section("parity", text)


if __name__ == "__main__":
    main()
