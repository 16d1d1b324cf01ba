"""The library's objects of an open engine: contexts end before what they were made from."""

from __future__ import annotations

import contextlib
import mmap
import re
from pathlib import Path
from typing import Any

from ...core.engine import TensorSpec
from ...errors import BackendUnavailable, BundleError, GraphError, PTQDError
from ...files import write_file
from ..cuda import CudaDevice, Gpu
from .library import DTYPES, Shared, shared
from .logs import OUT_OF_MEMORY

REASONS = {
    "VERSION_MISMATCH": "was built by another version of TensorRT",
    "UNSUPPORTED_CC": "was not built for this GPU",
    "MALFORMED_ENGINE": "is damaged",
}
"""Why an engine does not load, where another build helps, by names of `EngineInvalidityDiagnostics`."""
SIGNS = {
    "VERSION_MISMATCH": re.compile(
        r"[Vv]ersion tag|[Ss]erialized [Ee]ngine [Vv]ersion|SERIALIZATION_VERSION|library version"
    ),
    "UNSUPPORTED_CC": re.compile(r"incompatible device"),
}
"""What TensorRT logs for them."""


class Context:
    """An execution context of the library.

    Whoever still refers to this after `release`, such as the frames of an exception, keeps nothing of the
    library alive.
    """

    def __init__(self, raw: Any) -> None:
        self._raw = raw

    def set_shape(self, name: str, shape: tuple[int, ...]) -> bool:
        """Whether the library takes this shape of an input."""
        return bool(self._raw.set_input_shape(name, shape))

    def shape(self, name: str) -> tuple[int, ...]:
        """The shape of a tensor under the inputs' shapes as they are."""
        return tuple(self._raw.get_tensor_shape(name))

    def set_address(self, name: str, address: int) -> bool:
        """Whether the library takes this address of a tensor."""
        return bool(self._raw.set_tensor_address(name, address))

    def set_scratch(self, address: int, size: int) -> None:
        """The memory that it computes in, of `size` bytes."""
        self._raw.set_device_memory(address, size)

    def enqueue(self, stream: int) -> bool:
        """Queue a run; whether that was possible."""
        return bool(self._raw.execute_async_v3(stream))

    def is_capturable(self, stream: int) -> bool:
        """Whether a run can be captured; True where the library does not tell."""
        return not hasattr(self._raw, "is_stream_capturable") or bool(self._raw.is_stream_capturable(stream))

    def release(self) -> None:
        """Give the library's object back; its work must be done."""
        self._raw = None


class Loaded:
    """An engine of the library with all that it needs, in the order that it needs: give it back with `close`.

    Attributes:
        inputs, outputs: their specs.
        rows: {input: (fewest, most rows)} of the inputs whose first dimension is dynamic.
        scratch_bytes: what a run needs.
        weight_bytes: of the GPU's memory; None where the library does not tell.
        swaps: its weights can be given back and loaded again, and are not on the GPU before `load_weights`.
    """

    def __init__(
        self, module: Any, path: Path, device: CudaDevice, *, built: str, cache: Path | None, resident: bool
    ) -> None:
        """Load `path`; the arguments are TrtEngine's.

        Raises:
            BundleError, BackendUnavailable: as TrtEngine.
            GraphError: a tensor of the engine is not in the GPU's memory.
        """
        self._path, self._cache_file = path, cache
        self._contexts: list[Context] = []
        library = shared(module)
        self.errors = library.errors
        self.errors.forget()
        self.swaps = not resident and hasattr(library.runtime, "defer_weights_loading")
        self._blob: mmap.mmap | bytes = _read(path, self.swaps)
        self._engine = _deserialize(module, library, path, self._blob, device.gpu, built, self.swaps)
        if not self.swaps:
            self._blob = b""
        self._how, self._cache = _configure(module, self._engine, cache)
        self.inputs, self.outputs = _specs(module, self._engine, path)
        engine = self._engine
        shapes = {s.name: engine.get_tensor_profile_shape(s.name, 0) for s in self.inputs if None in s.shape}
        self.rows = {name: (int(low[0]), int(high[0])) for name, (low, _, high) in shapes.items()}
        self.scratch_bytes = int(engine.device_memory_size_v2)
        self.weight_bytes = (
            int(engine.get_engine_stat(module.EngineStat.TOTAL_WEIGHTS_SIZE))
            if hasattr(module, "EngineStat")
            else None
        )

    def new_context(self) -> Context | None:
        """A context, or None where it cannot be made: `errors` knows why."""
        self.errors.forget()
        raw = self._engine.create_execution_context(self._how)
        if raw is None:
            return None
        context = Context(raw)
        self._contexts.append(context)
        return context

    def release(self, context: Context) -> None:
        """Give a context back, whose work is done."""
        self._contexts.remove(context)
        context.release()

    @property
    def has_weights(self) -> bool:
        """Its weights are on the GPU."""
        return not self.swaps or bool(self._engine.weights_loaded)

    def load_weights(self) -> None:
        """Bring the weights to the GPU, where they are not there.

        Raises:
            BackendUnavailable: memory ran out.
        """
        if not self.has_weights:
            self.errors.forget()
            if not self._engine.load_weights(self._blob):
                raise BackendUnavailable(
                    f"the weights of {self._path} cannot be loaded ({self.errors.told()}): unload other "
                    "engines, or free some of the GPU's memory"
                )

    def unload_weights(self) -> None:
        """Give the weights' memory back, once all work is done; nothing where the library cannot.

        Raises:
            BackendUnavailable: the library refuses.
        """
        if self.swaps and self._engine.weights_loaded:
            self.errors.forget()
            if not self._engine.unload_weights():
                raise BackendUnavailable(
                    f"the weights of {self._path} cannot be unloaded ({self.errors.told()}): open the engine "
                    "again"
                )

    def close(self) -> None:
        """Give everything back; its work is done, or will never be."""
        self._save_cache()
        # In this order: each belongs to the next.
        for context in self._contexts:
            context.release()
        self._contexts.clear()
        self._how = None
        self._cache = None
        self._engine = None
        self._blob = b""

    def _save_cache(self) -> None:
        """A cache that cannot be written only makes the next start slower."""
        if self._cache is None or self._cache_file is None:
            return
        blob = self._cache.serialize()
        data = b"" if blob is None else bytes(memoryview(blob))
        with contextlib.suppress(PTQDError, OSError):
            if data and not (self._cache_file.is_file() and self._cache_file.read_bytes() == data):
                self._cache_file.parent.mkdir(parents=True, exist_ok=True)
                write_file(self._cache_file, data)


