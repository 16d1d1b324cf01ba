"""The backends: one table of what each one runs, needs and makes of a precision.

Backend names are written as text in this module only. `ptqd_export.backends` opens a backend; this table
holds what can be known without its library.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from enum import StrEnum
from typing import Literal

from ..errors import BackendUnavailable, RecipeError
from ..typed import brief
from .precision import Precision


class Emission(StrEnum):
    """Which form of graph is emitted from the same weights and input scales.

    PORTABLE: S8 (or FP8) activations at layer inputs only, float bias, float32 in between: the reference, and
        what other tools read.
    HALF: the same codes and scales with float16 in between: what GPU backends run.
    ORT_CPU: integer codes as U8 with zero_point 128, conv outputs quantized too and an int32 bias, so that
        ONNX Runtime fuses every such Conv into a QLinearConv. The quantized outputs add a noise of their own.
    """

    PORTABLE = "portable"
    HALF = "half"
    ORT_CPU = "ort-cpu"

    def numerics(self, precision: Precision) -> Emission:
        """The emission whose simulation and correction tables hold for this one at a precision.

        ORT_CPU has its own where activations are integers; everything else shares those of PORTABLE.
        """
        integers = not precision.is_float and not precision.weight_only and precision.number == "int"
        return Emission.ORT_CPU if self is Emission.ORT_CPU and integers else Emission.PORTABLE


TENSORRT, TENSORRT_RTX, ORT_CUDA, ORT_CPU, TORCH = "tensorrt", "tensorrt-rtx", "ort-cuda", "ort-cpu", "torch"
OPENVINO, OPENVINO_FP32 = "openvino", "openvino-fp32"

Floats = Literal["float32", "float16", "bfloat16"]
"""What a network is computed in between its quantized layers."""
FLOAT_ERROR: Mapping[Floats, float] = {"float32": 1e-4, "float16": 1e-2, "bfloat16": 3e-2}
"""Largest RMS difference from float32 that a network computed in it may have, relative to the RMS of epsilon.

Roundings (2^-24, 2^-11, 2^-8 of a value at most) add up over some hundred operations.
"""


@dataclass(frozen=True)
class Backend:
    """What is known about a backend without its library.

    Attributes:
        name: as users and bundles write it.
        emission: the form of graph that it runs.
        extra: the extra of this package that installs its library.
        distributions: installed packages that decide what it computes, the usual one first.
        builds_engines: it runs a finished engine, built from the graph for certain GPUs; otherwise it loads
            the graph itself.
        on_device: the sampler's state stays in GPU memory, in float32; otherwise on the host, in float64.
        eight_bit: it has 8-bit kernels for quantized layers.
        floats: what networks are computed in between quantized layers, and at fewer than 32 bits,
            where the machine has it.
        compiles: it compiles graphs itself when they are loaded, and tells which layers run in 8 bits
            (`core.engine_build.Compiled`).
    """

    name: str
    emission: Emission
    extra: str
    distributions: tuple[str, ...]
    builds_engines: bool = False
    on_device: bool = False
    eight_bit: bool = True
    floats: Floats = "float32"
    compiles: bool = False

    @property
    def state(self) -> str:
        """Where a run keeps x_t, and in which type, in words."""
        return "float32 on the device" if self.on_device else "float64 on the host"

    def missing(self, error: ImportError) -> BackendUnavailable:
        """The error to raise where its library is not installed."""
        return BackendUnavailable(
            f"backend {self.name} is not installed ({error}): {install_hint(self.extra)}"
        )

    def lowering(self, precision: Precision) -> str:
        """The arithmetic that this backend uses at a precision, in words.

        The name of a precision alone says nothing about speed.
        """
        if precision.weight_bits == 32:
            return "float32"
        floats, half = self.floats, self.emission is Emission.HALF
        if precision.is_float:
            return floats if half else "float32"  # every other emission writes float32
        if precision.weight_only:
            return f"{floats}; weights stored as {'packed INT4' if precision.weight_bits <= 4 else 'INT8'}"
        if not self.eight_bit:
            return "codes dequantized, then float16: this provider has no 8-bit kernels"
        if precision.number == "fp8":
            return "E4M3 x E4M3 at layer inputs, float16 in between" if half else f"E4M3 emulated in {floats}"
        widths = ((precision.weight_bits, "weights"), (precision.activation_bits, "activations"))
        narrow = ", ".join(f"{bits}-bit {what} on a grid inside INT8" for bits, what in widths if bits < 8)
        if precision.mixed and narrow:
            narrow = "each layer's bits on a grid inside INT8"
        kernel = (
            "QLinearConv: U8 activations (zero_point 128) x S8 weights, conv outputs in 8 bits"
            if self.emission is Emission.ORT_CPU
            else f"S8 x S8 at layer inputs, {floats} in between"
        )
        few = "; the noisiest layers in float" if precision.levels[-1].is_float else ""
        return f"{kernel}; {narrow or 'full 8-bit range'}{few}"


BACKENDS: Mapping[str, Backend] = {
    backend.name: backend
    for backend in (
        Backend(
            TENSORRT,
            Emission.HALF,
            "tensorrt",
            ("tensorrt",),
            builds_engines=True,
            on_device=True,
            floats="float16",
        ),
        Backend(
            TENSORRT_RTX,
            Emission.HALF,
            "tensorrt-rtx",
            ("tensorrt-rtx-cu13",),
            builds_engines=True,
            on_device=True,
            floats="float16",
        ),
        Backend(
            ORT_CUDA,
            Emission.HALF,
            "gpu",
            ("onnxruntime-gpu",),
            on_device=True,
            eight_bit=False,
            floats="float16",
        ),
        Backend(OPENVINO, Emission.PORTABLE, "openvino", ("openvino",), floats="bfloat16", compiles=True),
        Backend(OPENVINO_FP32, Emission.PORTABLE, "openvino", ("openvino",), compiles=True),
        Backend(ORT_CPU, Emission.ORT_CPU, "cpu", ("onnxruntime", "onnxruntime-gpu")),
        Backend(TORCH, Emission.ORT_CPU, "build", ("torch", "diffusers")),
    )
}
"""All backends, best first: a run tries them in this order, and lists name them in it."""

RUNNABLE = tuple(name for name in BACKENDS if name != TORCH)
"""Backends that run a bundle's own files; the torch backend simulates any bundle from the original model."""
AUTOMATIC = tuple(name for name in RUNNABLE if name != OPENVINO_FP32)
"""Backends that a run chooses between by itself: OPENVINO computes in float32 too where it must."""
ENGINE_BACKENDS = tuple(name for name, backend in BACKENDS.items() if backend.builds_engines)
"""Backends that run finished engines."""


def backend(name: str) -> Backend:
    """The entry of a backend.

    Raises:
        RecipeError: there is no such backend.
    """
    if name not in BACKENDS:
        raise RecipeError(f"backend {brief(name)} is not known: expected one of {', '.join(BACKENDS)}")
    return BACKENDS[name]


def install_hint(extra: str) -> str:
    """How to install an extra: from a checkout, because ptqd-export has no release on PyPI yet."""
    return f"in a checkout of ptqd-export: pip install '.[{extra}]'"
