"""fold: the correction and the change to epsilon as tables, against their definitions."""

from __future__ import annotations

import numpy as np
import onnx_ir as ir
import pytest
from toy import HALVED, STEPS, correction_of, feeds_of, run, schedule_of

from ptqd_export.core.backend import Emission
from ptqd_export.core.noise import Correction
from ptqd_export.core.schedule import NoiseSchedule
from ptqd_export.errors import GraphError
from ptqd_export.export import fold, lint

KINDS = ["epsilon", "v_prediction", "sample"]
IDENTITY = Correction.identity(STEPS, 2)


def drawn(rng: np.random.Generator) -> Correction:
    return correction_of(rng.uniform(0.5, 1.5, (STEPS, 2)), rng.standard_normal((STEPS, 2)))


def definition(
    kind: str, schedule: NoiseSchedule, correction: Correction, step: int, output: np.ndarray, x: np.ndarray
) -> np.ndarray:
    """The corrected epsilon in float64: what the prediction type says of epsilon, then gain and offset."""
    abar = schedule.alphas_cumprod[step]
    alpha, sigma = np.sqrt(abar), np.sqrt(1 - abar)
    o, x = output.astype(np.float64), x.astype(np.float64)
    epsilon = {
        "epsilon": o,
        "v_prediction": alpha * o + sigma * x,  # v = alpha e - sigma x0 (Salimans & Ho 2022)
        "sample": (x - alpha * o) / sigma,
    }[kind]
    gain, offset = correction.gain[step][:, None, None], correction.offset[step][:, None, None]
    return np.asarray(gain * epsilon + offset)


@pytest.mark.parametrize("corrected", [True, False])
@pytest.mark.parametrize("kind", KINDS)
def test_fold_is_the_affine_map_of_its_step(
    base: ir.Model, rng: np.random.Generator, kind: str, corrected: bool
) -> None:
    schedule, correction = schedule_of(kind), drawn(rng) if corrected else IDENTITY
    graph = fold(base, schedule, correction)
    lint(graph, Emission.PORTABLE)
    for step in range(STEPS):
        feeds = feeds_of(3, step)
        raw, got = run(base, feeds)["output"], run(graph, feeds)["epsilon"]
        wanted = definition(kind, schedule, correction, step, raw, feeds["sample"])
        # Float32: the terms of the sum are some 1 / sigma times as large as the result.
        largest = max(1.0, 1 / np.sqrt(1 - schedule.alphas_cumprod[step]))
        np.testing.assert_allclose(got, wanted, rtol=0, atol=1e-5 * largest)
        # The test can fail: another step's row, and another prediction type.
        other = definition(kind, schedule, correction, (step + 1) % STEPS, raw, feeds["sample"])
        if corrected or kind != "epsilon":
            assert np.abs(got - other).max() > 1e-3 * largest
        for wrong in set(KINDS) - {kind}:
            assert (
                np.abs(got - definition(wrong, schedule, correction, step, raw, feeds["sample"])).max() > 0.01
            )


@pytest.mark.parametrize("kind", KINDS)
def test_tables_are_the_products_of_the_algebra(base: ir.Model, rng: np.random.Generator, kind: str) -> None:
    """gain = g a, offset = d, sample_gain = g b, multiplied in float64 and rounded once."""
    schedule, correction = schedule_of(kind), drawn(rng)
    graph = fold(base, schedule, correction).graph
    a, b = schedule.epsilon_coefficients()
    tables = {
        "ptqd.gain": correction.gain * a[:, None],
        "ptqd.offset": correction.offset,
        "ptqd.sample_gain": correction.gain * b[:, None],
    }
    if kind == "epsilon":
        del tables["ptqd.sample_gain"]
    found = {
        name: value.const_value.numpy()
        for name, value in graph.initializers.items()
        if name.startswith("ptqd.") and value.const_value is not None
    }
    assert set(found) == set(tables)
    for name, table in tables.items():
        assert found[name].dtype == np.float32 and found[name].shape == (STEPS, 2, 1, 1)
        np.testing.assert_array_equal(found[name][:, :, 0, 0], table.astype(np.float32))
    step = next(value for value in graph.inputs if value.name == "step")
    assert step.dtype is ir.DataType.INT64 and [v.name for v in graph.outputs] == ["epsilon"]


def test_identity_adds_nothing(base: ir.Model) -> None:
    graph = fold(base, schedule_of(), IDENTITY).graph
    assert [v.name for v in graph.outputs] == ["epsilon"] and len(graph) == len(base.graph)
    assert "step" not in [v.name for v in graph.inputs]
    for kind in ("v_prediction", "sample"):  # no identity: the output is no epsilon yet
        assert len(fold(base, schedule_of(kind), IDENTITY).graph) > len(base.graph)


@pytest.mark.parametrize(
    ("gain", "offset", "says"),
    [
        (np.ones((3, 5)), np.ones((3, 5)), r"expected \(steps, 2\)"),
        (np.ones((3, 2)), np.ones((4, 2)), r"expected \(steps, 2\)"),
        (np.ones((4, 2)), np.ones((4, 2)), "the correction has 4 steps, the schedule 3"),
        (np.full((3, 2), np.nan), np.ones((3, 2)), "gain table holds a value that is not finite"),
        (np.ones((3, 2)), np.full((3, 2), np.inf), "offset table holds a value that is not finite"),
    ],
)
@pytest.mark.parametrize("kind", KINDS)
def test_wrong_tables(base: ir.Model, kind: str, gain: np.ndarray, offset: np.ndarray, says: str) -> None:
    with pytest.raises(GraphError, match=says):
        fold(base, schedule_of(kind), correction_of(gain, offset))


def test_fold_once(base: ir.Model) -> None:
    folded = fold(base, schedule_of(), IDENTITY)
    with pytest.raises(GraphError, match="once"):
        fold(folded, schedule_of(), IDENTITY)


def test_an_input_of_the_model_may_not_be_called_as_the_row(base: ir.Model) -> None:
    other = base.clone()
    other.graph.inputs[2].name = "step"
    with pytest.raises(GraphError, match="the model has an input called 'step'"):
        fold(other, schedule_of(), HALVED)
    assert fold(other, schedule_of(), IDENTITY).graph.outputs[0].name == "epsilon"
