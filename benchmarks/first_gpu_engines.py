"""Checks of first_gpu.py that run the engines of a bundle on one backend; see first_gpu_checks.py."""

from __future__ import annotations

import contextlib
import functools
import gc
import statistics
import time
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
from first_gpu_checks import MIB, Problems, free_mib, host_mib, needs
from first_gpu_process import Failed, Job, Skipped, Tell, require

from ptqd_export import backends
from ptqd_export.backends import trt
from ptqd_export.backends.trt.library import shared
from ptqd_export.bundle.bundle import Bundle
from ptqd_export.core.backend import BACKENDS
from ptqd_export.core.engine import EPSILON, Device, DeviceEngine, Engine
from ptqd_export.core.precision import Precision
from ptqd_export.core.timing import feeds_to_time, launcher, time_calls, time_engines, time_switches
from ptqd_export.parity import compare, polygraphy
from ptqd_export.runtime import Runtime, check_probe, check_update, open_artifact, open_update, probe

BATCHES = (1, 4, 16)
SAMPLES, RUNS, REPEATS, WARMUP = 4, 5, 20, 3
ROUNDS, WARM = 20, 3
"""Openings of a runtime, and those after which its memory must not grow."""
GPU_SLACK, HOST_SLACK = 16.0, 64.0
"""MiB that may be lost between the warm opening and the last: allocators and logs are not exact."""
ALIKE = 0.1
"""Largest mean squared difference of two right loops, as a share of that to another seed's samples."""
PEAK = 2.0
"""Range of a picture's values, for the PSNR."""


def precisions_of(bundle: Bundle, backend: str) -> list[Precision]:
    """Precisions that the backend runs: all of the bundle, or those that it has finished engines of."""
    m = bundle.manifest
    built = {artifact.precision for artifact in m.artifacts if artifact.backend == backend}
    return [p for p in m.bops if not BACKENDS[backend].builds_engines or p in built]


def most_samples(bundle: Bundle, backend: str) -> int:
    """Most samples that one call of the backend's engines takes."""
    m = bundle.manifest
    rows = [e.build.settings.rows[2] for e in m.engines if e.backend == backend and e.build is not None]
    return min(rows, default=max(BATCHES) * m.sampling.branches) // m.sampling.branches


def timed(call: Callable[[], Any]) -> tuple[Any, float]:
    """What a call returns, and its wall time in seconds."""
    start = time.perf_counter()
    value = call()
    return value, time.perf_counter() - start


def _lost(before: float | None) -> float | None:
    """MiB of the GPU's memory taken since `before`."""
    now = free_mib()
    return None if before is None or now is None else before - now


@contextlib.contextmanager
def _opened(bundle: Bundle, backend: str) -> Iterator[tuple[Device, dict[Precision, DeviceEngine]]]:
    """The device and all engines of a backend."""
    needs(lambda: backends.check(backend))
    with contextlib.ExitStack() as stack:
        device = stack.enter_context(backends.open_device(backend))
        engines = {
            p: stack.enter_context(open_artifact(bundle, bundle.manifest.artifact(p, backend), device))
            for p in precisions_of(bundle, backend)
        }
        yield device, engines


def check_open(job: Job, tell: Tell) -> str:
    """Every engine and the update open twice, and compute what their graphs did where the bundle was
    built."""
    needs(lambda: backends.check(job.backend))
    bundle, problems = Bundle.open(job.bundle), Problems()
    m, emission = bundle.manifest, BACKENDS[job.backend].emission
    free_mib()  # makes CUDA's own memory part of what is there before
    # Again: what was compiled for this GPU at the first opening is at hand.
    for turn in ("", " again"):
        with contextlib.ExitStack() as stack:
            device = stack.enter_context(backends.open_device(job.backend))
            for precision in precisions_of(bundle, job.backend):
                with problems.of(f"{precision}{turn}"):
                    before, start = free_mib(), time.perf_counter()
                    artifact = m.artifact(precision, job.backend)
                    engine: Any = stack.enter_context(open_artifact(bundle, artifact, device))
                    found: dict[str, Any] = {"open_s": time.perf_counter() - start, "open_mib": _lost(before)}
                    if hasattr(engine, "memory"):
                        weights, scratch = engine.memory
                        found["weights_mib"] = None if weights is None else weights / MIB
                        found["scratch_mib"] = scratch / MIB
                    expected = bundle.probe(precision, emission)
                    got, found["first_calls_s"] = timed(functools.partial(probe, engine, m.sampling))
                    off = np.square(got.astype(np.float64) - expected.epsilon).mean()
                    found["probe_rms"], found["probe_allowed"] = np.sqrt(off), expected.allowed
                    found["called_mib"] = _lost(before)
                    tell(f"{precision}{turn}", found)
                    check_probe(bundle, precision, emission, engine)
            if BACKENDS[job.backend].on_device:
                with problems.of(f"update{turn}"):
                    before, start = free_mib(), time.perf_counter()
                    update = stack.enter_context(open_update(bundle, job.backend, device))
                    about = {"open_s": time.perf_counter() - start, "open_mib": _lost(before)}
                    tell(f"update{turn}", about)
                    check_update(update, m.sampling)
    problems.settle()
    return f"{len(precisions_of(bundle, job.backend))} precisions and the update compute what they should"


