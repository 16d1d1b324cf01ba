"""TensorRT and TensorRT-RTX: engines built in a process of their own, and run on a GPU.

Both libraries have one Python interface, so everything here takes the module. What differs is asked for where it is used:

    TensorRT-RTX     target compute capabilities, runtime cache, kernel specialization, `Runtime.get_engine_validity`
    TensorRT         timing cache; it builds for the GPU at hand and needs one
    TensorRT 10      networks are strongly typed on request only (11: always; the flag may be gone)

An engine is not byte-reproducible: `key` identifies what it was built from.
"""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import importlib
import json
import os
import re
import signal
import subprocess
import sys
import threading
import time
from collections import Counter, OrderedDict
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from .. import errors
from ..engine import Array, Feeds, TensorSpec
from ..errors import BackendUnavailable, BundleError, GraphError, PTQDError, RecipeError
from ..images import write_atomic
from . import cuda
from .cuda import Buffer, CudaDevice

MODULES = {"tensorrt": "tensorrt", "tensorrt-rtx": "tensorrt_rtx"}
FP8_CAPABILITY = (8, 9)
"""The first compute capability that computes in FP8."""
BUILDER_REVISION = 1
"""Raise it whenever `_set_flags`, or another choice of the builder made in this file, changes: engines of before are then built again."""

DTYPES = {
    "FLOAT": "float32",
    "HALF": "float16",
    "INT64": "int64",
    "INT32": "int32",
    "INT8": "int8",
    "UINT8": "uint8",
    "BOOL": "bool",
}
PLAN_DTYPES = {"Float": "float32", "FP32": "float32", "Half": "float16", "FP16": "float16", "BFloat16": "bfloat16", "BF16": "bfloat16"}
"""Words of the plan for types; others are only put in lower case."""

NO_KERNEL = frozenset({"signal", "wait", "shape_call", "NoOp", "Constant"})
"""Layer types of a plan that launch no work."""
POINTWISE = NO_KERNEL | {"kgen", "Reformat", "PointWise", "PointWiseV2"}
"""Layer types that name a convolution or product in their metadata without computing it."""
MERGING = frozenset({"gemm", "correlation"})
"""Layer types of one product, which name several nodes only where these multiply the same input: its type is that of each."""
OPAQUE = frozenset({"Myelin", "ForeignNode"})
"""Layer types of full TensorRT that hold whole subgraphs."""
NOT_FOUND, NOT_KNOWN = "not found", "not known"
"""In the place of a node's type: no computing layer of the plan names it; its layer, or the plan, does not tell."""

GRAPHS = 16
"""Most (shapes, addresses) of which an engine keeps a CUDA graph and its execution context."""


def load(name: str) -> Any:
    """The library's module; `name` is "tensorrt" or "tensorrt-rtx".

    Raises:
        BackendUnavailable: not installed, or it does not load.
    """
    module = MODULES[name]
    try:
        return importlib.import_module(module)
    except ModuleNotFoundError as error:
        if error.name == module:
            raise BackendUnavailable(f"backend {name} needs {module}, which is not installed: pip install 'ptqd-export[{name}]'") from error
        raise BackendUnavailable(
            f"{module} is installed but does not load ({_one_line(error)}): pip install --force-reinstall 'ptqd-export[{name}]'"
        ) from error
    except Exception as error:  # a missing driver or library arrives as ImportError, OSError or RuntimeError
        raise BackendUnavailable(
            f"{module} is installed but does not load ({_one_line(error)}): pip install --force-reinstall 'ptqd-export[{name}]'"
        ) from error


def check(name: str) -> None:
    """That engines run here.

    Raises:
        BackendUnavailable: the library, the driver or the GPU is missing, or the library does not serve this GPU.
    """
    trt = load(name)
    device = cuda.gpu()
    known = _capabilities(trt) if hasattr(trt, "ComputeCapability") else {}  # TensorRT-RTX alone chooses its targets
    if known and device.capability not in known:
        raise BackendUnavailable(
            f"{name} {trt.__version__} does not serve {device}: it knows compute capabilities {', '.join(known)}; choose another backend"
        )


def check_build(name: str, capabilities: tuple[str, ...]) -> None:
    """That engines can be built here, for these GPUs.

    Raises:
        BackendUnavailable: the library is missing; for TensorRT, which builds for the GPU at hand, the GPU.
        RecipeError: a compute capability that the library does not know.
    """
    trt = load(name)
    if name == "tensorrt":
        cuda.gpu()
    else:
        _choose(trt, capabilities, fp8=False)


def runtime_version(name: str) -> str:
    """Such as "tensorrt-rtx 1.7.1.116".

    Raises:
        BackendUnavailable: not installed, or it does not load.
    """
    return f"{name} {load(name).__version__}"


def _one_line(error: object) -> str:
    return " ".join(str(error).split())


# Building


