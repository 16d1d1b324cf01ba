"""Manifest: what a bundle says of itself, in dataclasses; reading one checks every type and every range."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

from ..core.backend import BACKENDS, RUNNABLE, Emission
from ..core.bits import LayerSensitivity
from ..core.engine_build import EngineBuild, EngineSettings, PlanReport
from ..core.figures import Figures
from ..core.gate import Kept
from ..core.noise import Mode
from ..core.plan import Plan, Rule
from ..core.precision import Precision
from ..core.sampling import Sampling
from ..core.sensitivity import Objective, Sensitivity
from ..errors import BundleError, RecipeError
from ..typed import brief, read_typed, to_plain
from .checks import check_backend, check_layers, check_plain
from .pipeline import Pipeline
from .reading import FileEntry

FORMAT_VERSION = 5
UPDATE = "update"
"""What files and messages call the sampler's update, where they call a network by its precision."""
MAX_BOPS = 1 << 80


@dataclass(frozen=True)
class Graph:
    """An ONNX graph of the network.

    Attributes:
        digest: SHA-256 of what it computes, wherever its weights lie: engines are keyed by it.
        quantized: nodes meant to run in 8 bits, and as what.
    """

    precision: Precision
    emission: Emission
    file: str
    digest: str
    quantized: Mapping[str, Literal["int8", "fp8"]]

    @property
    def name(self) -> str:
        return f"{self.precision}.{self.emission}"


@dataclass(frozen=True)
class UpdateGraph:
    """The sampler's step as a graph (`export.sampler_update`), for backends with the state on a device."""

    file: str
    digest: str


@dataclass(frozen=True)
class Artifact:
    """What a backend runs at a precision: a graph as it is, or an engine built from it.

    Attributes:
        lowering: what it computes with, in words.
        runtime: name and version of the library that it was built or measured with.
        time_ms: one measured evaluation, or None.
        build: of a finished engine.
        plan: which layers run in 8 bits, of a backend that compiles the graph itself; None if it did not.
    """

    precision: Precision
    backend: str
    file: str
    lowering: str
    runtime: str
    time_ms: float | None = None
    build: EngineBuild | None = None
    plan: PlanReport | None = None

    def __post_init__(self) -> None:
        check_backend(self.backend)
        if (self.build is not None) != BACKENDS[self.backend].builds_engines:
            has = "no" if self.build is None else "a"
            raise RecipeError(f"the artifact {brief(self.file)} of {self.backend} has {has} build")

    @property
    def name(self) -> str:
        return f"{self.precision}.{self.backend}"


@dataclass(frozen=True)
class UpdateEngine:
    """A finished engine of the sampler's update."""

    backend: str
    file: str
    runtime: str
    build: EngineBuild

    def __post_init__(self) -> None:
        check_backend(self.backend)

    @property
    def name(self) -> str:
        return f"{UPDATE}.{self.backend}"


@dataclass(frozen=True)
class FrontRecord:
    """A point of the Pareto front: total cost and weighted error of a plan, which is kept as its text."""

    cost: float
    error: float
    plan: str


@dataclass(frozen=True)
class PlanRecord:
    """A plan beside its prediction.

    Attributes:
        kind: the bundle's own, or one of what others ship at most at its cost: one precision at all steps,
            or a precise one for the first and the last steps.
        plan: kept as its text.
        cost: total, in the unit of the front.
        predicted: the error that the choice went by.
        sampled: that error, of held-out trajectories sampled under the plan; None where it was not sampled.
        standard_error: of `sampled`, as a share of it, where it is a mean over samples.
    """

    kind: Literal["chosen", "uniform", "first-last"]
    plan: str
    cost: float
    predicted: float
    sampled: float | None
    standard_error: float | None