def check_parity(job: Job, tell: Tell) -> str:
    """Every quantized layer, and every network, against ONNX Runtime's CPU provider on the same graph."""
    needs(lambda: backends.check(job.backend))
    needs(polygraphy.load)
    bundle, problems = Bundle.open(job.bundle), Problems()
    m, entry = bundle.manifest, BACKENDS[job.backend]
    points = compare.sampled_feeds(bundle)
    feeds = compare.layer_feeds(m.sampling, points)
    compared = 0
    with backends.open_device(job.backend) as device:
        for precision in precisions_of(bundle, job.backend):
            graph, artifact = m.graph(precision, entry.emission), m.artifact(precision, job.backend)
            name = f"{job.backend} at {precision}"

            def opened(path: Any) -> Engine:
                return backends.open_engine(job.backend, path, device)

            if artifact.build is None and not precision.is_float:
                with problems.of("layers"):
                    layers = compare.compare_layers(
                        name, bundle.file(graph.file), opened, compare.layer_rounding(entry), feeds
                    )
                    compared += len(layers)
                    worst = min(layers, key=lambda path: layers[path].snr)
                    about = {"compared": len(layers), "worst": worst, "worst_snr_db": layers[worst].snr}
                    tell(f"{precision} layers", about)
            with problems.of("network"):
                snr, least = compare.compare_network(
                    name,
                    bundle,
                    graph,
                    functools.partial(open_artifact, bundle, artifact, device),
                    points,
                )
                tell(f"{precision} network", {"snr_db_by_step": snr, "least_db_by_step": least})
    problems.settle()
    return f"{len(precisions_of(bundle, job.backend))} networks and {compared} layers are alike"


def check_times(job: Job, tell: Tell) -> str:
    """Interleaved medians of a step at every precision, on the device and through the host; CUDA graphs."""
    bundle = Bundle.open(job.bundle)
    with _opened(bundle, job.backend) as (device, engines):
        batches = [n for n in BATCHES if n <= most_samples(bundle, job.backend)]
        for n in batches:
            feeds = feeds_to_time(bundle.manifest.sampling, n)
            calls = {str(p): launcher(engine, device, feeds) for p, engine in engines.items()}
            launched = time_calls(calls, repeats=REPEATS, warmup=WARMUP)
            hosted = time_engines({str(p): e for p, e in engines.items()}, feeds, repeats=RUNS)
            both = {p: {"ms": 1e3 * launched[p], "through_host_ms": 1e3 * hosted[p]} for p in calls}
            tell(f"batch {n}", both)
        notes = {str(p): engine.capture_note for p, engine in engines.items()}
        tell("captures", notes)
    return f"batches {', '.join(map(str, batches))}; {'; '.join(f'{p}: {note}' for p, note in notes.items())}"


def check_loop(job: Job, tell: Tell) -> str:
    """Samples of the loop on the device beside the host's; a run beside the sum of its calls; switches."""
    bundle = Bundle.open(job.bundle)
    m, n = bundle.manifest, min(SAMPLES, most_samples(bundle, job.backend))
    sampling, plan = m.sampling, m.plan
    with _opened(bundle, job.backend) as (device, engines):
        feeds = feeds_to_time(bundle.manifest.sampling, n)
        calls = {p: launcher(engine, device, feeds) for p, engine in engines.items()}
        alone, after = time_switches(calls, REPEATS, WARMUP)
    step = {p: statistics.median(alone[p]) for p in alone}
    more = {p: statistics.median(b - a for a, b in zip(alone[p], after[p], strict=True)) for p in alone}
    tell("switch_ms", {str(p): 1e3 * value for p, value in more.items()})
    conditions = sampling.model.conditions(sampling.model.labels_in_turn(range(n)), n)
    with Runtime(bundle, job.backend) as runtime:

        def on_host() -> Any:
            engine_at = [runtime.engines[p] for p in plan.steps]
            sigmas = bundle.sigmas(job.backend)
            return sampling.sample(engine_at.__getitem__, conditions, range(n), seed=0, sigmas=sigmas)

        x, other, host = runtime.sample(range(n)), runtime.sample(range(n), seed=1), on_host()
        off, apart = np.square(x - host).mean(), np.square(x - other).mean()
        about = {
            "samples": n,
            "largest_difference": np.abs(x - host).max(),
            "psnr_db": _psnr(off),
            "psnr_db_to_another_seed": _psnr(apart),
            "repeats_to": np.abs(x - runtime.sample(range(n))).max(),
        }
        tell("device_beside_host", about)
        whole = statistics.median(timed(lambda: runtime.sample(range(n)))[1] for _ in range(RUNS))
        hosted = statistics.median(timed(on_host)[1] for _ in range(RUNS))
        summed = sum(step[p] for p in plan.steps)
        run = {"ms": 1e3 * whole, "host_loop_ms": 1e3 * hosted, "calls_ms": 1e3 * summed}
        tell("run", {**run, "steps": len(plan), "more_than_its_calls": whole / summed - 1})
        tell("captures", runtime.capture_notes)
    require(off <= ALIKE * apart, f"the loops' samples are {off / apart:.2g} as far apart as two seeds'")
    return f"PSNR {_psnr(off):.1f} dB beside the host; a run takes {whole / summed - 1:+.0%} beside its calls"


