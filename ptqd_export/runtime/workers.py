"""run: draw samples in batches, in this process or split between several."""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import itertools
import multiprocessing
import os
import signal
import threading
from collections.abc import Callable, Generator, Iterator, Mapping, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from pathlib import Path

import numpy as np
import numpy.typing as npt

from .. import backends
from ..bundle.bundle import Bundle
from ..core.backend import BACKENDS, ORT_CPU, TORCH
from ..core.engine import Array
from ..core.plan import Plan
from ..core.pool import Pool, Results, check_versions
from ..errors import BackendUnavailable, BundleError, RecipeError
from .batch import check_batch, usual_batch
from .prompts import Prompted, encode_prompts
from .replaced import Replaced
from .runtime import Runtime, check_seed
from .versions import versions

F64 = npt.NDArray[np.float64]


@dataclasses.dataclass(frozen=True)
class Start:
    """What a worker opens."""

    path: Path
    seal: str
    backend: str
    plan: Plan | None
    model: Path | None
    device: int
    resident: bool
    replaced: Replaced | None


@dataclasses.dataclass(frozen=True)
class Job:
    """A batch: sample indices and their conditions; `decode`: their pictures are wanted."""

    indices: range
    labels: list[int] | None
    tensors: Mapping[str, Array]
    seed: int
    null: Mapping[str, Array]
    decode: bool


