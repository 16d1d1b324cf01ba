"""Quantized graphs: one rewrite of the full-precision graph per precision and emission.

See ptqd_export.core.quant for grids. For a layer y = W x + b with codes q_W, scales s_W (per output channel)
and an input grid (s_x, lo, hi) with zero point z_x in a container of 8 bits:

    portable   x -> QuantizeLinear(s_x, z_x) [-> Clip] -> DequantizeLinear -> Conv | MatMul, in int8, with
               W = DequantizeLinear(q_W, s_W) and b in float
    half       the same; `lower` puts float16 in between, and z_x is 0 (see below)
    ort-cpu    the same codes as uint8; a Conv also gets b = DequantizeLinear(int32 codes) and ->
               QuantizeLinear(Y, uint8 128) -> DequantizeLinear(s_y, z_y), so that ONNX Runtime fuses it into
               a QLinearConv (`LayerQuant.fused`); a MatMul has no output scale and becomes
               MatMulIntegerToFloat

Clip narrows the codes to [lo, hi] where they are fewer than 256. The container stays 8 bits wide, for the
weights too: TensorRT refuses INT4 weights where the activation is INT8.

Smoothing. A smoothed layer's input is x / m with a factor m per channel: x is multiplied with 1 / m, or, on
ORT CPU, QuantizeLinear has the scales s_x m along the channels, and DequantizeLinear has s_x.

Vectors of scales for activations stand between Reshapes from (B, C, H, W) to (B, C, H W) and back, which cost
nothing. Without them ONNX Runtime lays the values out channels last, where its kernels for scales along the
last axis are 4 (DequantizeLinear) to 170 times (QuantizeLinear) slower.

Zero points on TensorRT. It computes with zero point 0 alone, and codes of [lo, hi] fit into int8 as they are
below 8 bits. At 8 bits the half emission quantizes x - m with m = -(z_x) s_x, and adds what is missing, W m,
after the layer: per output channel, or, where a Conv pads with zeros, as a constant map. What float16 takes
off that map goes into the Conv's bias.

Where a layer's input is another layer's quantized output, DequantizeLinear and QuantizeLinear of two scales
meet. Of two pairs with one scale each ONNX Runtime makes one: the layer would get other codes than it was
calibrated for, and, because its bias has the scale of the old ones, run in float. It leaves pairs alone whose
scales are vectors, as those of conv outputs are here.

FP8 graphs are the same with E4M3 in place of int8. Where weights alone are quantized, x has no Q and DQ, and
codes that fit are packed INT4. Both compute the same numbers as portable in every emission. ONNX Runtime's
CPU optimiser breaks both forms (it turns a MatMul of dequantized FP8 into an invalid MatMulIntegerToFloat,
and a MatMul of dequantized weights into a MatMulNBits, which also quantizes x), so ort-cpu spells them out:

    x -> Div(s_x) -> Cast(E4M3, saturating) -> Cast(float32) -> Mul(s_x)
    W = Mul(Cast(q_W, float32), s_W), folded when the graph is loaded
"""

from __future__ import annotations

import ml_dtypes
import numpy as np
import numpy.typing as npt
import onnx_ir as ir

from ..core.backend import Emission
from ..core.quant import OUTPUT_MIDDLE, LayerQuant, OutputGrid, QuantizedNetwork
from ..errors import GraphError
from .dialect import LAYER, LAYER_INPUT, LAYER_OUTPUT
from .graph import Builder, prune, static_dims, take_over
from .layer_terms import float_bias, lost_in_half, moved_part, stored_codes

FLOAT, FP8 = ir.DataType.FLOAT, ir.DataType.FLOAT8E4M3FN


