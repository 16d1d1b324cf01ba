"""The quantized layers of a bundle, which the torch backend simulates, written and read here alone.

quantization.safetensors:
    <precision>/<layer>/weight_scale, bits
    <precision>/<layer>/input_scale, input_codes     where the input is quantized: `Grid`
    <precision>/<layer>/output_scale, output_zero    `OutputGrid`, of convs with codes of integers
    <precision>/<layer>/smooth                       of some of these convs
    codes                                            where the weight codes lie: JSON, as uint8,
                                                     {precision: {layer: [tensor, layout]}}
    <precision>/<layer>/codes                        the weight codes themselves, of layers so small that the
                                                     graphs hold them within
Weight codes are stored once, in weights.safetensors, as the graphs take them. A tensor's layout:
    rows, columns                 torch's layout (O, ...), and (I, O); FP8 as its bytes in this order, (N,)
    packed rows, packed columns   the same, two codes of 4 bits per byte, the first in the low half
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from safetensors import safe_open
from safetensors.numpy import save

from ..core.precision import Precision
from ..core.quant import Grid, LayerQuant, OutputGrid, QuantizedNetwork, qmax, qmin
from ..errors import BundleError
from ..typed import brief
from .bundle import WEIGHTS
from .reading import Reader
from .stored import TYPES
from .tables import MALFORMED, QUANTIZATION, Arrays, parse_arrays

CODES = "codes"
ROWS, COLUMNS, PACKED_ROWS, PACKED_COLUMNS = "rows", "columns", "packed rows", "packed columns"
MOST_REFERENCES = 8 << 20
"""Most bytes of where the codes lie."""
Codes = npt.NDArray[Any]
References = Mapping[str, Mapping[str, tuple[str, str]]]


def write_layers(folder: Path, networks: Mapping[Precision, QuantizedNetwork]) -> None:
    """Write scales and grids of the quantized layers into a bundle's folder, and where their codes lie.

    The codes are looked for, by their content, in the weights file that stands there.
    """
    arrays: dict[str, npt.NDArray[Any]] = {}
    places: dict[str, dict[str, tuple[str, str]]] = {}
    stored = _stored(folder / WEIGHTS)
    for precision, network in networks.items():
        for layer in network.layers.values():
            head = f"{precision}/{layer.name}"
            arrays[f"{head}/weight_scale"] = np.ascontiguousarray(layer.weight_scale)
            if layer.input is not None:
                arrays[f"{head}/input_scale"] = np.array([layer.input.scale], np.float32)
                arrays[f"{head}/input_codes"] = np.array([layer.input.lo, layer.input.hi], np.int64)
            if layer.output is not None:
                arrays[f"{head}/output_scale"] = np.ascontiguousarray(layer.output.scale)
                arrays[f"{head}/output_zero"] = np.ascontiguousarray(layer.output.zero_point)
            if layer.smooth is not None:
                arrays[f"{head}/smooth"] = np.ascontiguousarray(layer.smooth)
            arrays[f"{head}/bits"] = np.array([layer.weight_bits, layer.activation_bits], np.int64)
            found = ((stored.get(_content(form)), layout) for layout, form in _forms(layer))
            place = next(((name, layout) for name, layout in found if name is not None), None)
            if place is None:
                arrays[f"{head}/{CODES}"] = np.ascontiguousarray(layer.weight)
            else:
                places.setdefault(str(precision), {})[layer.name] = place
    text = json.dumps(places, separators=(",", ":")).encode()
    arrays[CODES] = np.frombuffer(text, np.uint8)
    folder.joinpath(QUANTIZATION).write_bytes(save(arrays))


def _stored(file: Path) -> dict[object, str]:
    """Names of the tensors that may hold codes, by `_content`."""
    found: dict[object, str] = {}
    with safe_open(file, "numpy") as weights:
        for name in sorted(weights.keys()):
            if weights.get_slice(name).get_dtype() in TYPES:
                found.setdefault(_content(weights.get_tensor(name)), name)
    return found


def _content(array: Codes) -> object:
    return array.dtype.name, array.shape, hashlib.sha256(array.data).digest()


def _forms(layer: LayerQuant) -> Iterator[tuple[str, Codes]]:
    """What a graph may hold of a layer's codes, with its layout."""
    orders: list[tuple[str, str, Codes]] = [(ROWS, PACKED_ROWS, layer.weight)]
    if layer.weight.ndim == 2:
        orders.append((COLUMNS, PACKED_COLUMNS, layer.weight.T))
    for layout, packed, order in orders:
        codes: Codes = np.ascontiguousarray(order)
        yield layout, codes.reshape(-1) if layer.number == "fp8" else codes
        if layer.number == "int" and layer.weight_bits <= 4:
            yield packed, _pack(codes)


