"""Workers on Ray, an actor per core or GPU: for shards those of Ray Data's `map_batches`, else our own.

The shards' numbers are in memory, and an actor reads the conditions of its own shard: no task of Ray Data has
to read, so that actors may take every core and starve none.
"""

from __future__ import annotations

import collections
import contextlib
import itertools
import logging
import os
import sys
import warnings
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

from ..core.backend import BACKENDS, install_hint
from ..core.pool import Make, Results
from ..errors import BackendUnavailable, PTQDError, RecipeError
from ..typed import brief
from .attempt import Failure, Worker
from .order import Done, Shard
from .sampler import REPORT, SHARD, Sampler, Task, read_report

LOCAL = "local"
"""In place of an address: a Ray of our own, on this machine, for this run."""
RETRIES = 3
"""How often a shard is given to another worker when its own dies."""
OBJECT_STORE = 256 << 20
"""Bytes of shared memory of a Ray of our own, for batches; a large model's layers go by disk."""
QUIET = {
    "RAY_USAGE_STATS_ENABLED": "0",
    "RAY_worker_niceness": "0",  # as the processes of --workers; Ray's own is 15
}
"""Settings of a Ray of our own, where the user has none."""


class Pool:
    """A connection to Ray; see `connect`.

    Attributes:
        workers: how many actors there are to be.
    """

    def __init__(self, ray: Any, workers: int, gpu: bool) -> None:
        self._ray, self.workers, self._gpu = ray, workers, gpu

    def run(self, task: Task, shards: Sequence[Shard]) -> Iterator[Done]:
        """Write shards; yields each when it is finished, in any order.

        Raises:
            PTQDError: a worker's own error, or one line for what Ray says.
        """
        data, ray = self._ray.data, self._ray
        context = data.DataContext.get_current()
        context.enable_progress_bars = False
        _silence()
        try:
            numbers = data.from_items(
                [{SHARD: shard.number} for shard in shards], override_num_blocks=len(shards)
            )
            with warnings.catch_warnings():
                warnings.simplefilter(
                    "ignore"
                )  # retries have no other argument yet; ray is bounded below 2.64
                reports = numbers.map_batches(
                    Sampler,
                    fn_constructor_args=(task,),
                    batch_size=1,
                    num_cpus=1,
                    num_gpus=1 if self._gpu else None,
                    compute=data.ActorPoolStrategy(
                        size=min(self.workers, len(shards)), max_tasks_in_flight_per_actor=1
                    ),
                    max_restarts=-1,
                    max_task_retries=RETRIES,
                )
            for row in reports.iter_rows():
                yield read_report(row[REPORT])
        except ray.exceptions.RayError as error:
            raise PTQDError(_one_line(ray, error)) from error

    def map(self, make: Make, items: Iterable[Any]) -> Results:
        """See `core.pool.Pool`; an item whose worker dies is given to its successor.

        Workers that get no core, as others hold them, get no items.
        """
        ray, items = self._ray, iter(items)
        actor = ray.remote(
            num_cpus=1, num_gpus=1 if self._gpu else None, max_restarts=-1, max_task_retries=RETRIES
        )(Worker)
        waiting = collections.deque(itertools.islice(items, self.workers))
        workers, starting, running = list[Any](), dict[Any, Any](), dict[Any, tuple[Any, Any]]()
        try:
            made = ray.put(make)
            workers += [actor.remote(made) for _ in waiting]
            starting |= {worker.__ray_ready__.remote(): worker for worker in workers}
            while waiting or running:
                (done,), _ = ray.wait([*running, *starting])
                result = ray.get(done)
                worker, *of = running.pop(done) if done in running else (starting.pop(done),)
                if isinstance(result, Failure):
                    raise result.raised()
                if waiting:
                    item = waiting.popleft()
                    running[worker.do.remote(item)] = worker, item
                    waiting.extend(itertools.islice(items, 1))
                for finished in of:
                    yield finished, result
        except ray.exceptions.RayError as error:
            raise PTQDError(_one_line(ray, error)) from error
        finally:
            if ray.is_initialized():  # else a kill would start another
                with contextlib.suppress(ray.exceptions.RayError):
                    for worker in workers:
                        ray.kill(worker)


