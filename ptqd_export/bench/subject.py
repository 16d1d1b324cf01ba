"""Subject: one thing that is timed, and what its process does: open it, call it, say what it took."""

from __future__ import annotations

import contextlib
import os
import time
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Literal

import numpy as np

from ..backends import OrtEngine, open_device, openvino, set_threads
from ..backends.ort_profile import operator_seconds
from ..bundle.bundle import Bundle
from ..core.backend import ORT_CPU
from ..core.engine import Array, Feeds
from ..core.plan import Plan, parse_plan
from ..core.precision import Precision
from ..core.timing import feeds_to_time, launcher, time_call, time_switches
from ..runtime import Runtime, open_artifact

Kind = Literal["engine", "run", "onnx", "openvino", "torch"]


@dataclass(frozen=True)
class Subject:
    """What is timed.

    Attributes:
        name: in tables.
        kind: "engine" of the bundle, "run" of it, an "onnx" file on ONNX Runtime, an "openvino" model, or the
            module in "torch".
        detail: the engine's precision, the run's plan, OpenVINO's INFERENCE_PRECISION_HINT, or torch's mode,
            of TORCH_MODES.
        backend: of an engine or a run.
        file: of a model or a recipe; None for what the bundle holds.
    """

    name: str
    kind: Kind
    detail: str = ""
    backend: str = ""
    file: Path | None = None


TORCH_MODES: Mapping[str, Mapping[str, bool]] = {
    "eager": {},
    "channels_last bfloat16": {"half": True},
    "compile": {"compiled": True},
}


@dataclass(frozen=True)
class Place:
    """Where all subjects are timed: a bundle, rows of a call, CPU threads, and the device's index."""

    bundle: Path
    batch: int
    threads: int
    device: int = 0


@dataclass
class _Open:
    """What this process has opened."""

    subject: Subject
    place: Place
    bundle: Bundle
    call: Callable[[], object]
    feeds: dict[str, Array] = field(default_factory=dict)
    kept: contextlib.ExitStack = field(default_factory=contextlib.ExitStack)
    calls: dict[Precision, Callable[[], None]] = field(default_factory=dict)


_opened: list[_Open] = []


def start(threads: int) -> None:
    """Give this process as many CPUs as it has threads, before any library counts them.

    What it prints goes to stderr.
    """
    os.dup2(2, 1)
    if hasattr(os, "sched_setaffinity"):
        cpus = sorted(os.sched_getaffinity(0))
        if threads < len(cpus):
            os.sched_setaffinity(0, cpus[:threads])
    # Threads that wait by turning would take the CPUs from whoever is timed next.
    os.environ |= {"OMP_NUM_THREADS": str(threads), "OMP_WAIT_POLICY": "passive", "KMP_BLOCKTIME": "0"}
    set_threads(threads)


def open_subject(subject: Subject, place: Place) -> float:
    """Open it and call it once; seconds of both.

    Raises:
        BackendUnavailable, BundleError, GraphError, ModelError: it does not run here.
    """
    begin = time.perf_counter()
    bundle = Bundle.open(place.bundle)
    opened = _Open(subject, place, bundle, lambda: None, feeds_of(bundle, place.batch))
    opener = {
        "engine": _open_engine,
        "run": _open_run,
        "onnx": _open_onnx,
        "openvino": _open_openvino,
        "torch": _open_torch,
    }[subject.kind]
    opened.call = opener(opened)
    opened.call()
    _opened.append(opened)
    return time.perf_counter() - begin


def timed() -> float:
    """Seconds of one call."""
    return time_call(_opened[-1].call)


def peak_bytes() -> int | None:
    """The most memory that this process has taken; None where no one counts it.

    Not by getrusage, which counts what the parent had when it started this process.
    """
    with contextlib.suppress(OSError):
        for line in Path("/proc/self/status").read_text("utf-8").splitlines():
            if line.startswith("VmHWM:"):
                return 1024 * int(line.split()[1])
    return None


