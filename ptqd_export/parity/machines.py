"""verify: does a bundle compute on this machine what it computed where it was built?"""

from __future__ import annotations

import contextlib

import numpy as np

from .. import backends
from ..bundle.bundle import Bundle
from ..bundle.manifest import UPDATE, Graph
from ..core.backend import BACKENDS, ENGINE_BACKENDS, ORT_CPU, RUNNABLE, Emission
from ..core.engine import SAMPLE, STEP, TIMESTEP
from ..core.engine_build import Compiled
from ..core.precision import Precision
from ..errors import BackendUnavailable, ParityError
from ..runtime import PictureDecoder, check_probe, check_update, encode_prompts, open_artifact, open_update

OK = "ok"


def verify_engines(bundle: Bundle) -> tuple[list[str], dict[str, str]]:
    """Evaluate once every graph of the bundle, and every finished engine that runs here.

    Graphs run on ONNX Runtime's CPU provider: it optimises those of its own emission, and runs the others as
    they are written. Backends that compile graphs run them too, where the bundle was built for them. Networks
    are compared with their probes, the sampler's update with the schedule, text encoders with the bundle's
    states of the empty prompt.

    Returns:
        names of what was evaluated; {name of what could not be evaluated: why}.
    Raises:
        ParityError: an engine returns NaN or a wrong shape, asks for an unknown input, or computes something
            else than where it was built.
        GraphError: a graph does not load.
        BundleError: a finished engine does not fit this GPU or version.
    """
    m, states = bundle.manifest, backends.available()
    names: list[str] = []
    left_out: dict[str, str] = {}
    if states[ORT_CPU] == OK:
        names += [_verify_graph(bundle, graph) for graph in m.graphs]
        names.append(_verify_update(bundle))
        _verify_parts(bundle, names, left_out)
    else:
        left_out[f"{len(m.graphs) + 1} graphs"] = states[ORT_CPU]
    for backend in (name for name in m.backends if BACKENDS[name].compiles):
        if states[backend] == OK:
            for precision in m.bops:
                try:
                    names.append(_verify_compiled(bundle, precision, backend))
                except BackendUnavailable as error:
                    left_out[f"{precision}.{backend}"] = str(error)
        else:
            left_out[f"{len(m.bops)} graphs on {backend}"] = states[backend]
    for backend in (name for name in ENGINE_BACKENDS if name in m.backends):
        if states[backend] == OK:
            names += _verify_engines_of(bundle, backend)
        else:
            count = sum(engine.backend == backend for engine in m.engines)
            left_out[f"{count} {backend} engines"] = states[backend]
    return names, left_out


def _verify_graph(bundle: Bundle, graph: Graph) -> str:
    """Evaluate a graph on ONNX Runtime's CPU provider; returns its name."""
    with backends.OrtEngine(bundle.file(graph.file), optimise=graph.emission is Emission.ORT_CPU) as engine:
        known = {SAMPLE, TIMESTEP, STEP, *(spec.name for spec in bundle.manifest.sampling.model.inputs)}
        unknown = set(engine.inputs) - known
        if unknown:
            raise ParityError(
                f"{graph.file} asks for an input {min(unknown)!r} that the manifest does not know: rebuild "
                "the bundle"
            )
        check_probe(bundle, graph.precision, graph.emission, engine)
    return graph.name


def _verify_compiled(bundle: Bundle, precision: Precision, backend: str) -> str:
    """Evaluate a graph on a backend that compiles it; returns its name, and how much of it runs in 8 bits."""
    m, emission = bundle.manifest, BACKENDS[backend].emission
    artifact, quantized = m.artifact(precision, backend), m.graph(precision, emission).quantized
    feeds = m.sampling.conditional.feeds(
        np.zeros((1, *m.sampling.model.sample_shape)), 0, m.sampling.model.conditions(None, 1)
    )
    with open_artifact(bundle, artifact, None) as engine:
        check_probe(bundle, precision, emission, engine)
        plan = engine.report(quantized, feeds) if isinstance(engine, Compiled) else None
        return artifact.name + (
            f" ({plan.taken} of {plan.meant} layers in 8 bits)" if plan and plan.meant else ""
        )


def _verify_update(bundle: Bundle) -> str:
    m = bundle.manifest
    with backends.OrtEngine(bundle.file(m.update.file), optimise=False) as engine:
        check_update(engine, m.sampling)
    return UPDATE


def _verify_parts(bundle: Bundle, names: list[str], left_out: dict[str, str]) -> None:
    """Text encoders must give for the empty prompt what the bundle holds; a decoder, finite pictures."""
    pipeline = bundle.manifest.pipeline
    encoders = [encoder.folder for encoder in pipeline.encoders]
    if encoders:
        try:
            encode_prompts(bundle, [""])
            names += encoders
        except BackendUnavailable as error:
            left_out |= dict.fromkeys(encoders, str(error))
    if pipeline.decoder is not None:
        with PictureDecoder(bundle) as decode:
            decode(np.zeros((1, *pipeline.decoder.latent_shape)))
        names.append(pipeline.decoder.folder)


def _verify_engines_of(bundle: Bundle, backend: str) -> list[str]:
    """Evaluate the finished engines of a backend; returns their names."""
    m, names = bundle.manifest, []
    with contextlib.closing(backends.open_device(backend)) as device:
        for artifact in m.artifacts:
            if artifact.backend == backend:
                with open_artifact(bundle, artifact, device) as engine:
                    check_probe(bundle, artifact.precision, BACKENDS[backend].emission, engine)
                names.append(artifact.name)
        with open_update(bundle, backend, device) as update:
            check_update(update, m.sampling)
        names.append(m.update_engine(backend).name)
    return names


def backend_states(bundle: Bundle) -> dict[str, str]:
    """{backend: "ok", or why it cannot be compared here} for every backend that runs files."""
    states = backends.available()
    for name in RUNNABLE:
        if BACKENDS[name].builds_engines and states[name] == OK and name not in bundle.manifest.backends:
            states[name] = (
                f"the bundle has no engines for it: `ptqd-export run ... --backend {name} --rebuild` builds "
                "them"
            )
    return states
