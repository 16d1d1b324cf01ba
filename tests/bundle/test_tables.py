"""The arrays of a bundle: what they are refused for, and that the layers come back as they were."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from helpers import reseal
from safetensors.numpy import load_file, save_file

from ptqd_export.bundle import Bundle
from ptqd_export.bundle.tables import (
    QUANTIZATION,
    TABLES,
    Probe,
    Tables,
    read_layers,
    write_layers,
    write_tables,
)
from ptqd_export.core.backend import Emission
from ptqd_export.core.noise import Correction, NoiseStats
from ptqd_export.core.precision import FP32, Precision
from ptqd_export.core.quant import Grid, LayerQuant, OutputGrid, QuantizedNetwork
from ptqd_export.errors import BundleError

W8A8, W4A8 = Precision(8, 8), Precision(4, 8)


def test_tables_that_are_none(bundle: Path) -> None:
    good = load_file(bundle / TABLES)
    gain = "w8a8.ort-cpu.gain"
    for tables, message in (
        (good | {gain: np.full_like(good[gain], np.nan)}, f"table '{gain}' holds NaN"),
        (good | {"a": np.zeros(1)}, "an unknown table 'a'"),
        (good | {gain: good[gain].astype(np.float32)}, rf"a table {gain} of type and shape \('F32'"),
        ({"a": np.zeros(1)}, "no table 'w8a8.portable.probe'"),
    ):
        save_file(tables, bundle / TABLES)
        reseal(bundle)
        with pytest.raises(BundleError, match=message):
            Bundle.open(bundle).correction(W8A8, Emission.ORT_CPU)


def test_tables_that_do_not_fit(spoilt: Path, refused: Callable[..., str]) -> None:
    tables = load_file(spoilt / TABLES)
    (spoilt / TABLES).write_bytes(b"no tables")
    reseal(spoilt)
    assert "tables.safetensors is damaged" in refused("inspect", spoilt)
    save_file({name: table for name, table in tables.items() if name != "w4a8.ort-cpu.var"}, spoilt / TABLES)
    reseal(spoilt)
    assert "has no table 'w4a8.ort-cpu.var'" in refused(
        "run", spoilt, "--out", spoilt.parent / "x", "--format", "npy"
    )
    save_file({name: table[:2] for name, table in tables.items()}, spoilt / TABLES)
    reseal(spoilt)
    assert "shape ('F64', (2, 2)), expected ('F64', (4, 2)): rebuild" in refused("inspect", spoilt)


def test_tables_come_back(bundle: Path, rng: np.random.Generator) -> None:
    """By the numerics that they hold for: those of the half graphs are the portable ones."""
    sampling = Bundle.open(bundle).manifest.sampling
    t, c = len(sampling), sampling.model.channels

    def table() -> np.ndarray:
        return rng.standard_normal((t, c))

    values = {
        emission: (
            Correction(table(), table(), table()[:, 0]),
            NoiseStats(table()[:, 0], *(table() for _ in range(5))),
        )
        for emission in (Emission.PORTABLE, Emission.ORT_CPU)
    }
    probe = Probe(rng.standard_normal((2, *sampling.model.sample_shape)).astype(np.float32), 0.25)
    write_tables(
        bundle,
        {(W8A8, emission): value for emission, value in values.items()},
        {(W8A8, Emission.ORT_CPU): probe, (W8A8, Emission.PORTABLE): Probe(probe.epsilon, 0.5)},
    )
    read = Tables.parse((bundle / TABLES).read_bytes(), bundle / TABLES, sampling, (W8A8,))
    for emission in Emission:
        correction, stats = values[emission.numerics(W8A8)]
        for got, expected in (
            (read.correction(W8A8, emission), correction),
            (read.stats(W8A8, emission), stats),
        ):
            for name, value in vars(expected).items():
                np.testing.assert_array_equal(getattr(got, name), value)
    np.testing.assert_array_equal(read.probe(W8A8, Emission.ORT_CPU).epsilon, probe.epsilon)
    assert read.probe(W8A8, Emission.ORT_CPU).allowed == 0.25
    assert read.probe(W8A8, Emission.HALF).allowed == 0.5
    with pytest.raises(BundleError, match=r"no table w4a8\.portable\.probe"):
        read.probe(W4A8, Emission.HALF)
    assert (read.correction(FP32, Emission.PORTABLE).gain == 1).all()
    with pytest.raises(BundleError, match=r"no table fp32\.portable"):
        read.stats(FP32, Emission.PORTABLE)


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


def test_layers_come_back(tmp_path: Path, rng: np.random.Generator) -> None:
    """Codes that precisions share are there once; a layer of another shape than the model's is refused."""
    codes = rng.integers(-7, 8, (4, 2, 3, 3)).astype(np.int8)
    smooth = np.array([0.5, 2], np.float32)
    fp8, w8a4, w4a16 = (Precision.parse(text) for text in ("w8a8-fp8", "w8a4", "w4a16"))
    networks = {
        W8A8: QuantizedNetwork(
            W8A8, {"conv": layer(codes, 8), "rows": layer(codes[..., 0, 0], 8, name="rows", **LINEAR)}
        ),
        w8a4: QuantizedNetwork(
            w8a4, {"conv": layer(codes, 8, activation_bits=4, input=Grid(0.25, -2, 13), smooth=smooth)}
        ),
        W4A8: QuantizedNetwork(W4A8, {"conv": layer(codes[:, :1], 4, bias=None)}),
        fp8: QuantizedNetwork(
            fp8,
            {
                "conv": layer(
                    codes.view(np.uint8) & 127, 8, number="fp8", input=Grid(0.5, -448, 448), output=None
                )
            },
        ),
        w4a16: QuantizedNetwork(
            w4a16, {"conv": layer(codes[:, :1], 4, activation_bits=16, input=None, output=None)}
        ),
    }
    write_layers(tmp_path, networks)
    file = tmp_path / QUANTIZATION
    assert sorted(key for key in load_file(file) if key.startswith("codes")) == [
        "codes/fp8/conv", "codes/w4/conv", "codes/w8/conv", "codes/w8/rows",
    ]  # fmt: skip
    for precision, network in networks.items():

        def parameters(name: str, network: QuantizedNetwork = network) -> dict[str, np.ndarray]:
            own = network.layers[name]
            weight = {"weight": own.weight.astype(np.float32)}
            return weight if own.bias is None else weight | {"bias": own.bias}

        read = read_layers(file.read_bytes(), file, precision, parameters)
        assert set(read) == set(network.layers)
        for key, expected in network.layers.items():
            for name, value in vars(expected).items():
                got = getattr(read[key], name)
                if isinstance(value, OutputGrid):
                    assert (got.scale.dtype, got.zero_point.dtype) == (np.float32, np.uint8)
                    got, value = vars(got), vars(value)
                    assert list(got) == list(value) and all(map(np.array_equal, got.values(), value.values()))
                elif isinstance(value, Grid):
                    assert got == value
                else:
                    np.testing.assert_array_equal(got, value)
        with pytest.raises(
            BundleError, match=r"does not hold the layers of this model \(ValueError: .layer (conv|rows)"
        ):
            read_layers(
                file.read_bytes(), file, precision, lambda name: {"weight": np.zeros((1, 1), np.float32)}
            )


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
    write_layers(tmp_path, {W8A8: QuantizedNetwork(W8A8, {"conv": good})})
    file = tmp_path / QUANTIZATION

    def read() -> None:
        parameters = {"weight": np.zeros(codes.shape, np.float32)}
        read_layers(file.read_bytes(), file, W8A8, lambda name: parameters)

    read()
    arrays = load_file(file)
    del arrays[f"w8a8/conv/{key}"]
    save_file(arrays if value is None else arrays | {f"w8a8/conv/{key}": value}, file)
    with pytest.raises(BundleError, match=rf"does not hold the layers of this model .*{says}"):
        read()
