"""stock_unet: the correction on the network's own output, its row by the timestep."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import onnx_ir as ir
import pytest
from toy import STEPS, correction_of, feeds_of, run, schedule_of

from ptqd_export.core.backend import Emission
from ptqd_export.core.noise import Correction
from ptqd_export.errors import GraphError
from ptqd_export.export import fold, lint, stock_unet, with_offset


@pytest.mark.parametrize("kind", ["epsilon", "v_prediction", "sample"])
@pytest.mark.parametrize("corrected", [True, False])
def test_output_is_the_networks_own_corrected(
    base: ir.Model, rng: np.random.Generator, kind: str, corrected: bool
) -> None:
    schedule = schedule_of(kind)
    gain, offset = rng.uniform(0.5, 1.5, (STEPS, 2)), rng.standard_normal((STEPS, 2))
    correction = correction_of(gain, offset) if corrected else Correction.identity(STEPS, 2)
    folded = fold(base, schedule, correction)
    graph = stock_unet(folded, schedule, correction)
    lint(graph, Emission.PORTABLE)
    names = [value.name for value in graph.graph.inputs]
    assert names == ["sample", "timestep", "class_labels"] and "step" not in names
    a, b = schedule.epsilon_coefficients()
    for step in range(STEPS):
        feeds = feeds_of(3, step)
        feeds["timestep"] = np.full(3, schedule.timesteps[step])
        own = run(base, feeds)["output"]
        near = np.float32(schedule.timesteps[step] + 0.3)  # rounded, as the network takes whole ones
        got = run(graph, {n: near if n == "timestep" else feeds[n] for n in names})["out_sample"]
        epsilon = run(folded, feeds)["epsilon"]
        # What a scheduler of this prediction type makes of it is the corrected epsilon.
        largest = np.abs(epsilon).max()
        again = a[step] * got + b[step] * feeds["sample"]
        np.testing.assert_allclose(again, epsilon, rtol=0, atol=1e-5 * largest)
        if not corrected:
            np.testing.assert_allclose(got, own, rtol=0, atol=1e-5)
        else:
            other = run(folded, feeds | {"step": np.array([(step + 1) % STEPS])})["epsilon"]
            assert np.abs(again - other).max() > 1e-3 * largest
    assert folded.graph.outputs[0].name == "epsilon"  # unchanged


def test_where_the_output_says_nothing_of_epsilon(base: ir.Model, rng: np.random.Generator) -> None:
    """At abar = 0 epsilon is x whatever v is, and the correction is one of v: nothing becomes infinite."""
    schedule = schedule_of("v_prediction")
    abar = schedule.alphas_cumprod.copy()
    abar[0] = 0.0
    schedule = replace(schedule, alphas_cumprod=abar)
    correction = correction_of(rng.uniform(0.5, 1.5, (STEPS, 2)), rng.standard_normal((STEPS, 2)))
    graph = stock_unet(fold(base, schedule, correction), schedule, correction)
    feeds = feeds_of(2, 0) | {"timestep": np.full(2, schedule.timesteps[0])}
    named = {value.name: feeds[str(value.name)] for value in graph.graph.inputs}
    got = run(graph, named | {"timestep": np.float32(schedule.timesteps[0])})["out_sample"]
    gain, offset = correction.gain[0][:, None, None], correction.offset[0][:, None, None]
    np.testing.assert_allclose(got, gain * run(base, feeds)["output"] + offset, rtol=0, atol=1e-5)


def test_tables_of_another_bundle(base: ir.Model) -> None:
    schedule = schedule_of("epsilon")
    correction = correction_of(np.full((STEPS, 2), 0.5), np.ones((STEPS, 2)))
    graph = fold(base, schedule, correction)
    with pytest.raises(GraphError, match="they are of different bundles"):
        stock_unet(graph, schedule, correction_of(np.ones((STEPS, 3)), np.ones((STEPS, 3))))
    with pytest.raises(GraphError, match=r"has no table ptqd\.sample_gain"):
        stock_unet(graph, schedule_of("v_prediction"), correction)


def test_an_offset_of_an_input(base: ir.Model) -> None:
    feeds = feeds_of(2, 0)
    inputs = {value.name: feeds[str(value.name)] for value in base.graph.inputs}
    moved = run(with_offset(base, "sample", 0.25), inputs | {"sample": feeds["sample"] - 0.25})
    np.testing.assert_allclose(moved["output"], run(base, inputs)["output"], rtol=0, atol=1e-5)
