"""The update graph of every solver: each step by itself, and a whole run by what it hands on."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from ptqd_export.backends.ort import OrtEngine
from ptqd_export.core.engine import KEPT, NEXT_KEPT, NEXT_SAMPLE, NEXT_STEP, NEXT_TIMESTEP, FakeEngine
from ptqd_export.core.model import InputSpec, ModelInfo
from ptqd_export.core.sampling import NoiseSource, Sampling
from ptqd_export.core.scheduler_config import SOLVERS
from ptqd_export.core.solvers import Solver
from ptqd_export.errors import ParityError
from ptqd_export.export import sampler_update, save
from ptqd_export.runtime import check_update

INFO = ModelInfo("toy", (2, 4, 4), (InputSpec("class_labels", num_classes=4, null_class=3),), "")
KINDS: dict[str, tuple[dict[str, Any], float, float]] = {
    "plain": ({"use_karras_sigmas": True}, 1.0, 0.0),
    "guided, rescaled, v": ({"prediction_type": "v_prediction"}, 2.5, 0.7),
    "bounded": ({"thresholding": True, "clip_sample": True, "sample_max_value": 2.0}, 2.5, 0.0),
}


def sampling_of(solver: Solver, kind: str, n_steps: int = 5) -> Sampling:
    config, scale, phi = KINDS[kind]
    eta = 0.5 if solver == "ddim" else 0.0
    return Sampling.of(
        INFO, config, n_steps=n_steps, eta=eta, guidance_scale=scale, guidance_rescale=phi, solver=solver
    )


def update_of(sampling: Sampling, folder: Path) -> OrtEngine:
    save({"update": sampler_update(sampling)}, folder, None)
    return OrtEngine(folder / "update.onnx", optimise=False)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("solver", SOLVERS)
def test_every_update_takes_the_solver_s_steps(solver: Solver, kind: str, tmp_path: Path) -> None:
    sampling = sampling_of(solver, kind)
    with update_of(sampling, tmp_path) as update:
        check_update(update, sampling)


@pytest.mark.parametrize("solver", SOLVERS)
def test_an_update_of_another_schedule_is_refused(solver: Solver, tmp_path: Path) -> None:
    """The negative: one of a step more."""
    with (
        update_of(sampling_of(solver, "plain", 6), tmp_path) as update,
        pytest.raises(ParityError, match="does not do what the schedule says at step"),
    ):
        check_update(update, sampling_of(solver, "plain"))


@pytest.mark.parametrize("solver", ["euler", "heun", "pndm", "sde-dpmsolver++", "unipc"])
def test_a_run_by_what_the_update_hands_on(solver: Solver, tmp_path: Path) -> None:
    """Outputs fed back as inputs, as on a device, against the host's loop."""
    sampling, labels = sampling_of(solver, "plain"), INFO.conditions([1, 2], 2)
    network = FakeEngine(lambda f: (np.tanh(f["sample"]) + f["timestep"][0] / 2000).astype(np.float32))
    wanted = sampling.sample(lambda _: network, labels, range(2), seed=7)
    source = NoiseSource(7, range(2), INFO.sample_shape)
    x = sampling.begin(source).x.astype(np.float32)
    kept = {f"{KEPT}{i}": np.zeros_like(x) for i in range(sampling.schedule.kept)}
    step, timestep = np.zeros(1, np.int64), np.full(2, sampling.schedule.timesteps[0])
    with update_of(sampling, tmp_path) as update:
        for i in range(len(sampling)):
            e = network({"sample": x, "timestep": timestep})["epsilon"]
            noise = source.draw() if sampling.draws(i) else np.zeros_like(x)
            out = update({"sample": x, "epsilon": e, "step": step, "noise": noise.astype(np.float32), **kept})
            x, step, timestep = (out[name] for name in (NEXT_SAMPLE, NEXT_STEP, NEXT_TIMESTEP))
            kept = {name: out[name.replace(KEPT, NEXT_KEPT)] for name in kept}
    np.testing.assert_allclose(x, wanted, rtol=0, atol=2e-5 * max(1.0, np.abs(wanted).max()))