@dataclass(frozen=True)
class Choice:
    """How the plan was chosen.

    Attributes:
        rule, objective, cost: of the recipe.
        budget: total cost allowed, in the unit of `front`.
        timed_on: backend whose times, and whose noise, the choice went by.
        bops: bit operations of the plan's evaluations; bops_fp32 of as many at full precision.
        seconds_per_evaluation: per precision, measured on `timed_on`; seconds_error their standard errors.
        snr_q: SNR_Q per precision and step, before correction; None where there is no noise.
        error: c_i^2 var_i per precision and step, after correction: squared error that the step adds to x.
        sensitivity: what that comes to at the end of sampling; None where it was not measured.
        front: the Pareto front that the plan was chosen from.
        compared: the plan and its rivals, predicted and sampled; the plan first.
        notes: what a user should know.
    """

    rule: Rule
    objective: Objective
    cost: Literal["time", "bops"]
    budget: float
    timed_on: str
    bops: int
    bops_fp32: int
    seconds_per_evaluation: Mapping[Precision, float]
    seconds_error: Mapping[Precision, float]
    snr_q: Mapping[Precision, tuple[float | None, ...]]
    error: Mapping[Precision, tuple[float, ...]]
    sensitivity: Sensitivity | None
    front: tuple[FrontRecord, ...]
    compared: tuple[PlanRecord, ...]
    notes: tuple[str, ...]

    def __post_init__(self) -> None:
        check_backend(self.timed_on)
        if not (0 <= self.bops <= MAX_BOPS and 0 < self.bops_fp32 <= MAX_BOPS):
            raise RecipeError(f"bit operations {brief(self.bops)} of {brief(self.bops_fp32)}")

    @property
    def bops_share(self) -> float:
        """Bit operations as a fraction of full precision's."""
        return self.bops / self.bops_fp32


@dataclass(frozen=True)
class GateRecord:
    """What each step kept of the correction, and why.

    Attributes:
        kept: per step.
        z_k, z_bias: k and mu over their standard errors, per step; `core.gate.Gated` says of which channel.
        limit: |z| above which they are kept; 0 without a gate.
    """

    kept: tuple[Kept, ...]
    z_k: tuple[float, ...]
    z_bias: tuple[float, ...]
    limit: float


@dataclass(frozen=True)
class CorrectionRecord:
    """The correction's mode, and the fidelity gate's decisions by "<precision>.<emission whose numerics>"."""

    mode: Mode
    clamp_k: bool
    steps: Mapping[str, GateRecord]


@dataclass(frozen=True)
class Machine:
    processor: str
    cpus: int | None


