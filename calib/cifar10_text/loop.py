"""What the three training scripts share: a budget in steps and minutes, resuming, progress lines, an average
of the weights."""

from __future__ import annotations

import argparse
import copy
import math
import os
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

HERE = Path(__file__).parent
SAVE_EVERY = 120.0  # seconds
PRINT_EVERY = 30.0  # seconds
MINUTES = (
    "at most, resumed runs together; on the CPU, CPU time over threads, so that a busy machine and a pause "
    "do not count"
)


def parse(description: str | None, **defaults: Any) -> argparse.Namespace:
    """The options that every training has; `defaults` are steps, minutes, batch_size and lr."""
    parser = argparse.ArgumentParser(
        description=description, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--data", type=Path, required=True, help="the .npz file of CIFAR-10")
    parser.add_argument("--out", type=Path, default=HERE, help="folder for what is trained")
    parser.add_argument("--work", type=Path, default=HERE / "work", help="folder for what resumes a run")
    parser.add_argument("--steps", type=int, default=1_000_000, help="optimizer steps at most")
    parser.add_argument("--minutes", type=float, default=math.inf, help=MINUTES)
    parser.add_argument("--batch-size", type=int)
    parser.add_argument("--lr", type=float, help="peak of the schedule: warm-up, then a cosine to zero")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--device", default="cpu", help="cpu or cuda")
    parser.set_defaults(**defaults)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    torch.manual_seed(args.seed)
    args.work.mkdir(parents=True, exist_ok=True)
    return args


class Loop:
    """Iterate over it for the numbers of the optimizer steps; a killed run goes on at its last checkpoint.

    Everything random in a step comes from `generator`, which is seeded anew with the step's number: with a
    budget of steps, a resumed run draws what one that was never stopped draws.
    """

    def __init__(
        self, name: str, args: argparse.Namespace, parts: dict[str, nn.Module], n: int, warmup: int = 200
    ) -> None:
        """`parts` are the modules to train and to keep; an epoch has `n` examples."""
        self.name, self._args, self._parts, self._n, self._warmup = name, args, parts, n, warmup
        parameters = [p for part in parts.values() for p in part.parameters() if p.requires_grad]
        fused = args.device != "cpu"  # one kernel instead of hundreds
        self.optimizer = torch.optim.AdamW(
            parameters, args.lr, betas=(0.9, 0.99), weight_decay=0.01, fused=fused
        )
        self.generator = torch.Generator(args.device)
        self.step, self.seconds, self.losses = 0, 0.0, list[float]()
        self._path = args.work / f"{name}.pt"
        self._window: list[Tensor] = []
        self._order: tuple[int, Tensor] = (-1, torch.empty(0))
        if self._path.exists():
            state = torch.load(self._path, weights_only=True, map_location=args.device)
            for key, part in parts.items():
                part.load_state_dict(state["parts"][key])
            self.optimizer.load_state_dict(state["optimizer"])
            self.step, self.seconds, self.losses = state["step"], state["seconds"], state["losses"]
            print(f"{name}: resumes at step {self.step}, {self.seconds / 60:.1f} min", flush=True)

    @property
    def done(self) -> float:
        """Share of the budget that is used up: of the steps or of the minutes, whichever is more."""
        return min(1.0, max(self.step / self._args.steps, self.seconds / (60 * self._args.minutes)))

    @property
    def epochs(self) -> float:
        return self.step * self._args.batch_size / self._n

    def __iter__(self) -> Iterator[int]:
        last_save = last_print = time.monotonic()
        clock = self._cpu_time if self._args.device == "cpu" else time.monotonic
        while self.done < 1:
            began = clock()
            self.generator.manual_seed((self._args.seed << 32) + self.step)
            rate = min(1.0, (self.step + 1) / self._warmup) * 0.5 * (1 + math.cos(math.pi * self.done))
            for group in self.optimizer.param_groups:
                group["lr"] = self._args.lr * rate
            yield self.step
            self.step += 1
            self.seconds += clock() - began
            now = time.monotonic()
            if now - last_print > PRINT_EVERY:
                last_print = now
                left = self.seconds * (1 / max(self.done, 1e-9) - 1) / 60
                print(
                    f"{self.name}  step {self.step}  epoch {self.epochs:.2f}  loss {self.recent:.4f}  "
                    f"{self.seconds / 60:.1f} min, {left:.1f} left",
                    flush=True,
                )
            if now - last_save > SAVE_EVERY:
                last_save = now
                self._save()
        self._save()

    def _cpu_time(self) -> float:
        return time.process_time() / self._args.threads

    def batch(self) -> Tensor:
        """Indices int64 (batch,) of this step's examples: every epoch has an order of its own."""
        size = self._args.batch_size
        epoch, at = divmod(self.step, self._n // size)
        if self._order[0] != epoch:
            shuffle = torch.Generator().manual_seed((self._args.seed << 32) + 2**31 + epoch)
            self._order = (epoch, torch.randperm(self._n, generator=shuffle).to(self._args.device))
        return self._order[1][at * size : (at + 1) * size]

    def pictures(self, pixels: Tensor, index: Tensor) -> Tensor:
        """Of pictures uint8 (N, 3, H, W) those of this step, float32 in [-1, 1], half of them mirrored."""
        x = pixels[index].float() / 127.5 - 1
        chance = torch.rand(len(x), 1, 1, 1, generator=self.generator, device=self._args.device)
        return torch.where(chance < 0.5, x.flip(3), x).contiguous(memory_format=torch.channels_last)

    def descend(self, loss: Tensor) -> None:
        """One step of the optimizer down the gradient of `loss` (a scalar)."""
        self.optimizer.zero_grad(set_to_none=True)
        loss.backward()
        for group in self.optimizer.param_groups:
            nn.utils.clip_grad_norm_(group["params"], 1.0)
        self.optimizer.step()
        self._window.append(loss.detach())  # its value would wait for the GPU
        if len(self._window) == 100:
            self.losses.append(round(float(torch.stack(self._window).mean()), 5))
            self._window.clear()

    @property
    def recent(self) -> float:
        """The mean loss of the last steps, 100 at most."""
        if not self._window:
            return self.losses[-1] if self.losses else math.nan
        return float(torch.stack(self._window).mean())

    def figures(self) -> dict[str, Any]:
        """What is worth keeping of this training, for a .json file."""
        args = self._args
        return {
            "parameters": {
                key: sum(p.numel() for p in part.parameters())
                for key, part in self._parts.items()
                if not isinstance(part, Ema)
            },
            "steps": self.step,
            "batch_size": args.batch_size,
            "epochs": round(self.epochs, 2),
            "minutes": round(self.seconds / 60, 1),
            "loss_per_100_steps": self.losses,
            "lr": args.lr,
            "threads": args.threads,
            "device": "cpu" if args.device == "cpu" else torch.cuda.get_device_name(),
            "seed": args.seed,
            "torch": torch.__version__,
        }

    def _save(self) -> None:
        state = {
            "parts": {key: part.state_dict() for key, part in self._parts.items()},
            "optimizer": self.optimizer.state_dict(),
            "step": self.step,
            "seconds": self.seconds,
            "losses": self.losses,
        }
        scratch = self._path.with_suffix(".tmp")
        torch.save(state, scratch)
        os.replace(scratch, self._path)


def autocast(module: nn.Module, device: str, *examples: Tensor) -> Callable[..., Any]:
    """`module`, called in training, computes in bfloat16 what bears it.

    On a GPU its forward and its backward pass are a CUDA graph each, as networks this small take several
    times as long where their kernels are launched one by one; inputs must then be like `examples`, in shape,
    dtype and whether they need a gradient. Copies of the module are to be made before.
    """
    if device == "cpu":

        def call(*inputs: Tensor) -> Any:
            with torch.autocast(device, torch.bfloat16):
                return module(*inputs)

        return call
    before = [buffer.clone() for buffer in module.buffers()]
    with torch.autocast(device, torch.bfloat16, cache_enabled=False):
        graphed: Callable[..., Any] = torch.cuda.make_graphed_callables(module, examples)
    for buffer, value in zip(module.buffers(), before, strict=True):
        buffer.copy_(value)  # BatchNorm has seen the examples
    return graphed


class Ema(nn.Module):
    """A moving average of a module's parameters: `average` is the module to keep."""

    def __init__(self, module: nn.Module, decay: float) -> None:
        super().__init__()
        self.average = copy.deepcopy(module).requires_grad_(False)
        self._decay = decay

    @torch.no_grad()
    def update(self, module: nn.Module, step: int) -> None:
        weight = 1 - min(self._decay, (1 + step) / (10 + step))
        for mean, p in zip(self.average.parameters(), module.parameters(), strict=True):
            mean.lerp_(p, weight)
