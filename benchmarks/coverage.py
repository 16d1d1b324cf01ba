"""What of diffusers' UNets can be exported, quantized and built: every block type, setting and public model.

    python benchmarks/coverage.py [TEXT ...] [--jobs 1] [--resume] [--openvino] [--rtx] [--write]

Every UNet of `coverage_models.py` is written as diffusers writes it, with seeded random weights, and built
as a user's would be: opened from its folder, exported, calibrated on two trajectories of two steps, and
quantized. Each graph is judged by the parity gate, and read as a bundle's is. With `--openvino`, OpenVINO
runs those of fp32 and w8a8, in a process of its own; with `--rtx`, TensorRT-RTX builds the graph of w8a8.
Both take time; what another run has found is kept.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import re
import tempfile
import textwrap
import time
from collections.abc import Callable, Collection, Iterable
from concurrent.futures import ProcessPoolExecutor, as_completed
from concurrent.futures.process import BrokenProcessPool
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from coverage_models import CONFIGURATIONS, TOKENS, Configuration
from random_models import random_feeds, randomise
from report import OUT, machine, table, write_section

from ptqd_export.assemble.graphs import emit, judge
from ptqd_export.assemble.measure import measure_all
from ptqd_export.backends import OrtEngine, open_engine, trt
from ptqd_export.bundle.bundle import WEIGHTS
from ptqd_export.bundle.graph_check import Expected, check_graph
from ptqd_export.calibrate import collect, observe, open_model, quantize, set_threads
from ptqd_export.core.backend import FLOAT_ERROR, OPENVINO, OPENVINO_FP32, TENSORRT_RTX, Emission
from ptqd_export.core.engine import EPSILON, Feeds
from ptqd_export.core.engine_build import EngineSettings
from ptqd_export.core.figures import relative_rms
from ptqd_export.core.precision import FP32, Precision
from ptqd_export.core.sampling import Sampling
from ptqd_export.errors import PTQDError
from ptqd_export.export import export_fp, exported_layers, quantized_nodes
from ptqd_export.export.graph import load
from ptqd_export.files import sha256_file
from ptqd_export.recipe import Recipe

KEPT = OUT / "coverage.jsonl"
EXPORT, RTX, PASSED = "export", TENSORRT_RTX, "passes"
W8A8 = Precision.parse("w8a8")
PRECISIONS = {EXPORT: FP32, "w8a8": W8A8, "w4a8": Precision.parse("w4a8")}
COLUMNS = (*PRECISIONS, OPENVINO, RTX)
FOLDERS = re.compile(r"\S+/(?=[\w.-]+\.onnx)")
"""Where a graph lay, which is gone."""
REASON = 400
"""Most characters of a reason."""
HEADER = ("configuration", "class", EXPORT, "w8a8", "w4a8", "OpenVINO", "TensorRT-RTX, w8a8")


@dataclass
class Found:
    """What came of a configuration.

    Attributes:
        told: by column, PASSED or what was said in its place.
        seconds: of PRECISIONS' columns; rtx_seconds of RTX's build.
    """

    told: dict[str, str] = field(default_factory=dict)
    seconds: float = 0.0
    rtx_seconds: float = 0.0

    def attempt(self, column: str, work: Callable[[], None]) -> None:
        """Do a column's work, and note what came of it."""
        try:
            work()
            self.told[column] = PASSED
        except PTQDError as error:
            self.told[column] = " ".join(str(error).split())
        except Exception as error:
            self.told[column] = f"DEFECT: {type(error).__name__}: {' '.join(str(error).split())}"


def write_model(one: Configuration, folder: Path) -> Recipe:
    """Write a UNet and its scheduler's config into an empty folder; returns the recipe that builds it."""
    import diffusers

    torch.manual_seed(0)
    unet = getattr(diffusers, one.kind)(**one.config)
    randomise(unet)
    unet.save_pretrained(folder / "unet")
    (folder / "scheduler").mkdir()
    settings = {"clip_sample": False, **one.scheduler}
    (folder / "scheduler" / "scheduler_config.json").write_text(json.dumps(settings))
    model: dict[str, Any] = {"name": "model"}
    if one.text_width is not None:
        text = {"name": "encoder_hidden_states", "dtype": "float32", "shape": [TOKENS, one.text_width]}
        model["inputs"] = [text]
    data = {
        "model": model,
        "sampler": {"n_steps": 2},
        "calibration": {"size": 2, "held_out": 2, "batch_size": 4},
        "quantization": {"precisions": [str(p) for p in PRECISIONS.values()]},
    }
    return Recipe.from_dict(data, folder)