def _psnr(squared: float) -> float:
    """Of a mean squared difference; inf where there is none."""
    return 10 * float(np.log10(PEAK**2 / squared)) if squared else float("inf")


def check_swap(job: Job, tell: Tell) -> str:
    """Weights that come to the GPU at a switch and go again: memory, time, and the same numbers."""
    needs(lambda: backends.check(job.backend))
    if not hasattr(shared(trt.load(job.backend)).runtime, "defer_weights_loading"):
        raise Skipped(f"{job.backend} keeps the weights of an open engine on the GPU")
    bundle = Bundle.open(job.bundle)
    m, feeds = bundle.manifest, feeds_to_time(bundle.manifest.sampling, 1)
    expected: dict[Precision, Any] = {}
    for resident in (True, False):
        with contextlib.ExitStack() as stack:
            device = stack.enter_context(backends.open_device(job.backend))
            before = free_mib()
            engines: dict[Precision, Any] = {}
            for p in precisions_of(bundle, job.backend):
                file = bundle.file(m.artifact(p, job.backend).file)
                engine = backends.open_engine(job.backend, file, device, resident=resident)
                engines[p] = stack.enter_context(engine)
            what = "resident" if resident else "swapped"
            tell(f"{what} open_mib", _lost(before))
            for p, engine in engines.items():
                call = functools.partial(engine, feeds)
                got, first = timed(call)
                warm = min(timed(call)[1] for _ in range(RUNS))
                found = {"first_call_ms": 1e3 * first, "warm_ms": 1e3 * warm, "gpu_mib": _lost(before)}
                if not resident:
                    engine.unload()
                    found["unloaded_mib"] = _lost(before)
                    got, again = timed(call)
                    found["loaded_again_ms"] = 1e3 * again
                    engine.unload()
                value = got[EPSILON].astype(np.float64)
                reference = expected.setdefault(p, value)
                found["largest_difference"] = np.abs(value - reference).max()
                tell(f"{what} {p}", found)
                alike = np.square(value - reference).mean() <= ALIKE * np.square(reference).mean()
                require(bool(alike), f"{p}: {what} weights give other numbers")
    return f"{len(expected)} engines compute the same with weights that come and go"


def check_lifetimes(job: Job, tell: Tell) -> str:
    """A runtime that opens, samples and closes again and again takes no more memory than it did."""
    needs(lambda: backends.check(job.backend))
    bundle = Bundle.open(job.bundle)
    free_mib()
    started, free, held = time.monotonic(), list[float | None](), list[float]()
    while len(held) < ROUNDS and (len(held) <= WARM or time.monotonic() - started < 0.7 * job.seconds):
        with Runtime(bundle, job.backend) as runtime:
            runtime.sample(range(1))
        gc.collect()
        free.append(free_mib())
        held.append(host_mib())
    tell("rounds", len(held))
    tell("gpu_free_mib", free)
    tell("host_mib", held)
    first, last = free[WARM - 1], free[-1]
    if first is not None and last is not None and first - last > GPU_SLACK:
        raise Failed(f"{first - last:.0f} MiB of the GPU were lost in {len(held) - WARM} openings")
    grown = held[-1] - held[WARM - 1]
    require(grown <= HOST_SLACK, f"the process grew by {grown:.0f} MiB in {len(held) - WARM} openings")
    told = "not told" if first is None or last is None else f"{last - first:+.1f} MiB free"
    return f"{len(held)} openings: GPU {told}, host {grown:+.1f} MiB since the warm-up"
