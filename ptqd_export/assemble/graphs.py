"""The graphs of a bundle: write, check and judge every rewrite of the full-precision export."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import numpy as np
import onnx_ir as ir

from .. import backends
from ..backends.ort import OrtEngine
from ..bundle.bundle import WEIGHTS
from ..bundle.manifest import UPDATE, Graph, UpdateGraph
from ..bundle.tables import Key, Probe
from ..calibrate import Network, Trajectories
from ..core.backend import BACKENDS, Emission
from ..core.figures import Figures
from ..core.noise import Correction
from ..core.precision import Precision
from ..core.quant import QuantizedNetwork
from ..core.sampling import Sampling
from ..errors import BackendUnavailable
from ..export import fold, insert_qdq, lint, lower, quantized_nodes, sampler_update, save
from ..parity.gate import BackendVerdict, Case, Verdict, judge_compiled, judge_graph
from ..parity.judgement import max_float_error
from ..runtime import check_update
from .measure import Measured

OnBackends = Mapping[tuple[str, Precision], BackendVerdict]
"""What backends that compile graphs themselves made of them, by backend and precision."""
GRAPH = ".onnx"
PROBE_FLOOR = 1e-3
"""Share of epsilon's RMS by which correct executions of a float32 or integer network may always differ."""


def emit(
    base: ir.Model,
    sampling: Sampling,
    quantized: Mapping[Precision, QuantizedNetwork],
    measured: Mapping[Key, Measured],
    folder: Path,
) -> list[Graph]:
    """Write every graph, each a rewrite of the full-precision export `base`.

    Graphs that come out equal share a file.

    Raises:
        GraphError: a rewrite or a check fails; names the node.
    """
    models: dict[tuple[Precision, Emission], ir.Model] = {}
    for precision, net in quantized.items():
        for emission in Emission:
            correction = _correction(precision, emission, sampling, measured)
            graph = lower(insert_qdq(base, net, emission), emission, precision)
            models[precision, emission] = fold(graph, sampling.schedule, correction)
    digests = save({f"{p.stem}.{e}": model for (p, e), model in models.items()}, folder, WEIGHTS)
    graphs: list[Graph] = []
    files: dict[str, str] = {}
    for (precision, emission), model in models.items():
        name = f"{precision.stem}.{emission}"
        file, sha256 = f"{name}{GRAPH}", digests[name]
        if sha256 in files:
            (folder / file).unlink()
        else:
            lint(folder / file, emission)
        graphs.append(
            Graph(precision, emission, files.setdefault(sha256, file), sha256, quantized_nodes(model))
        )
    return graphs


def _correction(
    precision: Precision, emission: Emission, sampling: Sampling, measured: Mapping[Key, Measured]
) -> Correction:
    if precision.is_float:
        return Correction.identity(len(sampling), sampling.model.channels)
    return measured[precision, emission.numerics(precision)].correction


def emit_update(sampling: Sampling, folder: Path) -> UpdateGraph:
    """Write the sampler's step as a graph, and check that it computes what `Sampling` computes.

    Raises:
        GraphError, ParityError: a check fails.
    """
    file = folder / f"{UPDATE}{GRAPH}"
    digests = save({UPDATE: sampler_update(sampling)}, folder, None)
    lint(file, Emission.HALF)
    with OrtEngine(file, optimise=False) as engine:
        check_update(engine, sampling)
    return UpdateGraph(file.name, digests[UPDATE])


def judge(
    graphs: list[Graph],
    folder: Path,
    sampling: Sampling,
    trajectories: Trajectories,
    quantized: Mapping[Precision, QuantizedNetwork],
    measured: Mapping[Key, Measured],
    network: Network,
    say: Callable[[str], None],
) -> dict[str, Verdict]:
    """The parity gate's verdict on every distinct graph, by file.

    Raises:
        ParityError: a graph does not compute what was simulated.
    """
    verdicts: dict[str, Verdict] = {}
    for graph in graphs:
        if graph.file in verdicts:
            continue
        case = _case(graph, folder, quantized, measured)
        verdicts[graph.file] = judge_graph(case, sampling, trajectories, network)
        say(f"parity {graph.name}: {verdicts[graph.file].figures.summary()}")
    return verdicts


