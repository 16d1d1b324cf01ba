"""CUDA graphs over a fake: what is captured, tried again, dropped, and said of it."""

from __future__ import annotations

import gc
from pathlib import Path

import numpy as np
import pytest
from fake_cuda import FakeCuda
from fake_tensorrt import FakeTensorRT

from ptqd_export.backends.cuda import Buffer, CudaDevice
from ptqd_export.backends.trt import TrtEngine
from ptqd_export.backends.trt.graphs import GIVEN_UP_AFTER, GRAPHS, TRIED_AT
from ptqd_export.errors import GraphError

from .shared import expected, toy_buffers, toy_feeds


def _run(engine: TrtEngine, device: CudaDevice, buffers: dict[str, Buffer], start: int = 0) -> None:
    """Launch on other content, and compare."""
    rows = buffers["sample"].shape[0]
    device.write(buffers["sample"], toy_feeds(rows, start)["sample"])
    engine.launch(buffers)
    np.testing.assert_array_equal(device.read(buffers["epsilon"]), expected(toy_feeds(rows, start)))


def test_launch_is_captured_the_second_time(
    fake: FakeTensorRT, cuda: FakeCuda, device: CudaDevice, file: Path
) -> None:
    """By (shapes, addresses); a replay computes from what the buffers hold then."""
    with TrtEngine(fake, file, device) as engine:
        one, two = toy_buffers(device, toy_feeds(2)), toy_buffers(device, toy_feeds(2, 50))
        enqueued = []
        for i in range(4):
            for buffers in (one, two):
                _run(engine, device, buffers, 10 * i)
            enqueued.append(fake.enqueued)
        assert enqueued == [2, 6, 6, 6], "first a run, then a run and a capture, then replays only"
        assert cuda.launches == 4 and cuda.graphs == 2
        assert engine.capture_note == "2 CUDA graphs captured"
        assert len(fake.contexts) == 3, "one for each graph and one for all else"
        assert fake.configs == 1, "configured once"
    assert len(fake.contexts) == 0


@pytest.mark.parametrize("rtx", [True, False])
def test_a_replay_after_other_runs(cuda: FakeCuda, device: CudaDevice, file: Path, rtx: bool) -> None:
    """Runs of other shapes, captured or not, and calls on host arrays leave a graph's context alone."""
    fake = FakeTensorRT(cuda, rtx=rtx)
    with TrtEngine(fake, file, device) as engine:
        buffers, others = toy_buffers(device, toy_feeds(2)), toy_buffers(device, toy_feeds(3))
        for _ in range(2):
            engine.launch(buffers)
        for n in (1, 3, 3, 3, 8):
            np.testing.assert_array_equal(engine(toy_feeds(n, n))["epsilon"], expected(toy_feeds(n, n)))
            _run(engine, device, others, n)
            engine.launch(buffers)
            device.synchronize()
        np.testing.assert_array_equal(device.read(buffers["epsilon"]), expected(toy_feeds(2)))
        assert cuda.launches == 8 and len(fake.contexts) == 3


def test_no_memory_for_another_context(
    fake: FakeTensorRT, cuda: FakeCuda, device: CudaDevice, file: Path
) -> None:
    """Runs go on without graphs, which is said, and what failed later is not told of as this."""
    fake.most_contexts = 1
    with TrtEngine(fake, file, device) as engine:
        buffers = toy_buffers(device, toy_feeds(2))
        for i in range(4):
            _run(engine, device, buffers, i)
        assert cuda.launches == 0 and fake.enqueued == 4
        why = "no CUDA graph: there is no room for another context (no memory for a context)"
        assert engine.capture_note == why
        fake.broken = True
        with pytest.raises(GraphError, match="failed to run: the fake broke"):
            engine.launch(buffers)


FAULTS = {
    "not capturable": "the library says that this run cannot be captured (it does not say why)",
    "refused": "the run was refused while it was captured (the fake broke)",
    "cudaStreamEndCapture": "the capture did not end well: cudaErrorStreamCaptureUnsupported: told by",
    "cudaGraphInstantiate": "what was captured cannot be made ready: cudaErrorStreamCaptureUnsupported",
}


def _break(cuda: FakeCuda, fake: FakeTensorRT, fault: str) -> None:
    fake.capturable = fault != "not capturable"
    fake.refuses = {"capture"} if fault == "refused" else set()
    cuda.fail, cuda.fail_with = fault, cuda.cudaError_t.cudaErrorStreamCaptureUnsupported


@pytest.mark.parametrize("fault", FAULTS)
def test_without_capture(
    fake: FakeTensorRT, cuda: FakeCuda, device: CudaDevice, file: Path, fault: str
) -> None:
    """Runs go on, each failure is tried again a few times and no more, and the engine says why."""
    _break(cuda, fake, fault)
    with TrtEngine(fake, file, device) as engine:
        buffers = toy_buffers(device, toy_feeds(2))
        for i in range(3 * max(TRIED_AT)):
            _run(engine, device, buffers, i)
            assert len(fake.contexts) == 1, "that of a failed capture is given back"
        assert engine.capture_note.startswith(f"no CUDA graph: {FAULTS[fault]}")
        assert "\n" not in engine.capture_note
        captures = 0 if fault == "not capturable" else len(TRIED_AT)
        assert cuda.launches == 0 and fake.enqueued == 3 * max(TRIED_AT) + captures
        assert cuda.calls.count("cudaStreamBeginCapture") == captures


