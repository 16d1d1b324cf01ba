"""OrtEngine on the CPU, and the structure of what ONNX Runtime runs."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper
from onnx_text import save_text

from ptqd_export.backends import OrtDevice, OrtEngine
from ptqd_export.core.engine import DeviceEngine, Engine, Feeds
from ptqd_export.errors import BackendUnavailable, GraphError, PTQDError
from ptqd_export.export.structure import float_convs, op_counts


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
    path = save_text(
        tmp_path / "same.onnx",
        "g (float[B, 2] sample) => (float[B, 2] epsilon) { epsilon = Identity(sample) }",
    )
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
def test_wrong_feeds(
    affine: Path,
    feeds: Feeds,
    change: dict[str, np.ndarray | None],
    message: str,
    capfd: pytest.CaptureFixture[str],
) -> None:
    wrong = {name: value for name, value in {**feeds, **change}.items() if value is not None}
    with OrtEngine(affine) as engine, pytest.raises(GraphError, match=message) as caught:
        engine(wrong)
    assert "\n" not in str(caught.value)
    assert capfd.readouterr().err == ""


def test_memory_runs_out(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    path = save_text(
        tmp_path / "big.onnx",
        "g (int64[1] sample) => (float[N] epsilon) "
        "{ one = Constant<value = float {1.0}>() epsilon = Expand(one, sample) }",
    )
    with OrtEngine(path) as engine:
        assert engine({"sample": np.array([3])})["epsilon"].shape == (3,)
        with pytest.raises(BackendUnavailable, match="lower the batch size"):
            engine({"sample": np.array([10**15])})
    assert capfd.readouterr().err == ""


@pytest.mark.parametrize("content", [None, b"", b"not a graph", "truncated", "dangling"])
def test_broken_files(
    tmp_path: Path, affine: Path, content: bytes | str | None, capfd: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "broken.onnx"
    if content == "truncated":
        path.write_bytes(affine.read_bytes()[:-40])
    elif content == "dangling":
        save_text(path, "g (float[2] x) => (float[2] y) { y = Add(x, z) }")
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
    path = save_text(tmp_path / "m.onnx", "g (float[2] x) => (float[2] y) { y = Mul(x, w) }", weights)
    with pytest.raises(GraphError, match=r"weights\.bin"):
        OrtEngine(path)
    np.full(2, 3, np.float32).tofile(tmp_path / "weights.bin")
    with OrtEngine(path) as engine:
        assert engine({"x": np.ones(2, np.float32)})["y"].tolist() == [3, 3]


def test_unknown_operator(tmp_path: Path) -> None:
    node = helper.make_node("Bar", ["x"], ["y"], domain="nowhere")
    value = [helper.make_tensor_value_info(name, TensorProto.FLOAT, [2]) for name in "xy"]
    model = helper.make_model(
        helper.make_graph([node], "g", value[:1], value[1:]),
        opset_imports=[helper.make_opsetid("nowhere", 1), helper.make_opsetid("", 21)],
    )
    model.ir_version = 10
    onnx.save(model, tmp_path / "bar.onnx")
    with pytest.raises(BackendUnavailable, match="Bar"):
        OrtEngine(tmp_path / "bar.onnx")


def _buffers(device: OrtDevice, engine: OrtEngine, n: int) -> dict[str, Any]:
    """One per tensor of an engine, with n for the batch."""
    return {
        s.name: device.empty(tuple(n if d is None else d for d in s.shape), s.dtype)
        for s in (*engine.specs, *engine.output_specs)
    }


def test_launch(affine: Path, feeds: Feeds) -> None:
    """Sets of buffers in turn, with new content each time, give what calls give; nothing is bound twice."""
    with OrtDevice() as device, OrtEngine(affine, device=device) as engine:
        assert isinstance(engine, DeviceEngine) and not engine.captures
        sets = [_buffers(device, engine, n) for n in (3, 3, 1)]
        addresses = [buffers["epsilon"].data_ptr() for buffers in sets]
        for turn in range(3):
            for n, buffers in zip((3, 3, 1), sets, strict=True):
                fed = {name: (value + turn * n).astype(value.dtype)[:n] for name, value in feeds.items()}
                for name, value in fed.items():
                    device.write(buffers[name], value)
                engine.launch(dict(buffers))
                for name, value in engine(fed).items():
                    np.testing.assert_array_equal(device.read(buffers[name]), value)
        assert len(engine._bound) == 3
        assert [buffers["epsilon"].data_ptr() for buffers in sets] == addresses
    with pytest.raises(BackendUnavailable, match="closed"):
        engine.launch(sets[0])


def test_engines_pass_buffers_on(affine: Path, tmp_path: Path, feeds: Feeds) -> None:
    """An engine reads what another wrote, with no copy in between."""
    path = save_text(
        tmp_path / "half.onnx",
        "g (float[B, 2] epsilon) => (float16[B, 2] half) { half = Cast<to = 10>(epsilon) }",
    )
    with (
        OrtDevice() as device,
        OrtEngine(affine, device=device) as first,
        OrtEngine(path, device=device) as second,
    ):
        buffers = {**_buffers(device, second, 3), **_buffers(device, first, 3)}
        for name, value in feeds.items():
            device.write(buffers[name], value)
        first.launch(buffers)
        second.launch(buffers)
        half = device.read(buffers["half"])
        assert half.dtype == np.float16
        np.testing.assert_array_equal(half, first(feeds)["epsilon"])


def test_buffers_that_the_caller_dropped(affine: Path, feeds: Feeds) -> None:
    """A new set is not taken for one whose place in memory it got."""
    with OrtDevice() as device, OrtEngine(affine, device=device) as engine:
        for turn in range(20):
            buffers = _buffers(device, engine, 3)
            for name, value in feeds.items():
                device.write(buffers[name], value)
            device.write(buffers["epsilon"], np.full((3, 2), -1, np.float32))
            engine.launch(buffers)
            np.testing.assert_array_equal(
                device.read(buffers["epsilon"]), 2 * feeds["sample"] + feeds["timestep"][:, None]
            )
            assert len(engine._bound) == turn + 1


@pytest.mark.parametrize(
    ("name", "shape", "dtype", "message"),
    [
        ("sample", (3, 2), "float64", r"takes 'sample' as float32 \(any, 2\): got float64 \(3, 2\)"),
        ("sample", (3, 5), "float32", r"got float32 \(3, 5\)"),
        ("epsilon", (3, 2), "float16", r"takes 'epsilon' as float32 \(any, 2\): got float16 \(3, 2\)"),
        ("epsilon", (6,), "float32", r"got float32 \(6,\)"),
        ("epsilon", (4, 2), "float32", "failed to run"),
    ],
)
def test_wrong_buffers(
    affine: Path,
    name: str,
    shape: tuple[int, ...],
    dtype: str,
    message: str,
    capfd: pytest.CaptureFixture[str],
) -> None:
    with OrtDevice() as device, OrtEngine(affine, device=device) as engine:
        buffers = _buffers(device, engine, 3)
        with pytest.raises(GraphError, match=message) as caught:
            engine.launch({**buffers, name: device.empty(shape, dtype)})
        assert "\n" not in str(caught.value)
        with pytest.raises(GraphError, match=f"needs the buffer '{name}'"):
            engine.launch({key: value for key, value in buffers.items() if key != name})
        engine.launch(buffers)
    assert capfd.readouterr().err == ""


@pytest.mark.parametrize("other", ["sample", "doubled"])
def test_a_buffer_for_two_tensors(affine: Path, other: str) -> None:
    with OrtDevice() as device, OrtEngine(affine, device=device) as engine:
        buffers = _buffers(device, engine, 3)
        with pytest.raises(GraphError, match="into a buffer that it reads or writes otherwise"):
            engine.launch({**buffers, "epsilon": buffers[other]})


def _conv(path: Path, quantized: bool) -> Path:
    """Two convs with SiLU between them; with QDQ around both as ONNX Runtime's CPU takes it, or in float."""
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
    return save_text(
        path,
        "g (float[B, 8, 6, 6] sample) => (float[B, 8, 6, 6] epsilon) { "
        + " ".join([*lines, "epsilon = Identity(out1) }"]),
        *tensors,
    )


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


