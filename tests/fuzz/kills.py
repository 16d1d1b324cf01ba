"""Kills of `build` and `run` at every file operation and at random moments: the old or the new, whole.

    python tests/fuzz/kills.py [--kills 200] [--seed 0] [--out report.json]

A case is a folder with an older bundle, or set of pictures, or none, beside files of a user's whose names
look like this package's own. The command is killed in it (some of the reruns too); then the target holds the
old content or the new, byte for byte, or nothing where there was nothing; the user's files are as they were;
and the same command, given again, writes what it would have written and leaves nothing else behind.
"""

from __future__ import annotations

import argparse
import collections
import json
import random
import re
import shutil
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
if __name__ == "__main__":
    sys.path[:0] = [str(ROOT), str(ROOT / "tests" / "support")]

from killing import Done, Server, When  # noqa: E402

from ptqd_export.bundle import Bundle  # noqa: E402
from ptqd_export.errors import PTQDError  # noqa: E402

NET = """
import torch
from torch import nn
from torch.nn import functional as F


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.inlet = nn.Conv2d(1, 8, 3, padding=1)
        self.clock = nn.Linear(2, 8)
        self.middle = nn.Conv2d(8, 8, 3, padding=1)
        self.outlet = nn.Conv2d(8, 1, 3, padding=1)

    def forward(self, sample, timestep):
        t = timestep[:, None] / 1000.0
        h = self.inlet(sample) + self.clock(torch.cat([t.sin(), t.cos()], 1))[:, :, None, None]
        return self.outlet(F.silu(h + self.middle(F.silu(h))))


def make():
    torch.manual_seed(0)
    return Net()
"""
RECIPE = """
[model]
source = "net.py:make"
sample_shape = [1, 8, 8]
scheduler = "scheduler_config.json"
[sampler]
n_steps = 2
eta = 1.0
[calibration]
size = 2
held_out = 2
[quantization]
precisions = ["fp32", "w8a8"]
[plan]
rule = "fixed"
steps = ["w8a8", "fp32"]
cost = "bops"
"""
TIMED = ("seconds_per_evaluation", "seconds_error", "time_ms", "seconds")
"""Keys of a manifest whose values no two builds share; and its own hash, which holds them."""
Content = dict[str, bytes]


def content(folder: Path) -> Content:
    """Every file below, by its path; of manifests, what two builds of one recipe share."""
    found = {str(f.relative_to(folder)): f.read_bytes() for f in folder.rglob("*") if f.is_file()}
    if "manifest.json" in found:
        data = _untimed(json.loads(found["manifest.json"]))
        found["manifest.json"] = json.dumps({**data, "sha256": ""}).encode()
    return found


def _untimed(data: Any) -> Any:
    if isinstance(data, dict):
        return {name: _untimed(value) for name, value in data.items() if name not in TIMED}
    return [_untimed(value) for value in data] if isinstance(data, list) else data


def entries(folder: Path) -> dict[str, tuple[Any, ...]]:
    """Every file, folder and link below: inode, and what it holds or where it leads."""
    found: dict[str, tuple[Any, ...]] = {}
    for path in sorted(folder.rglob("*")):
        held: Any = None
        if path.is_symlink():
            held = path.readlink()
        elif path.is_file():
            held = path.read_bytes(), path.stat().st_mtime_ns
        found[str(path.relative_to(folder))] = path.lstat().st_ino, held
    return found


