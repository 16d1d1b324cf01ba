"""build: recipe in, bundle out. Composes calibration, export, parity and backends.

Intermediate results are kept in `<out>.work/`, each under a key of everything that decides it, so that a
rerun continues where a killed build stopped; the folder is removed once the bundle is complete. It also keeps
two builds from using the same target.
"""

from __future__ import annotations

import contextlib
import os
import platform
import time
from collections.abc import Callable, Mapping
from dataclasses import asdict, replace
from importlib import metadata
from pathlib import Path

import numpy as np
import numpy.typing as npt

from ..bundle.bundle import Bundle, check_target, in_the_way, write_manifest
from ..bundle.layers import write_layers
from ..bundle.manifest import Choice, CorrectionRecord, Machine, Manifest, Provenance
from ..bundle.tables import Key, write_tables
from ..calibrate import (
    Network,
    Parts,
    Trajectories,
    Workers,
    collect,
    observe,
    open_parts,
    open_source,
    prompts_of,
)
from ..core.backend import BACKENDS, OPENVINO, TORCH
from ..core.engine import Array
from ..core.plan import Plan
from ..core.pool import Connect
from ..core.precision import FP32, HALF_BITS, Precision
from ..core.quant import QuantizedNetwork
from ..core.sampling import Sampling
from ..errors import RecipeError
from ..export import export_fp, exported_layers, write_variants
from ..files import digest, empty_folder, replacing, work_folder
from ..recipe import Recipe
from ..typed import to_plain
from .choose import check_plan, choose, sampled
from .closed_loop import closed_loop, held_out, measure_sensitivity
from .engines import ENGINES, Builder, KnownEngines, check_builder, graph_artifact, held_engines
from .graphs import emit, emit_update, figures_of, judge, judge_backends, probes_of
from .layers import quantize_all
from .measure import Measured, key_of, measure_all
from .parts import emit_parts
from .timing import Times, files_of, time_backends

VERSIONS = (
    "ptqd-export",
    "torch",
    "diffusers",
    "onnx",
    "onnx-ir",
    "onnxscript",
    "onnxruntime",
    *BACKENDS[OPENVINO].distributions,
    "numpy",
    "transformers",
    "tokenizers",
)
"""Packages that decide what a bundle holds."""
Say = Callable[[str], None]


def assemble(
    recipe: Recipe,
    out: Path,
    *,
    resume: bool = True,
    say: Say = lambda text: None,
    connect: Connect | None = None,
) -> Bundle:
    """Build the bundle of a recipe at `out`, atomically.

    Args:
        resume: reuse intermediate results of an earlier, stopped build with the same settings.
        say: called with one line of text for each thing that is done.
        connect: opens the pool that samples the trajectories and measures the noise of simulated networks.
    Raises:
        PTQDError: the build failed; the message is one line. `out` is as it was, and `<out>.work` holds
            complete intermediate results or does not exist.
    """
    started = time.monotonic()
    check_target(out)
    for backend in recipe.backends:
        check_builder(backend, recipe.tensorrt.settings(branches=1))
    source = open_source(recipe)
    parts = open_parts(recipe, source)
    network, prompted = _prompted(recipe, source.network, parts, say)
    sampling = Sampling.of(network.info, network.scheduler_config, **asdict(recipe.sampler))
    check_plan(recipe, len(sampling))
    with contextlib.ExitStack() as stack:
        work = stack.enter_context(work_folder(out, resume))
        held = held_engines(out)
        pool = None if connect is None else stack.enter_context(connect(TORCH))
        workers = None if pool is None else Workers.of(pool, recipe, network.info)
        with replacing(out, in_the_way) as folder:
            manifest = _fill(recipe, network, parts, prompted, sampling, folder, work, held, say, workers)
            seconds = round(time.monotonic() - started, 1)
            provenance = replace(manifest.provenance, seconds=seconds)
            write_manifest(folder, replace(manifest, provenance=provenance))
            Bundle.open(folder)  # what could not be opened takes the place of nothing
        empty_folder(work)
    return Bundle.open(out)


