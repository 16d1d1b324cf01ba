"""False alarms of the parity gate: right builds of many small networks, and how many of them it refuses.

    python benchmarks/false_alarms.py [NAME ...] [--jobs 2] [--resume] [--write]

Every network of `random_models.py` has seeded random weights. It is calibrated on few trajectories, each of
its graphs is written, and each is judged as a build judges it. No engine is built and nothing is timed. All
of them are right, so every refusal is a fault of the gate, the simulation or the exporter.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import tempfile
import time
from collections.abc import Iterable
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import asdict, dataclass
from pathlib import Path

from random_models import ARCHITECTURES, Architecture, write_model
from report import OUT, machine, table, write_section

from ptqd_export.assemble.graphs import emit, judge
from ptqd_export.assemble.measure import measure_all
from ptqd_export.calibrate import collect, observe, open_model, quantize, set_threads
from ptqd_export.core.figures import QuantizedFigures
from ptqd_export.core.sampling import Sampling
from ptqd_export.errors import ParityError
from ptqd_export.export import export_fp, exported_layers
from ptqd_export.recipe import Recipe

KEPT = OUT / "false_alarms.jsonl"
HEADER = (
    "networks", "builds", "graphs", "refused", "quantized layers", "outputs a step apart",
    "noise beyond its margin, standard errors",
)  # fmt: skip


@dataclass(frozen=True)
class Found:
    """What the gate said of one network's graphs.

    Attributes:
        graphs: how many distinct ones were judged.
        refusals: {graph, or "build" where there is none: the message}.
        layers: quantized layers compared, over all graphs.
        outputs, apart: outputs compared, and those a step apart.
        beyond: largest difference of a noise statistic beyond its margin, as a share of the limit.
        z, limit: that difference and its limit, in standard errors.
    """

    name: str
    kind: str
    graphs: int
    refusals: dict[str, str]
    layers: int = 0
    outputs: int = 0
    apart: float = 0.0
    z: float = 0.0
    limit: float = 0.0
    seconds: float = 0.0


def judge_network(architecture: Architecture, folder: Path) -> Found:
    """Build every graph of a network in an empty folder, and judge each."""
    started = time.monotonic()
    (work := folder / "work").mkdir()
    (out := folder / "graphs").mkdir()
    recipe = Recipe.from_dict(write_model(architecture, folder), folder)
    network = open_model(recipe)
    sampling = Sampling.of(network.info, network.scheduler_config, **asdict(recipe.sampler))
    base = export_fp(network.module, network.info)
    layers = exported_layers(base)
    paths = collect(network, sampling, recipe, work / "trajectories")
    seen = observe(network, sampling, recipe, paths)
    quantized = {p: quantize(network, seen, p, recipe).exported(layers) for p in recipe.precisions}
    measured = measure_all(recipe, network, sampling, paths, quantized, work, architecture.name)
    graphs = {graph.file: graph for graph in emit(base, sampling, quantized, measured, out)}
    figures, refusals = [], {}
    for graph in graphs.values():
        try:
            said = judge([graph], out, sampling, paths, quantized, measured, network, lambda text: None)
            figures.append(said[graph.file].figures)
        except ParityError as error:
            refusals[graph.name] = str(error)
    own = [f for f in figures if isinstance(f, QuantizedFigures)]
    # The limit depends on the numbers of trajectories, steps and channels alone.
    z = max((max(f.noise.largest_z.values()) for f in own), default=0.0)
    return Found(
        architecture.name, architecture.kind, len(graphs), refusals,
        sum(f.layers.layers for f in own), sum(f.layers.outputs for f in own),
        sum(f.layers.share_apart * f.layers.outputs for f in own),
        z, max((f.noise.limit_z or 0.0 for f in own), default=0.0), time.monotonic() - started,
    )  # fmt: skip


def judged(architecture: Architecture) -> Found:
    """What the gate says of a network; a build that ends before its graphs are judged is a refusal too."""
    set_threads(1)
    with tempfile.TemporaryDirectory() as folder:
        try:
            return judge_network(architecture, Path(folder))
        except Exception as error:
            text = f"{type(error).__name__}: {' '.join(str(error).split())}"
            return Found(architecture.name, architecture.kind, 0, {"build": text})


def report(found: Iterable[Found]) -> str:
    """The table, and every refusal."""
    rows, refusals = [], []
    kinds: dict[str, list[Found]] = {}
    for one in found:
        kinds.setdefault(one.kind, []).append(one)
        kinds.setdefault("all", [])
        refusals += [f"{one.name}, {graph}: {text}" for graph, text in one.refusals.items()]
    kinds["all"] = [one for kind, several in kinds.items() if kind != "all" for one in several]
    order = [*(kind for kind in kinds if kind != "all"), "all"]
    for kind in order:
        several = kinds[kind]
        worst = max(several, key=lambda one: one.z / max(one.limit, 1e-30))
        outputs = sum(one.outputs for one in several)
        rows.append(
            [
                kind,
                str(len(several)),
                str(sum(one.graphs for one in several)),
                str(sum(len(one.refusals) for one in several)),
                str(sum(one.layers for one in several)),
                f"{sum(one.apart for one in several) / max(outputs, 1):.1e}",
                f"{worst.z:.2f} of {worst.limit:.1f}",
            ]
        )
    said = "\n".join(f"- {line}" for line in refusals)
    return f"{table(HEADER, rows)}\n" + (f"\nRefused:\n\n{said}\n" if refusals else "")


def kept() -> dict[str, Found]:
    """What an earlier run found, by name, of the networks that are still the same and were not refused."""
    found = {}
    for line in KEPT.read_text().splitlines() if KEPT.is_file() else ():
        data = json.loads(line)
        of, one = data.pop("of"), Found(**data)
        if not one.refusals and one.name in ARCHITECTURES and of == repr(ARCHITECTURES[one.name]):
            found[one.name] = one
    return found


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("names", nargs="*", metavar="NAME", help="networks; all if none is named")
    parser.add_argument("--jobs", type=int, default=2)
    parser.add_argument("--resume", action="store_true", help="take up what a stopped run has judged")
    parser.add_argument("--write", action="store_true", help="put the table into docs/benchmarks.md")
    options = parser.parse_args()
    if unknown := set(options.names) - set(ARCHITECTURES):
        raise SystemExit(f"no network {min(unknown)}: give some of {', '.join(ARCHITECTURES)}")
    chosen = [a for name, a in ARCHITECTURES.items() if not options.names or name in options.names]
    if options.write and len(chosen) < len(ARCHITECTURES):
        raise SystemExit("the table is that of all networks: leave out the names")
    done = kept() if options.resume else {}
    if not options.resume:
        KEPT.unlink(missing_ok=True)
    KEPT.parent.mkdir(parents=True, exist_ok=True)
    with ProcessPoolExecutor(options.jobs, multiprocessing.get_context("spawn")) as pool:
        waiting = {pool.submit(judged, a): a for a in chosen if a.name not in done}
        for future in as_completed(waiting):
            one = done[waiting[future].name] = future.result()
            told = "; ".join(f"{graph}: {text}" for graph, text in one.refusals.items()) or "none refused"
            print(f"{one.name}: {one.graphs} graphs, {one.seconds:.0f} s, {told}", flush=True)
            with KEPT.open("a") as file:
                file.write(json.dumps({"of": repr(waiting[future]), **asdict(one)}) + "\n")
    found = [done[a.name] for a in chosen]
    text = f"{report(found)}\n{machine('onnxruntime', 'torch', 'diffusers')}."
    print(text)
    if options.write:
        write_section("false-alarms", text)
    raise SystemExit(1 if any(one.refusals for one in found) else 0)


if __name__ == "__main__":
    main()
