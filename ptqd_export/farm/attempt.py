"""A worker, and what goes wrong in one, as a value that travels to the command that gave it the work."""

from __future__ import annotations

import socket
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from .. import errors
from ..core.pool import Make
from ..errors import PTQDError
from ..typed import brief


@dataclass(frozen=True)
class Failure:
    """An error: the name of its class, one line, and the machine where it was raised."""

    error: str
    message: str
    machine: str

    def raised(self) -> PTQDError:
        """The error itself; it names the machine if that is another."""
        where = "" if self.machine == socket.gethostname() else f" (on {brief(self.machine)})"
        error: PTQDError = getattr(errors, self.error)(self.message + where)
        return error


def attempt(do: Callable[[], Any], where: object = None) -> Any:
    """What `do` returns, or a Failure in place of an error that users can do something about.

    Args:
        where: a folder, if it writes there.
    """
    kind, message = "PTQDError", "a worker ran out of memory: lower --batch-size or --workers"
    try:
        return do()
    except PTQDError as error:
        kind, message = type(error).__name__, str(error)
    except OSError as error:
        reason = error.strerror or error
        message = f"a worker cannot read or write {brief(error.filename)}: {reason}"
        if where is not None:
            message = f"cannot write {error.filename or where} ({reason}): free some space"
    except MemoryError:
        pass
    return Failure(kind, message, socket.gethostname())


class Worker:
    """Calls what `make` makes with one item after the other; made at the first, so that its errors arrive."""

    def __init__(self, make: Make) -> None:
        self._make = make
        self._work: Callable[[Any], Any] | None = None

    def do(self, item: Any) -> Any:
        """The item's result, or a Failure."""
        return attempt(lambda: self._open()(item))

    def _open(self) -> Callable[[Any], Any]:
        if self._work is None:
            self._work = self._make()
        return self._work
