"""TensorRT: real TensorRT-RTX builds, which need no GPU; running an engine over a fake GPU, for the logic only."""

from __future__ import annotations

import importlib
import json
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import onnx
import pytest
from conftest import Built, has_gpu
from fake_cuda import FakeCuda, FakeTensorRT
from onnx import TensorProto, helper, numpy_helper

from ptqd_export.backends import trt
from ptqd_export.backends.base import DeviceEngine
from ptqd_export.backends.cuda import Buffer, CudaDevice, Gpu
from ptqd_export.backends.trt import PlanTable, Progress, Report, Settings, TrtEngine
from ptqd_export.engine import Engine, Feeds
from ptqd_export.errors import BackendUnavailable, BundleError, GraphError, PTQDError, RecipeError

RTX = "tensorrt-rtx"
SETTINGS = Settings((1, 2, 4), ("8.9",))
E4M3 = TensorProto.FLOAT8E4M3FN


@pytest.fixture(scope="session")
def rtx() -> Any:
    """The real library: for tests that build."""
    return pytest.importorskip("tensorrt_rtx")


def _graph(path: Path, *, input_scale: np.ndarray | float = 0.1, code: int = TensorProto.INT8, op: str = "Conv") -> Path:
    """A quantized 3x3 convolution "conv_a" of 16 channels, 8x8, and a float one "conv_b" after it."""
    scale = np.asarray(input_scale, np.float32)
    weight = np.random.default_rng(0).integers(0, 100, (16, 16, 3, 3)).astype(np.int8)  # as E4M3 patterns: all finite
    constants = [
        helper.make_tensor("codes", code, weight.shape, weight.tobytes(), raw=True),
        helper.make_tensor("weight_zero", code, (16,), bytes(16), raw=True),
        helper.make_tensor("zero", code, scale.shape, bytes(max(scale.size, 1)), raw=True),
        numpy_helper.from_array(scale, "scale"),
        numpy_helper.from_array(np.full(16, 0.01, np.float32), "weight_scale"),
        numpy_helper.from_array(np.full((16, 16, 1, 1), 0.01, np.float32), "plain"),
    ]
    axis = {"axis": 1} if scale.ndim else {}
    nodes = [
        helper.make_node("QuantizeLinear", ["sample", "scale", "zero"], ["q"], "quantize", **axis),
        helper.make_node("DequantizeLinear", ["q", "scale", "zero"], ["d"], "dequantize", **axis),
        helper.make_node("DequantizeLinear", ["codes", "weight_scale", "weight_zero"], ["w"], "weights", axis=0),
        helper.make_node(op, ["d", "w"], ["h"], "conv_a", pads=[1, 1, 1, 1]),
        helper.make_node("Conv", ["h", "plain"], ["epsilon"], "conv_b"),
    ]
    ends = [helper.make_tensor_value_info(name, TensorProto.FLOAT, ["B", 16, 8, 8]) for name in ("sample", "epsilon")]
    graph = helper.make_graph(nodes, "g", ends[:1], ends[1:], constants)
    onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 21)], ir_version=10), path)
    return path


Build = Callable[..., Report]


@pytest.fixture
def build(rtx: Any, tmp_path: Path) -> Iterator[Build]:
    """Builds tmp_path/e.engine, with its log in tmp_path/e.log; nothing half-written may ever be left."""

    def call(graph: Path, settings: Settings = SETTINGS, quantized: dict[str, str] | None = None, **more: Any) -> Report:
        options = {"log": tmp_path / "e.log", **more}
        return trt.build(RTX, graph, tmp_path / "e.engine", settings, quantized={"conv_a": "int8"} if quantized is None else quantized, **options)

    yield call
    assert [path.name for path in tmp_path.iterdir() if path.name.endswith(".part")] == []


def _one_line(caught: pytest.ExceptionInfo[PTQDError]) -> str:
    text = str(caught.value)
    assert "\n" not in text and "Traceback" not in text
    return text


# Building


def test_build(build: Build, tmp_path: Path) -> None:
    told: list[tuple[float, str]] = []
    report = build(_graph(tmp_path / "g.onnx"), advance=lambda fraction, phase: told.append((fraction, phase)))
    engine = tmp_path / "e.engine"
    assert report.bytes == engine.stat().st_size > 1000 and report.targets == ("8.9",)
    assert 0 < report.seconds < 60 and report.peak_bytes > 1 << 20
    plan = report.plan
    assert (plan.meant, plan.taken, plan.fell_back) == (1, 1, {})
    assert plan.types["correlation"] == 2 and 2 <= plan.kernels <= sum(plan.types.values())
    assert json.loads(json.dumps(plan.to_dict()))["taken"] == 1
    fractions = [fraction for fraction, _ in told]
    assert len(fractions) > 3 and fractions == sorted(fractions) and fractions[0] >= 0 and 0.5 < fractions[-1] <= 1
    assert "Layers:" in (tmp_path / "e.log").read_text()


def test_float_layers_are_told_by_name(build: Build, tmp_path: Path) -> None:
    """A scale per channel builds, and drops its conv to float; a float conv and an unknown node were never in 8 bits."""
    graph = _graph(tmp_path / "g.onnx", input_scale=np.linspace(0.1, 0.2, 16))
    plan = build(graph, quantized={"conv_a": "int8", "conv_b": "int8", "none": "int8"}).plan
    assert (plan.meant, plan.taken) == (3, 0)
    assert plan.fell_back == {"conv_a": "float32", "conv_b": "float32", "none": "not found"}


def test_int8_is_not_fp8(build: Build, tmp_path: Path) -> None:
    assert build(_graph(tmp_path / "g.onnx"), quantized={"conv_a": "fp8"}).plan.fell_back == {"conv_a": "int8"}


