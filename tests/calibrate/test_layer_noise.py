"""Noise of single layers: what it is of, that it falls with bits, and that the network is left as it was."""

from __future__ import annotations

import json
import os
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from cases import W4A4, W4A8, W8A8, Case

from ptqd_export.calibrate import given_layers, layer_noise, quantize, sensitivity
from ptqd_export.calibrate.simulate import SimulatedLayer
from ptqd_export.core.bits import LayerSensitivity, to_measure
from ptqd_export.core.precision import Precision
from ptqd_export.core.sampling import Sampling

MIXED = Precision.parse("w4a4+")
LAYERS = ("down_blocks.0.resnets.0.conv1", "mid_block.resnets.0.conv2", "down_blocks.1.attentions.0.to_q")


def measured(
    case: Case,
    layers: tuple[str, ...] = LAYERS,
    notes: Path = Path(os.devnull),
    precision: Precision = MIXED,
) -> LayerSensitivity:
    recipe, network, sampling, trajectories, observed = case
    return sensitivity(network, observed, sampling, trajectories, precision, recipe, layers, notes)


def patched(case: Case) -> list[str]:
    """Modules whose forward is not that of their class."""
    return [name for name, module in case.network.module.named_modules() if "forward" in vars(module)]


@pytest.fixture(scope="module")
def found(case: Case) -> LayerSensitivity:
    return measured(case)


def test_more_bits_make_less_noise(case: Case, found: LayerSensitivity) -> None:
    assert set(found.layers) == set(LAYERS) and tuple(found.noise) == to_measure(MIXED)
    assert found.macs == tuple(case.observed.layers[name].macs for name in found.layers)
    assert found.steps == tuple(range(len(case.sampling))) and len(found.weights) == len(found.steps)
    for weights in (3, 4):
        widths = [Precision(weights, inputs) for inputs in (4, 5, 6, 8)]
        for name, *noise in zip(found.layers, *map(found.total, (*widths, W8A8)), strict=True):
            assert noise[-1] > 0 and noise[0] < 1 and noise == sorted(set(noise), reverse=True), name


def test_noise_of_weights_and_inputs_adds(case: Case, found: LayerSensitivity) -> None:
    """What is derived for weights of a bit less, against the layer alone at just that."""
    few = Precision(3, 4)
    alone = measured(case, precision=few)
    rows = zip(found.layers, found.total(few), alone.total(few), found.total(W4A4), strict=True)
    added = []
    for name, derived, really, wider in rows:
        assert derived == pytest.approx(really, rel=0.35), name
        added.append(derived / wider)
    assert max(added) > 1.5  # it is not that nothing is added


def test_it_is_the_noise_of_a_layer_alone(case: Case, found: LayerSensitivity) -> None:
    """Against a forward hook, which puts the layer's quantized result in the place of its own."""
    recipe, network, sampling, trajectories, observed = case
    name, step = LAYERS[1], 2
    layer = quantize(network, observed, W4A4, recipe).layers[name]
    simulated = SimulatedLayer(layer, layer_noise.Emission.PORTABLE, layer.geometry)
    _, x, e, conditions = trajectories.first(layer_noise.SENSITIVITY_SAMPLES)
    module: Any = network.module.get_submodule(name)
    handle = module.register_forward_hook(lambda m, args, out: simulated(*args))
    try:
        with layer_noise.TorchEngine(network.module, sampling) as engine:
            d = sampling.predict(engine, x[step], step, conditions) - e[step]
    finally:
        handle.remove()
    wanted = float((d.astype(np.float64) ** 2).mean() / (e[step].astype(np.float64) ** 2).mean())
    assert found.noise[W4A4][found.layers.index(name)][found.steps.index(step)] == pytest.approx(
        wanted, rel=1e-4
    )
    gains = case.sampling.schedule.epsilon_gains**2
    assert found.weights == pytest.approx(gains[list(found.steps)], rel=1e-5)


def test_a_step_stands_for_those_around(case: Case) -> None:
    """With more steps than are measured: the middles of four groups, and what all steps of each weigh."""
    sampling = Sampling.of(case.network.info, case.network.scheduler_config, n_steps=10)
    steps, weights = layer_noise.steps_and_weights(sampling)
    gains = sampling.schedule.epsilon_gains**2
    groups = (range(2), range(2, 5), range(5, 8), range(8, 10))
    assert steps == (0, 3, 6, 8)
    assert weights == pytest.approx([sum(gains[step] for step in group) for group in groups], rel=1e-5)


