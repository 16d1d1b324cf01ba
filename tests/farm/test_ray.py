"""On a Ray of two CPUs here: one worker, two, one that is killed, a driver that is killed: the same files."""

from __future__ import annotations

import functools
import json
import os
import signal
import sys
import time
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from helpers import Built, Invoke, Launch, content

from ptqd_export import run
from ptqd_export.bundle.bundle import MANIFEST
from ptqd_export.errors import BackendUnavailable, ModelError, PTQDError, RecipeError
from ptqd_export.farm import sample_shards
from ptqd_export.farm.folder import INDEX, JOURNAL
from ptqd_export.runtime import usual_batch

ray = pytest.importorskip("ray", reason="ray is not installed: pip install '.[ray]'")
pq = pytest.importorskip("pyarrow.parquet", reason="pyarrow is not installed: pip install '.[ray]'")
from ptqd_export.farm import pool  # noqa: E402

pytestmark = pytest.mark.filterwarnings("ignore")  # Ray's own


@pytest.fixture(scope="module")
def two() -> Iterator[None]:
    """A Ray of two CPUs, which all runs of this process join."""
    for name, value in pool.QUIET.items():
        os.environ.setdefault(name, value)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        ray.init(
            address="local", num_cpus=2, include_dashboard=False, log_to_driver=False,
            object_store_memory=pool.OBJECT_STORE,
        )  # fmt: skip
        yield
        ray.shutdown()


def parent(pid: int) -> int:
    return int(Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[1])


def workers() -> list[int]:
    """Processes of actors that sample, of this process's Ray: children of its raylet."""
    found = []
    for folder in Path("/proc").glob("[0-9]*"):
        try:
            name = (folder / "cmdline").read_bytes()
            if name.startswith(b"ray::MapWorker") and parent(parent(int(folder.name))) == os.getpid():
                found.append(int(folder.name))
        except OSError:
            continue
    return found


