"""TrtEngine over a fake: calls, launches, what it refuses, and files that do not fit."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from fake_cuda import FakeCuda
from fake_tensorrt import FakeTensorRT
from helpers import has_gpu

from ptqd_export.backends.cuda import CudaDevice
from ptqd_export.backends.trt import TrtEngine
from ptqd_export.core.engine import DeviceEngine, Engine
from ptqd_export.errors import BackendUnavailable, BundleError, GraphError, PTQDError

from .shared import Build, conv_graph, expected, one_line, toy_buffers, toy_feeds


@pytest.fixture(params=[True, False], ids=["rtx", "full"])
def either(cuda: FakeCuda, request: pytest.FixtureRequest) -> Iterator[FakeTensorRT]:
    """Either library."""
    fake = FakeTensorRT(cuda, rtx=request.param)
    yield fake
    assert fake.faults == []


def test_call(either: FakeTensorRT, device: CudaDevice, file: Path) -> None:
    with TrtEngine(either, file, device) as engine:
        assert isinstance(engine, Engine) and isinstance(engine, DeviceEngine)
        assert engine.inputs == ("timestep", "sample") and engine.outputs == ("epsilon",)
        assert engine.rows == {"timestep": (1, 8), "sample": (1, 8)}
        assert engine.specs[1].shape == (None, 4) and engine.specs[1].dtype == "float32"
        assert engine.memory == (4321, 1000)
        outs = []
        for n, start in ((2, 0), (8, 5), (2, 7), (2, 9), (2, 11), (8, 3)):
            feeds = toy_feeds(n, start)
            out = engine({**feeds, "ignored": np.zeros(1)})["epsilon"]
            np.testing.assert_array_equal(out, expected(feeds))
            outs.append((out, expected(feeds)))
        for out, wanted in outs:  # fresh ones
            np.testing.assert_array_equal(out, wanted)
        if either.rtx:
            assert either.config is not None
            assert either.config.dynamic_shapes_kernel_specialization_strategy == "eager"
    engine.close()
    with pytest.raises(BackendUnavailable, match=r"e\.engine is closed"):
        engine(toy_feeds(1))
    with pytest.raises(BackendUnavailable, match=r"e\.engine is closed"):
        engine.unload()


def test_calls_make_no_graphs_and_no_contexts(
    fake: FakeTensorRT, cuda: FakeCuda, device: CudaDevice, file: Path
) -> None:
    """Probes and checks: sampling would never use them."""
    with TrtEngine(fake, file, device) as engine:
        for _ in range(5):
            engine(toy_feeds(2))
        assert (cuda.graphs, cuda.launches, len(fake.contexts)) == (0, 0, 1)
        assert engine.capture_note == "no CUDA graph: no buffers were launched on twice"
        buffers = toy_buffers(device, toy_feeds(2))
        for _ in range(3):
            engine.launch(buffers)
        assert (cuda.graphs, len(fake.contexts)) == (1, 2)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"timestep": None}, "needs the input 'timestep': got sample"),
        ({"sample": np.zeros((3, 4))}, r"takes 'sample' as float32 \(any, 4\): got float64 \(3, 4\)"),
        ({"sample": np.zeros((3, 5), np.float32)}, r"got float32 \(3, 5\)"),
        ({"sample": np.zeros(4, np.float32)}, r"got float32 \(4,\)"),
        (
            {"sample": np.zeros((9, 4), np.float32)},
            r"built for 1 to 8 rows: 'sample' has 9: .*tensorrt\.batch_sizes",
        ),
        ({"sample": np.zeros((0, 4), np.float32)}, r"'sample' has 0"),
        ({"timestep": np.zeros(2, np.int64)}, "failed to run: the fake broke"),
    ],
)
def test_wrong_feeds(
    fake: FakeTensorRT, device: CudaDevice, file: Path, change: dict[str, np.ndarray | None], message: str
) -> None:
    feeds = {name: value for name, value in {**toy_feeds(3), **change}.items() if value is not None}
    with TrtEngine(fake, file, device) as engine, pytest.raises(GraphError, match=message) as caught:
        engine(feeds)
    one_line(caught)


def test_wrong_buffers(fake: FakeTensorRT, device: CudaDevice, file: Path) -> None:
    with TrtEngine(fake, file, device) as engine:
        buffers = toy_buffers(device, toy_feeds(2))
        with pytest.raises(GraphError, match="needs a buffer 'epsilon': got sample, timestep"):
            engine.launch({name: buffers[name] for name in ("sample", "timestep")})
        with pytest.raises(GraphError, match=r"takes 'timestep' as int64 \(any\): got float32 \(2,\)"):
            engine.launch({**buffers, "timestep": device.empty((2,), "float32")})
        shapes = r"makes 'epsilon' of shape \(2, 4\) from these inputs: got a buffer of \(3, 4\)"
        with pytest.raises(GraphError, match=shapes):
            engine.launch({**buffers, "epsilon": device.empty((3, 4), "float32")})


@pytest.mark.parametrize(
    ("method", "message"),
    [
        ("set_input_shape", r"does not take 'timestep' of shape \(2,\)"),
        ("set_tensor_address", r"does not take 'timestep' at address 0x[0-9a-f]+: it does not say why"),
    ],
)
def test_what_the_library_refuses(
    fake: FakeTensorRT, device: CudaDevice, file: Path, method: str, message: str
) -> None:
    """Each return value that says so is looked at."""
    with TrtEngine(fake, file, device) as engine:
        fake.refuses.add(method)
        buffers = toy_buffers(device, toy_feeds(2))
        for use in (lambda: engine.launch(buffers), lambda: engine(toy_feeds(2))):
            with pytest.raises(GraphError, match=message) as caught:
                use()
            one_line(caught)


def test_a_tensor_on_the_host(fake: FakeTensorRT, device: CudaDevice, file: Path) -> None:
    fake.on_host = "timestep"
    with pytest.raises(GraphError, match="takes 'timestep' in the host's memory, as a shape") as caught:
        TrtEngine(fake, file, device)
    one_line(caught)


def test_an_engine_that_needs_no_scratch(cuda: FakeCuda, device: CudaDevice, file: Path) -> None:
    """Its contexts want memory all the same: the fake's run none without."""
    with TrtEngine(FakeTensorRT(cuda, scratch=0), file, device) as engine:
        np.testing.assert_array_equal(engine(toy_feeds(2))["epsilon"], expected(toy_feeds(2)))
        assert device.scratch[0] and device.scratch[1] > 0