@contextlib.contextmanager
def connect(address: str, workers: int | None, backend: str) -> Iterator[Pool]:
    """Start Ray here, or join one; what was started, or joined, is left again.

    Args:
        address: LOCAL, "auto", or host:port of a cluster's head.
        workers: None is one per core of the machines, or per GPU for backends that run there.
    Raises:
        BackendUnavailable: ray is not installed, does not start, or is not there; or has no GPU.
        RecipeError: the address is of another kind.
    """
    if "://" in address:
        raise RecipeError(
            f"--ray {brief(address)}: expected auto or HOST:PORT, on a machine of the cluster (a client does "
            "not see its folders): run the command there, or submit it as a Ray job"
        )
    gpu = BACKENDS[backend].on_device
    for name, value in QUIET.items():
        os.environ.setdefault(name, value)
    ray = _ray()
    ours = not ray.is_initialized()
    try:
        if ours:
            _start(ray, address, workers, gpu)
        yield Pool(ray, _count(ray, workers, gpu), gpu)
    finally:
        if ours:
            ray.shutdown()


def _ray() -> Any:
    try:
        import ray
        import ray.data
    except ImportError as error:
        raise BackendUnavailable(f"--ray needs ray ({error}): {install_hint('ray')}") from error
    return ray


def _start(ray: Any, address: str, workers: int | None, gpu: bool) -> None:
    more: dict[str, Any] = {}
    if address == LOCAL:
        cores = len(os.sched_getaffinity(0)) if sys.platform == "linux" else os.cpu_count() or 1
        more = {
            "num_cpus": cores if workers is None or gpu else workers,
            "include_dashboard": False,
            "object_store_memory": OBJECT_STORE,
        }
    try:
        ray.init(address=address, log_to_driver=False, logging_level=logging.CRITICAL, **more)
    except Exception as error:  # of many kinds
        what = "Ray does not start here" if address == LOCAL else f"no Ray answers at {brief(address)}"
        advice = "" if address == LOCAL else ": start it with `ray start`, or leave the address out"
        raise BackendUnavailable(f"{what} ({_first_line(error)}){advice}") from error


def _count(ray: Any, workers: int | None, gpu: bool) -> int:
    kind = "GPU" if gpu else "CPU"
    there = int(ray.cluster_resources().get(kind, 0))
    if workers is None and there == 0:
        raise BackendUnavailable(
            f"this Ray has no {kind} (machines that are yet to come do not count): give --workers"
        )
    return there if workers is None else workers


def _silence() -> None:
    """Ray Data's lines on the terminal go; those in its log files stay."""
    for handler in logging.getLogger("ray.data").handlers:
        if type(handler).__name__ != "SessionFileHandler":
            handler.setLevel(logging.CRITICAL + 1)


def _one_line(ray: Any, error: BaseException) -> str:
    """What went wrong among the workers."""
    died = (
        ray.exceptions.ActorDiedError,
        ray.exceptions.ActorUnavailableError,
        ray.exceptions.WorkerCrashedError,
        ray.exceptions.OutOfMemoryError,
        ray.exceptions.NodeDiedError,
    )
    if isinstance(error, died):
        return (
            f"workers died again and again at the same work ({RETRIES + 1} times), most likely for lack of "
            "memory: lower --workers or --batch-size; the same command takes up what is finished"
        )
    cause: BaseException = error
    while cause.__cause__ is not None:
        cause = cause.__cause__
    if isinstance(cause, ImportError):
        return f"a worker's machine lacks a package ({_first_line(cause)}): install the same on all machines"
    return (
        f"Ray gave up ({type(cause).__name__}: {_first_line(cause)}); the same command takes up what is "
        "finished"
    )


def _first_line(error: BaseException) -> str:
    return brief(next(iter(str(error).strip().splitlines()), type(error).__name__))
