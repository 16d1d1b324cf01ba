"""Sizes of what stands around a network, from its files' headers alone."""

from __future__ import annotations

from ..core.model import TEXT
from ..recipe import Recipe
from .source import Source
from .text import weight_files
from .weights import read_safetensors

DECODER = ("decoder.", "post_quant_conv.", "quantize.")
"""Parts of a first stage that decode."""


def part_elements(recipe: Recipe, source: Source) -> dict[str, int]:
    """Numbers in the weights of the text encoder and of the decoder that the recipe wants.

    Args:
        source: opened without weights.
    Raises:
        ModelError, BackendUnavailable: as `open_parts`.
    """
    found: dict[str, int] = {}
    if source.read_first_stage is not None and recipe.pipeline.decoder:
        named = source.read_first_stage().named_parameters()
        found["decoder"] = sum(value.numel() for name, value in named if name.startswith(DECODER))
    inputs = {spec.name for spec in source.network.info.inputs}
    if TEXT in inputs and recipe.pipeline.text and source.text_encoders:
        held = [read_safetensors(file) for file in weight_files(source)]
        found["text encoder"] = sum(value.numel() for tensors in held for value in tensors.values())
    return found
