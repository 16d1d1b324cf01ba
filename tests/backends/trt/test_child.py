"""The builder's side: what it sets, the caches, what it tells, and how it ends with its parent."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from helpers import environment

from ptqd_export.backends import cuda
from ptqd_export.backends.cuda import Gpu
from ptqd_export.backends.trt import child, library
from ptqd_export.backends.trt.child import Built, Failure, Inspected, Progressed, Request, Trouble
from ptqd_export.backends.trt.logs import LogFile
from ptqd_export.backends.trt.plan import Memory
from ptqd_export.core.engine_build import EngineSettings, PlanReport
from ptqd_export.errors import BackendUnavailable

from .shared import RTX, SETTINGS, conv_graph


@pytest.mark.parametrize(
    "record",
    [
        Progressed(0.5, "Building {the} engine"),
        Built(1.5, 3, ("8.9", "12.0")),
        Inspected(PlanReport(1, 0, {"a": "float16"}, 2, {"gemm": 1}), Memory(None, 3)),
        Failure(Trouble.GRAPH, "{text} with 'quotes'", "node {0}", "Conv"),
        Failure(Trouble.ENGINE, "disk", wanted=7),
    ],
)
def test_records_cross_a_process(record: child.Record) -> None:
    line = child.encode(record)
    assert line.endswith(b"\n") and line.count(b"\n") == 1
    assert child.decode(line) == record
    assert child.decode(line[: len(line) // 2]) is None, "cut short by a crash"


@pytest.mark.parametrize(
    "line", [b"", b"3", b"[]", b"{}", b'{"other": {}}', b'{"built": {}}', b'{"a": 1, "b": 2}']
)
def test_what_is_no_record(line: bytes) -> None:
    assert child.decode(line) is None


class Recorded:
    """The builder's module, with the configurations that its builders made kept in `configs`."""

    def __init__(self, module: Any, **answers: object) -> None:
        """Args: answers: what methods of a configuration say instead of doing anything."""
        self._module, self._answers, self.configs = module, answers, list[Any]()

    def __getattr__(self, name: str) -> Any:
        return getattr(self._module, name)

    def Builder(self, logger: Any) -> Any:
        builder = self._module.Builder(logger)
        add = builder.create_builder_config

        def create_builder_config() -> Any:
            config = add()
            self.configs.append(config)
            return Answering(config, self._answers) if self._answers else config

        methods = ("create_network", "create_optimization_profile", "build_serialized_network")
        return SimpleNamespace(
            create_builder_config=create_builder_config, **{name: getattr(builder, name) for name in methods}
        )


class Answering:
    """A configuration some of whose methods only answer."""

    def __init__(self, config: Any, answers: dict[str, object]) -> None:
        object.__setattr__(self, "_config", config)
        object.__setattr__(self, "_answers", answers)

    def __getattr__(self, name: str) -> Any:
        return (lambda *_: self._answers[name]) if name in self._answers else getattr(self._config, name)

    def __setattr__(self, name: str, value: object) -> None:
        setattr(self._config, name, value)


LOGS = LogFile(os.open(os.devnull, os.O_WRONLY))


@pytest.fixture
def request_(tmp_path: Path) -> Request:
    return Request(
        RTX, str(conv_graph(tmp_path / "g.onnx")), str(tmp_path / "part"), SETTINGS, {"conv_a": "int8"}
    )


def test_flags(rtx: Any, request_: Request, monkeypatch: pytest.MonkeyPatch) -> None:
    """What a key knows by BUILDER_REVISION alone: whoever changes the expected values here raises it."""
    logger = library.make_logger(rtx, LOGS)
    on = rtx.Builder(logger).create_builder_config().get_flag(rtx.BuilderFlag.TF32)
    assert on, "no longer on by default: this shows nothing"
    recorded = Recorded(rtx)
    monkeypatch.setattr(child, "load", lambda name: recorded)
    told: list[child.Record] = []
    child.build_plan(request_, LOGS, told.append)
    assert isinstance(told[-1], Built) and Path(request_.part).stat().st_size > 1000
    (config,) = recorded.configs
    flags = {name for name, flag in rtx.BuilderFlag.__members__.items() if config.get_flag(flag)}
    verbosity = rtx.ProfilingVerbosity.DETAILED
    found = (library.BUILDER_REVISION, flags, config.profiling_verbosity)
    assert found == (2, {"REQUIRE_USER_ALLOCATION"}, verbosity)
    targets = [config.get_compute_capability(i) for i in range(config.num_compute_capabilities)]
    assert targets == [rtx.ComputeCapability.SM89]


