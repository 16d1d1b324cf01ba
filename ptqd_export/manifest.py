"""Manifest: what a bundle says of itself; every value is checked when it is read, for a bundle may come from anywhere."""

from __future__ import annotations

import math
import unicodedata
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

from .conditioning import ModelInfo
from .errors import BundleError
from .plan import Plan
from .precision import Precision
from .quant import Emission
from .recipe import read_typed
from .schedule import PREDICTION_TYPES, NoiseSchedule

FORMAT_VERSION = 1


@dataclass(frozen=True)
class Artifact:
    """A graph of the bundle. `lowering` says what the backend really computes with; `time_ms` is one measured evaluation, or None."""

    precision: Precision
    emission: Emission
    backends: tuple[str, ...]
    file: str
    lowering: str
    runtime: str
    ops: Mapping[str, int]
    time_ms: float | None


@dataclass(frozen=True)
class Manifest:
    """Everything a runtime must know; see `Bundle.manifest`.

    Attributes:
        model: name, shapes, conditioning inputs, hash of the weights.
        schedule: the steps that the tables were measured for.
        solver, guidance_scale, recalibrate_variance: the rest of the key of validity.
        plan, plan_info: precision per step; rule, costs and Pareto front for people and plots.
        artifacts: one per precision and emission.
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
    artifacts: tuple[Artifact, ...]
    correction: Mapping[str, Any]
    parity: Mapping[str, Any]
    bops: Mapping[Precision, int]
    provenance: Mapping[str, Any]
    files: Mapping[str, Mapping[str, Any]]

    def artifact(self, precision: Precision, backend: str) -> Artifact:
        """The graph that `backend` runs at `precision`.

        Raises:
            BundleError: the bundle holds none.
        """
        for artifact in self.artifacts:
            if artifact.precision == precision and backend in artifact.backends:
                return artifact
        raise BundleError(
            f"the bundle has no {precision} engine for backend {backend!r}: it holds {', '.join(self.backends)}; rebuild with --backend {backend}"
        )

    @property
    def backends(self) -> tuple[str, ...]:
        """Backends that some graph of the bundle is for, in order."""
        return tuple(dict.fromkeys(name for artifact in self.artifacts for name in artifact.backends))

    def to_dict(self) -> dict[str, Any]:
        return {
            "format_version": FORMAT_VERSION,
            "model": self.model.to_dict(),
            "sampler": {"solver": self.solver, "guidance_scale": self.guidance_scale, "recalibrate_variance": self.recalibrate_variance},
            "schedule": self.schedule.to_dict(),
            "plan": {"steps": [str(p) for p in self.plan.steps], **self.plan_info},
            "artifacts": [
                {
                    "precision": str(a.precision),
                    "emission": str(a.emission),
                    "backends": list(a.backends),
                    "file": a.file,
                    "lowering": a.lowering,
                    "runtime": a.runtime,
                    "ops": dict(a.ops),
                    "time_ms": a.time_ms,
                }
                for a in self.artifacts
            ],
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
        artifacts = tuple(_artifact(a) for a in read_typed(list, data["artifacts"], "artifacts"))
        _need(any(a.backends for a in artifacts), "no graph that a backend runs")
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


def _artifact(data: Mapping[str, Any]) -> Artifact:
    backends, ops = read_typed(tuple[str, ...], data["backends"], "backends"), read_typed(dict, data["ops"], "ops")
    file, lowering, runtime = (read_typed(str, data[name], name) for name in ("file", "lowering", "runtime"))
    time_ms = read_typed(float | None, data["time_ms"], "time_ms")
    return Artifact(Precision.parse(data["precision"]), Emission(data["emission"]), backends, file, lowering, runtime, ops, time_ms)


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