@dataclass(frozen=True)
class Provenance:
    """Where a bundle comes from; `scheduler` is the model's own config, `recipe` as it was read."""

    recipe: Mapping[str, Any]
    seed: int
    versions: Mapping[str, str]
    machine: Machine
    seconds: float
    scheduler: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Manifest:
    """Everything that a runtime must know; see `Bundle.manifest`.

    Attributes:
        sampling: what the tables were measured for: model, schedule with its solver, guidance.
        recalibrate_variance: sigma' is injected in place of sigma.
        plan: precision per step.
        graphs: one per precision and emission.
        update: the sampler's update.
        artifacts: one per precision and backend that the bundle was built for.
        update_engines: one per backend of those that runs finished engines.
        engine_settings: how its engines were built, or would be.
        parity: figures of the parity gate by "<precision>.<emission>", or by ".<backend>" if it compiles.
        bops: bit operations of one evaluation, float parts at 32 bits.
        half_bops: the same with float parts at 16 bits, as the half emission runs them.
        layers: module paths by their bits ("w4a8", "float"), per precision that is not float.
        layer_sensitivity: what the bits of mixed precisions were chosen by.
        files: every other file of the bundle.
        pipeline: the parts around the network.
    """

    sampling: Sampling
    recalibrate_variance: bool
    plan: Plan
    choice: Choice
    graphs: tuple[Graph, ...]
    update: UpdateGraph
    artifacts: tuple[Artifact, ...]
    update_engines: tuple[UpdateEngine, ...]
    engine_settings: EngineSettings
    correction: CorrectionRecord
    parity: Mapping[str, Figures]
    bops: Mapping[Precision, int]
    half_bops: Mapping[Precision, int]
    layers: Mapping[Precision, Mapping[str, tuple[str, ...]]]
    layer_sensitivity: Mapping[Precision, LayerSensitivity]
    provenance: Provenance
    files: Mapping[str, FileEntry]
    pipeline: Pipeline

    def __post_init__(self) -> None:
        self.pipeline.check(self.sampling.model)
        if not self.artifacts:
            raise RecipeError("no artifact that a backend runs")
        for what, keys in (
            ("graphs", [(graph.precision, graph.emission) for graph in self.graphs]),
            ("artifacts", [(artifact.precision, artifact.backend) for artifact in self.artifacts]),
            ("update engines", [engine.backend for engine in self.update_engines]),
        ):
            if len(set(keys)) < len(keys):
                raise RecipeError(f"two {what} for the same")
        for digest in (self.update.digest, *(graph.digest for graph in self.graphs)):
            if not re.fullmatch(r"[0-9a-f]{64}", digest):
                raise RecipeError(f"digest {brief(digest)}: expected 64 hexadecimal digits")
        if len(self.plan) != len(self.sampling):
            raise RecipeError(f"{len(self.plan)} plan steps for {len(self.sampling)} timesteps")
        self._check_gate()
        counts = (*self.bops.values(), *self.half_bops.values())
        same = self.half_bops.keys() == self.bops.keys()
        if not same or not all(1 <= count <= MAX_BOPS for count in counts):
            raise RecipeError(f"bops and half_bops: expected 1 to {MAX_BOPS}, of the same precisions")
        check_layers(self.layers, self.layer_sensitivity, self.bops, len(self.sampling))

    def _check_gate(self) -> None:
        numerics = {
            f"{p}.{emission.numerics(p)}" for p in self.bops if not p.is_float for emission in Emission
        }
        if set(self.correction.steps) != numerics:
            held = ", ".join(sorted(self.correction.steps)) or "nothing"
            raise RecipeError(f"the gate's records are of {held}: expected {', '.join(sorted(numerics))}")
        for name, record in self.correction.steps.items():
            for rows in (record.kept, record.z_k, record.z_bias):
                if len(rows) != len(self.sampling):
                    raise RecipeError(
                        f"the gate's record of {name} has {len(rows)} steps of {len(self.sampling)}"
                    )

    @property
    def backends(self) -> tuple[str, ...]:
        """Backends that the bundle was built for, best first."""
        found = {artifact.backend for artifact in self.artifacts}
        return tuple(name for name in BACKENDS if name in found)

    @property
    def engines(self) -> tuple[Artifact | UpdateEngine, ...]:
        """The finished engines, the updates' among them."""
        return (*(a for a in self.artifacts if a.build is not None), *self.update_engines)

    def check_plan(self, plan: Plan) -> None:
        """Check that a plan has this bundle's steps and precisions.

        Raises:
            RecipeError: it has not.
        """
        steps = len(self.sampling)
        if len(plan) != steps:
            example = plan.steps[0] if plan.steps else next(iter(self.bops))
            raise RecipeError(
                f"the plan has {len(plan)} steps, the bundle {steps}: give a precision for each, such as "
                f"{example}*{steps}"
            )
        for precision in plan.precisions:
            if precision not in self.bops:
                raise RecipeError(
                    f"the plan asks for {precision}, but the bundle holds {', '.join(map(str, self.bops))}: "
                    f"take those, or rebuild with --precision {precision}"
                )

    def graph(self, precision: Precision, emission: Emission) -> Graph:
        """The graph of a precision in an emission.

        Raises:
            BundleError: the bundle holds none.
        """
        for graph in self.graphs:
            if graph.precision == precision and graph.emission is emission:
                return graph
        held = ", ".join(graph.name for graph in self.graphs)
        raise BundleError(
            f"the bundle has no graph {precision}.{emission}: it holds {held}; rebuild it with --precision "
            f"{precision}"
        )

    def artifact(self, precision: Precision, backend: str) -> Artifact:
        """What `backend` runs at `precision`. Backends that load graphs run any bundle, whatever it was built
        for.

        Raises:
            BundleError: there is none.
        """
        for artifact in self.artifacts:
            if (artifact.precision, artifact.backend) == (precision, backend):
                return artifact
        if backend in RUNNABLE and not BACKENDS[backend].builds_engines:
            file = self.graph(precision, BACKENDS[backend].emission).file
            return Artifact(precision, backend, file, "not measured here", "")
        raise self._no_engine(str(precision), backend)

    def update_engine(self, backend: str) -> UpdateEngine:
        """The finished engine of the sampler's update.

        Raises:
            BundleError: there is none.
        """
        for engine in self.update_engines:
            if engine.backend == backend:
                return engine
        raise self._no_engine(UPDATE, backend)

    def _no_engine(self, name: str, backend: str) -> BundleError:
        which = f"{name} engine" if backend in self.backends else "engines"
        return BundleError(
            f"the bundle has no {which} for backend {backend!r}: it was built for "
            f"{', '.join(self.backends)}; build it "
            f"here from the bundle's own graphs with `ptqd-export run ... --backend {backend} --rebuild`"
        )

    def to_dict(self) -> dict[str, Any]:
        """JSON-ready."""
        return {"format_version": FORMAT_VERSION, **to_plain(self)}

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> Manifest:
        """From parsed JSON, which may come from anywhere.

        Raises:
            PTQDError, RecursionError: not a manifest; the text says why.
        """
        check_plain(data)
        plain = {key: value for key, value in data.items() if key not in ("format_version", "sha256")}
        manifest: Manifest = read_typed(cls, plain, "manifest")
        return manifest
