"""Finished engines: how they are built, and what is known about a built one.

Builders and bundles share these values.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Protocol, runtime_checkable

from ..errors import RecipeError
from .backend import Floats
from .engine import Feeds

CAPABILITY = re.compile(r"[0-9]{1,2}\.[0-9]")
"""A compute capability, such as "8.9"."""
NOT_BY_DEFAULT = ("7.5",)
"""Compute capabilities that TensorRT-RTX supports, but builds for only where they are named."""
NOT_FOUND, NOT_KNOWN = "not found", "not known"
"""Stand in for a node's type: no computing layer of the plan names the node; the plan does not say."""


@dataclass(frozen=True)
class EngineSettings:
    """How an engine is built.

    Attributes:
        rows: fewest, usual and most rows of one call, the first dimension of the inputs where it is dynamic.
        compute_capabilities: GPUs that a TensorRT-RTX engine is for, such as "8.9"; empty means the library's
            default: all that it supports except NOT_BY_DEFAULT. TensorRT ignores them: it builds for the GPU
            at hand.
        optimization_level: the builder's optimization level, 0 to 5; None is the builder's default.
        workspace_mib: most scratch memory of a layer, in MiB; None is no limit.
    """

    rows: tuple[int, int, int]
    compute_capabilities: tuple[str, ...] = ()
    optimization_level: int | None = None
    workspace_mib: int | None = None

    def __post_init__(self) -> None:
        if not 1 <= self.rows[0] <= self.rows[1] <= self.rows[2]:
            raise RecipeError(
                f"rows {self.rows}: expected fewest, usual and most rows of a call, in this order"
            )
        for capability in self.compute_capabilities:
            if not CAPABILITY.fullmatch(capability):
                raise RecipeError(
                    f"compute capability {capability[:20]!a}: expected major.minor, such as 8.9"
                )

    def for_gpu(self, capability: str) -> EngineSettings:
        """These settings, made to cover a GPU.

        Settings that name GPUs get this one added. Settings that name none keep the library's default, unless
        the default leaves this GPU out: then they name it.
        """
        named = self.compute_capabilities
        if capability in named or (not named and capability not in NOT_BY_DEFAULT):
            return self
        return replace(self, compute_capabilities=(*named, capability))


@dataclass(frozen=True)
class PlanReport:
    """Which layers a compiled graph, such as a finished engine, runs in 8 bits.

    Attributes:
        meant: number of layers that were meant to run in 8 bits.
        taken: number of those that do.
        fell_back: the others: {node name: type that its input has instead, or NOT_FOUND or NOT_KNOWN}.
        kernels: number of layers of the plan that launch work.
        types: {layer type: count} over all layers of the plan.
    """

    meant: int
    taken: int
    fell_back: Mapping[str, str]
    kernels: int
    types: Mapping[str, int]

    @property
    def is_float(self) -> bool:
        """Layers were meant to run in 8 bits, and the plan says of each one that it does not."""
        return self.meant > 0 and self.taken == 0 and NOT_KNOWN not in self.fell_back.values()

    def complaints(self) -> list[str]:
        """One line per layer that was meant to run in 8 bits and does not, or may not.

        The second case is a layer whose type the plan does not say.
        """
        unclear = {
            NOT_FOUND: "is not in the plan by its name",
            NOT_KNOWN: "may or may not run in 8 bits: the plan does not say",
        }
        return [
            f"{layer} {unclear.get(kind, f'fell back: it runs in {kind}')}"
            for layer, kind in self.fell_back.items()
        ]


@runtime_checkable
class Compiled(Protocol):
    """An engine that compiles its graph where it runs, and tells what it made of it.

    `floats` is what it computes in between quantized layers; `report(meant, feeds)` tells which of the nodes
    meant to run in 8 bits do, at the shapes of these feeds.
    """

    floats: Floats

    def report(self, meant: Mapping[str, str], feeds: Feeds) -> PlanReport: ...


@dataclass(frozen=True)
class EngineBuild:
    """How a finished engine was made.

    Attributes:
        key: SHA-256 of graph, settings and versions; the same key is not built again.
        targets: compute capabilities that it is for, such as "8.9".
        settings: the builder's settings.
        seconds: time of parsing and building.
        peak_bytes: most memory that the builder's process held; 0 where the system does not say.
        plan: which layers run in 8 bits.
        weight_bytes: GPU memory of the weights, which every open engine holds for itself; None where the
            library does not say.
        scratch_bytes: GPU memory that it needs while it runs; the engines of a device share the largest. None
            where the library does not say.
        variant: name of the variant of the graph that it was built from; "" is the graph itself.
        notes: what a user should know about it, one line each.
    """

    key: str
    targets: tuple[str, ...]
    settings: EngineSettings
    seconds: float
    peak_bytes: int
    plan: PlanReport
    weight_bytes: int | None = None
    scratch_bytes: int | None = None
    variant: str = ""
    notes: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        if not re.fullmatch(r"[0-9a-f]{64}", self.key):
            raise RecipeError(f"engine key {self.key[:100]!a}: expected 64 hexadecimal digits")