@pytest.mark.parametrize("fault", FAULTS)
def test_a_failure_of_the_moment(
    fake: FakeTensorRT, cuda: FakeCuda, device: CudaDevice, file: Path, fault: str
) -> None:
    """The next attempt succeeds, and other buffers were captured meanwhile."""
    with TrtEngine(fake, file, device) as engine:
        buffers, others = toy_buffers(device, toy_feeds(2)), toy_buffers(device, toy_feeds(3))
        for i in range(max(TRIED_AT) + 2):
            if i == TRIED_AT[0] - 1:
                _break(cuda, fake, fault)
            _run(engine, device, buffers, i)
            if i == TRIED_AT[0] - 1:
                assert engine.capture_note.startswith("no CUDA graph: ")
                _break(cuda, fake, "")
                for _ in range(2):
                    _run(engine, device, others)
                assert engine.capture_note.startswith(f"1 CUDA graph captured, 1 not: {FAULTS[fault]}")
        assert cuda.graphs == 2 and engine.capture_note == "2 CUDA graphs captured"


@pytest.mark.parametrize("fault", FAULTS)
def test_the_error_of_a_failed_capture_is_not_quoted_later(
    fake: FakeTensorRT, cuda: FakeCuda, device: CudaDevice, file: Path, fault: str
) -> None:
    _break(cuda, fake, fault)
    with TrtEngine(fake, file, device) as engine:
        buffers = toy_buffers(device, toy_feeds(2))
        for _ in range(2):
            engine.launch(buffers)
        fake.tell_error("left behind")
        fake.refuses = {"set_tensor_address"}
        with pytest.raises(GraphError, match=r"at address 0x[0-9a-f]+: it does not say why"):
            engine.launch(buffers)


def test_an_engine_that_never_captures_gives_up(
    fake: FakeTensorRT, cuda: FakeCuda, device: CudaDevice, file: Path
) -> None:
    """Each attempt makes a context, which compiles kernels; a scratch that moved is a new start."""
    fake.capturable = False
    with TrtEngine(fake, file, device) as engine:
        every = [toy_buffers(device, toy_feeds(1, i)) for i in range(GIVEN_UP_AFTER + 3)]
        made = 0
        for buffers in every:
            for _ in range(2):
                before = fake.enqueued
                engine.launch(buffers)
                made += fake.enqueued - before
        assert engine._graphs._failures == GIVEN_UP_AFTER
        fake.capturable = True
        for buffers in every:
            engine.launch(buffers)
        assert cuda.graphs == 0
        device.reserve(1 << 16)
        for i, buffers in enumerate(every):
            for _ in range(3):
                _run(engine, device, buffers, i)
        assert cuda.graphs == len(every)


def test_garbage_is_collected_before_a_capture_and_not_during_one(
    fake: FakeTensorRT, cuda: FakeCuda, device: CudaDevice, file: Path
) -> None:
    """The fake asserts that the collector is off; a cycle that frees GPU memory is gone before."""
    freed: list[int] = []

    class Owner:
        def __init__(self) -> None:
            self.me, self.buffer = self, device.empty((4,), "float32")

        def __del__(self) -> None:
            freed.append(cuda.calls.count("cudaStreamBeginCapture"))
            device.free(self.buffer)

    with TrtEngine(fake, file, device) as engine:
        buffers = toy_buffers(device, toy_feeds(2))
        engine.launch(buffers)
        gc.disable()
        try:
            Owner()
            gc.enable()
            engine.launch(buffers)
        finally:
            gc.enable()
        assert freed == [0] and cuda.graphs == 1 and gc.isenabled()
        gc.disable()
        try:
            for _ in range(2):
                engine.launch(toy_buffers(device, toy_feeds(2)))
            assert not gc.isenabled(), "as it was"
        finally:
            gc.enable()


def test_the_fake_tells_a_changed_context(
    fake: FakeTensorRT, cuda: FakeCuda, device: CudaDevice, file: Path
) -> None:
    """And one that is gone: what the tests above rest on."""
    with TrtEngine(fake, file, device) as engine:
        buffers = toy_buffers(device, toy_feeds(2))
        for _ in range(2):
            engine.launch(buffers)
        device.synchronize()
        (launches,) = engine._graphs._launches.values()
        assert launches.context is not None
        launches.context.set_shape("sample", (3, 4))
        engine.launch(buffers)
        with pytest.raises(AssertionError, match="the context was changed since its graph was captured"):
            device.synchronize()
        engine.launch(buffers)
        launches.context.release()
        with pytest.raises(AssertionError, match="the context is gone"):
            device.synchronize()


def test_graphs_are_bounded(fake: FakeTensorRT, cuda: FakeCuda, device: CudaDevice, file: Path) -> None:
    with TrtEngine(fake, file, device) as engine:
        every = [toy_buffers(device, toy_feeds(1, i)) for i in range(GRAPHS + 5)]
        for buffers in every:
            for _ in range(3):
                engine.launch(buffers)
        assert cuda.graphs == GRAPHS and len(fake.contexts) == GRAPHS + 1
        for i, buffers in enumerate(every):
            np.testing.assert_array_equal(device.read(buffers["epsilon"]), expected(toy_feeds(1, i)))
    assert cuda.graphs == 0


def test_the_latest_graphs_are_kept(
    fake: FakeTensorRT, cuda: FakeCuda, device: CudaDevice, file: Path
) -> None:
    with TrtEngine(fake, file, device) as engine:
        first, *others, last = [toy_buffers(device, toy_feeds(1, i)) for i in range(GRAPHS + 1)]
        for buffers in (first, *others, first, last, first):
            engine.launch(buffers)
        assert cuda.launches == 1, "captured, and dropped as the one first seen"
