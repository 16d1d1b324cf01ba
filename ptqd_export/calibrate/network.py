"""Network: a full-precision model that can be called, tried and hashed."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from ..core.engine import Array
from ..core.model import ModelInfo
from ..errors import ModelError


@dataclass(frozen=True)
class Network:
    """A full-precision denoising network.

    Attributes:
        module: the model in eval mode, float32, no gradients; module(sample f32 (B, C, H, W), timestep int64
            (B,), **conditions) returns the raw output, f32 (B, C, H, W). Its submodule paths are the model's
            own ("down_blocks.0.resnets.0.conv1"). On the meta device where it was opened without weights.
        info: shapes, conditions and hash.
        scheduler_config: the diffusers scheduler config, for NoiseSchedule.from_config.
    """

    module: nn.Module
    info: ModelInfo
    scheduler_config: dict[str, Any]


def trial_feeds(info: ModelInfo, n: int) -> dict[str, Array]:
    """Feeds for a forward that only tests whether and how the network runs.

    They are seeded normal samples, with classes in turn.
    """
    generator = np.random.default_rng(0)
    tensors = {
        s.name: generator.standard_normal((n, *s.shape)).astype(np.float32)
        for s in info.inputs
        if s.num_classes is None and not s.default
    }
    sample = generator.standard_normal((n, *info.sample_shape)).astype(np.float32)
    return {"sample": sample, "timestep": np.full(n, 1, np.int64), **info.conditions(None, n, tensors)}


def trial_tensors(network: Network, n: int) -> dict[str, Tensor]:
    """`trial_feeds` where the network's weights are; without numbers for a network without weights."""
    given = {name: torch.from_numpy(value) for name, value in trial_feeds(network.info, n).items()}
    return {name: value.to("meta") for name, value in given.items()} if is_meta(network.module) else given


def is_meta(module: nn.Module) -> bool:
    """Whether the module holds shapes alone."""
    return any(value.is_meta for value in module.parameters())


def try_forward(network: Network) -> None:
    feeds = trial_tensors(network, 2)
    spec = network.info.class_input
    if (
        spec is not None and spec.num_classes is not None
    ):  # the first and last class show whether the embedding is large enough
        feeds[spec.name] = torch.tensor([0, spec.num_classes - 1], device=feeds[spec.name].device)
    expected = tuple(feeds["sample"].shape)
    try:
        with torch.inference_mode():
            output = network.module(**feeds)
    except Exception as error:
        raise ModelError(
            f"{network.info.name} does not run on samples of shape {network.info.sample_shape}: "
            f"{one_line(error)}"
        ) from error
    if not isinstance(output, Tensor):
        raise ModelError(
            f"{network.info.name} returns {type(output).__name__}: expected a tensor, a tuple, or an object "
            "with .sample"
        )
    if tuple(output.shape) == (expected[0], 2 * expected[1], *expected[2:]):
        raise ModelError(
            f"{network.info.name} returns {output.shape[1]} channels for {expected[1]}: a learned variance "
            "is not supported, "
            "use a model that predicts the noise alone"
        )
    if tuple(output.shape) != expected:
        raise ModelError(
            f"{network.info.name} returns shape {tuple(output.shape)} for samples of shape {expected}: "
            "expected the same shape"
        )
    if not output.is_meta and not bool(torch.isfinite(output).all()):
        raise ModelError(
            f"{network.info.name} returns NaN or infinite values for normal noise: check its weights and "
            "config"
        )


def bare(module: nn.Module) -> nn.Module:
    """Make the module's forward return a bare tensor.

    That is the first item of a tuple, or `.sample` of an output object. The object's class is replaced by a
    subclass; wrapping the module would change the submodule paths.
    """
    base = type(module)

    def forward(self: nn.Module, sample: Tensor, timestep: Tensor, **conditions: Tensor) -> Any:
        output = base.forward(self, sample, timestep, **conditions)
        if isinstance(output, Tensor):
            return output
        return output[0] if isinstance(output, tuple | list) else getattr(output, "sample", output)

    module.__class__ = type(base.__name__, (base,), {"forward": forward, "__module__": base.__module__})
    return module


def weights_sha256(config: Mapping[str, Any], module: nn.Module) -> str:
    """SHA-256 of the config and of the tensors by name, in the type that they are used in (float32).

    Of a module without weights: of their names and shapes.
    """
    digest = hashlib.sha256(json.dumps(config, sort_keys=True).encode())
    for key, value in sorted(module.state_dict().items()):
        digest.update(f"{key} {value.dtype} {tuple(value.shape)}".encode())
        if not value.is_meta:
            digest.update(value.contiguous().numpy().tobytes())
    return digest.hexdigest()


def check_finite(key: str, value: Tensor, where: str) -> None:
    if value.is_floating_point() and not bool(torch.isfinite(value).all()):
        raise ModelError(
            f"weight {key!r} of {where} holds NaN or infinite values: the file is damaged or training "
            "diverged"
        )


def one_line(error: BaseException) -> str:
    """A library's exception on one line: its type, and at most 300 characters of its message."""
    return f"{type(error).__name__}: {' '.join(str(error).split())[:300]}"