def test_launch_does_not_wait(fake: FakeTensorRT, cuda: FakeCuda, device: CudaDevice, file: Path) -> None:
    with TrtEngine(fake, file, device) as engine:
        buffers = toy_buffers(device, toy_feeds(2))
        device.synchronize()
        for _ in range(4):
            engine.launch(buffers)
        assert cuda.queued == 4


def test_engines_share_the_scratch(cuda: FakeCuda, device: CudaDevice, file: Path) -> None:
    """A larger engine moves it, and the smaller one's graphs are made anew."""
    small, large = FakeTensorRT(cuda, scratch=500), FakeTensorRT(cuda, scratch=5000)
    with TrtEngine(small, file, device) as first:
        buffers = toy_buffers(device, toy_feeds(2))
        for _ in range(3):
            first.launch(buffers)
        assert device.scratch[1] == 500 and cuda.graphs == 1
        with TrtEngine(large, file, device) as second:
            assert device.scratch[1] == 5000
            for i in range(4):
                for engine in (first, second):
                    device.write(buffers["sample"], toy_feeds(2, i)["sample"])
                    engine.launch(buffers)
                    np.testing.assert_array_equal(device.read(buffers["epsilon"]), expected(toy_feeds(2, i)))
            assert cuda.graphs == 2
            assert small.enqueued == 5, (
                "a run, and a run and a capture; after the move again a run and a capture"
            )


def test_no_memory_for_a_larger_scratch(cuda: FakeCuda, device: CudaDevice, file: Path) -> None:
    """The engine that wants it does not open; those that are open go on."""
    large = FakeTensorRT(cuda, scratch=1 << 20)
    with TrtEngine(FakeTensorRT(cuda, scratch=500), file, device) as engine:
        buffers = toy_buffers(device, toy_feeds(2))
        for i in range(4):
            if i == 2:
                cuda.limit = 1 << 16
                with pytest.raises(BackendUnavailable, match="memory ran out on Fake GPU") as caught:
                    TrtEngine(large, file, device)
                assert len(large.contexts) == 0, f"{caught} holds them"
            device.write(buffers["sample"], toy_feeds(2, i)["sample"])
            engine.launch(buffers)
            np.testing.assert_array_equal(device.read(buffers["epsilon"]), expected(toy_feeds(2, i)))
        assert cuda.launches == 2 and device.scratch[1] == 500