def test_fp8_chooses_its_targets(build: Build, tmp_path: Path) -> None:
    graph = _graph(tmp_path / "g.onnx", code=E4M3)
    report = build(graph, Settings((1, 2, 4)), {"conv_a": "fp8"})
    assert report.targets[0] == "8.9" and "7.5" not in report.targets
    assert report.plan.fell_back == {}
    with pytest.raises(RecipeError, match=r"holds 7\.5: .* computes in FP8 for 8\.9") as caught:
        build(graph, Settings((1, 2, 4), ("7.5",)), {"conv_a": "fp8"})
    _one_line(caught)
    with pytest.raises(GraphError, match=r"cannot build .*g\.onnx: .*hw-specific datatypes|HW-specific datatypes"):  # what the library says to it
        build(graph, Settings((1, 2, 4), ("7.5",)), {})


def test_default_targets(build: Build, tmp_path: Path, rtx: Any) -> None:
    targets = build(_graph(tmp_path / "g.onnx"), Settings((1, 2, 4))).targets
    assert {"7.5", "8.0", "8.6", "8.9", "12.0"} <= set(targets)


def test_a_log_of_unknown_wording(build: Build, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The engine is as good as any; only what runs in 8 bits is not told."""
    monkeypatch.setattr(trt, "_LAYER", re.compile("another version's wording"))
    report = build(_graph(tmp_path / "g.onnx"))
    assert report.bytes == (tmp_path / "e.engine").stat().st_size > 1000
    assert report.plan == PlanTable(1, 0, {"conv_a": "not known"}, 0, {})


def test_products_merged_into_one(build: Build, tmp_path: Path) -> None:
    """Three products of one quantized input become one layer of the plan; each of the nodes is found in it."""
    codes = np.random.default_rng(0).integers(-100, 100, (3, 16, 16)).astype(np.int8)
    constants = [numpy_helper.from_array(np.array(0.1, np.float32), "scale"), numpy_helper.from_array(np.array(0, np.int8), "zero")]
    nodes = [
        helper.make_node("QuantizeLinear", ["sample", "scale", "zero"], ["q"], "quantize"),
        helper.make_node("DequantizeLinear", ["q", "scale", "zero"], ["d"], "dequantize"),
    ]
    for i, name in enumerate("abc"):
        constants.append(numpy_helper.from_array(codes[i], f"codes_{name}"))
        nodes.append(helper.make_node("DequantizeLinear", [f"codes_{name}", "scale", "zero"], [f"w_{name}"], f"weights_{name}"))
        nodes.append(helper.make_node("MatMul", ["d", f"w_{name}"], [f"out_{name}"], f"product_{name}"))
    ends = [helper.make_tensor_value_info(name, TensorProto.FLOAT, ["B", 8, 16]) for name in ("sample", "out_a", "out_b", "out_c")]
    graph = helper.make_graph(nodes, "g", ends[:1], ends[1:], constants)
    onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 21)], ir_version=10), tmp_path / "g.onnx")
    plan = build(tmp_path / "g.onnx", quantized={f"product_{name}": "int8" for name in "abc"}).plan
    assert (plan.taken, plan.fell_back, plan.types["gemm"]) == (3, {}, 1)


def test_an_exported_network(build: Build, rgb: Built) -> None:
    """Every quantized layer of a bundle's graph is found in its plan, and none of them in 8 bits in the float graph's."""
    path = rgb.path / "w8a8.portable.onnx"
    made = {output: node for node in onnx.load(path).graph.node for output in node.output}
    products = [node for node in made.values() if node.op_type in ("Conv", "MatMul", "Gemm")]
    quantized = {n.name: "int8" for n in products if all(i in made and made[i].op_type == "DequantizeLinear" for i in n.input[:2])}
    assert len(quantized) > 10
    plan = build(path, quantized=quantized).plan
    assert plan.taken == plan.meant == len(quantized), plan.fell_back
    float_plan = build(rgb.path / "fp32.portable.onnx", quantized=quantized).plan
    assert float_plan.taken == 0 and set(float_plan.fell_back) == set(quantized)


@pytest.mark.parametrize("content", ["missing", "garbage", "operator", "dimension"])
def test_graphs_that_it_cannot_read(build: Build, tmp_path: Path, content: str) -> None:
    path = tmp_path / "g.onnx"
    if content == "garbage":
        path.write_bytes(b"hello")
    elif content == "operator":
        _graph(path, op="NoSuchOp")
    elif content == "dimension":
        model = onnx.load(_graph(path))
        model.graph.input[0].type.tensor_type.shape.dim[2].dim_param = "H"
        onnx.save(model, path)
    with pytest.raises(GraphError, match=r"g\.onnx|dynamic size in the first dimension only") as caught:
        build(path)
    text = _one_line(caught)
    assert content != "operator" or ("'conv_a' (NoSuchOp)" in text and "e.log" in text)
    assert not (tmp_path / "e.engine").exists()


def test_a_crash(build: Build, tmp_path: Path) -> None:
    """A scale that comes from a table ends the builder by a signal; this process lives on, and the old engine stays."""
    model = onnx.load(_graph(tmp_path / "g.onnx"))
    graph = model.graph
    scale = next(item for item in graph.initializer if item.name == "scale")
    graph.initializer.remove(scale)
    graph.initializer.append(numpy_helper.from_array(np.full(4, 0.1, np.float32), "table"))
    graph.input.append(helper.make_tensor_value_info("step", TensorProto.INT64, [1]))
    graph.node.insert(0, helper.make_node("Gather", ["table", "step"], ["row"], "gather"))
    graph.node.insert(1, helper.make_node("Squeeze", ["row"], ["scale"], "squeeze"))
    onnx.save(model, tmp_path / "g.onnx")
    (tmp_path / "e.engine").write_bytes(b"old")
    with pytest.raises(GraphError, match=r"the builder crashed \(SIG[A-Z]+\) on .*g\.onnx.*every scale must be a constant.*e\.log") as caught:
        build(tmp_path / "g.onnx")
    _one_line(caught)
    assert (tmp_path / "e.engine").read_bytes() == b"old"


def _children() -> list[int]:
    return [int(pid) for task in Path("/proc/self/task").iterdir() for pid in (task / "children").read_text().split()]


def _is_running(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(") ")[2][0] not in "ZX"
    except OSError:
        return False


def _wait(until: Callable[[], bool]) -> None:
    end = time.monotonic() + 60
    while not until():
        assert time.monotonic() < end
        time.sleep(0.01)


needs_proc = pytest.mark.skipif(not Path("/proc/self/task").exists(), reason="looks for processes in /proc")


@needs_proc
def test_killed_by_the_system(build: Build, tmp_path: Path) -> None:
    with pytest.raises(BackendUnavailable, match=r"most likely because memory ran out.*e\.log") as caught:
        build(_graph(tmp_path / "g.onnx"), advance=lambda fraction, phase: [os.kill(pid, signal.SIGKILL) for pid in _children()])
    _one_line(caught)


def test_memory_runs_out(rtx: Any, tmp_path: Path) -> None:
    """Under a real limit on the address space, until it is enough."""
    if has_gpu():
        pytest.skip("a GPU's driver takes address space of its own")
    code = f"""
import resource, sys
from pathlib import Path
from ptqd_export.backends import trt
limit = int(sys.argv[1]) << 20
resource.setrlimit(resource.RLIMIT_AS, (limit, limit))
try:
    trt.build("{RTX}", Path(sys.argv[2]), Path("e.engine"), trt.Settings((1, 2, 4)), quantized={{}}, log=Path("e.log"))
except Exception as error:
    print(type(error).__name__, error)
"""
    environment = {**os.environ, "PYTHONPATH": str(Path(__file__).parents[1]), "OMP_NUM_THREADS": "1"}
    outcomes = []
    _graph(tmp_path / "g.onnx")
    for limit in range(450, 1300, 50):
        words = [sys.executable, "-c", code, str(limit), "g.onnx"]
        run = subprocess.run(words, cwd=tmp_path, env=environment, capture_output=True, text=True)
        assert run.stderr == "" and run.stdout.count("\n") <= 1
        outcomes.append(run.stdout)
        if not run.stdout:
            break
    assert outcomes[-1] == "", "no limit was enough"
    assert len(outcomes) > 1 and all(text.startswith("BackendUnavailable") for text in outcomes[:-1]), outcomes


class Stop(Exception):
    pass


@needs_proc
@pytest.mark.parametrize("stop", [Stop, KeyboardInterrupt])
def test_interrupted(build: Build, tmp_path: Path, stop: type[BaseException]) -> None:
    seen: list[int] = []

    def advance(fraction: float, phase: str) -> None:
        seen.extend(_children())
        raise stop

    with pytest.raises(stop):
        build(_graph(tmp_path / "g.onnx"), advance=advance)
    assert len(seen) == 1 and not _is_running(seen[0])
    assert not (tmp_path / "e.engine").exists()


@needs_proc
@pytest.mark.parametrize("how", [signal.SIGKILL, signal.SIGTERM, signal.SIGINT])
def test_the_builder_ends_with_its_parent(rtx: Any, tmp_path: Path, how: signal.Signals) -> None:
    """Also from another directory than the package's."""
    code = f"""
import sys
from pathlib import Path
from ptqd_export.backends import trt
def advance(fraction, phase):
    print(Path(f"/proc/self/task/{{Path('/proc/self').resolve().name}}/children").read_text(), flush=True)
    sys.stdin.read()
trt.build("{RTX}", Path("g.onnx"), Path("e.engine"), trt.Settings((1, 2, 4)), quantized={{}}, log=Path("e.log"), advance=advance)
"""
    _graph(tmp_path / "g.onnx")
    environment = {**os.environ, "PYTHONPATH": str(Path(__file__).parents[1]), "OMP_NUM_THREADS": "1"}
    pipe = subprocess.PIPE
    words = [sys.executable, "-c", code]
    with subprocess.Popen(words, cwd=tmp_path, env=environment, stdin=pipe, stdout=pipe, stderr=subprocess.DEVNULL, text=True) as parent:
        assert parent.stdout is not None
        child = int(parent.stdout.readline())
        parent.send_signal(how)
        parent.wait(60)
    _wait(lambda: not _is_running(child))
    assert sorted(path.name for path in tmp_path.iterdir() if path.name not in ("g.onnx", "e.log")) == []


def test_a_full_disk(build: Build, tmp_path: Path) -> None:
    if not Path("/dev/full").exists():
        pytest.skip("no /dev/full to stand for a full disk")
    graph = _graph(tmp_path / "g.onnx")
    (tmp_path / f".e.engine.{os.getpid()}.part").symlink_to("/dev/full")
    with pytest.raises(PTQDError, match=r"cannot write the engine of \d+ bytes into .*No space left on device.*free some space") as caught:
        build(graph)
    _one_line(caught)
    with pytest.raises(PTQDError, match=r"cannot write /dev/full: No space left on device") as caught:
        build(graph, log=Path("/dev/full"))
    _one_line(caught)
    with pytest.raises(PTQDError, match=r"cannot write .*nowhere.*choose another place"):
        build(graph, log=tmp_path / "nowhere" / "e.log")
    assert not (tmp_path / "e.engine").exists()


def test_settings_reach_the_builder(build: Build, tmp_path: Path) -> None:
    graph = _graph(tmp_path / "g.onnx")
    with pytest.raises(RecipeError, match=r"tensorrt\.compute_capabilities holds 9\.0: .* knows 7\.5, .*8\.9") as caught:
        build(graph, Settings((1, 2, 4), ("9.0",)))
    _one_line(caught)
    assert build(graph, Settings((1, 2, 4), ("8.6", "12.0"), 0, 4096)).targets == ("8.6", "12.0")
    log = (tmp_path / "e.log").read_text()
    assert "MinShape: [1,16,8,8], OptShape: [2,16,8,8], MaxShape: [4,16,8,8]" in log
    with pytest.raises(GraphError, match=r"raise tensorrt\.workspace_mib; the log is .*e\.log"):
        build(graph, Settings((1, 2, 4), ("8.9",), None, 1))


class Recorded:
    """The builder's module, with the configurations that its builders made kept in `configs`."""

    def __init__(self, module: Any) -> None:
        self._module, self.configs = module, list[Any]()

    def __getattr__(self, name: str) -> Any:
        return getattr(self._module, name)

    def Builder(self, logger: Any) -> Any:
        builder = self._module.Builder(logger)
        add = builder.create_builder_config

        def create_builder_config() -> Any:
            self.configs.append(add())
            return self.configs[-1]

        methods = ("create_network", "create_optimization_profile", "build_serialized_network")
        return SimpleNamespace(create_builder_config=create_builder_config, **{name: getattr(builder, name) for name in methods})


def test_flags(rtx: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What `key` knows by BUILDER_REVISION alone: whoever changes the expected values here raises it."""
    assert rtx.Builder(rtx.Logger()).create_builder_config().get_flag(rtx.BuilderFlag.TF32), "no longer on by default: this shows nothing"
    recorded = Recorded(rtx)
    monkeypatch.setattr(trt, "load", lambda name: recorded)
    request = {"name": RTX, "graph": str(_graph(tmp_path / "g.onnx")), "settings": SETTINGS.to_dict(), "fp8": False, "timing_cache": None}
    trt._build(request, tmp_path / "part", lambda message: None)
    (config,) = recorded.configs
    flags = {name for name, flag in rtx.BuilderFlag.__members__.items() if config.get_flag(flag)}
    assert (trt.BUILDER_REVISION, flags, config.profiling_verbosity) == (1, {"REQUIRE_USER_ALLOCATION"}, rtx.ProfilingVerbosity.DETAILED)


def test_flags_that_are_not_there() -> None:
    class Module:
        BuilderFlag = SimpleNamespace()
        ProfilingVerbosity = SimpleNamespace(DETAILED="detailed")

    config = SimpleNamespace()
    trt._set_flags(Module, config)
    assert vars(config) == {"profiling_verbosity": "detailed"}


def test_key_of_the_builder_s_revision(rtx: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    before = trt.key(RTX, "a", SETTINGS)
    monkeypatch.setattr(trt, "BUILDER_REVISION", trt.BUILDER_REVISION + 1)
    assert trt.key(RTX, "a", SETTINGS) != before


def test_key(rtx: Any) -> None:
    settings = Settings((1, 2, 4))
    keys = {trt.key(RTX, "a", settings), trt.key(RTX, "b", settings), trt.key(RTX, "a", Settings((1, 2, 8))), trt.key(RTX, "a", SETTINGS)}
    assert len(keys) == 4 and all(len(key) == 64 for key in keys)
    assert trt.key(RTX, "a", settings) == trt.key(RTX, "a", Settings((1, 2, 4)), Gpu("x", "8.9"))
    assert trt.runtime_version(RTX) == f"{RTX} {rtx.__version__}"
    assert json.loads(json.dumps(SETTINGS.to_dict())) == SETTINGS.to_dict()


def test_a_gpu_that_the_library_does_not_serve(rtx: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """No rebuild would help."""
    monkeypatch.setattr(trt.cuda, "gpu", lambda: Gpu("NVIDIA H100", "9.0"))
    with pytest.raises(
        BackendUnavailable, match=r"does not serve NVIDIA H100 \(9\.0\): it knows compute capabilities .*8\.9.*; choose another backend"
    ):
        trt.check(RTX)
    monkeypatch.setattr(trt.cuda, "gpu", lambda: Gpu("NVIDIA L4", "8.9"))
    trt.check(RTX)


def test_key_of_the_gpu_at_hand(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "tensorrt", SimpleNamespace(__version__="10.9"))
    keys = {trt.key("tensorrt", "a", SETTINGS, Gpu("x", capability)) for capability in ("8.9", "9.0")}
    assert len(keys) == 2
    monkeypatch.setitem(sys.modules, "tensorrt", SimpleNamespace(__version__="11.0"))
    assert trt.key("tensorrt", "a", SETTINGS, Gpu("x", "8.9")) not in keys


def test_not_installed(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setitem(trt.MODULES, "tensorrt", "tensorrt_that_nobody_has")
    with pytest.raises(BackendUnavailable, match=r"not installed: pip install 'ptqd-export\[tensorrt\]'"):
        trt.load("tensorrt")
    for text in ("import nothing_of_this_name", "raise OSError('libnvinfer.so: cannot open\\nshared object')"):
        (tmp_path / "tensorrt_that_fails.py").write_text(text)
        monkeypatch.syspath_prepend(tmp_path)
        importlib.invalidate_caches()
        monkeypatch.setitem(trt.MODULES, "tensorrt", "tensorrt_that_fails")
        with pytest.raises(BackendUnavailable, match=r"is installed but does not load \((No module named|libnvinfer)") as caught:
            trt.load("tensorrt")
        _one_line(caught)


def test_not_installed_in_the_builder(tmp_path: Path) -> None:
    """Full TensorRT is asked for by its name, in the builder's process."""
    if importlib.util.find_spec("tensorrt") is not None:
        pytest.skip("TensorRT is installed")
    with pytest.raises(BackendUnavailable, match=r"pip install 'ptqd-export\[tensorrt\]'"):
        trt.build("tensorrt", _graph(tmp_path / "g.onnx"), tmp_path / "e.engine", SETTINGS, quantized={}, log=tmp_path / "e.log")


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
    trt._use_timing_cache(config, path)
    assert config.content == used


def test_progress() -> None:
    """Phases of one step each may follow one another: the fraction waits and never falls."""
    progress = Progress()
    progress.start("all", None, 2)
    seen = []
    for _ in range(2):
        progress.start("part", "all", 4)
        for step in range(4):
            progress.step("part", step)
            seen.append(progress.fraction)
        progress.finish("part")
    assert seen == [0.125, 0.25, 0.375, 0.5, 0.5, 0.5, 0.5, 0.5]
    progress.step("all", 0)
    progress.start("part", "all", 1)
    progress.step("part", 0)
    progress.step("unheard of", 0)
    assert progress.fraction == 1.0


# The plan's text

FULL = """Engine Layer Information:
Name: Reformatting CopyNode for Input Tensor 0 to a, LayerType: Reformat, Inputs: [ { Name: x, Location: Device, Dimensions: [1,8], Format/Datatype: Row major linear FP32 format }], Outputs: [], ParameterType: Reformat, Metadata: [ONNX Layer: a]
Name: a + b[0], LayerType: CaskConvolution, Inputs: [ { Name: q[1], Location: Device, Dimensions: [1,8], Format/Datatype: Thirty-two wide channel vectorized row major Int8 format }, { Name: r, Format/Datatype: Channel major FP16 format where channel % 8 == 0 }], Outputs: [ { Name: y, Format/Datatype: Row major linear FP16 format }], Weights: {"Type": "Int8", "Count": 64}, Metadata: [ONNX Layer: a]\x1e[ONNX Layer: b[0]]\x1e[ONNX Layer: relu]
Name: c, LayerType: CaskConvolution, Inputs: [ { Name: y, Format/Datatype: Channel major FP16 format where channel % 8 == 0 }], Outputs: [], Metadata: [ONNX Layer: c]
Name: w, LayerType: wait, Inputs: [], Outputs: [], Metadata:
"""  # noqa: E501


def test_plan_of_full_tensorrt() -> None:
    """The wording of TensorRT 8 to 10 as quoted in NVIDIA/TensorRT#4020 and #3583."""
    for name in ("a", "b[0]", "relu"):
        plan = PlanTable.read(FULL.split("\n"), {name: "int8", "c": "int8"})
        assert (plan.meant, plan.taken, plan.fell_back) == (2, 1, {"c": "float16"})
    assert plan.kernels == 3 and plan.types == {"CaskConvolution": 2, "Reformat": 1, "wait": 1}


def test_only_the_finished_plan_counts() -> None:
    """Layers told of before the last header are of another plan."""
    later = (
        "VERBOSE Layers:\nName: c, LayerType: gemm, Inputs: [ { Name: y, Datatype: FP8, Format: (Linear) }], Outputs: [], Metadata: [ONNX Layer: c]\n"
    )
    plan = PlanTable.read((FULL + later).splitlines(), {"a": "int8", "c": "fp8"})
    assert plan.fell_back == {"a": "not found"} and plan.types == {"gemm": 1}


def test_a_kernel_around_a_layer_is_not_the_layer() -> None:
    """What only prepares or ends a conv names its node too, and may read 8 bits where the conv does not."""
    around = "Name: k, LayerType: kgen, Inputs: [ { Name: x, Datatype: Int8 }], Outputs: [], Metadata: [ONNX Layer: a]"
    conv = "Name: a, LayerType: correlation, Inputs: [ { Name: y, Datatype: Half }], Outputs: [], Metadata: [ONNX Layer: a]"
    assert PlanTable.read([around, conv], {"a": "int8"}).fell_back == {"a": "float16"}
    assert PlanTable.read([around], {"a": "int8"}).fell_back == {"a": "not found"}


def _layer(kind: str, dtype: str, *nodes: str) -> str:
    metadata = "\x1e".join(f"[ONNX Layer: {node}]" for node in nodes)
    return f"Name: {{ForeignNode[a...c]}}, LayerType: {kind}, Inputs: [ {{ Name: x, Datatype: {dtype} }}], Outputs: [], Metadata: {metadata}"


@pytest.mark.parametrize("kind", ["Myelin", "ForeignNode"])
@pytest.mark.parametrize("nodes", [("a",), ("a", "b", "softmax")])
def test_a_layer_of_a_whole_subgraph(kind: str, nodes: tuple[str, ...]) -> None:
    """Its first input is that of its first node, and of this alone (NVIDIA/TensorRT#4397 shows such layers)."""
    plan = PlanTable.read([_layer(kind, "Int8", *nodes)], dict.fromkeys(("a", "b"), "int8"))
    assert plan.taken == 0
    assert plan.fell_back == {"a": "not known", "b": "not known" if "b" in nodes else "not found"}
    assert plan.kernels == 1 and plan.types == {kind: 1}


def test_a_layer_of_several_nodes() -> None:
    """One product for all of them has one type; of another layer only one node can be told, whatever else is fused into it."""
    meant = dict.fromkeys("ab", "int8")
    for kind in ("gemm", "correlation"):
        assert PlanTable.read([_layer(kind, "Int8", "a", "b", "relu")], meant).taken == 2
    for kind in ("fusion", "CaskConvolution"):
        plan = PlanTable.read([_layer(kind, "Int8", "a", "b", "relu")], meant)
        assert (plan.taken, plan.fell_back) == (0, dict.fromkeys("ab", "not known"))
        assert PlanTable.read([_layer(kind, "Int8", "a", "relu"), _layer(kind, "Half", "b")], meant).fell_back == {"b": "float16"}
    assert PlanTable.read([_layer("fusion", "Half", "a", "b"), _layer("gemm", "Int8", "a")], meant).fell_back == {"b": "not known"}


@pytest.mark.parametrize("text", ["", "VERBOSE Layers:\nEngine Metadata:\n", "VERBOSE Name: but no layer\n"])
def test_no_plan(text: str) -> None:
    assert PlanTable.read(text.splitlines(), {"a": "int8"}) == PlanTable(1, 0, {"a": "not known"}, 0, {})


def test_odd_lines_do_not_break_the_reading() -> None:
    line = "Name: a, LayerType: gemm, Inputs: [ { Name: open, Datatype: Int8"
    plan = PlanTable.read([line, "Name: b, LayerType: gemm, Inputs: [ { Name: x }], Metadata: [ONNX Layer: b]"], {"a": "int8", "b": "int8"})
    assert plan.fell_back == {"a": "not found", "b": "none"}


# Running, over a fake


@pytest.fixture
def cuda() -> FakeCuda:
    return FakeCuda()


@pytest.fixture
def device(cuda: FakeCuda) -> Iterator[CudaDevice]:
    with CudaDevice(cuda) as device:
        yield device
    assert cuda.live() == {}


@pytest.fixture
def file(tmp_path: Path) -> Path:
    path = tmp_path / "e.engine"
    path.write_bytes(b"good")
    return path


def _feeds(n: int, start: int = 0) -> dict[str, np.ndarray]:
    return {"sample": np.arange(start, start + 4 * n, dtype=np.float32).reshape(n, 4), "timestep": np.arange(n)}


def _expected(feeds: Feeds) -> np.ndarray:
    return np.asarray(2 * feeds["sample"] + feeds["timestep"][:, None])


@pytest.mark.parametrize("rtx", [True, False])
def test_engine_call(cuda: FakeCuda, device: CudaDevice, file: Path, rtx: bool) -> None:
    fake = FakeTensorRT(cuda, rtx=rtx)
    with TrtEngine(fake, file, device) as engine:
        assert isinstance(engine, Engine) and isinstance(engine, DeviceEngine)
        assert engine.inputs == ("timestep", "sample") and engine.outputs == ("epsilon",) and engine.rows == {"timestep": (1, 8), "sample": (1, 8)}
        assert engine.specs[1].shape == (None, 4) and engine.specs[1].dtype == "float32"
        outs = []
        for n, start in ((2, 0), (8, 5), (2, 7), (2, 9), (2, 11), (8, 3)):
            feeds = _feeds(n, start)
            out = engine({**feeds, "ignored": np.zeros(1)})["epsilon"]
            np.testing.assert_array_equal(out, _expected(feeds))
            outs.append((out, _expected(feeds)))
        for out, expected in outs:  # fresh ones
            np.testing.assert_array_equal(out, expected)
        assert cuda.launches > 0
        if rtx:
            assert fake.config.dynamic_shapes_kernel_specialization_strategy == "eager"
    engine.close()
    with pytest.raises(BackendUnavailable, match=r"e\.engine is closed"):
        engine(_feeds(1))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"timestep": None}, "needs the input 'timestep': got sample"),
        ({"sample": np.zeros((3, 4))}, r"takes 'sample' as float32 \(any, 4\): got float64 \(3, 4\)"),
        ({"sample": np.zeros((3, 5), np.float32)}, r"got float32 \(3, 5\)"),
        ({"sample": np.zeros(4, np.float32)}, r"got float32 \(4,\)"),
        ({"sample": np.zeros((9, 4), np.float32)}, r"built for 1 to 8 rows: 'sample' has 9: .*tensorrt\.batch_sizes"),
        ({"sample": np.zeros((0, 4), np.float32)}, r"'sample' has 0"),
        ({"timestep": np.zeros(2, np.int64)}, "failed to run: the fake broke"),
    ],
)
def test_wrong_feeds(cuda: FakeCuda, device: CudaDevice, file: Path, change: dict[str, np.ndarray | None], message: str) -> None:
    feeds = {name: value for name, value in {**_feeds(3), **change}.items() if value is not None}
    with TrtEngine(FakeTensorRT(cuda), file, device) as engine, pytest.raises(GraphError, match=message) as caught:
        engine(feeds)
    _one_line(caught)