def _read(path: Path, mapped: bool) -> mmap.mmap | bytes:
    """The engine's file; mapped where it is read again later, even after another has taken its place."""
    try:
        with path.open("rb") as file:
            if mapped and path.stat().st_size:
                return mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
            return file.read()
    except OSError as error:
        raise BundleError(f"{path} cannot be read: {error.strerror}: run with --rebuild") from error


def _deserialize(
    trt: Any, library: Shared, path: Path, blob: mmap.mmap | bytes, gpu: Gpu, built: str, deferred: bool
) -> Any:
    """The library's engine, or the reason why there is none."""
    runtime = library.runtime
    with library.lock:
        if deferred:
            runtime.defer_weights_loading = True  # for the next engine
        try:
            engine = runtime.deserialize_cuda_engine(blob)
        finally:
            if deferred:
                runtime.defer_weights_loading = False
        if engine is not None:
            return engine
        told = library.errors.told()
        if hasattr(runtime, "get_engine_validity"):
            bits = int(runtime.get_engine_validity(blob)[1])
            members = trt.EngineInvalidityDiagnostics.__members__
            names = [name for name, member in members.items() if int(member.value) & bits]
        else:
            names = [name for name, sign in SIGNS.items() if sign.search(told)]
            if not names and not OUT_OF_MEMORY.search(told) and not re.search("CUDA|[Cc]uda", told):
                names = ["MALFORMED_ENGINE"]
    here = f"this machine has {trt.__name__} {trt.__version__} on {gpu}"
    for name, reason in REASONS.items():
        if name in names:
            by = f"it was built by {built}, " if built else ""
            raise BundleError(f"{path} {reason}: {by}{here}: run with --rebuild")
    why = ", ".join(names) or "no diagnosis"
    raise BackendUnavailable(
        f"{path} does not load ({why}: {told}), {here}: update the NVIDIA driver, or free some of the GPU's "
        "memory"
    )


def _configure(trt: Any, engine: Any, cache_file: Path | None) -> tuple[Any, Any]:
    """What contexts are made from, a configuration or an allocation strategy; and the cache of kernels."""
    strategy = trt.ExecutionContextAllocationStrategy.USER_MANAGED
    if not hasattr(engine, "create_runtime_config"):
        return strategy, None
    config = engine.create_runtime_config()
    config.set_execution_context_allocation_strategy(strategy)
    if hasattr(trt, "DynamicShapesKernelSpecializationStrategy"):
        # Not lazily: kernels that change during a run change its last bits, and a graph keeps the slow ones.
        config.dynamic_shapes_kernel_specialization_strategy = (
            trt.DynamicShapesKernelSpecializationStrategy.EAGER
        )
    if not hasattr(config, "create_runtime_cache"):
        return config, None
    cache = config.create_runtime_cache()  # without a file too: what one context compiled, the next need not
    with contextlib.suppress(OSError):
        if cache_file is not None:
            cache.deserialize(cache_file.read_bytes())  # says False where it does not fit, and stays empty
    return config, cache if config.set_runtime_cache(cache) else None


def _specs(trt: Any, engine: Any, path: Path) -> tuple[tuple[TensorSpec, ...], tuple[TensorSpec, ...]]:
    """Inputs and outputs.

    Raises:
        GraphError: one is in the host's memory.
    """
    found: dict[Any, list[TensorSpec]] = {trt.TensorIOMode.INPUT: [], trt.TensorIOMode.OUTPUT: []}
    for i in range(engine.num_io_tensors):
        name = engine.get_tensor_name(i)
        if engine.get_tensor_location(name) != trt.TensorLocation.DEVICE:
            raise GraphError(
                f"{path} takes {name!r} in the host's memory, as a shape: expected every tensor on the GPU; "
                "rebuild"
            )
        shape = tuple(None if d < 0 else int(d) for d in engine.get_tensor_shape(name))
        spec = TensorSpec(name, DTYPES[engine.get_tensor_dtype(name).name], shape)
        found[engine.get_tensor_mode(name)].append(spec)
    return tuple(found[trt.TensorIOMode.INPUT]), tuple(found[trt.TensorIOMode.OUTPUT])
