"""A fake of TensorRT's runtime side, over `fake_cuda`, for tests of the logic around it on machines with no
GPU.

What an engine computes is a numpy function or an ONNX graph on ONNX Runtime's CPU: a stand-in for the order
of things, for addresses and for lifetimes. Of TensorRT's numbers, kernels and speed it says nothing. Calls
are held against the signatures of the real bindings, where these are installed.
"""

from __future__ import annotations

import mmap
import re
import weakref
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from enum import Enum, IntEnum
from functools import cache
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any, SupportsInt

import numpy as np
from fake_cuda import POISON, FakeCuda

from ptqd_export.backends import OrtEngine

try:
    import tensorrt_rtx as _rtx
except ImportError:
    REAL: ModuleType | None = None
else:
    REAL = _rtx

Blob = bytes | memoryview | mmap.mmap
KINDS: Mapping[str, Any] = {
    "str": str,
    "typing.SupportsInt": SupportsInt,
    "tuple": tuple,
    "bool": bool,
    "typing_extensions.Buffer": Blob,
}
"""What Python values the words of a signature stand for; others are not checked."""


@cache
def signatures(name: str) -> tuple[tuple[str, ...], ...]:
    """Words for the arguments, `self` aside, of each form of a real method such as
    "IExecutionContext.set_input_shape".
    """
    kind, _, method = name.partition(".")
    text = getattr(getattr(REAL, kind), method).__doc__
    found = re.findall(rf"^\s*(?:\d+\. )?{method}\(self: [^,)]*(?:, )?(.*)\) -> ", text, re.MULTILINE)
    forms = [re.split(r", (?=\w+:)", form) if form else [] for form in found]
    return tuple(tuple(part.partition(": ")[2] for part in form) for form in forms)


def check_arguments(name: str, *arguments: object) -> None:
    """Raise TypeError where the real method takes no such arguments, as it would."""
    if REAL is None:
        return
    for form in signatures(name):
        words = [word.partition(" = ")[0] for word in form]
        least = sum(" = " not in word for word in form)
        if least <= len(arguments) <= len(words) and all(
            isinstance(value, KINDS.get(word, object)) for word, value in zip(words, arguments, strict=False)
        ):
            return
    raise TypeError(f"{name} takes {signatures(name)}, got {arguments}")


class _DataType(Enum):
    FLOAT = "float32"
    INT64 = "int64"


class _IOMode(Enum):
    INPUT = 1
    OUTPUT = 2


class _Location(Enum):
    DEVICE = 1
    HOST = 2


class _Diagnostics(IntEnum):
    VERSION_MISMATCH = 1
    UNSUPPORTED_CC = 2
    OLD_CUDA_DRIVER = 4
    MALFORMED_ENGINE = 32


@dataclass(frozen=True)
class FakeGraph:
    """What an engine computes.

    Attributes:
        tensors: {name: (numpy dtype name, shape, -1 for the rows, of which all have the same number)},
            outputs included.
        compute: {input: array} -> {output: array}.
    """

    tensors: Mapping[str, tuple[str, tuple[int, ...]]]
    outputs: tuple[str, ...]
    compute: Callable[[dict[str, np.ndarray]], Mapping[str, np.ndarray]]

    @property
    def inputs(self) -> tuple[str, ...]:
        return tuple(name for name in self.tensors if name not in self.outputs)


TOY = FakeGraph(
    {"timestep": ("int64", (-1,)), "epsilon": ("float32", (-1, 4)), "sample": ("float32", (-1, 4))},
    ("epsilon",),
    lambda feeds: {"epsilon": 2 * feeds["sample"] + feeds["timestep"][:, None]},
)
"""epsilon = 2 sample + timestep, over (B, 4)."""


def onnx_graph(path: Path) -> FakeGraph:
    """An ONNX file, by ONNX Runtime on the CPU when its turn comes."""
    engine = OrtEngine(path, optimise=False)  # else 8-bit products saturate on some processors
    specs = (*engine.specs, *engine.output_specs)
    tensors = {s.name: (s.dtype, tuple(-1 if d is None else d for d in s.shape)) for s in specs}
    return FakeGraph(tensors, engine.outputs, engine)


