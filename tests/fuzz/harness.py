"""A case: a draft is written, given to the command line in a process of its own, and judged by what came of
it."""

from __future__ import annotations

import json
import os
import random
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import numpy as np

from .base import QUANTIZATION, WEIGHTS, Base, Draft, Link
from .watch import Watch

CHILD = Path(__file__).with_name("child.py")
WALL, MEMORY = 10.0, 500
"""Seconds of a command; MB above the start."""
MAX_LINE = 600
MAX_SHOWN = 2000
"""Characters of a line of a result."""
TOKEN = "canary-4c9f1e"
"""In every canary file, and nowhere else."""
GOOD = ("accepted", "refused")
FAILURES = (
    "crash", "hang", "memory", "escape", "internal error", "dirty line", "wrong exit", "bad picture", "let in"
)  # fmt: skip
EXHAUSTED = ("out of memory", "memory ran out", "allocate memory", "bad_alloc", "bad allocation")
"""A refusal in such words came after the memory was asked for."""
ORDERS = (("verify", "run", "inspect"), ("run", "verify", "inspect"), ("inspect", "verify", "run"))
WEIGHTS_OF_ORDERS = (7, 2, 1)


@dataclass(frozen=True)
class Outcome:
    """Of a case: what it was, why, and what it cost."""

    outcome: str
    why: str
    seconds: float
    peak: int

    @property
    def ok(self) -> bool:
        return self.outcome in GOOD


class Zygote:
    """The process that cases are forked from; started again after it died."""

    def __init__(self) -> None:
        self._process: subprocess.Popen[str] | None = None

    def _start(self) -> subprocess.Popen[str]:
        threads = {f"{name}_NUM_THREADS": "1" for name in ("OMP", "OPENBLAS", "MKL")}
        pipe = subprocess.PIPE
        process = subprocess.Popen(
            [sys.executable, str(CHILD)], stdin=pipe, stdout=pipe, text=True, env={**os.environ, **threads}
        )
        assert process.stdout is not None
        if not process.stdout.readline():
            raise RuntimeError("the child program did not start")
        return process

    def run(self, request: dict[str, Any]) -> dict[str, Any]:
        if self._process is None:
            self._process = self._start()
        assert self._process.stdin is not None and self._process.stdout is not None
        self._process.stdin.write(json.dumps(request) + "\n")
        self._process.stdin.flush()
        line = self._process.stdout.readline()
        if not line:
            self.close()
            return {"runs": [], "ended": "the harness died", "escapes": [], "peak": 0}
        answer: dict[str, Any] = json.loads(line)
        return answer

    def close(self) -> None:
        if self._process is not None:
            with self._process as process:
                process.kill()
            self._process = None

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


@contextmanager
def place_of(root: Path, name: str) -> Iterator[Path]:
    """A folder of one case, with canaries in it."""
    folder = root / name
    shutil.rmtree(folder, ignore_errors=True)
    (folder / "canary").mkdir(parents=True)
    for canary in ("secret.txt", "secret.bin", "secret.json", "secret.safetensors"):
        (folder / "canary" / canary).write_text(TOKEN * 400)
    try:
        yield folder
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def draft_of(base: Base, folder: Path, rng: random.Random) -> Draft:
    return Draft(base, rng, folder / "canary")


def commands(bundle: Path, order: Sequence[str]) -> list[list[str]]:
    out = str(bundle.parent / "out" / "pictures")
    more = {"run": ["--num-samples", "1", "--format", "npy", "--backend", "ort-cpu", "--out", out]}
    return [[name, str(bundle), *more.get(name, [])] for name in order]


