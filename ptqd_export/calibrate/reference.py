"""The torch backend: a bundle's quantized network, simulated on the model that it was built from."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
import numpy.typing as npt

from ..bundle.bundle import Bundle
from ..bundle.layers import read_layers
from ..core.backend import Emission
from ..core.engine import Engine
from ..core.precision import Precision
from ..core.quant import QuantizedNetwork
from ..errors import BundleError
from ..recipe import Recipe
from .intake import open_model
from .network import Network
from .simulate import simulate
from .torch_engine import TorchEngine


def open_original(bundle: Bundle, model: Path) -> Network:
    """The network that a bundle was built from.

    Args:
        model: a recipe, or what `Recipe.load` takes.
    Raises:
        BundleError: it is another one.
        RecipeError, ModelError: it cannot be read.
    """
    network = open_model(Recipe.load(model))
    if network.info.sha256 != bundle.manifest.sampling.model.sha256:
        raise BundleError(
            f"{model} is not the model that {bundle.path} was built from: its weights have another SHA-256"
        )
    return network


def simulated_engines(
    bundle: Bundle, precisions: Sequence[Precision], model: Path | None
) -> dict[Precision, Engine]:
    """Engines that simulate what the bundle's ORT CPU graphs compute, corrections included.

    fp16 is simulated in float32.

    Args:
        model: recipe or model that the bundle was built from; its weights must match the bundle's hash.
    Raises:
        BundleError: no model is given, it is not the bundle's, or the bundle's quantization does not fit it.
    """
    if model is None:
        raise BundleError(
            "backend torch simulates from the original weights, which a bundle does not hold: give --model "
            "RECIPE_OR_MODEL"
        )
    network, sampling = open_original(bundle, model), bundle.manifest.sampling

    def parameters(name: str) -> Mapping[str, npt.NDArray[np.float32]]:
        found = network.module.get_submodule(name).named_parameters(recurse=False)
        return {key: value.detach().numpy() for key, value in found}

    quantized = [precision for precision in precisions if not precision.is_float]
    layers = read_layers(bundle.reader, quantized, parameters) if quantized else {}
    engines: dict[Precision, Engine] = {}
    for precision in precisions:
        if precision.is_float:
            engines[precision] = TorchEngine(network.module, sampling)
            continue
        module = simulate(network, QuantizedNetwork(precision, layers[precision]), Emission.ORT_CPU)
        engines[precision] = TorchEngine(module, sampling, bundle.correction(precision, Emission.ORT_CPU))
    return engines
