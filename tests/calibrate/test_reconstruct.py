"""Block reconstruction: better than where it started, repeatable, and taken up where it was stopped."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from cases import Case
from chain import BLOCKS, chain

from ptqd_export.calibrate import reconstruct, refine
from ptqd_export.calibrate.blocks import Examples
from ptqd_export.calibrate.reconstruct import Effort, SoftLayer
from ptqd_export.calibrate.rounding import smoothed_weight
from ptqd_export.core.quant import QuantizedNetwork, qmax, qmin

Started = tuple[Case, QuantizedNetwork]
EFFORT = Effort(iterations=40, rows=12, batch=6)


@pytest.fixture(scope="module")
def started(tmp_path_factory: pytest.TempPathFactory) -> Started:
    return chain(tmp_path_factory.mktemp("chain"))


def run(started: Started, folder: Path, effort: Effort = EFFORT, key: str = "k") -> QuantizedNetwork:
    case, start = started
    return reconstruct.reconstruct(case.network, case.sampling, start, case.trajectories, folder, key, effort)


def same(a: QuantizedNetwork, b: QuantizedNetwork) -> bool:
    return all(np.array_equal(layer.weight, b.layers[name].weight) for name, layer in a.layers.items())


@pytest.mark.parametrize(("precision", "most"), [("w2a8", 0.9), ("w3a6", 0.9), ("w4a16", 0.9), ("w8a8", 1.0)])
def test_less_error_than_rounding_to_the_nearest(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, precision: str, most: float
) -> None:
    """Of every block on the inputs that it gets; each code is one of the two next to the weight. At w8a8
    nearly all error is that of the activations."""
    case, start = chain(tmp_path, precision=precision)
    errors: list[float] = []
    original = reconstruct._error

    def spied(module: torch.nn.Module, examples: Examples) -> float:
        errors.append(original(module, examples))
        return errors[-1]

    monkeypatch.setattr(reconstruct, "_error", spied)
    done = run((case, start), tmp_path / "codes")
    old, new = np.array(errors[::2]), np.array(errors[1::2])
    assert len(new) == len(BLOCKS) and (new < old).sum() >= 2 and (new / old).mean() < most
    for name, layer in done.layers.items():
        before = start.layers[name]
        bits = layer.weight_bits
        weight = smoothed_weight(case.network.module.get_submodule(name), before.smooth)
        below = np.floor(weight / before.weight_scale[:, None, None, None])
        low, high = (np.clip(below + i, qmin(bits), qmax(bits)) for i in (0, 1))
        assert layer.weight.dtype == np.int8 and ((layer.weight == low) | (layer.weight == high)).all()
        assert layer.input == before.input and layer.output is before.output
        assert np.array_equal(layer.weight_scale, before.weight_scale)


def test_a_block_is_never_worse_than_it_was(
    started: Started, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """An optimisation that leads up instead of down: the old codes stay."""
    _, start = started
    monkeypatch.setattr(SoftLayer, "codes", lambda layer: np.full(tuple(layer.v.shape), 3, np.int8))
    assert same(run(started, tmp_path, Effort(iterations=1, rows=12, batch=1)), start)


def test_the_same_seed_gives_the_same_codes(started: Started, tmp_path: Path) -> None:
    first = run(started, tmp_path / "a")
    torch.manual_seed(99)
    assert same(first, run(started, tmp_path / "b"))
    other = Effort(EFFORT.iterations, EFFORT.rows, EFFORT.batch, seed=1)
    assert not same(first, run(started, tmp_path / "c", other))


def test_a_stopped_run_goes_on_at_the_next_block(
    started: Started, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = run(started, tmp_path / "whole")
    rounded: list[str] = []
    original = reconstruct._round_block

    def stopping(*args: object, after: int) -> object:
        if len(rounded) == after:
            raise KeyboardInterrupt
        rounded.append(args[2].name)  # type: ignore[attr-defined]
        return original(*args)  # type: ignore[arg-type]

    folder = tmp_path / "stopped"
    monkeypatch.setattr(reconstruct, "_round_block", lambda *args: stopping(*args, after=2))
    with pytest.raises(KeyboardInterrupt):
        run(started, folder)
    assert rounded == [*BLOCKS[:2]] and len(list(folder.iterdir())) == 2
    monkeypatch.setattr(reconstruct, "_round_block", lambda *args: stopping(*args, after=9))
    assert same(run(started, folder), whole) and rounded == [*BLOCKS]
    assert {f.name: f.read_bytes() for f in folder.iterdir()} == {
        f.name: f.read_bytes() for f in (tmp_path / "whole").iterdir()
    }
    # Damage is seen, and only what is damaged is made again; another key makes everything again.
    victim = sorted(folder.iterdir())[0]
    data = victim.read_bytes()
    victim.write_bytes(data[:-4])
    assert same(run(started, folder), whole) and len(rounded) == 4 and victim.read_bytes() == data
    run(started, folder, key="other")
    assert len(rounded) == 7


def test_a_soft_layer(started: Started) -> None:
    """It starts as the full-precision layer on quantized inputs, its gradients reach weights and input."""
    case, start = started
    layer = start.layers["blocks.0.0"]
    module = case.network.module.get_submodule("blocks.0.0")
    weight = torch.from_numpy(smoothed_weight(module, layer.smooth))
    soft = SoftLayer(layer, module)
    codes = torch.round(weight / torch.from_numpy(layer.weight_scale)[:, None, None, None])
    inside = (codes > qmin(3)) & (codes < qmax(3))
    x = torch.randn(2, 8, 6, 6, generator=torch.Generator().manual_seed(0)) * 2
    x[0, 0, 0, 0] = 1e6
    x.requires_grad_()
    assert torch.allclose(soft.share()[inside], (weight / soft._scale - soft._floor)[inside], atol=1e-3)
    assert np.array_equal(soft.codes()[inside.numpy()], codes[inside].numpy())
    soft(x).square().sum().backward()
    assert x.grad is not None and x.grad[0, 0, 0, 0] == 0 and (x.grad != 0).float().mean() > 0.9
    assert soft.v.grad is not None and (soft.v.grad[inside] != 0).float().mean() > 0.9


def test_what_the_recipe_asks_for(started: Started, tmp_path: Path) -> None:
    case, start = started
    given = (case.network, case.sampling, start, case.trajectories)
    for rounding in ("nearest", "gptq"):
        recipe = case.recipe.override(quantization={"rounding": rounding})
        assert refine(*given, recipe, tmp_path / "x", "k") is start and not (tmp_path / "x").exists()
    recipe = case.recipe.override(quantization={"rounding": "adaround", "iterations": 3})
    refine(*given, recipe, tmp_path / "x", "k")
    assert len(list((tmp_path / "x").iterdir())) == len(BLOCKS)
