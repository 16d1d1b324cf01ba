"""The sampler's step as a graph, so that the state stays on the device that the network runs on.

Everything but the state is known in advance: it is the solver's table (`core.solvers`), and one graph serves
every solver. The next state, and each tensor that the solver keeps, is a sum of the state x, the guided
prediction y, the noise z and what was kept, each times its entry of the table for the step. Where x_0 is not
clipped it is written out, as u x + w y; where it is clipped, it is one more term, c = clip(u x + w y).

sigma' depends on the plan, so the graph holds the schedule's own sigma, and z is scaled by sigma' / sigma
before it gets here: one graph serves every plan.
"""

from __future__ import annotations

import math

import numpy as np
import numpy.typing as npt
import onnx_ir as ir

from ..core.engine import (
    EPSILON,
    KEPT,
    NEXT_KEPT,
    NEXT_SAMPLE,
    NEXT_STEP,
    NEXT_TIMESTEP,
    NOISE,
    SAMPLE,
    STEP,
)
from ..core.sampling import Sampling
from ..core.solvers import CLEAN, PREDICTION, STATE
from ..core.solvers import KEPT as KEPT_COLUMN
from ..core.solvers import NOISE as NOISE_COLUMN
from ..errors import GraphError
from .dialect import BATCH, IR_VERSION, OPSET, PRODUCER
from .graph import Builder

F64 = npt.NDArray[np.float64]
FLOAT, INT64 = ir.DataType.FLOAT, ir.DataType.INT64


def sampler_update(sampling: Sampling) -> ir.Model:
    """The part of a step of `Sampling.sample` that follows the network, as a graph in float32.

    It computes `Sampling.guide`, then `Sampling.advance` with the schedule's own sigma, with tables computed
    in float64. B is 2 N with guidance (guidance_scale neither 0 nor 1): rows without the condition come
    first, and the halves of sample, noise and what is kept are equal. Otherwise B is N. So the engine's
    profile has one batch size.

    Inputs:
        `sample` f32 (B, C, H, W).
        `epsilon` f32 (B, C, H, W).
        `step` int64 (1,), in [0, T).
        `kept_i` f32 (B, C, H, W), for each tensor that the solver keeps; finite before the first step.
        `noise` f32 (B, C, H, W), where the schedule injects any: z sigma' / sigma. It must be finite at every
            step: steps that inject none multiply it by 0.
    Outputs:
        `next_sample` f32 (B, C, H, W); with guidance both halves are equal.
        `next_timestep` (B,), int64 or float32 as the schedule's; after the last step it is that step's own.
        `next_step` int64 (1,), step + 1.
        `next_kept_i` f32 (B, C, H, W).

    Raises:
        GraphError: a table is not finite.
    """
    return _Update(sampling).model()