class FakeContext:
    """An execution context, which takes 1 to 8 rows.

    Like a real one it must be alive when its work runs, and as it was when a graph of it runs; and what it
    was made from must outlive it.
    """

    def __init__(self, trt: FakeTensorRT, engine: FakeEngine, how: Any) -> None:
        self.trt, self.engine, self.shapes, self.addresses = trt, engine, {}, {}
        self.scratch: tuple[int, int] | None = None
        self._flushed: object = None
        made_from = [weakref.ref(thing) for thing in (how, how.cache) if thing is not None] if trt.rtx else []
        weakref.finalize(self, trt.context_ends, made_from)
        trt.contexts.add(self)

    def set_input_shape(self, name: str, shape: tuple[int, ...]) -> bool:
        check_arguments("IExecutionContext.set_input_shape", name, shape)
        self.shapes[name] = tuple(shape)
        return "set_input_shape" not in self.trt.refuses

    def get_tensor_shape(self, name: str) -> tuple[int, ...]:
        check_arguments("IExecutionContext.get_tensor_shape", name)
        rows = max((shape[0] for shape in self.shapes.values()), default=-1)
        tensors = self.engine.graph.tensors
        return self.shapes.get(name) or tuple(rows if d < 0 else d for d in tensors[name][1])

    def set_tensor_address(self, name: str, address: int) -> bool:
        check_arguments("IExecutionContext.set_tensor_address", name, address)
        self.addresses[name] = address
        return "set_tensor_address" not in self.trt.refuses

    def set_device_memory(self, ptr: int, size: int) -> None:
        check_arguments("IExecutionContext.set_device_memory", ptr, size)
        assert ptr and ptr % 256 == 0 and size >= self.trt.scratch
        self.scratch = (ptr, size)

    def _state(self) -> tuple[object, ...]:
        return dict(self.shapes), dict(self.addresses), self.scratch, self.engine.loads

    def execute_async_v3(self, stream: int) -> bool:
        check_arguments("IExecutionContext.execute_async_v3", stream)
        trt, graph, me, state = self.trt, self.engine.graph, weakref.ref(self), self._state()
        cuda, captured, scratch, addresses = (
            trt.cuda,
            trt.cuda.is_capturing,
            self.scratch,
            dict(self.addresses),
        )
        shapes = {name: self.get_tensor_shape(name) for name in graph.tensors}
        trt.enqueued += 1
        assert scratch is not None, "a run before set_device_memory"
        assert self.engine.weights_loaded, "a run without weights"
        if (
            trt.broken
            or (captured and "capture" in trt.refuses)
            or len({shapes[n][0] for n in self.shapes}) > 1
        ):
            trt.tell_error("the fake\nbroke")
            return False
        if captured:
            assert self._flushed == (shapes, self.engine.loads), "captured with no run of these shapes before"
        self._flushed = (shapes, self.engine.loads)

        def run() -> None:
            context = me()
            assert context is not None, "the context is gone, and its work is not done"
            assert not captured or context._state() == state, (
                "the context was changed since its graph was captured"
            )
            arrays = {
                name: cuda.array(addresses[name], shapes[name], dtype)
                for name, (dtype, _) in graph.tensors.items()
            }
            results = graph.compute({n: arrays[n].copy() for n in graph.inputs})
            cuda.array(scratch[0], (max(trt.scratch, 1),), "uint8").fill(POISON)
            for name, value in results.items():
                arrays[name][:] = value

        return cuda.enqueue(run)


class FakeRtxContext(FakeContext):
    """With what TensorRT-RTX alone has."""

    def is_stream_capturable(self, stream: int) -> bool:
        check_arguments("IExecutionContext.is_stream_capturable", stream)
        return self.trt.capturable


class FakeEngine:
    """An engine; `loads` counts how often its weights came to the GPU, where they get another address each
    time.
    """

    def __init__(self, trt: FakeTensorRT, graph: FakeGraph, deferred: bool) -> None:
        self.trt, self.graph = trt, graph
        self.num_io_tensors = len(graph.tensors)
        self.device_memory_size_v2 = trt.scratch
        self.loads = 0 if deferred else 1
        self.weights_loaded = not deferred

    def get_tensor_name(self, index: int) -> str:
        return list(self.graph.tensors)[index]

    def get_tensor_dtype(self, name: str) -> _DataType:
        return _DataType(self.graph.tensors[name][0])

    def get_tensor_shape(self, name: str) -> tuple[int, ...]:
        return self.graph.tensors[name][1]

    def get_tensor_mode(self, name: str) -> _IOMode:
        return _IOMode.OUTPUT if name in self.graph.outputs else _IOMode.INPUT

    def get_tensor_location(self, name: str) -> _Location:
        return _Location.HOST if name == self.trt.on_host else _Location.DEVICE

    def get_tensor_profile_shape(self, name: str, profile: int) -> list[tuple[int, ...]]:
        return [(n, *self.graph.tensors[name][1][1:]) for n in (1, 4, 8)]

    def get_engine_stat(self, stat: str) -> int:
        return {"total": 4321}[stat]

    def create_execution_context(self, how: Any) -> FakeContext | None:
        assert (how.strategy if self.trt.rtx else how) == "user"
        if len(self.trt.contexts) >= self.trt.most_contexts:
            self.trt.tell_error("no memory for a context")
            return None
        return (FakeRtxContext if self.trt.rtx else FakeContext)(self.trt, self, how)


class FakeRtxEngine(FakeEngine):
    """With what TensorRT-RTX alone has."""

    def create_runtime_config(self) -> FakeConfig:
        return self.trt.make_config()

    def load_weights(self, blob: Blob) -> bool:
        check_arguments("ICudaEngine.load_weights", blob)
        if self.weights_loaded or "load_weights" in self.trt.refuses or not bytes(memoryview(blob)):
            self.trt.tell_error("no memory for weights")
            return False
        self.weights_loaded, self.loads = True, self.loads + 1
        return True

    def unload_weights(self) -> bool:
        assert not self.trt.cuda.queued, "weights unloaded under queued work"
        done, self.weights_loaded = self.weights_loaded, False
        return done