def test_default_targets_are_set_by_name(
    rtx: Any, request_: Request, monkeypatch: pytest.MonkeyPatch
) -> None:
    recorded = Recorded(rtx)
    monkeypatch.setattr(child, "load", lambda name: recorded)
    child.build_plan(replace(request_, settings=EngineSettings((1, 2, 4))), LOGS, lambda record: None)
    (config,) = recorded.configs
    set_ = {config.get_compute_capability(i).name for i in range(config.num_compute_capabilities)}
    known = {name for name in rtx.ComputeCapability.__members__ if name.startswith("SM")}
    assert set_ == known - {"SM75"}


@pytest.mark.parametrize(
    ("answers", "text"),
    [
        ({"set_compute_capability": False}, "compute capability 8.9"),
        ({"add_optimization_profile": -1}, "rows (1, 2, 4)"),
    ],
)
def test_settings_that_the_library_refuses(
    rtx: Any, request_: Request, monkeypatch: pytest.MonkeyPatch, answers: dict[str, object], text: str
) -> None:
    monkeypatch.setattr(child, "load", lambda name: Recorded(rtx, **answers))
    with pytest.raises(child._Stop) as caught:
        child.build_plan(request_, LOGS, lambda record: None)
    assert caught.value.failure == Failure(Trouble.SETTING, text)


def test_flags_that_are_not_there() -> None:
    class Module:
        BuilderFlag = SimpleNamespace()
        ProfilingVerbosity = SimpleNamespace(DETAILED="detailed")

    config = SimpleNamespace()
    child.set_flags(Module, config)
    assert vars(config) == {"profiling_verbosity": "detailed"}


class TimingConfig:
    """create_timing_cache and set_timing_cache as TensorRT may answer: only b"" and b"mine" fit."""

    def __init__(self, refuse: str) -> None:
        self.refuse, self.content = refuse, b"not set"

    def create_timing_cache(self, content: bytes) -> bytes | None:
        if content not in (b"", b"mine") and self.refuse == "raise":
            raise TypeError("factory function returned nullptr")
        return None if content not in (b"", b"mine") and self.refuse == "none" else content

    def set_timing_cache(self, cache: bytes, ignore_mismatch: bool) -> bool:
        assert not ignore_mismatch
        if cache in (b"", b"mine"):
            self.content = cache
        return cache in (b"", b"mine")


@pytest.mark.parametrize("refuse", ["raise", "none", "false"])
@pytest.mark.parametrize(("content", "used"), [(None, b""), (b"mine", b"mine"), (b"foreign", b"")])
def test_timing_cache(tmp_path: Path, refuse: str, content: bytes | None, used: bytes) -> None:
    path = tmp_path / "timing"
    if content is not None:
        path.write_bytes(content)
    config = TimingConfig(refuse)
    child.use_timing_cache(config, path)
    assert config.content == used


@pytest.mark.parametrize("given", ["no cache", "nothing", "raises", "content"])
def test_a_build_whose_timings_cannot_be_saved_is_not_lost(tmp_path: Path, given: str) -> None:
    path = tmp_path / "timing"
    path.write_bytes(b"of before")

    def get_timing_cache() -> Any:
        if given == "raises":
            raise RuntimeError("no timing cache is set")
        blob = {"nothing": None, "content": b"measured"}.get(given)
        return None if given == "no cache" else SimpleNamespace(serialize=lambda: blob)

    child.save_timing_cache(SimpleNamespace(get_timing_cache=get_timing_cache), path)
    assert path.read_bytes() == (b"measured" if given == "content" else b"of before")
    child.save_timing_cache(
        SimpleNamespace(get_timing_cache=get_timing_cache), tmp_path / "no" / "folder" / "timing"
    )