def _buffers(device: CudaDevice, feeds: Feeds) -> dict[str, Buffer]:
    buffers = {name: device.empty(value.shape, value.dtype.name) for name, value in feeds.items()}
    for name, value in feeds.items():
        device.write(buffers[name], value)
    return {**buffers, "epsilon": device.empty(feeds["sample"].shape, "float32")}


def test_launch_is_captured_the_second_time(cuda: FakeCuda, device: CudaDevice, file: Path) -> None:
    """By (shapes, addresses); a replay computes from what the buffers hold then."""
    fake = FakeTensorRT(cuda)
    with TrtEngine(fake, file, device) as engine:
        one, two = _buffers(device, _feeds(2)), _buffers(device, _feeds(2, 50))
        enqueued = []
        for i in range(4):
            for buffers in (one, two):
                feeds = _feeds(2, 10 * i)
                device.write(buffers["sample"], feeds["sample"])
                engine.launch(buffers)
                np.testing.assert_array_equal(device.read(buffers["epsilon"]), _expected(feeds))
            enqueued.append(fake.enqueued)
        assert enqueued == [2, 6, 6, 6], "first a run, then a run and a capture, then replays only"
        assert cuda.launches == 4 and cuda.graphs == 2
        assert len(fake.contexts) == 3 and fake.configs == 1, "one for each graph and one for all else, configured once"
    assert len(fake.contexts) == 0


