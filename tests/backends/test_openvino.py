"""OpenVinoEngine: calls, what it refuses, what it computes in, and which layers run in 8 bits."""

from __future__ import annotations

import contextlib
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from helpers import Built, environment
from onnx import numpy_helper
from onnx_text import save_text

pytest.importorskip("openvino")

from ptqd_export.backends import OrtEngine, openvino
from ptqd_export.backends.openvino import HostDevice, OpenVinoEngine
from ptqd_export.core.backend import FLOAT_ERROR, Emission
from ptqd_export.core.engine import Device, DeviceEngine, Feeds
from ptqd_export.core.engine_build import NOT_FOUND
from ptqd_export.core.figures import relative_rms
from ptqd_export.core.precision import Precision
from ptqd_export.errors import BackendUnavailable, GraphError


def test_runs(affine: Path, feeds: Feeds) -> None:
    """At any batch, in turn; outputs are the caller's."""
    with OpenVinoEngine(affine) as engine:
        assert isinstance(engine, DeviceEngine) and engine.capture_note is None
        assert engine.inputs == ("sample", "timestep") and engine.outputs == ("epsilon", "doubled")
        assert engine.specs[0].shape == (None, 2) and engine.specs[1].dtype == "int64"
        expected = 2 * feeds["sample"] + feeds["timestep"][:, None]
        first = engine({**feeds, "step": np.array([3])})["epsilon"]
        for n in (1, 2, 3):
            own = {name: value[:n] for name, value in feeds.items()}
            np.testing.assert_array_equal(engine(own)["epsilon"], expected[:n])
        np.testing.assert_array_equal(first, expected)
        strided = np.asfortranarray(np.concatenate([feeds["sample"]] * 2, 1))[:, ::2]
        np.testing.assert_array_equal(engine({**feeds, "sample": strided})["doubled"], 2 * strided)
        assert len(engine._compiled) == openvino.KEPT
    engine.close()
    with pytest.raises(BackendUnavailable, match=r"affine\.onnx is closed"):
        engine(feeds)


def test_launch(affine: Path, feeds: Feeds) -> None:
    """On the caller's buffers; with new content each time."""
    with HostDevice() as device, OpenVinoEngine(affine) as engine:
        assert isinstance(device, Device)
        buffers = {s.name: device.empty((3, 2), "float32") for s in engine.output_specs}
        buffers |= {name: device.empty(value.shape, value.dtype.name) for name, value in feeds.items()}
        for turn in range(2):
            for name, value in feeds.items():
                device.write(buffers[name], value + value.dtype.type(turn))
            engine.launch(buffers)
            device.synchronize()
            np.testing.assert_array_equal(
                device.read(buffers["epsilon"]), 2 * buffers["sample"] + buffers["timestep"][:, None]
            )
        with pytest.raises(GraphError, match="needs the buffer 'doubled'"):
            engine.launch({name: value for name, value in buffers.items() if name != "doubled"})
        with pytest.raises(GraphError, match=r"holds float32 .* got float64"):
            device.write(buffers["sample"], np.zeros((3, 2)))
    with pytest.raises(BackendUnavailable, match="one device, the host: got index 1"):
        HostDevice(1)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"timestep": None}, "needs the input 'timestep': got sample"),
        ({"sample": np.zeros((3, 2))}, r"takes 'sample' as float32 \(any, 2\): got float64 \(3, 2\)"),
        ({"sample": np.zeros((3, 5), np.float32)}, r"got float32 \(3, 5\)"),
        ({"timestep": np.zeros(2, np.int64)}, "failed to run on OpenVINO"),
    ],
)
def test_wrong_feeds(
    affine: Path, feeds: Feeds, change: dict[str, Any], message: str, capfd: pytest.CaptureFixture[str]
) -> None:
    wrong = {name: value for name, value in {**feeds, **change}.items() if value is not None}
    with OpenVinoEngine(affine) as engine, pytest.raises(GraphError, match=message) as caught:
        engine(wrong)
    assert "\n" not in str(caught.value)
    assert capfd.readouterr().err == ""


