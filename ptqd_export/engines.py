"""What each backend runs: graphs as they are, or finished engines, which are kept by what decides them and can be built anew where they run."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable, Iterable, Mapping
from dataclasses import asdict, replace
from importlib import metadata
from pathlib import Path
from typing import Any

from .backends.base import Device, DeviceEngine
from .bundle import MALFORMED, Bundle, check_target, sha256_file, working, write_manifest, writing
from .errors import BackendUnavailable, BundleError, PTQDError
from .manifest import Artifact, EngineBuild, Graph, engine_build, name_of
from .precision import Precision
from .progress import progress
from .quant import BACKENDS, BUILDERS, Emission
from .recipe import Recipe, TensorRTSpec
from .sampler import branches

Held = Mapping[str, tuple[Path, EngineBuild]]
"""Finished engines at hand, by key."""


def lowering(precision: Precision | None, backend: str) -> str:
    """What a backend really computes with, in words: no speed follows from the name of a precision."""
    if precision is None or precision.weight_bits == 32:
        return "float32"
    half = BACKENDS[backend] is Emission.HALF
    floats = "float16" if half else "float32"
    if precision.is_float:
        return floats
    if precision.weight_only:
        store = "packed INT4" if precision.weight_bits <= 4 else "INT8"
        return f"{floats}; weights stored as {store}"
    if backend == "ort-cuda":
        return "codes dequantized, then float16: this provider has no 8-bit kernels"
    if precision.number == "fp8":
        return "E4M3 x E4M3 at layer inputs, float16 in between" if half else "E4M3 emulated in float32"
    narrow = [
        f"{n}-bit {what} on a grid inside INT8"
        for n, what in ((precision.weight_bits, "weights"), (precision.activation_bits, "activations"))
        if n < 8
    ]
    kernel = (
        "S8 x S8 at layer inputs, float16 in between" if half else "QLinearConv: U8 activations (zero_point 128) x S8 weights, conv outputs in 8 bits"
    )
    return f"{kernel}; {', '.join(narrow) or 'full 8-bit range'}"


def graph_artifact(backend: str, graph: Graph) -> Artifact:
    """For backends that load the graph itself."""
    from .backends.ort import DISTRIBUTIONS

    found = [f"{name} {version}" for name in DISTRIBUTIONS if (version := _version(name))]
    return Artifact(graph.precision, backend, graph.file, lowering(graph.precision, backend), found[0] if found else "")


def _version(distribution: str) -> str | None:
    try:
        return metadata.version(distribution)
    except metadata.PackageNotFoundError:
        return None


def check_builder(backend: str, spec: TensorRTSpec) -> None:
    """Before any work: that engines of `backend` can be built here. Backends that load graphs need nothing to build for.

    Raises:
        BackendUnavailable, RecipeError: they cannot.
    """
    if backend in BUILDERS:
        from .backends import trt

        trt.check_build(backend, spec.compute_capabilities)


def held_engines(path: Path) -> Held:
    """The engines of a bundle at `path`; none if there is no sound bundle."""
    try:
        bundle = Bundle.open(path)
    except PTQDError:
        return {}
    return {a.build.key: (bundle.file(a.file), a.build) for a in bundle.manifest.artifacts if a.build is not None}


def build_engines(
    backend: str,
    graphs: Iterable[Graph],
    folder: Path,
    spec: TensorRTSpec,
    guidance_scale: float,
    work: Path,
    held: Held,
    say: Callable[[str], None],
) -> list[Artifact]:
    """Finished engines of `graphs` in `folder`, as `<precision>.<backend>.engine`.

    One whose graph, settings and versions are those of an engine at hand (in `held`, or of a stopped build in `work`) is not built again.

    Raises:
        BackendUnavailable: the backend's library is not installed or does not work here, or memory ran out.
        RecipeError: a target that the library does not know.
        GraphError: the builder refuses a graph, or died; the line says where its log is.
        PTQDError, OSError: a file cannot be written.
    """
    from .backends import trt

    work.mkdir(exist_ok=True)
    rows = tuple(n * branches(guidance_scale) for n in spec.batch_sizes)
    settings = trt.Settings((rows[0], rows[1], rows[2]), spec.compute_capabilities, spec.optimization_level, spec.workspace_mib)
    artifacts = []
    for graph in graphs:
        name = f"{name_of(graph.precision)}.{backend}"
        key = trt.key(backend, graph.digest, settings)
        engine, report = work / f"{key}.engine", work / f"{key}.json"
        found = held.get(key) or _finished(engine, report, key)
        if found is None:
            with progress(100, f"building {name}", "%") as bar:

                def advance(share: float, phase: str, bar: Any = bar) -> None:
                    bar.set_postfix_str(phase, refresh=False)
                    bar.update(round(100 * share) - bar.n)

                try:
                    made = trt.build(
                        backend,
                        folder / graph.file,
                        engine,
                        settings,
                        quantized=graph.quantized,
                        log=work / f"{name}.log",
                        timing_cache=_cache("tensorrt.timing"),
                        advance=advance,
                    )
                except PTQDError as error:  # `folder` goes with the failure: the graph's name alone still means something
                    raise type(error)(str(error).replace(f"{folder.resolve()}{os.sep}", "")) from error
            build = EngineBuild(key, made.targets, settings.to_dict(), round(made.seconds, 2), made.peak_bytes, made.plan.to_dict())
            report.write_text(json.dumps({"sha256": sha256_file(engine), "build": asdict(build)}))
            found = engine, build
            plan = build.plan
            taken = f"{plan['taken']} of {plan['meant']} layers in 8 bits, " if plan["meant"] else ""
            say(f"engine {name}: {taken}{build.seconds:.1f} s, {engine.stat().st_size / 1e6:.1f} MB")
            for line in build.fell_back:
                say(f"engine {name}: {line}")
        else:
            say(f"engine {name}: unchanged, not built again")
        file = f"{name}.engine"
        shutil.copyfile(found[0], folder / file)
        artifacts.append(Artifact(graph.precision, backend, file, lowering(graph.precision, backend), trt.runtime_version(backend), None, found[1]))
    return artifacts


def _cache(name: str) -> Path | None:
    """A file of this user's caches of kernel times and compiled kernels, which speed up and decide nothing; None where there can be none."""
    try:
        folder = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "ptqd-export"
        folder.mkdir(parents=True, exist_ok=True)
    except (OSError, RuntimeError):  # RuntimeError: a user without a home
        return None
    return folder / name


