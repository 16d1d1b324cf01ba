"""Which backend on the host is taken where none is named: measured once, remembered, and said."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from helpers import Built, Invoke, with_plan

from ptqd_export.backends import registry
from ptqd_export.core.backend import AUTOMATIC, OPENVINO, OPENVINO_FP32, ORT_CPU
from ptqd_export.core.precision import FP32, Precision
from ptqd_export.errors import BackendUnavailable
from ptqd_export.runtime import Runtime, fastest

NAMES = (OPENVINO, ORT_CPU)
W8A8 = Precision(8, 8)


@pytest.fixture
def both(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[Path]:
    """Two backends on the host, both on ONNX Runtime, each with graphs of its own; the cache's folder."""
    openers = dict(registry.OPENERS)
    openers[OPENVINO] = openers[ORT_CPU]
    monkeypatch.setattr(registry, "OPENERS", openers)
    monkeypatch.setattr("ptqd_export.runtime.runtime.AUTOMATIC", AUTOMATIC)
    registry._own_device.cache_clear()
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    yield tmp_path / "ptqd-export" / fastest.FOLDER
    registry._own_device.cache_clear()


@pytest.fixture
def measured(monkeypatch: pytest.MonkeyPatch) -> list[Precision]:
    """Times that are made up: openvino is the faster one at fp32, and slower at w8a8."""
    asked: list[Precision] = []

    def measure(bundle: Any, precisions: list[Precision], names: Any) -> dict[str, dict[str, float]]:
        asked.extend(precisions)
        return {str(p): {OPENVINO: 1e-3, ORT_CPU: 2e-3 if p == FP32 else 0.5e-3} for p in precisions}

    monkeypatch.setattr(fastest, "_measure", measure)
    return asked


def test_a_plan_is_measured_once(own: Built, both: Path, measured: list[Precision]) -> None:
    """Per precision; the sum over the plan's steps decides."""
    bundle = own.bundle
    mixed, full = (with_plan(bundle, *runs).manifest.plan for runs in (("fp32", "w8a8*3"), ("fp32",)))
    order, why = fastest.by_speed(bundle, full, NAMES)
    assert (order, measured) == ([OPENVINO, ORT_CPU], [FP32])
    assert why == (
        "openvino is taken: one evaluation of one sample takes openvino 1 ms, ort-cpu 2 ms (measured here "
        "once)"
    )
    order, why = fastest.by_speed(bundle, mixed, NAMES)
    assert (order, measured) == ([ORT_CPU, OPENVINO], [FP32, W8A8])
    assert "ort-cpu 0.875 ms, openvino 1 ms (measured" in why
    order, why = fastest.by_speed(bundle, mixed, NAMES)
    assert order[0] == ORT_CPU and why.endswith("(remembered)") and len(measured) == 2
    assert len(list(both.iterdir())) == 1


def test_what_is_remembered_is_of_one_bundle_and_machine(
    own: Built, both: Path, measured: list[Precision], monkeypatch: pytest.MonkeyPatch
) -> None:
    bundle, full = own.bundle, with_plan(own.bundle, "fp32").manifest.plan
    fastest.by_speed(bundle, full, NAMES)
    for change in ("threads", "processor", "bundle", "damaged", "lost", "incomplete"):
        count, (file,) = len(measured), list(both.iterdir())
        with monkeypatch.context() as m:
            other = bundle
            if change == "threads":
                m.setattr("ptqd_export.backends.threads", lambda: 77)
            elif change == "processor":
                m.setattr(fastest, "_processor", lambda: "another")
            elif change == "bundle":
                other = replace(bundle, seal="0" * 64)
            elif change == "lost":
                file.unlink()
            else:
                file.write_text('{"fp32": {"ort-cpu": 1}}' if change == "incomplete" else "[1")
            _, why = fastest.by_speed(other, full, NAMES)
        assert "measured here once" in why and len(measured) == count + 1, change
        for new in set(both.iterdir()) - {file}:
            new.unlink()
        fastest.by_speed(bundle, full, NAMES)


def test_without_a_cache(
    own: Built, both: Path, measured: list[Precision], monkeypatch: pytest.MonkeyPatch
) -> None:
    """It is measured each time."""
    monkeypatch.setattr(fastest, "cache_folder", lambda: None)
    for n in (1, 2):
        fastest.by_speed(own.bundle, with_plan(own.bundle, "fp32").manifest.plan, NAMES)
        assert len(measured) == n


