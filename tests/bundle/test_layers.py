"""The quantized layers of a bundle: they come back as they were, their codes are stored once, and hostile
files are refused."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import stored
from safetensors.numpy import load_file, save_file

from ptqd_export.bundle.bundle import WEIGHTS
from ptqd_export.bundle.layers import read_layers
from ptqd_export.bundle.stored import Picked
from ptqd_export.bundle.tables import QUANTIZATION
from ptqd_export.core.precision import Precision
from ptqd_export.core.quant import Grid, LayerQuant, OutputGrid, QuantizedNetwork
from ptqd_export.errors import BundleError

W8A8, W4A8, W8A4, W4A16, FP8, MIXED = map(
    Precision.parse, ("w8a8", "w4a8", "w8a4", "w4a16", "w8a8-fp8", "w4a4+")
)
Arrays = dict[str, np.ndarray]


def layer(weight: np.ndarray, bits: int, **changes: object) -> LayerQuant:
    made = LayerQuant(
        name="conv",
        kind="conv" if weight.ndim == 4 else "linear",
        weight=weight,
        weight_scale=np.linspace(0.1, 0.2, len(weight), dtype=np.float32),
        weight_bits=bits,
        input=Grid(0.5, -20, 235),
        activation_bits=8,
        output=OutputGrid(
            np.linspace(0.25, 0.5, len(weight), dtype=np.float32), np.arange(len(weight), dtype=np.uint8)
        ),
        bias=np.ones(len(weight), np.float32),
        macs=0,
    )
    return replace(made, **changes)  # type: ignore[arg-type]


LINEAR: dict[str, object] = {"kind": "linear", "output": None}


def networks(rng: np.random.Generator) -> dict[Precision, QuantizedNetwork]:
    """Layers of every kind: convs and linears, packed, FP8, a scale of their own, small ones."""

    def some(bits: int, *shape: int) -> np.ndarray:
        return rng.integers(-(1 << bits - 1), 1 << bits - 1, shape).astype(np.int8)

    conv, rows, fine = some(4, 16, 8, 3, 3), some(4, 33, 17), some(8, 16, 8, 3, 3)
    fp8 = {"number": "fp8", "input": Grid(0.5, -448, 448), "output": None}
    alone = {"activation_bits": 16, "input": None, "output": None}
    smooth = np.linspace(0.5, 2, 8, dtype=np.float32)
    layers = {
        W8A8: [
            layer(fine, 8),
            layer(rows, 8, name="rows", **LINEAR),
            layer(some(8, 20, 20), 8, name="square", **LINEAR),
            layer(fine[:4, :2], 8, name="small"),
        ],
        W8A4: [layer(fine, 8, activation_bits=4, input=Grid(0.25, -2, 13), smooth=smooth)],
        W4A8: [layer(conv, 4, bias=None), layer(rows, 4, name="rows", **LINEAR)],
        MIXED: [
            layer(conv, 4, activation_bits=4, input=Grid(0.25, -2, 13)),
            layer(rows, 8, name="rows", **LINEAR),
        ],
        FP8: [
            layer(fine.view(np.uint8) % 127, 8, **fp8),
            layer(rows.view(np.uint8) % 127, 8, name="rows", **(LINEAR | fp8)),
            layer((fine.view(np.uint8) % 127)[:2, :2], 8, name="small", **fp8),
        ],
        W4A16: [
            layer(conv, 4, **alone),
            layer(rows, 4, name="rows", **(LINEAR | alone)),
            layer(fine, 8, name="edge", **alone),
        ],
    }
    return {p: QuantizedNetwork(p, {found.name: found for found in of}) for p, of in layers.items()}


def parameters_of(network: QuantizedNetwork) -> Callable[[str], Arrays]:
    def call(name: str) -> Arrays:
        own = network.layers[name]
        weight = {"weight": own.weight.astype(np.float32)}
        return weight if own.bias is None else weight | {"bias": own.bias}

    return call


def test_layers_come_back(tmp_path: Path, rng: np.random.Generator) -> None:
    """The same values in the same types; of their codes only small ones lie beside the scales."""
    nets = networks(rng)
    reader = stored.write(tmp_path, nets)
    arrays = load_file(tmp_path / QUANTIZATION)
    assert {key for key in arrays if key.endswith("codes") and "input" not in key} == {
        "codes", "w8a8/small/codes", "w8a8-fp8/small/codes",
    }  # fmt: skip
    places = json.loads(arrays["codes"].tobytes())
    assert {p: {name: layout for name, (_, layout) in of.items()} for p, of in places.items()} == {
        "w8a8": {"conv": "rows", "rows": "columns", "square": "columns"},
        "w8a4": {"conv": "rows"},
        "w4a8": {"conv": "rows", "rows": "columns"},
        "w4a4+": {"conv": "rows", "rows": "columns"},
        "w8a8-fp8": {"conv": "rows", "rows": "columns"},
        "w4a16": {"conv": "rows", "rows": "columns", "edge": "rows"},
    }
    assert places["w8a8"]["conv"] == places["w8a4"]["conv"] == places["w4a16"]["edge"]
    for precision, network in nets.items():
        read = read_layers(reader, [precision], parameters_of(network))[precision]
        assert set(read) == set(network.layers)
        for key, expected in network.layers.items():
            same(read[key], expected)
        with pytest.raises(BundleError, match=r"not hold the layers of this model \(ValueError: .layer "):
            read_layers(reader, [precision], lambda name: {"weight": np.zeros((1, 1), np.float32)})
    assert reader.tensors(WEIGHTS, ()) == {}


def same(got: LayerQuant, expected: LayerQuant) -> None:
    for name, value in vars(expected).items():
        found = getattr(got, name)
        if isinstance(value, OutputGrid):
            assert (found.scale.dtype, found.zero_point.dtype) == (np.float32, np.uint8)
            np.testing.assert_array_equal(found.scale, value.scale)
            np.testing.assert_array_equal(found.zero_point, value.zero_point)
        elif isinstance(value, np.ndarray):
            assert found.dtype == value.dtype and found.flags.c_contiguous and found.flags.writeable
            np.testing.assert_array_equal(found, value)
        else:
            assert found == value


def test_packed_codes_come_back(tmp_path: Path, rng: np.random.Generator) -> None:
    """Where no precision holds them but packed; an odd number of them too."""
    nets = {W4A16: networks(rng)[W4A16]}
    reader = stored.write(tmp_path, nets)
    places = json.loads(load_file(tmp_path / QUANTIZATION)["codes"].tobytes())["w4a16"]
    assert [places[name][1] for name in ("conv", "rows")] == ["packed rows", "packed columns"]
    assert nets[W4A16].layers["rows"].weight.size % 2 == 1
    read = read_layers(reader, [W4A16], parameters_of(nets[W4A16]))[W4A16]
    for name, expected in nets[W4A16].layers.items():
        same(read[name], expected)


@pytest.mark.parametrize(
    ("place", "says"),
    [
        (["nothing", "rows"], "weights.safetensors has no tensor 'nothing'"),
        (["some.scale", "rows"], "tensor 'some.scale.*' is of type 'F32', expected I8 or U8"),
        (["conv.weight.codes", "columns"], "layer rows has weights of shape .16, 8, 3, 3. and type int8"),
        (["square.weight.codes", "columns"], "layer rows has weights of shape .20, 20. and type int8"),
        (["conv.weight.codes.5", "columns"], "layer rows has weights of shape .1152,. and type uint8"),
        (["rows.weight.codes", "rows"], "layer rows has weights of shape .17, 33. .*expected .33, 17."),
        (["rows.weight.codes", "packed rows"], "layer rows has weights of .* expected .281,. and uint8"),
        (["rows.weight.codes", "backwards"], "layer rows has weights laid out as 'backwards'"),
        (["rows.weight.codes", 1], "layer rows has its codes at"),
        ([{}, "rows"], "layer rows has its codes at"),
        (["rows.weight.codes"], "ValueError"),
        (None, "TypeError"),
        ("", "ValueError"),
    ],
)  # fmt: skip
def test_hostile_references(place: object, says: str, tmp_path: Path, rng: np.random.Generator) -> None:
    """What leads to no codes of the layer is said when it is read."""
    nets = networks(rng)
    stored.write(tmp_path, nets)
    names = {name.rpartition("-")[0]: name for name in load_file(tmp_path / WEIGHTS)}
    if isinstance(place, list) and isinstance(place[0], str):
        place[0] = names.get(place[0], place[0])
    spoil(tmp_path, lambda text: json.dumps(json.loads(text)["w8a8"] | {"rows": place}))
    with pytest.raises(BundleError, match=says) as caught:
        read_layers(stored.reader(tmp_path), [W8A8], parameters_of(nets[W8A8]))
    assert "\n" not in str(caught.value)


def spoil(folder: Path, change: Callable[[str], str]) -> None:
    """Change where W8A8 has its codes."""
    arrays = load_file(folder / QUANTIZATION)
    text = '{"w8a8":' + change(arrays["codes"].tobytes().decode()) + "}"
    save_file(arrays | {"codes": np.frombuffer(text.encode(), np.uint8)}, folder / QUANTIZATION)


@pytest.mark.parametrize("text", ["", "[" * 100_000, "[]", "3", '{"conv": 3}', '{"x": {}, "y": []}'])
def test_references_that_are_none(text: str, tmp_path: Path, rng: np.random.Generator) -> None:
    nets = networks(rng)
    stored.write(tmp_path, nets)
    spoil(tmp_path, lambda _: text)
    with pytest.raises(BundleError, match=r"quantization\.safetensors does not hold the layers"):
        read_layers(stored.reader(tmp_path), [W8A8], parameters_of(nets[W8A8]))


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"data_offsets": [0, 1 << 40]}, "tensor 'rows.* of shape .* lies at"),
        ({"data_offsets": [9, 0]}, "lies at"),
        ({"data_offsets": [0]}, "lies at"),
        ({"data_offsets": [0, -1]}, "ValueError"),
        ({"data_offsets": [0.0, 561.0]}, "ValueError"),
        ({"shape": [17, 34]}, "of shape .17, 34. lies at"),
        ({"shape": [1 << 47] * 9}, "ValueError"),
        ({"shape": None}, "ValueError"),
        ({"dtype": "I16"}, "of type 'I16'"),
        ({"dtype": []}, "of type"),
        ({"dtype": "U8"}, "layer rows has weights of shape .* and type uint8"),
        (None, "TypeError"),
        (b"{", "JSONDecodeError"),
        (b"[]", "has no tensor"),
        (b"{}", "has no tensor"),
        (b"[" * 100_000, "RecursionError"),
        (b" " * (9 << 20), "a header of 9437184 bytes"),
        (b"", "damaged"),
    ],
)
def test_hostile_weights(change: object, says: str, tmp_path: Path, rng: np.random.Generator) -> None:
    """A header of the weights that lies about the codes: nothing is read from elsewhere, or grows."""
    nets = networks(rng)
    stored.write(tmp_path, nets)
    data = (tmp_path / WEIGHTS).read_bytes()
    length = int.from_bytes(data[:8], "little")
    header = json.loads(data[8 : 8 + length])
    name = next(name for name in header if name.startswith("rows.weight.codes-"))
    if isinstance(change, bytes):
        text = change
    else:
        header[name] = header[name] | change if isinstance(change, dict) else change
        text = json.dumps(header).encode()
    (tmp_path / WEIGHTS).write_bytes(len(text).to_bytes(8, "little") + text + data[8 + length :])
    with pytest.raises(BundleError, match=says) as caught:
        read_layers(stored.reader(tmp_path), [W8A8], parameters_of(nets[W8A8]))
    assert "\n" not in str(caught.value)


def test_tensors_that_overlap(tmp_path: Path) -> None:
    """Many names for the whole file would need many times its size."""
    entry = {"dtype": "I8", "shape": [100], "data_offsets": [0, 100]}
    text = json.dumps({"a": entry, "b": entry}).encode()
    (tmp_path / WEIGHTS).write_bytes(len(text).to_bytes(8, "little") + text + bytes(range(100)))
    assert stored.reader(tmp_path).tensors(WEIGHTS, ["a"])["a"].tolist() == list(range(100))
    with pytest.raises(BundleError, match="its tensors overlap"):
        stored.reader(tmp_path).tensors(WEIGHTS, ["a", "b"])


def test_tensors_over_many_pieces(tmp_path: Path, rng: np.random.Generator) -> None:
    """A file that comes in pieces of any size gives what safetensors reads."""
    arrays = {f"t{i}": rng.integers(-128, 128, (3, i)).astype(np.int8) for i in range(6)}
    save_file(arrays, tmp_path / WEIGHTS)
    data = (tmp_path / WEIGHTS).read_bytes()
    for size in (1, 7, 64, len(data)):
        picked = Picked(tmp_path / WEIGHTS, frozenset({"t0", "t2", "t5"}), len(data))
        for start in range(0, len(data), size):
            picked.take(data[start : start + size])
        got = picked.arrays()
        assert set(got) == {"t0", "t2", "t5"}
        for name, array in got.items():
            np.testing.assert_array_equal(array, arrays[name])
    with pytest.raises(BundleError, match="ends in its header"):
        Picked(tmp_path / WEIGHTS, frozenset(), len(data)).arrays()


def test_codes_that_are_none(tmp_path: Path, rng: np.random.Generator) -> None:
    """FP8's NaN, and codes beyond a layer's bits."""
    nets = networks(rng)
    good = nets[W4A8].layers["conv"]
    for precision, bad in ((W4A8, replace(good, weight=good.weight + 1)), (FP8, nets[FP8].layers["conv"])):
        bad.weight[0, 0, 0, 0] |= 127
        net = QuantizedNetwork(precision, {"conv": bad})
        reader = stored.write(tmp_path, {precision: net})
        with pytest.raises(BundleError, match=r"weights (beyond 4 bits|that are NaN)"):
            read_layers(reader, [precision], parameters_of(net))


@pytest.mark.parametrize(
    ("key", "value", "says"),
    [
        ("bits", np.array([8]), "bits is int64 .1,."),
        ("bits", np.array([9, 8]), "layer conv has 9 and 8 bits"),
        ("bits", np.array([8, 32]), "layer conv has 8 and 32 bits"),
        ("bits", np.array([8, -1]), "layer conv has 8 and -1 bits"),
        ("weight_scale", np.ones(3, np.float32), "w8a8/conv/weight_scale is float32 .3,."),
        ("weight_scale", np.array([1, 1, 1, np.inf], np.float32), "weight_scale holds other than finite"),
        ("input_scale", np.ones(1, np.float64), "input_scale is float64"),
        ("input_scale", np.array([np.nan], np.float32), "input_scale holds other than finite"),
        ("input_scale", np.array([0], np.float32), "input_scale holds other than finite"),
        ("input_scale", None, "KeyError"),
        ("input_codes", np.array([-20, 235, 0]), "input_codes is int64 .3,."),
        ("input_codes", np.array([-20.0, 235.0]), "input_codes is float64"),
        ("input_codes", np.array([-20, 236]), "layer conv has an input grid of -20 to 236"),
        ("input_codes", np.array([1, 200]), "layer conv has an input grid of 1 to 200"),
        ("input_codes", np.array([-200, -1]), "layer conv has an input grid of -200 to -1"),
        ("input_codes", np.array([-(2**62), 2**62]), "layer conv has an input grid of"),
        ("input_codes", None, "KeyError"),
        ("output_scale", np.array([1, 1, 1, -1], np.float32), "output_scale holds other than finite"),
        ("output_scale", np.ones(1, np.float32), "output_scale is float32 .1,."),
        ("output_scale", None, "KeyError"),
        ("output_zero", np.zeros(4, np.int8), "output_zero is int8"),
        ("output_zero", np.zeros((4, 1), np.uint8), "output_zero is uint8 .4, 1."),
        ("output_zero", None, "KeyError"),
        ("smooth", np.array([1, 0], np.float32), "smooth holds other than finite"),
        ("smooth", np.array([1, np.nan], np.float32), "smooth holds other than finite"),
        ("smooth", np.ones(4, np.float32), "smooth is float32 .4,."),
    ],
)  # fmt: skip
def test_hostile_grids(
    key: str, value: np.ndarray | None, says: str, tmp_path: Path, rng: np.random.Generator
) -> None:
    """What is no grid is said when it is read, and not computed with."""
    codes = rng.integers(-7, 8, (4, 2, 3, 3)).astype(np.int8)
    good = layer(codes, 8, smooth=np.array([0.5, 2], np.float32))
    stored.write(tmp_path, {W8A8: QuantizedNetwork(W8A8, {"conv": good})})
    file = tmp_path / QUANTIZATION

    def read() -> None:
        parameters = {"weight": np.zeros(codes.shape, np.float32)}
        read_layers(stored.reader(tmp_path), [W8A8], lambda name: parameters)

    read()
    arrays = load_file(file)
    del arrays[f"w8a8/conv/{key}"]
    save_file(arrays if value is None else arrays | {f"w8a8/conv/{key}": value}, file)
    with pytest.raises(BundleError, match=rf"does not hold the layers of this model .*{says}"):
        read()
