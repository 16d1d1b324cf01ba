"""Time and memory of a build against the size of the model, and what `build --dry-run` had said of both.

    python benchmarks/calibration_cost.py [--only SIZE] [--calib-size 4] [--n-steps 5] [--write]

Convolutional UNets with attention, 32x32, random weights, default precisions. A build at default settings
takes hours for the largest, so calibration is short here; the last column says what --dry-run expects of a
whole one. To see whether it works: `--only small --calib-size 2 --n-steps 2`.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from architectures import ARCHITECTURES
from diffusers import DDIMScheduler, UNet2DModel
from report import OUT, Kept, command_cost, count_threads, machine, table, write_section

SIZES = {"small": (64, 128, 128), "middle": (128, 256, 384), "large": (256, 512, 640)}
"""Channels of the levels."""
HEADER = (
    "parameters",
    "multiply-accumulates",
    "build, min",
    "expected",
    "peak, GB",
    "expected",
    "default settings, min, expected",
)


def expected(words: Sequence[str]) -> dict[str, Any]:
    """What --dry-run says."""
    done = subprocess.run(
        [sys.executable, "-m", "ptqd_export", "build", *words, "--dry-run", "--json"],
        capture_output=True,
        text=True,
        check=True,
    )
    return dict(json.loads(done.stdout))


def measure(name: str, folder: Path, options: argparse.Namespace) -> dict[str, Any]:
    torch.manual_seed(0)
    model = UNet2DModel(**ARCHITECTURES["unet"].config | {"block_out_channels": SIZES[name]})
    model.save_pretrained(folder / "model")
    DDIMScheduler(clip_sample=False).save_pretrained(folder / "model")
    short = ["--calib-size", str(options.calib_size), "--n-steps", str(options.n_steps)]
    words = [str(folder / "model"), "--out", str(folder / "bundle")]
    usual, said = expected(words), expected([*words, *short])
    seconds, peak = command_cost(["build", *words, *short])
    row = [
        f"{said['parameters'] / 1e6:.1f} M",
        f"{said['macs'] / 1e9:.1f} G",
        f"{seconds / 60:.1f}",
        f"{said['seconds'] / 60:.1f}",
        f"{peak / 1e9:.1f}",
        f"{sum(said['memory_bytes'].values()) / 1e9:.1f}",
        f"{usual['seconds'] / 60:.0f}",
    ]
    return {"row": row, "machine": machine("onnxruntime", "torch")}


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--only", nargs="*", choices=SIZES, help="measure these, keep other figures")
    parser.add_argument("--calib-size", type=int, default=4)
    parser.add_argument("--n-steps", type=int, default=5)
    parser.add_argument("--write", action="store_true", help="put the table into docs/benchmarks.md")
    options = parser.parse_args()
    OUT.mkdir(parents=True, exist_ok=True)
    kept = Kept("calibration-cost")
    for name in SIZES if options.only is None else options.only:
        with tempfile.TemporaryDirectory(dir=OUT) as folder:
            kept.keep(name, measure(name, Path(folder), options))
        print(" ".join(kept[name]["row"]))
    rows = [kept[name]["row"] for name in SIZES if name in kept]
    threads = count_threads(os.environ.get("OMP_NUM_THREADS", "all"))
    text = (
        f"{table(HEADER, rows)}\n\n{kept.machines()}. Calibrated on {options.calib_size} samples of "
        f"{options.n_steps} steps; w8a8, w4a8 and w4a4; {threads}."
    )
    print(text)
    if options.write:
        write_section("calibration-cost", text)


if __name__ == "__main__":
    main()
