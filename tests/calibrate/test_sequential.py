"""GPTQ on quantized inputs: other Hessians, less noise where the inputs change, the same bytes each time."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import numpy as np
import pytest
import torch
from cases import Case
from chain import chain

from ptqd_export.calibrate import quantize, refine
from ptqd_export.calibrate.rounding import gptq, smoothed_weight
from ptqd_export.calibrate.rows import calls
from ptqd_export.calibrate.sequential import _hessians, _stages, round_in_stages
from ptqd_export.calibrate.simulate import simulate
from ptqd_export.core.backend import Emission
from ptqd_export.core.precision import Precision
from ptqd_export.core.quant import QuantizedNetwork

Started = tuple[Case, QuantizedNetwork]


@pytest.fixture(scope="module")
def started(tmp_path_factory: pytest.TempPathFactory) -> Started:
    return chain(tmp_path_factory.mktemp("chain"))


def same(a: QuantizedNetwork, b: QuantizedNetwork) -> bool:
    return all(np.array_equal(layer.weight, b.layers[name].weight) for name, layer in a.layers.items())


def test_hessians_are_of_quantized_and_weighted_inputs(started: Started) -> None:
    """w^T H w summed over the weight rows is the weighted energy of the layer's outputs without bias."""
    case, start = started
    shown = list(calls(case.sampling, case.trajectories, range(4)))
    module = simulate(case.network, start, Emission.PORTABLE)
    name = "blocks.1.0"
    got = _hessians(case.network, module, start.layers, [name], shown, lambda: None)[name]
    full = _hessians(case.network, case.network.module, start.layers, [name], shown, lambda: None)[name]
    assert not torch.allclose(got, full, rtol=0.02)
    outputs: list[torch.Tensor] = []
    layer = dataclasses.replace(start.layers[name], bias=None)
    unbiased = simulate(
        case.network, dataclasses.replace(start, layers={**start.layers, name: layer}), Emission.PORTABLE
    )
    handle = unbiased.get_submodule(name).register_forward_hook(
        lambda m, args, output: outputs.append(output)
    )
    with torch.inference_mode():
        for call in shown:
            unbiased(**call.feeds)
    handle.remove()
    expected = sum(
        float((output.double().square().sum((1, 2, 3)) * call.weights).sum())
        for output, call in zip(outputs, shown, strict=True)
    )
    weight = torch.from_numpy(layer.weight * layer.weight_scale[:, None, None, None]).reshape(
        len(layer.weight), -1
    )
    energy = float(torch.einsum("ok,kl,ol->", weight, got[0], weight))
    assert energy == pytest.approx(expected, rel=1e-4)


def test_stages_hold_each_layer_once_in_call_order(started: Started) -> None:
    _, start = started
    for stages in (1, 3, 100):
        parts = _stages(start, stages)
        assert [name for names in parts for name in names] == list(start.layers)
        assert len(parts) == min(stages, len(start.layers))
    eight = {n: dataclasses.replace(layer, weight_bits=8) for n, layer in start.layers.items()}
    assert _stages(dataclasses.replace(start, layers=eight), 4) == []


Hessians = dict[str, torch.Tensor]


def rounded(started: Started, stages: int) -> tuple[QuantizedNetwork, Hessians, Hessians]:
    """The network after round_in_stages, and Hessians of inputs of that network and of full precision."""
    case, start = started
    done = round_in_stages(case.network, case.sampling, start, case.trajectories, stages=stages, stride=1)
    shown = list(calls(case.sampling, case.trajectories, range(4)))
    final, names = simulate(case.network, done, Emission.PORTABLE), list(start.layers)
    of_final, of_full = (
        _hessians(case.network, module, done.layers, names, shown, lambda: None)
        for module in (final, case.network.module)
    )
    return done, of_final, of_full


def test_codes_fit_the_inputs_that_layers_get(started: Started) -> None:
    """Every layer's weighted output error, on inputs of the final network, against GPTQ on the inputs of full
    precision."""
    done, of_final, of_full = rounded(started, stages=8)
    errors: dict[str, list[float]] = {"full": [], "done": []}
    for name, layer in done.layers.items():
        weight = smoothed_weight(started[0].network.module.get_submodule(name), layer.smooth)
        codes = {"full": gptq(weight, layer.weight_scale, 3, of_full[name]), "done": layer.weight}
        for which, value in codes.items():
            error = torch.from_numpy(weight - value * layer.weight_scale[:, None, None, None]).flatten(1)
            errors[which].append(float(torch.einsum("ok,kl,ol->", error, of_final[name][0], error)))
    ratio = np.array(errors["done"]) / np.array(errors["full"])
    assert np.exp(np.log(ratio).mean()) < 0.98, ratio


def test_codes_of_layers_that_are_stages_of_their_own(started: Started) -> None:
    """They are those that GPTQ finds on inputs of the final network, and not on those of full precision."""
    done, of_final, of_full = rounded(started, stages=100)
    others = 0
    for name, layer in done.layers.items():
        weight = smoothed_weight(started[0].network.module.get_submodule(name), layer.smooth)
        np.testing.assert_array_equal(layer.weight, gptq(weight, layer.weight_scale, 3, of_final[name]))
        others += not np.array_equal(layer.weight, gptq(weight, layer.weight_scale, 3, of_full[name]))
    assert others >= len(done.layers) - 1, "all but the first get other inputs than in full precision"


def test_scales_stay_and_so_do_layers_of_8_bits(started: Started) -> None:
    case, start = started
    done = round_in_stages(case.network, case.sampling, start, case.trajectories)
    assert same(done, round_in_stages(case.network, case.sampling, start, case.trajectories))
    assert not same(done, start)
    for name, layer in done.layers.items():
        old = start.layers[name]
        assert layer.input_scale == old.input_scale and np.array_equal(layer.weight_scale, old.weight_scale)
    eight = quantize(case.network, case.observed, Precision.parse("w8a8"), case.recipe)
    assert same(round_in_stages(case.network, case.sampling, eight, case.trajectories), eight)


def test_codes_are_kept(started: Started, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    case, start = started
    recipe = case.recipe.override(quantization={"rounding": "gptq-sequential"})
    given = (case.network, case.sampling, start, case.trajectories, recipe, tmp_path)
    first = refine(*given, "k")
    (file,) = tmp_path.iterdir()
    before = file.stat().st_mtime_ns
    assert same(first, refine(*given, "k")) and file.stat().st_mtime_ns == before
    refine(*given, "another")
    assert len(list(tmp_path.iterdir())) == 2
