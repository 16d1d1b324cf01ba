"""TorchEngine: a torch network behind the Engine protocol."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor, nn

from ..core.closing import Closing
from ..core.engine import EPSILON, SAMPLE, STEP, TIMESTEP, Array, Feeds
from ..core.noise import Correction
from ..core.sampling import Sampling


def as_tensor(array: Array) -> Tensor:
    """`array` as a tensor on the same memory; copied if it is read-only, because torch would warn."""
    return torch.from_numpy(array if array.flags.writeable else array.copy())


def set_threads(n: int) -> None:
    """Set the number of threads that torch may use in this process."""
    torch.set_num_threads(n)


class TorchEngine(Closing):
    """A torch network as an Engine: epsilon = a * output + b * x_t for the schedule's prediction type.

    Args:
        module: the full-precision network or a simulated one; called as module(sample, timestep,
            **conditions).
        sampling: gives the names of the conditions and the prediction type.
        correction: applied to epsilon as in the folded graph: gain[step] * epsilon + offset[step]; None
            leaves epsilon uncorrected.
    """

    outputs: tuple[str, ...] = (EPSILON,)

    def __init__(self, module: nn.Module, sampling: Sampling, correction: Correction | None = None) -> None:
        self._conditions = tuple(spec.name for spec in sampling.model.inputs)
        self.inputs: tuple[str, ...] = (SAMPLE, TIMESTEP, STEP, *self._conditions)
        self._module = module
        schedule = sampling.schedule
        self._convert = None if schedule.prediction_type == "epsilon" else schedule.epsilon_coefficients()
        self._correct: tuple[Tensor, ...] = ()
        if correction is not None:
            tables = (correction.gain, correction.offset)
            self._correct = tuple(
                torch.from_numpy(table.astype(np.float32))[:, None, :, None, None] for table in tables
            )

    def __call__(self, feeds: Feeds) -> dict[str, Array]:
        sample = as_tensor(feeds[SAMPLE])
        conditions = {name: as_tensor(feeds[name]) for name in self._conditions}
        with torch.inference_mode():
            epsilon: Tensor = self._module(sample, as_tensor(feeds[TIMESTEP]), **conditions)
            step = int(feeds[STEP][0])
            if self._convert is not None:
                a, b = self._convert
                epsilon = epsilon * float(a[step]) + sample * float(b[step])
            if self._correct:
                gain, offset = self._correct
                epsilon = epsilon * gain[step] + offset[step]
        return {EPSILON: np.array(epsilon.numpy(), np.float32, order="C")}

    def close(self) -> None:
        """Release nothing: the network belongs to the caller."""
