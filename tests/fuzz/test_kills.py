"""Commands that are killed, interrupted, overtaken or led astray by links: the old or the new, whole.

A short, seeded part of kills.py, and what two processes do to each other: one is stopped at a file operation,
the other does its work, the first goes on.
"""

from __future__ import annotations

import contextlib
import json
import os
import random
import shutil
import signal
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import pytest
from killing import Done, Server

from ptqd_export.bundle import Bundle
from ptqd_export.files import MARK, replacing

from .kills import Case, Subject, Tally, content, entries, ground, run_case, run_kills

SEED, KILLS, POINTS = 0, 20, 2
"""Points: of each kind at which one process is stopped, or interrupted, in a race."""


@dataclass(frozen=True)
class World:
    server: Server
    build: Subject
    run: Subject

    @property
    def bundles(self) -> tuple[Path, Path]:
        """The old one and the new one."""
        return self.build.old, self.build.old.parents[1] / "second" / self.build.target


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Iterator[World]:
    folder = tmp_path_factory.mktemp("kills")
    (folder / "scratch").mkdir()
    with Server(folder / "scratch") as server:
        yield World(server, *ground(folder / "ground", server))


@pytest.fixture(params=["build", "run"])
def subject(request: pytest.FixtureRequest, world: World) -> Subject:
    found: Subject = getattr(world, request.param)
    return found


def points(done: Done, *wanted: str) -> list[int]:
    """Some of the operations of a command, seeded; and those whose lines hold one of these words."""
    last = len(done.operations)
    some = random.Random(SEED).sample(range(1, last + 1), min(POINTS, last))
    named = [n for n, line in enumerate(done.operations, 1) if any(word in line for word in wanted)]
    return sorted({*some, *named})


def others(place: Path, subject: Subject) -> dict[str, tuple[object, ...]]:
    """All that is not the target."""
    return {name: held for name, held in entries(place).items() if name.split("/")[0] != subject.target}


# --- kills


def test_kills(world: World, subject: Subject, tmp_path: Path) -> None:
    tally = run_kills(world.server, subject, tmp_path, random.Random(SEED), KILLS)
    assert tally.problems == []
    assert tally.kills >= KILLS and tally.outcomes.keys() == {"none", "old", "new"}
    assert {"before", "after", "soon"} <= tally.moments.keys()


class Vandal:
    """In the place of a Server: a command that does damage and is killed, and does it again in the rerun."""

    def __init__(self, damage: Callable[[Path], object]) -> None:
        self._damage = damage

    def run(self, words: Sequence[object], watch: Sequence[Path], **where: object) -> Done:
        self._damage(Path(str(words[-1])))
        return Done(-signal.SIGKILL if where else 0, "", "", (), 0.0)


def _mixes(out: Path, subject: Subject) -> None:
    for name, data in list(subject.references[1].items())[:-1]:
        (out / name).write_bytes(data)


@pytest.mark.parametrize(
    ("damage", "problem"),
    [
        (_mixes, "after the kill: neither the old nor the new"),
        (lambda out, subject: shutil.rmtree(out, ignore_errors=True), "after the kill: none, expected old"),
        (lambda out, subject: next(out.iterdir()).unlink(), "after the kill: neither the old nor the new"),
        (lambda out, subject: None, "after the rerun: old, expected new"),
        (
            lambda out, subject: (out.parent / f"{out.name}.txt").write_text("x"),
            f"after the kill: a user's {'{}'}.txt was touched",
        ),
        (
            lambda out, subject: shutil.rmtree(out.parent / f"{out.name}.work.mine", ignore_errors=True),
            "after the kill: a user's {}.work.mine was touched",
        ),
        (lambda out, subject: (out.parent / "x.part").write_text(""), "after the kill: it left x.part"),
        (
            lambda out, subject: (out.parent / f".{out.name}.tmp-{'0' * 16}").mkdir(exist_ok=True),
            "after the rerun: it left .{}.tmp-0000000000000000",
        ),
    ],
)
def test_damage_is_found(
    subject: Subject, tmp_path: Path, damage: Callable[[Path, Subject], object], problem: str
) -> None:
    tally = Tally()
    vandal = Vandal(lambda out: damage(out, subject))
    run_case(vandal, subject, Case(True, 1), tmp_path / "place", tally)  # type: ignore[arg-type]
    assert any(problem.format(subject.target) in found for found in tally.problems), tally.problems


def test_what_the_target_holds_is_judged(world: World, subject: Subject, tmp_path: Path) -> None:
    place = subject.place(tmp_path, old=True)
    assert subject.state(place) == "old"
    (place / subject.target / "more.png").write_bytes(b"")
    assert subject.state(place).startswith("neither the old nor the new")
    shutil.rmtree(place / subject.target)
    assert subject.state(place) == "none"


# --- two at once


