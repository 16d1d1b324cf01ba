"""What a manifest may say, beyond the types of its fields: it may come from anywhere."""

from __future__ import annotations

import math
import re
import unicodedata
from collections.abc import Collection, Mapping
from typing import Any

from ..core.backend import RUNNABLE
from ..core.bits import LayerSensitivity
from ..core.precision import Precision
from ..errors import RecipeError
from ..typed import brief

MAX_DEPTH, MAX_TEXT = 32, 1000
MAX_LAYERS = 10_000
"""Of one network: large UNets have some hundreds."""
LAYER_BITS = re.compile(r"float|w[2-8]a([2-8]|16)", re.ASCII)
Layers = Mapping[str, tuple[str, ...]]


def check_backend(name: str) -> None:
    """Raise RecipeError for a backend that no bundle is built for."""
    if name not in RUNNABLE:
        raise RecipeError(f"backend {brief(name)} is not known: expected one of {', '.join(RUNNABLE)}")


def check_plain(value: Any, depth: int = 0) -> None:
    """Refuse text that a terminal or a file system could not take, numbers that JSON does not have, and deep
    nesting."""
    if depth > MAX_DEPTH:
        raise RecipeError(f"it is nested more than {MAX_DEPTH} deep")
    if isinstance(value, str):
        if len(value) > MAX_TEXT:
            raise RecipeError(f"a text of {len(value)} characters: expected at most {MAX_TEXT}")
        if any(unicodedata.category(c) in ("Cc", "Cs") for c in value):
            raise RecipeError(f"control characters in {brief(value)}")
    elif isinstance(value, float):
        if not math.isfinite(value):
            raise RecipeError(f"a number is {value}")
    elif isinstance(value, dict):
        for key, item in value.items():
            check_plain(key, depth + 1)
            check_plain(item, depth + 1)
    elif isinstance(value, list):
        for item in value:
            check_plain(item, depth + 1)


def check_layers(
    layers: Mapping[Precision, Layers],
    sensitivities: Mapping[Precision, LayerSensitivity],
    precisions: Collection[Precision],
    n_steps: int,
) -> None:
    """Check the bits of layers, and what those of mixed precisions were chosen by.

    Raises:
        RecipeError: they are not of the bundle's precisions and steps, or name a layer twice, too many
            layers, or ones that are not quantized.
    """
    _check_keys("bits of layers", layers, [p for p in precisions if not p.is_float])
    _check_keys("sensitivities of layers", sensitivities, [p for p in precisions if p.mixed])
    for precision, by_bits in layers.items():
        _check_names(precision, [name for names in by_bits.values() for name in names])
        for bits in by_bits:
            if not LAYER_BITS.fullmatch(bits):
                raise RecipeError(f"bits {brief(bits)} of layers: expected such as w4a8, or float")
    for precision, own in sensitivities.items():
        _check_names(precision, own.layers)
        levels = [level for level in precision.levels if not level.is_float]
        may_be_float = len(levels) < len(precision.levels)
        named = layers[precision].items()
        quantized = {n for bits, names in named if bits != "float" or may_be_float for n in names}
        if unknown := [name for name in own.layers if name not in quantized]:
            raise RecipeError(f"a sensitivity of {brief(unknown[0])}, which is not quantized at {precision}")
        if not {precision.base} <= set(own.noise) <= set(levels):
            expected = ", ".join(map(str, levels))
            raise RecipeError(f"sensitivities of {precision} are of other precisions than {expected}")
        if len(set(own.steps)) < len(own.steps) or not set(own.steps) <= set(range(n_steps)):
            raise RecipeError(f"sensitivities at steps {brief(own.steps)}: expected some of {n_steps}")


def _check_keys(what: str, found: Collection[Precision], expected: Collection[Precision]) -> None:
    if set(found) != set(expected):
        held, wanted = (", ".join(sorted(map(str, ps))) or "nothing" for ps in (found, expected))
        raise RecipeError(f"{what} are of {held}: expected {wanted}")


def _check_names(precision: Precision, names: Collection[str]) -> None:
    if len(names) > MAX_LAYERS:
        raise RecipeError(f"{len(names)} layers at {precision}: expected at most {MAX_LAYERS}")
    if len(set(names)) < len(names):
        raise RecipeError(f"a layer is named twice at {precision}")
    if odd := [name for name in names if not name.isprintable()]:
        raise RecipeError(f"a layer's name, {brief(odd[0])}, holds characters that cannot be printed")