def _pack(codes: Codes) -> npt.NDArray[np.uint8]:
    halves = np.zeros(codes.size + codes.size % 2, np.uint8)
    halves[: codes.size] = codes.reshape(-1).view(np.uint8) & 15
    return np.bitwise_or(halves[::2], np.left_shift(halves[1::2], np.uint8(4)))


def _unpack(data: npt.NDArray[np.uint8], size: int) -> npt.NDArray[np.int8]:
    halves = np.stack([data & 15, data >> 4], 1).reshape(-1)[:size]
    return ((halves ^ 8).astype(np.int8) - 8).astype(np.int8)


def read_layers(
    reader: Reader,
    precisions: Sequence[Precision],
    parameters: Callable[[str], Mapping[str, npt.NDArray[np.float32]]],
) -> dict[Precision, dict[str, LayerQuant]]:
    """The quantized layers of some precisions, from a bundle's files.

    Args:
        parameters: of a module path: its "weight", and its "bias" if it has one.
    Raises:
        BundleError: they are damaged, or not those of the model that `parameters` belong to.
    """
    file = reader.root / QUANTIZATION
    arrays = parse_arrays(reader.read(QUANTIZATION), file)
    try:
        places = _references(arrays, precisions)
        stored = reader.tensors(WEIGHTS, {name for of in places.values() for name, _ in of.values()})
        layers: dict[Precision, dict[str, LayerQuant]] = {}
        for precision in precisions:
            head, end = f"{precision}/", "/bits"
            names = [
                key[len(head) : -len(end)] for key in arrays if key.startswith(head) and key.endswith(end)
            ]
            layers[precision] = {}
            for name in names:
                own, place = parameters(name), places[str(precision)].get(name)
                weight = _codes(arrays, stored, place, precision, name, own["weight"].shape)
                layers[precision][name] = _layer(arrays, precision, name, weight, own.get("bias"))
    except MALFORMED as error:
        raise BundleError(
            f"{file} does not hold the layers of this model ({type(error).__name__}: {brief(str(error))}): "
            "rebuild the bundle"
        ) from error
    return layers


def _references(arrays: Arrays, precisions: Sequence[Precision]) -> References:
    """Tensor and layout of the codes, by precision and layer."""
    text = arrays[CODES]
    if text.dtype != np.uint8 or text.ndim != 1 or len(text) > MOST_REFERENCES:
        raise ValueError(f"{CODES} is {text.dtype} {text.shape}")
    data = json.loads(text.tobytes())
    found: dict[str, dict[str, tuple[str, str]]] = {}
    for precision in map(str, precisions):
        found[precision] = {}
        for layer, (tensor, layout) in dict(data.get(precision, {})).items():
            if not isinstance(tensor, str) or not isinstance(layout, str):
                raise ValueError(f"layer {layer} has its codes at {brief([tensor, layout])}")
            found[precision][layer] = tensor, layout
    return found


