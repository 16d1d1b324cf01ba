"""Lifetimes over a fake: contexts and what they were made from, weights, threads, random orders of use."""

from __future__ import annotations

import threading
from pathlib import Path

import numpy as np
import pytest
from fake_cuda import FakeCuda
from fake_tensorrt import FakeTensorRT

from ptqd_export.backends.cuda import Buffer, CudaDevice
from ptqd_export.backends.trt import TrtEngine
from ptqd_export.errors import BackendUnavailable, GraphError

from .shared import expected, toy_buffers, toy_feeds


def test_a_context_that_cannot_be_made(fake: FakeTensorRT, device: CudaDevice, file: Path) -> None:
    fake.most_contexts = 0
    wanted = r"e\.engine cannot be made ready on Fake GPU \(8\.9\) \(no memory for a context\)"
    with pytest.raises(BackendUnavailable, match=wanted):
        TrtEngine(fake, file, device)
    assert fake.config is None, "nothing is kept of an engine that does not open"


def test_one_runtime_and_logger_for_all_engines(
    fake: FakeTensorRT, device: CudaDevice, file: Path, tmp_path: Path
) -> None:
    (tmp_path / "old").write_bytes(b"old")
    for _ in range(3):
        with TrtEngine(fake, file, device) as one, TrtEngine(fake, file, device) as two:
            one(toy_feeds(1))
            two(toy_feeds(1))
    assert fake.runtimes == 1


def test_an_error_s_frames_keep_no_context(
    fake: FakeTensorRT, cuda: FakeCuda, device: CudaDevice, file: Path
) -> None:
    """Whoever keeps an exception keeps its frames, whose variables hold contexts, plain ones and new ones."""
    kept = []
    engine = TrtEngine(fake, file, device)
    buffers = toy_buffers(device, toy_feeds(2))
    for refused in ("set_input_shape", "set_tensor_address"):
        for _ in range(3):
            with pytest.raises(GraphError) as caught:
                fake.refuses = {refused}
                engine.launch(buffers)
            kept.append(caught)
            fake.refuses = set()
    with pytest.raises(GraphError) as caught:
        engine({**toy_feeds(3), "timestep": np.arange(2)})
    kept.append(caught)
    assert len(fake.contexts) == 1, "a capture that failed to start gives its context back"
    engine.close()
    assert len(fake.contexts) == 0 and fake.config is None and len(kept) == 7


def test_close_after_a_failure_of_the_gpu(cuda: FakeCuda, fake: FakeTensorRT, file: Path) -> None:
    """Nothing can be freed but the library's own objects, contexts before their engine."""
    device = CudaDevice(cudart=cuda)
    engine = TrtEngine(fake, file, device)
    buffers = toy_buffers(device, toy_feeds(1))
    for _ in range(3):
        engine.launch(buffers)
    assert len(fake.contexts) == 2
    cuda.fail = "cudaStreamSynchronize"
    engine.close()
    engine.close()
    assert len(fake.contexts) == 0
    device.close()


@pytest.mark.parametrize("function", ["cudaGetDevice", "cudaGraphExecDestroy", "cudaFree"])
def test_close_when_anything_fails(cuda: FakeCuda, fake: FakeTensorRT, file: Path, function: str) -> None:
    device = CudaDevice(cudart=cuda)
    engine = TrtEngine(fake, file, device)
    buffers = toy_buffers(device, toy_feeds(1))
    for _ in range(3):
        engine.launch(buffers)
    cuda.fail = function
    engine.close()
    device.close()
    assert len(fake.contexts) == 0 and fake.config is None


def test_weights_that_come_and_go(fake: FakeTensorRT, cuda: FakeCuda, device: CudaDevice, file: Path) -> None:
    """Not on the GPU before the first run, nor after `unload`; graphs of their addresses are made anew."""
    with TrtEngine(fake, file, device, resident=False) as engine:
        (context,) = fake.contexts
        raw = context.engine
        del context
        assert not raw.weights_loaded, "opening an engine takes no memory for weights"
        buffers = toy_buffers(device, toy_feeds(2))
        for turn in range(3):
            for i in range(4):
                device.write(buffers["sample"], toy_feeds(2, i)["sample"])
                engine.launch(buffers)
                np.testing.assert_array_equal(device.read(buffers["epsilon"]), expected(toy_feeds(2, i)))
            assert raw.weights_loaded and raw.loads == turn + 1 and cuda.graphs == 1
            engine.unload()
            engine.unload()
            assert not raw.weights_loaded and cuda.graphs == 0
        np.testing.assert_array_equal(engine(toy_feeds(1))["epsilon"], expected(toy_feeds(1)))
        engine.unload()
        file.write_bytes(b"another engine, in its place")
        file.unlink()
        engine(toy_feeds(1))
        engine.unload()
        fake.refuses = {"load_weights"}
        wanted = r"weights of .*e\.engine cannot be loaded \(no memory for weights\): unload other engines"
        with pytest.raises(BackendUnavailable, match=wanted):
            engine.launch(buffers)
        del raw


