"""sampler_update against Sampling.guide and Sampling.advance, step by step."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import onnx_ir as ir
import pytest
from toy import run

from ptqd_export.core.backend import Emission
from ptqd_export.core.model import InputSpec, ModelInfo
from ptqd_export.core.sampling import Sampling, State
from ptqd_export.core.solvers import Solver
from ptqd_export.errors import GraphError
from ptqd_export.export import lint, sampler_update

INFO = ModelInfo("toy", (2, 4, 4), (InputSpec("class_labels", num_classes=4, null_class=3),), "")
STEPS = 7
SETTINGS: dict[str, tuple[dict[str, Any], float, Solver]] = {
    "ddim": ({"clip_sample": False}, 0.0, "ddim"),
    "eta 1": ({"clip_sample": False}, 1.0, "ddim"),
    "eta 1, final alpha below 1": ({"clip_sample": False, "set_alpha_to_one": False}, 1.0, "ddim"),
    "clipped": ({"clip_sample": True}, 0.0, "ddim"),
    "ddpm, clipped": ({"clip_sample": True, "clip_sample_range": 2.0}, 1.0, "ddpm"),
}
F64 = np.ndarray[Any, np.dtype[np.float64]]


def sampling_of(name: str, scale: float = 1.0, n_steps: int = STEPS) -> Sampling:
    config, eta, solver = SETTINGS[name]
    return Sampling.of(INFO, config, n_steps=n_steps, eta=eta, guidance_scale=scale, solver=solver)


def reference(sampling: Sampling, step: int, x: F64, e: F64, noise: F64) -> F64:
    """What Sampling.sample computes in float64; `e` (B, ...) is what the network returns."""
    sigma = float(sampling.schedule.sigmas[step])
    return sampling.advance(State(x), sampling.guide(e, x, step), step, sigma, noise if sigma > 0 else None).x


def bound(sampling: Sampling, step: int, x: F64, e: F64) -> float:
    """16 roundings of float32 of the largest term: x / sqrt(abar), which the subtraction of epsilon cancels,
    and guidance's factor."""
    schedule = sampling.schedule
    a, p = schedule.alphas_cumprod[step], schedule.alphas_cumprod_prev[step]
    grown = 1 + 2 * sampling.guidance_scale if sampling.guided else 1.0
    largest = np.abs(x).max() + grown * np.abs(e).max()
    gain = np.sqrt(p / a) + 1.0
    return float(16 * 2.0**-24 * gain * largest)


def states(n: int, branches: int, seed: int) -> tuple[F64, F64, F64]:
    """x (n), epsilon (n * branches) and noise (n), float32 numbers as float64."""
    rng = np.random.default_rng(seed)
    return tuple(
        rng.standard_normal((rows, *INFO.sample_shape)).astype(np.float32).astype(np.float64)
        for rows in (n, n * branches, n)
    )  # type: ignore[return-value]


def step_of(
    model: ir.Model, branches: int, step: int, x: F64, e: F64, noise: F64
) -> dict[str, np.ndarray[Any, Any]]:
    feeds = {
        "sample": np.concatenate([x] * branches),
        "epsilon": e,
        "noise": np.concatenate([noise] * branches),
    }
    return run(
        model, {name: array.astype(np.float32) for name, array in feeds.items()} | {"step": np.array([step])}
    )


