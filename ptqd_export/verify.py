"""Does a bundle compute, on this machine, what it says: by its probes, and backend against backend."""

from __future__ import annotations

import contextlib
import functools
import tempfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any, Self

import numpy as np
import numpy.typing as npt

from .bundle import Bundle
from .device import check_update
from .engine import EPSILON, SAMPLE, STEP, TIMESTEP, Array, Engine, Feeds
from .errors import BackendUnavailable, ParityError
from .evaluate import parity
from .manifest import UPDATE, Graph, Manifest, name_of
from .precision import FP32
from .quant import BACKENDS, BUILDERS, Emission
from .runtime import Runtime, check_probe, predict_singly
from .sampler import sample

if TYPE_CHECKING:
    from .backends.compare import Difference

REFERENCE = "ort-cpu"
"""What backends are compared against: its graphs run node by node, as they are written."""
OK = "ok"
FLOAT_SNR = -20 * float(np.log10(parity.FLOAT_TOLERANCE))
"""dB, of a layer in float32 (94): what parity allows the largest of its outputs to be off by, as noise on all of them."""
HALF_SNR = -20 * float(np.log10(parity.ROUNDINGS * parity.HALF))
"""dB, of a layer in float16 (51)."""
MAX_NETWORK_SNR = 60.0
"""dB asked of a quantized network at most: float32 kernels may differ by 1e-3 (`Bundle.probe`)."""


@dataclass(frozen=True)
class Comparison:
    """A backend at one precision against the reference, on the same graph.

    Attributes:
        layers: quantized layers compared one by one; 0 where the backend runs finished engines, of the whole network alone.
        worst_layer: path of the one with the lowest SNR; None where there are none.
        layer_snr: its SNR in dB; None where all are equal, or there are none.
        share_apart: of all outputs of all layers, those that differ by more than float rounding: a quantization step apart.
        network_snr: {step: dB of the guided epsilon}, None where equal.
        network_limit: {step: dB that it has to have}.
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


def verify_engines(bundle: Bundle) -> tuple[list[str], dict[str, str]]:
    """Evaluate every graph of the bundle once on ONNX Runtime's CPU provider, and every finished engine that runs here.

    Networks are compared with their probes, the sampler's update with the schedule. The provider's own graphs run as it optimises them,
    the others as they are written.

    Returns:
        names of what was evaluated; {what could not be: why}.
    Raises:
        ParityError: an engine returns NaN or a wrong shape, asks for an unknown input, or computes something else than where it was built.
        GraphError: a graph does not load.
        BundleError: a finished engine does not fit this GPU or version.
    """
    from .backends import available, open_device
    from .engines import open_artifact

    m, working = bundle.manifest, available()
    names: list[str] = []
    left_out: dict[str, str] = {}
    if working[REFERENCE] == OK:
        names += [_verify_graph(bundle, graph) for graph in m.graphs]
    else:
        left_out[f"{len(m.graphs)} graphs"] = working[REFERENCE]
    for backend in (name for name in BUILDERS if name in m.backends):
        mine = [artifact for artifact in m.artifacts if artifact.backend == backend]
        if working[backend] != OK:
            left_out[f"{len(mine)} {backend} engines"] = working[backend]
            continue
        with contextlib.closing(open_device(backend)) as device:
            for artifact in mine:
                with open_artifact(bundle, artifact, device) as engine:
                    if artifact.precision is None:
                        check_update(engine, m.schedule, m.model, m.guidance_scale, bundle.sigmas(backend))
                    else:
                        check_probe(bundle, artifact.precision, BACKENDS[backend], engine)
                names.append(f"{name_of(artifact.precision)}.{backend}")
    return names, left_out


def _verify_graph(bundle: Bundle, graph: Graph) -> str:
    """Evaluate a graph on ONNX Runtime's CPU provider; its name."""
    from .backends import OrtEngine

    m = bundle.manifest
    with OrtEngine(bundle.file(graph.file), optimise=graph.emission is Emission.ORT_CPU) as engine:
        if graph.precision is None:
            check_update(engine, m.schedule, m.model, m.guidance_scale, bundle.sigmas(BUILDERS[0]))
            return UPDATE
        unknown = set(engine.inputs) - {SAMPLE, TIMESTEP, STEP, *(spec.name for spec in m.model.inputs)}
        if unknown:
            raise ParityError(f"{graph.file} asks for an input {min(unknown)!r} that the manifest does not know: rebuild the bundle")
        check_probe(bundle, graph.precision, graph.emission, engine)
    return f"{graph.precision}.{graph.emission}"