def test_weights_of_a_saved_graph_lie_beside_it(tmp_path: Path, rng: np.random.Generator) -> None:
    """Protobuf holds no more than 2 GB."""
    weight = rng.standard_normal((64, 64)).astype(np.float32)
    path = save_text(
        tmp_path / "x.onnx",
        "g (float[1, 64] x) => (float[1, 64] y) <float[64, 64] w> { y = MatMul(x, w) }",
        onnx.numpy_helper.from_array(weight, "w"),
    )
    x, saved = rng.standard_normal((1, 64)).astype(np.float32), tmp_path / "saved.onnx"
    with OrtEngine(path, optimised_path=saved) as engine:
        np.testing.assert_allclose(engine({"x": x})["y"], x @ weight, rtol=1e-4, atol=1e-4)
    assert saved.stat().st_size < 4096 < weight.nbytes <= (tmp_path / "saved.onnx.data").stat().st_size


def test_structure_looks_into_subgraphs(tmp_path: Path) -> None:
    path = save_text(
        tmp_path / "if.onnx",
        """g (bool c, float[2] x) => (float[2] y) {
            y = If (c) <then_branch = a () => (float[2] p) { p = Neg(x) }, else_branch = b () => (float[2] q)
            { r = Neg(x) q = Neg(r) }>
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


def test_an_error_that_quotes_a_whole_graph_is_cut(tmp_path: Path) -> None:
    node = helper.make_node("Add", ["x"] * 4000, ["y"])
    value = [helper.make_tensor_value_info(name, 1, [1]) for name in "xy"]
    model = helper.make_model(helper.make_graph([node], "g", value[:1], value[1:]), ir_version=10)
    onnx.save(model, tmp_path / "many.onnx")
    with pytest.raises(GraphError, match=r"cannot be loaded by ONNX Runtime .*\.\.\.$") as caught:
        _ = OrtEngine(tmp_path / "many.onnx").session
    assert len(str(caught.value)) < 500 + len(str(tmp_path))