@dataclass(frozen=True)
class Settings:
    """How an engine is built.

    Attributes:
        rows: fewest, usual and most rows of one call, the first dimension of the inputs where it is dynamic.
        compute_capabilities: GPUs that a TensorRT-RTX engine is for, such as "8.9"; where empty, all that the library knows and the numbers allow.
            TensorRT ignores them: it builds for the GPU at hand.
        optimization_level: the builder's, 0 to 5; None is its own default.
        workspace_mib: most scratch memory of a layer; None is no limit.
    """

    rows: tuple[int, int, int]
    compute_capabilities: tuple[str, ...] = ()
    optimization_level: int | None = None
    workspace_mib: int | None = None

    def to_dict(self) -> dict[str, Any]:
        """JSON-ready."""
        lists = {"rows": list(self.rows), "compute_capabilities": list(self.compute_capabilities)}
        return {**dataclasses.asdict(self), **lists}


def key(name: str, graph_digest: str, settings: Settings, gpu: cuda.Gpu | None = None) -> str:
    """SHA-256 of what decides an engine: graph digest, settings, library version, BUILDER_REVISION and, for TensorRT, the GPU at hand.

    Raises:
        BackendUnavailable: the library is not installed; for TensorRT, `gpu` is not given and there is none.
    """
    at_hand = str(gpu or cuda.gpu()) if name == "tensorrt" else ""
    parts = [graph_digest, settings.to_dict(), runtime_version(name), BUILDER_REVISION, at_hand]
    return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()


@dataclass(frozen=True)
class PlanTable:
    """What a finished plan runs in 8 bits.

    Attributes:
        meant: nodes that were to run in 8 bits.
        taken: those of them that do.
        fell_back: the others: {node: type that its input has instead, or NOT_FOUND or NOT_KNOWN}.
        kernels: layers of the plan that launch work.
        types: {layer type: how many}, of all layers.
    """

    meant: int
    taken: int
    fell_back: Mapping[str, str]
    kernels: int
    types: Mapping[str, int]

    @classmethod
    def read(cls, lines: Iterable[str], quantized: Mapping[str, str]) -> PlanTable:
        """From the builder's verbose log; `quantized` says {node name: "int8" or "fp8"}.

        A log whose wording this file does not know holds no layers, and every node is NOT_KNOWN: no reason to refuse the engine.
        """
        layers: list[_Layer] = []
        for line in lines:
            if _HEADER.fullmatch(line.rstrip()):
                layers = []
            elif layer := _Layer.read(line):
                layers.append(layer)
        found: dict[str, list[str]] = {}
        for layer in layers:
            if layer.kind not in POINTWISE:
                meant = quantized.keys() & set(layer.nodes)
                unclear = layer.kind in OPAQUE or (len(meant) > 1 and layer.kind not in MERGING)
                for node in meant:
                    found.setdefault(node, []).append(NOT_KNOWN if unclear else layer.input_dtype)
        absent = NOT_FOUND if layers else NOT_KNOWN
        fell_back = {node: found.get(node, [absent])[0] for node, dtype in quantized.items() if dtype not in found.get(node, ())}
        types = Counter(layer.kind for layer in layers)
        kernels = sum(n for kind, n in types.items() if kind not in NO_KERNEL)
        return cls(len(quantized), len(quantized) - len(fell_back), fell_back, kernels, dict(sorted(types.items())))

    def to_dict(self) -> dict[str, Any]:
        """JSON-ready."""
        return dataclasses.asdict(self)


_HEADER = re.compile(r"(?:[A-Z_]+ )?(?:Layers|Engine Layer Information):")
_LAYER = re.compile(r"(?:[A-Z_]+ )?Name: .*?, LayerType: (\w+), Inputs: (?=\[)")
_NODE = re.compile(r"\[ONNX Layer: (.*?)\](?=\s*(?:\[|\x1e|$))")
_DTYPE = re.compile(r"Datatype: (.*)", re.DOTALL)
_WORD = re.compile(r"\b(?:Float|Half|BFloat16|Int\d+|UInt8|Bool|FP\d+|BF16|E\dM\d)\b")


@dataclass(frozen=True)
class _Layer:
    """A line of the plan: layer type, type of the first input ("none" where there is none), and ONNX nodes in it."""

    kind: str
    input_dtype: str
    nodes: tuple[str, ...]

    @classmethod
    def read(cls, line: str) -> _Layer | None:
        match = _LAYER.match(line)
        if match is None:
            return None
        inputs = _bracketed(line, match.end())
        first = _bracketed(inputs, inputs.find("{")) if "{" in inputs else ""
        told = _DTYPE.search(first)
        word = _WORD.search(told[1]) if told else None
        dtype = PLAN_DTYPES.get(word[0], word[0].lower()) if word else "none"
        return cls(match[1], dtype, tuple(_NODE.findall(line.rpartition("Metadata: ")[2].rstrip())))


def _bracketed(text: str, start: int) -> str:
    """From the bracket at `start` to the one that closes it."""
    depth = 0
    for at in range(start, len(text)):
        depth += (text[at] in "[{") - (text[at] in "]}")
        if depth == 0:
            return text[start : at + 1]
    return text[start:]


@dataclass(frozen=True)
class Report:
    """What a build took and made.

    Attributes:
        seconds: parsing and building.
        bytes: of the engine.
        peak_bytes: most memory that the builder's process held; 0 where the system does not tell.
        targets: compute capabilities that the engine is for.
        plan: what runs in 8 bits.
    """

    seconds: float
    bytes: int
    peak_bytes: int
    targets: tuple[str, ...]
    plan: PlanTable