@pytest.mark.parametrize("rtx", [True, False])
def test_a_replay_after_other_runs(cuda: FakeCuda, device: CudaDevice, file: Path, rtx: bool) -> None:
    """Runs of other shapes, captured or not, and calls on host arrays leave a graph's context alone, which is part of the graph."""
    fake = FakeTensorRT(cuda, rtx=rtx)
    with TrtEngine(fake, file, device) as engine:
        buffers = _buffers(device, _feeds(2))
        for _ in range(2):
            engine.launch(buffers)
        for n in (1, 3, 3, 3, 8):
            np.testing.assert_array_equal(engine(_feeds(n, n))["epsilon"], _expected(_feeds(n, n)))
            engine.launch(buffers)
            device.synchronize()
        np.testing.assert_array_equal(device.read(buffers["epsilon"]), _expected(_feeds(2)))
        assert cuda.launches == 6 and len(fake.contexts) == 3


def test_no_memory_for_another_context(cuda: FakeCuda, device: CudaDevice, file: Path) -> None:
    """Runs go on without graphs, and what failed later is not told of as this."""
    fake = FakeTensorRT(cuda)
    fake.most_contexts = 1
    with TrtEngine(fake, file, device) as engine:
        for _ in range(4):
            np.testing.assert_array_equal(engine(_feeds(2))["epsilon"], _expected(_feeds(2)))
        assert cuda.launches == 0 and fake.enqueued == 4
        fake.broken = True
        with pytest.raises(GraphError, match="failed to run: the fake broke"):
            engine(_feeds(2))
    fake.most_contexts = 0
    with pytest.raises(BackendUnavailable, match=r"e\.engine cannot be made ready on Fake GPU \(8\.9\) \(no memory for a context\)"):
        TrtEngine(fake, file, device)


