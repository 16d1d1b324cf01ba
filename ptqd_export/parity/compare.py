"""verify --against: compare every backend that works here with ONNX Runtime's CPU provider."""

from __future__ import annotations

import contextlib
import functools
import tempfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from .. import backends
from ..backends import trt
from ..bundle.bundle import Bundle
from ..bundle.manifest import Graph, Manifest
from ..core.backend import BACKENDS, ENGINE_BACKENDS, FLOAT_ERROR, ORT_CPU, Backend, Floats
from ..core.closing import Closing
from ..core.engine import EPSILON, SAMPLE, STEP, Array, Device, Engine, Feeds
from ..core.sampling import Sampling
from ..errors import BackendUnavailable, ParityError
from ..export import cut_layers
from ..runtime import Runtime, open_artifact
from . import polygraphy
from .judgement import (
    FLOAT_TOLERANCE,
    MAX_SHARE_APART,
    ROUNDING,
    ROUNDINGS,
    Apart,
    float_tolerance,
    judge,
    max_float_error,
)
from .machines import OK

MAX_NETWORK_SNR = 60.0
"""Most dB required of a quantized network: float32 kernels may differ by 1e-3 (`bundle.tables.Probe`)."""
NEXT_CODES = 2.0**-9
"""Largest difference, relative to a channel's largest output, where a runtime compiles the graph itself.

One that multiplies by 1 / scale and adds the zero point before it rounds gives some inputs in 1e5 the next
code, and with it moves every output that takes part of them; at 54 dB that is far below 8 bits.
"""


@dataclass(frozen=True)
class Comparison:
    """How a backend at one precision compares with the reference on the same graph.

    Attributes:
        layers: number of quantized layers compared one by one; 0 where the backend runs finished engines,
            which hold whole networks only.
        worst_layer: path of the layer with the lowest SNR; None where no layers were compared.
        layer_snr: SNR of that layer in dB; None where all are equal, or no layers were compared.
        share_apart: share of all outputs of all layers that differ by more than float rounding.
        network_snr: {step: SNR of the guided epsilon in dB}, None where equal.
        network_limit: {step: SNR required, in dB}.
    """

    precision: str
    emission: str
    backend: str
    layers: int
    worst_layer: str | None
    layer_snr: float | None
    share_apart: float
    network_snr: Mapping[int, float | None]
    network_limit: Mapping[int, float]


@dataclass(frozen=True)
class LayerDifference:
    """How a layer differs from the reference: SNR in dB, and how far its outputs are apart."""

    snr: float
    apart: Apart


def compare_backends(bundle: Bundle, states: Mapping[str, str]) -> list[Comparison]:
    """Compare every backend that is "ok" in `states`, at every precision that it runs, with the reference.

    The reference is ONNX Runtime's CPU provider, which runs the same graphs as they are written. Each
    quantized layer is cut out of the graph and gets the inputs that the whole graph computes in the
    reference, at the first, middle and last step of two samples; `parity.judgement` says what may differ. The
    whole network must not be further from the reference than two draws of its quantization noise are from
    each other or, where no activation is rounded to codes, than float rounding. Finished engines hold the
    whole network, so only the network is compared: a layer would need an engine of its own, with other
    kernels than the network's.

    Raises:
        ParityError: a layer or a step differs; names it.
        BackendUnavailable: Polygraphy is not installed, or the backend fails.
        GraphError: a graph cannot be run.
    """
    polygraphy.load()
    points = sampled_feeds(bundle)
    found = []
    for backend in (name for name, state in states.items() if state == OK):
        with contextlib.closing(backends.open_device(backend)) as device:
            for graph in _graphs(bundle.manifest, backend):
                found.append(_compare(bundle, backend, graph, device, points))
    return found


def _graphs(m: Manifest, backend: str) -> list[Graph]:
    """The graphs that a backend runs here, or that its engines were built from."""
    entry = BACKENDS[backend]
    built = {artifact.precision for artifact in m.artifacts if artifact.backend == backend}
    graphs = [graph for graph in m.graphs if graph.emission is entry.emission]
    return [graph for graph in graphs if not entry.builds_engines or graph.precision in built]