def _prompted(recipe: Recipe, network: Network, parts: Parts, say: Say) -> tuple[Network, dict[str, Array]]:
    """The network, with the empty prompt's embedding for no condition, and the conditions of calibration.

    Raises:
        RecipeError: the recipe has prompts for a network without text, or values beside them.
    """
    spec = recipe.calibration
    own = bool(spec.prompts or spec.prompts_file)
    for note in parts.notes:
        say(note)
    if not parts.texts:
        if own:
            raise RecipeError(
                f"calibration has prompts, but {network.info.name} has no text encoder: leave them out"
            )
        return network, {}
    network = replace(network, info=replace(network.info, null=parts.null))
    given = {s.name for s in network.info.inputs if s.values is not None} & parts.shapes.keys()
    if given and own:
        raise RecipeError(f"calibration has prompts, and the input {min(given)} has values: leave one out")
    if given:
        return network, {}
    prompts = prompts_of(recipe)
    if not own:
        say(f"calibration.prompts is not set: {len(prompts)} captions of everyday pictures are taken")
    return network, dict(parts.encode(prompts))


def _fill(
    recipe: Recipe,
    network: Network,
    parts: Parts,
    prompted: Mapping[str, Array],
    sampling: Sampling,
    folder: Path,
    work: Path,
    held: KnownEngines,
    say: Say,
    workers: Workers | None,
) -> Manifest:
    """Write everything but the manifest into `folder`; returns the manifest."""
    spec = recipe.quantization
    asked = recipe.digest("model", "sampler", "calibration", "pipeline")
    conditions = {name: digest(value.tobytes()) for name, value in prompted.items()}
    key = key_of(to_plain(sampling), asked, parts.digest, conditions, _versions())
    say(f"{network.info.name}: {sampling.summary}")
    # First: no calibration if the export fails.
    base = export_fp(network.module, network.info, sampling.schedule.timesteps.dtype.name)
    pipeline = emit_parts(parts, folder, say)
    traced = None if workers is None else workers.trajectories
    folder_of_paths = work / f"trajectories-{key[:16]}"
    if folder_of_paths.exists():
        say("trajectories are taken up from a stopped build")
    paths = collect(network, sampling, recipe, folder_of_paths, prompted, traced)
    seen = observe(network, sampling, recipe, paths)
    exported = exported_layers(base)
    quantized, sensitivities = quantize_all(recipe, network, seen, sampling, paths, exported, work, key, say)
    if lost := sorted(set(seen.layers) - set(exported)):
        say(
            f"{len(lost)} layers are not in the exported graph as themselves (such as {lost[0]}): they stay "
            "float"
        )
    measured = measure_all(recipe, network, sampling, paths, quantized, work, key, workers, say)
    graphs = emit(base, sampling, quantized, measured, folder)
    verdicts = judge(graphs, folder, sampling, paths, quantized, measured, network, say)
    compiled = judge_backends(
        recipe.backends, graphs, verdicts, folder, sampling, paths, quantized, measured, network, say
    )

    settings = recipe.tensorrt.settings(sampling.branches)
    builders = {
        name: Builder(name, settings, work / ENGINES, held, say, write_variants)
        for name in recipe.backends
        if BACKENDS[name].builds_engines
    }
    artifacts = [
        builders[name].network(graph, folder)
        if name in builders
        else graph_artifact(name, graph, compiled.get((name, graph.precision)))
        for name in recipe.backends
        for graph in graphs
        if graph.emission is BACKENDS[name].emission
    ]
    times = time_backends(recipe.backends, sampling, recipe.plan.batch_size, artifacts, graphs, folder)
    artifacts = [
        replace(a, time_ms=round(times.seconds[a.precision] * 1e3, 3)) if a.backend == times.backend else a
        for a in artifacts
    ]
    files = files_of(times.backend, artifacts, graphs, folder)
    engine_key = key_of(key, times.backend, recipe.plan.batch_size, recipe.digest("quantization"))
    digests = {g.precision: g.digest for g in graphs if g.emission is BACKENDS[times.backend].emission}
    keys = {p: key_of(engine_key, digests[p], digests.get(FP32)) for p in files}
    plan, choice = _choose(recipe, network, sampling, paths, quantized, measured, times, files, keys, work)
    for record in choice.compared:
        ends = f"error {record.predicted:.3g} predicted, {record.sampled:.3g} sampled"
        say(f"{record.kind} plan {record.plan}: {ends}")
    update = emit_update(sampling, folder)
    write_tables(
        folder,
        {key: (m.correction, m.pooled) for key, m in measured.items()},
        probes_of(graphs, verdicts, measured),
        {name: value[0] for name, value in parts.encode([""]).items()},
    )
    write_layers(folder, quantized)
    return Manifest(
        sampling=sampling,
        recalibrate_variance=spec.recalibrate_variance,
        plan=plan,
        choice=choice,
        graphs=tuple(graphs),
        update=update,
        artifacts=tuple(artifacts),
        update_engines=tuple(builder.update(update, folder) for builder in builders.values()),
        engine_settings=settings,
        correction=CorrectionRecord(
            spec.correction, spec.clamp_k, {f"{p}.{e}": m.record() for (p, e), m in measured.items()}
        ),
        parity=figures_of(graphs, verdicts, compiled),
        bops={p: net.bops for p, net in quantized.items()},
        half_bops={p: net.bops_at(HALF_BITS) for p, net in quantized.items()},
        layers={p: _layer_bits(net) for p, net in quantized.items() if not p.is_float},
        layer_sensitivity=sensitivities,
        provenance=Provenance(
            recipe.to_dict(),
            recipe.calibration.seed,
            _versions(),
            Machine(platform.machine(), os.cpu_count()),
            0.0,
            network.scheduler_config,
        ),
        files={},
        pipeline=pipeline,
    )