def shards(bundle: Built, out: Path, n: int = 24, count: int = 2, **more: object) -> list[int]:
    """Samples in shards of four; returns the actors that were seen, and checks that all is there."""
    seen: set[int] = set()
    asked: dict[str, Any] = {"advance": lambda samples: seen.update(workers()), **more}
    done = sample_shards(
        bundle.path, out, n, workers=count, seed=3, batch_size=2, shard_size=4, content="npy",
        backend="ort-cpu", **asked,
    )  # fmt: skip
    assert (done.num_samples, done.shards, done.workers) == (n, -(-n // 4), count)
    return sorted(seen)


@pytest.fixture(scope="module")
def whole(classes: Built, two: None, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What two workers write."""
    out = tmp_path_factory.mktemp("whole") / "out"
    assert len(shards(classes, out)) == 2
    return out


def test_the_samples_are_those_of_run(classes: Built, whole: Path) -> None:
    x = run(classes.bundle, 24, seed=3, batch_size=2, backend="ort-cpu")
    tables = [pq.ParquetFile(path).read() for path in sorted(whole.glob("shard-*"))]
    got = np.array([row for table in tables for row in table["sample"].to_pylist()], np.float32)
    np.testing.assert_array_equal(got.reshape(x.shape), x.astype(np.float32))
    index = json.loads((whole / INDEX).read_text())
    assert index["complete"] and index["num_samples"] == sum(shard["rows"] for shard in index["shards"])
    assert set(content(whole)) == {INDEX, *(shard["file"] for shard in index["shards"])}


def test_a_worker_that_is_killed(classes: Built, whole: Path, tmp_path: Path) -> None:
    """One alone, at work on the second shard: its shard is done again by its successor; nothing else differs
    from two."""
    killed: list[int] = []

    def kill(samples: int) -> None:
        if not killed:
            killed.extend(workers())
            os.kill(killed[0], signal.SIGKILL)

    shards(classes, tmp_path / "out", count=1, advance=kill)
    assert len(killed) == 1
    assert content(tmp_path / "out") == content(whole)


def test_only_missing_shards_are_sampled(classes: Built, whole: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    out.mkdir()
    for name, data in content(whole).items():
        (out / name).write_bytes(data)
    (out / "shard-000004.parquet").write_bytes(b"damaged")
    before = {path.name: path.stat().st_mtime_ns for path in out.glob("shard-*")}
    told: list[int] = []
    shards(
        classes, out, count=1, begun=lambda samples, kept: told.extend((samples, kept)), advance=told.append
    )
    after = {path.name: path.stat().st_mtime_ns for path in out.glob("shard-*")}
    assert {name for name in after if after[name] != before[name]} == {"shard-000004.parquet"}
    assert told == [24, 20, 4] and content(out) == content(whole)


def test_a_batch_that_nobody_asked_for(classes: Built, two: None, tmp_path: Path) -> None:
    """That of the shards that are there; else what suits the machine, whatever the number of workers."""

    def batch(name: str, n: int, count: int = 1, **more: Any) -> int:
        asked: dict[str, Any] = {"workers": count, "content": "npy", "backend": "ort-cpu", **more}
        return sample_shards(classes.path, tmp_path / name, n, **asked).order.batch_size

    assert batch("two", 4, count=2) == batch("one", 4) == usual_batch(classes.bundle, "ort-cpu", 2)
    assert batch("other", 3, batch_size=3) == batch("other", 6) == 3
    with pytest.raises(RecipeError, match="--shard-size 5 is no multiple of --batch-size 4"):
        batch("third", 5, shard_size=5)


def test_conditions_beside_classes_are_refused(classes: Built, tmp_path: Path) -> None:
    """A dataset may hold no classes: those that were given would be noted, and not be drawn."""
    with pytest.raises(RecipeError, match="conditions were given beside classes or prompts"):
        sample_shards(classes.path, tmp_path / "out", 2, labels=[1], conditions=tmp_path / "c.parquet")


def test_errors_of_workers_are_one_line(classes: Built, two: None, tmp_path: Path) -> None:
    """A folder in the place of a shard: its worker's error arrives, and the shards that were done stay."""
    out = tmp_path / "out"

    def spoil(samples: int, kept: int) -> None:
        (out / "shard-000001.parquet").mkdir()

    with pytest.raises(PTQDError, match=r"^cannot write .*shard-000001.* \(Is a directory\)"):
        shards(classes, out, count=1, begun=spoil)
    assert [shard["shard"] for shard in json.loads((out / INDEX).read_text())["shards"]] == [0]


def test_a_driver_that_is_killed(
    classes: Built, whole: Path, launch: Launch, invoke: Invoke, tmp_path: Path
) -> None:
    """With its own Ray, by the command line; the same command then does what is missing."""
    out = tmp_path / "out"
    words = (
        "run", classes.path, "--ray", "--workers", 1, "--out", out, "--num-samples", 24, "--seed", 3,
        "--batch-size", 2, "--shard-size", 4, "--content", "npy", "--backend", "ort-cpu",
    )  # fmt: skip
    process = launch(*words, PYTHONPATH=os.pathsep.join(filter(None, sys.path)))
    end = time.monotonic() + 240
    while not (out / JOURNAL).exists() and time.monotonic() < end:
        assert process.poll() is None, process.communicate()
        time.sleep(0.01)
    process.kill()
    process.wait()
    done = (out / JOURNAL).read_text().count("\n")
    assert 1 <= done < 6
    result = invoke(*words, "--json")  # in the Ray of two
    assert result.code == 0 and "Error" not in result.err
    assert result.json["kept"] in (done, done + 1) and result.json["workers"] == 1
    assert content(out) == content(whole)


def slow_square(folder: Path) -> Callable[[int], int]:
    """Squares; the first worker that meets 3 dies of it."""

    def work(item: int) -> int:
        if item == 3 and not (folder / "died").exists():
            (folder / "died").touch()
            os.kill(os.getpid(), signal.SIGKILL)
        if item == 7:
            raise ModelError("seven")
        return item * item

    return work


@pytest.mark.parametrize("count", [1, 2])
def test_work_of_any_kind(two: None, tmp_path: Path, count: int) -> None:
    """Every item once, also that whose worker died; a worker's own error ends it, and no actor stays."""
    make = functools.partial(slow_square, tmp_path)
    with pool.connect("auto", count, "ort-cpu") as workers:
        assert sorted(workers.map(make, range(6))) == [(i, i * i) for i in range(6)]
        assert (tmp_path / "died").exists()
        with pytest.raises(ModelError, match=r"^seven$"):
            list(workers.map(make, range(9)))
        assert sorted(workers.map(make, [1])) == [(1, 1)]


@pytest.mark.parametrize("count", [1, 2])
def test_a_build_is_the_same(classes: Built, two: None, invoke: Invoke, tmp_path: Path, count: int) -> None:
    words = ("--out", tmp_path / "out", "--ray", "--workers", count, "--json")
    result = invoke("build", classes.recipe, *classes.options, *words)
    assert (result.code, result.err) == (0, "")
    alone, got = content(classes.path), content(tmp_path / "out")
    for files in (alone, got):
        del files[MANIFEST]  # seconds are its own
    assert got == alone


def test_an_evaluation_is_the_same(classes: Built, two: None, invoke: Invoke, tmp_path: Path) -> None:
    words = ("--plan", "w8a8", "--num-samples", 6, "--batch-size", 2, "--resamples", 10, "--json")
    words = ("eval", classes.path, *words, "--backend", "ort-cpu")
    alone = invoke(*words, "--out", tmp_path / "a")
    for count in (1, 2):
        got = invoke(*words, "--out", tmp_path / f"b{count}", "--ray", "--workers", count)
        assert (got.code, got.err) == (0, "")
        assert {**got.json, "out": ""} == {**alone.json, "out": ""}


def test_addresses_that_are_none(classes: Built, tmp_path: Path) -> None:
    with pytest.raises(RecipeError, match=r"--ray 'ray://head:10001': expected auto or HOST:PORT"):
        shards(classes, tmp_path / "out", address="ray://head:10001")
    assert not list(tmp_path.iterdir())


def test_a_gpu_that_is_not_there(two: None) -> None:
    with (
        pytest.raises(BackendUnavailable, match=r"this Ray has no GPU .*give --workers"),
        pool.connect("auto", None, "ort-cuda"),
    ):
        raise AssertionError


def test_what_ray_says_is_one_line() -> None:
    """Workers that die at every try; a package that is missing; anything else."""
    errors = ray.exceptions
    for error, line in (
        (errors.ActorDiedError(), "workers died again and again at the same work (4 times)"),
        (errors.OutOfMemoryError("x\ny"), "workers died again and again at the same work (4 times)"),
        (
            errors.GetTimeoutError("late\nvery"),
            "Ray gave up (GetTimeoutError: 'late'); the same command takes",
        ),
    ):
        text = pool._one_line(ray, error)
        assert text.startswith(line) and "\n" not in text
    wrapped = errors.RayError("long\nstory")
    wrapped.__cause__ = ModuleNotFoundError("No module named 'ptqd_export'")
    assert pool._one_line(ray, wrapped).startswith("a worker's machine lacks a package (\"No module named")
