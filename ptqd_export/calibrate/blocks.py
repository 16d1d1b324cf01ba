"""Blocks of a network: the parts whose weights are rounded together, and what goes into and comes out of
them."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Collection, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, nn

from .memory import tensors_in
from .rows import Call


@dataclass(frozen=True)
class Block:
    """A part of the network with one output.

    Attributes:
        name: module path.
        layers: the layers in it that are to be rounded, in call order.
    """

    name: str
    layers: tuple[str, ...]


def find_blocks(module: nn.Module, names: Collection[str], call: Call) -> tuple[Block, ...]:
    """Blocks that hold the layers `names`, in call order.

    A block is an outermost child of a module list or a Sequential that takes and returns tensors with one
    row per row of the batch, in its arguments themselves and not inside lists, and is called once. A layer
    outside of blocks is one of its own, on the same conditions. A layer that fails them is in none.

    Args:
        call: a call of the network, which is made to see this.
    """
    rows = len(call.weights)
    lists = {name for name, m in module.named_modules() if isinstance(m, nn.ModuleList | nn.Sequential)}
    candidates = [
        name for name, _ in module.named_modules() if name in names or name.rpartition(".")[0] in lists
    ]
    order: list[str] = []
    fits: dict[str, bool] = {}
    with contextlib.ExitStack() as hooks, torch.inference_mode():
        for name in candidates:

            def hook(m: nn.Module, args: Any, kwargs: Any, output: Any, name: str = name) -> None:
                given = [value for value in (*args, *kwargs.values()) if isinstance(value, Tensor)]
                once = name not in fits
                fits[name] = (
                    once
                    and len(given) == len(list(tensors_in((args, kwargs)))) > 0
                    and all(value.ndim and len(value) == rows for value in (*given, output))
                    if isinstance(output, Tensor)
                    else False
                )
                if once:
                    order.append(name)

            handle = module.get_submodule(name).register_forward_hook(hook, with_kwargs=True)
            hooks.callback(handle.remove)
        module(**call.feeds)
    blocks: list[str] = []
    for name in sorted(candidates, key=lambda name: name.count(".")):
        if fits.get(name) and not any(name.startswith(f"{outer}.") for outer in blocks):
            blocks.append(name)
    found = []
    for name in sorted(blocks, key=order.index):
        layers = tuple(n for n in order if n in names and (n == name or n.startswith(f"{name}.")))
        if layers:
            found.append(Block(name, layers))
    return tuple(found)


class _Reached(Exception):
    """What was wanted of a call of the network is there: the rest need not be computed."""


Keep = Callable[[tuple[Any, ...], dict[str, Any], Any], None]
"""Told the arguments, the keyword arguments and the output of a module; the output is None on entry."""


def run_until(
    module: nn.Module, call: Call, last: str, watched: Mapping[str, Keep], on_entry: bool = False
) -> None:
    """Call the network up to its submodule `last`, and tell what the `watched` submodules took and returned.

    Args:
        on_entry: tell of a module before it computes, and stop before `last` does.
    """
    with contextlib.ExitStack() as hooks, torch.inference_mode():
        for name in dict.fromkeys((*watched, last)):
            target, keep, end = module.get_submodule(name), watched.get(name), name == last
            if on_entry:

                def enter(m: Any, args: Any, kwargs: Any, keep: Keep | None = keep, end: bool = end) -> None:
                    _tell(keep, args, kwargs, None, end)

                handle = target.register_forward_pre_hook(enter, with_kwargs=True)
            else:

                def leave(
                    m: Any, args: Any, kwargs: Any, output: Any, keep: Keep | None = keep, end: bool = end
                ) -> None:
                    _tell(keep, args, kwargs, output, end)

                handle = target.register_forward_hook(leave, with_kwargs=True)
            hooks.callback(handle.remove)
        with contextlib.suppress(_Reached):
            module(**call.feeds)


def _tell(keep: Keep | None, args: Any, kwargs: Any, output: Any, end: bool) -> None:
    if keep is not None:
        keep(args, kwargs, output)
    if end:
        raise _Reached


class Examples:
    """What goes into a block of the quantized network and should come out of it, on disk.

    Attributes:
        weights: how much each row counts, float32 (N,).
        target: the full-precision network's output, float32 (N, ...), memory-mapped.
    """

    def __init__(
        self,
        block: Block,
        full: nn.Module,
        quantized: nn.Module,
        calls: Iterable[Call],
        folder: Path,
        tell: Callable[[int], object],
    ) -> None:
        """Run both networks up to the block.

        Args:
            full, quantized: the network in full precision, and with what was quantized of it so far.
            folder: where the values are kept; they are written as files, so that a full disk is an error.
            tell: told the number of rows after each call.
        """
        self._folder = folder
        self._shapes: dict[str, tuple[np.dtype[Any], tuple[int, ...]]] = {}
        self._args: tuple[Any, ...] = ()
        self._kwargs: dict[str, Any] = {}
        weights: list[Tensor] = []
        with contextlib.ExitStack() as files:
            opened: dict[str, BinaryIO] = {}

            def write(key: str, value: Tensor) -> None:
                array = np.ascontiguousarray(value.numpy())
                if key not in opened:
                    opened[key] = files.enter_context((folder / key).open("wb"))
                    self._shapes[key] = (array.dtype, array.shape[1:])
                opened[key].write(array.data)

            def entered(args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
                self._args, self._kwargs = args, kwargs
                for key, value in (*enumerate(args), *kwargs.items()):
                    if isinstance(value, Tensor):
                        write(f"in.{key}", value)

            def left(args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
                write("target", output)

            for call in calls:
                run_until(quantized, call, block.name, {block.name: entered}, on_entry=True)
                run_until(full, call, block.name, {block.name: left})
                weights.append(call.weights)
                tell(len(call.weights))
        self.weights = torch.cat(weights)
        self._arrays = {
            key: np.memmap(folder / key, dtype, "r", shape=(len(self.weights), *shape))
            for key, (dtype, shape) in self._shapes.items()
        }

    def __len__(self) -> int:
        return len(self.weights)

    def take(self, rows: npt.NDArray[np.integer]) -> tuple[tuple[Any, ...], dict[str, Any], Tensor, Tensor]:
        """Arguments, keyword arguments, target and weights of some rows."""

        def at(key: str) -> Tensor:
            return torch.from_numpy(np.array(self._arrays[key][rows]))

        args = tuple(
            at(f"in.{i}") if isinstance(value, Tensor) else value for i, value in enumerate(self._args)
        )
        kwargs = {
            key: at(f"in.{key}") if isinstance(value, Tensor) else value
            for key, value in self._kwargs.items()
        }
        return args, kwargs, at("target"), self.weights[torch.from_numpy(rows)]

    def close(self) -> None:
        """Remove the files."""
        self._arrays = {}
        for key in self._shapes:
            (self._folder / key).unlink(missing_ok=True)
