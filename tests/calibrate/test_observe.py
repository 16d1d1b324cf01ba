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

from ptqd_export.calibrate import Network, collect, observe, open_model
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
        observed.layers["conv_in"].input.largest == np.abs(x).max()
        and observed.layers["conv_in"].input.total == 2 * x.size
    )
    again = observe(network, sampling, recipe, trajectories)
    for name, layer in again.layers.items():
        assert (
            layer.output.counts == observed.layers[name].output.counts
        ).all() and layer.output.largest == observed.layers[name].output.largest
    assert not any(m._forward_hooks for m in network.module.modules())


@pytest.mark.parametrize("groups", [1, 2])
def test_hessians_are_those_of_the_flattened_weight(tmp_path: Path, groups: int) -> None:
    """Output energy from the Hessian, w^T H w summed, equals that of the layer itself when all positions are
    taken."""
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
    rows = conv.weight.reshape(groups, 4 // groups, -1)
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