def _layer_bits(network: QuantizedNetwork) -> dict[str, tuple[str, ...]]:
    """Layers by their bits, such as {"w4a8": (...)}; "float" for those that are not quantized."""
    found: dict[str, list[str]] = {}
    for name, layer in network.layers.items():
        found.setdefault(f"w{layer.weight_bits}a{layer.activation_bits}", []).append(name)
    found["float"] = list(network.float_macs)
    return {bits: tuple(names) for bits, names in found.items()}


def _choose(
    recipe: Recipe,
    network: Network,
    sampling: Sampling,
    paths: Trajectories,
    quantized: Mapping[Precision, QuantizedNetwork],
    measured: Mapping[Key, Measured],
    times: Times,
    files: Mapping[Precision, Path],
    keys: Mapping[Precision, str],
    work: Path,
) -> tuple[Plan, Choice]:
    """The plan, by what noise in its steps comes to at the end of sampling, and its own end.

    Args:
        files: what the timed backend runs at each precision.
        keys: of everything that decides what it computes.
    """
    spec, emission = recipe.plan, BACKENDS[times.backend].emission
    noisy = [p for p in quantized if not p.is_float]
    var = {p: measured[p, emission.numerics(p)].correction.var for p in noisy}

    def sigmas(plan: Plan) -> npt.NDArray[np.float64]:
        return plan.sigmas(sampling.schedule, var, recipe.quantization.recalibrate_variance)

    batches = held_out(paths, spec.sensitivity_samples, spec.batch_size)
    seed = recipe.calibration.seed
    with closed_loop(sampling, batches, seed, files, times.backend, network, sigmas) as loop:
        sensitivity = None
        if spec.sensitivity == "measured":
            sensitivity = measure_sensitivity(loop, noisy, spec.sensitivity_groups, work, keys)
        plan, choice = choose(recipe, sampling.schedule, quantized, measured, times, sensitivity)
        return plan, sampled(choice, loop)


def _versions() -> dict[str, str]:
    found = {}
    for name in VERSIONS:
        try:
            found[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            continue
    return {**found, "python": platform.python_version()}
