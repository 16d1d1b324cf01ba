"""OrtEngine, the registry, and the structure of what ONNX Runtime runs."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper

from ptqd_export.backends import OrtEngine, available, base, open_engine, set_threads
from ptqd_export.engine import Engine, Feeds
from ptqd_export.errors import BackendUnavailable, GraphError, PTQDError
from ptqd_export.export.structure import float_convs, op_counts


def _save(path: Path, text: str, *initializers: onnx.TensorProto) -> Path:
    model = onnx.parser.parse_model(f'<ir_version: 10, opset_import: ["": 21]>\n{text}')
    model.graph.initializer.extend(initializers)
    onnx.save(model, path)
    return path


@pytest.fixture
def affine(tmp_path: Path) -> Path:
    """epsilon = 2 sample + timestep, over (B, 2)."""
    return _save(
        tmp_path / "affine.onnx",
        """g (float[B, 2] sample, int64[B] timestep) => (float[B, 2] epsilon, float[B, 2] doubled) {
            axis = Constant<value = int64[1] {1}>()
            t = Cast<to = 1>(timestep)
            column = Unsqueeze(t, axis)
            doubled = Add(sample, sample)
            epsilon = Add(doubled, column)
        }""",
    )


@pytest.fixture
def feeds() -> Feeds:
    return {"sample": np.arange(6, dtype=np.float32).reshape(3, 2), "timestep": np.array([10, 20, 30])}


def test_runs(affine: Path, feeds: Feeds) -> None:
    with OrtEngine(affine) as engine:
        assert isinstance(engine, Engine)
        assert engine.inputs == ("sample", "timestep") and engine.outputs == ("epsilon", "doubled")
        assert engine.specs[0].shape == (None, 2) and engine.specs[1].dtype == "int64"
        out = engine(feeds)
        np.testing.assert_array_equal(out["epsilon"], 2 * feeds["sample"] + feeds["timestep"][:, None])
        assert out["epsilon"].dtype == np.float32
        one = engine({name: value[:1] for name, value in feeds.items()})
        np.testing.assert_array_equal(one["epsilon"], out["epsilon"][:1])


def test_extra_feeds_are_ignored_and_strided_ones_are_taken(affine: Path, feeds: Feeds) -> None:
    with OrtEngine(affine) as engine:
        strided = np.asfortranarray(np.concatenate([feeds["sample"]] * 2, 1))[:, ::2]
        out = engine({**feeds, "sample": strided, "step": np.array([3])})
        np.testing.assert_array_equal(out["doubled"], 2 * strided)


def test_outputs_are_fresh_and_owned_by_the_caller(tmp_path: Path) -> None:
    path = _save(tmp_path / "same.onnx", "g (float[B, 2] sample) => (float[B, 2] epsilon) { epsilon = Identity(sample) }")
    engine = OrtEngine(path)
    x = np.ones((2, 2), np.float32)
    first = engine({"sample": x})["epsilon"]
    first[:] = 5
    assert np.all(x == 1)
    second = engine({"sample": x})["epsilon"]
    assert np.all(second == 1) and np.all(first == 5)
    engine.close()
    assert np.all(second == 1)


def test_close(affine: Path, feeds: Feeds) -> None:
    engine = OrtEngine(affine)
    engine.close()
    engine.close()
    with pytest.raises(BackendUnavailable, match=r"affine\.onnx is closed"):
        engine(feeds)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"timestep": None}, "needs the input 'timestep': got sample"),
        ({"sample": np.zeros((3, 2))}, r"takes 'sample' as float32 \(any, 2\): got float64 \(3, 2\)"),
        ({"sample": np.zeros((3, 5), np.float32)}, r"got float32 \(3, 5\)"),
        ({"sample": np.zeros(3, np.float32)}, r"got float32 \(3,\)"),
        ({"timestep": np.zeros(2, np.int64)}, "failed to run"),
    ],
)
def test_wrong_feeds(affine: Path, feeds: Feeds, change: dict[str, np.ndarray | None], message: str, capfd: pytest.CaptureFixture[str]) -> None:
    wrong = {name: value for name, value in {**feeds, **change}.items() if value is not None}
    with OrtEngine(affine) as engine, pytest.raises(GraphError, match=message) as caught:
        engine(wrong)
    assert "\n" not in str(caught.value)
    assert capfd.readouterr().err == ""


def test_memory_runs_out(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    path = _save(
        tmp_path / "big.onnx", "g (int64[1] sample) => (float[N] epsilon) { one = Constant<value = float {1.0}>() epsilon = Expand(one, sample) }"
    )
    with OrtEngine(path) as engine:
        assert engine({"sample": np.array([3])})["epsilon"].shape == (3,)
        with pytest.raises(BackendUnavailable, match="lower the batch size"):
            engine({"sample": np.array([10**15])})
    assert capfd.readouterr().err == ""


@pytest.mark.parametrize("content", [None, b"", b"not a graph", "truncated", "dangling"])
def test_broken_files(tmp_path: Path, affine: Path, content: bytes | str | None, capfd: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "broken.onnx"
    if content == "truncated":
        path.write_bytes(affine.read_bytes()[:-40])
    elif content == "dangling":
        _save(path, "g (float[2] x) => (float[2] y) { y = Add(x, z) }")
    elif isinstance(content, bytes):
        path.write_bytes(content)
    with pytest.raises(GraphError, match=r"broken\.onnx") as caught:
        OrtEngine(path)
    assert "\n" not in str(caught.value)
    assert capfd.readouterr().err == ""


def test_missing_weights(tmp_path: Path) -> None:
    weights = numpy_helper.from_array(np.ones((2,), np.float32), "w")
    onnx.external_data_helper.set_external_data(weights, "weights.bin", 0, 8)
    weights.ClearField("raw_data")
    path = _save(tmp_path / "m.onnx", "g (float[2] x) => (float[2] y) { y = Mul(x, w) }", weights)
    with pytest.raises(GraphError, match=r"weights\.bin"):
        OrtEngine(path)
    np.full(2, 3, np.float32).tofile(tmp_path / "weights.bin")
    with OrtEngine(path) as engine:
        assert engine({"x": np.ones(2, np.float32)})["y"].tolist() == [3, 3]


def test_unknown_operator(tmp_path: Path) -> None:
    node = helper.make_node("Bar", ["x"], ["y"], domain="nowhere")
    value = [helper.make_tensor_value_info(name, TensorProto.FLOAT, [2]) for name in "xy"]
    model = helper.make_model(
        helper.make_graph([node], "g", value[:1], value[1:]), opset_imports=[helper.make_opsetid("nowhere", 1), helper.make_opsetid("", 21)]
    )
    model.ir_version = 10
    onnx.save(model, tmp_path / "bar.onnx")
    with pytest.raises(BackendUnavailable, match="Bar"):
        OrtEngine(tmp_path / "bar.onnx")


def test_registry(affine: Path, feeds: Feeds, monkeypatch: pytest.MonkeyPatch) -> None:
    assert available() == {"ort-cpu": "ok"}
    with open_engine("ort-cpu", affine) as engine:
        assert engine(feeds)["epsilon"].shape == (3, 2)
    with pytest.raises(BackendUnavailable, match="'ort-gpu' does not run graph files: expected one of ort-cpu"):
        open_engine("ort-gpu", affine)
    monkeypatch.setitem(sys.modules, "onnxruntime", None)
    assert set(available()) == set(base.BACKENDS) and "ptqd-export[cpu]" in available()["ort-cpu"]
    with pytest.raises(BackendUnavailable, match=r"pip install 'ptqd-export\[cpu\]'"):
        OrtEngine(affine)


def test_both_distributions_installed(tmp_path: Path, affine: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    info = tmp_path / "onnxruntime_gpu-1.0.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: onnxruntime-gpu\nVersion: 1.0\n")
    monkeypatch.syspath_prepend(str(tmp_path))
    with pytest.raises(BackendUnavailable, match="onnxruntime and onnxruntime-gpu are both installed"):
        OrtEngine(affine)
    assert "both installed" in available()["ort-cpu"]


def _python(code: str) -> str:
    return subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=60).stdout.strip()


def test_one_pool_of_the_given_size(affine: Path) -> None:
    """Four engines of a process add as many threads as one does."""
    code = f"""