def check_tools() -> None:
    """What `compare_backends` needs besides the backends.

    Raises:
        BackendUnavailable: onnx or Polygraphy is not installed.
    """
    from .backends.compare import load

    load()
    _cut_layers()


def _cut_layers() -> Callable[[Path, Path], tuple[Path, dict[str, Any]]]:
    try:
        from .export import cut_layers
    except ImportError as error:
        raise BackendUnavailable(f"comparing layers needs onnx ({error}): pip install 'ptqd-export[build]'") from error
    return cut_layers


def backend_states(bundle: Bundle) -> dict[str, str]:
    """{backend: "ok", or why it cannot be compared here} for every backend that runs files."""
    from .backends import available

    states = available()
    for name in BUILDERS:
        if states[name] == OK and name not in bundle.manifest.backends:
            states[name] = f"the bundle has no engines for it: `ptqd-export run ... --backend {name} --rebuild` builds them"
    return states


def compare_backends(bundle: Bundle, states: Mapping[str, str]) -> list[Comparison]:
    """Every backend that is "ok" in `states`, at every precision that it runs, against ONNX Runtime's CPU provider on the same graph as it
    is written.

    Two right executions of a quantized network drift apart, for a rounding that flips moves others. So the judgement is layer by layer: each
    quantized layer, cut out of the graph, gets the inputs that the whole graph computes in the reference, at the first, middle and last step
    of two samples. Its outputs must be equal up to float rounding, or one quantization step apart in a share of parity.MAX_SHARE_APART.
    The whole network must not be further from the reference than two draws of its quantization noise are from each other; where nothing
    is rounded to codes on the way, than float rounding. Finished engines hold the whole network, so of them only that is compared: a layer
    would need an engine of its own, with other kernels than the network's.

    Raises:
        ParityError: naming the layer, or the step.
        BackendUnavailable: `check_tools`, or the backend fails.
        GraphError: a graph cannot be run.
    """
    from .backends import open_device

    check_tools()
    points = sampled_feeds(bundle)
    found = []
    for backend in (name for name, state in states.items() if state == OK):
        with contextlib.closing(open_device(backend)) as device:
            for graph in _graphs(bundle.manifest, backend):
                found.append(_compare(bundle, backend, graph, device, points))
    return found


def _graphs(m: Manifest, backend: str) -> list[Graph]:
    """What a backend runs here, or what its engines were built from."""
    graphs = [graph for graph in m.graphs if graph.emission is BACKENDS[backend] and graph.precision is not None]
    built = {artifact.precision for artifact in m.artifacts if artifact.backend == backend}
    return [graph for graph in graphs if backend not in BUILDERS or graph.precision in built]


