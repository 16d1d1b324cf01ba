"""Pool: workers in other processes, maybe on other machines. Who needs them does not know who they are."""

from __future__ import annotations

from collections.abc import Callable, Generator, Iterable, Mapping
from contextlib import AbstractContextManager
from typing import Any, Protocol

from ..errors import BackendUnavailable

Make = Callable[[], Callable[[Any], Any]]
Results = Generator[tuple[Any, Any], None, None]
"""Items and results; closed, they let the workers go."""


class Pool(Protocol):
    """Some workers; see `farm.Pool` for those on Ray."""

    def map(self, make: Make, items: Iterable[Any]) -> Results:
        """Yield each item with its result, in the order in which they are finished.

        Args:
            make: called in each worker's process at its first item, for the function of an item. It, items
                and results travel between processes.
            items: taken one by one, as workers get free.
        Raises:
            PTQDError: the function's own, or a worker died again and again.
        """
        ...


Connect = Callable[[str], AbstractContextManager[Pool]]
"""Opens a pool for work on a backend."""


def check_versions(expected: Mapping[str, str], here: Mapping[str, str]) -> None:
    """Check that a worker's machine computes with the packages of the machine where the work was begun.

    Raises:
        BackendUnavailable: one of them has another version, or is missing.
    """
    for name, version in expected.items():
        if here.get(name) != version:
            raise BackendUnavailable(
                f"this machine has {name} {here.get(name, 'not at all')}, where the command was given "
                f"{version}: install the same"
            )