@pytest.mark.parametrize("old", [True, False])
def test_two_runs_into_one_folder(world: World, tmp_path: Path, old: bool) -> None:
    """One wins, whole; the other one wins before it, or says in a line that it did not."""
    run = world.run
    first = (
        *run.words[:1],
        str(run.words[1]),
        "--seed",
        "0",
        "--num-samples",
        "3",
        "--backend",
        "ort-cpu",
        "--out",
    )
    for at in points(run.runs[old], "tmp-", f"/{run.target}", "exchange")[:: 1 if POINTS > 9 else 5]:
        place = run.place(tmp_path / f"{old}-{at}", old)
        theirs = others(place, run)
        late = world.server.start([*run.words, place / run.target], [place], at=at, sign=signal.SIGSTOP)
        assert late.wait().code is None
        early = world.server.run([*first, place / run.target])
        assert early.code == 0 and run.state(place) == "old", (at, early, run.state(place))
        done = late.go_on()
        assert done.code == 0 or done.line, (at, done)
        wins = done.code == 0 and at <= run.step(old)  # it had not put its set in place when it was stopped
        assert run.state(place) == ("new" if wins else "old"), (at, done)
        assert others(place, run) == theirs, at


def test_two_builds_on_one_target(world: World, tmp_path: Path) -> None:
    """One builds, the other says in a line that it is in use."""
    build = world.build
    done = build.runs[True]
    for at in points(done, "exchange", MARK):
        place = build.place(tmp_path / str(at), old=True)
        theirs = others(place, build)
        words = [*build.words, place / build.target]
        late = world.server.start(words, [place], at=at, sign=signal.SIGSTOP)
        assert late.wait().code is None
        early = world.server.run(words)
        ended = late.go_on()
        assert {early.code, ended.code} in ({0}, {0, 1}), (at, early, ended)
        for one in (early, ended):
            assert one.code == 0 or one.line, (at, one)
            assert one.code == 0 or "in use by another build" in one.err or "run the command" in one.err
        assert build.state(place) == "new" and others(place, build) == theirs, at


def test_a_bundle_replaced_during_a_run(world: World, tmp_path: Path) -> None:
    """The pictures are those of one bundle, the one whose seal stands beside them; or a line says why not."""
    server, words = world.server, ["--format", "npy", "--num-samples", "3", "--backend", "ort-cpu", "--out"]
    expected = {}
    old, new = world.bundles
    for name, path in (("old", old), ("new", new)):
        assert server.run(["run", path, *words, tmp_path / name]).code == 0
        expected[Bundle.open(path).seal] = content(tmp_path / name)
    bundle = tmp_path / "bundle"
    shutil.copytree(old, bundle)
    whole = server.run(["run", bundle, *words, tmp_path / "whole"], [bundle], reads=True)
    ended = []
    for at in points(whole, "manifest.json", "tables"):
        shutil.rmtree(bundle)
        shutil.copytree(old, bundle)
        out = tmp_path / f"out-{at}"
        child = server.start(["run", bundle, *words, out], [bundle], at=at, sign=signal.SIGSTOP, reads=True)
        assert child.wait().code is None
        _replace(bundle, new)
        ended.append((at, out, child.go_on()))
    for number in range(POINTS):  # where the runtime itself opens files, which is not counted
        shutil.rmtree(bundle)
        shutil.copytree(old, bundle)
        out = tmp_path / f"later-{number}"
        child = server.start(["run", bundle, *words, out])
        time.sleep((number + 0.5) / POINTS * whole.seconds)
        child.send(signal.SIGSTOP)
        _replace(bundle, new)
        child.send(signal.SIGCONT)
        done = child.wait()
        ended.append((-number, out, child.wait() if done.code is None else done))
    for at, out, done in ended:
        if done.code == 0:
            seal = json.loads((out / "run.json").read_text())["bundle"]
            assert content(out) == expected[seal], f"a mixture at {at}"
        else:
            assert done.line and "damaged" not in done.err and "replaced" in done.err, (at, done)
            assert not out.exists()


def _replace(bundle: Path, other: Path) -> None:
    with replacing(bundle) as folder:
        shutil.copytree(other, folder, dirs_exist_ok=True)


def test_what_appears_in_the_target_meanwhile_is_kept(world: World, subject: Subject, tmp_path: Path) -> None:
    """A user's file that is put into the old bundle, or set, while the command works."""
    for at in points(subject.runs[True], "tmp-")[:: 1 if POINTS > 9 else 12]:
        if at > subject.step(True):
            break  # the target is the new one by now
        place = subject.place(tmp_path / str(at), old=True)
        words = [*subject.words, place / subject.target]
        child = world.server.start(words, [place], at=at, sign=signal.SIGSTOP)
        assert child.wait().code is None
        (place / subject.target / "thesis.tex").write_text("theirs")
        done = child.go_on()
        assert (place / subject.target / "thesis.tex").exists(), (at, done)


# --- interrupted