def test_real_times(own: Built, both: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of both; one that fails has none, and comes last."""
    plan = with_plan(own.bundle, "fp32").manifest.plan
    assert set(fastest._in_turn(own.bundle, FP32, NAMES)) == set(NAMES)

    def fails(*_: object, **__: object) -> Any:
        raise BackendUnavailable("no")

    broken = replace(registry.OPENERS[OPENVINO], open_engine=fails)
    monkeypatch.setattr(registry, "OPENERS", {**registry.OPENERS, OPENVINO: broken})
    monkeypatch.setattr(fastest, "CHILD", "raise SystemExit(1)")  # then it is measured here
    order, why = fastest.by_speed(own.bundle, plan, NAMES)
    assert order == [ORT_CPU, OPENVINO] and "openvino fails" in why


@pytest.fixture
def apart(both: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[[str], None]:
    """Measuring in this process is a failure; given code is run first in the one that measures."""

    def here(*_: object) -> Any:
        pytest.fail("it was measured in the process of the run")

    monkeypatch.setattr(fastest, "_in_turn", here)
    usual = fastest.CHILD

    def first(code: str) -> None:
        monkeypatch.setattr(fastest, "CHILD", usual.replace("from ptqd", f"exec({code!r}); from ptqd"))

    return first


def test_measured_apart(
    own: Built, apart: Callable[[str], None], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """In a process of its own, which runs nothing of the current folder, whatever libraries print."""
    (tmp_path / "json.py").write_text("import os; os._exit(7)")
    monkeypatch.chdir(tmp_path)
    apart("import os; os.write(1, b'{bad\\xff\\n{}\\nptqd')")
    found = fastest._measure(own.bundle, [FP32, W8A8], (ORT_CPU,))
    assert {p: set(of) for p, of in found.items()} == {"fp32": {ORT_CPU}, "w8a8": {ORT_CPU}}
    assert all(0 < seconds < 60 for of in found.values() for seconds in of.values())


DIES = """
import os, signal
from ptqd_export.runtime import fastest
opens, time_call = fastest.open_artifact, fastest.time_call
def open_artifact(bundle, artifact, device):
    if artifact.backend == "openvino" and {first}:
        os.kill(os.getpid(), signal.SIGSEGV)
    engine = opens(bundle, bundle.manifest.artifact(artifact.precision, "ort-cpu"), device)
    engine.dies = artifact.backend == "openvino"
    return engine
def timed(call):
    if call.func.dies:
        os.kill(os.getpid(), signal.SIGSEGV)
    return time_call(call)
fastest.open_artifact, fastest.time_call = open_artifact, timed
"""


@pytest.mark.parametrize("first", [True, False])
def test_a_library_that_dies(own: Built, both: Path, apart: Callable[[str], None], first: bool) -> None:
    """When it opens a graph or later: it takes along the process that measures, and nothing else. The others
    are measured without it, and it is remembered."""
    plan = with_plan(own.bundle, "fp32").manifest.plan
    apart(DIES.format(first=first))
    order, why = fastest.by_speed(own.bundle, plan, NAMES)
    assert order == [ORT_CPU, OPENVINO] and "openvino fails" in why and "ort-cpu fails" not in why
    (file,) = both.iterdir()
    assert json.loads(file.read_text())["fp32"][OPENVINO] is None
    apart("raise SystemExit(1)")
    again, remembered = fastest.by_speed(own.bundle, plan, NAMES)
    assert again == order and "openvino fails (remembered)" in remembered


def test_another_bundle_in_its_place(own: Built, both: Path) -> None:
    """Is not measured by the process; the one that asks has its own, which it finds changed."""
    assert list(fastest._ask(replace(own.bundle, seal="0" * 64), ["fp32"], NAMES)) == []


def test_a_run_takes_the_fastest_and_says_so(
    classes: Built, both: Path, measured: list[Precision], tmp_path: Path, invoke: Invoke
) -> None:
    """On one line of stderr; a backend that is named is taken without a word."""
    out = ("--out", tmp_path / "out", "--num-samples", 1, "--json")
    for runs, taken in (("fp32*3", OPENVINO), ("w8a8*3", ORT_CPU)):
        result = invoke("run", classes.path, *out, "--plan", runs)
        assert result.json["backend"] == taken and OPENVINO_FP32 not in result.err
        assert result.err == f"backend: {result.json['why']}\n"
        assert result.err.startswith(f"backend: {taken} is taken: one evaluation of one sample takes")
    count = len(measured)
    result = invoke("run", classes.path, *out, "--backend", ORT_CPU)
    assert (result.err, result.json["why"], len(measured)) == ("", "", count)


def test_the_fastest_must_pass_its_probe(
    own: Built, both: Path, measured: list[Precision], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Else the next one is taken, and it is said why."""
    m = with_plan(own.bundle, "fp32")
    wrong = m.manifest.artifact(Precision(4, 4), OPENVINO)
    real = type(m.manifest).artifact
    monkeypatch.setattr(
        type(m.manifest), "artifact", lambda self, p, n: wrong if n == OPENVINO else real(self, p, n)
    )
    with Runtime(m) as runtime:
        assert runtime.backend == ORT_CPU and runtime.why.startswith("openvino is taken")
        assert "computes something else here" in runtime.passed_over[OPENVINO]
