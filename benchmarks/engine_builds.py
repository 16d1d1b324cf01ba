"""Finished engines, built on a machine without a GPU: what they hold, what their builds take, what the folded correction costs.

    python benchmarks/engine_builds.py [--bundle FOLDER] [--models reference cifar sd] [--write]

The reference model's graphs are those of a bundle in six precisions, built if there is none. The other two are architectures with
seeded random weights, quantized after a minimal calibration, with correction tables of random values: a build does not depend on what
the numbers are.
Exports run in a process of their own, gone when the builder's starts. `sd` needs 12 GB of memory and 10 GB of disk. --write puts the tables into
the README.
"""

from __future__ import annotations

import argparse
import multiprocessing
import resource
import sys
import tempfile
import time
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from report import ROOT, machine, table, write_section

from ptqd_export import Recipe
from ptqd_export import build as build_bundle
from ptqd_export.backends import trt
from ptqd_export.export.graph import load, prune, quantized_nodes
from ptqd_export.precision import Precision
from ptqd_export.quant import Emission

BACKEND = "tensorrt-rtx"
REFERENCE = "reference"
TABLE_STEPS = 20
"""Rows of the random tables."""
COMPARED = ("w8a8", "w4a4")
"""Precisions built with and without their correction tables."""
SIX = ("fp32", "fp16", "w8a8", "w4a8", "w4a4", "w8a8-fp8")
GB = 1e9


@dataclass(frozen=True)
class Architecture:
    """A diffusers UNet with random weights.

    Attributes:
        title: what the tables call it.
        parameters: how many it must have.
        config: of the diffusers class, as far as it is not the default.
        inputs: float32 inputs besides sample and timestep, as in a recipe.
        rows: fewest, usual and most rows of one engine call.
    """

    title: str
    class_name: str
    parameters: int
    config: dict[str, Any]
    inputs: tuple[dict[str, Any], ...]
    precisions: tuple[str, ...]
    rows: tuple[int, int, int]


ARCHITECTURES = {
    "cifar": Architecture(
        "google/ddpm-cifar10-32, random weights",
        "UNet2DModel",
        35_746_307,
        {
            "sample_size": 32,
            "in_channels": 3,
            "out_channels": 3,
            "layers_per_block": 2,
            "block_out_channels": (128, 256, 256, 256),
            "down_block_types": ("DownBlock2D", "AttnDownBlock2D", "DownBlock2D", "DownBlock2D"),
            "up_block_types": ("UpBlock2D", "UpBlock2D", "AttnUpBlock2D", "UpBlock2D"),
            "norm_eps": 1e-6,
            "act_fn": "silu",
            "downsample_padding": 0,
            "flip_sin_to_cos": False,
            "freq_shift": 1,
            "dropout": 0.0,
            "center_input_sample": False,
            "mid_block_scale_factor": 1,
        },
        (),
        ("fp16", "w8a8", "w4a8", "w4a4", "w8a8-fp8"),
        (1, 8, 32),
    ),
    "sd": Architecture(
        "size of Stable Diffusion 1.5, random weights",
        "UNet2DConditionModel",
        859_520_964,
        {"sample_size": 64, "cross_attention_dim": 768, "attention_head_dim": 8, "block_out_channels": (320, 640, 1280, 1280)},
        ({"name": "encoder_hidden_states", "dtype": "float32", "shape": [77, 768]},),
        ("fp16", "w8a8", "w8a8-fp8"),
        (2, 2, 4),
    ),
}


@dataclass(frozen=True)
class Graphs:
    """Graphs to build, and what their export took.

    Attributes:
        files: half-precision graphs by precision.
        parameters: of the network.
        rows: fewest, usual and most rows of one engine call.
        export: seconds and peak memory in bytes of the export, calibration included; None where it was done before.
    """

    title: str
    files: dict[str, Path]
    parameters: int
    rows: tuple[int, int, int]
    export: tuple[float, int] | None = None


