"""A worker, in a process of its own without Ray: its shards hold what `run` draws, bit for bit."""

from __future__ import annotations

import io
import json
import resource
import tarfile
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from dataclasses import replace
from pathlib import Path

import numpy as np
import numpy.typing as npt
import pytest
from helpers import Built, content

from ptqd_export import pictures, run
from ptqd_export.errors import BackendUnavailable, BundleError, PTQDError, RecipeError
from ptqd_export.farm.conditions import Conditions
from ptqd_export.farm.sampler import REPORT, SHARD, Sampler, Task, read_report
from ptqd_export.runtime import encode_prompts

F32 = npt.NDArray[np.float32]
MakeTask = Callable[..., Task]
Sampled = Callable[..., None]


@pytest.fixture
def sampled(worker: ProcessPoolExecutor) -> Sampled:
    """Shards by one worker, all of them if none is named; raises its errors."""

    def call(task: Task, *numbers: int) -> None:
        every = [shard.number for shard in task.order.shards(task.num_samples)]
        done = worker.submit(Sampler(task), {SHARD: np.array(numbers or every)})
        for text in done.result()[REPORT]:
            read_report(text)

    return call


def members(folder: Path) -> dict[str, bytes]:
    """Of all tars."""
    found = {}
    for path in sorted(folder.glob("*.tar")):
        with tarfile.open(path) as tar:
            for member in tar:
                file = tar.extractfile(member)
                assert file is not None and (member.mtime, member.uid, member.uname) == (0, 0, "")
                found[member.name] = file.read()
    return found


def values(folder: Path) -> F32:
    """Samples of all tars, in order of their indices."""
    found = members(folder)
    return np.stack([np.load(io.BytesIO(found[name])) for name in sorted(found) if name.endswith(".npy")])


def same(got: F32, expected: npt.NDArray[np.float64]) -> None:
    np.testing.assert_array_equal(got, expected.astype(np.float32))
    assert not (got == np.roll(expected, 1, 0).astype(np.float32)).all()  # the order counts


def test_shards_hold_what_run_draws(classes: Built, task_of: MakeTask, sampled: Sampled) -> None:
    task = task_of(classes, 10, seed=7)
    sampled(task, 2, 0)
    sampled(task, 1)  # another worker, another order
    expected = run(classes.bundle, 10, seed=7, batch_size=2)
    same(values(task.folder), expected)
    assert members(task.folder)["000000007.cls"] == b"2"
    assert np.abs(expected - run(classes.bundle, 10, seed=8, batch_size=2)).max() > 0.1


def test_pictures_and_classes(classes: Built, task_of: MakeTask, sampled: Sampled) -> None:
    task = task_of(classes, 5, content="png", labels=(4, 1))
    sampled(task)
    x = run(classes.bundle, 5, [4, 1, 4, 1, 4], seed=1, batch_size=2)
    found = members(task.folder)
    expected = {f"0000{name}": data for name, data in pictures.encode_images(x).items()}
    expected |= {f"{i:09d}.cls": b"41"[i % 2 : i % 2 + 1] for i in range(5)}
    assert found == expected


def test_parquet(classes: Built, task_of: MakeTask, sampled: Sampled) -> None:
    pq = pytest.importorskip("pyarrow.parquet", reason="pyarrow is not installed: pip install '.[ray]'")
    x = run(classes.bundle, 6, seed=1, batch_size=2)
    task = task_of(classes, 6, format="parquet")
    sampled(task)
    tables = [pq.ParquetFile(path).read() for path in sorted(task.folder.iterdir())]
    assert [table["index"].to_pylist() for table in tables] == [[0, 1, 2, 3], [4, 5]]
    same(np.array([row for t in tables for row in t["sample"].to_pylist()], np.float32).reshape(x.shape), x)
    about = json.loads(tables[0].schema.metadata[b"ptqd-export"])
    assert (about["bundle"], about["seed"], about["shape"]) == (classes.bundle.seal, 1, [1, 8, 8])
    before = content(task.folder)
    sampled(task)
    assert content(task.folder) == before  # the same bytes again
    sampled(replace(task, order=replace(task.order, content="png")))
    tables = [pq.ParquetFile(path).read() for path in sorted(task.folder.iterdir())]
    assert [row for t in tables for row in t["image"].to_pylist()] == list(pictures.encode_images(x).values())
    assert [row for t in tables for row in t["class_label"].to_pylist()] == [0, 1, 2, 3, 4, 0]


def test_prompts_in_turn(texts: Built, task_of: MakeTask, sampled: Sampled) -> None:
    """Pictures, and latents, of prompts that every worker is given encoded."""
    prompts = ["a horse", "a red house", "two cats"]
    prompted = encode_prompts(texts.bundle, prompts, "blue")
    task = task_of(texts, 5, prompted, prompts=prompted.prompts, negative_prompt="blue")
    sampled(task)
    same(values(task.folder), run(texts.bundle, 5, seed=1, batch_size=2, prompts=prompted))
    assert members(task.folder)["000000004.txt"] == b"a red house"
    shape = texts.bundle.manifest.sampling.model.sample_shape
    task = replace(task, order=replace(task.order, content="latents", shape=shape))
    sampled(task)
    same(values(task.folder), run(texts.bundle, 5, seed=1, batch_size=2, prompts=prompted, latents=True))


def parquet(path: Path, columns: dict[str, object], group: int = 3) -> Path:
    pa = pytest.importorskip("pyarrow", reason="pyarrow is not installed: pip install '.[ray]'")
    import pyarrow.parquet as pq

    pq.write_table(pa.table(columns), path, row_group_size=group)
    return path


