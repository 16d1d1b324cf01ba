"""OrtEngine and OrtDevice on a CUDA GPU; what they say where there is none."""

from __future__ import annotations

import re
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from onnx import numpy_helper
from onnx_text import save_text

from ptqd_export.backends import OrtDevice, OrtEngine, available, open_engine
from ptqd_export.backends.ort_device import PROVIDERS
from ptqd_export.errors import BackendUnavailable, GraphError

REASON = available()["ort-cuda"]
on_gpu = pytest.mark.skipif(REASON != "ok", reason=REASON)


def _network(path: Path, half: bool = False, quantized: bool = False) -> Path:
    """epsilon = conv(conv(sample) + gain[step]) over (B, 8, 12, 12), in float32 or float16 in between;
    inputs of the convs quantized or not.
    """
    rng = np.random.default_rng(0)
    kind, code = (np.float16, 10) if half else (np.float32, 1)
    tensors = [
        numpy_helper.from_array(rng.standard_normal((8, 8, 3, 3)).astype(kind) / kind(8), f"w{i}")
        for i in (0, 1)
    ]
    tensors += [numpy_helper.from_array(kind(0.03), "s"), numpy_helper.from_array(np.int8(0), "z")]
    tensors += [numpy_helper.from_array(rng.standard_normal((4, 8, 1, 1)).astype(kind), "gain")]

    def codes(x: str) -> str:
        return (
            f"{x}_q = QuantizeLinear({x}, s, z) {x}_in = DequantizeLinear({x}_q, s, z)"
            if quantized
            else f"{x}_in = Identity({x})"
        )

    return save_text(
        path,
        f"""g (float[B, 8, 12, 12] sample, int64[B] timestep, int64[1] step)
            => (float[B, 8, 12, 12] epsilon) {{
            x = Cast<to = {code}>(sample)
            {codes("x")}
            a = Conv<pads = [1, 1, 1, 1]>(x_in, w0)
            row = Gather<axis = 0>(gain, step)
            b = Add(a, row)
            {codes("b")}
            c = Conv<pads = [1, 1, 1, 1]>(b_in, w1)
            epsilon = Cast<to = 1>(c)
        }}""",
        *tensors,
    )


def _feeds(n: int, seed: int = 0) -> dict[str, Any]:
    rng = np.random.default_rng(seed)
    return {
        "sample": rng.standard_normal((n, 8, 12, 12)).astype(np.float32),
        "timestep": np.arange(n),
        "step": np.array([seed % 4]),
    }


def _buffers(device: OrtDevice, engine: OrtEngine, n: int) -> dict[str, Any]:
    return {
        s.name: device.empty(tuple(n if d is None else d for d in s.shape), s.dtype)
        for s in (*engine.specs, *engine.output_specs)
    }


