"""Checks of first_gpu.py that need no engines: machine, CUDA run side, bundle and builds. And what checks
share.

A check is a function that runs in a process of its own. It is told what it works on (`Job`), tells figures as
soon as it has them, and returns one line of what it found. It raises Skipped where it cannot be tried here;
any other exception is a failure.
"""

from __future__ import annotations

import contextlib
import os
import shutil
import subprocess
import threading
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
from first_gpu_process import Failed, Job, Skipped, Tell, require
from report import REFERENCE_MODEL

from ptqd_export import backends
from ptqd_export.assemble.engines import rebuild
from ptqd_export.backends import cuda
from ptqd_export.bundle.bundle import Bundle
from ptqd_export.core.backend import RUNNABLE
from ptqd_export.core.timing import time_calls
from ptqd_export.errors import BackendUnavailable, PTQDError
from ptqd_export.files import replacing
from ptqd_export.recipe import Recipe

PRECISIONS = ("w4a8", "w8a8", "fp16", "fp32")
"""Of a bundle that is built here; its plan runs them in turn, in this order."""
TOO_MUCH = 1 << 50
"""Bytes that no GPU has."""
COMPLAINTS = 10
"""Most layers of a plan that a record names."""
MIB = float(1 << 20)


class Problems:
    """What was wrong in parts of a check that go on after each other's failures."""

    def __init__(self) -> None:
        self._lines: list[str] = []

    @contextlib.contextmanager
    def of(self, part: str) -> Iterator[None]:
        """An error of the package inside is a problem of this part, and no end."""
        try:
            yield
        except PTQDError as error:
            self._lines.append(f"{part}: {error}")

    def settle(self) -> None:
        """Raise Failed if there was any."""
        if self._lines:
            raise Failed("; ".join(self._lines))


def needs(call: Callable[[], object]) -> None:
    """Raise Skipped, with the reason, where something is not installed or does not work here."""
    try:
        call()
    except BackendUnavailable as error:
        raise Skipped(str(error)) from error


def say(text: str) -> None:
    """A line of progress, into the check's log."""
    print(text, flush=True)


def free_mib() -> float | None:
    """MiB that are free on the current GPU, other programs counted; None where CUDA does not tell."""
    try:
        error, free, _ = cuda.runtime().cudaMemGetInfo()
    except BackendUnavailable:
        return None
    return None if error else free / MIB


def host_mib() -> float:
    """MiB that this process holds."""
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE") / MIB


def check_machine(job: Job, tell: Tell) -> str:
    """The GPUs, the driver, and the CUDA versions of the driver and the bindings; `no_gpu`: why there is
    none."""
    query = [
        "nvidia-smi",
        "--query-gpu=name,driver_version,memory.total,compute_cap",
        "--format=csv,noheader",
    ]
    try:
        told = subprocess.run(query, capture_output=True, text=True, timeout=20)
        tell("nvidia_smi", (told.stdout or told.stderr).strip().splitlines())
    except (OSError, subprocess.TimeoutExpired) as error:
        tell("nvidia_smi", [f"does not run here ({type(error).__name__})"])
    try:
        cudart = cuda.runtime()
        first = cuda.gpu()
    except BackendUnavailable as error:
        tell("no_gpu", str(error))
        return str(error)
    gpus = [str(cuda.gpu(i)) for i in range(cudart.cudaGetDeviceCount()[1])]
    versions = {"driver": cudart.cudaDriverGetVersion()[1], "bindings": cudart.cudaRuntimeGetVersion()[1]}
    tell("gpus", gpus)
    tell("cuda", {name: f"{number // 1000}.{number % 1000 // 10}" for name, number in versions.items()})
    return f"{len(gpus)} GPU(s), the first {first}"


def check_backends(job: Job, tell: Tell) -> str:
    """Which backends work here, and why the others do not."""
    working = []
    for name in RUNNABLE:
        try:
            backends.check(name)
        except BackendUnavailable as error:
            tell(name, str(error))
        else:
            tell(name, "ok")
            working.append(name)
    return f"working: {', '.join(working) or 'none'}"


