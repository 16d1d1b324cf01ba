"""What a worker does: open the bundle once, then sample and write one shard after the other.

It knows nothing of Ray: any pool of processes could call it.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from ..bundle import Bundle
from ..core.pool import check_versions
from ..files import sha256_file, writing_file
from ..runtime import (
    Job,
    Prompted,
    Runtime,
    Start,
    encode_prompts,
    open_worker,
    sample_job,
    versions,
)
from ..typed import read_typed, to_plain
from .attempt import Failure, attempt
from .conditions import Conditions
from .formats import PROMPT, Rows, write_shard
from .order import Done, Order, Shard

SHARD, REPORT = "shard", "report"
"""Columns of what goes to a worker, and of what comes back."""


@dataclass(frozen=True)
class Task:
    """What a worker is given when it starts.

    Attributes:
        start: bundle and backend.
        order: what is sampled.
        num_samples: how many of it.
        folder: of the shards.
        prompted: prompts that go in turn, with their conditions.
        conditions: a dataset with a row per sample.
    """

    start: Start
    order: Order
    num_samples: int
    folder: Path
    prompted: Prompted | None = None
    conditions: Conditions | None = None


class Sampler:
    """A worker; the bundle is opened at the first shard, so that its errors arrive as they are.

    A call takes {"shard": numbers} and returns {"report": a JSON text for each}, which `read_report` reads.
    """

    def __init__(self, task: Task) -> None:
        self._task = task
        self._runtime: Runtime | None = None
        self._shards = task.order.shards(task.num_samples)

    def __call__(self, batch: Mapping[str, npt.NDArray[Any]]) -> dict[str, npt.NDArray[Any]]:
        shards = [self._shards[int(number)] for number in batch[SHARD]]
        reports = [
            json.dumps(to_plain(attempt(partial(self.write, shard), self._task.folder))) for shard in shards
        ]
        return {REPORT: np.array(reports, object)}

    def write(self, shard: Shard) -> Done:
        """Sample a shard and write its file, whole or not at all.

        Raises:
            PTQDError: as `runtime.run`, or a condition cannot be read.
            OSError: the file cannot be written.
        """
        if self._runtime is None:
            self._runtime = open_worker(self._task.start)
            check_versions(self._task.order.versions, versions(self._runtime.bundle, self._runtime.backend))
        path = self._task.folder / self._task.order.file(shard)
        with writing_file(path, clear=False) as file:  # `open_shards` has cleared
            write_shard(file, self._task.order, self._batches(shard, self._runtime))
        return Done(
            shard.number,
            path.name,
            shard.samples.start,
            len(shard.samples),
            path.stat().st_size,
            sha256_file(path),
        )

    def _batches(self, shard: Shard, runtime: Runtime) -> Iterator[Rows]:
        """The samples of a shard, batch by batch as `run` draws them."""
        order, bundle = self._task.order, runtime.bundle
        pipeline, model = bundle.manifest.pipeline, bundle.manifest.sampling.model
        decode = order.content != "latents" and pipeline.decoder is not None
        conditions_of = _of_dataset if self._task.conditions is not None else _in_turn
        given = conditions_of(self._task, bundle, shard)
        for indices in order.batches(shard):
            labels, prompts, tensors = given.of(indices)
            if labels is None:
                labels = model.labels_in_turn(indices)
            job = Job(indices, labels, tensors, order.seed, given.null, decode)
            yield Rows(indices, sample_job(runtime, job), labels, prompts)


@dataclass(frozen=True)
class _Given:
    """Conditions of the samples of a shard: `of` gives classes, prompts and tensors of a batch."""

    of: Any
    null: Mapping[str, Any]


def _in_turn(task: Task, bundle: Bundle, shard: Shard) -> _Given:
    labels, prompted = task.order.labels, task.prompted

    def of(indices: range) -> tuple[Any, Any, Any]:
        own = [labels[i % len(labels)] for i in indices] if labels else None
        if prompted is None:
            return own, None, {}
        texts = [prompted.prompts[i % len(prompted.prompts)] for i in indices]
        return own, texts, prompted.of(indices)

    return _Given(of, {} if prompted is None else prompted.null)


def _of_dataset(task: Task, bundle: Bundle, shard: Shard) -> _Given:
    assert task.conditions is not None
    model = bundle.manifest.sampling.model
    lists, tensors = task.conditions.read(shard.samples, model)
    null: Mapping[str, Any] = {}
    texts = lists.get(PROMPT)
    if texts is not None:
        prompted = encode_prompts(bundle, texts, task.order.negative_prompt)
        tensors, null = {**tensors, **prompted.conditions}, prompted.null
    labels = None if model.class_input is None else lists.get(model.class_input.name)

    def of(indices: range) -> tuple[Any, Any, Any]:
        at = slice(indices.start - shard.samples.start, indices.stop - shard.samples.start)
        own = {name: value[at] for name, value in tensors.items()}
        return labels and labels[at], texts and texts[at], own

    return _Given(of, null)


def read_report(text: str) -> Done:
    """What a worker says of a shard.

    Raises:
        PTQDError: the worker's own error, with its machine if that is another.
    """
    data = json.loads(text)
    if "error" in data:
        raise Failure(**data).raised()
    done: Done = read_typed(Done, data, REPORT)
    return done
