"""build: recipe in, bundle out. Composes calibration, export and backends; they exchange only the values of the core.

Intermediate results live in `<out>.work/`, each under a key of everything that decides it, so that a rerun takes up where a
killed build stopped; the folder is removed once the bundle stands. It is also what keeps two builds off the same target.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import platform
import shutil
import time
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, fields, replace
from importlib import metadata
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from safetensors import SafetensorError
from safetensors.numpy import load_file, save

from .bundle import QUANTIZATION, TABLES, Bundle, check_target, working, write_manifest, writing
from .device import check_update
from .engine import SAMPLE, STEP, TIMESTEP
from .engines import Held, build_engines, check_builder, graph_artifact, held_engines
from .errors import BackendUnavailable, BundleError, GraphError, RecipeError
from .evaluate import parity
from .manifest import UPDATE, Artifact, Graph, Manifest
from .noise import Correction, NoiseStats
from .plan import Plan, by_budget, by_snr, fixed, pareto_front, step_weights
from .precision import FLOAT_BITS, FP32, Precision
from .quant import BACKENDS, BUILDERS, Emission, QuantizedNetwork
from .recipe import Recipe
from .runtime import probe
from .sampler import branches
from .schedule import NoiseSchedule

F64 = npt.NDArray[np.float64]
Key = tuple[Precision, Emission]
"""Of graphs; of statistics and tables with the emission whose numerics they are."""
CPU = "ort-cpu"
VERSIONS = ("ptqd-export", "torch", "diffusers", "onnx", "onnx-ir", "onnxscript", "onnxruntime", "numpy")


@dataclass(frozen=True)
class Measured:
    """Noise sums of one (precision, numerics): single calibration and held-out trajectories, and what was concluded from them."""

    calibration: Sequence[NoiseStats]
    held_out: Sequence[NoiseStats]
    correction: Correction
    kept: npt.NDArray[np.bool_]
    drop: F64
    drop_error: F64

    @property
    def pooled(self) -> NoiseStats:
        return NoiseStats.pool(self.calibration)

    def error(self) -> F64:
        """Squared error to full precision after correction on held-out trajectories, (T,)."""
        return NoiseStats.pool(self.held_out).mse(self.correction.gain, self.correction.offset)


def build(recipe: Recipe, out: Path, *, resume: bool = True, say: Callable[[str], None] = lambda text: None) -> Bundle:
    """Build the bundle of a recipe at `out`, atomically.

    Args:
        resume: take up intermediate results of an earlier, stopped build of the same settings.
        say: told what is being done, a line at a time.
    Raises:
        PTQDError: one clear line; `out` is as it was before, and `<out>.work` holds whole intermediate results or is not there.
    """
    try:
        from . import export  # noqa: F401
        from .calibrate import open_model
    except ImportError as error:
        raise BackendUnavailable(f"build needs torch, diffusers and onnx ({error}): pip install 'ptqd-export[build]'") from error
    started = time.monotonic()
    check_target(out)
    for backend in recipe.backends:
        check_builder(backend, recipe.tensorrt)
    network = open_model(recipe)
    info = network.info
    info.check_guidance(recipe.sampler.guidance_scale)
    schedule = NoiseSchedule.from_config(network.scheduler_config, recipe.sampler.n_steps, recipe.sampler.eta, recipe.sampler.solver)
    if recipe.plan.rule == "fixed":
        _check_fixed(recipe, schedule)
    with working(out, resume) as work:
        _build(recipe, out, network, schedule, work, say, started)
        shutil.rmtree(work)
    return Bundle.open(out)


def _build(recipe: Recipe, out: Path, network: Any, schedule: NoiseSchedule, work: Path, say: Callable[[str], None], started: float) -> None:
    """From the calibration on."""
    from .calibrate import collect, observe, quantize
    from .export import export_fp, exported_layers

    info = network.info
    key = _digest(info.sha256, schedule.to_dict(), recipe.digest("model", "sampler", "calibration"), _versions())

    say(f"{info.name}: {len(schedule)} steps, eta {schedule.eta:g}, guidance {recipe.sampler.guidance_scale:g}")
    base = export_fp(network.module, info)  # first: what cannot be exported need not be calibrated
    trajectories = collect(network, schedule, recipe, work / f"trajectories-{key[:16]}")
    observed = observe(network, schedule, recipe, trajectories)
    found = exported_layers(base)
    quantized = {p: quantize(network, observed, p, recipe).only(found) for p in recipe.precisions}
    if lost := sorted(set(observed.layers) - found):
        say(f"{len(lost)} layers are not in the exported graph as themselves (such as {lost[0]}): they stay float")
    measured = _measure_all(recipe, network, schedule, trajectories, quantized, work, key)

    held = held_engines(out)
    with writing(out) as tmp:
        graphs = _export(base, info.channels, schedule, quantized, measured, tmp)
        figures, graphs, probes = _check_graphs(recipe, info, schedule, trajectories, quantized, measured, graphs, network, tmp, say)
        artifacts = _artifacts(recipe, list(graphs.values()), tmp, work, held, say)
        artifacts, timed, seconds, notes = _time(recipe, info, schedule, artifacts, graphs, tmp)
        plan, plan_info = choose_plan(recipe, schedule, quantized, seconds, measured, BACKENDS[timed])
        plan_info["timed_on"] = timed
        plan_info["notes"] += _notes(recipe, notes)
        for note in plan_info["notes"]:
            say(note)
        update = _export_update(recipe, info, schedule, plan, measured, tmp)
        artifacts += _artifacts(recipe, [update], tmp, work, held, say)
        _write_tables(tmp, measured, quantized, probes)
        kept = {
            f"{p}.{e}": {
                "kept": m.kept.tolist(),
                "mse_drop_over_standard_error": (m.drop / np.maximum(m.drop_error, 1e-300)).round(2).tolist(),
            }
            for (p, e), m in measured.items()
        }
        manifest = Manifest(
            model=info,
            schedule=schedule,
            solver=recipe.sampler.solver,
            guidance_scale=recipe.sampler.guidance_scale,
            recalibrate_variance=recipe.quantization.recalibrate_variance,
            plan=plan,
            plan_info=plan_info,
            graphs=(*graphs.values(), update),
            artifacts=tuple(artifacts),
            correction={"mode": recipe.quantization.correction, "clamp_k": recipe.quantization.clamp_k, "steps": kept},
            parity=figures,
            bops={p: n.bops for p, n in quantized.items()},
            provenance={
                "recipe": recipe.to_dict(),
                "seed": recipe.calibration.seed,
                "versions": _versions(),
                "machine": {"processor": platform.machine(), "cpus": os.cpu_count()},
                "seconds": round(time.monotonic() - started, 1),
            },
            files={},
        )
        write_manifest(tmp, manifest)


FEW = 8
"""Held-out trajectories below which the spread between them says little."""


def _notes(recipe: Recipe, untimed: Sequence[str]) -> list[str]:
    """What a user should know of a build that ended well. `untimed`: backends that could not be timed, and why."""
    judged = {"fixed": "", "snr": "noise"}.get(recipe.plan.rule, "noise and times" if recipe.plan.cost == "time" else "noise")
    notes = [f"{why}; the plan goes by the {judged} of another backend" if judged else why for why in untimed]
    if recipe.calibration.held_out < FEW:
        notes.append(
            f"{recipe.calibration.held_out} held-out trajectories: the gate and the check of the noise see little; "
            f"give --calib-size {2 * FEW} or more for anything that matters"
        )
    return notes


def _check_fixed(recipe: Recipe, schedule: NoiseSchedule) -> Plan:
    plan = fixed(recipe.plan.steps, len(schedule))
    for precision in plan.precisions:
        if precision not in recipe.precisions:
            raise RecipeError(f"the fixed plan uses {precision}, which is not built: add it to quantization.precisions, or --precision {precision}")
    return plan


def _measure_all(
    recipe: Recipe,
    network: Any,
    schedule: NoiseSchedule,
    trajectories: Any,
    quantized: Mapping[Precision, QuantizedNetwork],
    work: Path,
    key: str,
) -> dict[Key, Measured]:
    """Noise statistics per precision and numerics on the simulated network (PTQD, section 4.2), and the gated corrections."""
    from .calibrate import SimulatedEngine, measure

    n_fit = recipe.calibration.size
    measured: dict[Key, Measured] = {}
    for precision, net in quantized.items():
        if precision.is_float:
            continue
        for emission in dict.fromkeys(e.numerics(precision) for e in Emission):
            file = work / f"stats-{_digest(key, recipe.digest('quantization'), str(precision), str(emission))[:16]}.safetensors"
            parts = _load_stats(file)
            if parts is None:
                with SimulatedEngine(network, net, emission, schedule) as engine:
                    parts = measure(engine, network.info, schedule, trajectories, recipe.sampler.guidance_scale, "all")
                _save_stats(file, parts)
            measured[precision, emission] = conclude(recipe, parts[:n_fit], parts[n_fit:])
    return measured


def conclude(recipe: Recipe, calibration: Sequence[NoiseStats], held_out: Sequence[NoiseStats]) -> Measured:
    """Fit the correction on the calibration trajectories, gate it on the held-out ones."""
    q, pooled = recipe.quantization, NoiseStats.pool(calibration)
    correction, none = (Correction.from_stats(pooled, mode, q.clamp_k) for mode in (q.correction, "none"))
    if q.correction == "none" or not q.gate:
        n = len(correction.var)
        return Measured(calibration, held_out, correction, np.full(n, q.correction != "none"), np.zeros(n), np.zeros(n))
    gated, kept, drop, error = correction.gated(held_out, none)
    return Measured(calibration, held_out, gated, kept, drop, error)


def _export(
    base: Any,
    channels: int,
    schedule: NoiseSchedule,
    quantized: Mapping[Precision, QuantizedNetwork],
    measured: Mapping[Key, Measured],
    folder: Path,
) -> dict[Key, Graph]:
    """Write every graph, each a rewrite of the full-precision export `base`; graphs that came out equal share a file."""
    from .export import fold, lint, lower, quantized_nodes
    from .export import quantize as insert_qdq
    from .export import save as save_graphs

    a, b = schedule.epsilon_coefficients()
    models = {}
    for precision, net in quantized.items():
        for emission in Emission:
            key = precision, emission.numerics(precision)
            c = Correction.identity(len(schedule), channels) if precision.is_float else measured[key].correction
            # epsilon = a out + b x (prediction type), then gain epsilon + offset: one affine map of the raw output and of x.
            sample_gain = None if not b.any() else c.gain * b[:, None]
            graph = lower(insert_qdq(base, net, emission), emission, precision)
            models[precision, emission] = fold(graph, c.gain * a[:, None], c.offset, sample_gain)
    digests = save_graphs({f"{p}.{e}": m for (p, e), m in models.items()}, folder)
    graphs: dict[Key, Graph] = {}
    files: dict[str, str] = {}
    for (p, e), model in models.items():
        name, digest = f"{p}.{e}.onnx", digests[f"{p}.{e}"]
        if digest in files:
            (folder / name).unlink()
        else:
            lint(folder / name, e)
        graphs[p, e] = Graph(p, e, files.setdefault(digest, name), digest, {}, quantized_nodes(model))
    return graphs


def _export_update(recipe: Recipe, info: Any, schedule: NoiseSchedule, plan: Plan, measured: Mapping[Key, Measured], folder: Path) -> Graph:
    """The sampler's step as a graph, with the variances of the plan on the backends that keep the state on a device."""
    from .backends.ort import OrtEngine
    from .export import lint, sampler_update
    from .export import save as save_graphs

    var = np.zeros(len(schedule))
    for step, precision in enumerate(plan.steps):
        if not precision.is_float:
            var[step] = measured[precision, Emission.HALF.numerics(precision)].correction.var[step]
    sigmas = schedule.recalibrated_sigmas(var) if recipe.quantization.recalibrate_variance else schedule.sigmas
    digests = save_graphs({UPDATE: sampler_update(info, schedule, sigmas, recipe.sampler.guidance_scale)}, folder, None)
    file = folder / f"{UPDATE}.onnx"
    lint(file, Emission.HALF)
    with OrtEngine(file, optimise=False) as engine:
        check_update(engine, schedule, info, recipe.sampler.guidance_scale, sigmas)
    return Graph(None, Emission.HALF, f"{UPDATE}.onnx", digests[UPDATE], {}, {})


