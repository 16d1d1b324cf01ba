"""A thin layer over Polygraphy: compare engines on the same inputs, and ask a parser for its verdict."""

from __future__ import annotations

import contextlib
import os
import re
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from ..backends import OrtEngine
from ..core.backend import TENSORRT_RTX, install_hint
from ..core.engine import Array, Engine, Feeds
from ..errors import BackendUnavailable, GraphError, ParityError, PTQDError

Source = Callable[[], Engine] | Path
"""An engine, opened when it is needed, or an ONNX graph, which ONNX Runtime runs on the CPU as written."""


@dataclass(frozen=True)
class Result:
    """What two engines compute from one set of feeds.

    Attributes:
        outputs: {engine: {output: array}}.
        snr: {output: signal-to-noise ratio in dB}: the power of the first engine's output over that of its
            difference from the second's; inf where they are equal.
    """

    outputs: Mapping[str, Mapping[str, Array]]
    snr: Mapping[str, float]


def compare(engines: Mapping[str, Source], feeds: Sequence[Feeds]) -> Iterator[Result]:
    """Run two engines on each of `feeds`, which hold all of their inputs; the first is the reference.

    Raises:
        BackendUnavailable: Polygraphy is not installed.
        GraphError: there are not two engines, or no feeds; an input or output is missing; or a graph cannot
            run.
        ParityError: an output is not finite, or has another shape than the reference's.
    """
    comparator = load()
    if len(engines) != 2 or not feeds:
        raise GraphError(
            f"got {len(engines)} engines and {len(feeds)} feeds: give two engines and at least one feed"
        )
    reference, other = engines
    runners = [_runner(name, source, feeds[0]) for name, source in engines.items()]
    run = comparator.Comparator.run(runners, data_loader=[dict(feed) for feed in feeds], streaming=True)
    with _quiet(), contextlib.closing(run):
        for single in run:
            outputs = {name: iterations[0] for name, iterations in single}
            wanted = list(outputs[reference])
            _check(other, outputs, wanted, reference)
            _check(reference, outputs, wanted, reference)
            snr = comparator.SnrCompareFunc(find_output_func=partial(_namesake, wanted))
            (by_pair,) = comparator.Comparator.compare_accuracy(
                single, comparisons=[(0, 1)], compare_func=[snr]
            )
            found = by_pair[reference, other][0]
            arrays = {name: {o: np.asarray(outputs[name][o]) for o in wanted} for name in engines}
            yield Result(arrays, {output: float(found[output].snr) for output in wanted})


def parser_verdict(backend: str, graph: Path) -> str:
    """What the parser of a TensorRT backend says of a graph: "ok", or the first thing that it refuses.

    It runs in a process of its own: Polygraphy chooses between the two libraries for a whole process, and the
    parser may end the process. It needs no GPU.
    """
    tool = "import sys; from polygraphy.tools._main import main; sys.exit(main())"
    with tempfile.TemporaryDirectory() as folder:
        words = [sys.executable, "-c", tool, "inspect", "capability", str(graph.resolve()), "-o", folder]
        rtx = {"POLYGRAPHY_USE_TENSORRT_RTX": "1" if backend == TENSORRT_RTX else "0"}
        done = subprocess.run(words, env={**os.environ, **rtx}, cwd=folder, capture_output=True, text=True)
        if done.returncode == 0 and "Graph is fully supported" in done.stdout:
            return "ok"
        results = Path(folder) / "results.txt"
        refused = re.search(r"In node \d+ with name: .*", results.read_text() if results.is_file() else "")
    told = refused[0] if refused else f"the parser ended with {done.returncode}: {done.stderr}"
    return " ".join(told.split())[:300]


def load() -> Any:
    """Import the module polygraphy.comparator.

    Raises:
        BackendUnavailable: Polygraphy is not installed.
    """
    try:
        import polygraphy.comparator
    except ImportError as error:
        raise BackendUnavailable(
            f"comparing backends needs polygraphy ({error}): {install_hint('verify')}"
        ) from error
    return polygraphy.comparator


def _namesake(wanted: Sequence[str], output: str, index: int, result: Any) -> list[str]:
    """Polygraphy's find_output_func: compare an output with the output of the same name."""
    return [output] if output in wanted else []


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Silence Polygraphy, and turn its errors and those of the runtimes that it calls into GraphError."""
    from polygraphy.logger import G_LOGGER

    with G_LOGGER.verbosity(G_LOGGER.CRITICAL + 1):
        try:
            yield
        except PTQDError:
            raise
        except Exception as error:  # PolygraphyException, or anything that a runtime raises
            raise GraphError(f"the comparison failed: {' '.join(str(error).split())}") from error


def _runner(name: str, source: Source, feed: Feeds) -> Any:
    """A Polygraphy runner of that name; the dtypes of an engine's inputs are those of `feed`."""
    if isinstance(source, Path):
        from polygraphy.backend.onnxrt import OnnxrtRunner

        # Not SessionFromOnnx: ONNX Runtime refuses its private threads beside this process's shared pool.
        return OnnxrtRunner(lambda: OrtEngine(source, optimise=False).session, name=name)
    from polygraphy.backend.base import BaseRunner
    from polygraphy.common import TensorMetadata

    opened = source

    class EngineRunner(BaseRunner):  # type: ignore[misc]  # polygraphy ships no types
        def activate_impl(self) -> None:
            self.engine = opened()

        def get_input_metadata_impl(self) -> Any:
            metadata = TensorMetadata()
            for tensor in self.engine.inputs:
                if tensor not in feed:
                    raise GraphError(
                        f"{self.name} needs the input {tensor!r}: got {', '.join(feed) or 'none'}"
                    )
                metadata.add(tensor, feed[tensor].dtype, [None] * feed[tensor].ndim)
            return metadata

        def infer_impl(self, feed_dict: Feeds) -> dict[str, Array]:
            self.inference_time = 0.0  # Polygraphy requires one; `core.timing` does the measuring
            return self.engine(feed_dict)

        def deactivate_impl(self) -> None:
            self.engine.close()

    return EngineRunner(name=name)


def _check(name: str, results: Mapping[str, Any], wanted: Sequence[str], reference: str) -> None:
    """Raise GraphError or ParityError where outputs cannot be compared."""
    for output in wanted:
        if output not in results[name]:
            raise GraphError(f"{name} has no output {output!r}: got {', '.join(results[name])}")
        value, expected = results[name][output], results[reference][output]
        if not np.isfinite(value).all():
            raise ParityError(
                f"{name} computes NaN or infinite values in {output!r}: this backend cannot run this graph"
            )
        if value.shape != expected.shape:
            raise ParityError(
                f"{name} gives {output!r} the shape {value.shape}, {reference} {expected.shape}: "
                "they do not run the same graph"
            )