def cover(one: Configuration, folder: Path, more: Collection[str]) -> Found:
    """Try a configuration's columns of PRECISIONS, and `more` of them, in an empty folder."""
    found = Found()
    started = time.process_time()
    try:
        recipe = write_model(one, folder)
    except Exception as error:
        raise SystemExit(f"{one.name} is no configuration of {one.kind}: {error}") from error
    try:
        network = open_model(recipe)
        sampling = Sampling.of(network.info, network.scheduler_config, **asdict(recipe.sampler))
        base = export_fp(network.module, network.info)
        layers = exported_layers(base)
        (work := folder / "work").mkdir()
        paths = collect(network, sampling, recipe, work / "trajectories")
        seen = observe(network, sampling, recipe, paths)
    except Exception as error:

        def fail(error: Exception = error) -> None:
            raise error

        for column in PRECISIONS:
            found.attempt(column, fail)
        found.told |= dict.fromkeys(more, found.told[EXPORT])
        return found

    def build(precision: Precision, out: Path) -> None:
        out.mkdir()
        net = {precision: quantize(network, seen, precision, recipe).exported(layers)}
        measured = measure_all(recipe, network, sampling, paths, net, work, "coverage")
        graphs = emit(base, sampling, net, measured, out)
        judge(graphs, out, sampling, paths, net, measured, network, lambda text: None)
        size = (out / WEIGHTS).stat().st_size
        for graph in graphs:
            expected = Expected(sampling, graph.emission, WEIGHTS, size)
            check_graph((out / graph.file).read_bytes(), graph.name, expected)

    for column, precision in PRECISIONS.items():
        found.attempt(column, lambda p=precision, c=column: build(p, folder / c))  # type: ignore[misc]
    found.seconds = time.process_time() - started
    if OPENVINO in more:
        found.attempt(OPENVINO, lambda: run_apart(folder, random_feeds(sampling, 0)))
    if RTX in more:
        started = time.monotonic()
        found.attempt(RTX, lambda: build_engine(folder / "w8a8" / f"{W8A8.stem}.{Emission.HALF}.onnx"))
        found.rtx_seconds = time.monotonic() - started
    return found


def run_apart(folder: Path, feeds: Feeds) -> None:
    """`run_openvino` in a process of its own, which it may take along."""
    with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as pool:
        try:
            pool.submit(run_openvino, folder, feeds).result()
        except BrokenProcessPool as error:
            raise PTQDError("OpenVINO dies of it") from error


def run_openvino(folder: Path, feeds: Feeds) -> None:
    """OpenVINO computes what ONNX Runtime does: fp32 but for roundings, w8a8 within its own noise.

    Roundings to codes fall otherwise here and there, the more so beside bfloat16.
    """
    set_threads(1)
    graphs = {p: folder / c / f"{p.stem}.{Emission.PORTABLE}.onnx" for c, p in PRECISIONS.items()}
    expected = {}
    for p in (FP32, W8A8):
        with OrtEngine(graphs[p], optimise=False) as engine:
            expected[p] = engine(feeds)[EPSILON]
    noise = relative_rms(expected[W8A8], expected[FP32])
    for p, allowed in ((FP32, FLOAT_ERROR["float32"]), (W8A8, noise + FLOAT_ERROR["bfloat16"])):
        for name in (OPENVINO, OPENVINO_FP32):
            with open_engine(name, graphs[p]) as engine:
                off = relative_rms(engine(feeds)[EPSILON], expected[p])
            if not off <= allowed:
                raise PTQDError(f"{p} on {name} is off by {off:.2g} of its RMS (allowed: {allowed:.2g})")


def build_engine(graph: Path) -> None:
    """Build an engine of a graph, which runs in 8 bits what is meant to."""
    made = trt.build(
        TENSORRT_RTX, graph, graph.with_suffix(".engine"), EngineSettings((1, 2, 4)), key=sha256_file(graph),
        quantized=quantized_nodes(load(graph)), log=graph.with_suffix(".log"),
    )  # fmt: skip
    if made.plan.is_float:
        raise PTQDError("nothing of it runs in 8 bits")


def covered(one: Configuration, more: Collection[str]) -> Found:
    set_threads(1)
    with tempfile.TemporaryDirectory() as folder:
        return cover(one, Path(folder), more)


def key(one: Configuration) -> str:
    """Name of a configuration in the file of what was found."""
    return f"{one.group}: {one.kind}: {one.name}"