def test_a_wheel_without_cuda(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    import onnxruntime

    if PROVIDERS["cuda"] in onnxruntime.get_available_providers():
        pytest.skip("onnxruntime-gpu is installed")
    message = (
        "ort-cuda needs CUDAExecutionProvider, which the installed onnxruntime .* was built without: pip "
        "uninstall onnxruntime, then, in a checkout of ptqd-export: pip install"
    )
    with pytest.raises(BackendUnavailable, match=message + r" '\.\[gpu\]'"):
        OrtDevice("cuda")
    with pytest.raises(BackendUnavailable, match=message):
        open_engine("ort-cuda", _network(tmp_path / "net.onnx"))
    assert capfd.readouterr() == ("", "")


class Ort:
    """The parts of onnxruntime-gpu that look for a GPU, as they behave where something is missing."""

    __version__ = "1.31.1"

    def __init__(self, printed: str, raised: str) -> None:
        self.printed, self.raised, self.severity = printed, raised, 2
        self.OrtValue = self

    def get_available_providers(self) -> list[str]:
        return ["TensorrtExecutionProvider", *PROVIDERS.values()]

    def set_default_logger_severity(self, severity: int) -> None:
        self.severity = severity

    def preload_dlls(self) -> None:
        print(self.printed, end="")

    def ortvalue_from_shape_and_type(self, *arguments: object) -> None:
        if self.severity < 4:
            print("[E:onnxruntime:Default] Failed to load library", file=sys.stderr)
        raise RuntimeError(self.raised)


NO_PROVIDER = "provider_bridge_ort.cc:2465 CUDA Provider not available,\ncan't get interface for it"
OLD_DRIVER = (
    "cuda_call.cc:154 std::conditional_t<THRW, void, Status> CudaCall(...) CUDA failure 35: CUDA driver "
    "version is insufficient for CUDA runtime version ; GPU=-1 ; hostname=host ; "
    "file=cuda_provider_factory.cc ; line=160 ; expr=::cudaGetDeviceCount(&num_devices);\n"
)


@pytest.mark.parametrize(
    ("printed", "raised", "reason"),
    [
        ("", NO_PROVIDER, "its CUDA provider does not load: the NVIDIA driver or a library is missing"),
        (
            "Failed to load libcublas.so.13: not there\nFailed to load libcurand.so.10: not there\n",
            NO_PROVIDER,
            "Failed to load libcublas.so.13: not there",
        ),
        ("", OLD_DRIVER, "CUDA failure 35: CUDA driver version is insufficient for CUDA runtime version"),
    ],
)
def test_no_gpu(
    printed: str, raised: str, reason: str, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setitem(sys.modules, "onnxruntime", Ort(printed, raised))
    with pytest.raises(
        BackendUnavailable,
        match=re.escape(
            f"finds no CUDA GPU 0 that works ({reason}): it needs an NVIDIA GPU, its driver, and"
        ),
    ):
        OrtDevice("cuda")
    assert capfd.readouterr() == ("", "")


def test_a_session_that_falls_back(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A device that was there, and a provider that is not: onnxruntime only warns, and runs on the CPU."""
    import onnxruntime

    device = OrtDevice("cpu")
    device.kind = "cuda"
    session = onnxruntime.InferenceSession

    def fall_back(path: str, options: Any, providers: list[Any], enable_fallback: int) -> Any:
        assert providers[0][0] == PROVIDERS["cuda"] and not enable_fallback
        return session(path, options, providers=[PROVIDERS["cpu"]])

    monkeypatch.setattr(onnxruntime, "InferenceSession", fall_back)
    with pytest.raises(
        BackendUnavailable,
        match=r"net\.onnx fell back to CPUExecutionProvider: CUDAExecutionProvider did not start",
    ):
        OrtEngine(_network(tmp_path / "net.onnx"), device=device)


@pytest.mark.parametrize(
    ("raised", "message"),
    [
        (
            OLD_DRIVER,
            r"the GPU failed in .*net\.onnx \(CUDA failure 35: .* version\): see whether nvidia-smi answers",
        ),
        (
            "CUDA failure 2: out of memory ; GPU=0 ; hostname=host",
            r"memory ran out in .*net\.onnx on loading: lower the batch size",
        ),
    ],
)
def test_a_gpu_that_fails(raised: str, message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import onnxruntime

    device = OrtDevice("cpu")
    device.kind = "cuda"

    def fail(*arguments: object, **options: object) -> None:
        raise RuntimeError(raised)

    monkeypatch.setattr(onnxruntime, "InferenceSession", fail)
    with pytest.raises(BackendUnavailable, match=message):
        OrtEngine(_network(tmp_path / "net.onnx"), device=device)


@pytest.mark.parametrize(
    ("captures", "sets", "note"),
    [
        (False, 2, "no CUDA graph: ONNX Runtime leaves a part of the graph to the CPU"),
        (True, 0, "no CUDA graph: nothing was launched"),
        (True, 1, "1 CUDA graph captured"),
        (True, 3, "3 CUDA graphs captured"),
    ],
)
def test_capture_note(tmp_path: Path, captures: bool, sets: int, note: str) -> None:
    with OrtEngine(_network(tmp_path / "net.onnx")) as engine:
        assert engine.capture_note is None
        engine.kind, engine.captures = "cuda", captures
        engine._bound.update(dict.fromkeys(((i,) for i in range(sets)), None))  # type: ignore[arg-type]
        assert engine.capture_note == note


@pytest.mark.gpu
@on_gpu
@pytest.mark.parametrize(("half", "tolerance"), [(False, 1e-5), (True, 4e-3)])
def test_equals_the_cpu(tmp_path: Path, half: bool, tolerance: float) -> None:
    """To the rounding of sums of 72 products, relative to the largest output: 72 half steps of float32
    (2**-24), eight of float16 (2**-11).
    """
    path = _network(tmp_path / "net.onnx", half)
    with (
        OrtDevice("cuda") as device,
        OrtEngine(path, device=device) as gpu,
        OrtEngine(path, optimise=False) as cpu,
    ):
        for n in (1, 3):
            a, b = gpu(_feeds(n))["epsilon"], cpu(_feeds(n))["epsilon"]
            assert np.abs(a - b).max() <= tolerance * np.abs(b).max()
            assert np.abs(a - 1.01 * b).max() > tolerance * np.abs(b).max()


@pytest.mark.gpu
@on_gpu
@pytest.mark.parametrize("quantized", [False, True])
def test_launch(tmp_path: Path, quantized: bool) -> None:
    """Sets of buffers in turn: each captures its graph once, and every replay takes the content that is
    there now.
    """
    with (
        OrtDevice("cuda") as device,
        OrtEngine(_network(tmp_path / "net.onnx", quantized, quantized), device=device) as engine,
    ):
        assert engine.captures
        sets = [(n, _buffers(device, engine, n)) for n in (2, 2, 1)]
        for turn in range(3):
            for k, (n, buffers) in enumerate(sets):
                feeds = _feeds(n, 3 * turn + k)
                for name, value in feeds.items():
                    device.write(buffers[name], value)
                device.write(buffers["epsilon"], np.full((n, 8, 12, 12), np.nan, np.float32))
                engine.launch(buffers)
                got, called = device.read(buffers["epsilon"]), engine(feeds)["epsilon"]
                np.testing.assert_allclose(
                    got, called, rtol=0, atol=0 if not quantized else 1e-6 * np.abs(called).max()
                )
        assert len(engine._bound) == len(sets)


@pytest.mark.gpu
@on_gpu
def test_engines_pass_buffers_on(tmp_path: Path) -> None:
    """One engine's output buffer is the next one's input; the whole loop stays on the device."""
    path = _network(tmp_path / "net.onnx")
    with (
        OrtDevice("cuda") as device,
        OrtEngine(path, device=device) as first,
        OrtEngine(path, device=device) as second,
    ):
        a = _buffers(device, first, 2)
        b = {**a, "sample": a["epsilon"], "epsilon": device.empty((2, 8, 12, 12), "float32")}
        feeds = _feeds(2)
        for name, value in feeds.items():
            device.write(a[name], value)
        for _ in range(3):
            first.launch(a)
            second.launch(b)
        expected = second({**feeds, "sample": first(feeds)["epsilon"]})["epsilon"]
        np.testing.assert_array_equal(device.read(b["epsilon"]), expected)


@pytest.mark.gpu
@on_gpu
def test_buffers_of_the_host(tmp_path: Path) -> None:
    path = _network(tmp_path / "net.onnx")
    with OrtDevice("cuda") as device, OrtDevice("cpu") as host, OrtEngine(path, device=device) as engine:
        buffers = {**_buffers(device, engine, 2), "sample": host.empty((2, 8, 12, 12), "float32")}
        with pytest.raises(GraphError, match="runs on cuda: the buffer of 'sample' is on cpu"):
            engine.launch(buffers)


@pytest.mark.gpu
@on_gpu
def test_a_graph_that_cannot_be_captured(tmp_path: Path) -> None:
    """Control flow stays with the CPU: no CUDA graph, the same results."""
    path = save_text(
        tmp_path / "if.onnx",
        """g (bool c, float[2] x) => (float[2] y) {
            y = If (c) <then_branch = a () => (float[2] p) { p = Neg(x) }, else_branch = b () => (float[2] q)
            { r = Neg(x) q = Neg(r) }>
        }""",
    )
    with OrtDevice("cuda") as device, OrtEngine(path, device=device) as engine:
        assert not engine.captures
        buffers = _buffers(device, engine, 1)
        for c in (True, False):
            feeds = {"c": np.array(c), "x": np.ones(2, np.float32)}
            for name, value in feeds.items():
                device.write(buffers[name], value)
            engine.launch(buffers)
            assert (
                device.read(buffers["y"]).tolist()
                == engine(feeds)["y"].tolist()
                == ([-1, -1] if c else [1, 1])
            )


@pytest.mark.gpu
@on_gpu
def test_float32_is_float32(tmp_path: Path) -> None:
    """TF32 would round 1 + 2**-13 to 1 in every product."""
    ones = np.ones((8, 8, 3, 3), np.float32)
    text = (
        "g (float[B, 8, 12, 12] sample) => (float[B, 8, 12, 12] epsilon) "
        "{ epsilon = Conv<pads = [1, 1, 1, 1]>(sample, w) }"
    )
    path = save_text(tmp_path / "conv.onnx", text, numpy_helper.from_array(ones, "w"))
    with OrtDevice("cuda") as device, OrtEngine(path, device=device) as engine:
        got = engine({"sample": np.full((1, 8, 12, 12), 1 + 2**-13, np.float32)})["epsilon"]
    assert np.abs(got[0, :, 5, 5] - 72 * (1 + 2**-13)).max() < 72 * 2**-15
