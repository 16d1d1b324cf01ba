"""What is finished is taken up; what is damaged, lost or half written is done again."""

from __future__ import annotations

import contextlib
import json
from dataclasses import replace
from pathlib import Path

import pytest
from helpers import content, full_disk

from ptqd_export.errors import BundleError, PTQDError, RecipeError
from ptqd_export.farm.folder import INDEX, JOURNAL, Shards, held_order, open_shards
from ptqd_export.farm.order import Done, Order, Shard
from ptqd_export.files import sha256_file


def write(shards: Shards, shard: Shard, data: bytes = b"samples") -> Done:
    """A worker's part: the file and its report."""
    path = shards.folder / shards.order.file(shard)
    path.write_bytes(data + bytes([shard.number]))
    size, sha256 = path.stat().st_size, sha256_file(path)
    return Done(shard.number, path.name, shard.samples.start, len(shard.samples), size, sha256)


def fill(out: Path, order: Order, n: int, numbers: list[int]) -> None:
    with open_shards(out, order, n) as shards:
        for shard in shards.missing:
            if shard.number in numbers:
                shards.add(write(shards, shard))


def missing(out: Path, order: Order, n: int) -> list[int]:
    with open_shards(out, order, n) as shards:
        return [shard.number for shard in shards.missing]


def test_only_what_is_missing_is_done(tmp_path: Path, order: Order) -> None:
    out = tmp_path / "a" / "out"
    fill(out, order, 11, [2, 0])
    assert missing(out, order, 11) == [1] and held_order(out) == order
    fill(out, order, 11, [1])
    assert missing(out, order, 11) == []
    other = tmp_path / "other"
    fill(other, order, 11, [0, 1, 2])  # in one go: the same, whatever was done when
    assert content(out) == content(other) and INDEX in content(out) and JOURNAL not in content(out)


@pytest.mark.parametrize(("batch", "shard"), [(0, 4), (2, 0), (3, 4), (-2, 4)])
def test_odd_numbers_of_an_index(tmp_path: Path, order: Order, batch: int, shard: int) -> None:
    """It counts as damaged, and nothing is divided by it."""
    out = tmp_path / "out"
    fill(out, order, 8, [0, 1])
    index = json.loads((out / INDEX).read_text())
    index["order"] |= {"batch_size": batch, "shard_size": shard}
    (out / INDEX).write_text(json.dumps(index))
    assert held_order(out) is None
    with pytest.raises(RecipeError, match=f"damaged .*shards of {shard} samples in batches of {batch}"):
        missing(out, order, 8)


def test_more_samples_later(tmp_path: Path, order: Order) -> None:
    """A last shard that was short is done again."""
    out = tmp_path / "out"
    fill(out, order, 6, [0, 1])
    assert missing(out, order, 8) == [1]
    fill(out, order, 8, [1])
    assert missing(out, order, 12) == [2]
    with pytest.raises(RecipeError, match=r"holds shards of 12 samples, more than 8: ask for as many"):
        missing(out, order, 8)


@pytest.mark.parametrize("damage", ["flip", "cut", "remove"])
def test_damaged_shards_are_done_again(tmp_path: Path, order: Order, damage: str) -> None:
    out = tmp_path / "out"
    fill(out, order, 8, [0, 1])
    file = out / "shard-000001.tar"
    data = file.read_bytes()
    if damage == "remove":
        file.unlink()
    else:
        file.write_bytes(data[:-1] if damage == "cut" else b"S" + data[1:])
    assert missing(out, order, 8) == [1]