def _check_graphs(
    recipe: Recipe,
    info: Any,
    schedule: NoiseSchedule,
    trajectories: Any,
    quantized: Mapping[Precision, QuantizedNetwork],
    measured: Mapping[Key, Measured],
    graphs: Mapping[Key, Graph],
    network: Any,
    folder: Path,
    say: Callable[[str], None],
) -> tuple[dict[str, Any], dict[Key, Graph], dict[str, npt.NDArray[Any]]]:
    """The parity gate on every graph, on ONNX Runtime's CPU provider: its own as it optimises them, the others as they are written.

    Returns:
        figures; the graphs, with the operators counted; probes, see `runtime.check_probe`.
    """
    from .backends.ort import OrtEngine
    from .calibrate import TorchEngine, measure
    from .export import op_counts

    figures: dict[str, Any] = {}
    counted: dict[Key, Graph] = {}
    probes: dict[str, npt.NDArray[Any]] = {}
    first: dict[str, tuple[Precision, Emission]] = {}
    predicted: dict[str, npt.NDArray[np.float32]] = {}
    scale = recipe.sampler.guidance_scale
    for (precision, emission), graph in graphs.items():
        name, file, native = f"{precision}.{emission}", folder / graph.file, emission is Emission.ORT_CPU
        optimised = folder / ".optimised.onnx"
        numerics = emission.numerics(precision)
        same = first.setdefault(graph.file, (precision, emission))
        if same != (precision, emission):
            figures[name], counted[precision, emission] = figures[f"{same[0]}.{same[1]}"], replace(graph, ops=counted[same].ops)
            if numerics is emission:
                probes |= _probe(precision, emission, predicted[graph.file], measured.get((precision, numerics)))
            continue
        with OrtEngine(file, optimise=native, optimised_path=optimised if native else None) as engine:
            counted[precision, emission] = replace(graph, ops=dict(sorted(op_counts(optimised if native else file).items())))
            if precision.is_float:
                halved = emission is Emission.HALF and precision != FP32
                allowed = parity.MAX_HALF_ERROR if halved else parity.MAX_FLOAT_ERROR
                with TorchEngine(network, schedule) as reference:
                    figures[name] = parity.check_float(name, engine, reference, info, schedule, trajectories, scale, allowed)
            else:
                net, m = quantized[precision], measured[precision, numerics]
                if native and numerics is emission:
                    parity.check_structure(name, file, optimised, net)
                fold = parity.check_fold(name, engine, m.correction, info, schedule, trajectories)
                layers = parity.check_layers(name, file, net, emission, info, schedule, trajectories, network)
                rounding = parity.HALF if emission is Emission.HALF else 0.0
                noise = measure(engine, info, schedule, trajectories, scale, "held_out")
                figures[name] = {
                    "fold": fold,
                    "layers": layers,
                    "noise": parity.check_noise(name, noise, parity.correct_all(m.held_out, m.correction), rounding),
                }
            if numerics is emission:
                predicted[graph.file] = probe(engine, schedule, info, scale)
                probes |= _probe(precision, emission, predicted[graph.file], measured.get((precision, numerics)))
        for leftover in folder.glob(".optimised*"):
            leftover.unlink()
        say(f"parity {name}: {parity.summary(figures[name])}")
    return figures, counted, probes


