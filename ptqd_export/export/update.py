"""The sampler's step as a graph, so that the state stays on the device that the network runs on.

Everything but the state is known in advance (`Sampling.advance`, with the guided e):

    x_0 = (x - sqrt(1 - abar) e) / sqrt(abar),   d = sqrt(1 - abar_prev - sigma^2)
    x_prev = sqrt(abar_prev) x_0 + d e + sigma z

So x_prev = A x + B e + S z, with tables of A, B and S over the steps. sigma' depends on the plan, so the
graph holds the schedule's own sigma, and z is scaled by sigma' / sigma before it gets here: one graph serves
every plan. Where x_0 is clipped to c:

    x_prev = A x + B e + K c + S z,   c = clip(P x + Q e)
    A = 0,   B = d,   K = sqrt(abar_prev)

Where e is also recomputed from c, as e = (x - sqrt(abar) c) / sqrt(1 - abar):

    A = d / sqrt(1 - abar),   B = 0,   K = sqrt(abar_prev) - d sqrt(abar / (1 - abar))
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt
import onnx_ir as ir

from ..core.engine import EPSILON, NEXT_SAMPLE, NEXT_STEP, NEXT_TIMESTEP, NOISE, SAMPLE, STEP
from ..core.sampling import Sampling
from ..errors import GraphError
from .dialect import BATCH, IR_VERSION, OPSET, PRODUCER
from .graph import Builder

F64 = npt.NDArray[np.float64]
FLOAT, INT64 = ir.DataType.FLOAT, ir.DataType.INT64


def sampler_update(sampling: Sampling) -> ir.Model:
    """The part of a step of `Sampling.sample` that follows the network, as a graph in float32.

    It computes `Sampling.guide`, then `Sampling.advance` with the schedule's own sigma, with tables computed
    in float64. B is 2 N with guidance (guidance_scale neither 0 nor 1): rows without the condition come
    first, and the halves of sample and noise are equal. Otherwise B is N. So the engine's profile has one
    batch size.

    Inputs:
        `sample` f32 (B, C, H, W).
        `epsilon` f32 (B, C, H, W).
        `step` int64 (1,), in [0, T).
        `noise` f32 (B, C, H, W), where the schedule injects any: z sigma' / sigma. It must be finite at every
            step: steps that inject none multiply it by 0.
    Outputs:
        `next_sample` f32 (B, C, H, W); with guidance both halves are equal.
        `next_timestep` int64 (B,); after the last step it is that step's own timestep.
        `next_step` int64 (1,), step + 1.

    Raises:
        GraphError: a table is not finite.
    """
    schedule, guided, t = sampling.schedule, sampling.guided, len(sampling)
    rows = ir.Shape([BATCH, *sampling.model.sample_shape])
    single = ir.Shape([None, *sampling.model.sample_shape]) if guided else rows
    sample, epsilon, step, noise = (
        ir.Value(name=name, type=ir.TensorType(dtype), shape=shape)
        for name, dtype, shape in (
            (SAMPLE, FLOAT, rows),
            (EPSILON, FLOAT, rows),
            (STEP, INT64, ir.Shape([1])),
            (NOISE, FLOAT, rows),
        )
    )
    injects = bool((schedule.sigmas > 0).any())
    inputs = [sample, epsilon, step, *([noise] if injects else [])]
    graph = ir.Graph(inputs, [], nodes=[], opset_imports={"": OPSET}, name=PRODUCER)
    build = Builder(graph)

    def node(
        op: str, inputs: list[ir.Value], name: str, like: ir.Value, attributes: dict[str, int] | None = None
    ) -> ir.Value:
        assert like.dtype is not None
        return build.node(None, op, inputs, name, like.dtype, like.shape, attributes)

    def scaled(value: ir.Value, name: str, table: F64) -> ir.Value:
        """`value` multiplied by the step's entry of a table (T,)."""
        if not np.isfinite(table).all():
            raise GraphError(
                f"the table {name} of the sampler's update holds a value that is not finite: check the "
                "schedule"
            )
        constant = build.const(f"{name}.table", table.astype(np.float32).reshape(-1, 1, 1, 1))
        row = build.node(
            None, "Gather", [constant, step], f"{name}.row", FLOAT, ir.Shape([1, 1, 1, 1]), {"axis": 0}
        )
        return node("Mul", [value, row], name, value)

    def total(terms: list[ir.Value], name: str) -> ir.Value:
        result = terms[0]
        for i, term in enumerate(terms[1:], 1):
            result = node("Add", [result, term], f"{name}.{i}", result)
        return result

    x, e = sample, epsilon
    if guided:
        x, _ = _halves(build, sample, single)
        null, condition = _halves(build, epsilon, single)
        apart = node("Sub", [condition, null], "guidance.direction", null)
        push = node(
            "Mul",
            [apart, build.const("guidance.scale", np.array(sampling.guidance_scale, np.float32))],
            "guidance.push",
            null,
        )
        e = node("Add", [null, push], "guided", null)
    a, p = schedule.alphas_cumprod, schedule.alphas_cumprod_prev
    d = np.sqrt(np.maximum(0.0, 1 - p - schedule.sigmas**2))
    if schedule.clip_sample is None:
        terms = [scaled(x, "sample.kept", np.sqrt(p / a)), scaled(e, "epsilon.kept", schedule.epsilon_gains)]
    else:
        clean = total(
            [scaled(x, "clean.sample", 1 / np.sqrt(a)), scaled(e, "clean.epsilon", -np.sqrt((1 - a) / a))],
            "clean",
        )
        bound = np.array(schedule.clip_sample, np.float32)
        low, high = build.const("clip.low", -bound), build.const("clip.high", bound)
        clean = node("Clip", [clean, low, high], "clean.clipped", clean)
        if schedule.rederive_epsilon:
            terms = [
                scaled(clean, "clean.kept", np.sqrt(p) - d * np.sqrt(a / (1 - a))),
                scaled(x, "sample.kept", d / np.sqrt(1 - a)),
            ]
        else:
            terms = [scaled(clean, "clean.kept", np.sqrt(p)), scaled(e, "epsilon.kept", d)]
    state = total(terms, "state")
    if guided:
        state = node("Concat", [state, state], "state.twice", sample, {"axis": 0})
    if injects:
        state = node(
            "Add",
            [state, scaled(noise, "noise.injected", schedule.sigmas)],
            "state.stirred",
            sample,
        )
    following = node("Add", [step, build.const("one", np.array([1], np.int64))], "following", step)
    last = node(
        "Min", [following, build.const("last", np.array([t - 1], np.int64))], "following.at_most", step
    )
    timestep = node(
        "Gather", [build.const("timesteps", schedule.timesteps), last], "timestep.row", step, {"axis": 0}
    )
    size = node("Shape", [sample], "rows", step, {"start": 0, "end": 1})
    timesteps = build.node(None, "Expand", [timestep, size], "timestep.rows", INT64, ir.Shape([rows[0]]))
    for value, name in ((state, NEXT_SAMPLE), (timesteps, NEXT_TIMESTEP), (following, NEXT_STEP)):
        value.name = name
        graph.outputs.append(value)
    return ir.Model(graph, ir_version=IR_VERSION, producer_name=PRODUCER)


def _halves(build: Builder, value: ir.Value, shape: ir.Shape) -> tuple[ir.Value, ir.Value]:
    """The first and the second half of the rows."""
    node = ir.node("Split", [value], {"axis": 0, "num_outputs": 2}, num_outputs=2, name=f"Split_{value.name}")
    for output, word in zip(node.outputs, ("null", "condition"), strict=True):
        output.name, output.dtype, output.shape = build.name(f"{value.name}.{word}"), FLOAT, shape.copy()
    build.graph.append(node)
    return node.outputs[0], node.outputs[1]
