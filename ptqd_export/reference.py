"""The torch backend: the simulated quantized network of a bundle, on the model it was built from."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
from safetensors.numpy import load_file

from .bundle import QUANTIZATION, Bundle
from .engine import Engine
from .errors import BackendUnavailable, BundleError
from .precision import Precision
from .quant import Emission, LayerQuant, QuantizedNetwork
from .recipe import Recipe


def set_threads(n: int) -> None:
    """Threads that torch may use in this process."""
    from .calibrate import set_threads as set_torch_threads

    set_torch_threads(n)


def simulated_engines(bundle: Bundle, precisions: Sequence[Precision], model: Path | None) -> dict[Precision, Engine]:
    """Engines that simulate what the bundle's ORT CPU graphs compute, corrections included.

    Args:
        model: recipe or model that the bundle was built from; its weights must match the bundle's hash.
    Raises:
        BackendUnavailable: torch is not installed.
        BundleError: no model given, or not the bundle's.
    """
    try:
        from .calibrate import SimulatedEngine, TorchEngine, open_model
    except ImportError as error:
        raise BackendUnavailable(f"backend torch needs torch and diffusers ({error}): pip install 'ptqd-export[build]'") from error
    if model is None:
        raise BundleError("backend torch simulates from the original weights, which a bundle does not hold: give --model RECIPE_OR_MODEL")
    network = open_model(Recipe.load(model))
    manifest = bundle.manifest
    if network.info.sha256 != manifest.model.sha256:
        raise BundleError(f"{model} is not the model that {bundle.path} was built from: its weights have another SHA-256")
    scales = load_file(bundle.file(QUANTIZATION))
    engines: dict[Precision, Engine] = {}
    for precision in precisions:
        if precision.is_float:
            engines[precision] = TorchEngine(network, manifest.schedule)
            continue
        head = f"{precision}/"
        names = [key[len(head) : -len("/bits")] for key in scales if key.startswith(head) and key.endswith("/bits")]
        layers = {}
        for name in names:
            parameters = dict(network.module.get_submodule(name).named_parameters(recurse=False))
            weight_bits, activation_bits = (int(v) for v in scales[f"{head}{name}/bits"])
            output_scale = float(scales[f"{head}{name}/output_scale"][0])
            layers[name] = LayerQuant(
                name=name,
                kind="conv" if parameters["weight"].ndim == 4 else "linear",
                weight=scales[f"codes/w{weight_bits}/{name}"],
                weight_scale=scales[f"{head}{name}/weight_scale"],
                weight_bits=weight_bits,
                input_scale=float(scales[f"{head}{name}/input_scale"][0]),
                activation_bits=activation_bits,
                output_scale=None if np.isnan(output_scale) else output_scale,
                bias=parameters["bias"].detach().numpy() if "bias" in parameters else None,
                macs=0,
            )
        network_at = QuantizedNetwork(precision, layers)
        correction = bundle.correction(precision, Emission.ORT_CPU)
        engines[precision] = SimulatedEngine(network, network_at, Emission.ORT_CPU, manifest.schedule, correction)
    return engines