def test_the_fake_tells_a_changed_context(cuda: FakeCuda, device: CudaDevice, file: Path) -> None:
    """And one that is gone: what the tests above rest on."""
    fake = FakeTensorRT(cuda)
    with TrtEngine(fake, file, device) as engine:
        buffers = _buffers(device, _feeds(2))
        for _ in range(2):
            engine.launch(buffers)
        (captured,) = engine._captured.values()
        captured.context.set_input_shape("sample", (3, 4))
        engine.launch(buffers)
        with pytest.raises(AssertionError, match="the context was changed since its graph was captured"):
            device.synchronize()
        engine.launch(buffers)
        del captured
        engine._captured[next(iter(engine._captured))] = None
        with pytest.raises(AssertionError, match="the context is gone"):
            device.synchronize()


def test_launch_does_not_wait(cuda: FakeCuda, device: CudaDevice, file: Path) -> None:
    with TrtEngine(FakeTensorRT(cuda), file, device) as engine:
        buffers = _buffers(device, _feeds(2))
        device.synchronize()
        for _ in range(4):
            engine.launch(buffers)
        assert cuda.queued == 4


@pytest.mark.parametrize("fault", ["not capturable", "cudaStreamEndCapture", "cudaGraphInstantiate"])
def test_without_capture(cuda: FakeCuda, device: CudaDevice, file: Path, fault: str) -> None:
    fake = FakeTensorRT(cuda, capturable=fault != "not capturable")
    cuda.fail = fault
    with TrtEngine(fake, file, device) as engine:
        for _ in range(5):
            np.testing.assert_array_equal(engine(_feeds(2))["epsilon"], _expected(_feeds(2)))
        assert len(fake.contexts) == 1
    assert cuda.launches == 0 and fake.enqueued <= 6  # five runs, and one capture that came to nothing


