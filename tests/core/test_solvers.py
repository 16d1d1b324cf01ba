"""Every solver against diffusers' own scheduler, and what its table says of noise."""

from __future__ import annotations

import dataclasses
import importlib
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest

from ptqd_export.core.engine import SAMPLE, STEP, TIMESTEP, FakeEngine
from ptqd_export.core.model import InputSpec, ModelInfo
from ptqd_export.core.sampling import NoiseSource, Sampling, State
from ptqd_export.core.schedule import NoiseSchedule
from ptqd_export.core.scheduler_config import SOLVERS
from ptqd_export.core.solvers import NOISE, Solver
from ptqd_export.errors import ModelError, RecipeError

PLAIN = ModelInfo("plain", (2, 4, 4), (), "")
SDE = {"algorithm_type": "sde-dpmsolver++", "_class_name": "DPMSolverMultistepScheduler"}

THEIRS = pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning")
"""Diffusers' schedulers warn of each other's settings."""


@pytest.fixture
def script(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    monkeypatch.syspath_prepend(Path(__file__).parents[2] / "benchmarks")
    return importlib.import_module("solvers")


@THEIRS
@pytest.mark.parametrize("n_steps", [10, 20, 50])
def test_every_solver_is_diffusers(script: ModuleType, n_steps: int) -> None:
    """What the network sees at every evaluation, in a loop of its own; diffusers computes in float32."""
    found = {case.name: script.compare(case, n_steps, script.smooth) for case in script.CASES}
    assert {name: one.largest for name, one in found.items() if not one.largest < 1e-4} == {}
    assert len(found) == 21 and {one.kept for one in found.values()} == {0, 1, 2, 3, 4, 5}


@THEIRS
@pytest.mark.parametrize(
    ("name", "wrong"),
    [
        ("ddim", {"steps_offset": 0}),
        ("pndm, plms", {"set_alpha_to_one": True}),
        ("dpmsolver++, 2M", {"solver_type": "heun"}),
        ("unipc, bh2", {"disable_corrector": [3]}),
        ("lcm", {"timestep_scaling": 0.01}),
    ],
)
def test_the_comparison_sees_another_setting(
    script: ModuleType, name: str, wrong: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The negative: one key read wrong."""
    case = next(case for case in script.CASES if case.name == name)
    read = NoiseSchedule.from_config
    monkeypatch.setattr(
        script, "NoiseSchedule", type("Other", (), {"from_config": lambda c, *rest: read(c | wrong, *rest)})
    )
    try:
        assert script.compare(case, 10, script.smooth).largest > 1e-3
    except SystemExit as error:
        assert "timesteps" in str(error)


@THEIRS
@pytest.mark.parametrize("spacing", ["leading", "trailing", "linspace"])
@pytest.mark.parametrize("n_steps", [3, 7, 13])
def test_odd_numbers_of_steps_are_diffusers(script: ModuleType, spacing: str, n_steps: int) -> None:
    for case in script.CASES:
        runge_kutta = "Runge-Kutta" in case.name and n_steps < 4
        if "timestep_spacing" not in case.settings and not runge_kutta:
            case = dataclasses.replace(case, settings={**case.settings, "timestep_spacing": spacing})
            assert script.compare(case, n_steps, script.smooth).largest < 2e-4, case.name


@pytest.mark.parametrize("solver", SOLVERS)
def test_table_of_a_solver(solver: Solver) -> None:
    """Shapes, noise in the state alone, and a state that is left alone by nothing: x_0 in full at the end."""
    s = NoiseSchedule.from_config({}, 10, 1.0 if solver == "ddim" else 0.0, solver)
    table = s.table
    assert table.shape == (len(s), 1 + s.kept, 4 + s.kept) and len(s) >= 10 == s.n_steps
    assert not table[:, 1:, NOISE].any()
    noisy = solver in ("ddim", "ddpm", "euler-ancestral", "sde-dpmsolver++", "lcm")
    assert s.sigmas.any() == noisy and s.sigmas[-1] == 0
    assert len(s) == {"heun": 19, "pndm": 19}.get(solver, 10)
    assert s.timesteps.dtype == (np.int64 if solver not in ("euler", "heun") else s.timesteps.dtype)


def test_timesteps_between_train_timesteps_are_floats() -> None:
    whole = NoiseSchedule.from_config({"timestep_spacing": "leading"}, 10, 0.0, "euler")
    between = NoiseSchedule.from_config({"use_karras_sigmas": True}, 10, 0.0, "euler")
    assert (whole.timesteps.dtype, between.timesteps.dtype) == (np.int64, np.float32)
    sampling = Sampling(PLAIN, between)
    feeds = sampling.feeds(np.zeros((1, 2, 4, 4)), 3, {})
    assert feeds[TIMESTEP].dtype == np.float32 and feeds[TIMESTEP][0] == between.timesteps[3]


@pytest.mark.parametrize("solver", SOLVERS)
def test_gain_is_what_an_error_moves(solver: Solver, rng: np.random.Generator) -> None:
    """One prediction is off by 1, all other answers as they are: x / alpha ends off by c_i / alpha_i."""
    s = NoiseSchedule.from_config({"set_alpha_to_one": True}, 10, 0.0, solver)
    sampling, e = Sampling(PLAIN, s), rng.standard_normal((len(s), 1, 2, 4, 4))
    start = State(rng.standard_normal((1, 2, 4, 4)))

    def end(off: int | None) -> np.ndarray:
        state = start
        for i in range(len(s)):
            state = sampling.advance(state, e[i] + (i == off), i, 0.0, None)
        return state.x

    alphas = np.sqrt(np.append(s.alphas_cumprod[1:], s.alphas_cumprod_prev[-1]))
    for i in (0, 1, 4, len(s) - 1):
        moved = float((end(i) - end(None)).mean())
        if s.kept:
            np.testing.assert_allclose(
                s.epsilon_gains[i], moved * alphas[i] / alphas[-1], rtol=1e-8, atol=1e-9
            )
        elif i == len(s) - 1:
            np.testing.assert_allclose(s.epsilon_gains[i], moved, rtol=1e-8)
    assert (s.epsilon_gains < 1e-9).all() or solver == "pndm"  # its weights have both signs


DATA_VAR, N = 0.05, 4000


def _variances(s: NoiseSchedule, var: np.ndarray, sigmas: np.ndarray) -> np.ndarray:
    """Variance of x at each step and of x_0, for Gaussian data and predictions with white noise."""
    rng, out = np.random.default_rng(1), []

    def run(feeds: Any) -> np.ndarray:
        i, x = int(feeds[STEP][0]), feeds[SAMPLE]
        a = s.alphas_cumprod[i]
        e = np.sqrt(1 - a) / (a * DATA_VAR + 1 - a) * x
        return np.asarray(e + np.sqrt(var[i]) * rng.standard_normal(x.shape))

    engine = FakeEngine(run)
    x = Sampling(PLAIN, s).sample(
        lambda _: engine, {}, range(N), seed=0, sigmas=sigmas, on_step=lambda i, x, e: out.append(x.var())
    )
    return np.array([*out, x.var()])


@pytest.mark.parametrize(
    ("config", "solver"),
    [
        ({"variance_type": "fixed_large"}, "ddpm"),
        ({}, "ddpm"),
        ({}, "euler-ancestral"),
        ({}, "lcm"),
        ({**SDE, "solver_order": 1}, "sde-dpmsolver++"),
        ({**SDE, "solver_order": 2}, "sde-dpmsolver++"),
    ],
)
def test_recalibration_keeps_every_variance(config: dict[str, Any], solver: Solver) -> None:
    """Noise of 40 % of what each step could absorb: with sigma' every marginal is the noise-free one, and
    without it it is not. In second order, the factor P is too small where little noise is left: the last two
    states are left to the next test."""
    s = NoiseSchedule.from_config({"clip_sample": False, **config}, 10, 0.0, solver)
    direct = s.linear_table[:, 0, 1]
    var = np.where(s.sigmas > 0, 0.4 * s.sigmas**2 / np.maximum(direct**2, 1e-12), 0.0)
    var = np.minimum(var, 2.0)
    sigmas = s.recalibrated_sigmas(var)
    assert (sigmas[s.sigmas > 0] > 0).all() and (sigmas <= s.sigmas).all()
    clean, off, kept = (_variances(s, v, g) for v, g in ((0 * var, s.sigmas), (var, s.sigmas), (var, sigmas)))
    tolerance = 6 * np.sqrt(2 / (N * 32))
    whole = slice(None, -2 if config.get("solver_order") == 2 else None)
    assert np.abs(kept / clean - 1)[whole].max() < tolerance
    assert np.abs(off / clean - 1)[whole].max() > 5 * tolerance


@pytest.mark.parametrize("data_var", [0.01, 0.05, 0.25])
def test_second_order_sde_needs_its_cross_term(data_var: float, monkeypatch: pytest.MonkeyPatch) -> None:
    """The negative: the squares of a prediction's own factors take off too much, at the end and before."""
    monkeypatch.setattr(sys.modules[__name__], "DATA_VAR", data_var)
    s = NoiseSchedule.from_config(SDE, 10)
    direct = s.linear_table[:, 0, 1]
    var = np.where(s.sigmas > 0, 0.4 * s.sigmas**2 / np.maximum(direct**2, 1e-12), 0.0).clip(max=2.0)
    alone = np.sqrt(np.maximum(0, s.sigmas**2 - direct**2 * var))
    clean, off, wrong, right = (
        _variances(s, v, g)
        for v, g in ((0 * var, s.sigmas), (var, s.sigmas), (var, alone), (var, s.recalibrated_sigmas(var)))
    )
    largest = [np.abs(v / clean - 1).max() for v in (right, wrong, off)]
    assert largest[0] < 0.75 * largest[1] and largest[0] < 0.5 * largest[2]
    assert np.abs(right / clean - 1)[:-2].mean() < 0.2 * np.abs(wrong / clean - 1)[:-2].mean()


@pytest.mark.parametrize("solver", ["heun", "pndm", "unipc", "sde-dpmsolver++"])
def test_replay_finds_what_is_kept(solver: Solver) -> None:
    """From the states and predictions of a run, at any step."""
    s = NoiseSchedule.from_config({}, 6, 0.0, solver)
    sampling, engine = Sampling(PLAIN, s), FakeEngine(lambda f: np.tanh(f[SAMPLE]))
    seen: list[tuple[np.ndarray, np.ndarray]] = []
    x = sampling.sample(lambda _: engine, {}, range(2), seed=4, on_step=lambda i, x, e: seen.append((x, e)))
    states, predictions = (np.stack(values) for values in zip(*seen, strict=True))
    for first in (0, 1, 3, len(s)):
        source = NoiseSource(4, range(2), PLAIN.sample_shape)
        state = sampling.replay(states, predictions, source, first)
        for i in range(first, len(s)):
            e, noise = sampling.predict(engine, state.x, i, {}), source.draw() if sampling.draws(i) else None
            state = sampling.advance(state, e, i, float(s.sigmas[i]), noise)
        np.testing.assert_allclose(state.x, x, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("kind", ["epsilon", "v_prediction", "sample"])
def test_guidance_rescale_is_of_the_network_s_output(kind: str, rng: np.random.Generator) -> None:
    """As rescale_noise_cfg of diffusers' pipelines does it."""
    info = ModelInfo("labels", (2, 4, 4), (InputSpec("y", num_classes=4, null_class=3),), "")
    config = {"prediction_type": kind}
    plain, rescaled = (
        Sampling.of(info, config, n_steps=5, guidance_scale=3.0, guidance_rescale=phi) for phi in (0.0, 0.7)
    )
    x, null, text = rng.standard_normal((3, 2, 2, 4, 4))
    a, b = (rows[2] for rows in plain.schedule.epsilon_coefficients())
    rows = np.concatenate([a * null + b * x, a * text + b * x])
    guided = null + 3 * (text - null)
    std_text, std_cfg = (v.std((1, 2, 3), ddof=1, keepdims=True) for v in (text, guided))
    wanted = 0.7 * guided * (std_text / std_cfg) + (1 - 0.7) * guided
    np.testing.assert_allclose(rescaled.guide(rows, x, 2), a * wanted + b * x, rtol=1e-9, atol=1e-9)
    np.testing.assert_allclose(plain.guide(rows, x, 2), a * guided + b * x, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize(
    ("config", "solver", "message"),
    [
        ({"_class_name": "FlowMatchEulerDiscreteScheduler"}, None, "'FlowMatchEuler.*flow matching"),
        ({"_class_name": "FlowMatchEulerDiscreteScheduler"}, "ddim", "flow matching"),
        ({"_class_name": "EDMEulerScheduler"}, None, "'EDMEulerScheduler', which is not of the discrete"),
        ({"_class_name": "ScoreSdeVeScheduler"}, "euler", "VE are others"),
        ({"_class_name": "LMSDiscreteScheduler"}, None, r"set sampler.solver \(--solver\) to one of ddim"),
        ({"_class_name": 7}, None, "of 7, which is not"),
        ({"prediction_type": "sample"}, "pndm", "'sample': expected one of .* with solver pndm"),
        ({"timestep_type": "continuous"}, "euler", "timestep_type 'continuous'"),
        ({"algorithm_type": "dpmsolver"}, "dpmsolver++", "algorithm_type 'dpmsolver'"),
        ({"variance_type": "fixed_large_log"}, "ddpm", "variance_type 'fixed_large_log'"),
        ({"rescale_betas_zero_snr": True}, "heun", "rescale_betas_zero_snr, which solver heun"),
        ({"rescale_betas_zero_snr": True}, "ddim", "epsilon says nothing"),
        ({"solver_order": 4}, "unipc", "solver_order 4"),
        ({"original_inference_steps": 5000}, "lcm", "original_inference_steps 5000"),
        ({"predict_x0": False}, "unipc", "are not finite"),
    ],
)  # fmt: skip
def test_what_is_refused(config: dict[str, Any], solver: Solver | None, message: str) -> None:
    with pytest.raises(ModelError, match=message) as caught:
        NoiseSchedule.from_config(config, 10, 0.0, solver)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("n_steps", "eta", "solver", "message"),
    [
        (10, 0.5, "euler", "eta is 0.5, but it belongs to ddim"),
        (60, 0.0, "lcm", "give 1 to 50, the scheduler's original_inference_steps"),
        (3, 0.0, "pndm", "Runge-Kutta"),
    ],
)
def test_steps_and_eta_of_a_solver(n_steps: int, eta: float, solver: Solver, message: str) -> None:
    with pytest.raises(RecipeError, match=message):
        NoiseSchedule.from_config({}, n_steps, eta, solver)


def test_the_config_s_class_is_the_default() -> None:
    wanted = {
        "DDPMScheduler": "ddpm", "PNDMScheduler": "pndm", "EulerDiscreteScheduler": "euler",
        "DPMSolverMultistepScheduler": "dpmsolver++", "LCMScheduler": "lcm",
        "UniPCMultistepScheduler": "unipc",
    }  # fmt: skip
    for name, solver in wanted.items():
        s = NoiseSchedule.from_config({"_class_name": name}, 5)
        assert s.solver == solver
        assert Sampling(PLAIN, s).summary.startswith(f"{solver}, 5 steps")
    assert NoiseSchedule.from_config(SDE, 5).solver == "sde-dpmsolver++"
    assert NoiseSchedule.from_config({"_class_name": "LMSDiscreteScheduler"}, 5, 0.0, "ddim").solver == "ddim"
    heun = Sampling(PLAIN, NoiseSchedule.from_config({}, 5, 0.0, "heun"))
    assert heun.summary == "heun, 5 steps (9 evaluations), guidance 1"
