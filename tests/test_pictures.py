"""Samples as pictures: values, grids, PNG files, and folders of them that are replaced whole."""

from __future__ import annotations

import io
import json
from pathlib import Path

import numpy as np
import numpy.typing as npt
import pytest
from helpers import content
from PIL import Image

from ptqd_export.errors import ModelError, PTQDError, RecipeError
from ptqd_export.files import write_file
from ptqd_export.pictures import (
    check_folder,
    encode_array,
    encode_images,
    encode_png,
    image_grid,
    to_uint8,
    write_pictures,
)

F64 = npt.NDArray[np.float64]


def samples(n: int, channels: int = 1, size: int = 16, seed: int = 0) -> F64:
    return np.random.default_rng(seed).uniform(-1, 1, (n, channels, size, size))


def test_to_uint8_inverts_the_training_scale_and_clamps() -> None:
    codes = np.arange(256, dtype=np.uint8)
    assert (to_uint8(codes.astype(np.float32) / 127.5 - 1) == codes).all()
    assert to_uint8(np.array([-np.inf, -3.0, 0.0, 7.0, np.inf])).tolist() == [0, 0, 128, 255, 255]


def test_nan_is_refused_with_its_sample() -> None:
    x = samples(3)
    x[2, 0, 3, 3] = np.nan
    with pytest.raises(ModelError, match="sample 2 holds NaN"):
        image_grid(x, 2)


@pytest.mark.parametrize("channels", [1, 3])
def test_image_grid_puts_samples_row_by_row(channels: int) -> None:
    x = samples(5, channels, size=4)
    grid = image_grid(x, columns=3, gap=1)
    assert grid.dtype == np.uint8 and grid.shape == ((9, 14) if channels == 1 else (9, 14, 3))
    pixels = to_uint8(x)
    fourth = pixels[3, 0] if channels == 1 else np.moveaxis(pixels[3], 0, -1)
    assert (grid[5:9, 0:4] == fourth).all()
    assert not grid[4].any() and not grid[5:, 10:].any()
    assert image_grid(x, columns=9).shape[:2] == (4, 20)


def test_grid_refuses_what_is_no_picture() -> None:
    with pytest.raises(RecipeError, match=r"\(1, 4, 8, 8\) are no pictures"):
        image_grid(samples(1, 4, 8), 1)
    with pytest.raises(RecipeError, match="0 columns"):
        image_grid(samples(1), 0)


def test_images_read_back_and_repeat_byte_for_byte() -> None:
    for channels in (1, 3):
        x = samples(3, channels)
        files = encode_images(x, start=7)
        assert list(files) == ["00007.png", "00008.png", "00009.png"]
        with Image.open(io.BytesIO(files["00008.png"])) as picture:
            read = np.asarray(picture)
        assert (read == np.moveaxis(to_uint8(x), 1, -1)[1].squeeze()).all()
        assert encode_images(x, start=7) == files
        assert b"tIME" not in files["00007.png"]


def test_arrays_read_back_unclamped() -> None:
    x = 3 * samples(2, 4)
    read = np.load(io.BytesIO(encode_array(x)))
    assert read.dtype == np.float32 and np.abs(read).max() > 2
    np.testing.assert_array_equal(read, x.astype(np.float32))


def test_a_failed_write_leaves_the_old_file_and_no_rest(tmp_path: Path) -> None:
    with pytest.raises(PTQDError, match="cannot write"):
        write_file(tmp_path / "missing" / "x.png", encode_png(np.zeros((2, 2), np.uint8)))
    (tmp_path / "file").write_bytes(b"old")
    with pytest.raises(PTQDError, match="cannot write"):
        write_pictures(tmp_path / "file" / "below", encode_images(samples(1)), {})
    (tmp_path / "folder").mkdir()
    with pytest.raises(PTQDError, match="cannot write"):
        write_file(tmp_path / "folder", b"new")
    assert sorted(p.name for p in tmp_path.iterdir()) == ["file", "folder"]
    assert (tmp_path / "file").read_bytes() == b"old"


# --- folders of pictures


def test_a_set_takes_the_place_of_an_earlier_one(tmp_path: Path) -> None:
    out = tmp_path / "deep" / "x"
    assert check_folder(out) == out and not out.parent.exists()
    write_pictures(out, encode_images(samples(3)), {"seed": 1})
    assert json.loads((out / "run.json").read_text()) == {
        "seed": 1,
        "files": ["00000.png", "00001.png", "00002.png"],
    }
    assert check_folder(out) == out
    write_pictures(out, {"grid.png": b"1", "samples.npy": b"2"}, {"seed": 2})
    assert sorted(content(out)) == ["grid.png", "run.json", "samples.npy"]
    assert [path.name for path in out.parent.iterdir()] == ["x"]


def test_a_set_that_cannot_be_written_leaves_the_earlier_one(tmp_path: Path) -> None:
    out = tmp_path / "x"
    write_pictures(out, {"00000.png": b"old"}, {})
    before = content(tmp_path)
    with pytest.raises(PTQDError, match="cannot write"):
        write_pictures(out, {"00000.png": b"new", "missing/00001.png": b"new"}, {})
    assert content(tmp_path) == before
    (out / "mine.txt").write_text("mine")
    with pytest.raises(RecipeError, match=r"'mine.txt' is not of an earlier run"):
        write_pictures(out, {"00000.png": b"new"}, {})
    assert content(tmp_path) == before | {"x/mine.txt": b"mine"}


@pytest.mark.parametrize(
    ("name", "counts"),
    [
        (".00001.png.123.part", False),
        (".grid.png.1.part", False),
        (".samples.npy.7.part", False),
        (".run.json.99999.part", False),
        (".probe.4321", False),
        (".00001.png.part", True),
        (".00001.png.x.part", True),
        (".notes.png.123.part", True),
        (".probe.txt", True),
        ("probe.123", True),
        ("00001.png.123.part", True),
        (".hidden", True),
    ],
)
def test_what_a_killed_run_of_an_older_version_left_does_not_count(
    tmp_path: Path, name: str, counts: bool
) -> None:
    """And nothing else that is hidden."""
    for earlier in (False, True):
        out = tmp_path / f"{earlier}"
        out.mkdir()
        if earlier:
            (out / "run.json").write_text(json.dumps({"files": ["00000.png"]}))
            (out / "00000.png").write_bytes(b"old")
        (out / name).write_bytes(b"half")
        if counts:
            with pytest.raises(RecipeError, match="is not of an earlier run"):
                check_folder(out)
            assert (out / name).read_bytes() == b"half"
        else:
            check_folder(out)
            write_pictures(out, {"00000.png": b"new"}, {})
            assert sorted(content(out)) == ["00000.png", "run.json"]


def test_a_link_in_the_place_of_a_picture(tmp_path: Path) -> None:
    """What it leads to is not touched; one that leads nowhere, or to a folder, is nobody's picture."""
    (tmp_path / "theirs.png").write_bytes(b"mine")
    out = tmp_path / "x"
    out.mkdir()
    (out / "run.json").write_text(json.dumps({"files": ["00000.png"]}))
    for target in ("nowhere", "."):
        (out / "00000.png").symlink_to(target)
        with pytest.raises(RecipeError, match=r"'00000.png' is not of an earlier run"):
            check_folder(out)
        (out / "00000.png").unlink()
    (out / "00000.png").symlink_to(tmp_path / "theirs.png")
    write_pictures(out, {"00000.png": b"new"}, {})
    assert (tmp_path / "theirs.png").read_bytes() == b"mine"
    assert not (out / "00000.png").is_symlink() and (out / "00000.png").read_bytes() == b"new"
