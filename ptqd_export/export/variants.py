"""Other forms of a half graph, for a builder that refuses the usual one or takes nothing of it in 8 bits.

Codes stay equal, bit for bit, and nodes keep their names.

Float clip. A grid narrower than 8 bits is Q -> Clip(int8 codes lo, hi) -> DQ, with scale s, zero point 0:

    clip(round(x / s), lo, hi) = round(clip(x, lo s, hi s) / s),  round being monotone, lo s / s near lo

Half scales. DequantizeLinear's result has its scale's type: DQ(s) -> Cast(float16) is DQ(float16(s)), whose
values differ by the rounding of s alone, relatively 2**-11 at most, while s is a normal float16 number. Q
keeps its float32 scale, and with it the codes.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt
import onnx_ir as ir
from onnx_ir.convenience import get_const_tensor

from .graph import Builder, load, producer, prune, take_over
from .half import HALF

LIMITS = np.finfo(np.float16)


@dataclass(frozen=True)
class Variant:
    """A new model; how many places of it were rewritten; and {node: why it was left as it was}."""

    model: ir.Model
    rewritten: int
    left: Mapping[str, str]


def float_clip(model: ir.Model) -> Variant:
    """Clip the float in front of QuantizeLinear in place of the codes behind it."""
    copy = model.clone()
    build, rewritten, left = Builder(copy.graph), 0, dict[str, str]()
    for clip in [node for node in copy.graph if node.op_type == "Clip"]:
        quantize = producer(clip.inputs[0], "QuantizeLinear")
        if quantize is None:
            continue
        why = _clip(build, clip, quantize)
        if why:
            left[str(clip.name)] = why
        else:
            rewritten += 1
    return Variant(prune(copy), rewritten, left)


def _clip(build: Builder, clip: ir.Node, quantize: ir.Node) -> str:
    """Rewrite one Clip; else why not."""
    x, codes, clipped = quantize.inputs[0], quantize.outputs[0], clip.outputs[0]
    scale = _constant(quantize.inputs[1])
    limits = [limit for limit in map(_constant, clip.inputs[1:3]) if limit is not None]
    if x is None or scale is None or scale.size != 1 or len(limits) != 2:
        return "its limits and its scale are not one constant each"
    zero = _constant(quantize.inputs[2]) if len(quantize.inputs) > 2 else None
    if zero is not None and np.any(zero.astype(np.float32) != 0):
        return "its zero point is not 0"
    if len(codes.consumers()) > 1 or codes.is_graph_output():
        return "its codes are used unclipped too"
    kind = np.float16 if x.dtype is HALF else np.float32
    codes_at = np.array([float(limit.reshape(())) for limit in limits])
    with np.errstate(over="ignore", under="ignore"):
        bounds = (codes_at * scale.reshape(()).astype(np.float64)).astype(kind)
        back = np.rint(bounds.astype(np.float32) / scale.reshape(()).astype(np.float32))
    if not np.array_equal(back, codes_at):
        return f"its scale {float(scale.reshape(())):.3g} has no such limits in {np.dtype(kind).name}"
    low, high = (
        build.const(f"{x.name}.{word}", bound) for word, bound in zip(("low", "high"), bounds, strict=True)
    )
    value = build.node(
        quantize, "Clip", [x, low, high], f"{x.name}.clipped", ir.DataType.from_numpy(np.dtype(kind)), x.shape
    )
    node = producer(value)
    assert node is not None
    node.metadata_props.update(clip.metadata_props)
    quantize.replace_input_with(0, value)
    take_over(clipped, codes)
    return ""


def half_scales(model: ir.Model) -> Variant:
    """Give DequantizeLinear a float16 scale in place of the Cast to float16 behind it."""
    copy = model.clone()
    build, rewritten, left = Builder(copy.graph), 0, dict[str, str]()
    halves: dict[ir.Value, ir.Value] = {}
    for node in [node for node in copy.graph if node.op_type == "DequantizeLinear"]:
        casts = [use for use, _ in node.outputs[0].uses() if _casts_to_half(use)]
        if not casts:
            continue
        why = _half_scale(build, node, casts, halves)
        if why:
            left[str(node.name)] = why
        else:
            rewritten += 1
    return Variant(prune(copy), rewritten, left)


def _half_scale(build: Builder, node: ir.Node, casts: list[ir.Node], halves: dict[ir.Value, ir.Value]) -> str:
    """Rewrite one DequantizeLinear; else why not."""
    value, held = node.outputs[0], node.inputs[1]
    scale = _constant(held)
    if held is None or scale is None:
        return "its scale is not a constant"
    if len(casts) < len(value.uses()) or value.is_graph_output():
        return "its float32 result is used too"
    magnitude = np.abs(scale.astype(np.float32))
    if magnitude.max(initial=0) > float(LIMITS.max) or magnitude.min(initial=1) < float(LIMITS.tiny):
        span = f"from {magnitude.min():.3g} to {magnitude.max():.3g}"
        return f"its scales, {span}, are not all normal float16 numbers"
    if held not in halves:
        halves[held] = build.const(f"{held.name}.half", scale.astype(np.float16))
    node.replace_input_with(1, halves[held])
    value.type = ir.TensorType(
        HALF
    )  # setting dtype would write to the type that the copy shares with the original
    for cast in casts:
        take_over(cast.outputs[0], value)
    return ""


def _casts_to_half(node: ir.Node) -> bool:
    return node.op_type == "Cast" and node.attributes["to"].as_int() == HALF


def _constant(value: ir.Value | None) -> npt.NDArray[np.generic] | None:
    tensor = None if value is None else get_const_tensor(value)
    return None if tensor is None else tensor.numpy()


def write_variants(graph: Path) -> Iterator[Path]:
    """Variants of a saved half graph, each beside it, written when it is asked for and removed after its use.

    Raises:
        GraphError: `graph` is not an ONNX graph.
    """
    clipped = float_clip(load(graph)).model
    for name, model in (("float_clip", clipped), ("half_scales", half_scales(clipped).model)):
        file = graph.with_name(f".{name}.onnx")
        try:
            file.write_bytes(ir.to_proto(model).SerializeToString(deterministic=True))
            yield file
        finally:
            file.unlink(missing_ok=True)