@pytest.mark.parametrize("scale", [1.0, 0.0, 2.5])
@pytest.mark.parametrize("name", SETTINGS)
def test_every_step_equals_the_sampler(name: str, scale: float) -> None:
    sampling = sampling_of(name, scale)
    schedule, branches = sampling.schedule, sampling.branches
    assert branches == (1 if scale in (0.0, 1.0) else 2)
    model = sampler_update(sampling)
    lint(model, Emission.HALF)
    injects = bool(schedule.sigmas.any())
    assert [v.name for v in model.graph.inputs] == [
        "sample",
        "epsilon",
        "step",
        *(["noise"] if injects else []),
    ]
    assert [v.name for v in model.graph.outputs] == ["next_sample", "next_timestep", "next_step"]
    for step in range(STEPS):
        for n in (1, 3):
            x, e, noise = states(n, branches, seed=step)
            out = step_of(model, branches, step, x, e, noise)
            wanted = reference(sampling, step, x, e, noise)
            assert out["next_sample"].dtype == np.float32 and len(out["next_sample"]) == n * branches
            for half in np.split(out["next_sample"], branches):
                np.testing.assert_allclose(half, wanted, rtol=0, atol=bound(sampling, step, x, e))
            assert out["next_step"].tolist() == [step + 1]
            assert out["next_timestep"].dtype == np.int64
            assert out["next_timestep"].tolist() == [schedule.timesteps[min(step + 1, STEPS - 1)]] * (
                n * branches
            )


@pytest.mark.parametrize("wrong", ["eta", "guidance", "schedule"])
def test_the_comparison_sees_another_update(wrong: str) -> None:
    """The negative: eta 0.1 % smaller, guidance 2.501 for 2.5, or a schedule of one step more are all
    seen."""
    sampling = sampling_of("eta 1", 2.5)
    other = sampling_of(
        "eta 1", 2.501 if wrong == "guidance" else 2.5, STEPS + 1 if wrong == "schedule" else STEPS
    )
    eta = 0.999 if wrong == "eta" else 1.0
    model = sampler_update(replace(other, schedule=replace(other.schedule, eta=eta)))
    x, e, noise = states(3, 2, seed=0)
    difference = np.abs(
        step_of(model, 2, 2, x, e, noise)["next_sample"][:3] - reference(sampling, 2, x, e, noise)
    ).max()
    assert difference > bound(sampling, 2, x, e)


def test_clipping_is_needed_and_seen() -> None:
    """The clipped graph differs from the unclipped one where x_0 leaves the bound."""
    x, e, noise = states(2, 1, seed=0)
    clipped, free = (
        step_of(sampler_update(s), 1, 0, x, e, noise) for s in (sampling_of("clipped"), sampling_of("ddim"))
    )
    assert np.abs(clipped["next_sample"] - free["next_sample"]).max() > 0.1


def test_a_whole_run_follows_the_sampler() -> None:
    """The outputs fed back as inputs, against the float64 loop; the errors of the steps add up, each
    amplified by at most sqrt(p / a)."""
    sampling = sampling_of("eta 1")
    schedule = sampling.schedule
    model = sampler_update(sampling)
    x, _, _ = states(2, 1, seed=1)
    state, feeds_step, wanted, limit = x, 0, x, 0.0
    for step in range(STEPS):
        _, e, noise = states(2, 1, seed=10 + step)
        out = step_of(model, 1, feeds_step, state, e, noise)
        limit = limit * np.sqrt(schedule.alphas_cumprod_prev[step] / schedule.alphas_cumprod[step]) + bound(
            sampling, step, wanted, e
        )
        wanted = reference(sampling, step, wanted, e, noise)
        state, feeds_step = out["next_sample"].astype(np.float64), int(out["next_step"][0])
    np.testing.assert_allclose(state, wanted, rtol=0, atol=limit)


def test_noise_is_taken_where_the_schedule_injects_it_alone() -> None:
    sampling = sampling_of("eta 1")  # the last step injects none: abar_prev is 1
    assert sampling.schedule.sigmas[-1] == 0
    model = sampler_update(sampling)
    x, e, noise = states(1, 1, seed=0)
    still, stirred = (step_of(model, 1, STEPS - 1, x, e, factor * noise)["next_sample"] for factor in (0, 1))
    np.testing.assert_array_equal(still, stirred)


def test_a_schedule_whose_tables_are_not_finite() -> None:
    sampling = sampling_of("ddim")
    broken = replace(sampling.schedule, alphas_cumprod=np.zeros(STEPS))
    with np.errstate(all="ignore"), pytest.raises(GraphError, match="not finite"):
        sampler_update(replace(sampling, schedule=broken))