@pytest.mark.parametrize("content", [None, b"", b"not a graph", "truncated", "weights"])
def test_broken_files(
    tmp_path: Path, affine: Path, content: bytes | str | None, capfd: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "broken.onnx"
    if content == "truncated":
        path.write_bytes(affine.read_bytes()[:-40])
    elif content == "weights":
        weights = numpy_helper.from_array(np.ones((2,), np.float32), "w")
        onnx.external_data_helper.set_external_data(weights, "weights.bin", 0, 8)
        weights.ClearField("raw_data")
        save_text(path, "g (float[2] x) => (float[2] y) { y = Mul(x, w) }", weights)
    elif isinstance(content, bytes):
        path.write_bytes(content)
    with pytest.raises(GraphError, match=r"broken\.onnx") as caught:
        OpenVinoEngine(path)
    assert "\n" not in str(caught.value)
    assert capfd.readouterr().err == ""


def test_unknown_operator(tmp_path: Path) -> None:
    path = save_text(tmp_path / "bar.onnx", "g (float[2] x) => (float[2] y) { y = Nowhere(x) }")
    with pytest.raises(BackendUnavailable, match="Nowhere"):
        OpenVinoEngine(path)


@pytest.fixture
def narrow(rgb: Built) -> tuple[Path, Path, Feeds, dict[str, str]]:
    """A w8a8 graph, its fp32 one, feeds at a timestep that bfloat16 does not hold, the 8-bit layers."""
    m = rgb.bundle.manifest
    graph = m.graph(Precision(8, 8), Emission.PORTABLE)
    full = m.graph(Precision(32, 32), Emission.PORTABLE)
    x = np.random.default_rng(0).standard_normal((2, *m.sampling.model.sample_shape))
    feeds = m.sampling.conditional.feeds(x, 0, m.sampling.model.conditions(None, 2))
    feeds = {**feeds, "timestep": np.full(2, 999)}
    return rgb.path / graph.file, rgb.path / full.file, feeds, dict(graph.quantized)


def test_layers_in_8_bits(
    narrow: tuple[Path, Path, Feeds, dict[str, str]], monkeypatch: pytest.MonkeyPatch
) -> None:
    """All that are meant to, in both kinds of floats; one that is not there is told, and those that are not
    meant to do not."""
    path, _, feeds, meant = narrow
    monkeypatch.setattr(openvino, "saturates", lambda: False)
    nodes = onnx.load(path, load_external_data=False).graph.node
    others = [n.name for n in nodes if n.op_type in ("Conv", "Gemm") and n.name not in meant]
    assert len(meant) > 5 and len(others) > 2
    for floats in ("float32", "bfloat16"):
        with OpenVinoEngine(path, floats=floats) as engine:  # type: ignore[arg-type]
            report = engine.report(meant, feeds)
            assert (report.meant, report.taken, dict(report.fell_back)) == (len(meant), len(meant), {})
            other = engine.report({**meant, "nowhere": "int8", "emulated": "fp8"}, feeds)
            assert dict(other.fell_back) == {"nowhere": NOT_FOUND}
            report = engine.report(dict.fromkeys(others, "int8"), feeds)
            assert report.taken == 0 and report.is_float
            assert set(report.fell_back.values()) == {openvino.TYPES[engine.floats]}
            assert len(report.complaints()) == len(others)


@pytest.mark.parametrize(("largest", "scales"), [(127, 8), (7, 8), (127, 0)])
@pytest.mark.parametrize("inputs", ["all codes", "a window"])
@pytest.mark.parametrize("kind", ["conv", "grouped", "linear"])
def test_where_products_saturate(
    tmp_path: Path, kind: str, inputs: str, largest: int, scales: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Layers are computed in float32, from rounded inputs; on every machine as exact arithmetic is."""
    rng = np.random.default_rng(0)
    layer = {
        "conv": "y = Conv <pads = [1, 1, 1, 1]> (v, w)",
        "grouped": "y = Conv <group = 2> (v, w)",
        "linear": "y = MatMul(v, w)",
    }[kind]
    weight = np.full(
        {"conv": (8, 8, 3, 3), "grouped": (8, 4, 1, 1), "linear": (8, 8)}[kind], largest, np.int8
    )
    weight[rng.random(weight.shape) < 0.1] *= -1
    size, axis = ("3, 8", 1) if kind == "linear" else ("8, 6, 6", 0)
    graph = save_text(
        tmp_path / "large.onnx",
        f"""g (float[N, {size}] sample) => (float[N, {size}] epsilon) {{
            all = QuantizeLinear(sample, scale, zero)
            codes = {"Clip(all, low, high)" if inputs == "a window" else "Identity(all)"}
            v = DequantizeLinear(codes, scale, zero)
            w = DequantizeLinear <axis = {axis}> (weight, scales)
            {layer}
            epsilon = Tanh(y)
        }}""",
        numpy_helper.from_array(weight, "weight"),
        numpy_helper.from_array(rng.uniform(1e-5, 1e-4, scales or ()).astype(np.float32), "scales"),
        numpy_helper.from_array(np.float32(0.01), "scale"),
        numpy_helper.from_array(np.int8(0 if inputs == "a window" else -128), "zero"),
        numpy_helper.from_array(np.int8(-1), "low"),
        numpy_helper.from_array(np.int8(14), "high"),
    )
    (named := onnx.load(graph)).graph.node[-2].name = "layer"
    onnx.save(named, graph)
    with OrtEngine(graph, optimise=False) as reference:
        low, high = (-0.1, 0.2) if inputs == "a window" else (2.0, 2.6)
        feeds = {"sample": rng.uniform(low, high, (2, *reference.specs[0].shape[1:])).astype(np.float32)}
        expected = reference(feeds)["epsilon"]
    for here in (openvino.saturates(), True):
        monkeypatch.setattr(openvino, "saturates", lambda here=here: here)
        with OpenVinoEngine(graph, floats="float32") as engine:
            assert relative_rms(engine(feeds)["epsilon"], expected) < 1e-5
    with OpenVinoEngine(graph, floats="float32") as engine:
        assert dict(engine.report({"layer": "int8"}, feeds).fell_back) == {"layer": "f32"}


def test_what_is_in_between(
    narrow: tuple[Path, Path, Feeds, dict[str, str]], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Quantized graphs: bfloat16, where the CPU has it. Float graphs: float32."""
    path, full, feeds, _ = narrow
    monkeypatch.setattr(openvino, "has_bfloat16", lambda: True)
    with OpenVinoEngine(full) as engine, OrtEngine(full, optimise=False) as reference:
        expected = reference(feeds)["epsilon"]
        assert engine.floats == "float32" and engine.float_error == 0
        assert relative_rms(engine(feeds)["epsilon"], expected) < FLOAT_ERROR["float32"]
    with OpenVinoEngine(path) as engine:
        assert engine.floats == "bfloat16" and engine.float_error == FLOAT_ERROR["bfloat16"]
    monkeypatch.setattr(openvino, "has_bfloat16", lambda: False)
    with OpenVinoEngine(path) as engine:
        assert engine.floats == "float32" and engine.float_error == 0


def test_timesteps_keep_their_digits(
    narrow: tuple[Path, Path, Feeds, dict[str, str]], monkeypatch: pytest.MonkeyPatch
) -> None:
    """999 is not 1000, which it would be in bfloat16."""
    if not openvino.has_bfloat16():
        pytest.skip("this CPU computes in float32 in between")
    path, _, feeds, _ = narrow
    with OpenVinoEngine(path, floats="float32") as engine:
        expected = engine(feeds)["epsilon"]
    with OpenVinoEngine(path) as engine:
        assert len(engine._model.outputs) == len(engine.outputs) + 1
        right = relative_rms(engine(feeds)["epsilon"], expected)
    monkeypatch.setattr(openvino, "made_of_timesteps", lambda model: [])
    with OpenVinoEngine(path) as engine:
        wrong = relative_rms(engine(feeds)["epsilon"], expected)
    assert right < FLOAT_ERROR["bfloat16"] and wrong > 1.5 * right, (right, wrong)


def test_nothing_is_sent() -> None:
    """OpenVINO's converter, which reports to its maker that it was imported, is not; others may import it."""
    code = (
        "import sys; from ptqd_export.backends import openvino; openvino.runtime();"
        "print([name for name in sys.modules if 'telemetry' in name or name == 'openvino.tools.ovc'])"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True,
        env=environment(PYTHONPATH=":".join(sys.path)),
    )  # fmt: skip
    assert done.stdout.strip() == "[]"


SCALED = """agraph (float[N, 4, {size}] sample, float[N, 4, {ones}] shift) => (float[N, 4, {size}] epsilon) {{
    g = GroupNormalization <num_groups = 2> (sample, weight, bias)
    scale = Add(shift, one)
    {last}
}}"""


@pytest.mark.parametrize(("size", "ones"), [("6, 6", "1, 1"), ("6", "1")])
@pytest.mark.parametrize(
    ("last", "parted"),
    [
        ("epsilon = Mul(g, scale)", 1),
        ("a = Sigmoid(shift) epsilon = Add(a, g)", 1),
        ("a = Mul(g, scale) epsilon = Add(a, shift)", 1),
        ("a = Floor(scale) epsilon = Mul(g, a)", 1),
        ("a = LeakyRelu(scale) epsilon = Mul(g, a)", 1),
        ("a = Identity(scale) epsilon = Mul(g, a)", 1),
        ("a = Shape(scale) b = Reshape(scale, a) epsilon = Mul(g, b)", 1),
        ("a = Identity(g) epsilon = Mul(a, scale)", 1),
        ("a = Shape(g) b = Reshape(g, a) epsilon = Mul(b, scale)", 1),
        ("a = Sub(one, shift) epsilon = PRelu(g, a)", 1),
        ("a = Relu(g) epsilon = Mul(a, scale)", 1),
        ("a = Sigmoid(g) epsilon = Mul(g, a)", 0),
        ("a = Softplus(g) b = Tanh(a) epsilon = Mul(g, b)", 0),
        ("epsilon = Mul(g, shift)", 0),
    ],
)
def test_normalizations_beside_other_values(
    tmp_path: Path, size: str, ones: str, last: str, parted: int
) -> None:
    """Networks that scale and shift what they normalize: OpenVINO dies of them where they are not parted, so
    they run in a process of their own. Activations are left as they are."""
    constants = [
        numpy_helper.from_array(np.asarray(value, np.float32), name)
        for name, value in (("weight", [1, 2, 3, 4]), ("bias", [0, 1, 0, 2]), ("one", 1.0))
    ]
    graph = save_text(tmp_path / "scaled.onnx", SCALED.format(size=size, ones=ones, last=last), *constants)
    code = """
import sys, numpy as np
from pathlib import Path
from ptqd_export.backends import OrtEngine, openvino_model
from ptqd_export.backends.openvino import OpenVinoEngine
parted, part = [], openvino_model.part_normalizations
sys.modules[OpenVinoEngine.__module__].part_normalizations = lambda model: parted.append(part(model))
rng = np.random.default_rng(0)
feeds = {}
with OpenVinoEngine(Path(sys.argv[1])) as engine, OrtEngine(Path(sys.argv[1])) as expected:
    for spec in engine.specs:
        feeds[spec.name] = rng.standard_normal([2, *spec.shape[1:]]).astype(np.float32)
    np.testing.assert_allclose(engine(feeds)["epsilon"], expected(feeds)["epsilon"], atol=1e-5)
print(*parted)
"""
    done = subprocess.run(
        [sys.executable, "-c", code, str(graph)], capture_output=True, text=True, check=False,
        env=environment(PYTHONPATH=":".join(sys.path)),
    )  # fmt: skip
    assert (done.returncode, done.stdout.strip()) == (0, str(parted)), done.stderr


JOINED = """agraph (float[N, {size}] sample, float[N, {size}] hint) => (float[N, {out}] epsilon) {{
    {first}
    codes = QuantizeLinear(joined, scale, zero)
    x = DequantizeLinear(codes, scale, zero)
    w = DequantizeLinear <axis = {axis}> (weight, scales)
    {layer}
}}"""
IMAGES = {
    "size": "4, 6, 6", "out": "8, 6, 6", "axis": 0,
    "layer": "layer = Conv <pads = [1, 1, 1, 1]> (x, w) epsilon = Tanh(layer)",
}  # fmt: skip
SEQUENCES = {"size": "3, 8", "out": "6, 8", "axis": 1, "layer": "layer = MatMul(x, w) epsilon = Tanh(layer)"}
JOIN = "cat = Concat <axis = 1> (sample, hint)"


@pytest.mark.parametrize(
    ("kind", "first"),
    [
        (IMAGES, f"{JOIN} joined = Identity(cat)"),
        (IMAGES, "a = Tanh(hint) cat = Concat <axis = 1> (a, sample) joined = Mul(cat, smooth)"),
        (IMAGES, f"{JOIN} joined = Mul(smooth, cat)"),
        (IMAGES, f"{JOIN} joined = Div(cat, half)"),
        (IMAGES, f"{JOIN} joined = Relu(cat)"),
        (IMAGES, f"{JOIN} flat = Reshape(cat, flatly) shape = Shape(cat) joined = Reshape(flat, shape)"),
        (SEQUENCES, f"{JOIN} joined = Identity(cat)"),
        (SEQUENCES, "m = Tanh(hint) cat = Concat <axis = 1> (m, sample) joined = Identity(cat)"),
        (SEQUENCES, f"{JOIN} joined = Relu(cat)"),
    ],
)
def test_concatenations_that_are_quantized(
    tmp_path: Path, kind: dict[str, Any], first: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Hints and texts beside images: OpenVINO alone computes something else, or fails to compile."""
    rng = np.random.default_rng(0)
    weight = rng.integers(-127, 128, (8, 8, 3, 3) if kind is IMAGES else (8, 8)).astype(np.int8)
    constants = [
        numpy_helper.from_array(value, name)
        for name, value in {
            "weight": weight,
            "scales": rng.uniform(0.001, 0.01, 8).astype(np.float32),
            "scale": np.float32(0.03),
            "zero": np.int8(-9),
            "smooth": rng.uniform(0.5, 1.5, (1, 8, 1, 1)).astype(np.float32),
            "half": np.float32(0.7),
            "flatly": np.array([0, -1]),
        }.items()
        if name not in ("smooth", "half", "flatly") or name in first
    ]
    graph = save_text(tmp_path / "joined.onnx", JOINED.format(**kind, first=first), *constants)
    (named := onnx.load(graph)).graph.node[-2].name = "layer"
    onnx.save(named, graph)
    with OrtEngine(graph, optimise=False) as reference:
        feeds = {s.name: rng.standard_normal([2, *s.shape[1:]]).astype(np.float32) for s in reference.specs}
        expected = reference(feeds)["epsilon"]

    def off() -> float:
        with OpenVinoEngine(graph, floats="float32") as engine:
            return relative_rms(engine(feeds)["epsilon"], expected)

    assert off() < 1e-5
    monkeypatch.setattr(openvino, "saturates", lambda: False)
    for floats in ("float32", "bfloat16"):
        with OpenVinoEngine(graph, floats=floats) as engine:  # type: ignore[arg-type]
            assert not engine.report({"layer": "int8"}, feeds).fell_back
    monkeypatch.setattr(openvino, "part_concatenations", lambda model: 0)
    with contextlib.suppress(GraphError):
        assert off() > 0.1
