"""What each backend runs: graphs as they are, or finished engines.

Finished engines are kept under a key of what decides them, and built anew on request.
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from importlib import metadata
from pathlib import Path

from ..backends import trt
from ..backends.cuda import gpu
from ..bundle.bundle import Bundle, check_target, in_the_way, write_manifest
from ..bundle.manifest import UPDATE, Artifact, Graph, UpdateEngine, UpdateGraph
from ..bundle.tables import MALFORMED
from ..core.backend import BACKENDS, ENGINE_BACKENDS
from ..core.engine_build import EngineBuild, EngineSettings
from ..core.precision import Precision
from ..errors import BackendUnavailable, BundleError, PTQDError
from ..files import cache_folder, link_or_copy, replacing, sha256_file, work_folder
from ..parity.gate import BackendVerdict
from ..progress import progress
from ..typed import read_typed, to_plain

ENGINES = "engines"
"""Folder, inside the work folder, of the engines that a stopped build had finished."""
KnownEngines = Mapping[str, tuple[Path, EngineBuild]]
"""Finished engines that can be reused: {key: (file, how it was built)}."""
Say = Callable[[str], None]


@dataclass(frozen=True)
class Builder:
    """Builds engines of one backend.

    Attributes:
        backend: "tensorrt" or "tensorrt-rtx".
        settings: settings of the engines.
        work: folder of engines that stopped builds had finished, and of logs.
        held: engines of an older bundle.
        say: called with one line of text for each thing that is done.
        variants: writes other forms of a graph into a folder; a library may take one of them where it refuses
            the graph itself.
    """

    backend: str
    settings: EngineSettings
    work: Path
    held: KnownEngines
    say: Say
    variants: Callable[[Path], Iterable[Path]] = lambda graph: ()

    def network(self, graph: Graph, folder: Path) -> Artifact:
        """Make a finished engine of a network's graph, in `folder`.

        Raises:
            PTQDError: as `build`.
        """
        file = f"{graph.precision.stem}.{self.backend}.engine"
        build = self.build(folder / graph.file, graph.digest, graph.quantized, folder / file)
        lowering = BACKENDS[self.backend].lowering(graph.precision)
        return Artifact(
            graph.precision, self.backend, file, lowering, trt.runtime_version(self.backend), None, build
        )

    def update(self, graph: UpdateGraph, folder: Path) -> UpdateEngine:
        """Make a finished engine of the sampler's update, in `folder`.

        Raises:
            PTQDError: as `build`.
        """
        file = f"{UPDATE}.{self.backend}.engine"
        build = self.build(folder / graph.file, graph.digest, {}, folder / file)
        return UpdateEngine(self.backend, file, trt.runtime_version(self.backend), build)

    def build(self, graph: Path, digest: str, quantized: Mapping[str, str], target: Path) -> EngineBuild:
        """Make a finished engine at `target`.

        An engine of the same graph, settings and versions is reused, not built again.

        Raises:
            BackendUnavailable: the library is not installed or does not work here, or memory ran out.
            RecipeError: the library does not know a compute capability.
            GraphError: the builder refuses the graph, or died; the message says where its log is.
            PTQDError, OSError: a file cannot be written.
        """
        self.work.mkdir(parents=True, exist_ok=True)
        name = target.stem
        key = trt.key(self.backend, digest, self.settings)
        engine, report = self.work / f"{key}.engine", self.work / f"{key}.json"
        found = self.held.get(key) or _finished(engine, report, key)
        if found is None:
            build = self._run(graph, quantized, engine, key, name)
            report.write_text(json.dumps({"sha256": sha256_file(engine), "build": to_plain(build)}))
            self._tell(name, engine, build)
            found = engine, build
        else:
            self.say(f"engine {name}: unchanged, not built again")
        shutil.copyfile(found[0], target)
        return found[1]

    def _run(
        self, graph: Path, quantized: Mapping[str, str], engine: Path, key: str, name: str
    ) -> EngineBuild:
        with progress(100, f"building {name}", "%") as bar:
            done = 0

            def advance(share: float, phase: str) -> None:
                nonlocal done
                bar.set_postfix_str(phase, refresh=False)
                bar.update(round(100 * share) - done)
                done = round(100 * share)

            with _named(graph):
                return trt.build(
                    self.backend,
                    graph,
                    engine,
                    self.settings,
                    key=key,
                    quantized=quantized,
                    log=self.work / f"{name}.log",
                    variants=self.variants(graph),
                    timing_cache=trt.timing_cache(self.backend, cache_folder()),
                    advance=advance,
                )

    def _tell(self, name: str, engine: Path, build: EngineBuild) -> None:
        plan = build.plan
        taken = f"{plan.taken} of {plan.meant} layers in 8 bits, " if plan.meant else ""
        self.say(f"engine {name}: {taken}{build.seconds:.1f} s, {engine.stat().st_size / 1e6:.1f} MB")
        for line in plan.complaints():
            self.say(f"engine {name}: {line}")


@contextmanager
def _named(graph: Path) -> Iterator[None]:
    """Take the graph's folder out of error messages.

    The folder is removed when the build fails; only the graph's name still means something then.
    """
    try:
        yield
    except PTQDError as error:
        raise type(error)(str(error).replace(f"{graph.parent.resolve()}{os.sep}", "")) from error


def _finished(engine: Path, report: Path, key: str) -> tuple[Path, EngineBuild] | None:
    """A complete engine of a stopped build: the report is written after the engine and holds its SHA-256."""
    try:
        data = json.loads(report.read_bytes())
        build = read_typed(EngineBuild, data["build"], "build")
        whole = build.key == key and sha256_file(engine) == data["sha256"]
    except (OSError, PTQDError, *MALFORMED):
        return None
    return (engine, build) if whole else None


def graph_artifact(backend: str, graph: Graph, compiled: BackendVerdict | None = None) -> Artifact:
    """The artifact of a backend that loads the graph itself.

    Args:
        compiled: what the backend made of it here, if it tells that and runs here.
    """
    entry = BACKENDS[backend]
    plan = None
    if compiled is not None:
        entry, plan = replace(entry, floats=compiled.floats), compiled.plan
    lowering, runtime = entry.lowering(graph.precision), _installed(entry.distributions)
    return Artifact(graph.precision, backend, graph.file, lowering, runtime, plan=plan)


def _installed(distributions: Sequence[str]) -> str:
    """Name and version of the first distribution that is installed; "" if none is."""
    for name in distributions:
        try:
            return f"{name} {metadata.version(name)}"
        except metadata.PackageNotFoundError:
            continue
    return ""


def check_builder(backend: str, settings: EngineSettings) -> None:
    """Check, before any work, that engines of `backend` can be built here.

    Backends that load graphs need nothing here.

    Raises:
        BackendUnavailable, RecipeError: the engines cannot be built.
    """
    if backend in ENGINE_BACKENDS:
        trt.check_build(backend, settings.compute_capabilities)


def held_engines(path: Path) -> KnownEngines:
    """The engines of the bundle at `path`; none if there is no valid bundle."""
    try:
        bundle = Bundle.open(path)
    except PTQDError:
        return {}
    return {
        engine.build.key: (bundle.file(engine.file), engine.build)
        for engine in bundle.manifest.engines
        if engine.build is not None
    }


def rebuild(bundle: Bundle | Path | str, backend: str, say: Say = lambda text: None) -> Bundle:
    """Build a bundle's engines of `backend` anew, for this machine and from its own graphs.

    The new bundle replaces the old one on disk in one step. Engines that the bundle holds already are built
    anew too: one of them may be the reason for the rebuild. Engines that a stopped rebuild had finished are
    reused.

    Raises:
        BundleError: there is nothing to build, or the bundle cannot be written.
        BackendUnavailable, GraphError, RecipeError: as `Builder.build`.
    """
    if backend not in ENGINE_BACKENDS:
        raise BundleError(
            f"backend {backend} loads the graphs as they are: leave out --rebuild, which is for "
            f"{' and '.join(ENGINE_BACKENDS)}"
        )
    path = check_target(bundle.path if isinstance(bundle, Bundle) else Path(bundle))
    with work_folder(path) as work:
        m = Bundle.open(path, without=backend).manifest  # the work folder keeps others from replacing it
        mine = [artifact for artifact in m.artifacts if artifact.backend == backend]
        precisions: set[Precision] = {*m.plan.precisions, *(artifact.precision for artifact in mine)}
        emission = BACKENDS[backend].emission
        graphs = [graph for graph in m.graphs if graph.emission is emission and graph.precision in precisions]
        old = {engine.file for engine in m.engines if engine.backend == backend}
        builder = Builder(backend, _for_this_gpu(m.engine_settings), work / ENGINES, {}, say)
        with replacing(path, in_the_way) as tmp:
            for name in m.files.keys() - old:
                target = tmp / name
                target.parent.mkdir(parents=True, exist_ok=True)
                link_or_copy(path / name, target)  # the content is the same, and the old bundle stays intact
            built = tuple(builder.network(graph, tmp) for graph in graphs)
            update = builder.update(m.update, tmp)
            artifacts = (*(a for a in m.artifacts if a.backend != backend), *built)
            updates = (*(u for u in m.update_engines if u.backend != backend), update)
            write_manifest(tmp, replace(m, artifacts=artifacts, update_engines=updates))
        shutil.rmtree(work / ENGINES)  # anything else in it belongs to a stopped build
    return Bundle.open(path)


def _for_this_gpu(settings: EngineSettings) -> EngineSettings:
    """`settings`, made to cover the GPU at hand, if there is one."""
    try:
        return settings.for_gpu(gpu().capability)
    except BackendUnavailable:
        return settings