def test_graphs_are_bounded(cuda: FakeCuda, device: CudaDevice, file: Path) -> None:
    fake = FakeTensorRT(cuda)
    with TrtEngine(fake, file, device) as engine:
        every = [_buffers(device, _feeds(1, i)) for i in range(trt.GRAPHS + 5)]
        for buffers in every:
            for _ in range(3):
                engine.launch(buffers)
        assert cuda.graphs == trt.GRAPHS and len(fake.contexts) == trt.GRAPHS + 1
        for i, buffers in enumerate(every):
            np.testing.assert_array_equal(device.read(buffers["epsilon"]), _expected(_feeds(1, i)))
    assert cuda.graphs == 0


def test_the_latest_graphs_are_kept(cuda: FakeCuda, device: CudaDevice, file: Path) -> None:
    with TrtEngine(FakeTensorRT(cuda), file, device) as engine:
        first, *others, last = [_buffers(device, _feeds(1, i)) for i in range(trt.GRAPHS + 1)]
        for buffers in (first, *others, first, last, first):
            engine.launch(buffers)
        assert cuda.launches == 1, "captured, and dropped as the one first seen"


def test_close_after_a_failure_of_the_gpu(cuda: FakeCuda, file: Path) -> None:
    """Nothing can be freed but the library's own objects, contexts before their engine."""
    device, fake = CudaDevice(cuda), FakeTensorRT(cuda)
    engine = TrtEngine(fake, file, device)
    for _ in range(3):
        engine(_feeds(1))
    assert len(fake.contexts) == 2
    cuda.fail = "cudaStreamSynchronize"
    engine.close()
    engine.close()
    assert len(fake.contexts) == 0
    device.close()


