"""What is read from OpenVINO's models, and what is changed in them before they are compiled."""

from __future__ import annotations

from typing import Any

from ..core.engine import TIMESTEP

LAYERS = frozenset({"Convolution", "GroupConvolution", "MatMul"})
"""Operators that OpenVINO computes in bfloat16 or in 8 bits, of a model as it is read."""
NORMALIZATION = "GroupNormalization"
BINARY = frozenset({"Add", "Subtract", "Multiply", "Divide", "Maximum", "Minimum", "Power"})
UNARY = frozenset({
    "Abs", "Clamp", "Convert", "Elu", "Erf", "Exp", "Gelu", "HSwish", "Mish", "Negative", "Relu", "Sigmoid",
    "SoftPlus", "Sqrt", "Swish", "Tanh",
})  # fmt: skip


def made_of_timesteps(model: Any) -> list[Any]:
    """What the first layers on the way from the timestep take, computed from it without a layer or codes."""
    timed: set[str] = set()
    found: dict[str, Any] = {}
    for op in model.get_ordered_ops():
        name, sources = op.get_friendly_name(), [value.get_source_output() for value in op.inputs()]
        if op.get_type_name() in LAYERS or op.get_type_name() == "FakeQuantize":
            source = sources[0]
            if source.get_node().get_friendly_name() in timed and source.get_element_type().is_real():
                found[source.get_node().get_friendly_name()] = source
        elif name == TIMESTEP or any(source.get_node().get_friendly_name() in timed for source in sources):
            timed.add(name)
    return list(found.values())


def followers(model: Any) -> dict[str, tuple[str, ...]]:
    """{layer: its own name, and those of what follows it alone, up to three}.

    A compiled model may name a layer by what was fused into it.
    """
    found = {}
    for op in model.get_ordered_ops():
        if op.get_type_name() in LAYERS:
            names, at = [op.get_friendly_name()], op
            for _ in range(3):
                targets = list(at.output(0).get_target_inputs()) if at.get_output_size() == 1 else []
                if len(targets) != 1 or targets[0].get_node().get_type_name() in LAYERS:
                    break
                at = targets[0].get_node()
                names.append(at.get_friendly_name())
            found[op.get_friendly_name().removesuffix("/WithoutBiases")] = tuple(names)
    return found


def part_normalizations(model: Any) -> int:
    """Put group normalizations apart that OpenVINO 2026.4 dies of in float32; returns how many.

    They are multiplied by, or added to, what an elementwise operator makes of something else, as by
    1 + scale(t): fused with that into one kernel, the compiler reads a null pointer. Between two changes of
    shape nothing is fused.

    Args:
        model: its shapes are known; it is changed in place.
    """
    from openvino import opset13 as ops

    found = [op for op in model.get_ordered_ops() if op.get_type_name() == NORMALIZATION and _is_mixed(op)]
    for op in found:
        x, scale, bias = op.input_values()
        shape = list(op.output(0).shape)
        flat = [*shape[:2], -1] if len(shape) > 3 else [*shape[:2], -1, 1]
        about = op.get_attributes()
        inner = ops.group_normalization(
            ops.reshape(x, flat, False), scale, bias, about["num_groups"], about["epsilon"]
        )
        outer = ops.reshape(inner, shape, False)
        outer.set_friendly_name(op.get_friendly_name())
        for target in op.output(0).get_target_inputs():
            target.replace_source_output(outer.output(0))
    return len(found)


def _is_mixed(normalization: Any) -> bool:
    """Whether its output meets, in one operator, what another elementwise one makes of something else."""
    consumers = [target.get_node() for target in normalization.output(0).get_target_inputs()]
    return any(
        _is_elementwise(other) and not _made_of(other, normalization)
        for consumer in consumers
        if consumer.get_type_name() in BINARY
        for other in _sources(consumer)
        if other != normalization
    )


def _made_of(op: Any, source: Any) -> bool:
    """Whether the node `source` leads to `op` through elementwise operators alone."""
    waiting, seen = [op], set()
    while waiting:
        for node in _sources(waiting.pop()):
            if node == source:
                return True
            if _is_elementwise(node) and node.get_friendly_name() not in seen:
                seen.add(node.get_friendly_name())
                waiting.append(node)
    return False


def _is_elementwise(op: Any) -> bool:
    return op.get_type_name() in BINARY | UNARY


def _sources(op: Any) -> list[Any]:
    return [value.get_node() for value in op.input_values()]