def check_cuda_memory(job: Job, tell: Tell) -> str:
    """Arrays come back as they were written, in the order of the calls, through pinned memory."""
    needs(cuda.gpu)
    rng = np.random.default_rng(0)
    with cuda.CudaDevice() as device:
        for dtype, shape in (
            ("float32", (3, 5, 7)),
            ("int64", (1,)),
            ("float16", (4097,)),
            ("uint8", (9, 9)),
        ):
            array = rng.integers(0, 100, shape).astype(dtype)
            _round_trip(device, array)
            _round_trip(device, array.T)  # not contiguous
        # More copies than there are staging blocks; each source changes as soon as `write` has returned.
        count = cuda.STAGING_BLOCKS + 10
        buffers = [device.empty((257,), "int64") for _ in range(count)]
        source = np.empty(257, np.int64)
        for i, buffer in enumerate(buffers):
            source.fill(i)
            device.write(buffer, source)
            source.fill(-1)
        right = all((device.read(buffer) == i).all() for i, buffer in enumerate(buffers))
        require(right, "a write took what its source held after it had returned")
        for i in range(count):
            device.write(buffers[0], np.full(257, i, np.int64))
        require(bool((device.read(buffers[0]) == count - 1).all()), "writes did not run in their order")
        try:
            device.empty((TOO_MUCH,), "uint8")
        except BackendUnavailable as error:
            tell("too_much", str(error))
        else:
            raise Failed(f"{TOO_MUCH} bytes were allocated")
        _round_trip(device, source)
        large = np.zeros(1 << 24, np.float32)
        buffer = device.empty(large.shape, "float32")

        def write() -> None:
            device.write(buffer, large)
            device.synchronize()

        seconds = time_calls({"write": write, "read": lambda: device.read(buffer)}, repeats=5, warmup=1)
        tell("gb_per_s", {name: large.nbytes / 1e9 / value for name, value in seconds.items()})
    return f"{count} writes under way came back right"


def _round_trip(device: cuda.CudaDevice, array: np.ndarray) -> None:
    buffer = device.empty(array.shape, array.dtype.name)
    device.write(buffer, array)
    same = np.array_equal(device.read(buffer), array)
    device.free(buffer)
    require(same, f"{array.dtype} {array.shape} came back otherwise")


def check_cuda_graphs(job: Job, tell: Tell) -> str:
    """Work is captured and replayed; captures that fail say so, and the stream goes on."""
    needs(cuda.gpu)
    cudart = cuda.runtime()
    with cuda.CudaDevice() as device:
        buffer, zeros = device.empty((1024,), "uint8"), np.zeros(1024, np.uint8)

        def fill() -> bool:
            return not cudart.cudaMemsetAsync(buffer.ptr, 7, buffer.nbytes, device.stream)[0]

        def spoil() -> bool:
            return bool(cudart.cudaStreamSynchronize(device.stream))  # forbidden in a capture: it ends badly

        refused: dict[str, Callable[[], bool]] = {"refused": lambda: False, "spoilt": spoil}
        for what, work in refused.items():
            try:
                device.drop(device.capture(work))
            except cuda.CaptureFailed as error:
                tell(what, str(error))
            else:
                raise Failed(f"a capture that was {what} made a graph")
        device.write(buffer, zeros)
        graph = device.capture(fill)
        require(not device.read(buffer).any(), "a capture ran what it captured")
        for _ in range(3):
            device.replay(graph)
            require(bool((device.read(buffer) == 7).all()), "a replay did not do what was captured")
            device.write(buffer, zeros)
        device.drop(graph)
        _round_trip(device, zeros)
    return "captured, replayed three times, and two captures that fail said why"


def check_cuda_scratch(job: Job, tell: Tell) -> str:
    """The scratch memory grows, never shrinks, is aligned, and stays what it was where there is no room."""
    needs(cuda.gpu)
    with cuda.CudaDevice() as device:
        for size, expected in ((1000, 1000), (10, 1000), (1 << 20, 1 << 20)):
            device.reserve(size)
            address, held = device.scratch
            require(held == expected, f"the scratch holds {held} bytes after reserve({size})")
            require(address % 256 == 0, f"the scratch is at {address:#x}, not aligned to 256 bytes")
        before = device.scratch
        try:
            device.reserve(TOO_MUCH)
        except BackendUnavailable as error:
            tell("too_much", str(error))
        require(device.scratch == before, "a scratch that could not grow moved")
    return "grows in place of the old one, and outlives a refusal"


