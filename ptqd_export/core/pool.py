"""Pool: workers in other processes, maybe on other machines. Who needs them does not know who they are."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from typing import Any, Protocol

Make = Callable[[], Callable[[Any], Any]]


class Pool(Protocol):
    """Some workers; see `farm.Pool` for those on Ray."""

    def map(self, make: Make, items: Iterable[Any]) -> Iterator[tuple[Any, Any]]:
        """Yield each item with its result, in the order in which they are finished.

        Args:
            make: called in each worker's process at its first item, for the function of an item. It, items
                and results travel between processes.
            items: taken one by one, as workers get free.
        Raises:
            PTQDError: the function's own, or a worker died again and again.
        """
        ...