# The child's modules are looked for where its parent's are, wherever this package stands.
_CHILD = (
    "import json, sys; request = json.loads(sys.stdin.buffer.readline()); sys.path[:] = request.pop('path'); "
    f"from {__name__} import _child; _child(request)"
)


def build(
    name: str,
    graph: Path,
    engine: Path,
    settings: Settings,
    *,
    quantized: Mapping[str, str],
    log: Path,
    timing_cache: Path | None = None,
    advance: Callable[[float, str], None] = lambda fraction, phase: None,
) -> Report:
    """Build an engine file from an ONNX graph, whole or not at all.

    The builder runs in a process of its own, because a graph that it cannot compile may crash it. That process ends with this one.

    Args:
        quantized: {node name: "int8" or "fp8"} of the nodes that are meant to run in 8 bits.
        log: where the builder's whole log goes (about a megabyte); kept after a failure too.
        timing_cache: file of measured kernel times, used and brought up to date; one that does not fit is replaced. TensorRT-RTX has none.
        advance: told (fraction done, phase).
    Raises:
        GraphError: the library cannot read or compile the graph.
        RecipeError: a compute capability that it does not know.
        BackendUnavailable: it is not installed, does not work here, or memory ran out.
        PTQDError: a file cannot be written.
    """
    part = engine.with_name(f".{engine.name}.{os.getpid()}.part")
    request = {
        "path": sys.path,
        "name": name,
        "graph": str(graph.resolve()),
        "part": str(part.resolve()),
        "settings": settings.to_dict(),
        "fp8": "fp8" in quantized.values(),
        "timing_cache": timing_cache and str(timing_cache.resolve()),
    }
    try:
        code, done = _run_child(request, log, advance)
        if done is None:
            raise _crash(code, graph, log)
        if "error" in done:
            raise getattr(errors, done["error"])(_failure(done["message"], graph, log))
        with open(log, encoding="utf-8", errors="replace") as lines:
            plan = PlanTable.read(lines, quantized)
        os.replace(part, engine)
    except OSError as error:
        raise PTQDError(f"cannot write {error.filename or engine}: {error.strerror}: choose another place or free some space") from error
    finally:
        with contextlib.suppress(OSError):
            part.unlink(missing_ok=True)
    return Report(done["seconds"], done["bytes"], done["peak_bytes"], tuple(done["targets"]), plan)


def _run_child(request: Mapping[str, Any], log: Path, advance: Callable[[float, str], None]) -> tuple[int, dict[str, Any] | None]:
    """(exit code, last message or None) of a builder's process; it is gone when this returns or raises."""
    done = None
    # A session of its own: Ctrl-C comes to this process alone, which then ends the other.
    with (
        open(log, "wb") as sink,
        subprocess.Popen(
            [sys.executable, "-P", "-c", _CHILD], stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=sink, start_new_session=True
        ) as process,
    ):
        assert process.stdin is not None and process.stdout is not None
        try:
            process.stdin.write(json.dumps(request).encode() + b"\n")
            process.stdin.flush()
            for line in process.stdout:
                with contextlib.suppress(json.JSONDecodeError):  # cut short by a crash
                    message = json.loads(line)
                    if "phase" in message:
                        advance(message["fraction"], message["phase"])
                    else:
                        done = message
        except BrokenPipeError:
            pass  # it ended before it read the request: its exit code tells more
        except BaseException:
            process.kill()
            raise
    return process.returncode, done


OUT_OF_MEMORY = re.compile(
    r"bad_alloc|MemoryError|[Oo]ut ?[Oo]f ?[Mm]emory|[Cc]annot allocate memory|insufficient memory|Resource temporarily unavailable"
)
"""The last one: no thread could be started."""


def _first_error(log: Path) -> str:
    """The first error in a builder's log, or else its last line."""
    last = ""
    with contextlib.suppress(OSError), open(log, encoding="utf-8", errors="replace") as lines:
        for line in lines:
            if line.startswith(("ERROR ", "INTERNAL_ERROR ")):
                return _one_line(line.partition(" ")[2])
            if not line.startswith(("VERBOSE ", "INFO ", "WARNING ")) and line.strip():
                last = line
    return _one_line(last)


def _crash(code: int, graph: Path, log: Path) -> PTQDError:
    """For a builder's process that ended without a word."""
    told = _first_error(log)
    if OUT_OF_MEMORY.search(told) or code == -getattr(signal, "SIGKILL", 9):
        return BackendUnavailable(
            f"the builder of {graph} was ended, most likely because memory ran out: end other programs or build on a larger machine; its log is {log}"
        )
    how = signal.Signals(-code).name if -code in signal.valid_signals() else f"exit code {code}"
    said = f": {told}" if told else ""
    return GraphError(
        f"the builder crashed ({how}) on {graph}{said}: every scale must be a constant and every type one that it serves; its log is {log}"
    )


def _failure(message: str, graph: Path, log: Path) -> str:
    """The one line of a failure that the builder's process told of."""
    told = (_first_error(log) or "it does not say why") if "{told}" in message else ""
    return message.format(graph=graph, log=log, told=told)


class _Failure(Exception):
    """(name of an error type, message with {graph}, {log}, {told}): what the child tells its parent."""


