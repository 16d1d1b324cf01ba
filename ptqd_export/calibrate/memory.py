"""Check that a batch fits into memory, before a long calibration instead of in the middle of it."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn

from ..core.memory import GIB, available_bytes
from ..errors import RecipeError
from .network import Network, trial_tensors

LIVE_LAYERS = 3
"""How many times the largest layer's activations are assumed alive at the peak.

They stand for the layer itself, the skip connections and the scratch memory of the convolution.
"""


def check_memory(network: Network, batch_size: int, branches: int) -> None:
    """Refuse a batch that would not fit.

    The estimate is the bytes of the largest module's inputs and outputs at batch 1, times LIVE_LAYERS, times
    the batch, times the branches (`Sampling.branches`).

    Raises:
        RecipeError: the batch needs more than the free memory; says which batch size fits.
    """
    per_sample = largest_layer_bytes(network) * LIVE_LAYERS * branches
    free = available_bytes()
    if per_sample * batch_size > free:
        fits = free // per_sample
        advice = f"set it to at most {fits}" if fits else "use a machine with more memory"
        raise RecipeError(
            f"calibration.batch_size {batch_size} needs about {per_sample * batch_size / GIB:.1f} GiB for "
            "activations, "
            f"{free / GIB:.1f} GiB is free: {advice}"
        )


def largest_layer_bytes(network: Network) -> int:
    """Bytes of inputs and outputs of the module that has the most, for one sample."""
    largest = 0

    def hook(module: nn.Module, args: Any, kwargs: Any, output: Any) -> None:
        nonlocal largest
        largest = max(largest, sum(t.numel() * t.element_size() for t in tensors_in((args, kwargs, output))))

    handles = [m.register_forward_hook(hook, with_kwargs=True) for m in network.module.modules()]
    try:
        with torch.inference_mode():
            network.module(**trial_tensors(network, 1))
    finally:
        for handle in handles:
            handle.remove()
    return largest


def tensors_in(tree: Any) -> Iterator[Tensor]:
    """Every tensor in nested tuples, lists and dicts."""
    if isinstance(tree, Tensor):
        yield tree
    elif isinstance(tree, dict):
        yield from tensors_in(tuple(tree.values()))
    elif isinstance(tree, list | tuple):
        for item in tree:
            yield from tensors_in(item)
