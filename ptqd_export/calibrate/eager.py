"""A network in plain torch, as a user would run it, to be timed."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from ..core.engine import SAMPLE, TIMESTEP, Feeds
from ..errors import BackendUnavailable
from ..recipe import Recipe
from .intake import open_source
from .network import one_line
from .torch_engine import as_tensor, set_threads


def eager_call(
    recipe: Recipe, feeds: Feeds, threads: int, *, half: bool = False, compiled: bool = False
) -> Callable[[], object]:
    """A call of a recipe's network on the same numbers each time.

    Args:
        half: channels_last, and bfloat16 by autocast; else float32.
        compiled: by torch.compile, which needs a C++ compiler.
    Raises:
        ModelError: the model cannot be read.
        BackendUnavailable: torch.compile does not work here.
    """
    set_threads(threads)
    network = open_source(recipe).network
    module: Any = network.module
    sample, timestep = as_tensor(feeds[SAMPLE]), as_tensor(feeds[TIMESTEP])
    conditions = {spec.name: as_tensor(feeds[spec.name]) for spec in network.info.inputs}
    if half:
        module, sample = (value.to(memory_format=torch.channels_last) for value in (module, sample))
    if compiled:
        module = torch.compile(module)

    def call() -> object:
        with torch.inference_mode(), torch.autocast("cpu", torch.bfloat16, enabled=half):
            return module(sample, timestep, **conditions)

    if compiled:
        try:
            call()
        except Exception as error:  # whatever the compiler's tools raise
            raise BackendUnavailable(f"torch.compile does not work here: {one_line(error)}") from error
    return call