def operators(calls: int) -> dict[str, float] | None:
    """Seconds per kind of operator in a call, of a graph on ONNX Runtime's CPU kernels; None of others."""
    opened = _opened[-1]
    file = opened.subject.file
    if opened.subject.kind == "engine":
        if opened.subject.backend != ORT_CPU:
            return None
        bundle = opened.bundle
        precision = Precision.parse(opened.subject.detail)
        file = bundle.file(bundle.manifest.artifact(precision, ORT_CPU).file)
    elif opened.subject.kind != "onnx":
        return None
    assert file is not None  # of an ONNX file
    return operator_seconds(file, opened.feeds, calls, exact=opened.subject.kind == "engine")


def run_and_calls() -> tuple[float, float]:
    """Seconds of a whole run, and right after it of its engines' calls alone, in the plan's order."""
    opened = _opened[-1]
    calls = _calls(opened)
    whole = time_call(opened.call)
    return whole, sum(time_call(calls[p]) for p in _plan(opened).steps)


def switch_seconds(rounds: int) -> float:
    """What a call of a run's engines takes longer right after another engine's: the median, in seconds."""
    alone, after = time_switches(_calls(_opened[-1]), rounds, 1)
    return float(np.median([b - a for p in alone for a, b in zip(alone[p], after[p], strict=True)]))


def _plan(opened: _Open) -> Plan:
    return parse_plan(opened.subject.detail, len(opened.bundle.manifest.sampling))


def _calls(opened: _Open) -> dict[Precision, Callable[[], None]]:
    """A call of each engine of a run's plan, without the sampler; opened and called once at the first ask."""
    if not opened.calls:
        feeds = feeds_to_time(opened.bundle.manifest.sampling, opened.place.batch)
        opened.calls |= _launchers(opened, _plan(opened).precisions, feeds)
        for call in opened.calls.values():
            call()
    return opened.calls


def _launchers(
    opened: _Open, precisions: Iterable[Precision], feeds: Feeds
) -> dict[Precision, Callable[[], None]]:
    """A call of the bundle's engine at each precision, all on one device; open as long as `opened` is."""
    bundle, backend, index = opened.bundle, opened.subject.backend, opened.place.device
    device = opened.kept.enter_context(contextlib.closing(open_device(backend, index)))
    calls = {}
    for p in precisions:
        artifact = bundle.manifest.artifact(p, backend)
        engine = opened.kept.enter_context(open_artifact(bundle, artifact, device, index))
        calls[p] = launcher(engine, device, feeds)
    return calls


def feeds_of(bundle: Bundle, rows: int) -> dict[str, Array]:
    """One evaluation of `rows` rows in the middle of sampling."""
    sampling = bundle.manifest.sampling
    return feeds_to_time(sampling.conditional, rows, len(sampling) // 2)


def _open_engine(opened: _Open) -> Callable[[], object]:
    precision = Precision.parse(opened.subject.detail)
    return _launchers(opened, [precision], opened.feeds)[precision]


def _open_run(opened: _Open) -> Callable[[], object]:
    about = opened.subject.backend, _plan(opened)
    runtime = opened.kept.enter_context(Runtime(opened.bundle, *about, device=opened.place.device))
    return partial(runtime.sample, range(opened.place.batch))


def _open_onnx(opened: _Open) -> Callable[[], object]:
    assert opened.subject.file is not None
    engine = opened.kept.enter_context(OrtEngine(opened.subject.file, exact=False))
    return partial(engine, {name: opened.feeds[name] for name in engine.inputs})


def _open_openvino(opened: _Open) -> Callable[[], object]:
    """Compiled for the shapes of the call, which is faster than for any."""
    core = openvino.runtime().Core()
    about = {
        "INFERENCE_NUM_THREADS": opened.place.threads,
        "INFERENCE_PRECISION_HINT": opened.subject.detail,
        "PERFORMANCE_HINT": "LATENCY",
    }
    model = core.read_model(str(opened.subject.file))
    feeds = {name: opened.feeds[name] for name in (value.get_any_name() for value in model.inputs)}
    model.reshape({name: list(value.shape) for name, value in feeds.items()})
    request = core.compile_model(model, "CPU", about).create_infer_request()
    return partial(request.infer, feeds)


def _open_torch(opened: _Open) -> Callable[[], object]:
    from ..calibrate.eager import eager_call
    from ..recipe import Recipe

    assert opened.subject.file is not None
    mode = TORCH_MODES[opened.subject.detail]
    return eager_call(Recipe.load(opened.subject.file), opened.feeds, opened.place.threads, **mode)
