"""The correction, and the conversion to epsilon, folded into the graph as constant tables.

A network returns o: the noise prediction, or for v- and x0-prediction an affine function of it and of the
sample x:

    e = a_i o + b_i x                        NoiseSchedule.epsilon_coefficients
    ec = g_ic e + d_ic                       Correction of step i, channel c
       = (g_ic a_i) o + d_ic + (g_ic b_i) x

So epsilon = gain[step] * output + offset[step] (+ sample_gain[step] * sample), with gain = g a, offset = d
and sample_gain = g b. Gather, Mul and Add on constant tables cost no kernel in TensorRT.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt
import onnx_ir as ir

from ..core.engine import EPSILON, SAMPLE, STEP
from ..core.noise import Correction
from ..core.schedule import NoiseSchedule
from ..errors import GraphError
from .dialect import OUTPUT
from .graph import Builder, static_dims

FLOAT = ir.DataType.FLOAT
F64 = npt.NDArray[np.float64]


def fold(model: ir.Model, schedule: NoiseSchedule, correction: Correction) -> ir.Model:
    """A new model that returns the corrected epsilon in place of the network's raw output.

    It has the further input `step`, int64 (1,): the row of the tables, which are stored in float32. Where the
    tables would change nothing (gain 1, offset 0, no sample gain), only the output is renamed, and there is
    no input `step`.

    Args:
        schedule: T steps, prediction type.
        correction: gain, offset (T, C).
    Raises:
        GraphError: the tables have another shape than (T, C) or values that are not finite, or the graph's
            output is folded already.
    """
    a, b = schedule.epsilon_coefficients()
    if len(a) != len(correction.gain):
        raise GraphError(
            f"the correction has {len(correction.gain)} steps, the schedule {len(a)}: expected as many"
        )
    gain, sample_gain = correction.gain * a[:, None], correction.gain * b[:, None]
    copy = model.clone()
    graph = copy.graph
    output = graph.outputs[0]
    if output.name != OUTPUT:
        raise GraphError(
            f"the graph's output is {output.name!r}: fold takes a graph whose output is {OUTPUT!r}, once"
        )
    tables = _tables(gain, correction.offset, sample_gain, static_dims(output)[1])
    if not tables:
        output.name = EPSILON
        return copy
    if any(value.name == STEP for value in graph.inputs):
        raise GraphError(
            f"the model has an input called {STEP!r}, which is the name of the tables' row: rename that input"
        )
    step = ir.Value(name=STEP, type=ir.TensorType(ir.DataType.INT64), shape=ir.Shape([1]))
    graph.inputs.append(step)
    build = Builder(graph)
    raw, epsilon = output, output
    for op, name, table in tables:
        values = build.const(f"ptqd.{name}", table)
        row = build.node(
            None,
            "Gather",
            [values, step],
            f"ptqd.{name}.row",
            FLOAT,
            ir.Shape([1, *table.shape[1:]]),
            {"axis": 0},
        )
        if name == "sample_gain":
            sample = next(value for value in graph.inputs if value.name == SAMPLE)
            row = build.node(None, "Mul", [sample, row], "ptqd.sample.scaled", FLOAT, raw.shape)
        epsilon = build.node(None, op, [epsilon, row], f"ptqd.{name}.applied", FLOAT, raw.shape)
    epsilon.name = EPSILON
    graph.outputs[0] = epsilon
    return copy


def _tables(
    gain: F64, offset: F64, sample_gain: F64, channels: int | None
) -> list[tuple[str, str, npt.NDArray[np.float32]]]:
    """The operations to apply, in order: (operator, name, float32 table (T, C, 1, 1)).

    Identities are left out.
    """
    if gain.ndim != 2 or gain.shape[1] != channels or offset.shape != gain.shape:
        raise GraphError(
            f"the tables have shapes gain {gain.shape}, offset {offset.shape}: expected (steps, {channels}) "
            "both"
        )
    if (gain == 1).all() and not offset.any() and not sample_gain.any():
        return []
    tables = [("Mul", "gain", gain), ("Add", "offset", offset)]
    if sample_gain.any():
        tables.append(("Add", "sample_gain", sample_gain))
    for _, name, table in tables:
        if not np.isfinite(table).all():
            raise GraphError(f"the {name} table holds a value that is not finite: check the noise statistics")
    return [(op, name, np.asarray(table, np.float32)[:, :, None, None]) for op, name, table in tables]