class FakeCache:
    """A runtime cache: takes only what begins with "cache", and counts."""

    def __init__(self) -> None:
        self.content = b"cache"

    def deserialize(self, blob: bytes) -> bool:
        check_arguments("IRuntimeCache.deserialize", blob)
        if blob.startswith(b"cache"):
            self.content = blob
        return blob.startswith(b"cache")

    def serialize(self) -> bytes:
        return self.content + b"+"


class FakeConfig:
    """A runtime configuration."""

    def __init__(self, trt: FakeTensorRT) -> None:
        self.trt, self.cache, self.strategy = trt, None, ""
        self.dynamic_shapes_kernel_specialization_strategy = "lazy"

    def create_runtime_cache(self) -> FakeCache:
        return FakeCache()

    def set_execution_context_allocation_strategy(self, strategy: str) -> None:
        self.strategy = strategy

    def set_runtime_cache(self, cache: FakeCache) -> bool:
        if "set_runtime_cache" not in self.trt.refuses:
            self.cache = cache
        return self.cache is not None


class FakeTensorRT:
    """Stands for the module tensorrt_rtx (`rtx`) or tensorrt.

    Engine files hold b"good" for `TOY`, b"graph " and the path of an ONNX graph, b"old", b"foreign" or
    b"driver"; all else is damaged.

    Attributes:
        broken, refuses: no run is queued; methods that say False ("capture": runs while one is captured).
        on_host: a tensor in the host's memory.
        contexts, most_contexts: those that are alive, and how many may be.
        enqueued, runtimes, configs: how many runs, runtimes and configurations were asked for; `config` is
            the latest.
        faults: what was given back too early.
    """

    __name__ = "fake_tensorrt"
    __version__ = "1.0"
    TensorIOMode = _IOMode
    TensorLocation = _Location
    EngineInvalidityDiagnostics = _Diagnostics
    EngineStat = SimpleNamespace(TOTAL_WEIGHTS_SIZE="total")
    DynamicShapesKernelSpecializationStrategy = SimpleNamespace(EAGER="eager")
    ExecutionContextAllocationStrategy = SimpleNamespace(USER_MANAGED="user")

    class ILogger:
        pass

    def __init__(
        self, cuda: FakeCuda, *, rtx: bool = True, scratch: int = 1000, capturable: bool = True
    ) -> None:
        self.cuda, self.rtx, self.scratch, self.capturable = cuda, rtx, scratch, capturable
        self.broken, self.refuses, self.on_host = False, set[str](), ""
        self.enqueued, self.runtimes, self.configs = 0, 0, 0
        self.faults: list[str] = []
        self.contexts: weakref.WeakSet[FakeContext] = weakref.WeakSet()
        self.most_contexts = 1 << 10
        self._logger: Any = None
        self._config: weakref.ref[FakeConfig] | None = None

    @property
    def config(self) -> FakeConfig | None:
        return None if self._config is None else self._config()

    def tell_error(self, text: str) -> None:
        self._logger.log(SimpleNamespace(name="ERROR"), text)

    def context_ends(self, made_from: list[weakref.ref[object]]) -> None:
        if any(thing() is None for thing in made_from):
            self.faults.append("a context outlived its configuration or cache")

    def make_config(self) -> FakeConfig:
        self.configs += 1
        config = FakeConfig(self)
        self._config = weakref.ref(config)
        return config

    def Runtime(self, logger: Any) -> Any:
        self.runtimes += 1
        self._logger = self._logger or logger  # the first is the library's for good
        answers = {b"good": 0, b"old": 1, b"foreign": 2, b"driver": 4}
        told = {
            b"old": "Version tag does not match. Note: Current Version: 240, Serialized Engine Version: 239",
            b"foreign": "The engine plan file is generated on an incompatible device, expecting compute "
            "8.6 got compute 8.9, please rebuild.",
            b"driver": "cudaError 35: CUDA driver version is insufficient for CUDA runtime version",
        }

        def load(blob: Blob) -> FakeEngine | None:
            check_arguments("Runtime.deserialize_cuda_engine", blob)
            content, deferred = bytes(memoryview(blob)), getattr(runtime, "defer_weights_loading", False)
            kind = FakeRtxEngine if self.rtx else FakeEngine
            if content == b"good":
                return kind(self, TOY, deferred)
            if content.startswith(b"graph "):
                return kind(self, onnx_graph(Path(content[6:].decode())), deferred)
            self.tell_error(told.get(content, "Magic tag does not match"))
            return None

        def validity(blob: Blob) -> tuple[str, int]:
            return "validity", answers.get(bytes(memoryview(blob)), 32)

        runtime = SimpleNamespace(deserialize_cuda_engine=load)
        if self.rtx:
            runtime.get_engine_validity, runtime.defer_weights_loading = validity, False
        return runtime
