"""bench: every subject in a process of its own, and all of them in turn."""

from __future__ import annotations

import contextlib
import multiprocessing
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass
from typing import TypeVar

from .. import backends
from ..bundle.bundle import Bundle
from ..core.backend import BACKENDS, ENGINE_BACKENDS, RUNNABLE
from ..core.plan import Plan
from ..errors import BackendUnavailable, PTQDError, RecipeError
from ..progress import progress
from . import subject as child
from .report import Bench, RunRow, row_of, versions
from .subject import Place, Subject

OPERATOR_CALLS = 5
SETTLE = 0.2
"""Seconds between calls of several threads: those of the last process turn for a while before they sleep."""
Say = Callable[[str], None]
Answer = TypeVar("Answer")


@dataclass(frozen=True)
class Settings:
    """How a bench is done.

    Attributes:
        backends: of the bundle's engines; empty is every one that works here.
        batch: rows of a call, and samples of a run.
        threads: CPU threads of everything.
        rounds: calls of each subject; 5 at least.
        runs: whole sampling runs of each plan; 0 for none.
        device: index of the GPU.
        plans: what the runs go by; the bundle's plan if empty.
    """

    backends: tuple[str, ...] = ()
    batch: int = 4
    threads: int = 1
    rounds: int = 20
    runs: int = 3
    device: int = 0
    plans: tuple[Plan, ...] = ()

    def __post_init__(self) -> None:
        if self.batch < 1 or self.threads < 1 or self.rounds < 5 or self.runs < 0:
            raise RecipeError(
                f"{self.batch} rows, {self.threads} threads, {self.rounds} rounds and {self.runs} runs: give "
                "at least 1, 1, 5 and 0"
            )


class _Process:
    """A subject in its process."""

    def __init__(self, subject: Subject, place: Place) -> None:
        self.subject = subject
        context = multiprocessing.get_context("spawn")
        self._pool = ProcessPoolExecutor(1, context, child.start, (place.threads,))
        self.seconds_to_open = self.ask(child.open_subject, subject, place)

    def ask(self, what: Callable[..., Answer], *args: object) -> Answer:
        """The answer of a function of `subject` in the process.

        Raises:
            PTQDError: as the function; BackendUnavailable where the process has ended.
        """
        try:
            return self._pool.submit(what, *args).result()
        except BrokenProcessPool as error:
            raise BackendUnavailable(
                f"the process of {self.subject.name} ended, most likely because memory ran out: end other "
                "programs, or bench fewer things"
            ) from error

    def close(self) -> None:
        self._pool.shutdown(cancel_futures=True)


def bench(
    bundle: Bundle, settings: Settings, others: Sequence[Subject] = (), say: Say = lambda text: None
) -> Bench:
    """Time a bundle's engines, whole runs of its plan, and others beside them.

    Args:
        others: `make_baselines`, of the same model.
        say: called with a line for each thing that is left out.
    Raises:
        RecipeError: nothing of it works here, or the settings do not fit.
        BundleError: the bundle is damaged.
    """
    m = bundle.manifest
    names = _backends(bundle, settings.backends, say)
    engines = [
        Subject(f"{precision} on {name}", "engine", str(precision), name)
        for name in names
        for precision in m.bops
    ]
    place = Place(bundle.path, settings.batch, settings.threads, settings.device)
    with contextlib.ExitStack() as stack:
        opened = []
        for one in (*others, *engines):
            try:
                opened.append(_Process(one, place))
            except PTQDError as error:
                say(f"{one.name} is left out: {error}")
                continue
            stack.callback(opened[-1].close)
        if not any(process.subject.kind == "engine" for process in opened):
            raise RecipeError(f"none of the bundle's engines runs here, on {', '.join(names)}")
        seconds = _in_turn(opened, child.timed, settings.rounds, settings.threads, "timing", warmup=1)
        rows = [
            row_of(p.subject, taken, p.seconds_to_open, p.ask(child.peak_bytes))
            for p, taken in zip(opened, seconds, strict=True)
        ]
        shares = {}
        for process in opened:
            operators = process.ask(child.operators, OPERATOR_CALLS)
            if operators:
                shares[process.subject.name] = operators
    plans = settings.plans or (m.plan,)
    runs = _runs([(name, plan) for name in names for plan in plans], place, settings) if settings.runs else []
    return Bench(
        model=m.sampling.model.name,
        bundle=bundle.seal,
        batch=settings.batch,
        threads=settings.threads,
        rounds=settings.rounds,
        rows=tuple(rows),
        operators=shares,
        runs=tuple(runs),
        versions=versions(),
    )


def _backends(bundle: Bundle, wanted: Sequence[str], say: Say) -> list[str]:
    """Backends that work here and that the bundle has engines for."""
    found = []
    for name, state in backends.available().items():
        if name not in RUNNABLE or (wanted and name not in wanted):
            continue
        if state == "ok" and name in ENGINE_BACKENDS and name not in bundle.manifest.backends:
            state = "the bundle has no engines for it"
        if state != "ok":
            if name in wanted:
                say(f"{name} is left out: {state}")
            continue
        found.append(name)
    if not found:
        raise RecipeError(f"no backend works here of {', '.join(wanted or BACKENDS)}: see the lines above")
    return found


def _in_turn(
    processes: Sequence[_Process],
    what: Callable[[], Answer],
    rounds: int,
    threads: int,
    title: str,
    warmup: int = 0,
) -> list[list[Answer]]:
    """The answers of each process, one per round, all asked in turn; `warmup` rounds are not counted."""
    found: list[list[Answer]] = [[] for _ in processes]
    with progress(rounds, f"{title}, all in turn", "round") as bar:
        for turn in range(-warmup, rounds):
            for process, answers in zip(processes, found, strict=True):
                time.sleep(SETTLE * (threads > 1))
                answer = process.ask(what)
                if turn >= 0:
                    answers.append(answer)
            bar.update(turn >= 0)
    return found


def _runs(asked: Sequence[tuple[str, Plan]], place: Place, settings: Settings) -> list[RunRow]:
    """Whole runs of plans on backends, in turn, and after each the calls of its engines."""
    with contextlib.ExitStack() as stack:
        processes = [_Process(Subject("run", "run", str(plan), backend), place) for backend, plan in asked]
        for process in processes:
            stack.callback(process.close)
        found = _in_turn(processes, child.run_and_calls, settings.runs, settings.threads, "whole runs")
        switches = [process.ask(child.switch_seconds, settings.rounds) for process in processes]
    return [
        RunRow.of(str(plan), backend, taken, switch)
        for (backend, plan), taken, switch in zip(asked, found, switches, strict=True)
    ]