def check_cuda_devices(job: Job, tell: Tell) -> str:
    """Another thread uses the device; another current device is put back; each index is a GPU of its own."""
    needs(cuda.gpu)
    cudart, array, problems = cuda.runtime(), np.arange(1000), []
    count = cudart.cudaGetDeviceCount()[1]
    with cuda.CudaDevice() as device:

        def use() -> None:
            try:
                _round_trip(device, array)
            except Exception as error:  # told by the thread that waits
                problems.append(f"in another thread: {error}")

        thread = threading.Thread(target=use)
        thread.start()
        thread.join()
        require(not problems, "; ".join(problems))
        tell("gpus", count)
        if count == 1:
            tell("second_gpu", "there is none: the guard against another current device was not tried")
            return "used from another thread; one GPU"
        cudart.cudaSetDevice(1)
        try:
            _round_trip(device, array)
            require(cudart.cudaGetDevice()[1] == 1, "the thread's own current device was not put back")
            with cuda.CudaDevice(1) as second:
                _round_trip(second, array)
                _round_trip(device, array)
        finally:
            cudart.cudaSetDevice(0)
        with contextlib.suppress(BackendUnavailable):
            cuda.CudaDevice(count)
            raise Failed(f"GPU {count} was opened, and there are {count}")
    return "used from another thread; the current device of the thread is put back; two GPUs in turn"


def check_bundle(job: Job, tell: Tell) -> str:
    """Copies the bundle that was given, or builds one after a minimal calibration: its numbers are no
    quality."""
    job.bundle.parent.mkdir(parents=True, exist_ok=True)
    if job.source is not None:
        Bundle.open(job.source)
        with replacing(job.bundle) as folder:
            shutil.copytree(job.source, folder, dirs_exist_ok=True)
    else:
        try:
            from ptqd_export.assemble.assemble import assemble
        except ImportError as error:
            raise Skipped(
                f"building a bundle needs torch, diffusers and onnx ({error}): give one with --bundle"
            ) from error
        recipe = Recipe.load(_tiny_model(job.work / "tiny") if job.tiny else REFERENCE_MODEL)
        steps = len(PRECISIONS) if job.tiny else recipe.sampler.n_steps
        calibration = {"size": 4, "held_out": 2, "batch_size": 4}
        recipe = recipe.override(
            sampler={"n_steps": steps},
            calibration=calibration,
            quantization={"precisions": PRECISIONS},
            plan={"rule": "fixed", "steps": [f"{p}*{steps // len(PRECISIONS)}" for p in PRECISIONS]},
        )
        tell("calibration", calibration)
        assemble(recipe, job.bundle, say=say)
    m = (bundle := Bundle.open(job.bundle)).manifest
    tell("seal", bundle.seal)
    tell("plan", str(m.plan))
    return f"{m.sampling.model.name}, {len(m.sampling)} steps, {', '.join(map(str, m.bops))}"


def _tiny_model(folder: Path) -> Path:
    """A diffusers folder with seeded random weights: 3x16x16, with attention."""
    import torch
    from diffusers import DDPMScheduler, UNet2DModel

    torch.manual_seed(0)
    UNet2DModel(
        sample_size=16,
        block_out_channels=(8, 16),
        layers_per_block=1,
        norm_num_groups=4,
        attention_head_dim=8,
        down_block_types=("DownBlock2D", "AttnDownBlock2D"),
        up_block_types=("AttnUpBlock2D", "UpBlock2D"),
    ).save_pretrained(folder / "unet")
    DDPMScheduler().save_pretrained(folder / "scheduler")
    return folder


def check_build(job: Job, tell: Tell) -> str:
    """Engines of the backend are built here, for this GPU, from the bundle's own graphs."""
    needs(lambda: backends.check(job.backend))
    m = rebuild(job.bundle, job.backend, say=say).manifest
    builds = {
        e.name: (e.file, e.build) for e in m.engines if e.backend == job.backend and e.build is not None
    }
    for name, (file, build) in builds.items():
        plan = build.plan
        report = {
            "seconds": build.seconds,
            "file_mib": m.files[file].size / MIB,
            "builder_peak_mib": build.peak_bytes / MIB,
            "weights_mib": None if build.weight_bytes is None else build.weight_bytes / MIB,
            "scratch_mib": None if build.scratch_bytes is None else build.scratch_bytes / MIB,
            "targets": build.targets,
            "kernels": plan.kernels,
            "meant_8_bit": plan.meant,
            "taken_8_bit": plan.taken,
            "complaints": plan.complaints()[:COMPLAINTS],
            "variant": build.variant,
            "notes": build.notes,
        }
        tell(name, report)
    plans = {name: build.plan for name, (_, build) in builds.items() if build.plan.meant}
    eight = ", ".join(f"{name} {plan.taken} of {plan.meant}" for name, plan in plans.items())
    return f"{len(builds)} engines; layers in 8 bits: {eight or 'none was meant to'}"