def _child(request: dict[str, Any]) -> None:
    """The builder's process: messages as JSON lines on stdout, the log on stderr, and the end when stdin ends."""
    out = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)  # whatever a library prints belongs into the log
    part = Path(request["part"])

    def end_with_parent() -> None:
        os.read(0, 1)
        with contextlib.suppress(OSError):
            part.unlink(missing_ok=True)
        os._exit(1)

    threading.Thread(target=end_with_parent, daemon=True).start()

    def tell(message: Mapping[str, Any]) -> None:
        with contextlib.suppress(OSError):  # the parent is gone, and so will this process be
            out.write(json.dumps(message) + "\n")
            out.flush()

    try:
        tell(_build(request, part, tell))
    except _Failure as failure:
        tell({"error": failure.args[0], "message": failure.args[1]})
    except PTQDError as error:
        tell({"error": type(error).__name__, "message": _literal(error)})
    except MemoryError:
        tell(
            {"error": "BackendUnavailable", "message": "memory ran out on {graph}: end other programs or build on a larger machine; the log is {log}"}
        )


def _literal(text: object) -> str:
    """`text` on one line, for use in a format string."""
    return _one_line(text).replace("{", "{{").replace("}", "}}")


def _build(request: Mapping[str, Any], part: Path, tell: Callable[[Mapping[str, Any]], None]) -> dict[str, Any]:
    name = request["name"]
    given: dict[str, Any] = {k: tuple(v) if isinstance(v, list) else v for k, v in request["settings"].items()}
    settings = Settings(**given)
    trt = load(name)
    logger = _file_logger(trt)
    start = time.perf_counter()
    try:
        builder = trt.Builder(logger)
    except TypeError as error:  # pybind11's "factory function returned nullptr"
        raise _Failure(
            "BackendUnavailable", f"{name} does not work here: {{told}}: see that the NVIDIA driver is installed; the log is {{log}}"
        ) from error
    typed = getattr(trt.NetworkDefinitionCreationFlag, "STRONGLY_TYPED", None)
    network = builder.create_network(0 if typed is None else 1 << int(typed))
    parser = trt.OnnxParser(network, logger)
    if not parser.parse_from_file(request["graph"]):
        raise _Failure("GraphError", f"{name} cannot read {{graph}}: {_literal(_parse_error(parser))}; the log is {{log}}")
    config = builder.create_builder_config()
    _set_flags(trt, config)
    if settings.optimization_level is not None:
        config.builder_optimization_level = settings.optimization_level
    if settings.workspace_mib is not None:
        config.set_memory_pool_limit(trt.MemoryPoolType.WORKSPACE, settings.workspace_mib << 20)
    if hasattr(trt, "IProgressMonitor"):
        config.progress_monitor = _monitor(trt, tell)
    targets = _set_targets(trt, config, settings.compute_capabilities, request["fp8"])
    _add_profile(builder, network, config, settings)
    cache = Path(request["timing_cache"]) if request["timing_cache"] and name == "tensorrt" else None
    if cache:
        _use_timing_cache(config, cache)
    plan = builder.build_serialized_network(network, config)
    if logger.disk_error is not None:
        raise _Failure("PTQDError", f"cannot write {{log}}: {_literal(logger.disk_error.strerror)}: choose another place or free some space")
    if plan is None:
        if OUT_OF_MEMORY.search(logger.first_error):
            raise _Failure(
                "BackendUnavailable", f"{name} cannot build {{graph}}: {{told}}: end other programs or build on a larger machine; the log is {{log}}"
            )
        tight = settings.workspace_mib is not None and "workspace" in logger.first_error
        advice = "raise tensorrt.workspace_mib" if tight else "keep the layers that it names in float (quantization.skip)"
        raise _Failure("GraphError", f"{name} cannot build {{graph}}: {{told}}: {advice}; the log is {{log}}")
    seconds = time.perf_counter() - start
    if cache:
        with contextlib.suppress(PTQDError):  # the next build is slower, no worse
            write_atomic(cache, bytes(config.get_timing_cache().serialize()))
    try:
        with open(part, "wb") as file:
            file.write(memoryview(plan))
            file.flush()
            os.fsync(file.fileno())
    except OSError as error:
        text = f"cannot write the engine of {plan.nbytes} bytes into {part.parent}: {error.strerror}: choose another place or free some space"
        raise _Failure("PTQDError", _literal(text)) from error
    return {"seconds": seconds, "bytes": plan.nbytes, "peak_bytes": _peak_bytes(), "targets": targets}


def _set_flags(trt: Any, config: Any) -> None:
    """What no setting decides; BUILDER_REVISION stands for it in `key`."""
    config.profiling_verbosity = trt.ProfilingVerbosity.DETAILED
    if hasattr(trt.BuilderFlag, "TF32"):
        config.clear_flag(trt.BuilderFlag.TF32)  # on by default: products of float32 with 10 bits of mantissa
    if hasattr(trt.BuilderFlag, "REQUIRE_USER_ALLOCATION"):
        config.set_flag(trt.BuilderFlag.REQUIRE_USER_ALLOCATION)  # without it, memory taken while running forbids CUDA graphs


def _parse_error(parser: Any) -> str:
    """The first error, with its node."""
    if parser.num_errors == 0:
        return "no reason given"
    error = parser.get_error(0)
    node = f"node {error.node_name()!r} ({error.node_operator()}): " if hasattr(error, "node_name") and error.node_name() else ""
    return node + str(error.desc())


