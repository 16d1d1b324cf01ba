"""Trajectories: what is collected, resuming, and what is refused."""

from __future__ import annotations

import hashlib
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors import safe_open
from test_calibrate_models import recipe_of, save_pipeline, tiny_unet

from ptqd_export.calibrate import Network, TorchEngine, Trajectories, collect, measure, open_model
from ptqd_export.calibrate.memory import available_bytes, check_memory, largest_layer_bytes
from ptqd_export.calibrate.trajectories import CALIBRATION_STREAM
from ptqd_export.engine import FakeEngine
from ptqd_export.errors import ModelError, ParityError, RecipeError
from ptqd_export.noise import NoiseStats
from ptqd_export.recipe import Recipe
from ptqd_export.sampler import NoiseSource, sample
from ptqd_export.schedule import NoiseSchedule


@pytest.fixture(scope="module")
def case(tmp_path_factory: pytest.TempPathFactory) -> tuple[Recipe, Network, NoiseSchedule]:
    recipe = recipe_of(save_pipeline(tmp_path_factory.mktemp("model") / "tiny"))
    network = open_model(recipe)
    return recipe, network, NoiseSchedule.from_config(network.scheduler_config, 4, 1.0)


def digests(trajectories: Trajectories) -> list[str]:
    return [hashlib.sha256(f.read_bytes()).hexdigest() for f in trajectories.files]


def test_collects_the_sampler_s_own_trajectories(case: tuple[Recipe, Network, NoiseSchedule], tmp_path: Path) -> None:
    recipe, network, schedule = case
    trajectories = collect(network, schedule, recipe, tmp_path / "t")
    assert (trajectories.n, trajectories.calibration, trajectories.held_out) == (6, range(4), range(4, 6))
    assert [b.indices for b in trajectories] == [range(3), range(3, 4), range(4, 6)]  # no batch straddles the two sets
    labels = np.concatenate([b.conditions["class_labels"] for b in trajectories])
    assert labels.tolist() == [0, 1, 2, 0, 1, 2]
    seen: list[tuple[np.ndarray, np.ndarray]] = []
    with TorchEngine(network, schedule) as engine:
        sample(
            lambda step: engine,
            schedule,
            network.info,
            {"class_labels": labels},
            [CALIBRATION_STREAM + i for i in range(6)],
            seed=recipe.calibration.seed,
            guidance_scale=2.0,
            on_step=lambda step, x, e: seen.append((x, e)),
        )
    x, e = (np.concatenate([b[i] for b in trajectories], axis=1) for i in (1, 2))
    assert x.shape == (4, 6, 1, 8, 8) and x.dtype == e.dtype == np.float32
    np.testing.assert_allclose(x, np.stack([s[0] for s in seen]), atol=1e-4)
    np.testing.assert_allclose(e, np.stack([s[1] for s in seen]), atol=1e-4)
    for seed in (recipe.calibration.seed, recipe.calibration.seed + 1):  # nothing a user draws was calibrated on
        drawn = NoiseSource(seed, range(100), network.info.sample_shape).draw()
        assert np.abs(x[0][:, None] - drawn[None]).max((2, 3, 4)).min() > 0.5
    first = trajectories.first(5)
    assert first.indices == range(5) and np.array_equal(first.x, x[:, :5]) and first.conditions["class_labels"].tolist() == [0, 1, 2, 0, 1]
    with safe_open(trajectories.files[0], "numpy") as file:  # a safetensors file like any other
        assert np.array_equal(file.get_tensor("x"), x[:, :3])


def test_deterministic_and_resumes_at_damaged_chunks(case: tuple[Recipe, Network, NoiseSchedule], tmp_path: Path) -> None:
    recipe, network, schedule = case
    expected = digests(collect(network, schedule, recipe, tmp_path / "a"))
    trajectories = collect(network, schedule, recipe, tmp_path / "b")
    assert digests(trajectories) == expected
    gone, cut, empty = trajectories.files
    gone.unlink()
    cut.write_bytes(cut.read_bytes()[:-1])
    empty.write_bytes(b"")
    assert digests(collect(network, schedule, recipe, tmp_path / "b")) == expected
    kept = gone.stat().st_mtime_ns
    collect(network, schedule, recipe, tmp_path / "b")
    assert gone.stat().st_mtime_ns == kept  # whole chunks are not sampled again
    other = recipe.override(calibration={"seed": 1})
    assert digests(collect(network, schedule, other, tmp_path / "b")) != expected
    assert not list((tmp_path / "b").glob("*.tmp"))