def insert_qdq(base: ir.Model, network: QuantizedNetwork, emission: Emission) -> ir.Model:
    """A new model in which every layer of `network` is quantized; `base`, from `export_fp`, is not changed.

    Values keep their names: a layer's float input and output have the names that they have in `base`. A Gemm
    becomes MatMul and Add (or Sub). The Conv or MatMul itself is named by its module path, a module's second
    call "path.2", because engines print these names. Layers that quantize the same value with the same scale
    and bits share its QuantizeLinear and DequantizeLinear.

    Raises:
        GraphError: a layer is not in the graph, or has another kind or weight shape there.
    """
    model = base.clone()
    rewriter = _Rewriter(model.graph, emission, emission.numerics(network.precision) is Emission.ORT_CPU)
    done: set[str] = set()
    for node in list(model.graph):
        path = node.metadata_props.get(LAYER)
        if path is None or path not in network.layers or node.op_type == "Add":
            continue
        layer = network.layers[path]
        if node.op_type == "Conv":
            rewriter.conv(node, layer)
        else:
            rewriter.linear(node, layer)
        done.add(path)
    missing = [name for name in network.layers if name not in done]
    if missing:
        more = f" and {len(missing) - 1} more" if len(missing) > 1 else ""
        raise GraphError(
            f"layer {missing[0]!r}{more} is not in the exported graph: leave it in float "
            "(quantization.skip), or check that the network calls it"
        )
    return prune(model)


