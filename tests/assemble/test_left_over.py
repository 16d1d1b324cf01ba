"""What a stopped rebuild and earlier builds left: whole engines are taken up, damaged ones never get into a
bundle."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import pytest
from helpers import RTX, Built, content, copied, engines_of, reseal

from ptqd_export import rebuild
from ptqd_export.bundle import Bundle

pytest.importorskip("tensorrt_rtx")


class Stop(Exception):
    pass


@dataclass(frozen=True)
class Stopped:
    """A rebuild that was stopped after two engines.

    Attributes:
        folder: with the bundle and its work folder.
        files: {engine: the names of its file and its report}.
    """

    folder: Path
    files: dict[str, tuple[str, str]]


@pytest.fixture(scope="module")
def stopped(own: Built, tmp_path_factory: pytest.TempPathFactory) -> Stopped:
    place = copied(own, tmp_path_factory.mktemp("stopped")).parent
    files: dict[str, tuple[str, str]] = {}
    seen: set[Path] = set()

    def say(line: str) -> None:
        (engine,) = set((place / "bundle.work" / "engines").glob("*.engine")) - seen
        seen.add(engine)
        files[line.split()[1].partition(".")[0]] = engine.name, engine.with_suffix(".json").name
        if line.startswith("engine w8a8."):
            raise Stop

    before = content(place / "bundle")
    with pytest.raises(Stop):
        rebuild(place / "bundle", RTX, say)
    assert list(files) == ["fp32", "w8a8"] and content(place / "bundle") == before
    return Stopped(place, files)


def _cut(engine: Path, report: Path) -> None:
    os.truncate(engine, 1000)


def _flip(engine: Path, report: Path) -> None:
    data = bytearray(engine.read_bytes())
    data[len(data) // 2] ^= 1
    engine.write_bytes(data)


def _lose(engine: Path, report: Path) -> None:
    engine.unlink()


def _garble(engine: Path, report: Path) -> None:
    report.write_bytes(b'{"build": {"key": 3, "targets": null}, "sha256": []}')


def _empty(engine: Path, report: Path) -> None:
    report.write_bytes(b"")


def _mix_up(engine: Path, report: Path) -> None:
    """The engine and report of another graph, under this one's name."""
    other = next(path for path in engine.parent.glob("*.engine") if path != engine)
    shutil.copyfile(other, engine)
    shutil.copyfile(other.with_suffix(".json"), report)


@pytest.mark.parametrize("spoil", [None, _cut, _flip, _lose, _garble, _empty, _mix_up])
def test_what_a_stopped_build_left(
    stopped: Stopped, tmp_path: Path, spoil: Callable[[Path, Path], None] | None
) -> None:
    place = tmp_path / "place"
    shutil.copytree(stopped.folder, place)
    work = place / "bundle.work" / "engines"
    left = {name: (work / engine, work / report) for name, (engine, report) in stopped.files.items()}
    whole = {name: engine.read_bytes() for name, (engine, _) in left.items()}
    if spoil is not None:
        spoil(*left["w8a8"])
    spoilt = left["w8a8"][0].read_bytes() if left["w8a8"][0].exists() else b""
    said: list[str] = []
    bundle = rebuild(Bundle.open(place / "bundle"), RTX, said.append)
    taken = {
        line.split()[1].partition(".")[0] for line in said if line.endswith("unchanged, not built again")
    }
    assert taken == ({"fp32", "w8a8"} if spoil is None else {"fp32"})
    made = {name: bundle.file(f"{name}.{RTX}.engine").read_bytes() for name in whole}
    assert made["fp32"] == whole["fp32"]
    if spoil is None:
        assert made["w8a8"] == whole["w8a8"]
    else:
        assert made["w8a8"] != spoilt or spoil in (_garble, _empty)
        # Not the same bytes, but the same kernels.
        assert abs(len(made["w8a8"]) / len(whole["w8a8"]) - 1) < 0.01
    assert {path.name for path in place.iterdir()} == {"bundle"}


def test_caches_that_are_damaged(place: Path, caches: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A file that is no cache, a file in the place of the folder, and no home at all."""
    reseal(place / "bundle", lambda data: data.update(plan="fp32*4"))
    caches.mkdir(parents=True)
    (caches / "tensorrt.timing").write_bytes(b"no timings")
    rebuild(Bundle.open(place / "bundle"), RTX)
    shutil.rmtree(caches)
    caches.write_bytes(b"")
    rebuild(Bundle.open(place / "bundle"), RTX)
    monkeypatch.delenv("XDG_CACHE_HOME")
    monkeypatch.setattr(Path, "home", _no_home)
    assert set(engines_of(rebuild(Bundle.open(place / "bundle"), RTX))) == {"fp32", "update"}


def _no_home() -> Path:
    raise RuntimeError("Could not determine home directory.")