def test_conditions_from_a_dataset(
    own: Built, classes: Built, task_of: MakeTask, sampled: Sampled, tmp_path: Path
) -> None:
    """Tensors and classes; row groups and files are cut elsewhere than shards."""
    folder = tmp_path / "data"
    folder.mkdir()
    c = np.random.default_rng(0).standard_normal((7, 6)).astype(np.float32)
    parquet(folder / "b.parquet", {"context": list(c[5:]), "note": ["x", "y"]})
    parquet(folder / "a.parquet", {"context": list(c[:5])})
    info = own.bundle.manifest.sampling.model
    data = Conditions.open(folder, info, False)
    assert len(data) == 7 and data.columns == ("context",)
    task = task_of(own, 7, data=data)
    sampled(task)
    same(values(task.folder), run(own.bundle, 7, seed=1, batch_size=2, tensors={"context": c}))
    folder = tmp_path / "labels"
    folder.mkdir()
    for i, labels in enumerate((np.array([4, 3, 2], np.int32), np.array([1, 0, 0], np.int64))):
        parquet(folder / f"{i}.parquet", {"class_labels": labels})
    task = task_of(classes, 5, data=Conditions.open(folder, classes.bundle.manifest.sampling.model, False))
    for old in task.folder.iterdir():
        old.unlink()
    sampled(task)
    same(values(task.folder), run(classes.bundle, 5, [4, 3, 2, 1, 0], seed=1, batch_size=2))


def test_prompts_from_a_dataset(texts: Built, task_of: MakeTask, sampled: Sampled, tmp_path: Path) -> None:
    """Encoded shard by shard: equal to `run` of the same texts at the precision of the encoder."""
    prompts = ["a horse", "a red house", "two cats", "a horse", "rain"]
    file = parquet(tmp_path / "p.parquet", {"prompt": prompts})
    data = Conditions.open(file, texts.bundle.manifest.sampling.model, True)
    task = task_of(texts, 5, data=data, negative_prompt="blue")
    sampled(task)
    expected = run(texts.bundle, 5, seed=1, batch_size=2, prompts=prompts, negative_prompt="blue")
    np.testing.assert_allclose(values(task.folder), expected, atol=1e-4 * np.abs(expected).max())
    assert members(task.folder)["000000004.txt"] == b"rain"


@pytest.mark.parametrize(
    ("columns", "message"),
    [
        ({"label": [1, 2]}, r"has the columns 'label': expected some of class_labels"),
        ({"class_labels": [1, 5]}, r"class label 5 is out of range: classes has classes 0 to 4"),
        (
            {"class_labels": [1.5, 2.0]},
            r"row 0 of the conditions has class_labels 1.5: expected a class number",
        ),
        (
            {"class_labels": [1, None]},
            r"row 1 of the conditions has class_labels None: expected a class number",
        ),
    ],
)
def test_conditions_that_do_not_fit(
    classes: Built,
    task_of: MakeTask,
    sampled: Sampled,
    tmp_path: Path,
    columns: dict[str, object],
    message: str,
) -> None:
    file = parquet(tmp_path / "c.parquet", columns)
    with pytest.raises(RecipeError, match=message):
        sampled(
            task_of(classes, 2, data=Conditions.open(file, classes.bundle.manifest.sampling.model, False))
        )


def test_conditions_that_are_none(classes: Built, own: Built, tmp_path: Path) -> None:
    pytest.importorskip("pyarrow", reason="pyarrow is not installed: pip install '.[ray]'")
    info = own.bundle.manifest.sampling.model
    (tmp_path / "x.parquet").write_bytes(b"PAR1")
    for path, message in (
        (tmp_path / "x.parquet", "cannot be read as Parquet"),
        (tmp_path / "nowhere.parquet", "cannot be read as Parquet"),
        (classes.path, r"holds no \*\.parquet"),
    ):
        with pytest.raises(RecipeError, match=message):
            Conditions.open(path, info, False)
    short = Conditions.open(parquet(tmp_path / "s.parquet", {"context": [[1.0] * 6, [1.0] * 5]}), info, False)
    with pytest.raises(
        RecipeError, match=r"row 1 of the conditions has context .*: expected 6 finite numbers"
    ):
        short.read(range(2), info)


def test_errors_arrive_as_they_are(
    classes: Built, own: Built, task_of: MakeTask, sampled: Sampled, worker: ProcessPoolExecutor
) -> None:
    """Another bundle than the parent verified; another version; a disk that is full; nothing is left."""
    task = task_of(classes, 4)
    with pytest.raises(BundleError, match="was replaced by another bundle during this run"):
        sampled(replace(task, start=replace(task.start, path=own.path)))
    with pytest.raises(BundleError, match="is not a bundle"):
        sampled(replace(task, start=replace(task.start, path=task.folder)))
    with pytest.raises(
        BackendUnavailable, match=r"has numpy [\d.]+, where the command was given 1\.0: install"
    ):
        sampled(replace(task, order=replace(task.order, versions={"numpy": "1.0"})))
    limit = resource.getrlimit(resource.RLIMIT_FSIZE)
    worker.submit(resource.setrlimit, resource.RLIMIT_FSIZE, (512, limit[1])).result()
    with pytest.raises(PTQDError, match=r"cannot write .*free some space"):
        sampled(task)
    assert content(task.folder) == {}
    worker.submit(resource.setrlimit, resource.RLIMIT_FSIZE, limit).result()


def test_errors_of_other_machines_name_them() -> None:
    text = json.dumps({"error": "BundleError", "message": "it is damaged", "machine": "elsewhere"})
    with pytest.raises(BundleError, match=r"^it is damaged \(on 'elsewhere'\)$"):
        read_report(text)
