"""Orders and workers without Ray."""

from __future__ import annotations

import multiprocessing
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from dataclasses import replace
from pathlib import Path

import pytest
from helpers import Built

from ptqd_export.core.backend import ORT_CPU
from ptqd_export.farm.order import Order
from ptqd_export.farm.sampler import Task
from ptqd_export.runtime import Start, versions

Worker = ProcessPoolExecutor
MakeTask = Callable[..., Task]


@pytest.fixture(scope="module")
def worker() -> Iterator[Worker]:
    """A process to sample in, with one thread."""
    with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as pool:
        yield pool


@pytest.fixture
def order() -> Order:
    """Of no bundle: shards of four samples in batches of two."""
    return Order(
        bundle="0" * 64, model="toy", seed=1, plan="fp32*2", backend=ORT_CPU, batch_size=2, shard_size=4,
        format="webdataset", content="npy", shape=(1, 2, 2), labels=(), prompts=(), negative_prompt=None,
        conditions=None, versions={},
    )  # fmt: skip


@pytest.fixture
def task_of(tmp_path: Path, order: Order) -> MakeTask:
    """A worker's task over a bundle: task_of(built, num_samples, labels=(1, 2), prompted=...)."""

    def make(
        built: Built, num_samples: int, prompted: object = None, data: object = None, **of: object
    ) -> Task:
        bundle = built.bundle
        m = bundle.manifest
        mine = replace(
            order, bundle=bundle.seal, plan=str(m.plan), shape=bundle.picture_shape,
            versions=versions(bundle, ORT_CPU), **of,
        )  # fmt: skip
        start = Start(bundle.path, bundle.seal, ORT_CPU, m.plan, None, 0, True, None)
        folder = tmp_path / "shards"
        folder.mkdir(exist_ok=True)
        return Task(start, mine, num_samples, folder, prompted, data)  # type: ignore[arg-type]

    return make