def _probe(precision: Precision, emission: Emission, epsilon: npt.NDArray[np.float32], measured: Measured | None) -> dict[str, npt.NDArray[Any]]:
    """What an engine predicted here, and the RMS by which right executions may differ; see `runtime.check_probe`.

    Two right executions drift apart by flipped roundings, at worst like two independent draws of the quantization noise, whose
    difference has sqrt(2) times its RMS: allowed is twice, and at least what kernels in float32 (at fp16: in float16) may differ by.
    """
    noise = 0.0 if measured is None else float(np.sqrt(measured.pooled.dd[0].mean() / measured.pooled.count[0]))
    rms = float(np.sqrt((epsilon.astype(np.float64) ** 2).mean()))
    floor = parity.MAX_HALF_ERROR if precision.is_float and precision != FP32 else 1e-3
    head = f"{precision}.{emission}"
    return {f"{head}.probe": epsilon, f"{head}.probe_noise": np.array([min(max(2 * noise, floor * rms), rms)])}


def _artifacts(recipe: Recipe, graphs: Sequence[Graph], folder: Path, work: Path, held: Held, say: Callable[[str], None]) -> list[Artifact]:
    """What every backend of the recipe runs: graphs as they are, or engines built from them."""
    artifacts = []
    for backend in recipe.backends:
        mine = [graph for graph in graphs if graph.emission is BACKENDS[backend]]
        if backend in BUILDERS:
            artifacts += build_engines(backend, mine, folder, recipe.tensorrt, recipe.sampler.guidance_scale, work / "engines", held, say)
        else:
            artifacts += [graph_artifact(backend, graph) for graph in mine if graph.precision is not None]
    return artifacts