def sampled_feeds(bundle: Bundle) -> dict[int, Feeds]:
    """{step: feeds of x_t (2, C, H, W), step and conditions} at the first, middle and last step of samples 0 and 1 of seed 0, on ORT CPU."""
    m = bundle.manifest
    n = len(m.schedule)
    wanted = sorted({0, n // 2, n - 1})
    conditions = m.model.conditions(None, 2)
    points: dict[int, Feeds] = {}

    def keep(step: int, x: npt.NDArray[np.float64], epsilon: npt.NDArray[np.float64]) -> None:
        if step in wanted:
            timesteps = np.full(2, m.schedule.timesteps[step], np.int64)
            points[step] = {SAMPLE: x.astype(np.float32), TIMESTEP: timesteps, STEP: np.array([step], np.int64), **conditions}

    with Runtime(bundle, REFERENCE) as runtime:
        sample(
            lambda step: runtime.engines[m.plan.steps[step]],
            m.schedule,
            m.model,
            conditions,
            (0, 1),
            seed=0,
            guidance_scale=m.guidance_scale,
            sigmas=bundle.sigmas(REFERENCE),
            on_step=keep,
        )
    return points


def _compare(bundle: Bundle, backend: str, graph: Graph, device: Any, points: Mapping[int, Feeds]) -> Comparison:
    from .backends import open_engine
    from .engines import open_artifact

    precision = graph.precision
    assert precision is not None
    artifact = bundle.manifest.artifact(precision, backend)
    name = f"{backend} at {precision}"
    layers: dict[str, Any] = {}
    if artifact.build is None and not precision.is_float:
        layers = compare_layers(name, bundle.file(graph.file), lambda file: open_engine(backend, file, device), graph.emission, list(points.values()))
    network, limits = compare_network(name, bundle, graph, lambda: open_artifact(bundle, artifact, device), points)
    worst = min(layers, key=lambda path: float(layers[path].snr), default=None)
    return Comparison(
        precision=str(precision),
        emission=str(graph.emission),
        backend=backend,
        layers=len(layers),
        worst_layer=worst,
        layer_snr=None if worst is None else _finite(layers[worst].snr),
        share_apart=sum(layer.apart for layer in layers.values()) / max(sum(layer.size for layer in layers.values()), 1),
        network_snr={step: _finite(snr) for step, snr in network.items()},
        network_limit=limits,
    )


def _finite(snr: float) -> float | None:
    return round(snr, 2) if np.isfinite(snr) else None


def compare_layers(
    name: str, graph: Path, open_engine: Callable[[Path], Engine], emission: Emission, points: Sequence[Feeds]
) -> dict[str, Difference]:
    """Each quantized layer of `graph` in the engine that `open_engine` makes of it, on the inputs that the whole graph computes at `points`.

    Args:
        name: of backend and graph, for errors.
    Returns:
        module path -> how far it is from the reference, over all points.
    Raises:
        ParityError: naming the layer.
    """
    from .backends import OrtEngine
    from .backends.compare import compare

    half = emission is Emission.HALF
    rounding, limit = (parity.ROUNDINGS * parity.HALF, HALF_SNR) if half else (parity.FLOAT_TOLERANCE, FLOAT_SNR)
    found: dict[str, Difference] = {}
    with tempfile.TemporaryDirectory() as folder:
        whole, layers = _cut_layers()(graph, Path(folder))
        with OrtEngine(whole, optimise=False) as engine:
            values = [engine(point) for point in points]
        for path, layer in layers.items():
            feeds = [{layer.source: value[layer.source]} for value in values]
            engines = {REFERENCE: layer.file, name: functools.partial(open_engine, layer.file)}
            (one,) = compare(engines, feeds, steps={layer.target: layer.step}, rounding=rounding)
            apart = one.apart <= max(parity.MAX_SHARE_APART * one.size, 1) and one.largest_steps <= 1.5
            if not (one.snr >= limit or apart):
                raise ParityError(
                    f"{name}: layer {path} differs from {graph.name} as it is written: {one.snr:.1f} dB (float rounding leaves {limit:.0f}), "
                    f"{one.apart / one.size:.2%} of outputs, by up to {one.largest_steps:.1f} quantization steps "
                    f"(allowed: {parity.MAX_SHARE_APART:.2%}, 1 step); this backend or its version computes something else: do not run it here"
                )
            found[path] = one
    return found


def compare_network(
    name: str, bundle: Bundle, graph: Graph, open_engine: Callable[[], Engine], points: Mapping[int, Feeds]
) -> tuple[dict[int, float], dict[int, float]]:
    """The guided epsilon of an engine against that of its graph as it is written.

    Returns:
        {step: SNR in dB}, {step: the least allowed}.
    Raises:
        ParityError: naming the step.
    """
    from .backends import OrtEngine
    from .backends.compare import compare

    m = bundle.manifest
    limits = network_limits(bundle, graph)
    engines = {
        REFERENCE: lambda: _Guided(OrtEngine(bundle.file(graph.file), optimise=False), m),
        name: lambda: _Guided(open_engine(), m),
    }
    found, allowed = {}, {}
    for step, feeds in points.items():
        (one,) = compare(engines, [feeds])
        found[step], allowed[step] = one.snr, limits[step]
        if not one.snr >= limits[step]:
            raise ParityError(
                f"{name}: epsilon at step {step} is {one.snr:.1f} dB from {graph.file} as it is written (at least {limits[step]:.1f}); "
                "this backend or its version computes something else: do not run it here"
            )
    return found, allowed


def network_limits(bundle: Bundle, graph: Graph) -> npt.NDArray[np.float64]:
    """dB per step, (T,), that right executions of a graph lie within.

    Two independent draws of the quantization noise differ by sqrt(2) times its RMS; allowed is twice, as for the probe. Where no activation
    is quantized there is no such noise, only rounding.
    """
    precision, n = graph.precision, len(bundle.manifest.schedule)
    assert precision is not None
    if precision.is_float or precision.weight_only:
        half = graph.emission is Emission.HALF and precision != FP32
        return np.full(n, -20 * np.log10(parity.MAX_HALF_ERROR if half else parity.MAX_FLOAT_ERROR))
    snr = np.asarray(bundle.stats(precision, graph.emission).snr)
    return np.asarray(np.clip(10 * np.log10(snr / 4), 0.0, MAX_NETWORK_SNR))


@dataclass(frozen=True)
class _Guided:
    """An engine and its guidance: x_t, step and conditions in, the guided epsilon out."""

    engine: Engine
    manifest: Manifest

    @property
    def inputs(self) -> tuple[str, ...]:
        return (SAMPLE, STEP, *(spec.name for spec in self.manifest.model.inputs))

    @property
    def outputs(self) -> tuple[str, ...]:
        return (EPSILON,)

    def __call__(self, feeds: Feeds) -> dict[str, Array]:
        m, x, step = self.manifest, np.asarray(feeds[SAMPLE], np.float32), int(np.asarray(feeds[STEP])[0])
        return {EPSILON: predict_singly(self.engine, x, step, m.schedule, m.model, feeds, m.guidance_scale)}

    def close(self) -> None:
        self.engine.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self.close()


def parsers(bundle: Bundle) -> dict[str, dict[str, str]]:
    """{backend: {graph file: "ok", or the first thing that its parser refuses}} for the backends of finished engines that are installed."""
    from .backends.compare import parser_verdict
    from .backends.trt import load

    found: dict[str, dict[str, str]] = {}
    for name in BUILDERS:
        with contextlib.suppress(BackendUnavailable):
            load(name)
            files = dict.fromkeys(graph.file for graph in bundle.manifest.graphs if graph.emission is BACKENDS[name])
            found[name] = {file: parser_verdict(name, bundle.file(file)) for file in files}
    return found


def text(states: Mapping[str, str], parsed: Mapping[str, Mapping[str, str]], compared: Sequence[Comparison]) -> str:
    """The comparison for people."""
    lines = [f"{name}: {state}" for name, state in states.items()]
    for name, verdicts in parsed.items():
        refused = [f"{file} ({verdict})" for file, verdict in verdicts.items() if verdict != OK]
        lines.append(f"the parser of {name} takes {len(verdicts) - len(refused)} of {len(verdicts)} graphs" + "".join(f"; not {r}" for r in refused))
    steps = list(compared[0].network_snr) if compared else []
    head = "".join(f"{f'step {step}':>10}" for step in steps)
    lines += [
        "",
        f"against {REFERENCE} running the graphs as they are written: worst layer and whole network in dB (and the least allowed):",
    ]
    lines += [f"{'precision':<11}{'emission':<10}{'backend':<14}{'layers':>6}{'worst':>8}{'apart':>9}{head}  worst layer"]
    for c in compared:
        network = "".join(f"{f'{_db(c.network_snr[step])} ({c.network_limit[step]:.0f})':>10}" for step in steps)
        worst = _db(c.layer_snr) if c.layers else "-"
        lines.append(f"{c.precision:<11}{c.emission:<10}{c.backend:<14}{c.layers:>6}{worst:>8}{c.share_apart:>9.1e}{network}  {c.worst_layer or '-'}")
    return "\n".join(lines)


def _db(snr: float | None) -> str:
    return "equal" if snr is None else f"{snr:.0f}"