class _Rewriter:
    """The state of one rewrite.

    `fused` writes the arithmetic of ORT CPU's integer kernels; `spelled` writes FP8, and weights that alone
    are quantized, without Q and DQ; `centred` keeps all zero points at 0.
    """

    def __init__(self, graph: ir.Graph, emission: Emission, fused: bool) -> None:
        self.build = Builder(graph)
        self.fused, self.spelled = fused, emission is Emission.ORT_CPU
        self.centred = emission is Emission.HALF
        self.container = np.dtype(np.uint8) if fused else np.dtype(np.int8)
        self.shared: dict[object, ir.Value] = {}
        self.consts: dict[str, ir.Value] = {}

    def conv(self, node: ir.Node, layer: LayerQuant) -> None:
        self._check(node, layer, "conv", list(layer.weight.shape))
        old = node.outputs[0]
        inputs: list[ir.Value | None] = [
            self._input(node, layer),
            self._weight(node, layer, stored_codes(layer), axis=0),
        ]
        moved = self._moved(layer)
        shift = None if moved is None else moved_part(node, layer, moved)
        if self.fused:
            inputs.append(self._fused_bias(node, layer))
        elif shift is not None and shift.ndim > 1:  # a map, which is a call's own
            total = float_bias(layer.bias, lost_in_half(shift))
            inputs.append(self.build.const(f"{layer.name}.bias.float", total))
        elif layer.bias is not None or shift is not None:
            inputs.append(self._const(f"{layer.name}.bias.float", float_bias(layer.bias, shift)))
        new = self.build.node(node, "Conv", inputs, f"{old.name}.conv", FLOAT, old.shape, node.attributes)
        self._call(new, layer)
        if shift is not None and shift.ndim > 1:
            map_ = self.build.const(f"{layer.name}.shift", shift)
            new = self.build.node(node, "Add", [new, map_], f"{old.name}.shifted", FLOAT, old.shape)
        if self.fused:
            if layer.output is None:
                raise GraphError(
                    f"conv {layer.name!r} has no grid for its output, which the {Emission.ORT_CPU} emission "
                    "needs: calibrate its output"
                )
            new = self._output(node, new, str(old.name), layer.output)
        _note(new, LAYER_OUTPUT, layer.name)
        take_over(old, new)

    def linear(self, node: ir.Node, layer: LayerQuant) -> None:
        self._check(node, layer, "linear", list(layer.weight.shape))
        old, last = node.outputs[0], node
        if node.op_type == "MatMul":
            consumers = list(old.consumers())
            if (
                len(consumers) == 1
                and consumers[0].op_type == "Add"
                and consumers[0].metadata_props.get(LAYER) == layer.name
            ):
                last = consumers[0]
                old = last.outputs[0]
        inputs = [self._input(node, layer), self._weight(node, layer, stored_codes(layer).T, axis=1)]
        new = self.build.node(last, "MatMul", inputs, f"{old.name}.matmul", FLOAT, old.shape)
        self._call(new, layer)
        moved = self._moved(layer)
        shift = None if moved is None else moved_part(node, layer, moved)
        if layer.bias is not None or shift is not None:
            total = float_bias(layer.bias, shift)
            # y - (-b) equals y + b bit for bit; ONNX Runtime would fuse a 2-D MatMul and Add into a Gemm,
            # which then runs in float.
            op, word, bias = (
                ("Sub", "negative", -total)
                if self.fused and len(static_dims(old)) == 2
                else ("Add", "float", total)
            )
            new = self.build.node(
                last,
                op,
                [new, self._const(f"{layer.name}.bias.{word}", bias)],
                f"{old.name}.biased",
                FLOAT,
                old.shape,
            )
        _note(new, LAYER_OUTPUT, layer.name)
        take_over(old, new)

    def _check(self, node: ir.Node, layer: LayerQuant, kind: str, shape: list[int]) -> None:
        if layer.kind != kind:
            raise GraphError(
                f"layer {layer.name!r} is a {layer.kind} in the quantized network but a {node.op_type} in "
                "the graph: export what was calibrated"
            )
        dims: list[int | None] = static_dims(node.inputs[1])
        if dims not in (shape, shape[::-1] if kind == "linear" else shape):
            raise GraphError(
                f"layer {layer.name!r} has weight codes of shape {shape} but a weight of shape {dims} in the "
                "graph: export what was calibrated"
            )
        plain = {"alpha": 1, "beta": 1, "transA": 0}
        if any(
            attribute.value != plain.get(name, attribute.value) for name, attribute in node.attributes.items()
        ):
            raise GraphError(
                f"layer {layer.name!r} is a Gemm with factors of its own: only a plain Linear can be "
                "quantized"
            )

    def _call(self, value: ir.Value, layer: LayerQuant) -> None:
        """Mark the node that computes a layer's products, and name it after the layer."""
        node = _note(value, LAYER, layer.name)
        self.build.rename(node, layer.name)

    def _input(self, node: ir.Node, layer: LayerQuant) -> ir.Value:
        value = node.inputs[0]
        assert value is not None
        if layer.weight_only:
            return value
        smooth = None if layer.smooth is None else layer.smooth.tobytes()
        key = (value, layer.input, layer.number, smooth)
        if key not in self.shared:
            if layer.number == "fp8":
                scale, marks = float(np.float32(layer.input_scale)), {LAYER_INPUT: "1"}
                self.shared[key] = self._fp8(node, value, str(value.name), scale, marks)
            else:
                self.shared[key] = self._integers(node, value, layer)
        return self.shared[key]

    def _integers(self, before: ir.Node, value: ir.Value, layer: LayerQuant) -> ir.Value:
        """[Mul ->] [Sub ->] QuantizeLinear [-> Clip] -> DequantizeLinear, see the module's docstring."""
        grid, name, shape = layer.input, str(value.name), value.shape
        assert grid is not None

        def then(op: str, inputs: list[ir.Value | None], word: str, dtype: ir.DataType = FLOAT) -> ir.Value:
            new = self.build.node(before, op, inputs, f"{name}.{word}", dtype, shape)
            return _mark(new, {LAYER_INPUT: "1"})

        zero, moved = grid.zero_point(self.container), self._moved(layer)
        point = self._const(
            f"ptqd.zero_point_{zero if moved is None else 0}",
            np.array(zero if moved is None else 0, self.container),
        )
        scale = self.build.const(f"{name}.scale", np.array(grid.scale, np.float32))
        code_type = ir.DataType.from_numpy(self.container)
        if layer.smooth is not None and self.fused:
            factors = layer.smooth * np.float32(grid.scale)
            codes = self._by_channel(
                before, value, name, "QuantizeLinear", factors, np.full(len(factors), zero, self.container)
            )
        else:
            if layer.smooth is not None:
                factor = self.build.const(f"{name}.smooth", (np.float32(1) / layer.smooth)[:, None, None])
                value = then("Mul", [value, factor], "smoothed")
            if moved is not None:
                value = then(
                    "Sub", [value, self.build.const(f"{name}.middle", np.array(moved, np.float32))], "moved"
                )
            codes = then("QuantizeLinear", [value, scale, point], "codes", code_type)
        if grid.hi - grid.lo < 255:
            limits = [
                self._const(f"ptqd.code_{zero + limit}", np.array(zero + limit, self.container))
                for limit in (grid.lo, grid.hi)
            ]
            codes = then("Clip", [codes, *limits], "clipped", code_type)
        return then("DequantizeLinear", [codes, scale, point], "dequantized")

    def _moved(self, layer: LayerQuant) -> float | None:
        """m of the module's docstring; None where the zero point may stay."""
        if not self.centred or layer.input is None or layer.number == "fp8":
            return None
        zero = layer.input.zero_point(self.container)
        return float(np.float32(-zero * layer.input.scale)) if zero else None

    def _output(self, before: ir.Node, value: ir.Value, name: str, grid: OutputGrid) -> ir.Value:
        """QuantizeLinear -> DequantizeLinear of a conv's output, by `LayerQuant.fused`."""
        scale = self.build.const(f"{name}.scale", np.array(grid.common, np.float32))
        zero = self._const(f"ptqd.zero_point_{OUTPUT_MIDDLE}", np.array(OUTPUT_MIDDLE, self.container))
        code_type = ir.DataType.from_numpy(self.container)
        codes = self.build.node(
            before, "QuantizeLinear", [value, scale, zero], f"{name}.codes", code_type, value.shape
        )
        return self._by_channel(before, codes, name, "DequantizeLinear", grid.scale, grid.zero_point)

    def _by_channel(
        self,
        before: ir.Node,
        value: ir.Value,
        name: str,
        op: str,
        scale: npt.NDArray[np.float32],
        zero: npt.NDArray[np.generic],
    ) -> ir.Value:
        """A QuantizeLinear or DequantizeLinear along the channels of (B, C, H, W), between two Reshapes."""
        quantizes = op == "QuantizeLinear"
        dtype = ir.DataType.from_numpy(self.container) if quantizes else FLOAT
        marks = {LAYER_INPUT: "1"} if quantizes else {}
        dims = static_dims(value)
        inputs = [self.build.const(f"{name}.scales", scale), self.build.const(f"{name}.zero_points", zero)]
        word = "codes" if quantizes else "dequantized"
        whole = value.shape
        flat = len(dims) == 4 and None not in dims[1:]
        if flat:
            assert whole is not None
            ends = [int(dim) for dim in dims[1:] if dim is not None]
            row = self._const(f"ptqd.shape_{ends[0]}", np.array([0, ends[0], -1], np.int64))
            back = self._const("ptqd.shape_" + "x".join(map(str, ends)), np.array([0, *ends], np.int64))
            shape = ir.Shape([whole[0], ends[0], ends[1] * ends[2]])
            value = _mark(
                self.build.node(before, "Reshape", [value, row], f"{name}.rows", value.dtype or FLOAT, shape),
                marks,
            )
        new = self.build.node(before, op, [value, *inputs], f"{name}.{word}", dtype, value.shape, {"axis": 1})
        _mark(new, marks)
        if flat:
            new = _mark(self.build.node(before, "Reshape", [new, back], f"{name}.image", dtype, whole), marks)
        return new

    def _fp8(
        self, before: ir.Node, value: ir.Value, name: str, scale: float, marks: dict[str, str]
    ) -> ir.Value:
        build, shape = self.build, value.shape
        step = build.const(f"{name}.scale", np.array(scale, np.float32))
        if self.spelled:
            ratio = _mark(build.node(before, "Div", [value, step], f"{name}.ratio", FLOAT, shape), marks)
            codes = _mark(
                build.node(before, "Cast", [ratio], f"{name}.codes", FP8, shape, {"to": int(FP8)}), marks
            )
            numbers = _mark(
                build.node(before, "Cast", [codes], f"{name}.numbers", FLOAT, shape, {"to": int(FLOAT)}),
                marks,
            )
            return _mark(
                build.node(before, "Mul", [numbers, step], f"{name}.dequantized", FLOAT, shape), marks
            )
        zero = self._const("ptqd.zero_point.fp8", np.zeros((), ml_dtypes.float8_e4m3fn))
        codes = _mark(
            build.node(before, "QuantizeLinear", [value, step, zero], f"{name}.codes", FP8, shape), marks
        )
        return _mark(
            build.node(before, "DequantizeLinear", [codes, step, zero], f"{name}.dequantized", FLOAT, shape),
            marks,
        )

    def _weight(
        self, before: ir.Node, layer: LayerQuant, codes: npt.NDArray[np.generic], axis: int
    ) -> ir.Value:
        build, shape = self.build, ir.Shape(codes.shape)
        # One each for the calls of a layer: ONNX Runtime cannot make U8 of weights that nodes share, which it
        # has to on some processors (`backends.saturates`). They are stored once.
        make = build.const if self.fused else self._const
        values = make(f"{layer.name}.weight.codes", codes)
        if self.spelled and (layer.weight_only or layer.number == "fp8"):
            scale = layer.weight_scale.reshape([-1 if i == axis else 1 for i in range(codes.ndim)])
            numbers = build.node(
                before, "Cast", [values], f"{layer.name}.weight.numbers", FLOAT, shape, {"to": int(FLOAT)}
            )
            return build.node(
                before,
                "Mul",
                [numbers, self._const(f"{layer.name}.weight.scale", scale)],
                f"{layer.name}.weight.dequantized",
                FLOAT,
                shape,
            )
        scale = layer.fused().weight_scale if self.fused and layer.output else layer.weight_scale
        attributes = {"axis": axis}
        if not self.fused and (scale == scale[0]).all():  # one scale for the tensor
            scale, attributes = np.asarray(scale[0]), {}
        inputs = [values, self._const(f"{layer.name}.weight.scale", scale)]
        dequantized = f"{layer.name}.weight.dequantized"
        return build.node(before, "DequantizeLinear", inputs, dequantized, FLOAT, shape, attributes)

    def _fused_bias(self, before: ir.Node, layer: LayerQuant) -> ir.Value:
        fused = layer.fused()
        scale = np.asarray(np.float32(layer.input_scale) * fused.weight_scale, np.float32)
        inputs = [
            self._const(f"{layer.name}.bias.codes", fused.bias),
            self._const(f"{layer.name}.bias.scale", scale),
        ]
        return self.build.node(
            before,
            "DequantizeLinear",
            inputs,
            f"{layer.name}.bias.dequantized",
            FLOAT,
            ir.Shape(fused.bias.shape),
            {"axis": 0},
        )

    def _const(self, name: str, array: npt.NDArray[np.generic]) -> ir.Value:
        """A constant that is created once, such as what the two calls of a layer share."""
        if name not in self.consts:
            self.consts[name] = self.build.const(name, array)
        return self.consts[name]


def _note(value: ir.Value, key: str, text: str) -> ir.Node:
    node = value.producer()
    assert node is not None
    node.metadata_props[key] = text
    return node


def _mark(value: ir.Value, marks: dict[str, str]) -> ir.Value:
    node = value.producer()
    assert node is not None
    node.metadata_props.update(marks)
    return value