def _time(
    recipe: Recipe, info: Any, schedule: NoiseSchedule, artifacts: Sequence[Artifact], graphs: Mapping[Key, Graph], folder: Path
) -> tuple[list[Artifact], str, dict[Precision, float], list[str]]:
    """Measured times of one evaluation per precision: of the best of the recipe's backends that works here, or of ORT CPU if none does.

    Returns:
        artifacts, with the times; the backend; seconds per precision; notes on better backends that could not be timed.
    """
    n = recipe.plan.batch_size * branches(recipe.sampler.guidance_scale)
    sample = np.random.default_rng(0).standard_normal((n, *info.sample_shape)).astype(np.float32)
    feeds = {SAMPLE: sample, TIMESTEP: np.full(n, schedule.timesteps[0]), STEP: np.zeros(1, np.int64), **info.conditions(None, n)}
    notes = []
    for backend in dict.fromkeys([*(b for b in BACKENDS if b in recipe.backends), CPU]):
        files = {a.precision: folder / a.file for a in artifacts if a.backend == backend and a.precision is not None}
        files = files or {p: folder / g.file for (p, e), g in graphs.items() if e is BACKENDS[backend]}
        try:
            seconds = _seconds(backend, set(files.values()), feeds)
        except (BackendUnavailable, BundleError, GraphError) as error:
            if backend == CPU:
                raise
            notes.append(f"{backend} does not run here: {error}")
            continue
        times = {p: seconds[file] for p, file in files.items() if p is not None}
        timed = [replace(a, time_ms=round(times[a.precision] * 1e3, 3)) if a.backend == backend and a.precision in times else a for a in artifacts]
        return timed, backend, times, notes
    raise AssertionError("the last backend raises")