@dataclass(frozen=True)
class Subject:
    """A command under test, and what it writes.

    Attributes:
        words: its command line but for the folder that it writes, which comes last.
        target: name of that folder.
        old: an older one, whole, to start from.
        references: content of the old one, and of what the command writes.
        runs: what it did when it ran to its end, where an older one stood, and where there was none.
    """

    name: str
    words: tuple[str, ...]
    target: str
    old: Path
    references: tuple[Content, Content]
    runs: dict[bool, Done]

    @property
    def owned(self) -> re.Pattern[str]:
        """Names beside the target that a killed command may leave."""
        name = re.escape(self.target)
        temporary = rf"\.{name}\.(tmp-[0-9a-f]{{16}}|probe-[0-9a-f]{{8}})"
        return re.compile(temporary + (rf"|{name}\.work" if self.name == "build" else ""))

    def step(self, old: bool) -> int:
        """The number of the operation that puts the target in place."""
        lines = enumerate(self.runs[old].operations, 1)
        end = f"/{self.target}"
        return max(n for n, line in lines if line.startswith("exchange") or line.endswith(end))

    def state(self, place: Path) -> str:
        """What the target is: "none", "old", "new", or what is wrong with it."""
        folder = place / self.target
        if not folder.exists():
            return "none"
        found = content(folder)
        if found not in self.references:
            return f"neither the old nor the new: {sorted(found)}"
        try:
            if self.name == "build":
                Bundle.open(folder)
            elif {"run.json", *json.loads(found["run.json"])["files"]} != found.keys():
                return "run.json names other files"
        except PTQDError as error:
            return f"damaged: {error}"
        return ("old", "new")[self.references.index(found)]

    def place(self, folder: Path, old: bool) -> Path:
        """A folder to run the command in, with a user's files."""
        name = self.target
        theirs = [
            *(f"{name}.txt", f"{name}2/keep", f"{name}.work.mine/keep", f".{name}.part"),
            *(f".{name}.probe-mine/keep", f".{name}.probe-01234567/keep", f".{name}.tmp-mine/keep"),
            *(f".{name}.tmp-{text}/keep" for text in ("0123456789abcde", "0123456789ABCDEF")),
            f".other{name}.tmp-0123456789abcdef/keep",
        ]
        if self.name == "run":
            theirs += [f"{name}.work/keep", f"{name}.work/.{name}.1.part"]
        for file in theirs:
            (folder / file).parent.mkdir(parents=True, exist_ok=True)
            (folder / file).write_text("theirs")
        (folder / f".{name}.tmp-00112233445566aa").symlink_to(f"{name}2")
        if old:
            shutil.copytree(self.old, folder / name)
        return folder


@dataclass(frozen=True)
class Case:
    """A kill: at an operation, or `delay` seconds after the command has started (`at` 0)."""

    old: bool
    at: int = 0
    when: When = "before"
    delay: float = 0.0
    again: int = 0
    """The rerun is killed too, before this operation."""


@dataclass
class Tally:
    """What became of all cases of a subject. Kills of reruns are counted apart."""

    kills: int = 0
    moments: collections.Counter[str] = field(default_factory=collections.Counter)
    outcomes: collections.Counter[str] = field(default_factory=collections.Counter)
    left: collections.Counter[str] = field(default_factory=collections.Counter)
    problems: list[str] = field(default_factory=list)


def ground(folder: Path, server: Server) -> tuple[Subject, Subject]:
    """A model, two bundles of it, two sets of pictures; and the commands that write the second of each."""
    model = folder / "model"
    model.mkdir(parents=True)
    (model / "net.py").write_text(NET)
    (model / "recipe.toml").write_text(RECIPE)
    (model / "scheduler_config.json").write_text("{}")
    server.prepare(model)
    bundle = folder / "first" / "bundle"
    builds = [("build", str(model), "--seed", seed, "--out") for seed in "01"]
    samples = [
        ("run", str(bundle), "--seed", str(seed), "--num-samples", str(n), "--backend", "ort-cpu", "--out")
        for seed, n in ((0, 3), (1, 5))
    ]
    subjects = []
    for name, (old, new), target in (("build", builds, "bundle"), ("run", samples, "pictures")):
        places = folder / "first" / target, folder / "second" / target
        for words, place in zip((old, new), places, strict=True):
            assert (done := server.run([*words, place])).code == 0, done
        contents = content(places[0]), content(places[1])
        assert contents[0] != contents[1]
        subject = Subject(name, new, target, places[0], contents, {})
        for older in (True, False):
            place = subject.place(folder / f"{name} {older}", older)
            subject.runs[older] = done = server.run([*new, place / target], [place])
            assert done.code == 0 and subject.state(place) == "new", (done, subject.state(place))
        subjects.append(subject)
    return subjects[0], subjects[1]