def _case(
    graph: Graph,
    folder: Path,
    quantized: Mapping[Precision, QuantizedNetwork],
    measured: Mapping[Key, Measured],
) -> Case:
    known = measured.get((graph.precision, graph.emission.numerics(graph.precision)))
    return Case(
        graph.name,
        folder / graph.file,
        graph.precision,
        graph.emission,
        quantized[graph.precision],
        None if known is None else known.correction,
        () if known is None else known.held_out,
    )


def judge_backends(
    names: Sequence[str],
    graphs: list[Graph],
    verdicts: Mapping[str, Verdict],
    folder: Path,
    sampling: Sampling,
    trajectories: Trajectories,
    quantized: Mapping[Precision, QuantizedNetwork],
    measured: Mapping[Key, Measured],
    network: Network,
    say: Callable[[str], None],
) -> OnBackends:
    """The parity gate's verdicts on what backends that compile graphs themselves make of them.

    Raises:
        ParityError: a graph does not compute there what was simulated.
        GraphError: it does not run there.
    """
    found: dict[tuple[str, Precision], BackendVerdict] = {}
    for name in (name for name in names if BACKENDS[name].compiles):
        try:
            backends.check(name)
        except BackendUnavailable as error:
            say(f"not judged on {name}: {error}")
            continue
        for graph in (graph for graph in graphs if graph.emission is BACKENDS[name].emission):
            case, verdict = _case(graph, folder, quantized, measured), verdicts[graph.file]
            on = judge_compiled(case, verdict, name, graph.quantized, sampling, trajectories, network)
            found[name, graph.precision] = on
            taken = f"; {on.plan.taken} of {on.plan.meant} layers in 8 bits" if on.plan.meant else ""
            say(f"parity {graph.precision}.{name}: {on.figures.summary()}{taken}, {on.floats} in between")
            for line in on.plan.complaints():
                say(f"{graph.precision} on {name}: {line}")
    return found


def figures_of(
    graphs: list[Graph], verdicts: Mapping[str, Verdict], compiled: OnBackends
) -> dict[str, Figures]:
    """Figures by the names of graphs, and by those of what backends compiled of them."""
    figures = {graph.name: verdicts[graph.file].figures for graph in graphs}
    return figures | {f"{precision}.{name}": found.figures for (name, precision), found in compiled.items()}


def probes_of(
    graphs: list[Graph], verdicts: Mapping[str, Verdict], measured: Mapping[Key, Measured]
) -> dict[Key, Probe]:
    """The probes of every graph with numerics of its own.

    A probe is what the graph predicted here, and the RMS by which correct executions may differ. Two correct
    executions drift apart by flipped roundings, at worst like two independent draws of the quantization
    noise, whose difference has sqrt(2) times its RMS. Twice its RMS is allowed, and at least what float
    kernels may differ by.
    """
    probes: dict[Key, Probe] = {}
    for graph in graphs:
        if graph.emission.numerics(graph.precision) is not graph.emission:
            continue
        key = graph.precision, graph.emission
        epsilon = verdicts[graph.file].epsilon
        rms = float(np.sqrt((epsilon.astype(np.float64) ** 2).mean()))
        noise = measured[key].first_step_rms() if key in measured else 0.0
        # The probe of a float graph also serves its half-precision form.
        floor = PROBE_FLOOR
        if graph.precision.is_float:
            floor = max(floor, max_float_error(graph.precision, Emission.HALF))
        probes[key] = Probe(epsilon, min(max(2 * noise, floor * rms), rms))
    return probes
