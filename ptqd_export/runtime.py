"""Runtime: samples from a bundle, switching engines across timesteps by its plan. Needs neither torch nor diffusers for ort-cpu."""

from __future__ import annotations

import contextlib
import itertools
import multiprocessing
import signal
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass
from pathlib import Path
from typing import Self

import numpy as np
import numpy.typing as npt

from .bundle import Bundle
from .engine import Array, Engine
from .errors import BackendUnavailable, BundleError, ModelError
from .plan import Plan
from .precision import Precision
from .sampler import sample

F64 = npt.NDArray[np.float64]


@dataclass(frozen=True)
class Asked:
    """Sampler settings a caller asks for; None takes what the bundle holds."""

    n_steps: int | None = None
    eta: float | None = None
    guidance_scale: float | None = None
    solver: str | None = None

    def check(self, bundle: Bundle) -> None:
        """The tables are valid only for what they were measured on (science.md, notation).

        Raises:
            BundleError: another setting is asked for; the line says what the bundle holds and how to rebuild.
        """
        m = bundle.manifest
        held = {"n_steps": len(m.schedule), "eta": m.schedule.eta, "guidance_scale": m.guidance_scale, "solver": m.solver}
        for name, value in held.items():
            asked = getattr(self, name)
            if asked is not None and asked != value:
                option = "--" + name.replace("_", "-")
                raise BundleError(
                    f"{name} {asked} was asked for, but {bundle.path} was measured for {name} {value}: "
                    f"leave it out, or rebuild with `ptqd-export build ... {option} {asked}`"
                )


class Runtime:
    """All engines of a plan, warm, on one shared thread pool; a context manager.

    Args:
        bundle: opened bundle.
        backend: "ort-cpu", or "torch" for the simulated reference.
        plan: another plan over the bundle's precisions, e.g. for comparisons; the bundle's own if None.
        model: where the torch backend finds the model it simulates; the recipe's path if None.
    Raises:
        BackendUnavailable, BundleError.
    """

    def __init__(self, bundle: Bundle, backend: str = "ort-cpu", plan: Plan | None = None, model: Path | None = None) -> None:
        self.bundle, self.backend = bundle, backend
        self.plan = bundle.manifest.plan if plan is None else plan
        self.engines: dict[Precision, Engine] = {}
        try:
            if backend == "torch":
                from .reference import simulated_engines

                self.engines.update(simulated_engines(bundle, self.plan.precisions, model))
            else:
                from .backends import open_engine

                for precision in self.plan.precisions:
                    self.engines[precision] = open_engine(backend, bundle.file(bundle.manifest.artifact(precision, backend).file))
        except BaseException:
            self.close()
            raise

    def sample(
        self,
        indices: Sequence[int],
        labels: Sequence[int] | None = None,
        *,
        seed: int = 0,
        tensors: Mapping[str, Array] | None = None,
        on_step: Callable[[int, F64, F64], None] | None = None,
    ) -> F64:
        """Samples `indices` of `seed` as one batch, float64 (N, C, H, W), not clamped. labels, tensors: one row per index.

        Without labels, sample i gets class i modulo the number of classes.

        Raises:
            ModelError: a sample is not finite.
            RecipeError: labels or tensors that the model does not take.
        """
        m = self.bundle.manifest
        if labels is None and m.model.labels:
            labels = [m.model.labels[i % len(m.model.labels)] for i in indices]
        with np.errstate(over="ignore", invalid="ignore"):  # what comes of it is refused below
            x = sample(
                lambda step: self.engines[self.plan.steps[step]],
                m.schedule,
                m.model,
                m.model.conditions(labels, len(indices), tensors),
                indices,
                seed=seed,
                guidance_scale=m.guidance_scale,
                sigmas=self.bundle.sigmas(self.backend, self.plan),
                on_step=on_step,
            )
        finite = np.isfinite(x).all(axis=(1, 2, 3))
        if not finite.all():
            bad = indices[int(np.argmin(finite))]
            raise ModelError(f"sample {bad} holds NaN or infinite values: the model or an engine computes nonsense; try another seed, or rebuild")
        return x

    def close(self) -> None:
        for engine in self.engines.values():
            engine.close()
        self.engines.clear()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()


