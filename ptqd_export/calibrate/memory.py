"""Check that a batch fits into memory, before a long calibration instead of in the middle of it."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ..errors import RecipeError
from .network import Network, trial_tensors

LIVE_LAYERS = 3
"""How many times the largest layer's activations are assumed alive at the peak.

They stand for the layer itself, the skip connections and the scratch memory of the convolution.
"""
GIB = 1 << 30


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


def available_bytes() -> int:
    """Free memory in bytes: what the system has left, but no more than the control group's limit leaves."""
    meminfo = Path("/proc/meminfo")
    if meminfo.exists():
        fields = dict(line.split(":", 1) for line in meminfo.read_text().splitlines())
        free = int(fields["MemAvailable"].split()[0]) * 1024
    else:  # macOS does not report free memory: the installed memory is the bound there
        free = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    group = Path("/sys/fs/cgroup")
    limit = (group / "memory.max").read_text().strip() if (group / "memory.max").exists() else "max"
    if limit != "max":
        stat = dict(line.split() for line in (group / "memory.stat").read_text().splitlines())
        used = int((group / "memory.current").read_text()) - int(
            stat["inactive_file"]
        )  # the kernel reclaims inactive page cache
        free = min(free, max(0, int(limit) - used))
    return free
