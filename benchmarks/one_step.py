"""What each cure of quantization noise buys in one step, alone and with all others, on two models.

    python benchmarks/one_step.py [--models reference cross] [--n-steps 5] [--size 8] [--write]

SNR_Q of the simulated network, averaged over the steps in dB, on held-out full-precision trajectories; with
what ONNX Runtime's CPU kernels compute, and as the portable graph computes. No correction takes part. The
second model has random weights: its noise is a model's, its pictures are none.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path

import numpy as np
from architectures import REFERENCE, recipe_of
from quality import FIRST
from report import machine, table, write_section

from ptqd_export.calibrate import (
    TorchEngine,
    collect,
    measure,
    observe,
    open_model,
    quantize,
    set_threads,
    simulate,
)
from ptqd_export.core.backend import Emission
from ptqd_export.core.noise import NoiseStats
from ptqd_export.core.sampling import Sampling

PRECISIONS = ("w8a8", "w4a8", "w4a4")
EMISSIONS = (Emission.ORT_CPU, Emission.PORTABLE)
CURES: Mapping[str, Mapping[str, object]] = {
    "asymmetric input grids": {"input_grids": "asymmetric"},
    "conv outputs per channel": {"conv_outputs": "channel"},
    "smoothing": {"smoothing": 0.5},
    "rounding by GPTQ": {"rounding": "gptq"},
    "weight scales per channel": {"weight_scales": "channel"},
}
NONE: Mapping[str, object] = {**FIRST, "rounding": "nearest", "weight_scales": "tensor"}
"""Nothing but the ranges of least square error."""


def settings() -> dict[str, dict[str, object]]:
    """{row: recipe keys}: nothing, each cure alone, all but one, all."""
    every = {key: value for cure in CURES.values() for key, value in cure.items()}
    rows = {"none": dict(NONE)}
    rows |= {f"{name} alone": {**NONE, **cure} for name, cure in CURES.items()}
    rows |= {f"all but {name}": {**every, **{key: NONE[key] for key in cure}} for name, cure in CURES.items()}
    return {**rows, "all": every}


def rows_of(key: str, n_steps: int, size: int) -> list[list[str]]:
    """A row per setting: SNR_Q in dB, {precision, emission}."""
    rows = []
    with tempfile.TemporaryDirectory() as tmp:
        few = {"size": size, "held_out": size, "activation_range": "mse", "weight_range": "mse"}
        recipe = recipe_of(key, Path(tmp), precisions=PRECISIONS)
        recipe = recipe.override(sampler={"n_steps": n_steps}, calibration=few)
        network = open_model(recipe)
        sampling = Sampling.of(network.info, network.scheduler_config, **asdict(recipe.sampler))
        paths = collect(network, sampling, recipe, Path(tmp) / "paths")
        for name, keys in settings().items():
            own = recipe.override(quantization=dict(keys))
            seen = observe(network, sampling, own, paths)
            cells = []
            for precision in own.precisions:
                net = quantize(network, seen, precision, own)
                for emission in EMISSIONS:
                    with TorchEngine(simulate(network, net, emission), sampling) as engine:
                        sums = NoiseStats.pool(measure(engine, sampling, paths, "held_out"))
                    cells.append(f"{np.mean(10 * np.log10(sums.snr)):.1f}")
            rows.append([network.info.name, name, *cells])
            print(" | ".join(rows[-1]), file=sys.stderr)
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    known = (REFERENCE, "cross")
    parser.add_argument("--models", nargs="+", choices=known, default=known)
    parser.add_argument("--n-steps", type=int, default=5)
    parser.add_argument("--size", type=int, default=8, help="trajectories; as many are held out")
    parser.add_argument("--write", action="store_true", help="put the table into docs/benchmarks.md")
    args = parser.parse_args()
    set_threads(1)
    rows = [row for key in args.models for row in rows_of(key, args.n_steps, args.size)]
    head = ["model", "cures", *(f"{p}, {e}" for p in PRECISIONS for e in EMISSIONS)]
    text = (
        f"{table(head, rows)}\n\nSNR_Q in dB; {args.n_steps} steps, {args.size} trajectories to calibrate, "
        f"as many held out. {machine('torch')}."
    )
    print(text)
    if args.write:
        write_section("one-step", text)


if __name__ == "__main__":
    main()
