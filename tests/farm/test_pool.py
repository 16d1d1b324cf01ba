"""Calibration and evaluation by a pool give what this process gives alone."""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor as Worker
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from helpers import Built, Invoke, content
from pools import Crossed

from ptqd_export.bundle.bundle import MANIFEST
from ptqd_export.core.plan import parse_plan
from ptqd_export.errors import BackendUnavailable, BundleError
from ptqd_export.evaluate import Candidate, evaluate


@contextlib.contextmanager
def given(pool: Any, *asked: Any) -> Iterator[Any]:
    yield pool


def test_a_build_is_the_same(
    classes: Built, worker: Worker, invoke: Invoke, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Graphs, tables and weights byte for byte; trajectories and every precision's noise were the pool's."""
    pool = Crossed(worker)
    monkeypatch.setattr(sys.modules["ptqd_export.cli.build"], "on_ray", lambda *asked: given(pool, *asked))
    invoke("build", classes.recipe, *classes.options, "--out", tmp_path / "out", "--ray", "--json")
    alone, got = content(classes.path), content(tmp_path / "out")
    for files in (alone, got):
        del files[MANIFEST]  # seconds are its own
    assert got == alone
    assert pool.makers[0] == "_tracer" and {*pool.makers[1:]} == {"_measurer"}
    assert pool.items == 6 * len(pool.makers)  # trajectories, one to a batch


def test_a_worker_with_another_model_is_refused(
    classes: Built, worker: Worker, invoke: Invoke, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Moved(Crossed):
        """The build has other weights than its workers find."""

        def map(self, make: Any, items: Any) -> Iterator[tuple[Any, Any]]:
            recipe, info, *rest = make.args
            return super().map(type(make)(make.func, recipe, replace(info, sha256="0" * 64), *rest), items)

    monkeypatch.setattr(
        sys.modules["ptqd_export.cli.build"], "on_ray", lambda *asked: given(Moved(worker), *asked)
    )
    result = invoke("build", classes.recipe, *classes.options, "--out", tmp_path / "out", "--ray")
    assert "weights of" in result.error and "not those of the build" in result.error
    assert not (tmp_path / "out").exists()


def test_workers_need_ray(classes: Built, invoke: Invoke, tmp_path: Path) -> None:
    result = invoke("build", classes.recipe, "--out", tmp_path / "out", "--workers", 2)
    assert result.error == "Error: --workers 2 is of --ray: give it too\n"


def test_an_evaluation_is_the_same(classes: Built, worker: Worker, tmp_path: Path) -> None:
    pool, plans = Crossed(worker), [Candidate(parse_plan(text, 3)) for text in ("w8a8", "fp32,w8a8*2")]
    asked: dict[str, Any] = {"num_samples": 5, "batch_size": 2, "resamples": 10, "backend": "ort-cpu"}
    alone = evaluate(classes.bundle, plans, work=tmp_path / "a", **asked)
    got = evaluate(
        classes.bundle, plans, work=tmp_path / "b", connect=lambda backend: given(pool, backend), **asked
    )
    assert got == alone
    assert content(tmp_path / "b") == content(tmp_path / "a")
    assert pool.items == 9


@pytest.mark.parametrize(("what", "error"), [("seal", BundleError), ("versions", BackendUnavailable)])
def test_a_worker_with_another_bundle_is_refused(
    what: str, error: type[Exception], classes: Built, worker: Worker, tmp_path: Path
) -> None:
    class Moved(Crossed):
        def map(self, make: Any, items: Any) -> Iterator[tuple[Any, Any]]:
            start, versions = make.args
            start = replace(start, seal="0" * 64) if what == "seal" else start
            versions = {**versions, "numpy": "0"} if what == "versions" else versions
            return super().map(type(make)(make.func, start, versions), items)

    with pytest.raises(error, match=r"replaced by another bundle|this machine has numpy"):
        evaluate(
            classes.bundle, [Candidate(parse_plan("w8a8", 3))], work=tmp_path, num_samples=2, resamples=2,
            backend="ort-cpu", connect=lambda backend: given(Moved(worker)),
        )  # fmt: skip
