"""NoiseSchedule and Sampling.advance against diffusers' own schedulers, step by step."""

from __future__ import annotations

import dataclasses
import json
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import DDIMScheduler, DDPMScheduler

from ptqd_export.core.model import ModelInfo
from ptqd_export.core.sampling import Sampling, State
from ptqd_export.core.schedule import NoiseSchedule
from ptqd_export.core.scheduler_config import MAX_TRAIN_TIMESTEPS, SOLVERS
from ptqd_export.core.solvers import Solver
from ptqd_export.errors import ModelError, RecipeError

SHAPE = (2, 3, 4, 4)


def _sampling(schedule: NoiseSchedule) -> Sampling:
    return Sampling(ModelInfo("plain", (3, 4, 4), (), ""), schedule)


def _double(scheduler: Any, n_steps: int) -> Any:
    """Set the steps, and redo the cumulative product of the scheduler's own betas in float64: it computes in
    float32."""
    scheduler.set_timesteps(n_steps)
    scheduler.alphas_cumprod = torch.cumprod(1 - scheduler.betas.double(), 0)
    if getattr(scheduler, "final_alpha_cumprod", None) is not None and not scheduler.config.set_alpha_to_one:
        scheduler.final_alpha_cumprod = scheduler.alphas_cumprod[0]
    return scheduler


@pytest.mark.parametrize("beta_schedule", ["linear", "scaled_linear", "squaredcos_cap_v2"])
@pytest.mark.parametrize("clip", [False, True])
@pytest.mark.parametrize(
    ("spacing", "offset", "to_one"), [("leading", 0, True), ("leading", 1, False), ("trailing", 0, True)]
)
@pytest.mark.parametrize("eta", [0.0, 0.5, 1.0])
def test_ddim_matches_diffusers(
    beta_schedule: str,
    clip: bool,
    spacing: str,
    offset: int,
    to_one: bool,
    eta: float,
    rng: np.random.Generator,
) -> None:
    theirs = _double(
        DDIMScheduler(
            beta_schedule=beta_schedule,
            clip_sample=clip,
            timestep_spacing=spacing,
            steps_offset=offset,
            set_alpha_to_one=to_one,
        ),
        20,
    )
    ours = NoiseSchedule.from_config(dict(theirs.config), 20, eta)
    assert ours.timesteps.tolist() == theirs.timesteps.tolist()
    x = rng.standard_normal(SHAPE)
    for i, t in enumerate(theirs.timesteps):
        e, z = rng.standard_normal(SHAPE), rng.standard_normal(SHAPE)
        want = theirs.step(
            torch.from_numpy(e), t, torch.from_numpy(x), eta=eta, variance_noise=torch.from_numpy(z)
        ).prev_sample.numpy()
        got = _sampling(ours).advance(State(x), e, i, float(ours.sigmas[i]), z).x
        np.testing.assert_allclose(got, want, rtol=1e-5, atol=1e-5)
        x = np.clip(got, -3, 3)


