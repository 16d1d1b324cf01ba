"""Many cases: drawn by a seed, run in parallel, kept in a journal that a later call takes up, and counted."""

from __future__ import annotations

import json
import os
import random
import shutil
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

from .base import Base, Draft, NotApplicable
from .harness import FAILURES, GOOD, Outcome, Zygote, draft_of, order_of, place_of, run_case
from .mutations import FAILED, draw

SKIPPED = "skipped"
TRIES = 30
LARGE = 1 << 26
"""Bytes of a file that is not kept."""
EVERY = 15.0
"""Seconds between lines of progress."""


def draft_case(
    base: Base, folder: Path, seed: int, index: int, only: Sequence[str] = ()
) -> tuple[Draft, tuple[str, ...], list[str]]:
    """Case `index` of `seed`: (draft, order of commands, kinds of its mutations)."""
    rng = random.Random(f"{seed}/{index}")
    order = order_of(rng)
    for _ in range(TRIES):
        draft, kinds = draft_of(base, folder, rng), []
        for mutation in draw(rng, only):
            try:
                mutation.apply(draft)
                kinds.append(mutation.name)
            except FAILED:
                break
        else:
            return draft, order, kinds
    raise NotApplicable(f"no mutation of case {index} applies")


def run_one(
    base: Base,
    zygote: Zygote,
    root: Path,
    seed: int,
    index: int,
    keep: Path | None = None,
    only: Sequence[str] = (),
) -> dict[str, Any]:
    """A case from its numbers to a line of the journal; `keep` gets a copy of the bundle."""
    with place_of(root, f"c{index}") as folder:
        started = time.monotonic()
        try:
            draft, order, kinds = draft_case(base, folder, seed, index, only)
            outcome = run_case(zygote, draft, folder, order)
        except NotApplicable as error:
            return {
                "index": index,
                "outcome": SKIPPED,
                "why": str(error),
                "kinds": [],
                "seconds": 0.0,
                "peak": 0,
            }
        if keep is not None:
            _keep(folder, keep / f"{seed}-{index}")
        return {
            "index": index,
            "outcome": outcome.outcome,
            "why": outcome.why,
            "kinds": kinds,
            "notes": draft.notes,
            "order": list(order),
            "seconds": round(time.monotonic() - started, 3),
            "peak": outcome.peak,
        }


def _keep(folder: Path, target: Path) -> None:
    """Copy what is small: a sparse file would not stay sparse."""
    shutil.rmtree(target, ignore_errors=True)
    for source in folder.rglob("*"):
        there = target / source.relative_to(folder)
        there.parent.mkdir(parents=True, exist_ok=True)
        if source.is_symlink():
            there.symlink_to(os.readlink(source))
        elif source.is_file() and source.stat().st_size < LARGE:
            shutil.copyfile(source, there)


def check_base(base: Base, root: Path) -> Outcome:
    """The right bundle itself, which must be accepted."""
    with Zygote() as zygote, place_of(root, "base-check") as folder:
        return run_case(zygote, draft_of(base, folder, random.Random(0)), folder)


