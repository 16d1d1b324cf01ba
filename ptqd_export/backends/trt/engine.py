"""TrtEngine: an engine file on a GPU."""

from __future__ import annotations

import contextlib
import dataclasses
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ...core.closing import Closing
from ...core.engine import Array, Feeds, TensorSpec
from ...errors import BackendUnavailable, GraphError
from ..cuda import Buffer, CudaDevice
from .graphs import Graphs
from .loaded import Context, Loaded


class TrtEngine(Closing):
    """An engine file on a GPU, as an `Engine`; `launch` runs it on arrays that are on the GPU already.

    Outputs of a call are fresh arrays that the caller owns. Scratch memory is the device's, shared with its
    other engines. One context serves questions of shape, calls, and all launches that are not captured. An
    engine and its device are used by one thread at a time, whichever it is.
    """

    def __init__(
        self,
        module: Any,
        path: Path,
        device: CudaDevice,
        *,
        built: str = "",
        cache: Path | None = None,
        resident: bool = True,
    ) -> None:
        """Load `path`.

        Args:
            built: by what and for what it was built, such as "tensorrt-rtx 1.7.1.116 for 8.9", for messages.
            cache: file of the kernels that TensorRT-RTX compiles for this GPU when they first run; one that
                does not fit is ignored, and `close` brings it up to date. A file belongs to one engine.
            resident: the weights stay on the GPU; else, where the library can, they are loaded when the
                engine next runs, and `unload` gives their memory back.
        Raises:
            BundleError: the file is missing or damaged, or does not fit this version or this GPU.
            BackendUnavailable: the driver does not serve the library, or memory ran out.
            GraphError: a tensor of the engine is not in the GPU's memory.
        """
        self.path, self._device = path, device
        self._held: dict[str, Buffer] = {}
        self._scratch = (0, 0)
        with device.current():
            self._loaded = Loaded(module, path, device, built=built, cache=cache, resident=resident)
            self._graphs = Graphs(device, self._loaded)
            self._context: Context | None = None
            try:
                self._context = self._loaded.new_context()
                if self._context is None:
                    raise BackendUnavailable(
                        f"{path} cannot be made ready on {device.gpu} ({self._loaded.errors.told()}): free "
                        "some of the GPU's memory"
                    )
                # Contexts want memory of their own even where none is needed.
                device.reserve(max(self._loaded.scratch_bytes, 1))
            except BaseException:
                self._context = None
                self._loaded.close()
                raise

    @property
    def specs(self) -> tuple[TensorSpec, ...]:
        """Of the inputs."""
        return self._loaded.inputs

    @property
    def rows(self) -> Mapping[str, tuple[int, int]]:
        """{input: (fewest, most rows)} of the inputs whose first dimension is dynamic."""
        return self._loaded.rows

    @property
    def inputs(self) -> tuple[str, ...]:
        return tuple(spec.name for spec in self._loaded.inputs)

    @property
    def outputs(self) -> tuple[str, ...]:
        return tuple(spec.name for spec in self._loaded.outputs)

    @property
    def capture_note(self) -> str:
        """How many CUDA graphs its launches replay, or why none."""
        return self._graphs.note

    @property
    def memory(self) -> tuple[int | None, int]:
        """Bytes on the GPU: (weights, where the library tells; scratch that a run needs)."""
        return self._loaded.weight_bytes, self._loaded.scratch_bytes

    def __call__(self, feeds: Feeds) -> dict[str, Array]:
        """Run on `feeds`, which hold at least `inputs`; nothing is captured.

        Raises:
            GraphError: an input is missing, or has the wrong dtype or shape; or the run failed.
            BackendUnavailable: the engine is closed, memory ran out, or the GPU failed.
        """
        context = self._open_context()
        for spec in self.specs:
            value = feeds.get(spec.name)
            if value is None:
                raise GraphError(
                    f"{self.path} needs the input {spec.name!r}: got {', '.join(feeds) or 'none'}"
                )
            self._check_shape(spec, value.dtype.name, value.shape)
        with self._device.current():
            self._follow_scratch(context)
            buffers = {}
            for spec in self.specs:
                value = feeds[spec.name]
                buffers[spec.name] = self._hold(spec, value.shape)
                self._device.write(buffers[spec.name], value)
            self._set_shapes(context, buffers)
            for spec in self._loaded.outputs:
                buffers[spec.name] = self._hold(spec, context.shape(spec.name))
            self._run(context, buffers)
            return {name: self._device.read(buffers[name]) for name in self.outputs}

    def launch(self, buffers: Mapping[str, Buffer]) -> None:
        """Queue a run on arrays on the GPU: `buffers` hold at least `inputs` and `outputs`.

        Shapes and addresses that come a second time are captured as a CUDA graph, where that is possible, and
        replayed from then on; `capture_note` says what came of it.

        Raises:
            GraphError: a buffer is missing, or has the wrong dtype or shape; or the run cannot be queued.
            BackendUnavailable: the engine or its device is closed, or the GPU failed.
        """
        context = self._open_context()
        specs = (*self._loaded.inputs, *self._loaded.outputs)
        try:
            key = tuple(buffers[spec.name] for spec in specs)
        except KeyError as error:
            raise GraphError(
                f"{self.path} needs a buffer {error.args[0]!r}: got {', '.join(buffers) or 'none'}"
            ) from error
        with self._device.current():
            self._follow_scratch(context)
            if self._graphs.replay(key):
                return
            for spec, buffer in zip(specs, key, strict=True):
                self._check_shape(spec, buffer.dtype, buffer.shape)
            self._graphs.launch(key, context, lambda chosen: self._run(chosen, buffers))

    def unload(self) -> None:
        """Give the memory of weights that are not resident back, until the engine next runs.

        Raises:
            BackendUnavailable: the engine is closed, or the GPU failed.
        """
        self._open_context()
        if self._loaded.swaps and self._loaded.has_weights:
            with self._device.current():
                self._device.synchronize()
                self._graphs.drop_all()  # they hold the weights' addresses
                self._loaded.unload_weights()

    def _open_context(self) -> Context:
        if self._context is None:
            raise BackendUnavailable(f"the engine of {self.path} is closed: open it again")
        return self._context

    def _check_shape(self, spec: TensorSpec, dtype: str, got: tuple[int, ...]) -> None:
        fits = len(got) == len(spec.shape) and all(
            want in (None, d) for want, d in zip(spec.shape, got, strict=True)
        )
        if dtype != spec.dtype or not fits:
            shape = "(" + ", ".join("any" if d is None else str(d) for d in spec.shape) + ")"
            raise GraphError(f"{self.path} takes {spec.name!r} as {spec.dtype} {shape}: got {dtype} {got}")
        low, high = self.rows.get(spec.name, (0, sys.maxsize))
        if got and not low <= got[0] <= high:
            raise GraphError(
                f"{self.path} was built for {low} to {high} rows: {spec.name!r} has {got[0]}: "
                "choose another batch size, or build with other tensorrt.batch_sizes"
            )

    def _hold(self, spec: TensorSpec, shape: tuple[int, ...]) -> Buffer:
        """The engine's own memory for a tensor; it grows and never shrinks."""
        held = self._held.get(spec.name)
        if held is None or held.nbytes < Buffer(0, shape, spec.dtype).nbytes:
            if held is not None:
                del self._held[spec.name]
                self._device.free(held)
            held = self._held[spec.name] = self._device.empty(shape, spec.dtype)
        return dataclasses.replace(held, shape=shape)

    def _follow_scratch(self, context: Context) -> None:
        """Take the device's scratch as it is now; where it moved, the graphs hold the old address.

        Raises:
            BackendUnavailable: it is smaller than this engine needs.
        """
        address, size = self._device.scratch
        need = self._loaded.scratch_bytes
        if size < max(need, 1):
            raise BackendUnavailable(
                f"{self.path} needs {need} bytes of scratch memory, the device holds {size}: open the device "
                "and engines again"
            )
        if (address, size) != self._scratch:
            self._graphs.drop_all()
            self._scratch = (address, size)
            context.set_scratch(address, size)

    def _run(self, context: Context, buffers: Mapping[str, Buffer]) -> None:
        """Queue a run on a context, which may be new.

        Raises:
            GraphError: the library does not take the buffers, or fails.
            BackendUnavailable: there is no memory for the weights.
        """
        self._loaded.load_weights()
        self._set_shapes(context, buffers)
        for spec in self._loaded.outputs:
            made = context.shape(spec.name)
            if made != buffers[spec.name].shape:
                raise GraphError(
                    f"{self.path} makes {spec.name!r} of shape {made} from these inputs: got a buffer of "
                    f"{buffers[spec.name].shape}"
                )
        self._loaded.errors.forget()
        if context is not self._context:
            context.set_scratch(*self._scratch)
        for name in (*self.inputs, *self.outputs):
            if not context.set_address(name, buffers[name].ptr):
                raise GraphError(
                    f"{self.path} does not take {name!r} at address {buffers[name].ptr:#x}: "
                    f"{self._loaded.errors.told()}"
                )
        if not context.enqueue(self._device.stream):
            raise GraphError(f"{self.path} failed to run: {self._loaded.errors.told()}")

    def _set_shapes(self, context: Context, buffers: Mapping[str, Buffer]) -> None:
        self._loaded.errors.forget()
        for spec in self._loaded.inputs:
            if None in spec.shape and not context.set_shape(spec.name, buffers[spec.name].shape):
                raise GraphError(
                    f"{self.path} does not take {spec.name!r} of shape {buffers[spec.name].shape}: "
                    f"{self._loaded.errors.told()}"
                )

    def close(self) -> None:
        """Free the engine and save its cache; a second call does nothing."""
        if self._context is None:
            return
        self._context = None
        with contextlib.ExitStack() as stack:
            with contextlib.suppress(BackendUnavailable):  # after a failure of the GPU nothing can be freed
                stack.enter_context(self._device.current())
                self._device.synchronize()
                self._graphs.drop_all()
                for buffer in self._held.values():
                    self._device.free(buffer)
            self._held = {}
            self._loaded.close()
