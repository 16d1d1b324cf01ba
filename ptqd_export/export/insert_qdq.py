"""Quantized graphs: one rewrite of the full-precision graph per precision and emission.

Quantization is symmetric throughout (see ptqd_export.core.quant). For a layer y = W x + b with codes q_W,
scales s_W (per output channel) and s_x:

    portable   x -> QuantizeLinear(s_x, int8 0) [-> Clip] -> DequantizeLinear -> Conv | MatMul, with
               W = DequantizeLinear(q_W, s_W) and b in float
    half       the same; `lower` puts float16 in between
    ort-cpu    the same codes as uint8 with zero point 128; a Conv also gets b = DequantizeLinear(int32 codes,
               s_x s_W) and -> QuantizeLinear(s_y, uint8 128) -> DequantizeLinear, so that ONNX Runtime fuses
               it into a QLinearConv; a MatMul has no output scale and becomes MatMulIntegerToFloat

Clip narrows the codes to [qmin, qmax] where the activation has fewer than 8 bits. The container stays 8 bits
wide, for the weights too: TensorRT refuses INT4 weights where the activation is INT8.

Where a layer's input is another layer's quantized output, DequantizeLinear and QuantizeLinear of two scales
would meet. ONNX Runtime makes one scale of two such pairs: the layer would get other codes than it was
calibrated for, and, because its bias has the scale of the old ones, run in float. So ort-cpu puts
Max(x, lowest float32) between them.

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
from ..core.quant import OUTPUT_BITS, LayerQuant, QuantizedNetwork, qmax, qmin
from ..errors import GraphError
from .dialect import LAYER, LAYER_INPUT, LAYER_OUTPUT
from .graph import Builder, producer, prune, static_dims, take_over

FLOAT, FP8 = ir.DataType.FLOAT, ir.DataType.FLOAT8E4M3FN
LOWEST = float(np.finfo(np.float32).min)
MOVING = ("Reshape", "Transpose", "Squeeze", "Unsqueeze", "Flatten", "Slice", "MaxPool", "Concat", "Split")
"""Operators that ONNX Runtime computes on codes, with Q and DQ moved past them."""
PACKED_BITS = 4
"""Where weights alone are quantized, they are stored as INT4 up to this many bits."""


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
    are quantized, without Q and DQ.
    """

    def __init__(self, graph: ir.Graph, emission: Emission, fused: bool) -> None:
        self.build = Builder(graph)
        self.fused, self.spelled = fused, emission is Emission.ORT_CPU
        self.zero = 128 if fused else 0
        self.container = np.dtype(np.uint8) if fused else np.dtype(np.int8)
        self.shared: dict[tuple[ir.Value, float, int, str], ir.Value] = {}
        self.kept: dict[ir.Value, ir.Value] = {}
        self.consts: dict[str, ir.Value] = {}

    def conv(self, node: ir.Node, layer: LayerQuant) -> None:
        self._check(node, layer, "conv", list(layer.weight.shape))
        old = node.outputs[0]
        inputs: list[ir.Value | None] = [
            self._input(node, layer),
            self._weight(node, layer, _codes(layer), axis=0),
        ]
        if layer.bias is not None:
            inputs.append(self._bias(node, layer))
        new = self.build.node(node, "Conv", inputs, f"{old.name}.conv", FLOAT, old.shape, node.attributes)
        self._call(new, layer)
        if self.fused:
            if layer.output_scale is None:
                raise GraphError(
                    f"conv {layer.name!r} has no output_scale, which the {Emission.ORT_CPU} emission needs: "
                    "calibrate its output"
                )
            new = self._quantize_dequantize(node, new, str(old.name), layer.output_scale, OUTPUT_BITS, {})
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
        inputs = [self._input(node, layer), self._weight(node, layer, _codes(layer).T, axis=1)]
        new = self.build.node(last, "MatMul", inputs, f"{old.name}.matmul", FLOAT, old.shape)
        self._call(new, layer)
        if layer.bias is not None:
            # y - (-b) equals y + b bit for bit; ONNX Runtime would fuse a 2-D MatMul and Add into a Gemm,
            # which then runs in float.
            op, word, bias = (
                ("Sub", "negative", -layer.bias)
                if self.fused and len(static_dims(old)) == 2
                else ("Add", "float", layer.bias)
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
        if self.fused and _follows_codes(value):
            value = self._apart(node, value)
        key = (value, float(np.float32(layer.input_scale)), layer.activation_bits, layer.number)
        if key not in self.shared:
            name, scale, marks = str(value.name), key[1], {LAYER_INPUT: "1"}
            if layer.number == "fp8":
                self.shared[key] = self._fp8(node, value, name, scale, marks)
            else:
                self.shared[key] = self._quantize_dequantize(
                    node, value, name, scale, layer.activation_bits, marks
                )
        return self.shared[key]

    def _apart(self, before: ir.Node, value: ir.Value) -> ir.Value:
        """`value`, passed on by a node that ONNX Runtime keeps, created once."""
        if value not in self.kept:
            inputs = [value, self._const("ptqd.lowest", np.array(LOWEST, np.float32))]
            self.kept[value] = self.build.node(
                before, "Max", inputs, f"{value.name}.kept", FLOAT, value.shape
            )
        return self.kept[value]

    def _quantize_dequantize(
        self, before: ir.Node, value: ir.Value, name: str, scale: float, bits: int, marks: dict[str, str]
    ) -> ir.Value:
        build, code_type = self.build, ir.DataType.from_numpy(self.container)
        zero = self._const("ptqd.zero_point", np.array(self.zero, self.container))
        step = build.const(f"{name}.scale", np.array(scale, np.float32))
        codes = _mark(
            build.node(
                before, "QuantizeLinear", [value, step, zero], f"{name}.codes", code_type, value.shape
            ),
            marks,
        )
        if bits < 8:
            low, high = (
                self._const(f"ptqd.{word}_{bits}", np.array(self.zero + limit, self.container))
                for word, limit in (("min", qmin(bits)), ("max", qmax(bits)))
            )
            codes = _mark(
                build.node(before, "Clip", [codes, low, high], f"{name}.clipped", code_type, value.shape),
                marks,
            )
        return _mark(
            build.node(
                before, "DequantizeLinear", [codes, step, zero], f"{name}.dequantized", FLOAT, value.shape
            ),
            marks,
        )

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
        values = self._const(f"{layer.name}.weight.codes", codes)
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
        scale = layer.weight_scale
        if not self.fused and (scale == scale[0]).all():  # one scale for the tensor
            inputs = [values, self._const(f"{layer.name}.weight.scale", scale[0])]
            return build.node(
                before, "DequantizeLinear", inputs, f"{layer.name}.weight.dequantized", FLOAT, shape
            )
        inputs = [values, self._const(f"{layer.name}.weight.scale", scale)]
        return build.node(
            before,
            "DequantizeLinear",
            inputs,
            f"{layer.name}.weight.dequantized",
            FLOAT,
            shape,
            {"axis": axis},
        )

    def _bias(self, before: ir.Node, layer: LayerQuant) -> ir.Value:
        assert layer.bias is not None
        if not self.fused:
            return self._const(f"{layer.name}.bias.float", layer.bias)
        codes = layer.bias_codes()
        assert codes is not None
        inputs = [
            self._const(f"{layer.name}.bias.codes", codes),
            self._const(f"{layer.name}.bias.scale", layer.bias_scale()),
        ]
        return self.build.node(
            before,
            "DequantizeLinear",
            inputs,
            f"{layer.name}.bias.dequantized",
            FLOAT,
            ir.Shape(codes.shape),
            {"axis": 0},
        )

    def _const(self, name: str, array: npt.NDArray[np.generic]) -> ir.Value:
        """A constant that is created once: the two calls of a layer share its weights."""
        if name not in self.consts:
            self.consts[name] = self.build.const(name, array)
        return self.consts[name]


def _follows_codes(value: ir.Value) -> bool:
    """Whether a value is a layer's dequantized output, or one that was moved or picked from it."""
    while (node := producer(value)) is not None:
        if node.op_type == "DequantizeLinear":
            return True
        if node.op_type not in MOVING or node.inputs[0] is None:
            return False
        value = node.inputs[0]
    return False


def _codes(layer: LayerQuant) -> npt.NDArray[np.generic]:
    """The weight codes in the type in which they are stored."""
    if layer.number == "fp8":
        return layer.weight.view(ml_dtypes.float8_e4m3fn)
    return (
        layer.weight.astype(ml_dtypes.int4)
        if layer.weight_only and layer.weight_bits <= PACKED_BITS
        else layer.weight
    )


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