def run_many(
    base: Base,
    root: Path,
    seed: int,
    indices: Iterable[int],
    workers: int,
    journal: Path | None = None,
    keep: Path | None = None,
    say: Callable[[str], None] = lambda line: None,
    only: Sequence[str] = (),
) -> list[dict[str, Any]]:
    """Run the cases that the journal does not have yet; all of them, by index."""
    wanted = list(indices)
    lines = {} if journal is None or not journal.exists() else _read(journal)
    done = {index: line for index, line in lines.items() if index in set(wanted)}
    todo = iter([index for index in wanted if index not in done])
    lock, started = threading.Lock(), time.monotonic()
    spoken = started
    before = len(done)
    errors: list[BaseException] = []

    def work() -> None:
        nonlocal spoken
        with Zygote() as zygote:
            while not errors:
                with lock:
                    index = next(todo, None)
                if index is None:
                    return
                try:
                    line = run_one(base, zygote, root, seed, index, keep, only)
                except BaseException as error:
                    errors.append(error)
                    return
                with lock:
                    done[index] = line
                    if journal is not None:
                        with journal.open("a") as file:
                            file.write(json.dumps(line) + "\n")
                    if time.monotonic() - spoken > EVERY or line["outcome"] in FAILURES:
                        spoken = time.monotonic()
                        say(_progress(done, len(wanted), len(done) - before, spoken - started, line))

    threads = [threading.Thread(target=work) for _ in range(workers)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    if errors:
        raise errors[0]
    return [done[index] for index in wanted]


def _read(journal: Path) -> dict[int, dict[str, Any]]:
    """Of a journal whose last line may be cut off."""
    lines: dict[int, dict[str, Any]] = {}
    for text in journal.read_text().splitlines():
        try:
            line = json.loads(text)
            lines[line["index"]] = line
        except (ValueError, LookupError):
            continue
    return lines


def _progress(
    done: dict[int, dict[str, Any]], wanted: int, new: int, seconds: float, line: dict[str, Any]
) -> str:
    counts = Counter(line["outcome"] for line in done.values())
    text = ", ".join(f"{name} {count}" for name, count in counts.most_common())
    head = f"{len(done)}/{wanted} ({seconds / max(new, 1):.2f} s each): {text}"
    if line["outcome"] in FAILURES:
        head += (
            f"\n  case {line['index']}: {line['outcome']}: {'; '.join(line['notes'])}: {line['why'][:300]!a}"
        )
    return head


def report(lines: list[dict[str, Any]], **about: Any) -> dict[str, Any]:
    """Counts per outcome and per kind of mutation, the failures, and what it cost."""
    kinds: dict[str, Counter[str]] = {}
    for line in lines:
        for kind in line["kinds"]:
            kinds.setdefault(kind, Counter())[line["outcome"]] += 1
    seconds = sorted(line["seconds"] for line in lines)
    outcomes = Counter(line["outcome"] for line in lines)
    return {
        **about,
        "cases": len(lines),
        "outcomes": {
            name: outcomes[name] for name in (*GOOD, *FAILURES, SKIPPED) if outcomes[name] or name in GOOD
        },
        "kinds": {kind: dict(counts) for kind, counts in sorted(kinds.items())},
        "failures": [line for line in lines if line["outcome"] in FAILURES],
        "seconds": {
            "sum": round(sum(seconds), 1),
            "mean": round(sum(seconds) / max(1, len(seconds)), 3),
            "median": seconds[len(seconds) // 2] if seconds else 0,
            "largest": seconds[-1] if seconds else 0,
        },
        "peak_mb": max((line["peak"] for line in lines), default=0),
    }


def table(found: dict[str, Any]) -> str:
    """The report for people."""
    columns = [name for name in found["outcomes"]]
    width = max(map(len, found["kinds"]), default=10)
    rows = [f"{'kind':{width}}  " + "  ".join(f"{name:>{max(8, len(name))}}" for name in columns)]
    for kind, counts in found["kinds"].items():
        cells = (f"{counts.get(name, 0) or '':>{max(8, len(name))}}" for name in columns)
        rows.append(f"{kind:{width}}  " + "  ".join(cells))
    rows.append(
        f"{'cases':{width}}  " + "  ".join(f"{found['outcomes'][n]:>{max(8, len(n))}}" for n in columns)
    )
    cost = found["seconds"]
    rows.append(
        f"{found['cases']} cases; {cost['mean']} s each (median {cost['median']}, most {cost['largest']}); "
        f"{found['peak_mb']} MB above the start at most"
    )
    rows += [
        f"case {line['index']}: {line['outcome']}: {'; '.join(line['notes'])}: {line['why'][:200]!a}"
        for line in found["failures"]
    ]
    return "\n".join(rows)