def test_it_repeats_itself(case: Case, found: LayerSensitivity) -> None:
    """To the last digit, whatever the order in which layers are named."""
    assert measured(case, LAYERS[::-1]) == found


def test_what_a_stop_left_is_taken_up(
    case: Case, found: LayerSensitivity, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Line by line, but for one that was cut or is none; what the file says is what counts."""
    made: list[str] = []

    class Counted(SimulatedLayer):
        def __init__(self, layer: Any, *more: Any) -> None:
            made.append(layer.name)
            super().__init__(layer, *more)

    monkeypatch.setattr(layer_noise, "SimulatedLayer", Counted)
    notes = tmp_path / "notes.part"
    assert measured(case, notes=notes) == found and len(made) == 18
    lines = notes.read_text().splitlines(keepends=True)
    assert len(lines) == 18
    for left in ([*lines[:4], lines[4][:-3]], ["[1]\n", "nonsense\n", *lines[:4], '["a", "b", [-1.0]]\n']):
        notes.write_text("".join(left))
        made.clear()
        assert measured(case, notes=notes) == found and len(made) == 14
    name, level, row = json.loads(lines[0])
    notes.write_text(json.dumps([name, level, [0.5, *row[1:]]]) + "\n")
    assert measured(case, notes=notes).noise[Precision.parse(level)][0][0] == 0.5


def test_the_network_is_left_as_it_was(case: Case, monkeypatch: pytest.MonkeyPatch) -> None:
    """Also where a call fails half-way."""
    before = torch.nn.Module.state_dict(case.network.module)
    copies = {name: value.clone() for name, value in before.items()}
    measured(case, LAYERS[:1])
    assert patched(case) == []
    calls = []

    class Failing(SimulatedLayer):
        def __call__(self, x: torch.Tensor) -> torch.Tensor:
            assert len(patched(case)) == 1, "one layer at a time"
            calls.append(x)
            if len(calls) == 4:
                raise RuntimeError("half-way")
            return super().__call__(x)

    monkeypatch.setattr(layer_noise, "SimulatedLayer", Failing)
    with pytest.raises(RuntimeError, match="half-way"):
        measured(case)
    assert len(calls) == 4 and patched(case) == []
    assert all(torch.equal(value, copies[name]) for name, value in before.items())


def test_layers_that_stay_float_are_not_measured(case: Case) -> None:
    """Neither the edges nor what the exported graph does not hold."""
    only = replace(case.recipe, quantization=replace(case.recipe.quantization, skip=("mid_block*",)))
    found = measured(case._replace(recipe=only), ("conv_in", *LAYERS[:2]))
    assert found.layers == LAYERS[:1]


def test_layers_given_by_hand(case: Case) -> None:
    """The last glob that matches counts."""
    names = ("a.conv1", "a.conv2", "b.conv2", "b.to_q")
    globs = ("*.conv2=w4a8", "b.*=w8a8", "nothing=w2a2", "b.conv2=w5a6")
    recipe = case.recipe.override(quantization={"layer_bits": globs})
    assert given_layers(recipe, names) == {"a.conv2": W4A8, "b.conv2": Precision(5, 6), "b.to_q": W8A8}
    assert given_layers(case.recipe, names) == {}


def test_assigned_bits_reach_the_codes(case: Case) -> None:
    """The layers at their own bits, the rest at the base."""
    recipe, network, _, _, observed = case
    assigned = {LAYERS[0]: W8A8, LAYERS[1]: W4A8}
    net = quantize(network, observed, MIXED, recipe, assigned)
    assert net.precision == MIXED
    for name, layer in net.layers.items():
        used = assigned.get(name, W4A4)
        assert (layer.weight_bits, layer.activation_bits) == (used.weight_bits, used.activation_bits), name
    plain = quantize(network, observed, W4A4, recipe)
    macs = [observed.layers[name].macs for name in LAYERS[:2]]
    assert net.bops - plain.bops == macs[0] * (64 - 16) + macs[1] * (32 - 16)