def _seconds(backend: str, files: Collection[Path], feeds: Mapping[str, Any]) -> dict[Path, float]:
    """Median seconds of one launch per file, on buffers that lie on the backend's device."""
    from .backends import check, open_device, open_engine
    from .timing import launcher, time_calls

    check(backend)
    with contextlib.ExitStack() as opened:
        device = opened.enter_context(contextlib.closing(open_device(backend)))
        engines = {file: opened.enter_context(open_engine(backend, file, device)) for file in sorted(files)}
        return time_calls({file: launcher(engine, device, feeds) for file, engine in engines.items()})


def choose_plan(
    recipe: Recipe,
    schedule: NoiseSchedule,
    quantized: Mapping[Precision, QuantizedNetwork],
    seconds: Mapping[Precision, float],
    measured: Mapping[Key, Measured],
    emission: Emission,
) -> tuple[Plan, dict[str, Any]]:
    """The plan of the recipe's rule for backends that run `emission`; what the manifest keeps of the choice: costs, SNR_Q, errors, Pareto front."""
    spec, n = recipe.plan, len(schedule)
    candidates = list(quantized)
    bops = {p: float(net.bops) for p, net in quantized.items()}
    native = {p: measured[p, emission.numerics(p)] for p in candidates if not p.is_float}
    snr = {p: native[p].pooled.snr if p in native else np.full(n, np.inf) for p in candidates}
    weights = step_weights(schedule, spec.objective)
    errors = {p: weights * native[p].error() if p in native else np.zeros(n) for p in candidates}
    cost: dict[Precision, float] = {p: (seconds[p] if spec.cost == "time" else bops[p]) for p in candidates}
    front = pareto_front(errors, cost)
    budget = spec.budget * max([cost[p] for p in candidates if p.is_float] or cost.values()) * n
    if spec.rule == "snr":
        plan = by_snr(snr, bops, schedule)
    elif spec.rule == "fixed":
        plan = _check_fixed(recipe, schedule)
    else:
        plan = by_budget(front, budget).plan
    notes = []
    whose = "full precision's" if any(p.is_float for p in candidates) else "the dearest precision's"
    if spec.rule == "budget" and plan.total(cost) > budget * (1 + 1e-9):
        notes.append(f"no plan fits the budget of {spec.budget:g} of {whose} {spec.cost}: the cheapest one is taken")
    if unused := [str(p) for p in candidates if p not in plan.precisions]:
        notes.append(f"built but not used by this plan: {', '.join(unused)}")
    return plan, {
        "notes": notes,
        "rule": spec.rule,
        "objective": spec.objective,
        "cost": spec.cost,
        "budget": budget,
        "bops": int(plan.total(bops)),
        "bops_fp32": next(iter(quantized.values())).macs * FLOAT_BITS**2 * n,
        "seconds_per_evaluation": {str(p): round(v, 6) for p, v in seconds.items()},
        "snr_q": {str(p): _finite(v) for p, v in snr.items()},
        "error": {str(p): v.tolist() for p, v in errors.items()},
        "front": [{"cost": f.cost, "error": f.error, "plan": str(f.plan)} for f in front],
    }