def test_engines_share_the_scratch(cuda: FakeCuda, device: CudaDevice, file: Path) -> None:
    """A larger engine moves it, and the smaller one's graphs are made anew."""
    small, large = FakeTensorRT(cuda, scratch=500), FakeTensorRT(cuda, scratch=5000)
    with TrtEngine(small, file, device) as first:
        for _ in range(3):
            first(_feeds(2))
        assert device.scratch[1] == 500 and cuda.graphs == 1
        with TrtEngine(large, file, device) as second:
            assert device.scratch[1] == 5000
            for _ in range(4):
                for engine in (first, second):
                    np.testing.assert_array_equal(engine(_feeds(2))["epsilon"], _expected(_feeds(2)))
            assert small.enqueued == 6 and cuda.graphs == 2


def test_no_memory_for_a_larger_scratch(cuda: FakeCuda, device: CudaDevice, file: Path) -> None:
    """The engine that wants it does not open; those that are open go on."""
    with TrtEngine(FakeTensorRT(cuda, scratch=500), file, device) as engine:
        for i in range(4):
            if i == 2:
                cuda.limit = 1 << 16
                with pytest.raises(BackendUnavailable, match="memory ran out on Fake GPU"):
                    TrtEngine(FakeTensorRT(cuda, scratch=1 << 20), file, device)
            np.testing.assert_array_equal(engine(_feeds(2, i))["epsilon"], _expected(_feeds(2, i)))
        assert cuda.launches == 2 and device.scratch[1] == 500