def sampled_feeds(bundle: Bundle) -> dict[int, Feeds]:
    """Feeds at the first, middle and last step of samples 0 and 1 of seed 0.

    Returns:
        {step: x_t (2, C, H, W), step and conditions}.
    """
    sampling, plan = bundle.manifest.sampling, bundle.manifest.plan
    wanted = {0, len(sampling) // 2, len(sampling) - 1}
    conditions = sampling.model.conditions(None, 2)
    points: dict[int, Feeds] = {}

    def keep(step: int, x: npt.NDArray[np.float64], epsilon: npt.NDArray[np.float64]) -> None:
        if step in wanted:
            points[step] = {SAMPLE: x.astype(np.float32), STEP: np.array([step], np.int64), **conditions}

    with Runtime(bundle, ORT_CPU) as runtime:
        engines = runtime.engines
        sigmas = bundle.sigmas(ORT_CPU)
        sampling.sample(
            lambda i: engines[plan.steps[i]], conditions, (0, 1), seed=0, sigmas=sigmas, on_step=keep
        )
    return points


def _compare(
    bundle: Bundle, backend: str, graph: Graph, device: Device, points: Mapping[int, Feeds]
) -> Comparison:
    artifact = bundle.manifest.artifact(graph.precision, backend)
    name = f"{backend} at {graph.precision}"
    layers: dict[str, LayerDifference] = {}
    if artifact.build is None and not graph.precision.is_float:
        opened = functools.partial(backends.open_engine, backend, device=device)
        feeds = layer_feeds(bundle.manifest.sampling, points)
        rounding = layer_rounding(BACKENDS[backend])
        layers = compare_layers(name, bundle.file(graph.file), opened, rounding, feeds)
    network, limits = compare_network(
        name, bundle, graph, lambda: open_artifact(bundle, artifact, device), points, BACKENDS[backend].floats
    )
    worst = min(layers, key=lambda path: layers[path].snr, default=None)
    total = sum((layer.apart for layer in layers.values()), Apart())
    return Comparison(
        precision=str(graph.precision),
        emission=str(graph.emission),
        backend=backend,
        layers=len(layers),
        worst_layer=worst,
        layer_snr=None if worst is None else _finite(layers[worst].snr),
        share_apart=total.share,
        network_snr={step: _finite(snr) for step, snr in network.items()},
        network_limit=limits,
    )


def layer_feeds(sampling: Sampling, points: Mapping[int, Feeds]) -> list[Feeds]:
    """Feeds of the conditional branch only, for a graph itself."""
    single = sampling.conditional
    return [single.feeds(np.asarray(p[SAMPLE], np.float32), step, p) for step, p in points.items()]


def _finite(snr: float) -> float | None:
    return round(snr, 2) if np.isfinite(snr) else None


def layer_rounding(entry: Backend) -> float:
    """What roundings may make of a layer on a backend, relative to a channel's largest output."""
    return max(ROUNDINGS * ROUNDING[entry.floats], NEXT_CODES if entry.compiles else FLOAT_TOLERANCE)


def compare_layers(
    name: str, graph: Path, open_engine: Callable[[Path], Engine], rounding: float, feeds: Sequence[Feeds]
) -> dict[str, LayerDifference]:
    """Compare each quantized layer of `graph`, in the engine that `open_engine` makes of it.

    The layers get the inputs that the graph computes.

    Args:
        name: name of backend and graph, for errors.
        rounding: `layer_rounding` of the backend.
        feeds: feeds of the whole graph.
    Returns:
        module path -> how far the layer is from the reference, over all feeds.
    Raises:
        ParityError: a layer differs; names it.
    """
    limit = -20 * float(
        np.log10(rounding)
    )  # the rounding that the largest output is allowed, taken as noise on all outputs
    found: dict[str, LayerDifference] = {}
    with tempfile.TemporaryDirectory() as folder:
        whole, layers = cut_layers(graph, Path(folder))
        with backends.OrtEngine(whole, optimise=False) as engine:
            values = [engine(feed) for feed in feeds]
        for path, layer in layers.items():
            inputs = [{layer.source: value[layer.source]} for value in values]
            engines: dict[str, polygraphy.Source] = {
                ORT_CPU: layer.file,
                name: functools.partial(open_engine, layer.file),
            }
            apart = Apart()
            snr = float("inf")
            for result in polygraphy.compare(engines, inputs):
                expected, got = result.outputs[ORT_CPU][layer.target], result.outputs[name][layer.target]
                tolerance = float_tolerance(expected, layer.step, rounding, layer.added)
                apart += judge(got, expected, layer.step, tolerance)
                snr = min(snr, result.snr[layer.target])
            if not (snr >= limit or apart.tolerable):
                raise ParityError(
                    f"{name}: layer {path} differs from {graph.name} as it is written: {snr:.1f} dB (float "
                    "rounding "
                    f"leaves {limit:.0f}), {apart.share:.2%} of outputs, by up to {apart.largest_steps:.1f} "
                    "quantization "
                    f"steps (allowed: {MAX_SHARE_APART:.2%}, 1 step); this backend or its version computes "
                    "something "
                    "else: do not run it here"
                )
            found[path] = LayerDifference(snr, apart)
    return found


def compare_network(
    name: str,
    bundle: Bundle,
    graph: Graph,
    open_engine: Callable[[], Engine],
    points: Mapping[int, Feeds],
    floats: Floats = "float32",
) -> tuple[dict[int, float], dict[int, float]]:
    """Compare the guided epsilon of an engine with that of its graph as it is written.

    Returns:
        {step: SNR in dB}, {step: least SNR allowed}.
    Raises:
        ParityError: a step differs; names it.
    """
    sampling, limits = bundle.manifest.sampling, network_limits(bundle, graph, floats)
    engines: dict[str, polygraphy.Source] = {
        ORT_CPU: lambda: _Guided(backends.OrtEngine(bundle.file(graph.file), optimise=False), sampling),
        name: lambda: _Guided(open_engine(), sampling),
    }
    found, allowed = {}, {}
    for (step, _), result in zip(
        points.items(), polygraphy.compare(engines, list(points.values())), strict=True
    ):
        found[step], allowed[step] = result.snr[EPSILON], float(limits[step])
        if not found[step] >= limits[step]:
            raise ParityError(
                f"{name}: epsilon at step {step} is {found[step]:.1f} dB from {graph.file} as it is written "
                f"(at least {limits[step]:.1f}); this backend or its version computes something else: do not "
                "run it here"
            )
    return found, allowed


def network_limits(bundle: Bundle, graph: Graph, floats: Floats = "float32") -> npt.NDArray[np.float64]:
    """The least SNR that correct executions of a graph have, in dB per step, (T,).

    Two independent draws of the quantization noise differ by sqrt(2) times its RMS; twice its RMS is allowed,
    as for the probe; bfloat16 adds its own. Where no activation is quantized there is only rounding.
    """
    precision = graph.precision
    rounded = FLOAT_ERROR["bfloat16"] if floats == "bfloat16" and not precision.is_float else 0.0
    if precision.is_float or precision.weight_only:
        allowed = max(max_float_error(precision, graph.emission), rounded)
        return np.full(len(bundle.manifest.sampling), -20 * np.log10(allowed))
    snr = np.asarray(bundle.stats(precision, graph.emission).snr)
    return np.asarray(np.clip(-10 * np.log10(4 / snr + rounded**2), 0.0, MAX_NETWORK_SNR))


@dataclass(frozen=True)
class _Guided(Closing):
    """An engine with its guidance: takes x_t, step and conditions, and returns the guided epsilon."""

    engine: Engine
    sampling: Sampling

    @property
    def inputs(self) -> tuple[str, ...]:
        return (SAMPLE, STEP, *(spec.name for spec in self.sampling.model.inputs))

    @property
    def outputs(self) -> tuple[str, ...]:
        return (EPSILON,)

    def __call__(self, feeds: Feeds) -> dict[str, Array]:
        x, step = np.asarray(feeds[SAMPLE], np.float32), int(np.asarray(feeds[STEP])[0])
        return {EPSILON: self.sampling.predict_singly(self.engine, x, step, feeds)}

    def close(self) -> None:
        self.engine.close()


def parsers(bundle: Bundle) -> dict[str, dict[str, str]]:
    """What the parsers of the installed builders say of the bundle's graphs.

    Returns:
        {backend: {graph file: "ok", or the first thing that the parser refuses}}.
    """
    found: dict[str, dict[str, str]] = {}
    for name in ENGINE_BACKENDS:
        with contextlib.suppress(BackendUnavailable):
            trt.load(name)
            graphs = [graph for graph in bundle.manifest.graphs if graph.emission is BACKENDS[name].emission]
            files = dict.fromkeys((*(graph.file for graph in graphs), bundle.manifest.update.file))
            found[name] = {file: polygraphy.parser_verdict(name, bundle.file(file)) for file in files}
    return found


def text(
    states: Mapping[str, str], parsed: Mapping[str, Mapping[str, str]], compared: Sequence[Comparison]
) -> str:
    """The comparison as text for people."""
    lines = [f"{name}: {state}" for name, state in states.items()]
    for name, verdicts in parsed.items():
        refused = [f"{file} ({verdict})" for file, verdict in verdicts.items() if verdict != OK]
        taken = f"{len(verdicts) - len(refused)} of {len(verdicts)} graphs"
        lines.append(f"the parser of {name} takes {taken}" + "".join(f"; not {r}" for r in refused))
    steps = list(compared[0].network_snr) if compared else []
    head = "".join(f"{f'step {step}':>10}" for step in steps)
    lines += [
        "",
        f"against {ORT_CPU} running the graphs as they are written: "
        "worst layer and whole network in dB (and the least allowed):",
        f"{'precision':<11}{'emission':<10}{'backend':<14}{'layers':>6}{'worst':>8}{'apart':>9}{head}  worst "
        "layer",
    ]
    return "\n".join([*lines, *(_row(comparison, steps) for comparison in compared)])


def _row(c: Comparison, steps: Sequence[int]) -> str:
    network = "".join(f"{f'{_db(c.network_snr[step])} ({c.network_limit[step]:.0f})':>10}" for step in steps)
    worst: Any = _db(c.layer_snr) if c.layers else "-"
    head = f"{c.precision:<11}{c.emission:<10}{c.backend:<14}{c.layers:>6}{worst:>8}{c.share_apart:>9.1e}"
    return f"{head}{network}  {c.worst_layer or '-'}"


def _db(snr: float | None) -> str:
    return "equal" if snr is None else f"{snr:.0f}"
