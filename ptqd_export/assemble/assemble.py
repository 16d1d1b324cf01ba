"""build: recipe in, bundle out. Composes calibration, export, parity and backends.

Intermediate results are kept in `<out>.work/`, each under a key of everything that decides it, so that a
rerun continues where a killed build stopped; the folder is removed once the bundle is complete. It also keeps
two builds from using the same target.
"""

from __future__ import annotations

import os
import platform
import time
from collections.abc import Callable
from dataclasses import asdict, replace
from importlib import metadata
from pathlib import Path

from ..bundle.bundle import Bundle, check_target, in_the_way, write_manifest
from ..bundle.manifest import CorrectionRecord, Machine, Manifest, Provenance
from ..bundle.tables import write_layers, write_tables
from ..calibrate import Network, collect, observe, open_model, quantize
from ..core.backend import BACKENDS, Emission
from ..core.sampling import Sampling
from ..export import export_fp, exported_layers, write_variants
from ..files import empty_folder, replacing, work_folder
from ..recipe import Recipe
from ..typed import to_plain
from .choose import choose, fixed_plan
from .engines import ENGINES, Builder, KnownEngines, check_builder, graph_artifact, held_engines
from .graphs import emit, emit_update, figures_of, judge, probes_of
from .measure import key_of, measure_all
from .timing import time_backends

VERSIONS = ("ptqd-export", "torch", "diffusers", "onnx", "onnx-ir", "onnxscript", "onnxruntime", "numpy")
"""Packages that decide what a bundle holds."""
Say = Callable[[str], None]


def assemble(recipe: Recipe, out: Path, *, resume: bool = True, say: Say = lambda text: None) -> Bundle:
    """Build the bundle of a recipe at `out`, atomically.

    Args:
        resume: reuse intermediate results of an earlier, stopped build with the same settings.
        say: called with one line of text for each thing that is done.
    Raises:
        PTQDError: the build failed; the message is one line. `out` is as it was, and `<out>.work` holds
            complete intermediate results or does not exist.
    """
    started = time.monotonic()
    check_target(out)
    for backend in recipe.backends:
        check_builder(backend, recipe.tensorrt.settings(branches=1))
    network = open_model(recipe)
    sampling = Sampling.of(network.info, network.scheduler_config, **asdict(recipe.sampler))
    if recipe.plan.rule == "fixed":
        fixed_plan(recipe)  # refuse a wrong one before any work
    with work_folder(out, resume) as work:
        held = held_engines(out)
        with replacing(out, in_the_way) as folder:
            manifest = _fill(recipe, network, sampling, folder, work, held, say)
            seconds = round(time.monotonic() - started, 1)
            provenance = replace(manifest.provenance, seconds=seconds)
            write_manifest(folder, replace(manifest, provenance=provenance))
            Bundle.open(folder)  # what could not be opened takes the place of nothing
        empty_folder(work)
    return Bundle.open(out)


def _fill(
    recipe: Recipe,
    network: Network,
    sampling: Sampling,
    folder: Path,
    work: Path,
    held: KnownEngines,
    say: Say,
) -> Manifest:
    """Write everything but the manifest into `folder`; returns the manifest."""
    schedule, spec = sampling.schedule, recipe.quantization
    key = key_of(to_plain(sampling), recipe.digest("model", "sampler", "calibration"), _versions())
    say(
        f"{network.info.name}: {len(sampling)} steps, eta {schedule.eta:g}, guidance "
        f"{sampling.guidance_scale:g}"
    )
    base = export_fp(network.module, network.info)  # first: no calibration if the export fails
    paths = collect(network, sampling, recipe, work / f"trajectories-{key[:16]}")
    seen = observe(network, sampling, recipe, paths)
    exported = exported_layers(base)
    quantized = {p: quantize(network, seen, p, recipe).exported(exported) for p in recipe.precisions}
    if lost := sorted(set(seen.layers) - set(exported)):
        say(
            f"{len(lost)} layers are not in the exported graph as themselves (such as {lost[0]}): they stay "
            "float"
        )
    measured = measure_all(recipe, network, sampling, paths, quantized, work, key)
    graphs = emit(base, sampling, quantized, measured, folder)
    verdicts = judge(graphs, folder, sampling, paths, quantized, measured, network, say)

    settings = recipe.tensorrt.settings(sampling.branches)
    builders = {
        name: Builder(name, settings, work / ENGINES, held, say, write_variants)
        for name in recipe.backends
        if BACKENDS[name].builds_engines
    }
    artifacts = [
        builders[name].network(graph, folder) if name in builders else graph_artifact(name, graph)
        for name in recipe.backends
        for graph in graphs
        if graph.emission is BACKENDS[name].emission
    ]
    times = time_backends(recipe.backends, sampling, recipe.plan.batch_size, artifacts, graphs, folder)
    artifacts = [
        replace(a, time_ms=round(times.seconds[a.precision] * 1e3, 3)) if a.backend == times.backend else a
        for a in artifacts
    ]
    plan, choice = choose(recipe, schedule, quantized, measured, times)
    var = {
        p: measured[p, Emission.HALF.numerics(p)].correction.var for p in plan.precisions if not p.is_float
    }
    recalibrated = schedule.recalibrated_sigmas(plan.residual_var(var))
    update = emit_update(sampling, recalibrated if spec.recalibrate_variance else schedule.sigmas, folder)
    write_tables(
        folder,
        {key: (m.correction, m.pooled) for key, m in measured.items()},
        probes_of(graphs, verdicts, measured),
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
        parity=figures_of(graphs, verdicts),
        bops={p: net.bops for p, net in quantized.items()},
        provenance=Provenance(
            recipe.to_dict(),
            recipe.calibration.seed,
            _versions(),
            Machine(platform.machine(), os.cpu_count()),
            0.0,
        ),
        files={},
    )


def _versions() -> dict[str, str]:
    found = {}
    for name in VERSIONS:
        try:
            found[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            continue
    return {**found, "python": platform.python_version()}
