"""Other corrections than those in a bundle's graphs, for ablations: applied to what the engines return."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from ..core.engine import EPSILON, STEP, Engine, FakeEngine, Feeds
from ..core.noise import Correction
from ..core.precision import Precision

F64 = npt.NDArray[np.float64]


@dataclass(frozen=True)
class Replaced:
    """Tables in place of a bundle's.

    Attributes:
        corrections: of precisions of the plan; the others keep what is folded into their graphs.
        sigmas: standard deviation of the injected noise per step, (T,).
    """

    corrections: Mapping[Precision, Correction]
    sigmas: F64


def corrected(engine: Engine, correction: Correction, folded: Correction) -> Engine:
    """The engine with `correction` in place of the one that its graph holds.

    It may stand before guidance, whose weights add up to 1.
    """
    table = correction.after(folded)

    def call(feeds: Feeds) -> npt.NDArray[np.generic]:
        step = int(feeds[STEP][0])
        gain, offset = table.gain[step][:, None, None], table.offset[step][:, None, None]
        return np.asarray(gain * np.asarray(engine(feeds)[EPSILON], np.float64) + offset)

    return FakeEngine(call, engine.inputs)