class Inspecting:
    """The runtime side that `inspect_plan` uses, where there is a GPU."""

    LayerInformationFormat = SimpleNamespace(JSON="json")
    EngineStat = SimpleNamespace(TOTAL_WEIGHTS_SIZE="total")

    class ILogger:
        pass

    def __init__(self, text: str, engine: bool = True, weights: int = 77) -> None:
        inspector = SimpleNamespace(get_engine_information=lambda form: text if form == "json" else "")
        found = SimpleNamespace(
            create_engine_inspector=lambda: inspector,
            get_engine_stat=lambda stat: weights,
            device_memory_size_v2=88,
        )
        self.Runtime = lambda logger: SimpleNamespace(
            deserialize_cuda_engine=lambda plan: found if engine else None
        )


def test_an_engine_tells_of_itself(request_: Request, monkeypatch: pytest.MonkeyPatch) -> None:
    layer = {
        "LayerType": "gemm",
        "Inputs": [{"Name": "x", "Format/Datatype": "Row major Int8 format"}],
        "Metadata": "[ONNX Layer: conv_a]",
    }
    text = json.dumps({"Layers": [layer]})
    plan = PlanReport(1, 1, {}, 1, {"gemm": 1})
    monkeypatch.setattr(cuda, "gpu", lambda index=0: Gpu("x", "8.9"))
    for module, found in (
        (Inspecting(text), Inspected(plan, Memory(77, 88))),
        (Inspecting(text, weights=-1), Inspected(plan, Memory(None, 88))),
        (Inspecting(text, engine=False), None),
    ):
        monkeypatch.setattr(child, "load", lambda name, module=module: module)
        assert child.inspect_plan(request_, memoryview(b"plan")) == found

    def none() -> Gpu:
        raise BackendUnavailable("no GPU")

    monkeypatch.setattr(cuda, "gpu", none)
    assert child.inspect_plan(request_, memoryview(b"plan")) is None


def _is_running(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(") ")[2][0] not in "ZX"
    except OSError:
        return False


def _wait(until: Callable[[], bool]) -> None:
    """Generously: a loaded machine is slow, and not wrong."""
    end = time.monotonic() + 300
    while not until():
        assert time.monotonic() < end
        time.sleep(0.01)


@pytest.mark.skipif(not Path("/proc/self/task").exists(), reason="looks for processes in /proc")
@pytest.mark.parametrize("how", [signal.SIGKILL, signal.SIGTERM, signal.SIGINT])
def test_the_builder_ends_with_its_parent(rtx: Any, tmp_path: Path, how: signal.Signals) -> None:
    """Also from another directory than the package's."""
    code = f"""
import signal, sys
from pathlib import Path
signal.signal(signal.SIGINT, signal.default_int_handler)
from ptqd_export.backends import trt
from ptqd_export.core.engine_build import EngineSettings
def advance(fraction, phase):
    children = Path("/proc/self/task") / Path("/proc/thread-self").resolve().name / "children"
    print(children.read_text(), flush=True)
    sys.stdin.read()
trt.build("{RTX}", Path("g.onnx"), Path("e.engine"), EngineSettings((1, 2, 4)), key="0" * 64, quantized={{}},
          log=Path("e.log"), advance=advance)
"""
    conv_graph(tmp_path / "g.onnx")
    pipe = subprocess.PIPE
    with subprocess.Popen(
        [sys.executable, "-c", code],
        cwd=tmp_path,
        env=environment(),
        stdin=pipe,
        stdout=pipe,
        stderr=subprocess.DEVNULL,
        text=True,
    ) as parent:
        assert parent.stdout is not None
        (child_pid,) = map(int, parent.stdout.readline().split())
        assert _is_running(child_pid)
        parent.send_signal(how)
        parent.wait(300)
    _wait(lambda: not _is_running(child_pid))
    # What the builder was writing goes before it does.
    assert sorted(path.name for path in tmp_path.iterdir() if path.name not in ("g.onnx", "e.log")) == []
