"""What two runtimes compute from the same inputs, compared by Polygraphy.

Two right executions of one quantized network drift apart until their difference is as large as the quantization noise: a
rounding that flips moves its neighbourhood, and more flip. So the figures of a whole network only say that two engines are
not of different networks; they are a judgement where the compared graph is one layer, or float.
"""

from __future__ import annotations

import contextlib
import os
import re
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from ..engine import Array, Engine, Feeds
from ..errors import BackendUnavailable, GraphError, ParityError, PTQDError
from .ort import OrtEngine


@dataclass(frozen=True)
class Difference:
    """How far an engine's output lies from the reference's, the worst of all feeds.

    Attributes:
        engine, output: names.
        snr: dB, power of the reference's output over that of the difference; inf where they are equal.
        max_abs: largest absolute difference.
        size: elements of all feeds.
        apart: of those, how many differ by more than rounding; 0 where no steps were given.
        largest_steps: largest difference of those, in quantization steps.
    """

    engine: str
    output: str
    snr: float
    max_abs: float
    size: int
    apart: int = 0
    largest_steps: float = 0.0


def compare(
    engines: Mapping[str, Callable[[], Engine] | Path],
    feeds: Sequence[Feeds],
    outputs: Sequence[str] | None = None,
    steps: Mapping[str, npt.NDArray[np.float64]] | None = None,
    rounding: float = 0.0,
) -> list[Difference]:
    """Run all engines on every one of `feeds`, and compare each to the first, the reference.

    Args:
        engines: opened here and closed again. A path is an ONNX graph, which ONNX Runtime runs on the CPU as it stands,
            without optimisations.
        feeds: hold all inputs of all engines.
        outputs: names; all of the reference's if None.
        steps: one quantization step of an output, of its rank, with the channels along one axis.
        rounding: what floats may differ by and still count as equal, relative to the channel's largest value, or its step if that is larger.
    Returns:
        engine by engine, in the order of the outputs.
    Raises:
        BackendUnavailable: Polygraphy is not installed.
        GraphError: fewer than two engines, no feeds, an input or output is missing, or a graph cannot run.
        ParityError: an output is not finite, or has another shape than the reference's.
    """
    polygraphy = load()
    if len(engines) < 2 or not feeds:
        raise GraphError(f"got {len(engines)} engines and {len(feeds)} feeds: give at least two engines and one feed")
    names = list(engines)
    runners = [_runner(name, source, feeds[0]) for name, source in engines.items()]
    found: dict[tuple[str, str], Difference] = {}
    pairs = [(0, i) for i in range(1, len(names))]
    run = polygraphy.Comparator.run(runners, data_loader=[dict(feed) for feed in feeds], streaming=True)
    with _quiet(), contextlib.closing(run):
        for single in run:
            results = {name: iterations[0] for name, iterations in single}
            wanted = list(results[names[0]]) if outputs is None else list(outputs)
            for name in names:
                _check(name, results, wanted, names[0])
            select = partial(_select, wanted)
            functions = [
                polygraphy.SnrCompareFunc(find_output_func=select),
                polygraphy.SimpleCompareFunc(check_error_stat="max", find_output_func=select),
            ]
            by_snr, by_size = polygraphy.Comparator.compare_accuracy(single, comparisons=pairs, compare_func=functions)
            for name in names[1:]:
                for output in wanted:
                    value, expected = results[name][output], results[names[0]][output]
                    apart = np.zeros(1) if steps is None else _steps_apart(value, expected, steps[output], rounding)
                    one = Difference(
                        name,
                        output,
                        by_snr[names[0], name][0][output].snr,
                        by_size[names[0], name][0][output].max_absdiff,
                        value.size,
                        int((apart > 0).sum()),
                        float(apart.max()),
                    )
                    found[name, output] = _worst(found.get((name, output)), one)
    return list(found.values())


def _worst(old: Difference | None, new: Difference) -> Difference:
    if old is None:
        return new
    return Difference(
        new.engine,
        new.output,
        min(old.snr, new.snr),
        max(old.max_abs, new.max_abs),
        old.size + new.size,
        old.apart + new.apart,
        max(old.largest_steps, new.largest_steps),
    )


