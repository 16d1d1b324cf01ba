"""The torch backend: the simulated quantized network of a bundle, on the model it was built from."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from safetensors import SafetensorError
from safetensors.numpy import load_file

from .bundle import MALFORMED, QUANTIZATION, Bundle
from .engine import Engine
from .errors import BackendUnavailable, BundleError
from .precision import Precision
from .quant import Emission, LayerQuant, QuantizedNetwork
from .recipe import Recipe


def _missing(error: ImportError) -> BackendUnavailable:
    return BackendUnavailable(f"backend torch needs torch and diffusers ({error}): pip install 'ptqd-export[build]'")


def set_threads(n: int) -> None:
    """Threads that torch may use in this process.

    Raises:
        BackendUnavailable: torch is not installed.
    """
    try:
        from .calibrate import set_threads as set_torch_threads
    except ImportError as error:
        raise _missing(error) from error
    set_torch_threads(n)


def simulated_engines(bundle: Bundle, precisions: Sequence[Precision], model: Path | None) -> dict[Precision, Engine]:
    """Engines that simulate what the bundle's ORT CPU graphs compute, corrections included; fp16 is simulated in float32.

    Args:
        model: recipe or model that the bundle was built from; its weights must match the bundle's hash.
    Raises:
        BackendUnavailable: torch is not installed.
        BundleError: no model given, or not the bundle's; or its quantization does not fit the model.
    """
    try:
        from .calibrate import SimulatedEngine, TorchEngine, open_model
    except ImportError as error:
        raise _missing(error) from error
    if model is None:
        raise BundleError("backend torch simulates from the original weights, which a bundle does not hold: give --model RECIPE_OR_MODEL")
    network = open_model(Recipe.load(model))
    manifest = bundle.manifest
    if network.info.sha256 != manifest.model.sha256:
        raise BundleError(f"{model} is not the model that {bundle.path} was built from: its weights have another SHA-256")
    try:
        scales = load_file(bundle.file(QUANTIZATION))
        networks = {p: QuantizedNetwork(p, _layers(scales, p, network.module)) for p in precisions if not p.is_float}
    except (SafetensorError, *MALFORMED) as error:
        raise BundleError(
            f"{bundle.file(QUANTIZATION)} does not hold the layers of {model} ({type(error).__name__}: {error}): rebuild the bundle"
        ) from error
    engines: dict[Precision, Engine] = {}
    for precision in precisions:
        if precision.is_float:
            engines[precision] = TorchEngine(network, manifest.schedule)
            continue
        correction = bundle.correction(precision, Emission.ORT_CPU.numerics(precision))
        engines[precision] = SimulatedEngine(network, networks[precision], Emission.ORT_CPU, manifest.schedule, correction)
    return engines


def _layers(scales: Mapping[str, npt.NDArray[Any]], precision: Precision, module: Any) -> dict[str, LayerQuant]:
    """The quantized layers of one precision.

    Raises:
        KeyError, ValueError, AttributeError: not those of `module`.
    """
    head = f"{precision}/"
    layers = {}
    for name in [key[len(head) : -len("/bits")] for key in scales if key.startswith(head) and key.endswith("/bits")]:
        parameters = dict(module.get_submodule(name).named_parameters(recurse=False))
        weight_bits, activation_bits = (int(v) for v in scales[f"{head}{name}/bits"])
        output_scale = float(scales[f"{head}{name}/output_scale"][0])
        fp8 = precision.number == "fp8"
        own, shared = f"{head}{name}/codes", f"codes/{'fp8' if fp8 else f'w{weight_bits}'}/{name}"
        weight = scales[own if own in scales else shared]
        if weight.shape != tuple(parameters["weight"].shape) or weight.dtype != (np.uint8 if fp8 else np.int8):
            raise ValueError(f"layer {name} has weights of shape {weight.shape} and type {weight.dtype}")
        layers[name] = LayerQuant(
            name=name,
            kind="conv" if weight.ndim == 4 else "linear",
            weight=weight,
            weight_scale=scales[f"{head}{name}/weight_scale"],
            weight_bits=weight_bits,
            input_scale=float(scales[f"{head}{name}/input_scale"][0]),
            activation_bits=activation_bits,
            output_scale=None if np.isnan(output_scale) else output_scale,
            bias=parameters["bias"].detach().numpy() if "bias" in parameters else None,
            macs=0,
            number=precision.number,
        )
    return layers