def _peak_bytes() -> int:
    """Most memory of this process; not getrusage's, which starts with what the parent had when it forked."""
    try:
        status = Path("/proc/self/status").read_text()
    except OSError:
        return 0
    match = re.search(r"VmHWM:\s*(\d+) kB", status)
    return int(match[1]) * 1024 if match else 0


def _file_logger(trt: Any) -> Any:
    """A logger that writes "SEVERITY message" to stderr, and never raises: its caller is C++."""

    class FileLogger(trt.ILogger):  # type: ignore[misc]
        def __init__(self) -> None:
            trt.ILogger.__init__(self)
            self.first_error = ""
            self.disk_error: OSError | None = None

        def log(self, severity: Any, message: str) -> None:
            level = severity.name
            if level in ("ERROR", "INTERNAL_ERROR"):
                self.first_error = self.first_error or message
            data = f"{level} {message}\n".encode(errors="replace")
            try:
                while data:
                    data = data[os.write(2, data) :]
            except OSError as error:
                self.disk_error = self.disk_error or error

    return FileLogger()


def _monitor(trt: Any, tell: Callable[[Mapping[str, Any]], None]) -> Any:
    """Tells the fraction done, whenever it has grown by a hundredth, and the phase."""

    class Monitor(trt.IProgressMonitor):  # type: ignore[misc]
        def __init__(self) -> None:
            trt.IProgressMonitor.__init__(self)
            self.progress, self.told = Progress(), -1.0

        def phase_start(self, phase: str, parent: str | None, steps: int) -> None:
            self.progress.start(phase, parent, steps)
            self._tell(phase)

        def phase_finish(self, phase: str) -> None:
            self.progress.finish(phase)

        def step_complete(self, phase: str, step: int) -> bool:
            self.progress.step(phase, step)
            self._tell(phase)
            return True

        def _tell(self, phase: str) -> None:
            if self.progress.fraction >= self.told + 0.01:
                self.told = self.progress.fraction
                tell({"fraction": self.told, "phase": phase})

    return Monitor()


class Progress:
    """The fraction done of nested phases of equal steps; it never falls, though phases within one step may come one after another."""

    def __init__(self) -> None:
        self.fraction = 0.0
        self._phases: dict[str, tuple[float, float]] = {}  # name: (where it begins, what one step is worth)

    def start(self, phase: str, parent: str | None, steps: int) -> None:
        begin, worth = self._phases.get(parent or "", (0.0, 1.0)) if parent else (0.0, 1.0)
        self._phases[phase] = (begin, worth / max(steps, 1))

    def step(self, phase: str, step: int) -> None:
        """Step number `step`, counted from 0, is done."""
        if phase in self._phases:
            begin, worth = self._phases[phase]
            self._phases[phase] = (begin + worth, worth)
            self.fraction = min(1.0, max(self.fraction, begin + worth))

    def finish(self, phase: str) -> None:
        self._phases.pop(phase, None)


def _capabilities(trt: Any) -> dict[str, Any]:
    """{compute capability, such as "8.9": the module's name for it}, of all that TensorRT-RTX knows."""
    members = {n: m for n, m in trt.ComputeCapability.__members__.items() if re.fullmatch(r"SM\d+", n)}
    return {f"{int(n[2:]) // 10}.{int(n[2:]) % 10}": m for n, m in members.items()}


def _choose(trt: Any, wanted: tuple[str, ...], fp8: bool) -> tuple[str, ...]:
    """Compute capabilities to build for: those wanted, or all that the numbers allow."""
    known = _capabilities(trt)
    able = [c for c in known if not fp8 or tuple(map(int, c.split("."))) >= FP8_CAPABILITY]
    for capability in wanted:
        if capability not in able:
            why = "computes in FP8 for" if capability in known else "knows"
            raise RecipeError(f"tensorrt.compute_capabilities holds {capability}: {trt.__name__} {trt.__version__} {why} {', '.join(able)}")
    return wanted or tuple(able)


def _set_targets(trt: Any, config: Any, wanted: tuple[str, ...], fp8: bool) -> tuple[str, ...]:
    """Choose the GPUs; returns their compute capabilities."""
    if not hasattr(config, "set_compute_capability"):
        return (cuda.gpu().capability,)
    chosen, known = _choose(trt, wanted, fp8), _capabilities(trt)
    if not wanted and not fp8:
        return chosen  # the library's own default
    config.num_compute_capabilities = len(chosen)
    for index, capability in enumerate(chosen):
        config.set_compute_capability(known[capability], index)
    return chosen


def _add_profile(builder: Any, network: Any, config: Any, settings: Settings) -> None:
    """One profile, with the settings' rows for every input whose first dimension is dynamic."""
    profile = builder.create_optimization_profile()
    dynamic = False
    for index in range(network.num_inputs):
        tensor = network.get_input(index)
        first, *rest = tuple(tensor.shape) or (1,)
        if -1 in rest:
            raise GraphError(f"input {tensor.name!r} is {tuple(tensor.shape)}: expected a dynamic size in the first dimension only")
        if first == -1:
            dynamic = True
            profile.set_shape(tensor.name, *((n, *rest) for n in settings.rows))
    if dynamic:
        config.add_optimization_profile(profile)


