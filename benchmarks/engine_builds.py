"""Engines for GPUs, built without one: what they hold, what building takes, what the folded correction costs.

    python benchmarks/engine_builds.py [--bundle FOLDER] [--models reference cifar sd] [--write]

The reference model's graphs are those of a bundle in six precisions, which is built if there is none. The
other two are architectures with seeded random weights, quantized after a minimal calibration, with
correction tables of random values: a build does not depend on what the numbers are. Exports run in a
process of their own, which is gone when the builder's starts. `sd` needs 12 GB of memory and 10 GB of disk.
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
from functools import partial
from pathlib import Path

import numpy as np
from architectures import ARCHITECTURES, REFERENCE, recipe_of
from report import OUT, REFERENCE_MODEL, machine, table, write_section

from ptqd_export import Recipe, build
from ptqd_export.backends import trt
from ptqd_export.core.backend import TENSORRT_RTX, Emission
from ptqd_export.core.engine_build import EngineBuild, EngineSettings
from ptqd_export.core.noise import Correction
from ptqd_export.core.precision import Precision
from ptqd_export.core.schedule import NoiseSchedule
from ptqd_export.export import quantized_nodes
from ptqd_export.export.graph import load, prune
from ptqd_export.files import sha256_file

TABLE_STEPS = 20
"""Rows of the random tables."""
COMPARED = ("w8a8", "w4a4")
"""Precisions built with and without their correction tables."""
SIX = ("fp32", "fp16", "w8a8", "w4a8", "w4a4", "w8a8-fp8")
GB = 1e9
HEADER = (
    "model",
    "precision",
    "parameters, M",
    "8-bit convs",
    "8-bit linears",
    "kernels",
    "build, s",
    "engine, MB",
    "builder's peak, GB",
)


@dataclass(frozen=True)
class Graphs:
    """Graphs to build, and what their export took.

    Attributes:
        files: half-precision graphs by precision.
        parameters: of the network.
        rows: fewest, usual and most rows of one engine call.
        export: seconds, and peak memory in bytes, to calibrate and export; None where it was done before.
    """

    title: str
    files: dict[str, Path]
    parameters: int
    rows: tuple[int, int, int]
    export: tuple[float, int] | None = None


def of_bundle(path: Path) -> Graphs:
    """The reference model's."""
    from ptqd_export.bundle.bundle import Bundle

    m = Bundle.open(path).manifest
    files = {str(g.precision): path / g.file for g in m.graphs if g.emission is Emission.HALF}
    whole = next((file for p, file in files.items() if Precision.parse(p).is_float), None)
    if whole is None:
        raise SystemExit(
            f"{path} has no float graph to count parameters in: build it with --precision fp32 too"
        )
    # Constants of one value are no parameters; what is folded is not the model's.
    initializers = load(whole).graph.initializers.values()
    values = [v.const_value for v in initializers if not str(v.name).startswith("ptqd.")]
    parameters = sum(v.size for v in values if v is not None and v.dtype.is_floating_point() and v.size > 1)
    return Graphs(m.sampling.model.name, files, parameters, m.engine_settings.rows)


def export(key: str, folder: Path, **quantization: object) -> Graphs:
    """A model's half-precision graphs, in `folder`; for a process of its own."""
    from ptqd_export.calibrate import collect, observe, open_model, quantize
    from ptqd_export.core.sampling import Sampling
    from ptqd_export.export import export_fp, exported_layers, fold, insert_qdq, lint, lower, save

    start = time.monotonic()
    recipe = recipe_of(key, folder, rounding="nearest", **quantization)
    network = open_model(recipe)
    sampling = Sampling.of(network.info, network.scheduler_config, n_steps=recipe.sampler.n_steps)
    base = export_fp(network.module, network.info)
    seen = observe(network, sampling, recipe, collect(network, sampling, recipe, folder / "trajectories"))
    shape = (2, TABLE_STEPS, network.info.channels)
    gain, offset = np.random.default_rng(0).normal([[[1.0]], [[0.0]]], 0.01, shape)
    correction = Correction(gain, offset, np.zeros(TABLE_STEPS))
    schedule = NoiseSchedule.from_config(network.scheduler_config, TABLE_STEPS, 0.0)
    files = {}
    for precision in recipe.precisions:
        net = quantize(network, seen, precision, recipe).exported(exported_layers(base))
        graph = lower(insert_qdq(base, net, Emission.HALF), Emission.HALF, precision)
        save({str(precision): fold(graph, schedule, correction)}, folder, f"{precision}.safetensors")
        files[str(precision)] = folder / f"{precision}.onnx"
        lint(files[str(precision)], Emission.HALF)
    rows = ARCHITECTURES[key].rows if key in ARCHITECTURES else recipe.tensorrt.settings(1).rows
    parameters = sum(p.numel() for p in network.module.parameters())
    return Graphs(network.info.name, files, parameters, rows, (time.monotonic() - start, _peak()))