def test_divergence_names_the_step_and_leaves_nothing(case: tuple[Recipe, Network, NoiseSchedule], tmp_path: Path) -> None:
    recipe, network, schedule = case

    class Diverging(torch.nn.Module):
        def forward(self, sample: torch.Tensor, timestep: torch.Tensor, class_labels: torch.Tensor) -> torch.Tensor:
            return sample if int(timestep[0]) >= int(schedule.timesteps[1]) else sample * torch.inf

    broken = Network(Diverging(), network.info, network.scheduler_config)
    with pytest.raises(ModelError, match=r"NaN or infinite values at step 2 \(timestep 250\) of samples 0 to 2"):
        collect(broken, schedule, recipe, tmp_path / "t")
    assert not list((tmp_path / "t").iterdir())


def test_tensor_conditions_from_file_and_drawn(tmp_path: Path) -> None:
    (tmp_path / "net.py").write_text(
        "import torch\nclass Net(torch.nn.Module):\n def forward(self, sample, timestep, c):\n  return 0.1 * sample + c[:, :1, None, None]\n"
        "def make():\n return Net()\n"
    )
    (tmp_path / "scheduler_config.json").write_text("{}")
    values = np.arange(6, dtype=np.float32).reshape(3, 2)
    np.save(tmp_path / "c.npy", values)
    condition = {"name": "c", "dtype": "float32", "shape": [2], "values": "c.npy"}
    model = {"source": "net.py:make", "sample_shape": [1, 4, 4], "scheduler": "scheduler_config.json", "null_class": None}

    def conditions(name: str, **changes: object) -> np.ndarray:
        recipe = recipe_of(tmp_path, model=model | {"inputs": [condition | changes]})
        network = open_model(recipe)
        schedule = NoiseSchedule.from_config(network.scheduler_config, 2, 0.0)
        return np.concatenate([b.conditions["c"] for b in collect(network, schedule, recipe, tmp_path / name)])

    assert np.array_equal(conditions("file"), np.concatenate([values, values]))
    drawn = conditions("drawn", values=None)
    assert np.array_equal(drawn, conditions("again", values=None)) and len(np.unique(drawn)) == 12
    for damage, message in ((values[:, :1], "needs floats of shape"), (values.astype(np.int64), "needs floats"), (values * np.nan, "NaN")):
        np.save(tmp_path / "c.npy", damage)
        with pytest.raises(RecipeError, match=message):
            conditions("bad")
    (tmp_path / "c.npy").write_bytes(b"\x93NUMPY")
    with pytest.raises(RecipeError, match="cannot be read"):
        conditions("bad")


def test_memory_estimate(case: tuple[Recipe, Network, NoiseSchedule], tmp_path: Path) -> None:
    recipe, network, schedule = case
    largest = largest_layer_bytes(network)
    assert largest >= 2 * 16 * 8 * 8 * 4  # at least a full-resolution layer's input and output
    double = Network(tiny_unet(sample_size=16).eval(), network.info, network.scheduler_config)
    assert largest_layer_bytes(double) == largest  # measured on the sample shape, not on the config
    assert 0 < available_bytes() < 1 << 50
    check_memory(network, 4, 2.0)
    size = 1 << 40
    huge = recipe.override(calibration={"size": size, "batch_size": size})
    with pytest.raises(RecipeError, match=r"batch_size 1099511627776 needs about [\d.]+ GiB .* GiB is free: set it to at most [1-9]\d*"):
        collect(network, schedule, huge, tmp_path / "t")
    assert not (tmp_path / "t").exists()
    # Guidance doubles the batch.
    with pytest.raises(RecipeError) as guided:
        check_memory(network, size, 2.0)
    with pytest.raises(RecipeError) as plain:
        check_memory(network, size, 1.0)
    fits = [int(str(error.value).split()[-1]) for error in (guided, plain)]
    assert fits[1] == pytest.approx(2 * fits[0], rel=0.3)


def test_measure(case: tuple[Recipe, Network, NoiseSchedule], tmp_path: Path) -> None:
    recipe, network, schedule = case
    trajectories = collect(network, schedule, recipe, tmp_path / "t")

    def run(engine: object, subset: str = "all") -> list[NoiseStats]:
        return measure(engine, network.info, schedule, trajectories, 2.0, subset)  # type: ignore[arg-type]

    with TorchEngine(network, schedule) as engine:
        exact = run(engine)
        biased = FakeEngine(lambda f: 1.1 * engine(f)["epsilon"] + 0.5, engine.inputs)
        stats = run(biased)
        assert [len(run(biased, s)) for s in ("calibration", "held_out")] == [4, 2]
        np.testing.assert_array_equal(stats[4].d, run(biased, "held_out")[0].d)
    assert len(exact) == 6 and NoiseStats.pool(exact).snr.min() > 1e8
    pooled = NoiseStats.pool(stats)
    np.testing.assert_allclose(pooled.count, 6 * 64)
    np.testing.assert_allclose(pooled.k, 0.1, atol=1e-4)
    np.testing.assert_allclose(pooled.bias, 0.5, atol=1e-4)
    with pytest.raises(ParityError, match="NaN or infinite values at step 0"):
        run(FakeEngine(lambda f: f["sample"] * np.nan, ("sample", "timestep", "class_labels")))
