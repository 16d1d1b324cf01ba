"""Manifest: what a bundle says of itself; every value is checked when it is read, for a bundle may come from anywhere."""

from __future__ import annotations

import math
import re
import unicodedata
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any, Literal

from .conditioning import ModelInfo
from .errors import BundleError
from .plan import Plan
from .precision import Precision
from .quant import BACKENDS, BUILDERS, Emission
from .recipe import read_typed
from .schedule import PREDICTION_TYPES, NoiseSchedule

FORMAT_VERSION = 2
UPDATE = "update"
"""Stands where a precision would for the sampler's update."""


@dataclass(frozen=True)
class Graph:
    """An ONNX graph of the bundle.

    Attributes:
        precision: None for the sampler's update, which keeps the state on a device (`export.sampler_update`).
        digest: SHA-256 of what it computes, wherever its weights lie: engines are keyed by it.
        ops: how often each operator occurs, as the backend runs it where that was looked at.
        quantized: nodes meant to run in 8 bits, and as what: "int8" or "fp8".
    """

    precision: Precision | None
    emission: Emission
    file: str
    digest: str
    ops: Mapping[str, int]
    quantized: Mapping[str, str]


@dataclass(frozen=True)
class EngineBuild:
    """How a finished engine was made, and what its plan says.

    Attributes:
        key: SHA-256 over graph, settings and versions: the same key is not built again.
        targets: compute capabilities it is for, such as "8.9".
        settings: of the builder.
        seconds, peak_bytes: time and memory of the build.
        plan: {"meant", "taken": layers meant to run in 8 bits, and those that do;
            "fell_back": {node: type that it runs in, "not found" or "not known"},
            "kernels": layers of the plan that launch work, "types": {layer type: how many}}.
    """

    key: str
    targets: tuple[str, ...]
    settings: Mapping[str, Any]
    seconds: float
    peak_bytes: int
    plan: Mapping[str, Any]

    @property
    def fell_back(self) -> list[str]:
        """A line per layer that was meant to run in 8 bits and does not, or of which the plan does not say."""
        unclear = {"not found": "is not in the plan by its name", "not known": "may or may not run in 8 bits: the plan does not say"}
        return [f"{layer} {unclear.get(kind, f'fell back: it runs in {kind}')}" for layer, kind in self.plan["fell_back"].items()]


@dataclass(frozen=True)
class Artifact:
    """What a backend runs at a precision: the graph itself, or an engine built from it.

    `lowering` says what it really computes with; `time_ms` is one measured evaluation, or None.
    """

    precision: Precision | None
    backend: str
    file: str
    lowering: str
    runtime: str
    time_ms: float | None = None
    build: EngineBuild | None = None