import os
from pathlib import Path
from ptqd_export.backends import OrtEngine, set_threads
import onnxruntime
set_threads(4)
before = len(os.listdir("/proc/self/task"))
counts = []
engines = []
for _ in range(4):
    engines.append(OrtEngine(Path({str(affine)!r})))
    counts.append(len(os.listdir("/proc/self/task")) - before)
print(counts)
"""
    assert _python(code) == "[3, 3, 3, 3]"  # the caller is the fourth


def test_threads_are_set_before_the_first_engine(affine: Path) -> None:
    with pytest.raises(BackendUnavailable, match="at least 1"):
        set_threads(0)
    code = f"""
from pathlib import Path
from ptqd_export.backends import OrtEngine, set_threads
from ptqd_export.errors import BackendUnavailable
set_threads(1)
set_threads(2)
OrtEngine(Path({str(affine)!r}))
set_threads(2)
try:
    set_threads(3)
except BackendUnavailable as error:
    print(error)
"""
    assert _python(code) == "ONNX Runtime already runs with 2 threads, not 3: set the threads before the first engine is opened"


def _conv(path: Path, quantized: bool) -> Path:
    """Conv and SiLU, and a second Conv; QDQ around both as ONNX Runtime's CPU provider takes it, or plain float."""
    rng = np.random.default_rng(0)
    scale, zero = numpy_helper.from_array(np.float32(0.05), "s"), numpy_helper.from_array(np.uint8(128), "z")
    tensors = [scale, zero]
    lines = []

    def qdq(x: str, y: str) -> None:
        lines.append(f"{y}_q = QuantizeLinear({x}, s, z) {y} = DequantizeLinear({y}_q, s, z)")

    for i, x in ((0, "sample"), (1, "silu")):
        codes = rng.integers(-127, 128, (8, 8, 3, 3)).astype(np.int8)
        ws = np.full(8, 0.002, np.float32)
        attributes = "<pads = [1, 1, 1, 1]>"
        if quantized:
            tensors += [
                numpy_helper.from_array(codes, f"w{i}_codes"),
                numpy_helper.from_array(ws, f"ws{i}"),
                numpy_helper.from_array(np.zeros(8, np.int8), f"wz{i}"),
            ]
            lines.append(f"w{i} = DequantizeLinear<axis = 0>(w{i}_codes, ws{i}, wz{i})")
            qdq(x, f"in{i}")
            lines.append(f"raw{i} = Conv{attributes}(in{i}, w{i})")
            qdq(f"raw{i}", f"out{i}")
        else:
            tensors.append(numpy_helper.from_array(codes * np.float32(0.002), f"w{i}"))
            lines.append(f"out{i} = Conv{attributes}({x}, w{i})")
        if i == 0:
            lines.append("gate = Sigmoid(out0) silu = Mul(out0, gate)")
    return _save(path, "g (float[B, 8, 6, 6] sample) => (float[B, 8, 6, 6] epsilon) { " + " ".join([*lines, "epsilon = Identity(out1) }"]), *tensors)


