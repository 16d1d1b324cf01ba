"""TorchEngine: prediction types and corrections."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from cases import W4A8, Case

from ptqd_export.calibrate import TorchEngine, quantize, simulate
from ptqd_export.core.backend import Emission
from ptqd_export.core.engine import Engine
from ptqd_export.core.noise import Correction
from ptqd_export.core.sampling import Sampling


@pytest.mark.parametrize("prediction_type", ["epsilon", "v_prediction", "sample"])
def test_engine_converts_to_epsilon(case: Case, prediction_type: str, rng: np.random.Generator) -> None:
    network = case.network
    config = {"prediction_type": prediction_type, "clip_sample": False}
    sampling = Sampling.of(network.info, config, n_steps=5)
    schedule = sampling.schedule
    x = rng.standard_normal((2, 1, 8, 8)).astype(np.float32)
    x.flags.writeable = False  # memory-mapped arrays are not
    labels = np.array([0, 2])
    with TorchEngine(network.module, sampling) as engine:
        assert isinstance(engine, Engine)
        step = 3
        timestep = np.full(2, schedule.timesteps[step])
        got = engine(
            {
                "sample": x,
                "timestep": timestep,
                "step": np.array([step]),
                "class_labels": labels,
                "more": labels,
            }
        )["epsilon"]
    with torch.no_grad():
        output = (
            network.module(torch.tensor(x), torch.tensor(timestep), class_labels=torch.tensor(labels))
            .double()
            .numpy()
        )
    alpha, sigma = np.sqrt(schedule.alphas_cumprod[step]), np.sqrt(1 - schedule.alphas_cumprod[step])
    expected = {
        "epsilon": output,
        "v_prediction": alpha * output + sigma * x,
        "sample": (x - alpha * output) / sigma,
    }[prediction_type]
    assert got.dtype == np.float32
    np.testing.assert_allclose(got, expected, rtol=1e-5, atol=1e-5)


def test_correction_rows_follow_the_step(case: Case, rng: np.random.Generator) -> None:
    recipe, network, sampling, _, observed = case
    net = quantize(network, observed, W4A8, recipe)
    correction = Correction(1 + 0.1 * rng.standard_normal((4, 1)), rng.standard_normal((4, 1)), np.zeros(4))
    feeds = {
        "sample": rng.standard_normal((2, 1, 8, 8)).astype(np.float32),
        "timestep": np.full(2, sampling.schedule.timesteps[2]),
        "step": np.array([2]),
        "class_labels": np.array([0, 3]),
    }
    with (
        TorchEngine(simulate(network, net, Emission.PORTABLE), sampling) as raw,
        TorchEngine(simulate(network, net, Emission.PORTABLE), sampling, correction) as out,
    ):
        expected = correction.gain[2, 0] * raw(feeds)["epsilon"] + correction.offset[2, 0]
        np.testing.assert_allclose(out(feeds)["epsilon"], expected, rtol=1e-5, atol=1e-6)
        assert np.array_equal(raw(feeds)["epsilon"], raw(feeds)["epsilon"])
