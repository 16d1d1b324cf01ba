"""Models of full size with random weights, from checkpoint to picture: time, memory, size, errors of engines.

    python benchmarks/full_size.py [--only NAME] [--precision w8a8] [--write]

Each configuration's checkpoint is written as CompVis writes it. `ptqd-export build` and `run` are processes
of their own, whose time and largest memory are measured. Calibration is as short as it can be, as random
weights teach nothing: times grow with `--calib-size` and `--n-steps`. The largest model takes 20 GB of memory
and 15 GB of disk. To see whether it works: `--small`.
"""

from __future__ import annotations

import argparse
import os
import sys
import tempfile
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from random_models import random_feeds
from report import OUT, ROOT, Kept, command_cost, machine, table, write_section

from ptqd_export.bundle.bundle import Bundle
from ptqd_export.calibrate import open_source, set_threads
from ptqd_export.core.backend import ORT_CPU
from ptqd_export.core.engine import EPSILON, SAMPLE, STEP, TIMESTEP
from ptqd_export.core.figures import relative_rms
from ptqd_export.core.precision import FP32, Precision
from ptqd_export.core.timing import time_calls
from ptqd_export.recipe import Recipe
from ptqd_export.runtime.open import open_artifact

sys.path.insert(0, str(ROOT / "tests" / "support"))
from ldm_models import CONFIGURATIONS, original, small, write

BUILD = (
    "configuration",
    "UNet",
    "build, min",
    "its peak, GB",
    "bundle, GB",
    "of fp32's weights",
    "run, s",
    "its peak, GB",
)
TIMES = ("configuration", "fp32 engine to torch", "PyTorch, s", "fp32, s", "{}, s", "fp32 / {}")
GIGA = 1e9
ENCODER = ("encoder.", "quant_conv.")
"""Parts of a first stage that no bundle holds."""
RECIPE = """
[model]
checkpoint = "model.ckpt"
ldm_config = "config.yaml"
"""


def bytes_of(folder: Path) -> int:
    """Of all files below."""
    return sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())


def engines(folder: Path, bundle: Bundle, precision: Precision) -> tuple[float, dict[str, float]]:
    """(distance of the fp32 engine to the module, seconds per evaluation of one sample).

    The distance is relative, root mean square.
    """
    network = open_source(Recipe.load(folder)).network
    feeds = random_feeds(bundle.manifest.sampling, 1)
    inputs = {name: torch.from_numpy(value) for name, value in feeds.items() if name != STEP}
    sample, timestep = inputs.pop(SAMPLE), inputs.pop(TIMESTEP)

    def eager() -> np.ndarray:
        with torch.inference_mode():
            return network.module(sample, timestep, **inputs).numpy()

    opened = {
        str(p): open_artifact(bundle, bundle.manifest.artifact(p, ORT_CPU), None) for p in (FP32, precision)
    }
    got = opened[str(FP32)](feeds)[EPSILON]
    calls: dict[str, Callable[[], object]] = {"torch": eager}
    for name, engine in opened.items():
        calls[name] = partial(engine, feeds)
    return relative_rms(got, eager()), time_calls(calls, repeats=3, warmup=1)


def measure(name: str, folder: Path, options: argparse.Namespace) -> dict[str, Any]:
    """One configuration, in an empty folder."""
    config = small(name) if options.small else CONFIGURATIONS[name]
    model = original(config)
    write(folder, config, model.state)
    parameters = sum(p.numel() for p in model.unet.parameters())
    rest = sum(p.numel() for n, p in model.first_stage.named_parameters() if not n.startswith(ENCODER))
    conditional = config["model"]["params"]["cond_stage_config"] != "__is_unconditional__"
    del model
    (folder / "recipe.toml").write_text(RECIPE, "utf-8")
    bundle = folder / "bundle"
    n = options.n_steps
    words = ["build", str(folder), "--out", str(bundle), "--precision", "fp32"]
    words += ["--precision", options.precision, "--plan", f"fp32,{options.precision}*{n - 1}"]
    words += ["--n-steps", str(n), "--calib-size", str(options.calib_size)]
    words += ["--guidance-scale", "3" if conditional else "1"]
    build = command_cost(words)
    run = command_cost(["run", str(bundle), "--out", str(folder / "out"), "--num-samples", "1"])
    off, seconds = engines(folder, Bundle.open(bundle), Precision.parse(options.precision))
    size = bytes_of(bundle)
    return {
        "build": [
            name,
            f"{parameters / 1e6:.1f} M",
            f"{build[0] / 60:.1f}",
            f"{build[1] / GIGA:.1f}",
            f"{size / GIGA:.2f}",
            f"{size / (4 * (parameters + rest)):.2f}",
            f"{run[0]:.0f}",
            f"{run[1] / GIGA:.1f}",
        ],
        "times": [
            name,
            f"{off:.1e}",
            *(f"{seconds[key]:.2f}" for key in ("torch", "fp32", options.precision)),
            f"{seconds['fp32'] / seconds[options.precision]:.2f}",
        ],
        "machine": machine("onnxruntime", "torch", "diffusers"),
    }


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--only", nargs="*", choices=CONFIGURATIONS, help="measure these, keep other figures")
    parser.add_argument("--precision", default="w8a8")
    parser.add_argument("--calib-size", type=int, default=2)
    parser.add_argument("--n-steps", type=int, default=2)
    parser.add_argument("--small", action="store_true", help="few channels, nothing kept")
    parser.add_argument("--write", action="store_true", help="put the tables into docs/models.md")
    options = parser.parse_args()
    threads = len(os.sched_getaffinity(0))
    set_threads(threads)  # as ONNX Runtime takes
    kept = Kept("full-size")
    OUT.mkdir(parents=True, exist_ok=True)
    for name in CONFIGURATIONS if options.only is None else options.only:
        with tempfile.TemporaryDirectory(dir=OUT) as folder:
            found = measure(name, Path(folder), options)
        print(" ".join([*found["build"], *found["times"][1:]]))
        if not options.small:
            kept.keep(name, found)
    rows = [kept[name] for name in CONFIGURATIONS if name in kept]
    times = [word.format(options.precision) for word in TIMES]
    tables = table(BUILD, [one["build"] for one in rows]), table(times, [one["times"] for one in rows])
    text = "\n\n".join(tables) + (
        f"\n\n{kept.machines()}. fp32 and {options.precision}, calibrated on {options.calib_size} samples of "
        f"{options.n_steps} steps; `run` makes one picture in as many. "
        f"One evaluation of one sample, {threads} threads."
    )
    print(text)
    if options.write and not options.small:
        write_section("full-size", text)


if __name__ == "__main__":
    main()