def _codes(
    arrays: Arrays,
    stored: Arrays,
    place: tuple[str, str] | None,
    precision: Precision,
    name: str,
    shape: tuple[int, ...],
) -> Codes:
    """The weight codes of a layer in torch's layout.

    Args:
        place: tensor and layout; None for codes that lie beside the scales.
        shape: of the layer's weight.
    """
    dtype = np.uint8 if precision.number == "fp8" else np.int8
    if place is None:
        weight = arrays[f"{precision}/{name}/{CODES}"]
        _check_codes(name, weight, dtype, shape)
        return weight
    tensor, layout = place
    found, size = stored[tensor], int(np.prod(shape))
    order = shape[::-1] if layout in (COLUMNS, PACKED_COLUMNS) else shape
    if layout not in (ROWS, COLUMNS, PACKED_ROWS, PACKED_COLUMNS) or (order != shape and len(shape) != 2):
        raise ValueError(f"layer {name} has weights laid out as {brief(layout)}")
    if layout in (PACKED_ROWS, PACKED_COLUMNS):
        _check_codes(name, found, np.uint8, (-(-size // 2),))
        if precision.number == "fp8":
            raise ValueError(f"layer {name} has weights laid out as {layout}")
        found = _unpack(found, size)
    else:
        _check_codes(name, found, dtype, (size,) if precision.number == "fp8" else order)
    weight = found.reshape(order)
    return weight if order == shape and layout in (ROWS, PACKED_ROWS) else np.ascontiguousarray(weight.T)


def _check_codes(name: str, found: Codes, dtype: type, shape: tuple[int, ...]) -> None:
    if found.shape != shape or found.dtype != dtype:
        raise ValueError(
            f"layer {name} has weights of shape {brief(found.shape)} and type {found.dtype}, "
            f"expected {shape} and {np.dtype(dtype)}"
        )


def _layer(
    arrays: Arrays, precision: Precision, name: str, weight: Codes, bias: npt.NDArray[np.float32] | None
) -> LayerQuant:
    head = f"{precision}/{name}"
    weight_bits, activation_bits = (int(bits) for bits in _vector(arrays, f"{head}/bits", np.int64, 2))
    if not (2 <= weight_bits <= 8 and (activation_bits == 16 or 2 <= activation_bits <= 8)):
        raise ValueError(f"layer {name} has {brief(weight_bits)} and {brief(activation_bits)} bits")
    if precision.number == "fp8":
        if (weight & 127 == 127).any():
            raise ValueError(f"layer {name} has weights that are NaN")
    elif weight.size and not qmin(weight_bits) <= weight.min() <= weight.max() <= qmax(weight_bits):
        raise ValueError(f"layer {name} has weights beyond {weight_bits} bits")
    conv, integers = weight.ndim == 4, precision.number == "int" and not precision.weight_only
    grid = output = smooth = None
    if not precision.weight_only:
        (scale,) = _factors(arrays, f"{head}/input_scale", 1)
        lo, hi = (int(code) for code in _vector(arrays, f"{head}/input_codes", np.int64, 2))
        grid = Grid(float(scale), lo, hi)
        ends = (-448, 448) if precision.number == "fp8" else (max(-255, hi - 255), min(255, lo + 255))
        if not ends[0] <= lo <= 0 <= hi <= ends[1]:
            raise ValueError(f"layer {name} has an input grid of {lo} to {hi}")
    if conv and integers:
        zero = _vector(arrays, f"{head}/output_zero", np.uint8, len(weight))
        output = OutputGrid(_factors(arrays, f"{head}/output_scale", len(weight)), zero)
    if conv and integers and f"{head}/smooth" in arrays:
        smooth = _factors(arrays, f"{head}/smooth", weight.shape[1])
    return LayerQuant(
        name=name,
        kind="conv" if conv else "linear",
        weight=weight,
        weight_scale=_factors(arrays, f"{head}/weight_scale", len(weight)),
        weight_bits=weight_bits,
        input=grid,
        activation_bits=activation_bits,
        output=output,
        bias=bias,
        macs=0,
        number=precision.number,
        smooth=smooth,
    )


def _vector(arrays: Arrays, key: str, dtype: type, size: int) -> npt.NDArray[Any]:
    array = arrays[key]
    if array.dtype != dtype or array.shape != (size,):
        raise ValueError(f"{key} is {array.dtype} {array.shape}")
    return array


def _factors(arrays: Arrays, key: str, size: int) -> npt.NDArray[np.float32]:
    array = _vector(arrays, key, np.float32, size)
    if not (np.isfinite(array) & (array > 0)).all():
        raise ValueError(f"{key} holds other than finite values above 0")
    return array
