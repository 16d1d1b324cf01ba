"""Build engines: the side of the caller, who starts a builder's process and puts into words what came of it.

An engine is not byte-reproducible: `library.key` identifies what it was built from.
"""

from __future__ import annotations

import contextlib
import itertools
import json
import os
import signal
import subprocess
import sys
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path

from ...core.engine_build import EngineBuild, EngineSettings
from ...errors import BackendUnavailable, GraphError, PTQDError, RecipeError
from ...typed import to_plain
from . import child
from .child import Built, Failure, Inspected, Progressed, Request, Trouble, decode
from .logs import OUT_OF_MEMORY, SILENT, first_error
from .plan import read_memory, read_plan

# The child's modules are looked for where its parent's are, wherever this package stands.
_CHILD = (
    "import json, sys; sys.path[:], request = json.loads(sys.stdin.buffer.readline()); "
    f"from {child.__name__} import main; main(request)"
)
Advance = Callable[[float, str], None]


def build(
    name: str,
    graph: Path,
    engine: Path,
    settings: EngineSettings,
    *,
    key: str,
    quantized: Mapping[str, str],
    log: Path,
    variants: Iterable[Path] = (),
    timing_cache: Path | None = None,
    advance: Advance = lambda fraction, phase: None,
) -> EngineBuild:
    """Build an engine file from an ONNX graph, whole or not at all.

    The builder runs in a process of its own, because a graph that it cannot compile may crash it. That
    process ends with this one.

    Args:
        key: of the engine, as `library.key` gives it.
        quantized: {node name: "int8" or "fp8"} of the nodes that are meant to run in 8 bits.
        log: where the builder's whole log goes (about a megabyte); kept after a failure too. A variant's is
            beside it.
        variants: graphs of the same codes and the same node names, tried in turn where the library refuses
            the graph, or runs nothing in 8 bits of what was meant to.
        timing_cache: file of measured kernel times, used and brought up to date; one that does not fit is
            replaced. TensorRT-RTX has none.
        advance: told (fraction done, phase).
    Raises:
        GraphError: the library cannot read or compile the graph, nor any variant; the line is about the
            graph.
        RecipeError: a compute capability that it does not know.
        BackendUnavailable: it is not installed, does not work here, or memory ran out.
        PTQDError: a file cannot be written.
    """
    kept: _Attempt | None = None
    refusal: GraphError | None = None  # of the graph itself
    parts: list[Path] = []
    try:
        for i, candidate in enumerate(itertools.chain((graph,), variants)):
            part = engine.with_name(f".{engine.name}.{os.getpid()}{f'.{i}' if i else ''}.part")
            own_log = log.with_name(f"{log.stem}.{candidate.stem}{log.suffix}") if i else log
            parts.append(part)
            request = Request(
                name,
                str(candidate.resolve()),
                str(part.resolve()),
                settings,
                dict(quantized),
                None if timing_cache is None else str(timing_cache.resolve()),
            )
            try:
                made = _run_builder(request, candidate, own_log, key, advance)
            except GraphError as error:
                refusal = refusal if i else error
                continue
            if kept is None or not made.plan.is_float:
                kept = _Attempt(part, candidate.stem if i else "", made)
            if not made.plan.is_float:
                break
        if kept is None:
            assert refusal is not None  # nothing was kept, not of the graph itself either
            raise refusal
        os.replace(kept.part, engine)
    except OSError as error:
        raise PTQDError(
            f"cannot write {error.filename or engine}: {error.strerror}: choose another place or free some "
            "space"
        ) from error
    finally:
        for part in parts:
            with contextlib.suppress(OSError):
                part.unlink(missing_ok=True)
    return replace(kept.build, variant=kept.variant, notes=_notes(kept, refusal, len(parts) - 1))


@dataclass(frozen=True)
class _Attempt:
    """An engine in a file of its own, and which variant of the graph it came from."""

    part: Path
    variant: str
    build: EngineBuild


def _notes(kept: _Attempt, refusal: GraphError | None, variants: int) -> tuple[str, ...]:
    """What a user should know of an engine: it came from a variant, or nothing in it runs in 8 bits."""
    notes = []
    if kept.variant:
        why = f"refused ({refusal})" if refusal else "built with nothing in 8 bits"
        notes.append(f"the graph as it is was {why}: this engine is of its variant {kept.variant}")
    plan = kept.build.plan
    if plan.is_float:
        first, told = next(iter(plan.fell_back.items()))
        tried = f", nor does it in {variants} variants of the graph" if variants else ""
        notes.append(
            f"NOTHING RUNS IN 8 BITS of what was meant to: {plan.meant} layers, the first of them {first} "
            f"({told}){tried}; the engine is right, but no smaller or faster for its precision"
        )
    return tuple(notes)


