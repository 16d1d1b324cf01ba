"""A short run of the fuzzer, every known hole, and that the harness sees each kind of failure."""

from __future__ import annotations

import os
import random
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from helpers import Built

ROOT = Path(__file__).parents[2]
if str(ROOT) not in sys.path:
    sys.path.append(str(ROOT))

from tests.fuzz import corpus_graphs  # noqa: E402, F401  (its cases enter themselves)
from tests.fuzz.base import MANIFEST, Base, Draft  # noqa: E402
from tests.fuzz.campaign import SKIPPED, check_base, draft_case, report, run_many, table  # noqa: E402
from tests.fuzz.corpus import BOUNDED, CORPUS, HARMLESS  # noqa: E402
from tests.fuzz.harness import FAILURES, Outcome, Zygote, draft_of, place_of, run_case  # noqa: E402
from tests.fuzz.mutations import MUTATIONS, SHARES  # noqa: E402

CASES, SEED, WORKERS = 150, 1, 2
BAD = Path(__file__).with_name("bad.py")

Change = Callable[[Draft], object]


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("fuzz")


@pytest.fixture(scope="module")
def base(classes: Built, root: Path) -> Base:
    return Base.copied(classes.path, root / "base", slim=True)


@pytest.fixture(scope="module")
def zygote() -> Iterator[Zygote]:
    with Zygote() as made:
        yield made


@pytest.fixture
def outcome(base: Base, root: Path, zygote: Zygote) -> Callable[[Change], Outcome]:
    """What comes of a changed bundle."""

    def run(change: Change, refuse: bool) -> Outcome:
        with place_of(root, "case") as folder:
            draft = draft_of(base, folder, random.Random(0))
            draft.refuse = refuse
            change(draft)
            return run_case(zygote, draft, folder)

    return run


def test_the_right_bundle_is_accepted(base: Base, root: Path) -> None:
    found = check_base(base, root)
    assert (found.outcome, found.why) == ("accepted", "")
    assert 0 < found.peak < 300


def test_a_short_run(base: Base, root: Path) -> None:
    """No crash, hang, escape, ...: every bundle is refused with one line, or does no harm."""
    before = {file: (file.stat().st_mtime_ns, file.stat().st_size) for file in base.folder.iterdir()}
    lines = run_many(base, root, SEED, range(CASES), WORKERS)
    found = report(lines)
    assert found["failures"] == [], table(found)
    counts = found["outcomes"]
    assert counts["refused"] > CASES // 2 and counts["accepted"] > 5 and counts.get(SKIPPED, 0) < 5
    assert before == {file: (file.stat().st_mtime_ns, file.stat().st_size) for file in base.folder.iterdir()}


@pytest.mark.parametrize("name", CORPUS)
def test_a_known_hole_is_closed(name: str, outcome: Callable[..., Outcome]) -> None:
    found = outcome(CORPUS[name], refuse=True)
    assert found.outcome == "refused", found
    assert found.seconds < 10


@pytest.mark.parametrize("name", HARMLESS)
def test_what_does_no_harm_is_accepted(name: str, outcome: Callable[..., Outcome]) -> None:
    found = outcome(HARMLESS[name], refuse=False)
    assert found.outcome == "accepted", found


@pytest.mark.parametrize("name", BOUNDED)
def test_what_is_large_stays_in_bounds(name: str, outcome: Callable[..., Outcome]) -> None:
    found = outcome(BOUNDED[name], refuse=False)
    assert found.ok, found


def test_cases_repeat_themselves(base: Base, root: Path) -> None:
    """By their seed and number alone."""

    def written(index: int) -> tuple[list[str], dict[str, object], bytes]:
        with place_of(root, "same") as folder:
            draft, _, _ = draft_case(base, folder, 7, index)
            draft.write(folder / "bundle")
            manifest = folder / "bundle" / MANIFEST
            content = manifest.read_bytes() if manifest.is_file() and not manifest.is_symlink() else b""
            return draft.notes, dict(draft.contents), content

    for index in range(40):
        assert written(index) == written(index)
    assert written(1) != written(2)


def test_every_area_has_mutations() -> None:
    areas = {name.partition("/")[0] for name in MUTATIONS}
    assert areas == set(SHARES) and len(MUTATIONS) > 60


@pytest.mark.parametrize(
    ("target", "expected"),
    [
        ("good", "accepted"),
        ("refuses", "refused"),
        ("crash", "crash"),
        ("hang", "hang"),
        ("hang_deaf", "hang"),
        ("allocate", "memory"),
        ("allocate_shortly", "memory"),
        ("exhausted", "memory"),
        ("open_canary", "escape"),
        ("open_canary_in_c", "escape"),
        ("open_elsewhere", "escape"),
        ("write_beside", "escape"),
        ("write_bundle", "escape"),
        ("start_program", "escape"),
        ("load_pickle", "escape"),
        ("show_canary", "escape"),
        ("internal", "internal error"),
        ("trace", "internal error"),
        ("raises", "wrong exit"),
        ("two_lines", "dirty line"),
        ("escapes", "dirty line"),
        ("long_line", "dirty line"),
        ("on_stdout", "dirty line"),
        ("silent", "dirty line"),
        ("warns", "dirty line"),
        ("code_two", "wrong exit"),
    ],
)
def test_the_harness_sees(target: str, expected: str, base: Base, root: Path, zygote: Zygote) -> None:
    with place_of(root, "bad") as folder:
        draft = draft_of(base, folder, random.Random(0))
        wall = 1.0 if expected == "hang" else 10.0
        found = run_case(zygote, draft, folder, ("verify",), target=f"{BAD}:{target}", wall=wall, memory=100)
    assert found.outcome == expected, found
    assert expected in (*FAILURES, "accepted", "refused")


def test_an_accepted_bundle_that_must_be_refused_is_seen(outcome: Callable[..., Outcome]) -> None:
    assert outcome(lambda draft: None, refuse=True).outcome == "let in"


def test_a_run_is_taken_up(base: Base, root: Path, tmp_path: Path) -> None:
    """From its journal, whose last line may be cut off; the report is that of one run."""
    journal = tmp_path / "report.jsonl"
    first = run_many(base, root, 3, range(4), 1, journal)
    with journal.open("a") as file:
        file.write('{"index": 4, "outc')
    taken = run_many(base, root, 3, range(4), 1, journal)
    assert taken == first
    assert report(taken, seed=3)["outcomes"] == report(first)["outcomes"]
    assert "cases" in table(report(taken))


def test_no_process_is_left(zygote: Zygote) -> None:
    """A killed case is gone when the next one runs."""
    children = Path(f"/proc/{os.getpid()}/task/{os.getpid()}/children").read_text().split()
    for child in children:
        below = Path(f"/proc/{child}/task/{child}/children")
        name = Path(f"/proc/{child}/cmdline").read_text()
        if "child.py" in name:
            assert below.read_text() == ""
