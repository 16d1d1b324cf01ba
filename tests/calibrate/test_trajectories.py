"""Trajectories: what is collected, resuming, and what is refused."""

from __future__ import annotations

import hashlib
from pathlib import Path

import numpy as np
import pytest
import torch
from cases import Case, sampling_of
from models import own_model
from safetensors import safe_open

from ptqd_export.calibrate import Network, TorchEngine, Trajectories, collect, open_model
from ptqd_export.calibrate.trajectories import CALIBRATION_STREAM
from ptqd_export.core.sampling import NoiseSource
from ptqd_export.errors import ModelError, RecipeError


def digests(trajectories: Trajectories) -> list[str]:
    return [hashlib.sha256(f.read_bytes()).hexdigest() for f in trajectories.files]


def test_collects_the_sampler_s_own_trajectories(case: Case, tmp_path: Path) -> None:
    recipe, network, sampling, *_ = case
    trajectories = collect(network, sampling, recipe, tmp_path / "t")
    assert (trajectories.n, trajectories.calibration, trajectories.held_out) == (6, range(4), range(4, 6))
    assert [b.indices for b in trajectories] == [
        range(3),
        range(3, 4),
        range(4, 6),
    ]  # no batch straddles the two sets
    labels = np.concatenate([b.conditions["class_labels"] for b in trajectories])
    assert labels.tolist() == [0, 1, 2, 0, 1, 2]
    seen: list[tuple[np.ndarray, np.ndarray]] = []
    with TorchEngine(network.module, sampling) as engine:
        sampling.sample(
            lambda step: engine,
            {"class_labels": labels},
            [CALIBRATION_STREAM + i for i in range(6)],
            seed=recipe.calibration.seed,
            on_step=lambda step, x, e: seen.append((x, e)),
        )
    x, e = (np.concatenate([b[i] for b in trajectories], axis=1) for i in (1, 2))
    assert x.shape == (4, 6, 1, 8, 8) and x.dtype == e.dtype == np.float32
    np.testing.assert_allclose(x, np.stack([s[0] for s in seen]), atol=1e-4)
    np.testing.assert_allclose(e, np.stack([s[1] for s in seen]), atol=1e-4)
    for seed in (
        recipe.calibration.seed,
        recipe.calibration.seed + 1,
    ):  # nothing a user draws was calibrated on
        drawn = NoiseSource(seed, range(100), network.info.sample_shape).draw()
        assert np.abs(x[0][:, None] - drawn[None]).max((2, 3, 4)).min() > 0.5
    first = trajectories.first(5)
    assert (
        first.indices == range(5)
        and np.array_equal(first.x, x[:, :5])
        and first.conditions["class_labels"].tolist() == [0, 1, 2, 0, 1]
    )
    with safe_open(trajectories.files[0], "numpy") as file:  # a safetensors file like any other
        assert np.array_equal(file.get_tensor("x"), x[:, :3])


def test_deterministic_and_resumes_at_damaged_chunks(case: Case, tmp_path: Path) -> None:
    recipe, network, sampling, *_ = case
    expected = digests(collect(network, sampling, recipe, tmp_path / "a"))
    trajectories = collect(network, sampling, recipe, tmp_path / "b")
    assert digests(trajectories) == expected
    gone, cut, empty = trajectories.files
    gone.unlink()
    cut.write_bytes(cut.read_bytes()[:-1])
    empty.write_bytes(b"")
    assert digests(collect(network, sampling, recipe, tmp_path / "b")) == expected
    kept = gone.stat().st_mtime_ns
    collect(network, sampling, recipe, tmp_path / "b")
    assert gone.stat().st_mtime_ns == kept  # whole chunks are not sampled again
    other = recipe.override(calibration={"seed": 1})
    assert digests(collect(network, sampling, other, tmp_path / "b")) != expected
    assert sorted((tmp_path / "b").iterdir()) == sorted(trajectories.files)


def test_divergence_names_the_step_and_leaves_nothing(case: Case, tmp_path: Path) -> None:
    recipe, network, sampling, *_ = case

    class Diverging(torch.nn.Module):
        def forward(
            self, sample: torch.Tensor, timestep: torch.Tensor, class_labels: torch.Tensor
        ) -> torch.Tensor:
            return sample if int(timestep[0]) >= int(sampling.schedule.timesteps[1]) else sample * torch.inf

    broken = Network(Diverging(), network.info, network.scheduler_config)
    with pytest.raises(
        ModelError, match=r"NaN or infinite values at step 2 \(timestep 250\) of samples 0 to 2"
    ):
        collect(broken, sampling, recipe, tmp_path / "t")
    assert not list((tmp_path / "t").iterdir())


def test_tensor_conditions_from_file_and_drawn(tmp_path: Path) -> None:
    values = np.arange(6, dtype=np.float32).reshape(3, 2)
    np.save(tmp_path / "c.npy", values)
    condition = {"name": "c", "dtype": "float32", "shape": [2], "values": "c.npy"}

    def conditions(name: str, **changes: object) -> np.ndarray:
        inputs = (condition | changes,)
        recipe = own_model(
            tmp_path,
            [1, 4, 4],
            "",
            "0.1 * sample + c[:, :1, None, None]",
            inputs,
            sampler={"n_steps": 2, "eta": 0.0, "guidance_scale": 2.0},
        )
        network = open_model(recipe)
        collected = collect(network, sampling_of(network, recipe), recipe, tmp_path / name)
        return np.concatenate([b.conditions["c"] for b in collected])

    assert np.array_equal(conditions("file"), np.concatenate([values, values]))
    drawn = conditions("drawn", values=None)
    assert np.array_equal(drawn, conditions("again", values=None)) and len(np.unique(drawn)) == 12
    for damage, message in (
        (values[:, :1], "needs floats of shape"),
        (values.astype(np.int64), "needs floats"),
        (values * np.nan, "NaN"),
    ):
        np.save(tmp_path / "c.npy", damage)
        with pytest.raises(RecipeError, match=message):
            conditions("bad")
    (tmp_path / "c.npy").write_bytes(b"\x93NUMPY")
    with pytest.raises(RecipeError, match="cannot be read"):
        conditions("bad")