def test_a_scratch_that_is_too_small(cuda: FakeCuda, file: Path) -> None:
    device = CudaDevice(cudart=cuda)
    engine = TrtEngine(FakeTensorRT(cuda, scratch=500), file, device)
    buffers = toy_buffers(device, toy_feeds(2))
    device.close()
    wanted = r"e\.engine needs 500 bytes of scratch memory, the device holds 0: open the device"
    with pytest.raises(BackendUnavailable, match=wanted) as caught:
        engine.launch(buffers)
    one_line(caught)


@pytest.mark.parametrize(
    ("content", "error", "message"),
    [
        (
            b"old",
            BundleError,
            "was built by another version of TensorRT: it was built by X for Y, this machine has "
            "fake_tensorrt 1.0 on Fake GPU",
        ),
        (
            b"foreign",
            BundleError,
            "was not built for this GPU: it was built by X for Y, this machine has fake_tensorrt 1.0 on Fake "
            "GPU (8.9): run with",
        ),
        (b"noise", BundleError, "is damaged: it was built by X for Y"),
        (b"driver", BackendUnavailable, "CUDA driver version is insufficient for CUDA runtime version"),
        (None, BundleError, "cannot be read: No such file or directory: run with --rebuild"),
    ],
)
@pytest.mark.parametrize("resident", [True, False])
def test_files_that_do_not_fit(
    either: FakeTensorRT,
    device: CudaDevice,
    tmp_path: Path,
    content: bytes | None,
    error: type[PTQDError],
    message: str,
    resident: bool,
) -> None:
    path = tmp_path / "e.engine"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(error) as caught:
        TrtEngine(either, path, device, built="X for Y", resident=resident)
    text = one_line(caught)
    assert message in text and "e.engine" in text
    assert (error is BackendUnavailable) or text.endswith("run with --rebuild")


def test_an_empty_file(fake: FakeTensorRT, device: CudaDevice, tmp_path: Path) -> None:
    (tmp_path / "e.engine").write_bytes(b"")
    for resident in (True, False):
        with pytest.raises(BundleError, match="is damaged"):
            TrtEngine(fake, tmp_path / "e.engine", device, resident=resident)


@pytest.mark.parametrize("content", [None, b"cache of before", b"foreign"])
def test_runtime_cache(
    fake: FakeTensorRT, device: CudaDevice, file: Path, tmp_path: Path, content: bytes | None
) -> None:
    path = tmp_path / "user" / "kernels"
    if content is not None:
        path.parent.mkdir()
        path.write_bytes(content)
    with TrtEngine(fake, file, device, cache=path) as engine:
        engine(toy_feeds(1))
    assert path.read_bytes() == (b"cache of before+" if content == b"cache of before" else b"cache+")
    assert [p.name for p in path.parent.iterdir()] == ["kernels"]


def test_a_cache_that_cannot_be_written_is_no_failure(
    fake: FakeTensorRT, device: CudaDevice, file: Path
) -> None:
    with TrtEngine(fake, file, device, cache=file / "below" / "a file") as engine:
        engine(toy_feeds(1))


def test_a_cache_that_the_library_does_not_take(
    fake: FakeTensorRT, device: CudaDevice, file: Path, tmp_path: Path
) -> None:
    """The engine runs without one, and none is saved."""
    fake.refuses.add("set_runtime_cache")
    with TrtEngine(fake, file, device, cache=tmp_path / "kernels") as engine:
        np.testing.assert_array_equal(engine(toy_feeds(1))["epsilon"], expected(toy_feeds(1)))
    assert not (tmp_path / "kernels").exists()


def test_a_real_engine_with_no_gpu(build: Build, tmp_path: Path, rtx: Any, cuda: FakeCuda) -> None:
    """The real runtime library, where there is no GPU: one line."""
    build(conv_graph(tmp_path / "g.onnx"))
    if has_gpu():
        pytest.skip("there is a GPU")
    for resident in (True, False):
        wanted = r"e\.engine does not load|does not work here"
        with CudaDevice(cudart=cuda) as device, pytest.raises(BackendUnavailable, match=wanted) as caught:
            TrtEngine(rtx, tmp_path / "e.engine", device, resident=resident)
        one_line(caught)
        assert rtx.Runtime is not None