def test_structure_of_the_optimised_graph(tmp_path: Path, rng: np.random.Generator) -> None:
    feeds = {"sample": rng.standard_normal((2, 8, 6, 6)).astype(np.float32)}
    integer, floating = _conv(tmp_path / "int.onnx", True), _conv(tmp_path / "float.onnx", False)
    assert op_counts(integer)["Conv"] == 2 and op_counts(integer)["QuantizeLinear"] == 4

    saved = tmp_path / "int_optimised.onnx"
    with (
        OrtEngine(integer, optimised_path=saved) as fused,
        OrtEngine(integer, optimise=False, optimised_path=tmp_path / "plain.onnx") as plain,
        OrtEngine(floating, optimised_path=tmp_path / "float_optimised.onnx") as reference,
    ):
        assert float_convs(saved) == [] and op_counts(saved)["QLinearConv"] == 2
        a, b, c = (engine(feeds)["epsilon"] for engine in (fused, plain, reference))
        assert np.abs(a - b).max() <= 0.05 * 1.001  # at most one step of the output's scale apart
        assert 0 < np.abs(a - c).max() < 0.3
        assert len(float_convs(tmp_path / "plain.onnx")) == 2  # nothing was fused
    assert len(float_convs(tmp_path / "float_optimised.onnx")) == 2
    assert op_counts(tmp_path / "float_optimised.onnx")["QLinearConv"] == 0


def test_structure_looks_into_subgraphs(tmp_path: Path) -> None:
    path = _save(
        tmp_path / "if.onnx",
        """g (bool c, float[2] x) => (float[2] y) {
            y = If (c) <then_branch = a () => (float[2] p) { p = Neg(x) }, else_branch = b () => (float[2] q) { r = Neg(x) q = Neg(r) }>
        }""",
    )
    assert op_counts(path) == {"If": 1, "Neg": 3}


@pytest.mark.parametrize("content", [None, b"", b"not a graph"])
def test_structure_of_broken_files(tmp_path: Path, content: bytes | None) -> None:
    path = tmp_path / "broken.onnx"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(GraphError, match=r"broken\.onnx"):
        op_counts(path)


def test_the_optimised_graph_needs_a_folder(tmp_path: Path, affine: Path) -> None:
    with pytest.raises(PTQDError, match="give a folder"):
        OrtEngine(affine, optimised_path=tmp_path / "nowhere" / "x.onnx")


def test_same_input_same_bytes(tmp_path: Path, rng: np.random.Generator) -> None:
    feeds = {"sample": rng.standard_normal((4, 8, 6, 6)).astype(np.float32)}
    path = _conv(tmp_path / "int.onnx", True)
    with OrtEngine(path) as a, OrtEngine(path) as b:
        first = a(feeds)["epsilon"]
        assert all(np.array_equal(engine(feeds)["epsilon"], first) for engine in (a, b, a, b))