def kept() -> dict[str, Found]:
    """What earlier runs found, of configurations that are still the same."""
    known = {key(one): repr(one) for one in CONFIGURATIONS}
    found: dict[str, Found] = {}
    for line in KEPT.read_text("utf-8").splitlines() if KEPT.is_file() else ():
        data = json.loads(line)
        name, of = data.pop("name"), data.pop("of")
        if known.get(name) == of:
            before = found.get(name)
            found[name] = Found(**data)
            if before is not None:
                found[name].told = before.told | found[name].told
                found[name].rtx_seconds = found[name].rtx_seconds or before.rtx_seconds
    return found


def report(found: dict[str, Found]) -> str:
    """The tables, and every reason."""
    reasons: dict[str, int] = {}

    def cell(one: Found, column: str) -> str:
        said = one.told.get(column)
        if said is None or said == PASSED:
            return "not tried" if said is None else PASSED
        said = textwrap.shorten(FOLDERS.sub("", said), REASON, placeholder=" ...")
        return f"no [{reasons.setdefault(said, len(reasons) + 1)}]"

    parts = []
    for group in dict.fromkeys(one.group for one in CONFIGURATIONS):
        mine = [one for one in CONFIGURATIONS if one.group == group]
        rows = [
            [one.name, f"`{one.kind}`", *(cell(found.get(key(one), Found()), column) for column in COLUMNS)]
            for one in mine
        ]
        parts.append(f"**{group[0].upper()}{group[1:]}**\n\n{table(HEADER, rows)}")
    counts = []
    for title, column in zip(HEADER[2:], COLUMNS, strict=True):
        said = [one.told[column] for one in found.values() if column in one.told]
        counts.append(f"{title} {said.count(PASSED)} of {len(said)}")
    seconds = (
        [one.seconds for one in found.values()],
        [f.rtx_seconds for f in found.values() if f.rtx_seconds],
    )
    parts.append(f"Pass, of those that were tried: {', '.join(counts)}; {len(CONFIGURATIONS)} in all.")
    means = [f"{sum(s) / len(s):.0f}" if s else "-" for s in seconds]
    parts.append(f"Seconds per configuration: {means[0]} of processor time, {means[1]} to build an engine.")
    if reasons:
        parts.append("What was said:\n\n" + "\n".join(f"{n}. {text}" for text, n in reasons.items()))
    return "\n\n".join(parts)


def chosen(names: Iterable[str]) -> list[Configuration]:
    """Configurations that hold one of these texts; all, where there is none."""
    wanted = [name.casefold() for name in names]
    return [c for c in CONFIGURATIONS if not wanted or any(name in key(c).casefold() for name in wanted)]


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("names", nargs="*", metavar="TEXT", help="of names; all if there is none")
    parser.add_argument("--jobs", type=int, default=1)
    parser.add_argument("--resume", action="store_true", help="leave out what an earlier run has found")
    parser.add_argument("--openvino", action="store_true", help="run graphs on OpenVINO too")
    parser.add_argument("--rtx", action="store_true", help="build engines of TensorRT-RTX too")
    parser.add_argument("--write", action="store_true", help="put the table into docs/models.md")
    options = parser.parse_args()
    known = kept()
    more = [column for column, asked in ((OPENVINO, options.openvino), (RTX, options.rtx)) if asked]
    todo = [
        one
        for one in chosen(options.names)
        if not (options.resume and key(one) in known and known[key(one)].told.keys() >= {*PRECISIONS, *more})
    ]
    KEPT.parent.mkdir(parents=True, exist_ok=True)
    with ProcessPoolExecutor(options.jobs, multiprocessing.get_context("spawn")) as pool:
        waiting = {pool.submit(covered, one, more): one for one in todo}
        for future in as_completed(waiting):
            one, found = waiting[future], future.result()
            said = "; ".join(f"{c}: {text}" for c, text in found.told.items() if text != PASSED) or "all pass"
            print(f"{key(one)}: {found.seconds:.1f} + {found.rtx_seconds:.1f} s, {said}", flush=True)
            with KEPT.open("a", encoding="utf-8") as file:
                file.write(json.dumps({"name": key(one), "of": repr(one), **asdict(found)}) + "\n")
    known = kept()
    text = f"{report(known)}\n\n{machine('onnxruntime', 'openvino', 'torch', 'diffusers')}."
    print(text)
    if options.write:
        write_section("coverage", text)


if __name__ == "__main__":
    main()