class _Update:
    """The graph under construction."""

    def __init__(self, sampling: Sampling) -> None:
        self.sampling, self.schedule = sampling, sampling.schedule
        s = self.schedule
        self.rows = ir.Shape([BATCH, *sampling.model.sample_shape])
        self.single = ir.Shape([None, *sampling.model.sample_shape]) if sampling.guided else self.rows
        self.injects = bool((s.sigmas > 0).any())
        self.sample, self.epsilon, self.noise, *self.kept = (
            ir.Value(name=name, type=ir.TensorType(FLOAT), shape=self.rows)
            for name in (SAMPLE, EPSILON, NOISE, *(f"{KEPT}{i}" for i in range(s.kept)))
        )
        self.step = ir.Value(name=STEP, type=ir.TensorType(INT64), shape=ir.Shape([1]))
        inputs = [self.sample, self.epsilon, self.step, *self.kept, *([self.noise] if self.injects else [])]
        self.graph = ir.Graph(inputs, [], nodes=[], opset_imports={"": OPSET}, name=PRODUCER)
        self.build = Builder(self.graph)

    def model(self) -> ir.Model:
        x, e, kept = self.sample, self.epsilon, self.kept
        if self.sampling.guided:
            x, *kept = (self._halves(value)[0] for value in (x, *kept))
            e = self._guided(x)
        s = self.schedule
        terms = {STATE: ("sample", x), PREDICTION: ("epsilon", e)}
        table = s.linear_table
        if s.bounded:
            table = s.table
            terms = {CLEAN: ("clean", self._clean(x, e)), **terms}
        terms |= {KEPT_COLUMN + i: (f"{KEPT}{i}", value) for i, value in enumerate(kept)}
        following = [
            self._row(table[:, i], terms, "state" if i == 0 else f"next.{KEPT}{i - 1}")
            for i in range(1 + s.kept)
        ]
        if self.sampling.guided:
            following = [
                self._node("Concat", [value, value], f"{value.name}.twice", self.sample, {"axis": 0})
                for value in following
            ]
        if self.injects:
            stirred = self._scaled(self.noise, "noise.injected", s.table[:, 0, NOISE_COLUMN])
            following[0] = self._node("Add", [following[0], stirred], "state.stirred", self.sample)
        names = (NEXT_SAMPLE, *(f"{NEXT_KEPT}{i}" for i in range(s.kept)))
        timesteps, counted = self._next_timestep()
        outputs = [(following[0], names[0]), (timesteps, NEXT_TIMESTEP), (counted, NEXT_STEP)]
        for value, name in (*outputs, *zip(following[1:], names[1:], strict=True)):
            value.name = name
            self.graph.outputs.append(value)
        return ir.Model(self.graph, ir_version=IR_VERSION, producer_name=PRODUCER)

    def _row(self, table: F64, terms: dict[int, tuple[str, ir.Value]], name: str) -> ir.Value:
        """One row of the table: the sum of the terms, without those that are 0 at every step."""
        parts = [
            self._scaled(value, f"{word}.kept" if name == "state" else f"{name}.{word}", table[:, column])
            for column, (word, value) in terms.items()
            if table[:, column].any()
        ]
        if not parts:
            parts = [self._scaled(terms[STATE][1], f"{name}.none", table[:, STATE])]
        return self._total(parts, name)

    def _clean(self, x: ir.Value, e: ir.Value) -> ir.Value:
        """x_0, clipped or thresholded."""
        u, w = self.schedule.clean_coefficients
        clean = self._total(
            [self._scaled(x, "clean.sample", u), self._scaled(e, "clean.epsilon", w)], "clean"
        )
        if self.schedule.clip_sample is None:
            return self._thresholded(clean)
        return self._clipped(clean, -self.schedule.clip_sample, self.schedule.clip_sample, "clean.clipped")

    def _clipped(self, value: ir.Value, low: float, high: float, name: str) -> ir.Value:
        ends = [self._number(f"{name}.low", low), self._number(f"{name}.high", high)]
        return self._node("Clip", [value, *ends], name, value)

    def _thresholded(self, clean: ir.Value) -> ir.Value:
        """Each sample's x_0, clipped to a quantile of its absolute values and divided by it.

        The quantile lies between the two last of the k largest values.
        """
        threshold = self.schedule.threshold
        assert threshold is not None and clean.shape is not None
        size = math.prod(self.sampling.model.sample_shape)
        rank = threshold.ratio * (size - 1)
        k = size - math.floor(rank)
        flat = self._shaped(
            "Flatten", [self._node("Abs", [clean], "clean.absolute", clean)], "flat", size, axis=1
        )
        top = ir.node(
            "TopK",
            [flat, self._whole("threshold.k", k)],
            {"axis": 1, "largest": 1, "sorted": 1},
            num_outputs=2,
            name="TopK_threshold",
        )
        for output, name, dtype in zip(top.outputs, ("top", "top.at"), (FLOAT, INT64), strict=True):
            output.name, output.dtype = self.build.name(f"threshold.{name}"), dtype
            output.shape = ir.Shape([clean.shape[0], k])
        self.graph.append(top)
        low, high = (self._column(top.outputs[0], max(0, i)) for i in (k - 1, k - 2))
        between = self._node("Sub", [high, low], "threshold.between", low)
        part = self._node("Mul", [between, self._number("threshold.part", rank % 1)], "threshold.above", low)
        bound = self._node("Add", [low, part], "threshold.quantile", low)
        bound = self._clipped(bound, 1.0, threshold.largest, "threshold.held")
        axes = self.build.const("threshold.axes", np.array([2, 3], np.int64))
        bound = self._shaped("Unsqueeze", [bound, axes], "threshold.bound", 1, 1, 1)
        below = self._node("Min", [clean, bound], "clean.below", clean)
        minus = self._node("Neg", [bound], "threshold.minus", bound)
        return self._node(
            "Div", [self._node("Max", [below, minus], "clean.within", clean), bound], "clean.divided", clean
        )

    def _column(self, rows: ir.Value, i: int) -> ir.Value:
        ends = [
            self._whole(f"threshold.{name}{i}", at) for name, at in (("from", i), ("to", i + 1), ("axis", 1))
        ]
        return self._shaped("Slice", [rows, *ends], f"threshold.row{i}", 1)

    def _guided(self, x: ir.Value) -> ir.Value:
        null, condition = self._halves(self.epsilon)
        apart = self._node("Sub", [condition, null], "guidance.direction", null)
        scale = self._number("guidance.scale", self.sampling.guidance_scale)
        push = self._node("Mul", [apart, scale], "guidance.push", null)
        guided = self._node("Add", [null, push], "guided", null)
        return self._rescaled(guided, condition, x) if self.sampling.guidance_rescale else guided

    def _rescaled(self, guided: ir.Value, condition: ir.Value, x: ir.Value) -> ir.Value:
        """`guided`, the output that it stands for brought towards the standard deviation of `condition`'s."""
        phi = self.sampling.guidance_rescale
        a, b = self.schedule.epsilon_coefficients()
        plain = self.schedule.prediction_type == "epsilon"

        def output(e: ir.Value, name: str) -> ir.Value:
            if plain:
                return e
            terms = [self._scaled(e, f"{name}.of_e", 1 / a), self._scaled(x, f"{name}.of_x", -b / a)]
            return self._total(terms, name)

        def variance(value: ir.Value, name: str) -> ir.Value:
            axes = self.build.const("rescale.axes", np.array([1, 2, 3], np.int64))
            mean = self._shaped("ReduceMean", [value, axes], f"{name}.mean", 1, 1, 1, keepdims=1)
            apart = self._node("Sub", [value, mean], f"{name}.apart", value)
            square = self._node("Mul", [apart, apart], f"{name}.square", value)
            return self._shaped("ReduceMean", [square, axes], f"{name}.variance", 1, 1, 1, keepdims=1)

        raw, wanted = output(guided, "rescale.guided"), output(condition, "rescale.condition")
        of_raw, of_wanted = variance(raw, "rescale.guided"), variance(wanted, "rescale.condition")
        share = self._node(
            "Sqrt", [self._node("Div", [of_wanted, of_raw], "rescale.ratio", of_raw)], "rescale.share", of_raw
        )
        part = self._node("Mul", [share, self._number("rescale.phi", phi)], "rescale.part", share)
        factor = self._node("Add", [part, self._number("rescale.rest", 1 - phi)], "rescale.factor", share)
        scaled = self._node("Mul", [raw, factor], "rescaled", raw)
        if plain:
            return scaled
        terms = [self._scaled(scaled, "rescaled.of_output", a), self._scaled(x, "rescaled.of_x", b)]
        return self._total(terms, "rescaled.e")

    def _number(self, name: str, value: float) -> ir.Value:
        return self.build.const(name, np.array(value, np.float32))

    def _whole(self, name: str, value: int) -> ir.Value:
        return self.build.const(name, np.array([value], np.int64))

    def _shaped(self, op: str, inputs: list[ir.Value], name: str, *dims: int, **attributes: int) -> ir.Value:
        """A float node of another shape than its input's, after the batch."""
        shape = inputs[0].shape
        assert shape is not None
        return self.build.node(None, op, inputs, name, FLOAT, ir.Shape([shape[0], *dims]), attributes)

    def _next_timestep(self) -> tuple[ir.Value, ir.Value]:
        """The next timestep, once per row, and the next step."""
        build, step, t = self.build, self.step, len(self.sampling)
        dtype = ir.DataType.from_numpy(self.schedule.timesteps.dtype)
        following = self._node("Add", [step, build.const("one", np.array([1], np.int64))], "following", step)
        end = build.const("last", np.array([t - 1], np.int64))
        last = self._node("Min", [following, end], "following.at_most", step)
        known = build.const("timesteps", self.schedule.timesteps)
        timestep = build.node(None, "Gather", [known, last], "timestep.row", dtype, step.shape, {"axis": 0})
        size = self._node("Shape", [self.sample], "rows", step, {"start": 0, "end": 1})
        rows = build.node(None, "Expand", [timestep, size], "timestep.rows", dtype, ir.Shape([self.rows[0]]))
        return rows, following

    def _node(
        self,
        op: str,
        inputs: list[ir.Value],
        name: str,
        like: ir.Value,
        attributes: dict[str, int] | None = None,
    ) -> ir.Value:
        assert like.dtype is not None
        return self.build.node(None, op, inputs, name, like.dtype, like.shape, attributes)

    def _scaled(self, value: ir.Value, name: str, table: F64) -> ir.Value:
        """`value` multiplied by the step's entry of a table (T,)."""
        if not np.isfinite(table).all():
            raise GraphError(
                f"the table {name} of the sampler's update holds a value that is not finite: check the "
                "schedule"
            )
        constant = self.build.const(f"{name}.table", table.astype(np.float32).reshape(-1, 1, 1, 1))
        row = self.build.node(
            None, "Gather", [constant, self.step], f"{name}.row", FLOAT, ir.Shape([1, 1, 1, 1]), {"axis": 0}
        )
        return self._node("Mul", [value, row], name, value)

    def _total(self, terms: list[ir.Value], name: str) -> ir.Value:
        result = terms[0]
        for i, term in enumerate(terms[1:], 1):
            result = self._node("Add", [result, term], f"{name}.{i}", result)
        return result

    def _halves(self, value: ir.Value) -> tuple[ir.Value, ir.Value]:
        """The first and the second half of the rows."""
        node = ir.node(
            "Split", [value], {"axis": 0, "num_outputs": 2}, num_outputs=2, name=f"Split_{value.name}"
        )
        for output, word in zip(node.outputs, ("null", "condition"), strict=True):
            output.name, output.dtype = self.build.name(f"{value.name}.{word}"), FLOAT
            output.shape = self.single.copy()
        self.build.graph.append(node)
        return node.outputs[0], node.outputs[1]