@pytest.mark.parametrize(("rtx", "resident"), [(True, True), (False, False), (False, True)])
def test_weights_that_stay(cuda: FakeCuda, device: CudaDevice, file: Path, rtx: bool, resident: bool) -> None:
    """By default; and in full TensorRT, which cannot give them back."""
    fake = FakeTensorRT(cuda, rtx=rtx)
    with TrtEngine(fake, file, device, resident=resident) as engine:
        buffers = toy_buffers(device, toy_feeds(2))
        for _ in range(3):
            engine.launch(buffers)
        engine.unload()
        assert cuda.graphs == 1
        engine(toy_feeds(1))


def test_deferring_concerns_one_engine(fake: FakeTensorRT, device: CudaDevice, file: Path) -> None:
    """It is a setting of the runtime, which all engines share."""
    with TrtEngine(fake, file, device, resident=False) as swapped, TrtEngine(fake, file, device) as stays:
        loaded = sorted(context.engine.weights_loaded for context in fake.contexts)
        assert loaded == [False, True]
        for engine in (stays, swapped):
            np.testing.assert_array_equal(engine(toy_feeds(1))["epsilon"], expected(toy_feeds(1)))


def test_another_thread_and_another_current_device(cuda: FakeCuda, fake: FakeTensorRT, file: Path) -> None:
    """Everything is on the device that was asked for, and what was current in a thread is so again."""
    cuda.devices = 2
    with CudaDevice(1, cudart=cuda) as device:
        assert str(device.gpu) == "Fake GPU 1 (8.9)"
        with TrtEngine(fake, file, device) as engine:
            buffers = toy_buffers(device, toy_feeds(2))
            results: list[object] = []

            def work() -> None:
                for _ in range(4):
                    engine.launch(buffers)
                results.append(device.read(buffers["epsilon"]))
                results.append(engine(toy_feeds(8))["epsilon"])
                results.append(getattr(cuda.current, "device", 0))

            work()
            thread = threading.Thread(target=work)
            thread.start()
            thread.join()
            assert len(results) == 6 and results[2] == results[5] == 0
            for i in (0, 3):
                np.testing.assert_array_equal(results[i], expected(toy_feeds(2)))
            assert {cuda.device_of(ptr) for ptr in cuda.live() if ptr > 0} == {1}
    assert cuda.live() == {} and getattr(cuda.current, "device", 0) == 0


@pytest.mark.parametrize("seed", range(25))
def test_random_orders(cuda: FakeCuda, tmp_path: Path, seed: int) -> None:
    """Launches, calls, larger engines, unloads, failures and closes in any order compute what numpy does."""
    rng = np.random.default_rng(seed)
    path = tmp_path / "e.engine"
    path.write_bytes(b"good")
    fakes = []
    with CudaDevice(cudart=cuda) as device:
        engines: list[tuple[TrtEngine, FakeTensorRT]] = []
        sets: list[dict[str, Buffer]] = []
        for _ in range(80):
            action = rng.choice(
                ["open", "buffers", "launch", "launch", "launch", "call", "unload", "close", "break"]
            )
            if action == "open" and len(engines) < 3:
                fake = FakeTensorRT(cuda, rtx=bool(rng.integers(2)), scratch=int(rng.integers(0, 5000)))
                fakes.append(fake)
                engines.append((TrtEngine(fake, path, device, resident=bool(rng.integers(2))), fake))
            elif action == "buffers" and len(sets) < 4:
                sets.append(toy_buffers(device, toy_feeds(int(rng.integers(1, 9)))))
            elif engines:
                which = int(rng.integers(len(engines)))
                engine, fake = engines[which]
                start = int(rng.integers(1000))
                if action == "launch" and sets:
                    buffers = sets[int(rng.integers(len(sets)))]
                    feeds = toy_feeds(buffers["sample"].shape[0], start)
                    device.write(buffers["sample"], feeds["sample"])
                    for _ in range(int(rng.integers(1, 4))):
                        engine.launch(buffers)
                    np.testing.assert_array_equal(device.read(buffers["epsilon"]), expected(feeds))
                elif action == "call":
                    feeds = toy_feeds(int(rng.integers(1, 9)), start)
                    np.testing.assert_array_equal(engine(feeds)["epsilon"], expected(feeds))
                elif action == "unload":
                    engine.unload()
                elif action == "break":
                    fake.capturable = not fake.capturable
                    fake.refuses ^= {"capture"} if rng.integers(2) else set()
                elif action == "close":
                    engines.pop(which)[0].close()
        for engine, _ in engines:
            engine.close()
    assert cuda.live() == {}
    assert all(fake.faults == [] and len(fake.contexts) == 0 and fake.runtimes == 1 for fake in fakes)
