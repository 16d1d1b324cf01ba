"""Engines, runs and others are timed in processes of their own."""

from __future__ import annotations

import os
import signal
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from helpers import Built

from ptqd_export.bench import Settings, bench
from ptqd_export.bench.measure import _Process
from ptqd_export.bench.subject import Place, Subject
from ptqd_export.core.backend import ORT_CPU
from ptqd_export.core.plan import parse_plan
from ptqd_export.errors import BackendUnavailable, RecipeError

FEW = Settings((ORT_CPU,), batch=1, rounds=5, runs=2)


def test_every_engine_and_the_run(own: Built) -> None:
    said: list[str] = []
    missing = Subject("nothing", "onnx", file=own.path / "nothing.onnx")
    found = bench(own.bundle, FEW, [missing], said.append)
    m = own.bundle.manifest
    assert [row.name for row in found.rows] == [f"{p} on {ORT_CPU}" for p in m.bops]
    assert len(said) == 1 and said[0].startswith("nothing is left out: ") and "does not exist" in said[0]
    for row in found.rows:
        assert len(row.milliseconds) == 5 and all(0 < ms < 1000 for ms in row.milliseconds)
        assert row.peak_bytes is not None and 2e7 < row.peak_bytes < 1e9
        shares = found.operators[row.name]
        assert shares and list(shares.values()) == sorted(shares.values(), reverse=True)
    (run,) = found.runs
    assert run.plan == str(m.plan) and run.backend == ORT_CPU
    assert len(run.milliseconds) == len(run.calls) == 2
    calls = float(np.median(run.calls))
    assert 0 < calls < 1.5 * run.median and abs(run.switch) < calls
    assert run.more == pytest.approx(np.median(np.divide(run.milliseconds, run.calls)) - 1)


def test_plans_take_turns(own: Built) -> None:
    n = len(own.bundle.manifest.sampling)
    plans = tuple(parse_plan(text, n) for text in (f"fp32*{n}", f"w8a8*{n}"))
    found = bench(own.bundle, replace(FEW, plans=plans))
    assert [(run.plan, run.backend) for run in found.runs] == [(str(plan), ORT_CPU) for plan in plans]


def test_what_cannot_be_timed(own: Built) -> None:
    with pytest.raises(RecipeError, match="give at least 1, 1, 5 and 0"):
        Settings(rounds=4)
    said: list[str] = []
    with pytest.raises(RecipeError, match="no backend works here of tensorrt-rtx"):
        bench(own.bundle, Settings(("tensorrt-rtx",)), say=said.append)
    assert len(said) == 1 and said[0].startswith("tensorrt-rtx is left out: ")


def test_a_process_that_ends_is_told(own: Built) -> None:
    place = Place(Path(own.path), 1, 1)
    process = _Process(Subject("fp32", "engine", str(next(iter(own.bundle.manifest.bops))), ORT_CPU), place)
    try:
        os.kill(process.ask(os.getpid), signal.SIGKILL)
        with pytest.raises(BackendUnavailable, match="the process of fp32 ended"):
            process.ask(os.getpid)
    finally:
        process.close()