def run(
    bundle: Bundle,
    num_samples: int,
    labels: Sequence[int] | None = None,
    *,
    seed: int = 0,
    batch_size: int = 16,
    workers: int = 1,
    backend: str = "ort-cpu",
    model: Path | None = None,
    tensors: Mapping[str, Array] | None = None,
    advance: Callable[[int], None] = lambda steps: None,
) -> F64:
    """Samples 0 .. num_samples - 1 of `seed`, in batches; float64 (N, C, H, W), not clamped.

    Args:
        labels: one class per sample; None: classes in turn.
        workers: processes with one thread each that split the batches; 1 runs here, with all threads.
        advance: told how many sample steps (samples x denoising steps) were done since the last call.
    Raises:
        BackendUnavailable, BundleError: as Runtime; or a worker died.
        ModelError: a sample is not finite.
        RecipeError: labels or tensors that the model does not take.
    """
    m = bundle.manifest
    if labels is not None or tensors:
        m.model.conditions(labels, num_samples, tensors)  # wrong ones are refused before any work
    out = np.empty((num_samples, *m.model.sample_shape))
    batches = [range(i, min(i + batch_size, num_samples)) for i in range(0, num_samples, batch_size)]

    def part(batch: range) -> tuple[list[int] | None, dict[str, Array]]:
        chosen = None if labels is None else [int(labels[i]) for i in batch]
        return chosen, {k: v[batch.start : batch.stop] for k, v in (tensors or {}).items()}

    if workers == 1 or len(batches) == 1:
        with Runtime(bundle, backend, model=model) as runtime:
            for batch in batches:
                chosen, conditions = part(batch)
                out[batch.start : batch.stop] = runtime.sample(batch, chosen, seed=seed, tensors=conditions, on_step=lambda i, x, e: advance(len(x)))
    else:
        workers = min(workers, len(batches))
        pool = ProcessPoolExecutor(workers, multiprocessing.get_context("spawn"), _start_worker, (bundle.path, backend, model))
        todo, running = iter(batches), dict[Future[F64], range]()
        try:
            while True:
                # A few at a time: CPython's pool may hang if it breaks while work is being submitted.
                with _ctrl_c_blocked():
                    for batch in itertools.islice(todo, 2 * workers - len(running)):
                        running[pool.submit(_work, batch, *part(batch), seed)] = batch
                if not running:
                    break
                for future in wait(running, return_when=FIRST_COMPLETED).done:
                    batch = running.pop(future)
                    out[batch.start : batch.stop] = future.result()
                    advance(len(batch) * len(m.schedule))
        except BrokenProcessPool as error:
            raise BackendUnavailable("a worker process died, most likely for lack of memory: lower --workers or --batch-size") from error
        finally:
            pool.shutdown(cancel_futures=True)
    return out


@contextlib.contextmanager
def _ctrl_c_blocked() -> Iterator[None]:
    """Workers that start meanwhile inherit this: Ctrl-C reaches the whole group, and the parent ends it and says so once."""
    mask = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, mask)


_start: tuple[Path, str, Path | None]
_worker: Runtime | None = None


def _start_worker(path: Path, backend: str, model: Path | None) -> None:
    global _start
    if backend == "torch":
        from .reference import set_threads
    else:
        from .backends import set_threads
    set_threads(1)
    _start = path, backend, model


def _work(batch: range, labels: list[int] | None, tensors: Mapping[str, Array], seed: int) -> F64:
    global _worker
    if _worker is None:  # not when the worker starts: here an error reaches the parent as it is
        path, backend, model = _start
        _worker = Runtime(Bundle.open(path, verify=False), backend, model=model)  # the parent has checked every hash a moment ago
    return _worker.sample(batch, labels, seed=seed, tensors=tensors)