def _use_timing_cache(config: Any, path: Path) -> None:
    """Start from the file's timings, or from none where it is missing, damaged, or of another GPU or version."""
    data = b""
    with contextlib.suppress(OSError):
        data = path.read_bytes()
    for content in dict.fromkeys((data, b"")):
        with contextlib.suppress(TypeError, ValueError, RuntimeError):  # pybind11's ways of saying that there is none
            cache = config.create_timing_cache(content)
            if cache is not None and config.set_timing_cache(cache, False):
                return


# Running


REASONS = {
    "VERSION_MISMATCH": "was built by another version of TensorRT",
    "UNSUPPORTED_CC": "was not built for this GPU",
    "MALFORMED_ENGINE": "is damaged",
}
"""Why an engine does not load, where building it again helps, by the names of `EngineInvalidityDiagnostics`."""
SIGNS = {
    "VERSION_MISMATCH": re.compile(r"[Vv]ersion tag|[Ss]erialized [Ee]ngine [Vv]ersion|SERIALIZATION_VERSION|library version"),
    "UNSUPPORTED_CC": re.compile(r"incompatible device"),
}
"""What TensorRT logs for them."""


@dataclass(frozen=True)
class _Captured:
    """A CUDA graph, and the execution context whose state is a part of it: neither is changed, and they end together."""

    graph: Any
    context: Any