def export_apart(key: str, folder: Path, **quantization: object) -> Graphs:
    """`export` in a process of its own, whose memory is gone when the builder's starts."""
    with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as pool:
        return pool.submit(partial(export, **quantization), key, folder).result()


def _peak() -> int:
    """Most memory that this process held, bytes."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def without_tables(file: Path, folder: Path) -> Path:
    """The graph before `fold`: its output is the network's own."""
    from ptqd_export.core.engine import EPSILON, STEP
    from ptqd_export.export import save

    model = load(file)
    graph = model.graph
    multiplied = (node for node in graph if node.op_type == "Mul")
    gain = next((node for node in multiplied if str(node.inputs[1].name).startswith("ptqd.gain.row")), None)
    if gain is None:
        raise SystemExit(f"{file} holds no correction tables: build the bundle with a correction")
    graph.outputs[0].name, gain.inputs[0].name = "corrected", EPSILON
    graph.outputs[0] = gain.inputs[0]
    graph.inputs.remove(next(value for value in graph.inputs if value.name == STEP))
    save({f"{file.stem}.bare": prune(model)}, folder, f"{file.stem}.bare.safetensors")
    return folder / f"{file.stem}.bare.onnx"


def build_engine(graphs: Graphs, file: Path, folder: Path) -> tuple[EngineBuild, int]:
    """Build one engine, which is not kept; and its bytes."""
    engine = folder / f"{file.stem}.engine"
    try:
        made = trt.build(
            TENSORRT_RTX,
            file,
            engine,
            EngineSettings(graphs.rows),
            key=sha256_file(file),
            quantized=quantized_nodes(file),
            log=folder / f"{file.stem}.log",
        )
        return made, engine.stat().st_size
    finally:
        engine.unlink(missing_ok=True)


def taken(file: Path, made: EngineBuild, *ops: str) -> str:
    """How many nodes of these operators run in 8 bits, of those meant to: "63 of 63"; "-" where none is."""
    op = {node.name: node.op_type for node in load(file).graph}
    meant = [name for name in quantized_nodes(file) if op[name] in ops]
    return f"{sum(name not in made.plan.fell_back for name in meant)} of {len(meant)}" if meant else "-"


def measure(graphs: Graphs, folder: Path) -> tuple[list[list[str]], list[list[str]]]:
    """Rows of both tables."""
    builds, costs = [], []
    for precision, file in graphs.files.items():
        made, size = build_engine(graphs, file, folder)
        row = [graphs.title, precision, f"{graphs.parameters / 1e6:.1f}"]
        row += [taken(file, made, "Conv"), taken(file, made, "MatMul", "Gemm"), str(made.plan.kernels)]
        row += [f"{made.seconds:.1f}", f"{size / 1e6:.1f}", f"{made.peak_bytes / GB:.1f}"]
        builds.append(row)
        print(" | ".join(row), *made.plan.complaints(), sep="\n  ", file=sys.stderr)
        if precision in COMPARED:
            bare, _ = build_engine(graphs, without_tables(file, folder), folder)
            costs.append([graphs.title, precision, str(made.plan.kernels), str(bare.plan.kernels)])
    return builds, costs


def graphs_of(key: str, bundle: Path, folder: Path) -> Graphs:
    """The graphs of a model, made if need be."""
    if key == REFERENCE:
        if not bundle.exists():
            build(Recipe.load(REFERENCE_MODEL).override(quantization={"precisions": SIX}), bundle)
        return of_bundle(bundle)
    return export_apart(key, folder, precisions=ARCHITECTURES[key].precisions)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--bundle", type=Path, default=OUT / "six-precisions", help="of the reference model")
    known = (REFERENCE, "cifar", "sd")
    parser.add_argument("--models", nargs="+", choices=known, default=known)
    parser.add_argument("--write", action="store_true", help="put the tables into docs/benchmarks.md")
    args = parser.parse_args()
    builds: list[list[str]] = []
    costs: list[list[str]] = []
    notes = []
    for key in args.models:
        with tempfile.TemporaryDirectory() as tmp:
            graphs = graphs_of(key, args.bundle, Path(tmp))
            more = measure(graphs, Path(tmp))
        builds += more[0]
        costs += more[1]
        notes.append(f"{graphs.title}: {', '.join(map(str, graphs.rows))} rows")
        if graphs.export is not None:
            seconds, peak = graphs.export
            notes[-1] += f", {seconds:.0f} s and {peak / GB:.1f} GB to calibrate and export"
    compared = table(["model", "precision", "kernels with tables", "kernels without"], costs)
    text = "\n\n".join(
        [
            "No GPU ran these engines: they say what is built and what building takes, nothing about speed.",
            table(HEADER, builds),
            f"**What the correction costs**\n\n{compared}",
            f"Fewest, usual and most rows of one call: {'; '.join(notes)}. The script's own process held "
            f"{_peak() / GB:.1f} GB beside the exporter's or the builder's. {machine()}, "
            f"{trt.runtime_version(TENSORRT_RTX)}.",
        ]
    )
    print(text)
    if args.write:
        write_section("engine-builds", text)


if __name__ == "__main__":
    main()
