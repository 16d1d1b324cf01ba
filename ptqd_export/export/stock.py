"""A network's graph with the interface that stock pipelines expect of a UNet.

sample f32 (batch, C, H, W), timestep f32 (), conditions -> out_sample f32 (batch, C, H, W)

The scheduler of such a pipeline takes what the network was trained to return, o, and not epsilon. With
ec = g e + d (`Correction`) and e = a o + b x (`NoiseSchedule.epsilon_coefficients`), the corrected output is

    oc = (ec - b x) / a = g o + d / a + (g - 1) (b / a) x

so the graph stays as `fold` made it, with other numbers in its tables. Their row is looked up by the
timestep.
"""

from __future__ import annotations

import numpy as np
import onnx_ir as ir

from ..core.engine import EPSILON, SAMPLE, STEP, TIMESTEP
from ..core.noise import Correction
from ..core.schedule import NoiseSchedule
from ..errors import GraphError
from .dialect import BATCH
from .graph import Builder

FLOAT, INT64 = ir.DataType.FLOAT, ir.DataType.INT64
STOCK_OUTPUT = "out_sample"


def stock_unet(model: ir.Model, schedule: NoiseSchedule, correction: Correction) -> ir.Model:
    """A copy of a folded graph that a stock pipeline's scheduler can be used with.

    The correction is that of the step whose timestep is nearest; of evaluations at one timestep, the first.

    Args:
        model: from `fold`, with this schedule and correction.
    Raises:
        GraphError: the graph's tables have other shapes.
    """
    copy = model.clone()
    graph, build = copy.graph, Builder(copy.graph)
    first = graph[0]
    inputs = {str(value.name): value for value in graph.inputs}
    rows = build.node(
        first, "Shape", [inputs[SAMPLE]], "ptqd.rows", INT64, ir.Shape([1]), {"start": 0, "end": 1}
    )
    batched = inputs[TIMESTEP]
    given = ir.Value(name=TIMESTEP, type=ir.TensorType(FLOAT), shape=ir.Shape([]))
    batched.name = build.name("ptqd.timestep")
    t = given
    if batched.dtype == INT64:
        t = build.node(first, "Round", [t], "ptqd.timestep.round", FLOAT, given.shape)
        t = build.node(first, "Cast", [t], "ptqd.timestep.whole", INT64, given.shape, {"to": INT64.value})
    dtype = INT64 if batched.dtype == INT64 else FLOAT
    every = build.node(first, "Expand", [t, rows], "ptqd.timestep.rows", dtype, ir.Shape([BATCH]))
    batched.replace_all_uses_with(every)
    if STEP in inputs:
        _retable(graph, schedule, correction)
        known = build.const("ptqd.timesteps", schedule.timesteps.astype(np.float32))
        far = build.node(first, "Sub", [known, given], "ptqd.timestep.away", FLOAT, known.shape)
        far = build.node(first, "Abs", [far], "ptqd.timestep.distance", FLOAT, known.shape)
        attributes = {"axis": 0, "keepdims": 1}
        nearest = build.node(first, "ArgMin", [far], "ptqd.step", INT64, ir.Shape([1]), attributes)
        inputs[STEP].replace_all_uses_with(nearest)
    kept = [value for name, value in inputs.items() if name not in (TIMESTEP, STEP)]
    graph.inputs.clear()
    graph.inputs.extend([kept[0], given, *kept[1:]])
    output = next(value for value in graph.outputs if value.name == EPSILON)
    output.name = STOCK_OUTPUT
    return copy


def with_offset(model: ir.Model, name: str, offset: float) -> ir.Model:
    """A copy of a graph that adds a number to one of its inputs."""
    copy = model.clone()
    graph, build = copy.graph, Builder(copy.graph)
    value = next(value for value in graph.inputs if value.name == name)
    uses = list(value.uses())
    moved = build.node(
        graph[0],
        "Add",
        [value, build.const("ptqd.shift", np.array(offset, np.float32))],
        "ptqd.shifted",
        FLOAT,
        value.shape,
    )
    for node, index in uses:
        node.replace_input_with(index, moved)
    return copy


def _retable(graph: ir.Graph, schedule: NoiseSchedule, correction: Correction) -> None:
    """Put the numbers of the network's own output into the tables of `fold`."""
    a, b = (row[:, None] for row in schedule.epsilon_coefficients())
    tables = {
        "gain": correction.gain,
        "offset": correction.offset / a,  # a is never 0: the network's own output counts where abar is
        "sample_gain": (correction.gain - 1) * b / a,
    }
    for name, table in tables.items():
        value = graph.initializers.get(f"ptqd.{name}")
        if value is None:
            if table.any() and name != "gain":
                raise GraphError(f"the graph has no table ptqd.{name}: expected one that fold has made")
            continue
        wide = table.astype(np.float32)[:, :, None, None]
        if value.shape is None or tuple(value.shape.numpy()) != wide.shape:
            raise GraphError(
                f"the graph's table of {name} is of {value.shape}, the correction of {wide.shape}: they are "
                "of different bundles"
            )
        value.const_value = ir.tensor(wide, name=value.name)