def test_a_scratch_that_is_too_small(cuda: FakeCuda, file: Path) -> None:
    device = CudaDevice(cuda)
    engine = TrtEngine(FakeTensorRT(cuda, scratch=500), file, device)
    buffers = _buffers(device, _feeds(2))
    device.close()
    with pytest.raises(BackendUnavailable, match=r"e\.engine needs 500 bytes of scratch memory, the device holds 0: open the device") as caught:
        engine.launch(buffers)
    _one_line(caught)


def test_wrong_buffers(cuda: FakeCuda, device: CudaDevice, file: Path) -> None:
    with TrtEngine(FakeTensorRT(cuda), file, device) as engine:
        buffers = _buffers(device, _feeds(2))
        with pytest.raises(GraphError, match="needs a buffer 'epsilon': got sample, timestep"):
            engine.launch({name: buffers[name] for name in ("sample", "timestep")})
        with pytest.raises(GraphError, match=r"takes 'timestep' as int64 \(any\): got float32 \(2,\)"):
            engine.launch({**buffers, "timestep": device.empty((2,), "float32")})
        with pytest.raises(GraphError, match=r"makes 'epsilon' of shape \(2, 4\) from these inputs: got a buffer of \(3, 4\)"):
            engine.launch({**buffers, "epsilon": device.empty((3, 4), "float32")})


@pytest.mark.parametrize("rtx", [True, False])
@pytest.mark.parametrize(
    ("content", "error", "message"),
    [
        (b"old", BundleError, "was built by another version of TensorRT: it was built by X for Y, this machine has fake_tensorrt 1.0 on Fake GPU"),
        (
            b"foreign",
            BundleError,
            "was not built for this GPU: it was built by X for Y, this machine has fake_tensorrt 1.0 on Fake GPU (8.9): run with",
        ),
        (b"noise", BundleError, "is damaged: it was built by X for Y"),
        (b"driver", BackendUnavailable, "CUDA driver version is insufficient for CUDA runtime version"),
        (None, BundleError, "cannot be read: No such file or directory: run with --rebuild"),
    ],
)
def test_engines_that_do_not_fit(
    cuda: FakeCuda, device: CudaDevice, tmp_path: Path, rtx: bool, content: bytes | None, error: type[PTQDError], message: str
) -> None:
    path = tmp_path / "e.engine"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(error) as caught:
        TrtEngine(FakeTensorRT(cuda, rtx=rtx), path, device, built="X for Y")
    text = _one_line(caught)
    assert message in text and "e.engine" in text
    assert (error is BackendUnavailable) or text.endswith("run with --rebuild")


@pytest.mark.parametrize("content", [None, b"cache of before", b"foreign"])
def test_runtime_cache(cuda: FakeCuda, device: CudaDevice, file: Path, tmp_path: Path, content: bytes | None) -> None:
    path = tmp_path / "user" / "kernels"
    if content is not None:
        path.parent.mkdir()
        path.write_bytes(content)
    with TrtEngine(FakeTensorRT(cuda), file, device, cache=path) as engine:
        engine(_feeds(1))
    assert path.read_bytes() == (b"cache of before+" if content == b"cache of before" else b"cache+")
    assert [p.name for p in path.parent.iterdir()] == ["kernels"]


def test_a_cache_that_cannot_be_written_is_no_failure(cuda: FakeCuda, device: CudaDevice, file: Path) -> None:
    with TrtEngine(FakeTensorRT(cuda), file, device, cache=file / "below" / "a file") as engine:
        engine(_feeds(1))


def test_a_real_engine_with_no_gpu(build: Build, tmp_path: Path, rtx: Any, cuda: FakeCuda) -> None:
    """The real runtime library, where there is no GPU: one line."""
    build(_graph(tmp_path / "g.onnx"))
    if has_gpu():
        pytest.skip("there is a GPU")
    with CudaDevice(cuda) as device, pytest.raises(BackendUnavailable, match=r"e\.engine does not load|does not work here") as caught:
        TrtEngine(rtx, tmp_path / "e.engine", device)
    _one_line(caught)