def of_bundle(path: Path) -> Graphs:
    """The reference model's."""
    from ptqd_export.bundle import Bundle
    from ptqd_export.recipe import TensorRTSpec
    from ptqd_export.sampler import branches

    m = Bundle.open(path).manifest
    files = {str(g.precision): path / g.file for g in m.graphs if g.emission is Emission.HALF and g.precision is not None}
    whole = next((file for p, file in files.items() if Precision.parse(p).is_float), None)
    if whole is None:
        raise SystemExit(f"{path} holds no float graph, in which parameters could be counted: build it with --precision fp32 too")
    # Constants of one value are no parameters; what is folded is not the model's.
    values = [v.const_value for v in load(whole).graph.initializers.values() if not str(v.name).startswith("ptqd.")]
    parameters = sum(v.size for v in values if v is not None and v.dtype.is_floating_point() and v.size > 1)
    low, usual, most = (n * branches(m.guidance_scale) for n in TensorRTSpec().batch_sizes)
    return Graphs(m.model.name, files, parameters, (low, usual, most))


def export(key: str, folder: Path) -> Graphs:
    """Random weights to half-precision graphs in `folder`, with the package's own passes; for a process of its own."""
    import diffusers
    import torch

    from ptqd_export.calibrate import collect, observe, open_model, quantize
    from ptqd_export.export import export_fp, exported_layers, fold, lint, lower, save
    from ptqd_export.export import quantize as insert_qdq
    from ptqd_export.recipe import Recipe
    from ptqd_export.schedule import NoiseSchedule

    a, start = ARCHITECTURES[key], time.monotonic()
    torch.manual_seed(0)
    module = getattr(diffusers, a.class_name)(**a.config)
    assert (found := sum(p.numel() for p in module.parameters())) == a.parameters, found
    module.save_pretrained(folder / "model" / "unet")
    diffusers.DDIMScheduler().save_pretrained(folder / "model" / "scheduler")
    del module
    recipe = Recipe.from_dict(
        {
            "model": {"source": "model", "inputs": list(a.inputs)},
            "sampler": {"n_steps": 1},
            "calibration": {"size": 2, "held_out": 2, "batch_size": 2, "activation_range": "minmax", "weight_range": "minmax"},
            "quantization": {"precisions": list(a.precisions), "rounding": "nearest"},
        },
        folder,
    )
    network = open_model(recipe)
    schedule = NoiseSchedule.from_config(network.scheduler_config, recipe.sampler.n_steps, recipe.sampler.eta)
    base = export_fp(network.module, network.info)
    observed = observe(network, schedule, recipe, collect(network, schedule, recipe, folder / "trajectories"))
    gain, offset = np.random.default_rng(0).normal([[[1.0]], [[0.0]]], 0.01, (2, TABLE_STEPS, network.info.channels))
    files = {}
    for precision in recipe.precisions:
        net = quantize(network, observed, precision, recipe).only(exported_layers(base))
        graph = fold(lower(insert_qdq(base, net, Emission.HALF), Emission.HALF, precision), gain, offset)
        save({str(precision): graph}, folder, f"{precision}.safetensors")
        files[str(precision)] = folder / f"{precision}.onnx"
        lint(files[str(precision)], Emission.HALF)
    return Graphs(a.title, files, a.parameters, a.rows, (time.monotonic() - start, _peak()))


def _peak() -> int:
    """Most memory that this process held, bytes."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def without_tables(file: Path, folder: Path) -> Path:
    """The graph before `fold`: its output is the network's own."""
    from ptqd_export.engine import EPSILON, STEP
    from ptqd_export.export import save

    model = load(file)
    graph = model.graph
    gain = next((node for node in graph if node.op_type == "Mul" and str(node.inputs[1].name).startswith("ptqd.gain.row")), None)
    if gain is None:
        raise SystemExit(f"{file} holds no correction tables: build the bundle with a correction")
    graph.outputs[0].name, gain.inputs[0].name = "corrected", EPSILON
    graph.outputs[0] = gain.inputs[0]
    graph.inputs.remove(next(value for value in graph.inputs if value.name == STEP))
    save({f"{file.stem}.bare": prune(model)}, folder, f"{file.stem}.bare.safetensors")
    return folder / f"{file.stem}.bare.onnx"


