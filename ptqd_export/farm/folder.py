"""The folder of shards: what is finished, what is missing; written so that a kill loses shards in work alone.

shards.json        the order, and every finished shard with its size and hash; the same for any workers
.shards.jsonl      shards that were finished since shards.json was written, a line each
shard-NNNNNN.*     the samples
"""

from __future__ import annotations

import contextlib
import json
import os
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..errors import PTQDError, RecipeError
from ..files import PART, check_target, exclusive, sha256_file, write_file
from ..typed import brief, read_typed, to_plain
from .order import Done, Order, Shard

INDEX, JOURNAL = "shards.json", ".shards.jsonl"
SHARD = re.compile(r"shard-[0-9]{6,}\.(parquet|tar)")
OWN = re.compile(rf"{re.escape(INDEX)}|{re.escape(JOURNAL)}|{SHARD.pattern}")
ANOTHER = "give another --out"


@dataclass(frozen=True)
class Index:
    """shards.json.

    Attributes:
        order: what was asked for, besides the number of samples.
        num_samples: how many were asked for.
        complete: all of them are there.
    """

    format_version: int
    order: Order
    num_samples: int
    complete: bool
    shards: tuple[Done, ...]


class Shards:
    """An order in its folder; see `open_shards`.

    Attributes:
        folder: where it is.
        order: what is sampled.
        num_samples: how many of it.
        done: finished shards by number, those of earlier runs too.
        kept: how many of them were there before this run.
    """

    def __init__(self, folder: Path, order: Order, num_samples: int, done: dict[int, Done]) -> None:
        self.folder, self.order, self.num_samples, self.done = folder, order, num_samples, done
        self.kept = len(done)

    @property
    def missing(self) -> list[Shard]:
        return [shard for shard in self.order.shards(self.num_samples) if shard.number not in self.done]

    def add(self, done: Done) -> None:
        """Note a finished shard; it is on the disk when this returns.

        Raises:
            PTQDError: its file is not in this machine's folder, or the note cannot be written.
        """
        try:
            size = (self.folder / done.file).stat().st_size
        except OSError:
            size = -1
        if size != done.bytes:
            raise PTQDError(
                f"a worker wrote {done.file}, but {self.folder} does not hold it here: give an --out that "
                "all machines share"
            )
        line = json.dumps(to_plain(done)) + "\n"
        with (self.folder / JOURNAL).open("ab") as file:
            file.write(line.encode())
            file.flush()
            os.fsync(file.fileno())
        self.done[done.shard] = done

    def write(self) -> None:
        """shards.json, in order of the shards; the notes that it takes up go.

        Raises:
            PTQDError: it cannot be written.
        """
        shards = tuple(self.done[number] for number in sorted(self.done))
        index = Index(1, self.order, self.num_samples, not self.missing, shards)
        write_file(self.folder / INDEX, json.dumps(to_plain(index), indent=1).encode() + b"\n")
        (self.folder / JOURNAL).unlink(missing_ok=True)


@contextlib.contextmanager
def open_shards(out: Path, order: Order, num_samples: int) -> Iterator[Shards]:
    """A folder of shards for this process alone: what of it is finished, by its hashes, is taken up.

    Raises:
        RecipeError: the folder holds something else, shards of another order, or more samples.
        BundleError: another process works on it.
        PTQDError: it cannot be written.
    """
    folder = check_target(out, "a set of shards", _in_the_way)
    made = [parent for parent in (folder, *folder.parents) if not parent.exists()]
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with exclusive(folder, "run"):
            shards = _taken_up(folder, order, num_samples)
            try:
                if shards.missing:
                    shards.write()
                yield shards
            finally:
                _clear(folder)
                if shards.done:
                    shards.write()
                else:
                    for name in (INDEX, JOURNAL):
                        (folder / name).unlink(missing_ok=True)
    except OSError as error:
        raise PTQDError(
            f"cannot write {error.filename or out}: {error.strerror or error}: free some space or choose "
            "another --out; the same command takes up what is finished"
        ) from error
    finally:
        for parent in made:
            with contextlib.suppress(OSError):  # what holds something stays
                parent.rmdir()


def held_order(out: Path) -> Order | None:
    """The order that a folder holds; None where there is none that can be read."""
    try:
        return _read(out).order if (out / INDEX).exists() else None
    except (OSError, RecipeError):
        return None


def _in_the_way(inside: list[Path]) -> str | None:
    ours = any(file.name == INDEX for file in inside)
    for file in inside:
        part = PART.fullmatch(file.name)
        name = file.name if part is None else part["name"] or ""
        if not (OWN.fullmatch(name) and (ours or part) and file.is_file()):
            return f"{brief(file.name)} is not of an earlier run (by its {INDEX}): {ANOTHER} for the shards"
    return None


def _read(folder: Path) -> Index:
    """shards.json with the notes that came after it.

    Raises:
        RecipeError: it is damaged.
    """
    try:
        index: Index = read_typed(Index, json.loads((folder / INDEX).read_bytes()), INDEX)
    except (ValueError, RecursionError, PTQDError) as error:
        raise RecipeError(f"{folder / INDEX} is damaged ({brief(str(error))}): {ANOTHER}") from error
    if index.format_version != 1:
        raise RecipeError(f"{folder / INDEX} is of another version of ptqd-export: {ANOTHER}")
    notes = (folder / JOURNAL).read_bytes() if (folder / JOURNAL).exists() else b""
    found = list(index.shards)
    for line in notes.split(b"\n")[:-1]:  # a kill may leave a part of the last one
        with contextlib.suppress(ValueError, PTQDError):
            found.append(read_typed(Done, json.loads(line), JOURNAL))
    return Index(1, index.order, index.num_samples, index.complete, tuple(found))


def _clear(folder: Path) -> None:
    """Remove what workers that were killed left: nobody is at work here any more, or yet."""
    for file in folder.iterdir():
        if PART.fullmatch(file.name):
            file.unlink(missing_ok=True)


def _taken_up(folder: Path, order: Order, num_samples: int) -> Shards:
    _clear(folder)
    if not (folder / INDEX).exists():
        return Shards(folder, order, num_samples, {})
    held = _read(folder)
    _check_same(folder, held, order, num_samples)
    expected = {shard.number: shard for shard in order.shards(num_samples)}
    done = {}
    for one in held.shards:
        shard = expected.get(one.shard)
        if shard is not None and _is_there(folder, order, shard, one):
            done[one.shard] = one
    return Shards(folder, order, num_samples, done)


def _is_there(folder: Path, order: Order, shard: Shard, done: Done) -> bool:
    """Whether the file of a shard is what it was when it was written."""
    file = folder / order.file(shard)
    same = (done.file, done.start, done.rows) == (file.name, shard.samples.start, len(shard.samples))
    try:
        return same and file.stat().st_size == done.bytes and sha256_file(file) == done.sha256
    except OSError:
        return False


def _check_same(folder: Path, held: Index, order: Order, num_samples: int) -> None:
    """Raise RecipeError where a folder holds another order, naming the first thing that differs."""
    old: dict[str, Any] = to_plain(held.order)
    new: dict[str, Any] = to_plain(order)
    for name, value in new.items():
        if old[name] != value:
            raise RecipeError(
                f"{folder} holds shards of another run ({name} {brief(old[name])}, now {brief(value)}): ask "
                f"for the same, or {ANOTHER}"
            )
    if held.num_samples > num_samples:
        raise RecipeError(
            f"{folder} holds shards of {held.num_samples} samples, more than {num_samples}: ask for as many, "
            f"or {ANOTHER}"
        )
