"""The arrays of a bundle: what they are refused for."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from helpers import reseal
from safetensors.numpy import load_file, save_file

from ptqd_export.bundle import Bundle
from ptqd_export.bundle.tables import TABLES, Probe, Tables, write_tables
from ptqd_export.core.backend import Emission
from ptqd_export.core.noise import Correction, NoiseStats
from ptqd_export.core.precision import FP32, Precision
from ptqd_export.errors import BundleError

W8A8, W4A8 = Precision(8, 8), Precision(4, 8)


def test_tables_that_are_none(bundle: Path) -> None:
    good = load_file(bundle / TABLES)
    gain = "w8a8.ort-cpu.gain"
    for tables, message in (
        (good | {gain: np.full_like(good[gain], np.nan)}, f"table '{gain}' holds NaN"),
        (good | {gain: np.full_like(good[gain], -1.1e30)}, f"table '{gain}' holds values above 1e\\+30 or"),
        (good | {gain: np.full_like(good[gain], -1e-320)}, f"table '{gain}' holds values .* below 1e-100"),
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