def build(graphs: Graphs, file: Path, folder: Path) -> trt.Report:
    """Build one engine, which is not kept."""
    engine = folder / f"{file.stem}.engine"
    try:
        report = trt.build(BACKEND, file, engine, trt.Settings(graphs.rows), quantized=quantized_nodes(file), log=folder / f"{file.stem}.log")
    finally:
        engine.unlink(missing_ok=True)
    return report


def taken(file: Path, report: trt.Report, *ops: str) -> str:
    """How many nodes of these operators run in 8 bits, of those meant to: "63 of 63", or "-" where none is."""
    op = {node.name: node.op_type for node in load(file).graph}
    meant = [name for name in quantized_nodes(file) if op[name] in ops]
    return f"{sum(name not in report.plan.fell_back for name in meant)} of {len(meant)}" if meant else "-"


def measure(graphs: Graphs, folder: Path) -> tuple[list[list[str]], list[list[str]]]:
    """Rows of both tables."""
    builds, costs = [], []
    for precision, file in graphs.files.items():
        report = build(graphs, file, folder)
        row = [graphs.title, precision, f"{graphs.parameters / 1e6:.1f}", taken(file, report, "Conv"), taken(file, report, "MatMul", "Gemm")]
        row += [str(report.plan.kernels), f"{report.seconds:.1f}", f"{report.bytes / 1e6:.1f}", f"{report.peak_bytes / GB:.1f}"]
        builds.append(row)
        print(" | ".join(row), *(f"{node}: {dtype}" for node, dtype in report.plan.fell_back.items()), sep="\n  ", file=sys.stderr)
        if precision in COMPARED:
            bare = build(graphs, without_tables(file, folder), folder).plan.kernels
            costs.append([graphs.title, precision, str(report.plan.kernels), str(bare)])
    return builds, costs


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--bundle", type=Path, default=ROOT / "benchmarks/out/six-precisions", help="of the reference model")
    parser.add_argument("--models", nargs="+", choices=(REFERENCE, *ARCHITECTURES), default=[REFERENCE, *ARCHITECTURES])
    parser.add_argument("--write", action="store_true", help="put the tables into README.md")
    args = parser.parse_args()
    builds: list[list[str]] = []
    costs: list[list[str]] = []
    notes = []
    for key in args.models:
        with tempfile.TemporaryDirectory() as tmp:
            if key == REFERENCE:
                if not args.bundle.exists():
                    build_bundle(Recipe.load(ROOT / "calib/fashion_mnist").override(quantization={"precisions": SIX}), args.bundle)
                graphs = of_bundle(args.bundle)
            else:
                with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as pool:
                    graphs = pool.submit(export, key, Path(tmp)).result()
            more = measure(graphs, Path(tmp))
        builds += more[0]
        costs += more[1]
        notes.append(f"{graphs.title}: {', '.join(map(str, graphs.rows))} rows")
        if graphs.export is not None:
            notes[-1] += f", {graphs.export[0]:.0f} s and {graphs.export[1] / GB:.1f} GB to calibrate and export"
    header = ["model", "precision", "parameters, M", "8-bit convs", "8-bit linears", "kernels", "build, s", "engine, MB", "builder's peak, GB"]
    text = "\n\n".join(
        [
            "No GPU ran these engines: they say what is built and what building takes, and nothing about speed.",
            table(header, builds),
            "**What the correction costs**\n\n" + table(["model", "precision", "kernels with tables", "kernels without"], costs),
            f"Fewest, usual and most rows of one call: {'; '.join(notes)}. The script's own process held {_peak() / GB:.1f} GB beside "
            f"the exporter's or the builder's. {machine()}, {trt.runtime_version(BACKEND)}.",
        ]
    )
    print(text)
    if args.write:
        write_section("engine-builds", text)


if __name__ == "__main__":
    main()
