"""run --ray: what is refused before anything is started."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
from helpers import Built, Invoke

RAY = ("--ray", "local")


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--format", "parquet"], "--format parquet is of shards: give --ray too, or another format"),
        (["--content", "npy"], "--content is of shards: give --ray too, or leave it out"),
        (["--shard-size", "16"], "--shard-size is of shards: give --ray too"),
        (["--conditions", "x.parquet"], "--conditions is of shards: give --ray too"),
        (
            [*RAY, "--format", "png"],
            "--format png is not of shards: give --format parquet or webdataset, and",
        ),
        ([*RAY, "--rebuild"], "--rebuild was given with --ray: rebuild first"),
        ([*RAY, "--device", "1"], "--device 1 was given with --ray, which deals out the GPUs: leave it out"),
        ([*RAY, "--condition", "context=c.npy"], "--condition was given with --ray: give --conditions"),
        ([*RAY, "--conditions", "x.parquet", "--prompt", "a cat"], "leave one of them out"),
        ([*RAY, "--content", "latents"], "samples no latents: give --content png or npy"),
        ([*RAY, "--content", "png"], "samples of 2 channels are no pictures: give --content npy"),
        ([*RAY, "--content", "npy", "--class-labels", "1"], "has no classes: leave --class-labels out"),
        ([*RAY, "--content", "npy", "--plan", "w2a2"], "w2a2"),
        (
            [*RAY, "--content", "npy", "--format", "webdataset", "--shard-size", "24", "--batch-size", "16"],
            "--shard-size 24 is no multiple of --batch-size 16: give one",
        ),
        (
            [*RAY, "--format", "webdataset", "--content", "npy", "--backend", "tensorrt-rtx"],
            "no engines for backend 'tensorrt-rtx'",
        ),
    ],
)
def test_wrong_options(refused: Callable[..., str], place: Path, words: list[str], message: str) -> None:
    assert message in refused("run", place / "bundle", "--out", place / "out", *words)


def test_ray_that_is_not_there(classes: Built, invoke: Invoke, tmp_path: Path) -> None:
    """One line, and nothing is left."""
    words = ("run", classes.path, "--out", tmp_path / "out", "--ray", "ray://nowhere:1", "--num-samples", "2")
    line = invoke(*words, "--format", "webdataset").error
    assert "ray://nowhere:1': expected auto or HOST:PORT" in line
    assert not list(tmp_path.iterdir())
