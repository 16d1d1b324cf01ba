"""The builder's process: a graph that the library cannot compile may crash it, so it is a process of its own.

It reads a request from stdin, sends records as JSON lines on stdout, logs on stderr, and ends with stdin.
"""

from __future__ import annotations

import contextlib
import json
import os
import re
import threading
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from enum import StrEnum
from pathlib import Path
from typing import Any

from ...core.backend import TENSORRT
from ...core.engine_build import EngineSettings, PlanReport
from ...errors import BackendUnavailable, PTQDError, RecipeError
from ...files import write_file
from ...typed import read_typed, to_plain
from .. import cuda
from .library import capabilities, choose_targets, load
from .logs import OUT_OF_MEMORY, LogFile, make_logger, one_line
from .plan import Memory, read_inspector
from .progress import make_monitor


@dataclass(frozen=True)
class Request:
    """What to build.

    Attributes:
        name: of the backend.
        graph, part: files of the ONNX graph and of the engine to write.
        quantized: {node name: "int8" or "fp8"} of the nodes that are meant to run in 8 bits.
        timing_cache: file of measured kernel times, or None.
    """

    name: str
    graph: str
    part: str
    settings: EngineSettings
    quantized: Mapping[str, str]
    timing_cache: str | None = None


@dataclass(frozen=True)
class Progressed:
    """The fraction done, and the builder's name for what it does."""

    fraction: float
    phase: str


@dataclass(frozen=True)
class Built:
    """The engine is in its file: seconds that it took, most memory that the process held, its targets."""

    seconds: float
    peak_bytes: int
    targets: tuple[str, ...]


@dataclass(frozen=True)
class Inspected:
    """What the engine itself says of its plan and memory, where there is a GPU to load it on."""

    plan: PlanReport
    memory: Memory


class Trouble(StrEnum):
    """What went wrong in a builder's process."""

    LIBRARY = "library"  # it is not installed or does not load; `text` is the whole message
    TARGET = "target"  # a compute capability that it does not take; `text` is the whole message
    DRIVER = "driver"  # it gives no builder
    GRAPH = "graph"  # it cannot read the graph; `node` and `operator` where it names them
    INPUT = "input"  # an input whose sizes it cannot be given; `node` is its name
    SETTING = "setting"  # it refuses a setting; `text` says which
    BUILD = "build"  # it cannot compile the graph
    WORKSPACE = "workspace"  # it cannot compile it within the scratch memory that it may use
    MEMORY = "memory"  # the machine's memory ran out
    LOG = "log"  # its log cannot be written
    ENGINE = "engine"  # the engine cannot be written; `wanted` is its size


@dataclass(frozen=True)
class Failure:
    """Why there is no engine.

    Attributes:
        text: of the library or the system, on one line.
        node, operator: of the graph.
        wanted: bytes.
    """

    trouble: Trouble
    text: str = ""
    node: str = ""
    operator: str = ""
    wanted: int = 0


Record = Progressed | Built | Inspected | Failure
RECORDS: Mapping[str, type[Record]] = {
    "progressed": Progressed,
    "built": Built,
    "inspected": Inspected,
    "failure": Failure,
}


def encode(record: Record) -> bytes:
    """A record as a line of JSON."""
    name = next(name for name, kind in RECORDS.items() if isinstance(record, kind))
    return json.dumps({name: to_plain(record)}).encode() + b"\n"


def decode(line: bytes) -> Record | None:
    """The record of a line; None where a crash cut it short."""
    try:
        ((name, value),) = json.loads(line).items()
        record: Record = read_typed(RECORDS[name], value, name)
    except (ValueError, KeyError, AttributeError, RecipeError):
        return None
    return record


class _Stop(Exception):
    """Ends a build with the Failure that it carries."""

    def __init__(self, trouble: Trouble, text: object = "", **more: Any) -> None:
        self.failure = Failure(trouble, one_line(text), **more)
        super().__init__(self.failure)


Tell = Callable[[Record], None]
_opening = threading.Lock()
"""Held while the engine's file is made, and for good once this process ends."""