def test_a_kill_leaves_what_was_noted(tmp_path: Path, order: Order) -> None:
    """The index is of the start, the note of the second shard is cut, and a worker left a part of a file."""
    out = tmp_path / "out"
    fill(out, order, 12, [])
    with open_shards(out, order, 12) as shards:
        for shard in shards.missing[:2]:
            shards.add(write(shards, shard))
        killed = content(out)
    for name, data in killed.items():
        (out / name).write_bytes(data)
    notes = (out / JOURNAL).read_bytes()
    (out / JOURNAL).write_bytes(notes[:-5])
    (out / ".shard-000001.tar.999999999.0123abcd.part").write_bytes(b"half")
    assert missing(out, order, 12) == [1, 2]
    assert not list(out.glob(".*"))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"seed": 2},
            r"holds shards of another run \(seed 1, now 2\): ask for the same, or give another --out",
        ),
        ({"bundle": "1" * 64}, r"another run \(bundle '000.*now '111"),
        ({"plan": "w8a8*2"}, r"another run \(plan 'fp32\*2', now 'w8a8\*2'\)"),
        ({"batch_size": 4}, r"another run \(batch_size 2, now 4\)"),
        ({"labels": (3,)}, r"another run \(labels \[\], now \[3\]\)"),
        ({"versions": {"numpy": "9"}}, r"another run \(versions \{\}, now \{'numpy': '9'\}\)"),
    ],
)
def test_another_order_is_refused(
    tmp_path: Path, order: Order, changes: dict[str, object], message: str
) -> None:
    out = tmp_path / "out"
    fill(out, order, 8, [0])
    before = content(out)
    with pytest.raises(RecipeError, match=message):
        missing(out, replace(order, **changes), 8)
    assert content(out) == before


def test_other_folders_are_refused(tmp_path: Path, order: Order) -> None:
    (tmp_path / "file").write_text("x")
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "thesis.txt").write_text("x")
    (tmp_path / "lost").mkdir()
    (tmp_path / "lost" / "shard-000000.tar").write_text("x")  # without an index: of whom?
    before = content(tmp_path)
    for name, message in (
        ("file", "is a file"),
        ("other", "'thesis.txt' is not of an earlier run"),
        ("lost", "'shard-000000.tar' is not of an earlier run"),
    ):
        with pytest.raises(RecipeError, match=message):
            missing(tmp_path / name, order, 8)
    (tmp_path / "other" / "thesis.txt").rename(tmp_path / "other" / INDEX)
    with pytest.raises(RecipeError, match=f"{INDEX} is damaged"):
        missing(tmp_path / "other", order, 8)
    assert content(tmp_path).keys() == before.keys() - {"other/thesis.txt"} | {f"other/{INDEX}"}


def test_nothing_is_left_of_a_run_that_did_nothing(tmp_path: Path, order: Order) -> None:
    with pytest.raises(ZeroDivisionError), open_shards(tmp_path / "a" / "out", order, 8):
        raise ZeroDivisionError
    assert content(tmp_path) == {} and not list(tmp_path.iterdir())


def test_one_process_at_a_time(tmp_path: Path, order: Order) -> None:
    with (
        open_shards(tmp_path / "out", order, 8),
        pytest.raises(BundleError, match="is in use by another run: wait"),
        open_shards(tmp_path / "out", order, 8),
    ):
        raise AssertionError


def test_what_a_killed_worker_left_goes(tmp_path: Path, order: Order) -> None:
    """Whether the run that it was of has ended well, or badly."""
    out = tmp_path / "out"
    for error in (None, ZeroDivisionError):
        with contextlib.suppress(ZeroDivisionError), open_shards(out, order, 8) as shards:
            (out / ".shard-000001.tar.12345.0123abcd.part").write_bytes(b"half")
            if error is not None:
                raise error
            shards.add(write(shards, shards.missing[0]))
        assert set(content(out)) == {INDEX, "shard-000000.tar"}


def test_folders_that_are_not_shared(tmp_path: Path, order: Order) -> None:
    """A worker on another machine wrote into a folder of its own."""
    with open_shards(tmp_path / "out", order, 8) as shards:
        done = write(shards, shards.missing[0])
        (shards.folder / done.file).unlink()
        with pytest.raises(PTQDError, match=r"does not hold it here: give an --out that all machines share"):
            shards.add(done)


def test_a_full_disk(tmp_path: Path, order: Order) -> None:
    with pytest.raises(PTQDError, match="free some space"), full_disk(50):
        fill(tmp_path / "out", order, 8, [0])
