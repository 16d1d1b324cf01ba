"""Blocks are found in any module; calls end where they should; examples come back as they were."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from ptqd_export.calibrate.blocks import Block, Examples, find_blocks, run_until
from ptqd_export.calibrate.rows import Call


class Residual(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Conv2d(2, 2, 3, padding=1), nn.Conv2d(2, 2, 1)

    def forward(self, x: Tensor, scale: Tensor, factor: float = 1.0) -> Tensor:
        found: Tensor = x + factor * scale[:, None, None, None] * self.b(self.a(x).relu())
        return found


class Pair(nn.Module):
    """Returns a tuple: no block itself, but the child of its list is one."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = nn.ModuleList([Residual()])

    def forward(self, x: Tensor, scale: Tensor) -> tuple[Tensor, Tensor]:
        y = self.inner[0](x, scale=scale)
        return y, x


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Conv2d(1, 2, 1)
        self.blocks = nn.ModuleList([Residual(), Pair()])
        self.twice = nn.Conv2d(2, 2, 1)
        self.listed = nn.ModuleList([Listed()])
        self.last = nn.Conv2d(2, 1, 1)

    def forward(self, sample: Tensor, timestep: Tensor) -> Tensor:
        x = self.blocks[0](self.first(sample), timestep.float(), factor=0.5)
        x, _ = self.blocks[1](x, timestep.float())
        x = self.listed[0]([self.twice(self.twice(x))])
        y: Tensor = self.last(x)
        return y


class Listed(nn.Module):
    """Takes its tensors in a list: no block."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(2, 2, 1)

    def forward(self, xs: list[Tensor]) -> Tensor:
        y: Tensor = self.conv(xs[0])
        return y


@pytest.fixture
def net() -> nn.Module:
    torch.manual_seed(0)
    return Net().eval()


def call(rows: int = 3, seed: int = 0) -> Call:
    generator = torch.Generator().manual_seed(seed)
    sample = torch.randn(rows, 1, 4, 4, generator=generator)
    return Call({"sample": sample, "timestep": torch.arange(rows)}, torch.full((rows,), 1.0 + seed))


def convs(net: nn.Module) -> list[str]:
    return [name for name, module in net.named_modules() if isinstance(module, nn.Conv2d)]


def test_blocks(net: nn.Module) -> None:
    assert find_blocks(net, convs(net), call()) == (
        Block("first", ("first",)),
        Block("blocks.0", ("blocks.0.a", "blocks.0.b")),
        Block("blocks.1.inner.0", ("blocks.1.inner.0.a", "blocks.1.inner.0.b")),
        Block("listed.0.conv", ("listed.0.conv",)),
        Block("last", ("last",)),
    )  # `twice` is called twice: it is in none
    assert find_blocks(net, {"blocks.0.b"}, call()) == (Block("blocks.0", ("blocks.0.b",)),)
    assert not any(module._forward_hooks for module in net.modules())


def test_a_call_ends_where_it_should(net: nn.Module) -> None:
    reached: list[str] = []

    def keep(name: str) -> Any:
        return lambda args, kwargs, output: reached.append(f"{name} {output is not None}")

    watched = {name: keep(name) for name in ("first", "blocks.0.b", "last")}
    run_until(net, call(), "blocks.0", watched)
    assert reached == ["first True", "blocks.0.b True"]
    reached.clear()
    run_until(net, call(), "blocks.0", watched, on_entry=True)
    assert reached == ["first False"]
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in net.modules())


def test_errors_of_the_network_are_not_swallowed(net: nn.Module) -> None:
    wrong = Call({"sample": torch.zeros(3, 5, 4, 4), "timestep": torch.arange(3)}, torch.ones(3))
    with pytest.raises(RuntimeError):
        run_until(net, wrong, "blocks.0", {})
    assert not any(module._forward_hooks for module in net.modules())


def test_examples(net: nn.Module, tmp_path: Path) -> None:
    """The input is the other network's, the target the full-precision one's; what is no tensor stays."""
    torch.manual_seed(1)
    other = Net().eval()
    whole: Any = net
    (_, block, *_) = find_blocks(net, convs(net), call())
    told: list[int] = []
    with torch.no_grad():
        examples = Examples(block, net, other, [call(3), call(2, seed=1)], tmp_path, told.append)
        assert len(examples) == 5 and told == [3, 2]
        (x, scale), kwargs, target, weights = examples.take(np.array([4, 0]))
        assert kwargs == {"factor": 0.5} and weights.tolist() == [2.0, 1.0] and scale.tolist() == [1.0, 0.0]
        for row, (given, at) in enumerate(((call(2, seed=1), 1), (call(3), 0))):
            sample = given.feeds["sample"]
            assert torch.allclose(x[row], other.first(sample)[at])
            full = whole.blocks[0](whole.first(sample), given.feeds["timestep"].float(), factor=0.5)
            assert torch.allclose(target[row], full[at])
    assert sorted(file.name for file in tmp_path.iterdir()) == ["in.0", "in.1", "target"]
    examples.close()
    assert not list(tmp_path.iterdir())