def _finite(values: F64) -> list[float | None]:
    return [float(v) if np.isfinite(v) else None for v in values]


def _write_tables(
    folder: Path, measured: Mapping[Key, Measured], quantized: Mapping[Precision, QuantizedNetwork], probes: Mapping[str, npt.NDArray[Any]]
) -> None:
    tables: dict[str, npt.NDArray[Any]] = dict(probes)
    for (p, e), m in measured.items():
        for source in (m.correction, m.pooled):
            for f in fields(source):
                tables[f"{p}.{e}.{f.name}"] = np.ascontiguousarray(getattr(source, f.name))
    folder.joinpath(TABLES).write_bytes(save(tables))
    scales: dict[str, npt.NDArray[Any]] = {}
    for p, net in quantized.items():
        for layer in net.layers.values():
            head = f"{p}/{layer.name}"
            scales[f"{head}/weight_scale"] = np.ascontiguousarray(layer.weight_scale)
            scales[f"{head}/input_scale"] = np.array([layer.input_scale], np.float32)
            scales[f"{head}/output_scale"] = np.array([np.nan if layer.output_scale is None else layer.output_scale], np.float32)
            shared = f"codes/{'fp8' if layer.number == 'fp8' else f'w{layer.weight_bits}'}/{layer.name}"
            codes = np.ascontiguousarray(layer.weight)
            # Precisions with the same weights share their codes, unless a bias made one of them take other scales.
            scales[shared if np.array_equal(scales.get(shared, codes), codes) else f"{head}/codes"] = codes
            scales[f"{head}/bits"] = np.array([layer.weight_bits, layer.activation_bits], np.int64)
    folder.joinpath(QUANTIZATION).write_bytes(save(scales))


def _save_stats(file: Path, parts: Sequence[NoiseStats]) -> None:
    tmp = file.with_suffix(".tmp")
    try:
        tmp.write_bytes(save({f.name: np.stack([getattr(s, f.name) for s in parts]) for f in fields(NoiseStats)}))
        os.replace(tmp, file)
    finally:
        tmp.unlink(missing_ok=True)


def _load_stats(file: Path) -> list[NoiseStats] | None:
    try:
        data = load_file(file)
        return [NoiseStats(*(data[f.name][i] for f in fields(NoiseStats))) for i in range(len(data["count"]))]
    except (OSError, KeyError, SafetensorError):
        return None


def _versions() -> dict[str, str]:
    found = {}
    for name in VERSIONS:
        try:
            found[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            continue
    return {**found, "python": platform.python_version()}


def _digest(*parts: object) -> str:
    return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()
