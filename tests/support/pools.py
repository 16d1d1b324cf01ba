"""A pool without Ray: one process, which finishes items last first."""

from __future__ import annotations

import pickle
from collections.abc import Iterable, Iterator
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, field
from typing import Any

from ptqd_export.core.pool import Make
from ptqd_export.farm.attempt import Failure, Worker

_workers: dict[bytes, Worker] = {}


def _do(make: bytes, item: Any) -> Any:
    if make not in _workers:
        _workers[make] = Worker(pickle.loads(make))
    return _workers[make].do(item)


@dataclass
class Crossed:
    """As `farm.Pool` seen from outside; `items` counts what was done."""

    process: ProcessPoolExecutor
    items: int = 0
    makers: list[str] = field(default_factory=list)

    def map(self, make: Make, items: Iterable[Any]) -> Iterator[tuple[Any, Any]]:
        self.makers.append(getattr(make, "func", make).__name__)
        text = pickle.dumps(make)
        for item in reversed(list(items)):
            result = self.process.submit(_do, text, item).result()
            if isinstance(result, Failure):
                raise result.raised()
            self.items += 1
            yield item, result