@pytest.mark.parametrize("n_steps", [20, 1000])
@pytest.mark.parametrize("clip", [False, True])
def test_ddpm_matches_diffusers(n_steps: int, clip: bool, rng: np.random.Generator) -> None:
    theirs = _double(DDPMScheduler(clip_sample=clip), n_steps)
    ours = NoiseSchedule.from_config(dict(theirs.config), n_steps, 1.0, "ddpm")
    assert ours.timesteps.tolist() == theirs.timesteps.tolist()
    x = rng.standard_normal(SHAPE)
    for i in range(0, n_steps, n_steps // 20):
        e = rng.standard_normal(SHAPE)
        z = torch.randn(SHAPE, generator=torch.Generator().manual_seed(i), dtype=torch.float64).numpy()
        result = theirs.step(
            torch.from_numpy(e),
            theirs.timesteps[i],
            torch.from_numpy(x),
            generator=torch.Generator().manual_seed(i),
        )
        np.testing.assert_allclose(
            _sampling(ours).advance(State(x), e, i, float(ours.sigmas[i]), z).x,
            result.prev_sample.numpy(),
            rtol=1e-5,
            atol=1e-5,
        )
    last = theirs.step(torch.from_numpy(e), theirs.timesteps[-1], torch.from_numpy(x)).prev_sample.numpy()
    assert ours.sigmas[-1] == 0
    np.testing.assert_allclose(
        _sampling(ours).advance(State(x), e, n_steps - 1, 0.0, None).x, last, rtol=1e-5, atol=1e-5
    )


@pytest.mark.parametrize("kind", ["epsilon", "v_prediction", "sample"])
def test_prediction_types_match_diffusers(kind: str, rng: np.random.Generator) -> None:
    theirs = _double(DDIMScheduler(prediction_type=kind, clip_sample=False), 10)
    ours = NoiseSchedule.from_config(dict(theirs.config), 10, 0.0)
    a, b = ours.epsilon_coefficients()
    for i, t in enumerate(theirs.timesteps):
        x, output = rng.standard_normal(SHAPE), rng.standard_normal(SHAPE)
        want = theirs.step(torch.from_numpy(output), t, torch.from_numpy(x)).prev_sample.numpy()
        got = _sampling(ours).advance(State(x), a[i] * output + b[i] * x, i, 0.0, None).x
        np.testing.assert_allclose(got, want, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("kind", ["v_prediction", "sample"])
def test_prediction_types_invert_the_forward_process(kind: str, rng: np.random.Generator) -> None:
    schedule = NoiseSchedule.from_config({"prediction_type": kind}, 10, 0.0)
    a, b = schedule.epsilon_coefficients()
    for i, abar in enumerate(schedule.alphas_cumprod):
        x0, e = rng.standard_normal(5), rng.standard_normal(5)
        x = np.sqrt(abar) * x0 + np.sqrt(1 - abar) * e
        output = x0 if kind == "sample" else np.sqrt(abar) * e - np.sqrt(1 - abar) * x0
        np.testing.assert_allclose(a[i] * output + b[i] * x, e, atol=1e-12)


def test_clip_default_is_diffusers_default() -> None:
    assert (
        NoiseSchedule.from_config({"_class_name": "DDIMScheduler"}, 5, 0.0).clip_sample
        == DDIMScheduler().config["clip_sample_range"]
    )
    assert NoiseSchedule.from_config({"_class_name": "PNDMScheduler"}, 5, 0.0).clip_sample is None
    assert (
        NoiseSchedule.from_config({"clip_sample": True, "clip_sample_range": 2.5}, 5, 0.0).clip_sample == 2.5
    )


@pytest.mark.parametrize("n_steps", [20, 1000])
def test_ddpm_form_of_the_recalibrated_variance(n_steps: int, rng: np.random.Generator) -> None:
    """sigma'^2 = sigma^2 - beta^2 / (alpha (1 - abar)) var, PTQD eq. 12: the same as sigma^2 - c^2 var at eta
    = 1."""
    s = NoiseSchedule.from_config({}, n_steps, 1.0)
    alpha = s.alphas_cumprod / s.alphas_cumprod_prev
    var = rng.uniform(0, 1e-3, n_steps)
    ddpm = s.sigmas**2 - (1 - alpha) ** 2 / (alpha * (1 - s.alphas_cumprod)) * var
    assert (ddpm < 0).any() and (ddpm > 0).any()
    np.testing.assert_allclose(s.recalibrated_sigmas(var) ** 2, np.maximum(0, ddpm), rtol=1e-9, atol=1e-15)


def test_recalibrated_sigmas_bounds(schedule: NoiseSchedule) -> None:
    np.testing.assert_array_equal(schedule.recalibrated_sigmas(np.zeros(10)), schedule.sigmas)
    assert not schedule.recalibrated_sigmas(np.full(10, 1e9)).any()
    deterministic = NoiseSchedule.from_config({}, 10, 0.0)
    assert not deterministic.sigmas.any() and not deterministic.recalibrated_sigmas(np.ones(10)).any()


def test_epsilon_gain_is_the_derivative_of_a_step(schedule: NoiseSchedule, rng: np.random.Generator) -> None:
    x, e = rng.standard_normal((2, 1, 2, 2, 2))
    step = _sampling(schedule).advance
    for i, c in enumerate(schedule.epsilon_gains):
        moved = step(State(x), e + 1, i, 0.0, None).x - step(State(x), e, i, 0.0, None).x
        np.testing.assert_allclose(moved, c, rtol=1e-9)


@pytest.mark.parametrize("config", [{}, {"clip_sample": True}, {"prediction_type": "v_prediction"}])
@pytest.mark.parametrize("solver", SOLVERS)
def test_json_round_trip_is_exact(config: dict[str, Any], solver: Solver) -> None:
    if solver == "euler-ancestral":
        config = {**config, "use_karras_sigmas": True}
    schedule = NoiseSchedule.from_config(config, 10, 1.0 if solver == "ddim" else 0.0, solver)
    back = NoiseSchedule.from_plain(json.loads(json.dumps(schedule.to_plain())))
    for name in ("timesteps", "alphas_cumprod", "alphas_cumprod_prev", "sigmas", "table"):
        np.testing.assert_array_equal(getattr(back, name), getattr(schedule, name))
        assert getattr(back, name).dtype == getattr(schedule, name).dtype
    assert back.to_plain() == schedule.to_plain()


@pytest.mark.parametrize(
    ("key", "value", "message"),
    [
        ("timesteps", [], "0 timesteps"),
        ("timesteps", [9], "1 timesteps, 10, 10 and 10 alphas_cumprod"),
        ("alphas_cumprod", [0.5], "10 timesteps, 1, 10 and 10 alphas_cumprod"),
        ("alphas_cumprod_prev", [0.5] * 9, "10 timesteps, 10, 10 and 9 alphas_cumprod"),
        ("timesteps", [*range(9), -1], r"a timestep outside \[0, 100000\]"),
        ("timesteps", [*range(9), 2**63], r"a timestep outside \[0, 100000\]"),
        ("timesteps", ["9"] * 10, r"schedule\.timesteps\[0\]: expected float, got '9'"),
        ("alphas_cumprod_from", [0.0] * 10, r"alphas_cumprod outside"),
        ("threshold", [0.5, 0.9], r"threshold \(0\.5, 0\.9\), outside"),
        ("threshold", [0.5], r"schedule\.threshold: expected an array of 2"),
        ("solver", "flow", r"schedule\.solver: got 'flow', expected one of ddim"),
        ("options", {"order": 4}, r"order 4, outside \[1, 3\]"),
        ("options", {"disable_corrector": [1] * 11}, "more steps without corrector"),
        ("options", {"timestep_scaling": -1.0}, r"timestep_scaling -1\.0"),
        ("n_steps", 0, "n_steps 0"),
        ("start", 1.5, r"start 1\.5"),
        ("timesteps", "900 800", r"schedule\.timesteps: expected an array"),
        ("alphas_cumprod", [0.0] * 10, r"alphas_cumprod outside"),
        ("alphas_cumprod", [1.0] * 10, r"alphas_cumprod outside"),
        ("alphas_cumprod", [float("nan")] * 10, r"alphas_cumprod\[0\]: expected a finite number"),
        ("alphas_cumprod_prev", [0.0] * 10, r"alphas_cumprod_prev outside"),
        ("alphas_cumprod_prev", [1.0 + 1e-12] * 10, r"alphas_cumprod_prev outside"),
        ("eta", -0.01, r"eta -0\.01, outside \[0, 1\]"),
        ("eta", 1.01, r"eta 1\.01, outside \[0, 1\]"),
        ("eta", 10**400, r"schedule\.eta: expected a finite number, got 1000"),
        ("eta", float("inf"), r"schedule\.eta: expected a finite number"),
        ("prediction_type", "flow", r"schedule\.prediction_type: got 'flow', expected one of epsilon"),
        ("clip_sample", 0.0, r"clip_sample 0\.0"),
        ("clip_sample", -1, r"clip_sample -1\.0"),
        ("clip_sample", True, r"schedule\.clip_sample: expected float, got True"),
        ("timestep", [], "unknown key 'timestep': did you mean 'timesteps'"),
    ],
)
def test_plain_form_refuses(schedule: NoiseSchedule, key: str, value: Any, message: str) -> None:
    plain = schedule.to_plain()
    NoiseSchedule.from_plain(plain)  # it is this value that is refused
    with pytest.raises(RecipeError, match=message) as caught:
        NoiseSchedule.from_plain({**plain, key: value})
    assert "\n" not in str(caught.value) and len(str(caught.value)) < 300


@pytest.mark.parametrize("key", [field.name for field in dataclasses.fields(NoiseSchedule)])
def test_plain_form_needs_every_key(schedule: NoiseSchedule, key: str) -> None:
    plain = schedule.to_plain()
    del plain[key]
    with pytest.raises(RecipeError, match=f"schedule: '{key}' is missing"):
        NoiseSchedule.from_plain(plain)


def test_plain_form_is_a_table() -> None:
    for value in (None, [], "schedule"):
        with pytest.raises(RecipeError, match="schedule: expected a table"):
            NoiseSchedule.from_plain(value)


@pytest.mark.parametrize(
    ("n_steps", "eta"), [(0, 0.0), (-3, 0.0), (1001, 0.0), (10, -0.1), (10, 1.1), (10, float("nan"))]
)
def test_refuses_steps_and_eta(n_steps: int, eta: float) -> None:
    with pytest.raises(RecipeError, match=r"n_steps|eta"):
        NoiseSchedule.from_config({}, n_steps, eta)


@pytest.mark.parametrize(
    "config",
    [
        {"thresholding": True, "dynamic_thresholding_ratio": 1.5},
        {"rescale_betas_zero_snr": True},
        {"use_exponential_sigmas": True},
        {"_class_name": "KDPM2DiscreteScheduler"},
        {"_class_name": "FlowMatchEulerDiscreteScheduler"},
        {"prediction_type": "flow"},
        {"variance_type": "learned_range", "_class_name": "DDPMScheduler"},
        {"beta_schedule": "cosine"},
        {"timestep_spacing": "log"},
        {"trained_betas": [0.1, 0.2]},
        {"steps_offset": 999},
        {"num_train_timesteps": 0},
        {"num_train_timesteps": MAX_TRAIN_TIMESTEPS + 1},
    ],
)
def test_refuses_what_it_does_not_compute(config: dict[str, Any]) -> None:
    with pytest.raises(ModelError):
        NoiseSchedule.from_config(config, 10, 0.0)


@pytest.mark.parametrize("spacing", ["leading", "trailing", "linspace"])
@pytest.mark.parametrize("n_steps", [1, 7, 20, 999, 1000])
def test_timesteps_decrease_and_noise_falls(spacing: str, n_steps: int) -> None:
    s = NoiseSchedule.from_config({"timestep_spacing": spacing}, n_steps, 1.0)
    assert len(s) == n_steps and (np.diff(s.timesteps) < 0).all()
    assert (s.alphas_cumprod_prev > s.alphas_cumprod).all() and s.alphas_cumprod_prev[-1] >= 0.9999
    assert np.isfinite(s.sigmas).all() and np.isfinite(s.epsilon_gains).all() and (s.epsilon_gains <= 0).all()
