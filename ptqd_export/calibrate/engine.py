"""TorchEngine: a torch network behind the Engine protocol."""

from __future__ import annotations

from types import TracebackType
from typing import Self

import numpy as np
import torch
from torch import Tensor, nn

from ..conditioning import ModelInfo
from ..engine import EPSILON, SAMPLE, STEP, TIMESTEP, Array, Feeds
from ..noise import Correction
from ..schedule import NoiseSchedule
from .models import Network


def as_tensor(array: Array) -> Tensor:
    """`array` as a tensor on the same memory; copied if it may not be written, which torch would warn of."""
    return torch.from_numpy(array if array.flags.writeable else array.copy())


def set_threads(n: int) -> None:
    """Threads that torch may use in this process."""
    torch.set_num_threads(n)


class TorchEngine:
    """The full-precision network as an Engine; epsilon = a * output + b * x_t for the schedule's prediction type.

    Subclasses bring another module and a correction, which acts on epsilon as the folded graph does: gain[step] * epsilon + offset[step].
    """

    outputs: tuple[str, ...] = (EPSILON,)

    def __init__(self, network: Network, schedule: NoiseSchedule) -> None:
        self._setup(network.module, network.info, schedule, None)

    def _setup(self, module: nn.Module, info: ModelInfo, schedule: NoiseSchedule, correction: Correction | None) -> None:
        self.inputs: tuple[str, ...] = (SAMPLE, TIMESTEP, STEP, *(spec.name for spec in info.inputs))
        self._module = module
        self._convert = None if schedule.prediction_type == "epsilon" else schedule.epsilon_coefficients()
        self._correct = None
        if correction is not None:
            self._correct = tuple(
                torch.from_numpy(table.astype(np.float32))[:, None, :, None, None] for table in (correction.gain, correction.offset)
            )

    def __call__(self, feeds: Feeds) -> dict[str, Array]:
        sample = as_tensor(feeds[SAMPLE])
        conditions = {name: as_tensor(feeds[name]) for name in self.inputs[3:]}
        with torch.inference_mode():
            epsilon: Tensor = self._module(sample, as_tensor(feeds[TIMESTEP]), **conditions)
            step = int(feeds[STEP][0])
            if self._convert is not None:
                a, b = self._convert
                epsilon = epsilon * float(a[step]) + sample * float(b[step])
            if self._correct is not None:
                gain, offset = self._correct
                epsilon = epsilon * gain[step] + offset[step]
        return {EPSILON: np.array(epsilon.numpy(), np.float32, order="C")}

    def close(self) -> None:
        """Nothing to release: the network belongs to the caller."""

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self.close()