def _steps_apart(got: Array, expected: Array, step: npt.NDArray[np.float64], rounding: float) -> npt.NDArray[np.float64]:
    """By how many quantization steps two outputs differ; 0 where rounding explains it."""
    reference = np.asarray(expected, np.float64)
    others = tuple(i for i, n in enumerate(step.shape) if n == 1)
    tolerance = rounding * np.maximum(np.abs(reference).max(axis=others, keepdims=True), step)
    difference = np.abs(np.asarray(got, np.float64) - reference)
    return np.asarray(np.where(difference > tolerance, difference / step, 0.0))


def parser_verdict(backend: str, graph: Path) -> str:
    """What the parser of "tensorrt" or "tensorrt-rtx" says of a graph: "ok", or the first thing that it refuses.

    In a process of its own: Polygraphy chooses between the two for a whole process, and the parser may end it. Needs no GPU.
    """
    tool = "import sys; from polygraphy.tools._main import main; sys.exit(main())"
    with tempfile.TemporaryDirectory() as folder:
        words = [sys.executable, "-c", tool, "inspect", "capability", str(graph.resolve()), "-o", folder]
        rtx = {"POLYGRAPHY_USE_TENSORRT_RTX": "1" if backend == "tensorrt-rtx" else "0"}
        done = subprocess.run(words, env={**os.environ, **rtx}, cwd=folder, capture_output=True, text=True)
        if done.returncode == 0 and "Graph is fully supported" in done.stdout:
            return "ok"
        results = Path(folder) / "results.txt"
        refused = re.search(r"In node \d+ with name: .*", results.read_text() if results.is_file() else "")
    return " ".join((refused[0] if refused else f"the parser ended with {done.returncode}: {done.stderr}").split())[:300]


def _select(wanted: Sequence[str], output: str, index: int, result: Any) -> list[str]:
    """Polygraphy's find_output_func: an output is compared with its namesake."""
    return [output] if output in wanted else []


def load() -> Any:
    """The module polygraphy.comparator.

    Raises:
        BackendUnavailable: Polygraphy is not installed.
    """
    try:
        import polygraphy.comparator
    except ImportError as error:
        raise BackendUnavailable(f"comparing backends needs polygraphy ({error}): pip install 'ptqd-export[verify]'") from error
    return polygraphy.comparator


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Polygraphy prints nothing; what goes wrong in it or in the runtimes it calls is a GraphError."""
    from polygraphy.logger import G_LOGGER

    with G_LOGGER.verbosity(G_LOGGER.CRITICAL + 1):
        try:
            yield
        except PTQDError:
            raise
        except Exception as error:  # PolygraphyException, or anything of a runtime
            raise GraphError(f"the comparison failed: {' '.join(str(error).split())}") from error


def _runner(name: str, source: Callable[[], Engine] | Path, feed: Feeds) -> Any:
    """A Polygraphy runner of that name; the dtypes of an engine's inputs are those of `feed`."""
    if isinstance(source, Path):
        from polygraphy.backend.onnxrt import OnnxrtRunner

        # Not its SessionFromOnnx, whose private threads ONNX Runtime refuses beside this process's shared pool.
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
                    raise GraphError(f"{self.name} needs the input {tensor!r}: got {', '.join(feed) or 'none'}")
                metadata.add(tensor, feed[tensor].dtype, [None] * feed[tensor].ndim)
            return metadata

        def infer_impl(self, feed_dict: Feeds) -> dict[str, Array]:
            start = time.perf_counter()
            outputs = self.engine(feed_dict)
            self.inference_time = time.perf_counter() - start
            return outputs

        def deactivate_impl(self) -> None:
            self.engine.close()

    return EngineRunner(name=name)


def _check(name: str, results: Mapping[str, Any], wanted: Sequence[str], reference: str) -> None:
    """Raise GraphError or ParityError where there is nothing to compare."""
    for output in wanted:
        if output not in results[name]:
            raise GraphError(f"{name} has no output {output!r}: got {', '.join(results[name])}")
        value, expected = results[name][output], results[reference][output]
        if not np.isfinite(value).all():
            raise ParityError(f"{name} computes NaN or infinite values in {output!r}: this backend cannot run this graph")
        if value.shape != expected.shape:
            raise ParityError(f"{name} gives {output!r} the shape {value.shape}, {reference} {expected.shape}: they do not run the same graph")