def cases(subject: Subject, rng: random.Random, kills: int) -> Iterator[Case]:
    """Every operation once, in a seeded order, then a moment after an operation and any moment in turn; where
    `kills` are too few for that, three quarters of them at operations, those around the last step among them.
    Without an end."""
    at = [
        Case(old, number, rng.choice(("before", "after")))
        for old, done in subject.runs.items()
        for number in range(1, len(done.operations) + 1)
    ]
    rng.shuffle(at)
    at.sort(key=lambda case: not _is_step(subject, case))  # stable: those that matter first
    most = max(kills * 3 // 4, 1)
    for case in at if len(at) <= kills else at[:most]:
        again = rng.randint(1, len(subject.runs[case.old].operations)) if rng.random() < 0.25 else 0
        yield Case(case.old, case.at, case.when, again=again)
    while True:
        old = rng.random() < 0.5
        done = subject.runs[old]
        yield Case(old, rng.randint(1, len(done.operations)), "soon", rng.uniform(0, 0.005) + 1e-6)
        yield Case(old, delay=rng.uniform(0, 1.05 * done.seconds))


def _is_step(subject: Subject, case: Case) -> bool:
    """The operation is the one that puts the target in place, or one of the next two."""
    return case.at - 2 <= subject.step(case.old) <= case.at


def run_case(server: Server, subject: Subject, case: Case, folder: Path, tally: Tally) -> None:
    """A case in a new folder; what is wrong goes into `tally.problems`."""
    place = subject.place(folder, case.old)
    theirs = entries(place)
    mine = {name for name in theirs if name.split("/")[0] == subject.target}
    words = [*subject.words, place / subject.target]

    def check(moment: str, allowed: Sequence[str], left: bool) -> str:
        state = subject.state(place)
        if state not in allowed:
            tally.problems.append(f"{subject.name} {case} {moment}: {state}, expected {' or '.join(allowed)}")
        now = {name: held for name, held in entries(place).items() if name.split("/")[0] != subject.target}
        if changed := [name for name in theirs.keys() - mine if theirs[name] != now.get(name)]:
            tally.problems.append(f"{subject.name} {case} {moment}: a user's {min(changed)} was touched")
        more = {name.split("/")[0] for name in now.keys() - theirs.keys()}
        tally.left.update({re.sub(r"[0-9a-f]{8,}$", "*", name) for name in more} if left else ())
        if wrong := [name for name in more if not (left and subject.owned.fullmatch(name))]:
            tally.problems.append(f"{subject.name} {case} {moment}: it left {min(wrong)}")
        return state

    if case.at:
        delay = {"delay": case.delay} if case.delay else {}
        done = server.run(words, [place], at=case.at, when=case.when, **delay)
    else:
        child = server.start(words, [place])
        time.sleep(case.delay)
        child.send(9)
        done = child.wait()
    if not done.killed and (done.code != 0 or (case.at and case.when != "soon")):
        tally.problems.append(f"{subject.name} {case}: not killed, but code {done.code}: {done.err}")
    before = "old" if case.old else "none"
    if done.killed:
        state = check("after the kill", (before, "new"), True)
        tally.kills += 1
        tally.moments[case.when if case.at else "any moment"] += 1
        tally.outcomes[state if state in ("none", "old", "new") else "wrong"] += 1
        if case.again:
            if server.run(words, [place], at=case.again).killed:
                tally.moments["rerun as well"] += 1
            state = check("after the second kill", (state, "new"), True)
            tally.outcomes[state if state in ("none", "old", "new") else "wrong"] += 1
    again = server.run(words, [place])
    if again.code != 0:
        tally.problems.append(f"{subject.name} {case}: the rerun fails: {again.err}")
    check("after the rerun", ("new",), False)
    shutil.rmtree(place)


def run_kills(server: Server, subject: Subject, folder: Path, rng: random.Random, kills: int) -> Tally:
    """Cases until there were `kills` kills."""
    tally = Tally()
    for number, case in enumerate(cases(subject, rng, kills)):
        if tally.kills >= kills:
            break
        run_case(server, subject, case, folder / f"{subject.name}-{number:04d}", tally)
    return tally


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--kills", type=int, default=200, help="Of each command; of reruns not counted.")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, help="A JSON report.")
    args = parser.parse_args()
    report: dict[str, Any] = {"seed": args.seed}
    with tempfile.TemporaryDirectory() as folder:
        scratch = Path(folder) / "scratch"
        scratch.mkdir()
        with Server(scratch) as server:
            for subject in ground(Path(folder) / "ground", server):
                rng, started = random.Random(f"{args.seed} {subject.name}"), time.monotonic()
                tally = run_kills(server, subject, Path(folder) / "places", rng, args.kills)
                report[subject.name] = {
                    "operations": {
                        "over an older one" if old else "new": len(done.operations)
                        for old, done in subject.runs.items()
                    },
                    "kills": tally.kills,
                    "moments": dict(tally.moments),
                    "outcomes": dict(tally.outcomes),
                    "left until the rerun": dict(tally.left),
                    "problems": tally.problems,
                    "seconds": round(time.monotonic() - started, 1),
                }
                print(json.dumps({subject.name: report[subject.name]}, indent=1), flush=True)
    if args.out:
        args.out.write_text(json.dumps(report, indent=1) + "\n")
    sys.exit(any(report[name]["problems"] for name in ("build", "run")))


if __name__ == "__main__":
    main()