def main(plain: object) -> None:
    """Run the request that `plain` holds, and send what comes of it."""
    request: Request = read_typed(Request, plain, "request")
    out = os.dup(1)
    os.dup2(2, 1)  # whatever a library prints belongs into the log
    part = Path(request.part)

    def end_with_parent() -> None:
        os.read(0, 1)
        _opening.acquire()  # and never released: no file is made after this one is gone
        with contextlib.suppress(OSError):
            part.unlink(missing_ok=True)
        os._exit(1)

    threading.Thread(target=end_with_parent, daemon=True).start()

    def tell(record: Record) -> None:
        data = encode(record)
        with contextlib.suppress(OSError):  # the parent is gone, and so will this process be
            while data:
                data = data[os.write(out, data) :]

    try:
        plan = build_plan(request, LogFile(2), tell)
        inspected = inspect_plan(request, plan)
        if inspected is not None:
            tell(inspected)
    except _Stop as stop:
        tell(stop.failure)
    except BackendUnavailable as error:
        tell(Failure(Trouble.LIBRARY, one_line(error)))
    except RecipeError as error:
        tell(Failure(Trouble.TARGET, one_line(error)))
    except MemoryError:
        tell(Failure(Trouble.MEMORY, "MemoryError"))


def build_plan(request: Request, log: LogFile, tell: Tell) -> memoryview:
    """Build the engine into its file; `tell` of its progress, and that it was built. Returns its bytes.

    Raises:
        BackendUnavailable, RecipeError: as `load` and `choose_targets`.
        _Stop: it cannot be built.
    """
    settings, trt = request.settings, load(request.name)
    logger = make_logger(trt, log)
    start = time.perf_counter()
    try:
        builder = trt.Builder(logger)
    except TypeError as error:  # pybind11's "factory function returned nullptr"
        raise _Stop(Trouble.DRIVER, log.first_error) from error
    typed = getattr(trt.NetworkDefinitionCreationFlag, "STRONGLY_TYPED", None)
    network = builder.create_network(0 if typed is None else 1 << int(typed))
    parser = trt.OnnxParser(network, logger)
    if not parser.parse_from_file(request.graph):
        raise _unreadable(parser)
    config = builder.create_builder_config()
    set_flags(trt, config)
    if settings.optimization_level is not None:
        config.builder_optimization_level = settings.optimization_level
    if settings.workspace_mib is not None:
        config.set_memory_pool_limit(trt.MemoryPoolType.WORKSPACE, settings.workspace_mib << 20)
    if hasattr(trt, "IProgressMonitor"):
        config.progress_monitor = make_monitor(trt, lambda fraction, phase: tell(Progressed(fraction, phase)))
    targets = set_targets(trt, config, settings.compute_capabilities, "fp8" in request.quantized.values())
    add_profile(builder, network, config, settings)
    cache = Path(request.timing_cache) if request.timing_cache and request.name == TENSORRT else None
    if cache:
        use_timing_cache(config, cache)
    plan = builder.build_serialized_network(network, config)
    if log.disk_error is not None:
        raise _Stop(Trouble.LOG, log.disk_error.strerror)
    if plan is None:
        raise _Stop(_why_refused(log.first_error, settings), log.first_error)
    seconds = time.perf_counter() - start
    if cache:
        save_timing_cache(config, cache)
    data = memoryview(plan)
    try:
        with _opening:
            descriptor = os.open(request.part, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o666)
        with os.fdopen(descriptor, "wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
    except OSError as error:
        raise _Stop(Trouble.ENGINE, error.strerror, wanted=data.nbytes) from error
    tell(Built(seconds, _peak_bytes(), targets))
    return data


def _unreadable(parser: Any) -> _Stop:
    """The parser's first error, with its node."""
    if parser.num_errors == 0:
        return _Stop(Trouble.GRAPH, "no reason given")
    error = parser.get_error(0)
    node = str(error.node_name()) if hasattr(error, "node_name") else ""
    return _Stop(Trouble.GRAPH, error.desc(), node=node, operator=str(error.node_operator()) if node else "")


def _why_refused(told: str, settings: EngineSettings) -> Trouble:
    if OUT_OF_MEMORY.search(told):
        return Trouble.MEMORY
    return Trouble.WORKSPACE if settings.workspace_mib is not None and "workspace" in told else Trouble.BUILD


def set_flags(trt: Any, config: Any) -> None:
    """What no setting decides; BUILDER_REVISION stands for it in the key of an engine."""
    config.profiling_verbosity = trt.ProfilingVerbosity.DETAILED
    if hasattr(trt.BuilderFlag, "TF32"):
        config.clear_flag(trt.BuilderFlag.TF32)  # on by default: products of float32 with 10 bits of mantissa
    if hasattr(trt.BuilderFlag, "REQUIRE_USER_ALLOCATION"):
        # Without it, memory taken while running forbids CUDA graphs.
        config.set_flag(trt.BuilderFlag.REQUIRE_USER_ALLOCATION)


def set_targets(trt: Any, config: Any, wanted: tuple[str, ...], fp8: bool) -> tuple[str, ...]:
    """Choose the GPUs, each by its compute capability, so that an engine claims what it was built for.

    Raises:
        RecipeError: as `choose_targets`.
        _Stop: the library refuses one.
    """
    if not hasattr(config, "set_compute_capability"):
        return (cuda.gpu().capability,)
    chosen, known = choose_targets(trt, wanted, fp8), capabilities(trt)
    config.num_compute_capabilities = len(chosen)
    for index, capability in enumerate(chosen):
        if not config.set_compute_capability(known[capability], index):
            raise _Stop(Trouble.SETTING, f"compute capability {capability}")
    return chosen


def add_profile(builder: Any, network: Any, config: Any, settings: EngineSettings) -> None:
    """One profile, with the settings' rows for every input whose first dimension is dynamic.

    Raises:
        _Stop: another dimension is dynamic, or the library refuses the profile.
    """
    profile = builder.create_optimization_profile()
    dynamic = False
    for index in range(network.num_inputs):
        tensor = network.get_input(index)
        first, *rest = tuple(tensor.shape) or (1,)
        if -1 in rest:
            raise _Stop(Trouble.INPUT, tuple(tensor.shape), node=tensor.name)
        if first == -1:
            dynamic = True
            profile.set_shape(tensor.name, *((n, *rest) for n in settings.rows))
    if dynamic and config.add_optimization_profile(profile) < 0:
        raise _Stop(Trouble.SETTING, f"rows {settings.rows}")


def use_timing_cache(config: Any, path: Path) -> None:
    """Start from the file's timings, or from none where it is missing or does not fit."""
    data = b""
    with contextlib.suppress(OSError):
        data = path.read_bytes()
    for content in dict.fromkeys((data, b"")):
        with contextlib.suppress(
            TypeError, ValueError, RuntimeError
        ):  # pybind11's ways of saying that there is none
            cache = config.create_timing_cache(content)
            if cache is not None and config.set_timing_cache(cache, False):
                return


def save_timing_cache(config: Any, path: Path) -> None:
    """Bring the file up to date; where that cannot be, the next build is slower and no worse."""
    with contextlib.suppress(PTQDError, TypeError, ValueError, RuntimeError):
        cache = config.get_timing_cache()
        blob = None if cache is None else cache.serialize()
        if blob is not None:
            write_file(path, bytes(memoryview(blob)))


def inspect_plan(request: Request, plan: memoryview) -> Inspected | None:
    """What the engine says of itself; None where there is no GPU to load it on, or it does not tell."""
    try:
        cuda.gpu()
    except BackendUnavailable:
        return None
    trt = load(request.name)
    logger = make_logger(trt, LogFile(2))
    try:
        runtime = trt.Runtime(logger)
        engine = runtime.deserialize_cuda_engine(plan)
        inspector = None if engine is None else engine.create_engine_inspector()
    except (TypeError, RuntimeError):  # pybind11's words for "there is none"
        return None
    if engine is None or inspector is None:
        return None
    told = inspector.get_engine_information(trt.LayerInformationFormat.JSON)
    report = read_inspector(told, request.quantized)
    weights = (
        int(engine.get_engine_stat(trt.EngineStat.TOTAL_WEIGHTS_SIZE)) if hasattr(trt, "EngineStat") else -1
    )
    memory = Memory(weights if weights >= 0 else None, int(engine.device_memory_size_v2))
    return Inspected(report, memory)


def _peak_bytes() -> int:
    """Most memory of this process; not getrusage's, which starts with what the parent had when it forked."""
    try:
        status = Path("/proc/self/status").read_text()
    except OSError:
        return 0
    match = re.search(r"VmHWM:\s*(\d+) kB", status)
    return int(match[1]) * 1024 if match else 0
