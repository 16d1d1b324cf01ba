"""Mutations: named functions that make a draft hostile. A name is "<area>/<kind>"; counts are kept by it."""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from ..base import Draft, NotApplicable

Change = Callable[[Draft], object]
FAILED = (NotApplicable, RecursionError, LookupError, TypeError, AttributeError, ValueError, ArithmeticError)
"""What a mutation may raise on a draft that an earlier one has spoilt."""


@dataclass(frozen=True)
class Mutation:
    """Attributes:
    change: makes the draft hostile; what it returns is noted.
    refuse: a program that accepts it lets something in.
    weight: how often it is drawn, beside the others.
    """

    name: str
    change: Change
    refuse: bool
    weight: float

    def apply(self, draft: Draft) -> None:
        """Raises one of FAILED where there is nothing to change."""
        note = self.change(draft)
        draft.refuse |= self.refuse
        draft.notes.append(f"{self.name}({str(note)[:200]!a})" if note is not None else self.name)


MUTATIONS: dict[str, Mutation] = {}


def mutation(name: str, *, refuse: bool = False, weight: float = 1.0) -> Callable[[Change], Change]:
    """Enter a function into the table."""

    def enter(change: Change) -> Change:
        assert name not in MUTATIONS, name
        MUTATIONS[name] = Mutation(name, change, refuse, weight)
        return change

    return enter


SHARES = {"manifest": 25.0, "names": 13.0, "arrays": 17.0, "graph": 33.0, "bytes": 7.0, "engine": 5.0}
"""Of the areas, in percent, however many mutations each has."""
PAIRS = 0.25
"""Share of the cases with two mutations."""


def draw(rng: random.Random, only: Sequence[str] = ()) -> list[Mutation]:
    """One mutation, or two; `only` of names that begin so."""
    known = {name: m for name, m in MUTATIONS.items() if not only or name.startswith(tuple(only))}
    shares = {
        area: share for area, share in SHARES.items() if any(name.startswith(f"{area}/") for name in known)
    }
    count = 2 if rng.random() < PAIRS else 1
    drawn = []
    for area in rng.choices(list(shares), list(shares.values()), k=count):
        held = [m for name, m in known.items() if name.startswith(f"{area}/")]
        drawn.append(rng.choices(held, [m.weight for m in held])[0])
    return drawn


# They enter themselves.
from . import (  # noqa: E402
    arrays,  # noqa: F401
    bombs,  # noqa: F401
    engines,  # noqa: F401
    graphs,  # noqa: F401
    manifest,  # noqa: F401
    names,  # noqa: F401
    operators,  # noqa: F401
    serialized,  # noqa: F401
    stored,  # noqa: F401
    values,  # noqa: F401
)