def _run_builder(request: Request, graph: Path, log: Path, key: str, advance: Advance) -> EngineBuild:
    """One builder's process, to its end; the engine is in the request's part.

    Raises:
        PTQDError: as `build`.
        OSError: the log cannot be written.
    """
    code, records = _run_child(request, log, advance)
    built = next((record for record in records if isinstance(record, Built)), None)
    if built is None:
        failure = next((record for record in records if isinstance(record, Failure)), None)
        raise _crash(code, graph, log) if failure is None else _in_words(failure, request, graph, log)
    with open(log, encoding="utf-8", errors="replace") as lines:
        plan = read_plan(lines, request.quantized)
    with open(log, encoding="utf-8", errors="replace") as lines:
        memory = read_memory(lines)
    inspected = next((record for record in records if isinstance(record, Inspected)), None)
    if inspected is not None:
        plan = inspected.plan if inspected.plan.types else plan
        memory = inspected.memory.or_else(memory)
    return EngineBuild(
        key,
        built.targets,
        request.settings,
        round(built.seconds, 2),
        built.peak_bytes,
        plan,
        memory.weights,
        memory.scratch,
    )


def _run_child(
    request: Request, log: Path, advance: Advance
) -> tuple[int, list[Built | Inspected | Failure]]:
    """(exit code, what it sent) of a builder's process; it is gone when this returns or raises."""
    records: list[Built | Inspected | Failure] = []
    # A session of its own: Ctrl-C comes to this process alone, which then ends the other.
    with (
        open(log, "wb") as sink,
        subprocess.Popen(
            [sys.executable, "-P", "-c", _CHILD],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=sink,
            start_new_session=True,
        ) as process,
    ):
        assert process.stdin is not None and process.stdout is not None
        try:
            process.stdin.write(json.dumps([sys.path, to_plain(request)]).encode() + b"\n")
            process.stdin.flush()
            for line in process.stdout:
                record = decode(line)
                if isinstance(record, Progressed):
                    advance(record.fraction, record.phase)
                elif record is not None:
                    records.append(record)
        except BrokenPipeError:
            pass  # it ended before it read the request: its exit code tells more
        except BaseException:
            process.kill()
            process.wait()  # leaving the block does not, after Ctrl-C
            raise
    return process.returncode, records


def _crash(code: int, graph: Path, log: Path) -> PTQDError:
    """For a builder's process that ended without a word."""
    told = first_error(log)
    if OUT_OF_MEMORY.search(told) or code == -getattr(signal, "SIGKILL", 9):
        return BackendUnavailable(
            f"the builder of {graph} was ended, most likely because memory ran out: end other programs or "
            f"build on a larger machine; its log is {log}"
        )
    how = signal.Signals(-code).name if -code in signal.valid_signals() else f"exit code {code}"
    said = f": {told}" if told else ""
    return GraphError(
        f"the builder crashed ({how}) on {graph}{said}: every scale must be a constant and every type one "
        f"that it serves; its log is {log}"
    )


def _in_words(failure: Failure, request: Request, graph: Path, log: Path) -> PTQDError:
    """The one line of a failure that the builder's process told of."""
    name, where, told = request.name, f"; the log is {log}", failure.text or SILENT
    more_memory = "end other programs or build on a larger machine"
    match failure.trouble:
        case Trouble.LIBRARY:
            return BackendUnavailable(told)
        case Trouble.TARGET:
            return RecipeError(told)
        case Trouble.DRIVER:
            return BackendUnavailable(
                f"{name} does not work here: {told}: see that the NVIDIA driver is installed{where}"
            )
        case Trouble.GRAPH:
            node = f"node {failure.node!r} ({failure.operator}): " if failure.node else ""
            return GraphError(f"{name} cannot read {graph}: {node}{told}{where}")
        case Trouble.INPUT:
            return GraphError(
                f"input {failure.node!r} of {graph} is {told}: expected a dynamic size in the first "
                "dimension only"
            )
        case Trouble.SETTING:
            return GraphError(f"{name} refuses {told} for {graph}: {first_error(log) or SILENT}{where}")
        case Trouble.BUILD:
            advice = "keep the layers that it names in float (quantization.skip)"
            return GraphError(f"{name} cannot build {graph}: {told}: {advice}{where}")
        case Trouble.WORKSPACE:
            return GraphError(f"{name} cannot build {graph}: {told}: raise tensorrt.workspace_mib{where}")
        case Trouble.MEMORY:
            return BackendUnavailable(f"memory ran out on {graph} ({told}): {more_memory}{where}")
        case Trouble.LOG:
            return PTQDError(f"cannot write {log}: {told}: choose another place or free some space")
        case Trouble.ENGINE:
            return PTQDError(
                f"cannot write the engine of {failure.wanted} bytes into {Path(request.part).parent}: "
                f"{told}: choose another place or free some space"
            )