class TrtEngine:
    """An engine file on a GPU, as an `Engine`; `launch` runs it on arrays that are on the GPU already.

    Outputs of a call are fresh arrays that the caller owns. Scratch memory is the device's, shared with its other engines.
    A captured CUDA graph has an execution context of its own: a context's internal state is part of what is captured
    (NVIDIA/TensorRT#3798). One more context serves questions of shape and all runs that are not captured.
    """

    def __init__(self, module: Any, path: Path, device: CudaDevice, *, built: str = "", cache: Path | None = None) -> None:
        """Load `path`.

        Args:
            built: by what and for what it was built, such as "tensorrt-rtx 1.7.1.116 for 8.9", for messages.
            cache: file of the kernels that TensorRT-RTX compiles for this GPU when they first run; one that does not fit is
                ignored, and it is brought up to date by `close`. A file belongs to one engine.
        Raises:
            BundleError: the file is missing or damaged, or does not fit this version or this GPU.
            BackendUnavailable: the driver does not serve the library, or memory ran out.
        """
        self.path, self._trt, self._device, self._cache_file = path, module, device, cache
        self._logger = _memory_logger(module)
        self._captured: OrderedDict[tuple[Buffer, ...], _Captured | None] = OrderedDict()  # by shapes and addresses; None: not captured
        self._held: dict[str, Buffer] = {}
        self._capturable = True
        self._scratch = (0, 0)
        self._cache: Any = None
        self._context: Any = None
        try:
            blob = path.read_bytes()
        except OSError as error:
            raise BundleError(f"{path} cannot be read: {error.strerror}: run with --rebuild") from error
        self._runtime, self._engine = self._deserialize(blob, built)
        self._config = self._configure()
        self._context = self._new_context()
        if self._context is None:
            raise BackendUnavailable(f"{path} cannot be made ready on {device.gpu} ({self._logger.told()}): free some of the GPU's memory")
        trt, engine = module, self._engine
        names = [engine.get_tensor_name(i) for i in range(engine.num_io_tensors)]
        specs = {
            n: TensorSpec(n, DTYPES[engine.get_tensor_dtype(n).name], tuple(None if d < 0 else d for d in engine.get_tensor_shape(n))) for n in names
        }
        self.specs = tuple(specs[n] for n in names if engine.get_tensor_mode(n) == trt.TensorIOMode.INPUT)
        self._outputs = tuple(specs[n] for n in names if engine.get_tensor_mode(n) == trt.TensorIOMode.OUTPUT)
        shapes = {s.name: engine.get_tensor_profile_shape(s.name, 0) for s in self.specs if None in s.shape}
        self.rows = {name: (int(low[0]), int(high[0])) for name, (low, _, high) in shapes.items()}
        """{input: (fewest, most rows)} of the inputs whose first dimension is dynamic."""
        self._need = int(engine.device_memory_size_v2)
        device.reserve(self._need)

    @property
    def inputs(self) -> tuple[str, ...]:
        return tuple(spec.name for spec in self.specs)

    @property
    def outputs(self) -> tuple[str, ...]:
        return tuple(spec.name for spec in self._outputs)

    def _deserialize(self, blob: bytes, built: str) -> tuple[Any, Any]:
        trt = self._trt
        try:
            runtime = trt.Runtime(self._logger)
        except TypeError as error:  # pybind11's "factory function returned nullptr"
            raise BackendUnavailable(
                f"{trt.__name__} {trt.__version__} does not work here ({self._logger.told()}): update the NVIDIA driver"
            ) from error
        engine = runtime.deserialize_cuda_engine(blob)
        if engine is not None:
            return runtime, engine
        told = self._logger.told()
        here = f"this machine has {trt.__name__} {trt.__version__} on {self._device.gpu}"
        if hasattr(runtime, "get_engine_validity"):
            bits = int(runtime.get_engine_validity(blob)[1])
            names = [name for name, member in trt.EngineInvalidityDiagnostics.__members__.items() if int(member.value) & bits]
        else:
            names = [name for name, sign in SIGNS.items() if sign.search(told)]
            if not names and not OUT_OF_MEMORY.search(told) and not re.search("CUDA|[Cc]uda", told):
                names = ["MALFORMED_ENGINE"]
        for name, reason in REASONS.items():
            if name in names:
                raise BundleError(f"{self.path} {reason}: {f'it was built by {built}, ' if built else ''}{here}: run with --rebuild")
        why = ", ".join(names) or "no diagnosis"
        raise BackendUnavailable(f"{self.path} does not load ({why}: {told}), {here}: update the NVIDIA driver, or free some of the GPU's memory")

    def _configure(self) -> Any:
        """What all execution contexts are made from: a runtime configuration, or without one an allocation strategy."""
        trt, strategy = self._trt, self._trt.ExecutionContextAllocationStrategy.USER_MANAGED
        if not hasattr(self._engine, "create_runtime_config"):
            return strategy
        config = self._engine.create_runtime_config()
        config.set_execution_context_allocation_strategy(strategy)
        if hasattr(trt, "DynamicShapesKernelSpecializationStrategy"):
            # Not lazily: kernels that change during a run change its last bits, and a CUDA graph would keep the slow ones.
            config.dynamic_shapes_kernel_specialization_strategy = trt.DynamicShapesKernelSpecializationStrategy.EAGER
        if hasattr(config, "create_runtime_cache"):
            self._cache = config.create_runtime_cache()  # without a file too: what one context compiled, the next need not
            with contextlib.suppress(OSError):
                if self._cache_file is not None:
                    self._cache.deserialize(self._cache_file.read_bytes())  # says False where it does not fit, and stays empty
            config.set_runtime_cache(self._cache)
        return config

    def _new_context(self) -> Any:
        """None where it cannot be made."""
        return self._engine.create_execution_context(self._config)

    def __call__(self, feeds: Feeds) -> dict[str, Array]:
        """Run on `feeds`, which hold at least `inputs`.

        Raises:
            GraphError: an input is missing, or has the wrong dtype or shape; or the run failed.
            BackendUnavailable: the engine is closed, memory ran out, or the GPU failed.
        """
        self._check_open()
        for spec in self.specs:
            self._check_feed(spec, feeds)
        buffers = {}
        for spec in self.specs:
            value = feeds[spec.name]
            buffers[spec.name] = self._hold(spec, value.shape)
            self._device.write(buffers[spec.name], value)
        self._set_shapes(self._context, buffers)
        for spec in self._outputs:
            buffers[spec.name] = self._hold(spec, tuple(self._context.get_tensor_shape(spec.name)))
        self.launch(buffers)
        return {name: self._device.read(buffers[name]) for name in self.outputs}

    def _check_open(self) -> None:
        if self._context is None:
            raise BackendUnavailable(f"the engine of {self.path} is closed: open it again")

    def _check_feed(self, spec: TensorSpec, feeds: Feeds) -> None:
        value = feeds.get(spec.name)
        if value is None:
            raise GraphError(f"{self.path} needs the input {spec.name!r}: got {', '.join(feeds) or 'none'}")
        self._check_shape(spec, value.dtype.name, value.shape)

    def _check_shape(self, spec: TensorSpec, dtype: str, got: tuple[int, ...]) -> None:
        fits = len(got) == len(spec.shape) and all(want in (None, d) for want, d in zip(spec.shape, got, strict=True))
        if dtype != spec.dtype or not fits:
            shape = "(" + ", ".join("any" if d is None else str(d) for d in spec.shape) + ")"
            raise GraphError(f"{self.path} takes {spec.name!r} as {spec.dtype} {shape}: got {dtype} {got}")
        low, high = self.rows.get(spec.name, (0, sys.maxsize))
        if got and not low <= got[0] <= high:
            raise GraphError(
                f"{self.path} was built for {low} to {high} rows: {spec.name!r} has {got[0]}: "
                "choose another batch size, or build with other tensorrt.batch_sizes"
            )

    def _hold(self, spec: TensorSpec, shape: tuple[int, ...]) -> Buffer:
        """The engine's own memory for a tensor; it grows and never shrinks."""
        held = self._held.get(spec.name)
        if held is None or held.nbytes < Buffer(0, shape, spec.dtype).nbytes:
            if held is not None:
                del self._held[spec.name]
                self._device.free(held)
            held = self._held[spec.name] = self._device.empty(shape, spec.dtype)
        return dataclasses.replace(held, shape=shape)

    def launch(self, buffers: Mapping[str, Buffer]) -> None:
        """Queue a run on arrays on the GPU: `buffers` hold at least `inputs` and `outputs`, which are written when the stream gets there.

        Shapes and addresses that come a second time are captured as a CUDA graph, where that is possible, and replayed from then on.

        Raises:
            GraphError: a buffer is missing, or has the wrong dtype or shape; or the run cannot be queued.
            BackendUnavailable: the engine or its device is closed, or the GPU failed.
        """
        self._check_open()
        self._follow_scratch()
        try:
            key = tuple(buffers[spec.name] for spec in (*self.specs, *self._outputs))
        except KeyError as error:
            raise GraphError(f"{self.path} needs a buffer {error.args[0]!r}: got {', '.join(buffers) or 'none'}") from error
        captured = self._captured.get(key)
        if captured is not None:
            self._captured.move_to_end(key)
            self._device.replay(captured.graph)
            return
        for spec, buffer in zip((*self.specs, *self._outputs), key, strict=True):
            self._check_shape(spec, buffer.dtype, buffer.shape)
        fresh = self._capturing_context() if key in self._captured and self._capturable else None
        context = fresh or self._context
        self._bind(context, buffers)
        if not self._enqueue(context):
            raise GraphError(f"{self.path} failed to run: {self._logger.told()}")
        # After a run of the same context: what the library does once for new shapes must not be captured.
        self._captured[key] = None if fresh is None else self._capture(fresh)
        self._captured.move_to_end(key)
        while len(self._captured) > GRAPHS:
            self._drop(self._captured.popitem(last=False)[1])

    def _follow_scratch(self) -> None:
        """Take the device's scratch as it is now; where it moved, the graphs hold the old address.

        Raises:
            BackendUnavailable: it is smaller than this engine needs.
        """
        ptr, size = self._device.scratch
        if size < self._need:
            raise BackendUnavailable(
                f"{self.path} needs {self._need} bytes of scratch memory, the device holds {size}: open the device and engines again"
            )
        if (ptr, size) != self._scratch:
            self._drop_captured()
            self._scratch = (ptr, size)
            self._share_scratch(self._context)

    def _share_scratch(self, context: Any) -> None:
        if self._scratch[0]:
            context.set_device_memory(*self._scratch)

    def _capturing_context(self) -> Any:
        """A new context for one graph, or None, after which none is tried again: there is work without graphs too."""
        context = self._new_context()
        if context is None:
            self._logger.told()
            self._capturable = False
        else:
            self._share_scratch(context)
        return context

    def _bind(self, context: Any, buffers: Mapping[str, Buffer]) -> None:
        self._set_shapes(context, buffers)
        for spec in self._outputs:
            made = tuple(context.get_tensor_shape(spec.name))
            if made != buffers[spec.name].shape:
                raise GraphError(f"{self.path} makes {spec.name!r} of shape {made} from these inputs: got a buffer of {buffers[spec.name].shape}")
        for name in (*self.inputs, *self.outputs):
            context.set_tensor_address(name, buffers[name].ptr)

    def _set_shapes(self, context: Any, buffers: Mapping[str, Buffer]) -> None:
        for spec in self.specs:
            if None in spec.shape and not context.set_input_shape(spec.name, buffers[spec.name].shape):
                raise GraphError(f"{self.path} does not take {spec.name!r} of shape {buffers[spec.name].shape}: {self._logger.told()}")

    def _enqueue(self, context: Any) -> bool:
        return bool(context.execute_async_v3(self._device.stream))

    def _capture(self, context: Any) -> _Captured | None:
        """A graph of one run, or None, after which none is tried again."""
        able = not hasattr(context, "is_stream_capturable") or context.is_stream_capturable(self._device.stream)
        graph = self._device.capture(lambda: self._enqueue(context)) if able else None
        if graph is not None:
            return _Captured(graph, context)
        self._capturable = False
        self._device.synchronize()  # the context, which goes now, has work under way
        return None

    def _drop(self, captured: _Captured | None) -> None:
        """The graph, once it has run; the context goes with the last reference to it."""
        if captured is not None:
            self._device.drop(captured.graph)

    def _drop_captured(self) -> None:
        while self._captured:
            self._drop(self._captured.popitem()[1])

    def close(self) -> None:
        """Free the engine and save its cache; a second call does nothing."""
        if self._context is None:
            return
        with contextlib.suppress(BackendUnavailable):  # after a failure of the GPU nothing can be freed
            self._device.synchronize()
            self._drop_captured()
            for buffer in self._held.values():
                self._device.free(buffer)
        self._held = {}
        self._save_cache()
        # In this order: each belongs to the next.
        self._captured.clear()
        self._context = None
        self._config = None
        self._cache = None
        self._engine = None
        self._runtime = None

    def _save_cache(self) -> None:
        """A cache that cannot be written only makes the next start slower."""
        if self._cache is None or self._cache_file is None:
            return
        blob = self._cache.serialize()
        data = b"" if blob is None else bytes(memoryview(blob))
        with contextlib.suppress(PTQDError, OSError):
            if data and not (self._cache_file.is_file() and self._cache_file.read_bytes() == data):
                self._cache_file.parent.mkdir(parents=True, exist_ok=True)
                write_atomic(self._cache_file, data)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self.close()


def _memory_logger(trt: Any) -> Any:
    """A logger that keeps the errors since they were last told, and prints nothing."""

    class MemoryLogger(trt.ILogger):  # type: ignore[misc]
        def __init__(self) -> None:
            trt.ILogger.__init__(self)
            self._errors: list[str] = []

        def log(self, severity: Any, message: str) -> None:
            if severity.name in ("ERROR", "INTERNAL_ERROR"):
                self._errors.append(_one_line(message))

        def told(self) -> str:
            """The first error since the last call."""
            first, self._errors = (self._errors or ["it does not say why"])[0], []
            return first

    return MemoryLogger()
