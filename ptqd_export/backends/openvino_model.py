"""What is read from OpenVINO's models, and what is changed in them before they are compiled."""

from __future__ import annotations

from typing import Any

import numpy as np

from ..core.engine import TIMESTEP

LAYERS = frozenset({"Convolution", "GroupConvolution", "MatMul"})
"""Operators that OpenVINO computes in bfloat16 or in 8 bits, of a model as it is read."""
NORMALIZATION = "GroupNormalization"


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


def widen_weights(model: Any) -> None:
    """Make constants in float32 of the weights of quantized layers.

    For processors where 8-bit products saturate (`ort_device.saturates`). There OpenVINO lets them, or halves
    the weights, which loses their last bit. Such a layer is computed in float32, from the codes that its
    input is rounded to.

    Args:
        model: as it is read; it is changed in place.
    """
    from openvino import opset13 as ops

    found = model.get_ordered_ops()
    if not any(op.get_type_name() == "FakeQuantize" for op in found):
        return  # inputs are float
    for op in found:
        codes, scale = _dequantized(op)
        if codes is not None:
            wide = ops.constant(codes.astype(np.float32) * scale)
            wide.set_friendly_name(op.get_friendly_name())
            for target in op.output(0).get_target_inputs():
                target.replace_source_output(wide.output(0))


def _dequantized(op: Any) -> tuple[Any, Any]:
    """The int8 codes and the scales that an operator multiplies, as arrays; None for any other operator."""
    if op.get_type_name() != "Multiply":
        return None, None
    cast, scale = (value.get_node() for value in op.input_values())
    if cast.get_type_name() != "Convert":
        return None, None
    codes = cast.input_value(0).get_node()
    if codes.get_type_name() != "Constant" or codes.get_element_type().get_type_name() != "i8":
        return None, None
    shape = list(scale.output(0).shape)
    if scale.get_type_name() == "Reshape":
        scale = scale.input_value(0).get_node()
    if scale.get_type_name() != "Constant":
        return None, None
    return codes.data, np.array(scale.data).reshape(shape)


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

    Their output meets, before the next layer, what was computed of something else: it is multiplied by
    1 + scale(t), say. Fused with what computes that into one kernel, the compiler reads a null pointer.
    Between two changes of shape nothing is fused. Some are parted that it would not die of, which costs
    little.

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
    """Whether its output meets other computed values on its way to the next layers or normalizations."""
    waiting, made = [normalization], {normalization.get_friendly_name()}
    inputs = []
    while waiting:
        outputs = waiting.pop().outputs()
        for op in (target.get_node() for output in outputs for target in output.get_target_inputs()):
            if op.get_type_name() in LAYERS | {NORMALIZATION, "Result"} or op.get_friendly_name() in made:
                continue
            made.add(op.get_friendly_name())
            inputs += [value.get_node() for value in op.input_values()]
            waiting.append(op)
    return any(
        op.get_type_name() not in ("Constant", "Parameter") and op.get_friendly_name() not in made
        for op in inputs
    )


def part_concatenations(model: Any) -> int:
    """Put an operator that changes nothing behind concatenations that one thing takes; returns how many.

    Where that is a quantization, OpenVINO 2026.4 quantizes what comes into the concatenation instead
    (`MoveFakeQuantize`): codes of images are wrong then, off by up to a whole unit where a step is 0.03, and
    sequences fail to compile. A PRelu of slope 1 is not taken for the identity that it is, and leaves the
    next layer in 8 bits, which a change of shape would not.

    Args:
        model: its shapes are known; it is changed in place.
    """
    from openvino import opset13 as ops

    count = 0
    for op in [op for op in model.get_ordered_ops() if op.get_type_name() == "Concat"]:
        # What asks for the shape alone goes when the model is compiled.
        targets = [t for t in op.output(0).get_target_inputs() if t.get_node().get_type_name() != "ShapeOf"]
        if len(targets) == 1 and op.get_element_type().is_real():
            apart = ops.prelu(op.output(0), np.ones(1, np.float32))
            targets[0].replace_source_output(apart.output(0))
            count += 1
    return count
