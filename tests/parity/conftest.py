"""A network at w4a4, as graphs in every emission and as values; trajectories of it."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import numpy as np
import pytest
from helpers import Built

from ptqd_export.bundle.bundle import WEIGHTS
from ptqd_export.calibrate import Network, Trajectories, collect, observe, open_model, quantize
from ptqd_export.core.backend import Emission
from ptqd_export.core.noise import Correction
from ptqd_export.core.precision import Precision
from ptqd_export.core.quant import QuantizedNetwork
from ptqd_export.core.sampling import Sampling
from ptqd_export.export import export_fp, fold, insert_qdq, lower, save
from ptqd_export.recipe import Recipe


@dataclasses.dataclass(frozen=True)
class Case:
    network: Network
    sampling: Sampling
    trajectories: Trajectories
    quantized: QuantizedNetwork
    folder: Path
    correction: Correction

    def graph(self, emission: Emission) -> Path:
        return self.folder / f"w4a4.{emission}.onnx"


@pytest.fixture(scope="session")
def case(rgb: Built, tmp_path_factory: pytest.TempPathFactory) -> Case:
    """The tiny RGB model, with tables of numbers of their own folded into its graphs."""
    folder = tmp_path_factory.mktemp("parity")
    recipe = Recipe.load(rgb.recipe).override(
        sampler={"n_steps": 3},
        calibration={"size": 2, "held_out": 8},
        quantization={"precisions": ("w4a4",), "rounding": "nearest"},
    )
    network = open_model(recipe)
    sampling = Sampling.of(network.info, network.scheduler_config, n_steps=3)
    trajectories = collect(network, sampling, recipe, folder / "t")
    net = quantize(network, observe(network, sampling, recipe, trajectories), Precision(4, 4), recipe)
    base = export_fp(network.module, network.info)
    rows = np.arange(3 * network.info.channels).reshape(3, -1)
    correction = Correction(1 + 0.01 * rows, 0.02 * rows[::-1], np.zeros(3))
    save(
        {
            f"w4a4.{e}": fold(
                lower(insert_qdq(base, net, e), e, net.precision), sampling.schedule, correction
            )
            for e in Emission
        },
        folder,
        WEIGHTS,
    )
    return Case(network, sampling, trajectories, net, folder, correction)