def run_case(
    zygote: Zygote,
    draft: Draft,
    folder: Path,
    order: Sequence[str] = ORDERS[0],
    *,
    target: str = "cli",
    wall: float = WALL,
    memory: int = MEMORY,
) -> Outcome:
    """Write the draft into `folder`, run it, judge it."""
    started = time.monotonic()
    bundle = folder / "bundle"
    draft.write(bundle)
    for place in ("out", "cache"):
        (folder / place).mkdir()
    allowed = {f"canary/{name} opened" for name in draft.may_open}
    links = [
        content.target
        for content in (*draft.contents.values(), draft.manifest_as)
        if isinstance(content, Link)
    ]
    exact = [str(bundle / target) for target in links] + [str(draft.canary / name) for name in draft.may_open]
    extra = (
        [["@layers", str(bundle), json.dumps(draft.base.layers)]]
        if {QUANTIZATION, WEIGHTS} & draft.contents.keys()
        else []
    )
    request = {
        "folder": str(folder),
        "commands": commands(bundle, order) + extra,
        "target": target,
        "wall": wall,
        "memory": memory,
        "read": [str(bundle)],
        "exact": exact,  # what links lead to is looked at, and hashed
        "write": [str(folder / "out"), str(folder / "cache")],
    }
    with Watch() as watch:
        watch.add(draft.canary, opened=True)
        watch.add(bundle, opened=False)
        watch.add(folder, opened=False)
        answer = zygote.run(request)
        own = {f"{folder.name}/{i}.{what} changed" for i in range(9) for what in ("out", "err")}
        seen = watch.events() - allowed - own
    answer["escapes"] += sorted(seen)
    outcome, why = judge(answer, draft.refuse, "npy" if target == "cli" else "")
    if outcome == "accepted" and target == "cli":
        why = bad_picture(folder / "out" / "pictures")
        outcome = "bad picture" if why else outcome
    return Outcome(outcome, why, round(time.monotonic() - started, 3), answer["peak"])


def judge(answer: dict[str, Any], refuse: bool = False, form: str = "") -> tuple[str, str]:
    """(outcome, why)."""
    runs, ended = answer["runs"], answer["ended"]
    said = "".join(run["out"] + run["err"] for run in runs)
    if answer["escapes"]:
        return "escape", "; ".join(answer["escapes"])[:500]
    if TOKEN in said:
        return "escape", "the content of a file outside of the bundle is shown"
    if ended == "memory":
        return "memory", f"{answer['peak']} MB above the start"
    if ended == "wall":
        return "hang", said[:300]
    if ended != "exit":
        return "crash", f"{ended} {said[:300]}"
    for run in runs:
        wrong = judge_run(run)
        if wrong is not None:
            return wrong
    if answer["peak"] > MEMORY:
        return "memory", f"{answer['peak']} MB above the start"
    last = runs[-1]
    if last["code"] == 1:
        if len(runs) > 1:
            return "refused", f"after the first command: {last['err'].strip()}"
        return "refused", last["err"].strip()
    return ("let in", "accepted") if refuse else ("accepted", "")


def judge_run(run: dict[str, Any]) -> tuple[str, str] | None:
    """What is wrong with how one command ended, or None."""
    code, out, err = run["code"], run["out"], run["err"]
    if "internal error" in err or "Traceback" in err:
        return "internal error", err[:400]
    if code not in (0, 1):
        return "wrong exit", f"exit {code}: {err[:300]}"
    if any(words in err for words in EXHAUSTED):
        return "memory", err[:400]
    for line in (out + err).splitlines():
        if not line.replace("\t", " ").isprintable():
            return "dirty line", f"control characters: {line[:200]!a}"
        if len(line) > (MAX_LINE if code else MAX_SHOWN):
            return "dirty line", f"{len(line)} characters: {line[:200]!a}"
    if code == 0 and err:
        return "dirty line", f"accepted, and said {err[:200]!a}"
    if code == 1:
        if out:
            return "dirty line", f"refused, but stdout is {out[:200]!a}"
        if not (err.startswith("Error: ") and err.endswith("\n") and err.count("\n") == 1):
            return "dirty line", f"not one line: {err[:300]!a}"
    return None


def bad_picture(folder: Path) -> str:
    """What is wrong with the samples of an accepted bundle; "" where nothing is."""
    try:
        samples = np.load(folder / "samples.npy", allow_pickle=False)
    except (OSError, ValueError) as error:
        return f"no samples: {error}"
    return "" if samples.ndim == 4 and len(samples) == 1 and np.isfinite(samples).all() else "not finite"


def order_of(rng: random.Random) -> tuple[str, ...]:
    return rng.choices(ORDERS, WEIGHTS_OF_ORDERS)[0]


def plain(outcome: Outcome) -> dict[str, Any]:
    return asdict(outcome)
