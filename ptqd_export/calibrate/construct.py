"""Build a diffusers model from a config and fill it with weights, so that every mismatch is named."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping
from itertools import chain
from logging import CRITICAL
from typing import Any

import torch
from torch import Tensor, nn

from ..errors import ModelError
from ..typed import brief
from .network import check_finite, one_line

MAX_SIZE, MAX_LAYERS, MAX_LIST = 1_000_000, 100, 64
"""Bounds on numbers in a config, layers of a block and items of a list: far above any model's."""


def construct(config: Mapping[str, Any], where: str) -> nn.Module:
    """The model that a config describes, on the meta device: it takes no memory and holds no numbers.

    Args:
        config: with `_class_name`, a class of diffusers.
        where: the file of the config, for messages.
    Raises:
        ModelError: the config does not describe such a model, or asks for one that no machine could build.
    """
    check_sizes(config, where)
    with torch.device("meta"):
        return _construct(config, where)


def fill(
    module: nn.Module, config: Mapping[str, Any], state: dict[str, Tensor], where: str, weights: bool = True
) -> nn.Module:
    """The model of `construct` with weights, float32, in evaluation mode, without gradients.

    Args:
        state: tensors by the model's names; emptied.
        where: the file or folder of the weights, for messages.
        weights: without them, their names and shapes are checked, no number is read, and the model stays on
            the meta device.
    Raises:
        ModelError: a weight is missing, left over, of another shape, or not finite.
    """
    expected = module.state_dict()
    missing, unexpected = expected.keys() - state.keys(), state.keys() - expected.keys()
    for what, keys in (("lack", missing), ("have beyond the config", unexpected)):
        if keys:
            raise ModelError(
                f"the weights in {where} {what} {len(keys)} tensor{'s' * (len(keys) > 1)}, such as "
                f"{brief(min(keys))}: config and weights are of different models"
            )
    for key, value in sorted(state.items()):
        if value.shape != expected[key].shape:
            raise ModelError(
                f"weight {key!r} in {where} has shape {tuple(value.shape)}: the config expects "
                f"{tuple(expected[key].shape)}"
            )
        if weights:
            check_finite(key, value, where)
    if not weights:
        state.clear()
        return module.float().eval().requires_grad_(False)
    # Copied one by one: a file's tensors lie at any address, and what is computed may depend on that.
    filled = {key: state.pop(key).to(expected[key].dtype, copy=True) for key in sorted(state)}
    module.load_state_dict(filled, strict=True, assign=True)
    if _on_meta(module):  # buffers that are no part of the weights
        module = _construct(config, where)
        module.load_state_dict(filled, strict=True)
    return module.float().eval().requires_grad_(False)


def _construct(config: Mapping[str, Any], where: str) -> nn.Module:
    class_name = config["_class_name"]
    with _quiet_diffusers(), torch.random.fork_rng(devices=[]):
        import diffusers

        try:
            module = getattr(diffusers, class_name).from_config(dict(config))
        except Exception as error:  # the constructor trusts its arguments and fails in many ways
            raise ModelError(f"{where} does not describe a {class_name}: {one_line(error)}") from error
    if not isinstance(module, nn.Module):
        raise ModelError(f"{where} does not describe a {class_name}")
    return module


def _on_meta(module: nn.Module) -> bool:
    """Whether any tensor of a module is still without numbers: a buffer, or a plain attribute."""
    named = chain(module.parameters(), module.buffers())
    plain = (value for part in module.modules() for value in vars(part).values() if isinstance(value, Tensor))
    return any(value.is_meta for value in chain(named, plain))


def check_sizes(config: Any, where: str, key: str = "") -> None:
    """Refuse numbers that no model has: they would keep the constructor busy for ever.

    Raises:
        ModelError: a number is out of bounds; names the key.
    """
    if isinstance(config, Mapping):
        for name, value in config.items():
            check_sizes(value, where, str(name))
    elif isinstance(config, list | tuple):
        if len(config) > MAX_LIST:
            raise ModelError(f"{where} says {brief(key)} of {len(config)} items: expected at most {MAX_LIST}")
        for value in config:
            check_sizes(value, where, key)
    elif isinstance(config, int):
        most = MAX_LAYERS if "layers" in key else MAX_SIZE
        if not -1 <= config <= most:
            raise ModelError(f"{where} says {brief(key)} is {brief(config)}: expected at most {most}")


@contextlib.contextmanager
def _quiet_diffusers() -> Iterator[None]:
    from diffusers.utils import logging

    level = logging.get_verbosity()
    logging.set_verbosity(CRITICAL)
    try:
        yield
    finally:
        logging.set_verbosity(level)