@dataclass(frozen=True)
class Manifest:
    """Everything a runtime must know; see `Bundle.manifest`.

    Attributes:
        model: name, shapes, conditioning inputs, hash of the weights.
        schedule: the steps that the tables were measured for.
        solver, guidance_scale, recalibrate_variance: the rest of the key of validity.
        plan, plan_info: precision per step; rule, costs and Pareto front for people and plots.
        graphs: one per precision and emission, and the sampler's update.
        artifacts: one per backend that the bundle was built for and precision; backends with finished engines have one of the update too.
        correction: mode and, per graph, which steps kept it and why.
        parity: figures of the parity gate.
        bops: bit operations of one evaluation per precision.
        provenance: versions, recipe, seed.
        files: {path: {"sha256", "size"}} of every other file.
    """

    model: ModelInfo
    schedule: NoiseSchedule
    solver: str
    guidance_scale: float
    recalibrate_variance: bool
    plan: Plan
    plan_info: Mapping[str, Any]
    graphs: tuple[Graph, ...]
    artifacts: tuple[Artifact, ...]
    correction: Mapping[str, Any]
    parity: Mapping[str, Any]
    bops: Mapping[Precision, int]
    provenance: Mapping[str, Any]
    files: Mapping[str, Mapping[str, Any]]

    def graph(self, precision: Precision | None, emission: Emission) -> Graph:
        """The graph of a precision in an emission; of the sampler's update for None.

        Raises:
            BundleError: the bundle holds none.
        """
        for graph in self.graphs:
            if graph.precision == precision and graph.emission is emission:
                return graph
        held = ", ".join(f"{name_of(g.precision)}.{g.emission}" for g in self.graphs)
        raise BundleError(
            f"the bundle has no graph {name_of(precision)}.{emission}: it holds {held}; rebuild it with --precision {name_of(precision)}"
        )

    def artifact(self, precision: Precision | None, backend: str) -> Artifact:
        """What `backend` runs at `precision`. Backends that load graphs run any bundle, whatever it was built for.

        Raises:
            BundleError: there is none.
        """
        for artifact in self.artifacts:
            if (artifact.precision, artifact.backend) == (precision, backend):
                return artifact
        if backend in BACKENDS and backend not in BUILDERS:
            return Artifact(precision, backend, self.graph(precision, BACKENDS[backend]).file, "not measured here", "")
        which = f"{name_of(precision)} engine" if backend in self.backends else "engines"
        raise BundleError(
            f"the bundle has no {which} for backend {backend!r}: it was built for {', '.join(self.backends)}; "
            f"build it here from the bundle's own graphs with `ptqd-export run ... --backend {backend} --rebuild`"
        )

    @property
    def backends(self) -> tuple[str, ...]:
        """Backends that the bundle was built for, best first."""
        found = {artifact.backend for artifact in self.artifacts}
        return tuple(name for name in BACKENDS if name in found)

    def to_dict(self) -> dict[str, Any]:
        return {
            "format_version": FORMAT_VERSION,
            "model": self.model.to_dict(),
            "sampler": {"solver": self.solver, "guidance_scale": self.guidance_scale, "recalibrate_variance": self.recalibrate_variance},
            "schedule": self.schedule.to_dict(),
            "plan": {"steps": [str(p) for p in self.plan.steps], **self.plan_info},
            "graphs": [{**asdict(g), "precision": name_of(g.precision), "emission": str(g.emission)} for g in self.graphs],
            "artifacts": [{**asdict(a), "precision": name_of(a.precision)} for a in self.artifacts],
            "correction": dict(self.correction),
            "parity": dict(self.parity),
            "bops": {str(p): v for p, v in self.bops.items()},
            "provenance": dict(self.provenance),
            "files": {name: dict(entry) for name, entry in self.files.items()},
        }

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> Manifest:
        """From parsed JSON, which may come from anywhere: every value that the package uses is checked.

        Raises:
            PTQDError, LookupError, TypeError, ValueError, ArithmeticError, AttributeError, RecursionError: not a manifest; the text says why.
        """
        _check_plain(data)
        plan, sampler = dict(data["plan"]), data["sampler"]
        model = ModelInfo.from_dict(data["model"])
        guidance_scale = read_typed(float, sampler["guidance_scale"], "guidance_scale")
        model.check_guidance(guidance_scale)
        solver = read_typed(Literal["ddim", "ddpm"], sampler["solver"], "solver")
        graphs = tuple(_graph(g) for g in read_typed(list, data["graphs"], "graphs"))
        artifacts = tuple(_artifact(a) for a in read_typed(list, data["artifacts"], "artifacts"))
        _need(bool(artifacts), "no artifact that a backend runs")
        steps = read_typed(tuple[str, ...], plan.pop("steps"), "plan.steps")
        _check_plan_info(plan)
        parity = read_typed(dict, data["parity"], "parity")
        for name, figures in parity.items():
            _check_figures(name, figures)
        return cls(
            model=model,
            schedule=_schedule(data["schedule"]),
            solver=solver,
            guidance_scale=guidance_scale,
            recalibrate_variance=read_typed(bool, sampler["recalibrate_variance"], "recalibrate_variance"),
            plan=Plan(tuple(Precision.parse(p) for p in steps)),
            plan_info=plan,
            graphs=graphs,
            artifacts=artifacts,
            correction=read_typed(dict, data["correction"], "correction"),
            parity=parity,
            bops={Precision.parse(p): read_typed(int, v, "bops") for p, v in data["bops"].items()},
            provenance=read_typed(dict, data["provenance"], "provenance"),
            files={name: read_typed(dict, entry, "files") for name, entry in data["files"].items()},
        )


def _need(ok: bool, message: str) -> None:
    if not ok:
        raise ValueError(message)


def _check_plain(value: Any) -> None:
    """No text that a terminal or a file system could not take, and no number that JSON does not have, anywhere in `value`."""
    if isinstance(value, str):
        _need(all(unicodedata.category(c) not in ("Cc", "Cs") for c in value), f"control characters in {value[:100]!a}")
    elif isinstance(value, float):
        _need(math.isfinite(value), f"a number is {value}")
    elif isinstance(value, dict):
        for key, item in value.items():
            _check_plain(key)
            _check_plain(item)
    elif isinstance(value, list):
        for item in value:
            _check_plain(item)


def name_of(precision: Precision | None) -> str:
    """As files and messages call it."""
    return UPDATE if precision is None else str(precision)


def _precision(text: Any) -> Precision | None:
    return None if text == UPDATE else Precision.parse(read_typed(str, text, "precision"))


def _graph(data: Mapping[str, Any]) -> Graph:
    file, digest = (read_typed(str, data[name], name) for name in ("file", "digest"))
    ops, quantized = (read_typed(dict, data[name], name) for name in ("ops", "quantized"))
    for value in ops.values():
        read_typed(int, value, "ops")
    for value in quantized.values():
        read_typed(Literal["int8", "fp8"], value, "quantized")
    return Graph(_precision(data["precision"]), Emission(data["emission"]), file, digest, ops, quantized)