def _finished(engine: Path, report: Path, key: str) -> tuple[Path, EngineBuild] | None:
    """What a stopped build left whole: the report is written after the engine, and holds its SHA-256."""
    try:
        data = json.loads(report.read_bytes())
        build = engine_build(data["build"])
        whole = build.key == key and sha256_file(engine) == data["sha256"]
    except (OSError, PTQDError, *MALFORMED):
        return None
    return (engine, build) if whole else None


def open_artifact(bundle: Bundle, artifact: Artifact, device: Device | None) -> DeviceEngine:
    """Load what a backend runs, on a device of that backend, or on one that all such engines share.

    Raises:
        BackendUnavailable, BundleError, GraphError: it does not run here; for a finished engine, whether --rebuild helps.
    """
    from .backends import open_engine

    build = artifact.build
    if build is None:
        return open_engine(artifact.backend, bundle.file(artifact.file), device)
    built = f"{artifact.runtime} for {', '.join(build.targets)}"
    cache = _cache(f"{build.key}.kernels")
    return open_engine(artifact.backend, bundle.file(artifact.file), device, built=built, cache=cache)


def rebuild(bundle: Bundle, backend: str, say: Callable[[str], None] = lambda text: None) -> Bundle:
    """The bundle with engines of `backend` for this machine, built from its own graphs; replaces it on disk in one step.

    Engines that it holds are built anew too: one of them may be why this is asked for. A stopped rebuild's are taken up.

    Raises:
        BundleError: nothing to build, or the bundle cannot be written.
        BackendUnavailable, GraphError, RecipeError: as `build_engines`.
    """
    if backend not in BUILDERS:
        raise BundleError(f"backend {backend} loads the graphs as they are: leave out --rebuild, which is for {' and '.join(BUILDERS)}")
    path = check_target(bundle.path)
    with working(path) as work:
        m = Bundle.open(path, without=backend).manifest  # now that no one else can replace it
        try:
            spec = Recipe.from_dict({"tensorrt": m.provenance["recipe"]["tensorrt"]}).tensorrt
        except (PTQDError, *MALFORMED):
            spec = TensorRTSpec()
        mine = [a for a in m.artifacts if a.backend == backend]
        precisions = {None, *m.plan.precisions, *(a.precision for a in mine)}
        graphs = [graph for graph in m.graphs if graph.emission is BACKENDS[backend] and graph.precision in precisions]
        with writing(path) as tmp:
            for name in m.files.keys() - {a.file for a in mine}:
                target = tmp / name
                target.parent.mkdir(parents=True, exist_ok=True)
                _copy(path / name, target)
            built = build_engines(backend, graphs, tmp, _for_this_gpu(spec), m.guidance_scale, work / "engines", {}, say)
            kept = tuple(a for a in m.artifacts if a.backend != backend)
            write_manifest(tmp, replace(m, artifacts=(*kept, *built)))
        shutil.rmtree(work / "engines")  # the rest is a stopped build's
    return Bundle.open(path)


def _for_this_gpu(spec: TensorRTSpec) -> TensorRTSpec:
    """`spec` with the GPU at hand, if there is one, among those that it names; where it names none, all are meant."""
    from .backends.cuda import gpu

    try:
        capability = gpu().capability
    except BackendUnavailable:
        return spec
    named = spec.compute_capabilities
    return spec if not named or capability in named else replace(spec, compute_capabilities=(*named, capability))


def _copy(source: Path, target: Path) -> None:
    try:
        os.link(source, target)  # the same content on the same disk, for as long as the old bundle stands
    except OSError:
        shutil.copyfile(source, target)
