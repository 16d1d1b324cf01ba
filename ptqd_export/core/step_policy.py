"""Plans as others write them for transformers: `diffusion_step_policy`, version 1, type first_last_n.

It lies in a checkpoint's config.json under quantization_config.runtime, and knows two modes: "native", the
layers as they were quantized, and "a16", which takes activations of 16 bits. Its indices count iterations of
the denoising loop. A run of one step stays native. A field that is not known is refused, as all readers of
the schema do.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from ..errors import RecipeError
from ..typed import brief, read_typed, to_plain
from .plan import MAX_STEPS, Plan
from .precision import HALF_BITS, Precision

NAME = "diffusion_step_policy"
OUTSIDE = ("quantization_config", "runtime", NAME)
"""Tables around a policy in a config.json; a file may begin at any of them."""
SCOPES = ("transformer", "unet")
"""What a pipeline calls the network that denoises."""


@dataclass(frozen=True)
class Edge:
    """The first or the last steps."""

    count: int
    mode: Literal["a16"]


@dataclass(frozen=True)
class StepPolicy:
    """The policy as its file has it; `reasoner` is of models that have one, and means nothing here."""

    schema_version: int
    type: Literal["first_last_n"]
    index_space: Literal["denoising_loop_iteration"]
    scope: tuple[str, ...]
    default_mode: Literal["native"]
    first_steps: Edge
    last_steps: Edge
    overlap: Literal["a16", "native"]
    reasoner: Literal["a16", "native"]

    def __post_init__(self) -> None:
        if self.schema_version != 1:
            raise RecipeError(f"{NAME} has schema_version {brief(self.schema_version)}: expected 1")
        if not set(self.scope) & set(SCOPES):
            raise RecipeError(f"{NAME} is for {brief(list(self.scope))}: expected {' or '.join(SCOPES)}")
        for edge in (self.first_steps, self.last_steps):
            if not 0 <= edge.count <= MAX_STEPS:
                raise RecipeError(f"{NAME} has {edge.count} steps at an end: expected 0 to {MAX_STEPS}")

    def plan(self, n_steps: int, native: Precision, a16: Precision) -> Plan:
        """The plan of n_steps steps, with a precision for each mode."""
        first, last = self.first_steps.count, n_steps - self.last_steps.count
        if n_steps == 1:
            return Plan((native,))
        precise = [
            self.overlap == "a16" if step < first and step >= last else step < first or step >= last
            for step in range(n_steps)
        ]
        return Plan(tuple(a16 if here else native for here in precise))


def read_policy(text: str | bytes) -> StepPolicy:
    """From JSON: the policy alone, or a config.json that holds it.

    Raises:
        RecipeError: not JSON, no policy, or one that this reader does not know.
    """
    try:
        data: Any = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise RecipeError(f"not valid JSON ({brief(str(error))}): expected a {NAME}") from error
    for i, outer in enumerate(OUTSIDE):
        if isinstance(data, dict) and outer in data:
            for name in OUTSIDE[i:]:
                data = data.get(name) if isinstance(data, dict) else None
            break
    policy: StepPolicy = read_typed(StepPolicy, data, NAME)
    return policy


def modes(precisions: Iterable[Precision]) -> tuple[Precision, Precision]:
    """What stands for the modes native and a16 among a bundle's precisions.

    Native is the most precise one that quantizes activations; a16 the same weights with 16-bit activations,
    else the narrowest float.

    Raises:
        RecipeError: there is none for one of the modes.
    """
    held = sorted(precisions)
    quantized = [p for p in held if p.activation_bits < HALF_BITS]
    wide = [p for p in held if p.activation_bits >= HALF_BITS]
    if not quantized or not wide:
        lacks, such = ("quantized activations", "w8a8") if wide else ("16-bit activations", "w8a16 or fp16")
        raise RecipeError(
            f"a {NAME} needs a precision with {lacks} and there is none among {', '.join(map(str, held))}: "
            f"build with --precision {such}"
        )
    native = max(quantized, key=lambda p: (p.weight_bits + p.activation_bits, p.mixed, p.number == "int"))
    same = [p for p in wide if p.weight_bits == native.weight_bits]
    return native, (same or sorted((p for p in wide if p.is_float), key=lambda p: p.weight_bits) or wide)[0]


def write_policy(plan: Plan) -> str:
    """The JSON text of a plan, inside the tables of a config.json.

    Raises:
        RecipeError: the plan is more than two modes, one of them for the first and last steps.
    """
    runs = list(plan.runs())
    wide = [precision.activation_bits >= HALF_BITS for precision, _ in runs]
    native = [len(steps) for (_, steps), here in zip(runs, wide, strict=True) if not here]
    ends = len({p for p, _ in runs if p.activation_bits >= HALF_BITS}) <= 1 and len(native) == 1
    if not ends or (len(plan) == 1 and wide[0]):
        raise RecipeError(
            f"the plan {plan} cannot be written as a {NAME}: that knows one precision with quantized "
            "activations, and one with 16-bit activations for the first and the last steps"
        )
    first = len(runs[0][1]) if wide[0] else 0
    last = len(plan) - first - native[0]
    return json.dumps(_inside(_policy(first, last)), indent=1) + "\n"


def _policy(first: int, last: int) -> StepPolicy:
    scope: Sequence[str] = SCOPES[:1]
    return StepPolicy(
        1,
        "first_last_n",
        "denoising_loop_iteration",
        tuple(scope),
        "native",
        Edge(first, "a16"),
        Edge(last, "a16"),
        "a16",
        "a16",
    )


def _inside(policy: StepPolicy) -> Mapping[str, Any]:
    inner: Any = to_plain(policy)
    for name in reversed(OUTSIDE):
        inner = {name: inner}
    return dict(inner)
