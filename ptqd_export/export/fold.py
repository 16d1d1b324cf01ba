"""The correction, and the change to epsilon, folded into the graph as constant tables.

A network returns o: the noise prediction, or (v- and x0-prediction) what is an affine function of it and of the sample x:

    e = a_i o + b_i x                        NoiseSchedule.epsilon_coefficients
    ec = g_ic e + d_ic                       Correction of step i, channel c
       = (g_ic a_i) o + d_ic + (g_ic b_i) x

so epsilon = gain[step] * output + offset[step] (+ sample_gain[step] * sample), with gain = g a, offset = d, sample_gain = g b.
Gather, Mul and Add on constant tables cost no kernel in TensorRT.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt
import onnx_ir as ir

from ..engine import EPSILON, SAMPLE, STEP
from ..errors import GraphError
from .graph import OUTPUT, Builder, static_dims

FLOAT = ir.DataType.FLOAT


def fold(
    model: ir.Model,
    gain: npt.NDArray[np.floating],
    offset: npt.NDArray[np.floating],
    sample_gain: npt.NDArray[np.floating] | None = None,
) -> ir.Model:
    """A new model that returns epsilon = gain[step] * output + offset[step] (+ sample_gain[step] * sample).

    `step`, int64 (1,), is a further input: the row of the tables, which are kept in float32. Where nothing would be changed
    (gain 1, offset 0, no sample gain), only the output's name is: there is no `step` then.

    Args:
        gain, offset: (T, C).
        sample_gain: (T, C) or (T,), or None.
    Raises:
        GraphError: tables of another shape than (T, C) or with values that are not finite, or a graph whose output is folded already.
    """
    copy = model.clone()
    graph = copy.graph
    output = graph.outputs[0]
    if output.name != OUTPUT:
        raise GraphError(f"the graph's output is {output.name!r}: fold takes a graph whose output is {OUTPUT!r}, once")
    tables = _tables(gain, offset, sample_gain, static_dims(output)[1])
    if not tables:
        output.name = EPSILON
        return copy
    if any(value.name == STEP for value in graph.inputs):
        raise GraphError(f"the model has an input called {STEP!r}, which is the name of the tables' row: rename that input")
    step = ir.Value(name=STEP, type=ir.TensorType(ir.DataType.INT64), shape=ir.Shape([1]))
    graph.inputs.append(step)
    build = Builder(graph)
    raw, epsilon = output, output
    for op, name, table in tables:
        values = build.const(f"ptqd.{name}", table)
        row = build.node(None, "Gather", [values, step], f"ptqd.{name}.row", FLOAT, ir.Shape([1, *table.shape[1:]]), {"axis": 0})
        if name == "sample_gain":
            sample = next(value for value in graph.inputs if value.name == SAMPLE)
            row = build.node(None, "Mul", [sample, row], "ptqd.sample.scaled", FLOAT, raw.shape)
        epsilon = build.node(None, op, [epsilon, row], f"ptqd.{name}.applied", FLOAT, raw.shape)
    epsilon.name = EPSILON
    graph.outputs[0] = epsilon
    return copy


def _tables(
    gain: npt.NDArray[np.floating], offset: npt.NDArray[np.floating], sample_gain: npt.NDArray[np.floating] | None, channels: int | None
) -> list[tuple[str, str, npt.NDArray[np.float32]]]:
    """(operator, name, float32 table (T, C, 1, 1)) of what is to be applied, in order; nothing if all of it is the identity."""
    if gain.ndim != 2 or gain.shape[1] != channels or offset.shape != gain.shape:
        raise GraphError(f"the tables have shapes gain {gain.shape}, offset {offset.shape}: expected (steps, {channels}) both")
    if sample_gain is not None and sample_gain.shape not in (gain.shape, gain.shape[:1]):
        raise GraphError(f"sample_gain has shape {sample_gain.shape}: expected {gain.shape} or {gain.shape[:1]}")
    mixed = None if sample_gain is None or not sample_gain.any() else sample_gain.reshape(len(gain), -1)
    if (gain == 1).all() and not offset.any() and mixed is None:
        return []
    tables = [("Mul", "gain", gain), ("Add", "offset", offset)] + ([] if mixed is None else [("Add", "sample_gain", mixed)])
    for _, name, table in tables:
        if not np.isfinite(table).all():
            raise GraphError(f"the {name} table holds a value that is not finite: check the noise statistics")
    return [(op, name, np.asarray(table, np.float32)[:, :, None, None]) for op, name, table in tables]