@pytest.mark.parametrize("sign", [signal.SIGINT, signal.SIGTERM])
def test_an_interrupt_is_one_line(
    world: World, subject: Subject, tmp_path: Path, sign: signal.Signals
) -> None:
    """And the old or the new stands; what it says of that is true."""
    for at in points(subject.runs[True], "exchange"):
        place = subject.place(tmp_path / str(at), old=True)
        theirs = others(place, subject)
        words = [*subject.words, place / subject.target]
        done = world.server.run(words, [place], at=at, sign=sign)
        assert done.code in (0, 128 + sign), (at, done)
        assert done.code == 0 or (done.line or "").startswith("Error: interrupted"), (at, done)
        state = subject.state(place)
        assert state in ("old", "new") and (done.code or state == "new"), (at, done)
        assert state == "old" or "nothing was changed" not in done.err, (at, done)
        left = {name.split("/")[0] for name in others(place, subject).keys() - theirs.keys()}
        assert all(subject.owned.fullmatch(name) for name in left), (at, left)
        assert world.server.run(words, [place]).code == 0
        assert subject.state(place) == "new" and others(place, subject) == theirs


def _children(pid: int) -> set[int]:
    found = set()
    for stat in Path("/proc").glob("[0-9]*/stat"):
        with contextlib.suppress(OSError):
            if int(stat.read_text().rpartition(")")[2].split()[1]) == pid:
                found.add(int(stat.parent.name))
    return found


def _running(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


def _until(condition: Callable[[], bool]) -> bool:
    end = time.monotonic() + 20
    while not condition() and time.monotonic() < end:
        time.sleep(0.05)
    return condition()


@pytest.mark.parametrize("sign", [signal.SIGKILL, signal.SIGTERM])
def test_workers_end_with_their_parent(world: World, tmp_path: Path, sign: signal.Signals) -> None:
    """Nothing goes on in the background, whichever way a run with workers is ended."""
    words = ("--num-samples", "1000000", "--batch-size", "10", "--workers", "2", "--format", "npy")
    child = world.server.start(["run", world.build.old, *words, "--out", tmp_path / "out"])
    assert _until(lambda: len(_children(child.pid)) >= 3), child.read(".err")  # and the one that tracks them
    children = _children(child.pid)
    time.sleep(0.2)
    child.send(sign)
    done = child.wait()
    try:
        assert _until(lambda: not any(map(_running, children)))
    finally:
        for pid in filter(_running, children):
            os.kill(pid, signal.SIGKILL)
    assert done.code in (-signal.SIGKILL, 128 + signal.SIGTERM), done
    assert list(tmp_path.iterdir()) == []


# --- folders of others, and links


def refused(world: World, subject: Subject, place: Path, message: str) -> None:
    """The command ends with one line, and nothing in `place` has changed."""
    before = entries(place)
    done = world.server.run([*subject.words, place / subject.target], [place])
    assert done.code == 1 and done.line and message in done.err, done
    assert entries(place) == before


def test_a_work_folder_of_others_is_refused(world: World, tmp_path: Path) -> None:
    for kind in ("theirs", "link to ours", "link in it", "link as mark", "file"):
        place = world.build.place(tmp_path / kind, old=kind != "file")
        work = place / f"{world.build.target}.work"
        (place / "theirs").mkdir()
        (place / "theirs" / MARK).write_text("")
        (place / "theirs" / "keep").write_text("theirs")
        if kind == "link to ours":
            work.symlink_to("theirs")
        elif kind == "file":
            work.write_text("theirs")
        else:
            work.mkdir()
            (work / "keep").write_text("theirs")
        if kind == "link in it":
            (work / MARK).write_text("")
            (work / "deep").mkdir()
            (work / "deep" / "trajectories").symlink_to("../../theirs")
        elif kind == "link as mark":
            (work / MARK).symlink_to("../theirs/keep")
        message = {"theirs": "that no build made", "link as mark": "that no build made"}.get(kind, "a link")
        refused(world, world.build, place, message)


def test_a_target_that_is_a_link(world: World, subject: Subject, tmp_path: Path) -> None:
    """To a user's folder, or a file: refused. To an older bundle, or set: that is replaced, the link kept."""
    place = subject.place(tmp_path / "theirs", old=False)
    (place / subject.target).symlink_to(f"{subject.target}2")
    refused(world, subject, place, "is a folder with other things in it")
    (place / subject.target).unlink()
    (place / subject.target).symlink_to(f"{subject.target}.txt")
    refused(world, subject, place, "is a file")
    (place / subject.target).unlink()
    (place / subject.target).symlink_to(subject.target)
    refused(world, subject, place, "cannot write to")
    place = subject.place(tmp_path / "ours", old=True)
    (place / subject.target).rename(place / "real")
    (place / subject.target).symlink_to("real")
    done = world.server.run([*subject.words, place / subject.target])
    assert done.code == 0 and (place / subject.target).is_symlink() and subject.state(place) == "new"


def test_links_in_the_target_are_not_followed(world: World, subject: Subject, tmp_path: Path) -> None:
    """A link in an older set that leads to a user's file, under a name of the set: whatever happens, the file
    stays as it was."""
    place = subject.place(tmp_path / "place", old=True)
    theirs = others(place, subject)
    for path in sorted((place / subject.target).iterdir()):
        if path.name not in ("run.json", "manifest.json"):
            path.unlink()
            path.symlink_to(place / f"{subject.target}.txt")
    done = world.server.run([*subject.words, place / subject.target])
    assert done.code == 0 or done.line, done
    assert others(place, subject) == theirs