def run(
    bundle: Bundle | Path | str,
    num_samples: int,
    labels: Sequence[int] | None = None,
    *,
    seed: int = 0,
    batch_size: int | None = None,
    workers: int = 1,
    backend: str | None = None,
    plan: Plan | None = None,
    model: Path | str | None = None,
    tensors: Mapping[str, Array] | None = None,
    prompts: Sequence[str] | Prompted | None = None,
    negative_prompt: str | None = None,
    latents: bool = False,
    device: int = 0,
    resident: bool = True,
    advance: Callable[[int], None] = lambda steps: None,
    opened: Callable[[Runtime], None] = lambda runtime: None,
    batched: Callable[[int], None] = lambda size: None,
) -> F64:
    """Draw samples 0 .. num_samples - 1 of `seed`, in batches; float64 (N, C, H, W), not clamped.

    Of a latent model with a decoder these are pictures, in [-1, 1].

    Args:
        labels: one class per sample; None takes the classes in turn.
        batch_size: samples at a time; None is as many as memory and cores suit (`usual_batch`).
        workers: number of processes that split the batches, each with one thread on the CPU; 1 samples in
            this process, with all threads.
        backend, plan, model, device, resident: as for Runtime.
        tensors: float conditions, one row per sample.
        prompts: of a text model; sample i gets prompt i modulo their number; the empty one if none is given.
        negative_prompt: in place of the empty prompt in guidance; not beside a `Prompted`, which holds one.
        latents: what the network samples, not decoded.
        advance: called with the number of sample steps (samples x denoising steps) since the last call.
        opened: called, before anything is sampled, with the runtime that this process samples with or chose
            the backend by.
        batched: called, before anything is sampled, with the number of samples of a batch.
    Raises:
        BackendUnavailable, BundleError, GraphError, ParityError: as Runtime, or a worker died.
        ModelError: a sample is not finite.
        RecipeError: a number is out of range, the model does not take the labels or tensors, or the bundle
            not the plan.
    """
    bundle = bundle if isinstance(bundle, Bundle) else Bundle.open(bundle)
    check_seed(seed)
    asked = {"num_samples": num_samples, "workers": workers}
    asked |= {} if batch_size is None else {"batch_size": batch_size}
    for name, value in asked.items():
        if isinstance(value, bool) or not isinstance(value, int | np.integer) or value < 1:
            raise RecipeError(f"{name} is {value!r}: give an integer of at least 1")
    m = bundle.manifest
    if plan is not None:
        m.check_plan(plan)
    if labels is not None or tensors:
        m.sampling.model.conditions(labels, num_samples, tensors)  # refuse wrong ones before any work
    if negative_prompt is not None and prompts is None:
        raise RecipeError("a negative prompt was given without a prompt: give both")
    if prompts is not None and not isinstance(prompts, Prompted):
        prompts = encode_prompts(bundle, prompts, negative_prompt)
    shape = m.sampling.model.sample_shape if latents else bundle.picture_shape
    out = np.empty((num_samples, *shape))  # first: fails here if memory is short
    with contextlib.ExitStack() as stack:
        runtime: Runtime | None = None
        if backend is None:
            runtime = stack.enter_context(Runtime(bundle, None, plan, model, device, resident))
            backend = runtime.backend
            opened(runtime)
        if batch_size is None:
            batch_size = usual_batch(bundle, backend, workers)
        batch_size = min(batch_size, -(-num_samples // workers))  # so that every worker gets a batch
        batched(batch_size)
        batches = _batches(num_samples, batch_size)
        if workers > 1 and len(batches) > 1:  # which have their own
            stack.close()
            runtime = None
        drawn = draw(
            bundle,
            batches,
            labels,
            seed=seed,
            workers=workers,
            backend=backend,
            plan=plan,
            model=model,
            tensors=tensors,
            prompted=prompts,
            latents=latents,
            device=device,
            resident=resident,
            runtime=runtime,
            advance=advance,
            opened=opened,
        )
        for indices, x in drawn:
            out[indices.start : indices.stop] = x
    return out


def draw(
    bundle: Bundle,
    batches: Sequence[range],
    labels: Sequence[int] | None = None,
    *,
    backend: str,
    seed: int = 0,
    workers: int = 1,
    plan: Plan | None = None,
    model: Path | str | None = None,
    tensors: Mapping[str, Array] | None = None,
    prompted: Prompted | None = None,
    latents: bool = False,
    device: int = 0,
    resident: bool = True,
    replaced: Replaced | None = None,
    pool: Pool | None = None,
    runtime: Runtime | None = None,
    advance: Callable[[int], None] = lambda steps: None,
    opened: Callable[[Runtime], None] = lambda runtime: None,
) -> Generator[tuple[range, F64], None, None]:
    """Draw batches of samples of `seed`: yields each with its samples, in the order in which they finish.

    Args:
        batches: indices of samples, consecutive in each batch.
        labels, tensors: one class or row for each sample from 0 on; as for `run`.
        prompted: prompts and their conditions.
        replaced: as for Runtime; the other arguments as for `run`.
        pool: samples in place of `workers`.
        runtime: an open one of this bundle, backend and plan, which samples where one worker does.
    Raises:
        PTQDError: as `run`.
    """
    m = bundle.manifest
    if prompted is not None and (twice := sorted(set(tensors or {}) & set(prompted.conditions))):
        raise RecipeError(f"prompts and the condition {twice[0]!r} were both given: leave one out")
    decode = not latents and m.pipeline.decoder is not None
    if decode:
        backends.check(ORT_CPU)  # it runs the decoder; not known after hours of sampling

    def job_of(batch: range) -> Job:
        # One at a time: a run of many prompts has more conditions than fit into memory.
        rows: dict[str, Array] = {n: v[batch.start : batch.stop] for n, v in (tensors or {}).items()}
        null: Mapping[str, Array] = {}
        if prompted is not None:
            rows |= prompted.of(batch)
            null = prompted.null
        own = None if labels is None else [int(labels[i]) for i in batch]
        return Job(batch, own, rows, seed, null, decode)

    if not batches:
        return
    workers, largest = min(workers, len(batches)), max(map(len, batches))
    check_batch(m, backend, largest)
    if pool is None and workers == 1:
        with contextlib.ExitStack() as stack:
            if runtime is None:
                own = Runtime(bundle, backend, plan, model, device, resident, replaced)
                runtime = stack.enter_context(own)
                opened(runtime)
            for job in map(job_of, batches):
                steps = functools.partial(lambda n, step: advance(n), len(job.indices))
                yield job.indices, sample_job(runtime, job, steps)
        return
    source = None if model is None else Path(model)
    start = Start(bundle.path, bundle.seal, backend, plan, source, device, resident, replaced)
    jobs = map(job_of, batches)
    if pool is None:
        drawn = _in_processes(start, jobs, workers)
    else:
        start = dataclasses.replace(start, path=bundle.path.resolve())
        drawn = pool.map(functools.partial(_drawer, start, versions(bundle, backend)), jobs)
    with contextlib.closing(drawn):
        for job, x in drawn:
            advance(len(job.indices) * len(m.sampling))
            yield job.indices, x


def _batches(n: int, size: int) -> list[range]:
    return [range(i, min(i + size, n)) for i in range(0, n, size)]


def sample_job(runtime: Runtime, job: Job, advance: Callable[[int], None] = lambda step: None) -> F64:
    """The samples of a batch, decoded where their pictures are wanted; raises as `Runtime.sample`."""
    x = runtime.sample(
        job.indices, job.labels, seed=job.seed, tensors=job.tensors, null=job.null, advance=advance
    )
    return runtime.decode(x) if job.decode else x


def _in_processes(start: Start, jobs: Iterator[Job], workers: int) -> Results:
    """Yield every job with its samples, in the order in which they finish."""
    before = set(multiprocessing.active_children())
    pool = ProcessPoolExecutor(workers, multiprocessing.get_context("spawn"), _start_worker, (start,))
    running = dict[Future[F64], Job]()
    try:
        while True:
            # Submit a few at a time: CPython's pool may hang if it breaks while work is submitted.
            with _ctrl_c_blocked():
                for job in itertools.islice(jobs, 2 * workers - len(running)):
                    running[pool.submit(_work, job)] = job
            if not running:
                break
            for future in wait(running, return_when=FIRST_COMPLETED).done:
                yield running.pop(future), future.result()
    except BrokenProcessPool as error:
        raise BackendUnavailable(
            "a worker process died, most likely for lack of memory: lower --workers or --batch-size "
            '(a script that calls run() with workers must do so under `if __name__ == "__main__":`)'
        ) from error
    except BaseException:
        # Without this, a batch that is running would delay the end until it is done.
        for child in set(multiprocessing.active_children()) - before:
            child.terminate()
        raise
    finally:
        pool.shutdown(cancel_futures=True)


@contextlib.contextmanager
def _ctrl_c_blocked() -> Iterator[None]:
    """Block Ctrl-C in workers that start meanwhile: they inherit this.

    Ctrl-C reaches the whole process group; the parent alone ends the workers and reports it once.
    """
    mask = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, mask)


_start: Start
_worker: Runtime | None = None


def _start_worker(start: Start) -> None:
    global _start
    _start = start
    threading.Thread(target=_end_with_parent, daemon=True).start()


def _end_with_parent() -> None:
    """A parent that was killed cannot end its workers."""
    parent = multiprocessing.parent_process()
    if parent is not None:
        parent.join()
        os._exit(1)


def _work(job: Job) -> F64:
    global _worker
    if _worker is None:  # opened here, not when the worker starts, so that the parent gets the error itself
        _worker = open_worker(_start)
    return sample_job(_worker, job)


def _drawer(start: Start, expected: Mapping[str, str]) -> Callable[[Job], F64]:
    """What a pool's worker does with a batch."""
    runtime = open_worker(start)
    check_versions(expected, versions(runtime.bundle, runtime.backend))
    return functools.partial(sample_job, runtime)


def open_worker(start: Start) -> Runtime:
    """The runtime of a worker process, with one thread on the CPU.

    Raises:
        BundleError: another bundle stands there by now than the parent verified.
        PTQDError: as Runtime.
    """
    if start.backend == TORCH:
        try:
            from ..calibrate import set_threads
        except ImportError as error:
            raise BACKENDS[TORCH].missing(error) from error
        set_threads(1)
    elif not BACKENDS[start.backend].on_device:
        backends.set_threads(1)
    bundle = Bundle.open(start.path)
    if bundle.seal != start.seal:
        raise BundleError(
            f"{start.path} was replaced by another bundle during this run: run the command again"
        )
    return Runtime(
        bundle, start.backend, start.plan, start.model, start.device, start.resident, start.replaced
    )
