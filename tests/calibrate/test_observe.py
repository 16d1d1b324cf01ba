"""Observed layers: histograms, multiply-accumulates and Hessians."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from cases import Case, sampling_of
from models import own_model
from torch import nn

from ptqd_export.calibrate import Network, collect, observe, open_model
from ptqd_export.calibrate.observe import SMOOTHED_SHARE, ObservedLayer, observed_stride, smoothing
from ptqd_export.calibrate.torch_engine import TorchEngine
from ptqd_export.errors import ModelError


def test_observed_layers(case: Case) -> None:
    recipe, network, sampling, trajectories, observed = case
    names = list(observed.layers)
    convs = [name for name in names if observed.layers[name].kind == "conv"]
    assert convs[0] == "conv_in" and convs[-1] == "conv_out"
    assert (
        names.index("down_blocks.0.resnets.0.conv1")
        < names.index("mid_block.resnets.0.conv1")
        < names.index("up_blocks.1.resnets.0.conv1")
    )
    assert observed.layers["conv_in"].macs == 64 * 16 * 9
    assert observed.layers["down_blocks.1.attentions.0.to_q"].macs == 16 * 32 * 32
    assert (
        observed.layers["time_embedding.linear_1"].vector
        and observed.layers["time_embedding.linear_1"].macs == 16 * 64
    )
    assert not observed.layers["down_blocks.1.attentions.0.to_q"].vector
    # conv_in sees the calibration trajectories' x_t, in both branches, at every step.
    x = np.concatenate([b.x for b in trajectories if b.indices.start in trajectories.calibration], axis=1)
    assert (
        observed.layers["conv_in"].channels.largest.tolist() == [np.abs(x).max()]
        and observed.layers["conv_in"].input.total == 2 * x.size
    )
    again = observe(network, sampling, recipe, trajectories)
    for name, layer in again.layers.items():
        assert (layer.input.counts == observed.layers[name].input.counts).all() and np.array_equal(
            layer.output.high, observed.layers[name].output.high
        )
    assert again.product_macs == observed.product_macs
    assert not any(m._forward_hooks for m in network.module.modules())


@pytest.mark.parametrize(("size", "n_steps", "share"), [(20, 6, 2), (40, 3, 3), (18, 1, 1)])
def test_every_trajectory_is_observed(tmp_path: Path, size: int, n_steps: int, share: int) -> None:
    """At some of the steps, at each step as many as at others; at one step at least, however many they
    are."""
    recipe = own_model(
        tmp_path,
        [1, 2, 2],
        "self.conv = nn.Conv2d(1, 1, 1)",
        "self.conv(sample)",
        calibration={"size": size, "batch_size": 7},
        sampler={"n_steps": n_steps, "eta": 0.0},
        quantization={"smoothing": 0.0},
    )
    network = open_model(recipe)
    sampling = sampling_of(network, recipe)
    trajectories = collect(network, sampling, recipe, tmp_path / "t")
    seen: list[torch.Tensor] = []
    conv: Any = network.module.get_submodule("conv")
    conv.register_forward_pre_hook(lambda _, args: seen.append(args[0]))
    observe(network, sampling, recipe, trajectories)
    got = {value.numpy().tobytes() for batch in seen for value in batch}
    whole = trajectories.first(size).x
    hits = np.array([[whole[step, i].tobytes() in got for i in range(size)] for step in range(n_steps)])
    assert hits.any(0).all() and hits.sum() == pytest.approx(size * n_steps / share, abs=2)
    assert np.ptp(hits.sum(1)) <= 3


def test_long_runs_are_observed_at_some_steps() -> None:
    """Eight trajectories' worth of 50 steps, however many there are; all of a short run, of all trajectories
    some steps."""
    for size, steps, stride in ((8, 20, 1), (32, 20, 4), (8, 50, 1), (8, 250, 5), (32, 250, 20), (64, 4, 4)):
        assert observed_stride(size, steps) == stride
    for size, steps in ((8, 51), (8, 75), (8, 99), (4, 250), (2, 1000), (32, 75), (31, 333)):
        stride = observed_stride(size, steps)
        assert size * steps / stride <= 400 < size * steps / max(stride - 1, 1) or stride == 1


def test_products_outside_layers_are_counted(case: Case) -> None:
    """Q K^T and softmax(..) V of each attention: 16 tokens of 32 channels."""
    attentions = sum(name.endswith(".to_q") for name in case.observed.layers)
    assert attentions >= 3 and case.observed.product_macs == attentions * 2 * 16 * 16 * 32


def largest_of_the_first_look(case: Case) -> dict[str, np.ndarray]:
    """Largest |x| per input channel of every conv, at the steps that give the factors: of each trajectory
    every SMOOTHED_SHARE-th, the first of them by the golden ratio."""
    found: dict[str, np.ndarray] = {}

    def see(name: str) -> Any:
        def hook(_: nn.Module, args: tuple[torch.Tensor, ...]) -> None:
            largest = args[0].abs().amax((0, 2, 3)).numpy()
            found[name] = np.maximum(found.get(name, largest), largest)

        return hook

    convs = {n: m for n, m in case.network.module.named_modules() if isinstance(m, nn.Conv2d)}
    handles = [module.register_forward_pre_hook(see(name)) for name, module in convs.items()]
    with TorchEngine(case.network.module, case.sampling) as engine:
        for batch in case.trajectories:
            begin = [int(i * (5**0.5 - 1) / 2 % 1 * SMOOTHED_SHARE) for i in batch.indices]
            for step in range(len(case.sampling)):
                rows = [row for row, first in enumerate(begin) if (first + step) % SMOOTHED_SHARE == 0]
                if rows and batch.indices.start in case.trajectories.calibration:
                    conditions = {name: value[rows] for name, value in batch.conditions.items()}
                    case.sampling.predict(engine, batch.x[step][rows], step, conditions)
    for handle in handles:
        handle.remove()
    return found


def test_smoothing_evens_out_what_the_inputs_differ_in(case: Case) -> None:
    """At alpha 0.5 input and weight of a channel are equal after it: exactly for the steps that gave the
    factors, and on the whole for what all steps came to."""
    observed, network = case.observed.layers, case.network.module
    first, before, after, other = largest_of_the_first_look(case), [], [], []
    for name, seen in observed.items():
        assert (seen.smooth is not None) == (seen.kind == "conv"), name
        if seen.smooth is None:
            continue
        smooth = seen.smooth.astype(np.float64)
        assert smooth.shape == seen.channels.largest.shape and seen.smooth.dtype == np.float32
        assert np.exp(np.log(smooth).mean()) == pytest.approx(1, rel=1e-5), name
        even = seen.channels.largest / seen.smooth
        assert seen.input.largest == pytest.approx(even.max(), rel=1e-6), "the histogram is of x / m"
        assert (first[name] <= seen.channels.largest).all(), name
        weight: Any = network.get_submodule(name).weight
        weights = weight.abs().amax((0, 2, 3)).numpy()
        assert np.log(first[name] / weights / smooth**2).std() < 1e-5, name
        ratio = seen.channels.largest / weights
        before.append(np.log(ratio).std())
        after.append(np.log(ratio / smooth**2).std())
        other.append(np.log(ratio / smooth).std())
    assert np.mean(after) < 0.8 * np.mean(before) and np.mean(after) < np.mean(other)
    assert max(after) > 1e-3, "the other steps differ: the exact test could fail"
    assert sum(len(set(seen.smooth)) > 1 for seen in observed.values() if seen.smooth is not None) > 5


def test_smoothing_factors() -> None:
    """alpha between inputs and weights; channels of nothing and convs with groups are left alone."""
    conv = nn.Conv2d(4, 6, 3)
    seen = ObservedLayer("conv")
    seen.channels.add(torch.tensor([[1.0, -16.0, 0.25, 0.0]])[..., None, None], 1)
    with torch.no_grad():
        conv.weight[:, 1] *= 4
        conv.weight[:, 2] = 0
    x, w = np.array([1.0, 16.0]), conv.weight.detach().abs().amax((0, 2, 3))[:2].double().numpy()
    for alpha in (0.25, 0.5, 1.0):
        smooth = smoothing(seen, conv, alpha)
        assert smooth is not None and smooth.dtype == np.float32 and smooth[2:].tolist() == [1, 1]
        assert smooth[0] * smooth[1] == pytest.approx(1, rel=1e-6)
        wanted = x**alpha / w ** (1 - alpha)
        assert smooth[1] / smooth[0] == pytest.approx(wanted[1] / wanted[0], rel=1e-5)
    with torch.no_grad():
        conv.weight[:, 1] *= 1e-9
    extreme = smoothing(seen, conv, 0.5)
    assert extreme is not None and extreme[:2].tolist() == [1 / 64, 64]
    assert smoothing(seen, nn.Conv2d(4, 6, 3, groups=2), 0.5) is None
    assert smoothing(ObservedLayer("linear"), nn.Linear(4, 6), 0.5) is None
    nothing = ObservedLayer("conv")
    nothing.channels.add(torch.zeros(1, 4, 1, 1), 1)
    assert smoothing(nothing, conv, 0.5) is None


def test_smoothed_products_are_the_same(case: Case) -> None:
    """W m times x / m is W x, and not with the factors of another channel."""
    name = "down_blocks.0.resnets.0.conv1"
    conv: Any = copy.deepcopy(case.network.module.get_submodule(name)).double()
    smooth = case.observed.layers[name].smooth
    assert smooth is not None
    factors = torch.from_numpy(smooth).double()
    x = torch.randn(2, conv.in_channels, 6, 6, dtype=torch.float64)
    with torch.no_grad():
        wanted = conv(x)
        conv.weight *= factors[:, None, None]
        torch.testing.assert_close(conv(x / factors[:, None, None]), wanted)
        assert float((conv(x / factors.flip(0)[:, None, None]) - wanted).abs().max()) > 1e-3


@pytest.mark.parametrize("groups", [1, 2])
def test_hessians_are_those_of_the_flattened_weight(tmp_path: Path, groups: int) -> None:
    """Output energy from the Hessian, w^T H w summed, equals that of the layer itself when all positions are
    taken; w m where inputs are smoothed."""
    recipe = own_model(
        tmp_path,
        [2, 6, 6],
        f"""self.conv = nn.Conv2d(2, 4, 3, 2, padding=1, groups={groups}, bias=False)
            self.up = nn.ConvTranspose2d(4, 2, 2, 2)""",
        "self.up(self.conv(sample))",
        calibration={"size": 4, "batch_size": 4},
        sampler={"n_steps": 3, "eta": 0.0},
    )
    network = open_model(recipe)
    sampling = sampling_of(network, recipe)
    trajectories = collect(network, sampling, recipe, tmp_path / "t")
    seen = observe(network, sampling, recipe, trajectories).layers
    assert list(seen) == ["conv"] and seen["conv"].hessians is not None
    conv: Any = network.module.get_submodule("conv")
    x = torch.from_numpy(trajectories.first(4).x.reshape(-1, 2, 6, 6))
    with torch.no_grad():
        expected = float((conv(x).double() ** 2).sum())
    smooth = seen["conv"].smooth
    assert (smooth is None) == (groups == 2)
    weight = conv.weight if smooth is None else conv.weight * torch.from_numpy(smooth)[:, None, None]
    rows = weight.reshape(groups, 4 // groups, -1)
    got = float(torch.einsum("gok,gkl,gol->", rows, seen["conv"].hessians, rows))
    assert got == pytest.approx(expected, rel=1e-4)


def test_values_that_are_not_finite_are_said_by_layer(case: Case) -> None:
    network = Network(copy.deepcopy(case.network.module), case.network.info, case.network.scheduler_config)
    weight: Any = network.module.get_submodule("mid_block.resnets.0.conv1").weight
    weight.view(-1)[0] = torch.inf
    with pytest.raises(
        ModelError, match=r"layer mid_block\.resnets\.0\.conv1 computes NaN or infinite .* step 0"
    ):
        observe(network, case.sampling, case.recipe, case.trajectories)
    assert not any(m._forward_hooks for m in network.module.modules())


def test_a_network_without_layers_is_refused(tmp_path: Path) -> None:
    recipe = own_model(tmp_path, [1, 4, 4], "", "0.1 * sample")
    network = open_model(recipe)
    sampling = sampling_of(network, recipe)
    trajectories = collect(network, sampling, recipe, tmp_path / "t")
    with pytest.raises(ModelError, match="net calls no Conv2d and no Linear: there is nothing to quantize"):
        observe(network, sampling, recipe, trajectories)