def _artifact(data: Mapping[str, Any]) -> Artifact:
    backend = data["backend"]
    _need(backend in BACKENDS, f"backend {backend!r}")
    file, lowering, runtime = (read_typed(str, data[name], name) for name in ("file", "lowering", "runtime"))
    time_ms = read_typed(float | None, data["time_ms"], "time_ms")
    build = None if data["build"] is None else engine_build(read_typed(dict, data["build"], "build"))
    _need((build is not None) == (backend in BUILDERS), f"the artifact {file[:100]!a} of {backend} {'has no' if build is None else 'has a'} build")
    return Artifact(_precision(data["precision"]), backend, file, lowering, runtime, time_ms, build)


def engine_build(data: Mapping[str, Any]) -> EngineBuild:
    """From parsed JSON, every value checked; raises as `Manifest.from_dict`."""
    plan, settings = read_typed(dict, data["plan"], "plan"), read_typed(dict, data["settings"], "settings")
    for name in ("meant", "taken", "kernels"):
        read_typed(int, plan[name], f"plan.{name}")
    for value in read_typed(dict, plan["fell_back"], "plan.fell_back").values():
        read_typed(str, value, "plan.fell_back")
    _need(len(read_typed(tuple[int, ...], settings["rows"], "settings.rows")) == 3, f"settings.rows is {settings['rows']}")
    key, targets = read_typed(str, data["key"], "key"), read_typed(tuple[str, ...], data["targets"], "targets")
    _need(re.fullmatch(r"[0-9a-f]{64}", key) is not None, f"key {key[:100]!a}")
    return EngineBuild(key, targets, settings, read_typed(float, data["seconds"], "seconds"), read_typed(int, data["peak_bytes"], "peak_bytes"), plan)


def _schedule(data: Mapping[str, Any]) -> NoiseSchedule:
    for name, kind in (("timesteps", tuple[int, ...]), ("alphas_cumprod", tuple[float, ...]), ("alphas_cumprod_prev", tuple[float, ...])):
        read_typed(kind, data[name], name)
    read_typed(bool, data["rederive_epsilon"], "rederive_epsilon")
    eta, clip = read_typed(float, data["eta"], "eta"), read_typed(float | None, data["clip_sample"], "clip_sample")
    schedule = NoiseSchedule.from_dict(data)
    t, a, p = schedule.timesteps, schedule.alphas_cumprod, schedule.alphas_cumprod_prev
    _need(1 <= len(t) == len(a) == len(p), f"the schedule has {len(t)} timesteps, {len(a)} alphas_cumprod and {len(p)} alphas_cumprod_prev")
    _need(bool((t >= 0).all()), "a timestep is negative")
    _need(bool(((a > 0) & (a < 1)).all()), "alphas_cumprod leaves (0, 1)")
    _need(bool(((p > 0) & (p <= 1)).all()), "alphas_cumprod_prev leaves (0, 1]")
    _need(0 <= eta <= 1, f"eta {eta} leaves [0, 1]")
    _need(clip is None or clip > 0, f"clip_sample is {clip}")
    _need(schedule.prediction_type in PREDICTION_TYPES, f"prediction_type {schedule.prediction_type!r}")
    return schedule


def _check_plan_info(info: Mapping[str, Any]) -> None:
    """What `inspect` prints and plots."""
    for name in ("rule", "objective", "cost"):
        read_typed(str, info[name], f"plan.{name}")
    _need(info["timed_on"] in BACKENDS, f"timed_on {info['timed_on']!r}")
    bops, full = (read_typed(float, info[name], f"plan.{name}") for name in ("bops", "bops_fp32"))
    _need(bops >= 0 and full > 0, f"bit operations {bops} of {full}")
    for note in read_typed(list, info.get("notes", []), "plan.notes"):
        read_typed(str, note, "plan.notes")
    for point in read_typed(list, info["front"], "plan.front"):
        for name, kind in (("cost", float), ("error", float), ("plan", str)):
            read_typed(kind, point[name], f"plan.front.{name}")


def _check_figures(name: str, figures: Mapping[str, Any]) -> None:
    """What `inspect` prints of the parity gate."""
    where = f"parity.{name}"
    if "largest_relative_error" in read_typed(dict, figures, where):
        read_typed(float, figures["largest_relative_error"], where)
        return
    read_typed(int, figures["layers"]["layers"], where)
    read_typed(float, figures["layers"]["share_apart"], where)
    read_typed(float, figures["noise"]["limit_z"], where)
    largest = read_typed(dict, figures["noise"]["largest_z"], where)
    _need(bool(largest), f"{where} has no statistics")
    for value in largest.values():
        read_typed(float, value, where)
