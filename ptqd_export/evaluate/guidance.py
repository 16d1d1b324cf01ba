"""The guidance gap: how far the predictions with and without the condition lie apart.

What guidance scales up is eps_cond - eps_uncond. Where quantization shrinks it, pictures lose their
condition; where it adds noise to it, guidance multiplies that.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from ..core.backend import BACKENDS
from ..core.engine import EPSILON, Array, Engine, FakeEngine, Feeds
from ..core.plan import Plan
from ..core.precision import Precision
from ..runtime import Runtime
from .candidates import Candidate
from .kept import Setting, load, store

F64 = npt.NDArray[np.float64]
SAMPLES = 64
"""Samples that the gap is measured on: a mean over all of their pixels at a step."""
LARGEST_DEPARTURE = 0.05
"""Beyond this at any step a plan gets a note."""


@dataclass(frozen=True)
class Gap:
    """The guidance gap of a plan against full precision's, per step, (T,), at the same x_t.

    Attributes:
        ratio: of the RMS.
        along: the part of it that points where full precision's does: 1 is all of it, and noise adds nothing.
    """

    ratio: tuple[float, ...]
    along: tuple[float, ...]

    def note(self, name: str) -> str | None:
        """A line where the gap departs from full precision's."""
        off = [max(abs(r - 1), abs(a - 1)) for r, a in zip(self.ratio, self.along, strict=True)]
        worst = int(np.argmax(off))
        if off[worst] <= LARGEST_DEPARTURE:
            return None
        count = sum(value > LARGEST_DEPARTURE for value in off)
        return (
            f"{name}: the guidance gap departs by more than {LARGEST_DEPARTURE:.0%} at {count} of {len(off)} "
            f"steps, most at step {worst}: {self.ratio[worst]:.2f} of full precision's, "
            f"{self.along[worst]:.2f} along it"
        )


Sums = npt.NDArray[np.float64]
"""(3, T, C): sums of g^2, g f and f^2 over samples and pixels; g is the gap, f full precision's."""


def gap_sums(
    setting: Setting, full: Plan, precisions: tuple[Precision, ...], advance: Callable[[int], None]
) -> dict[Precision, Sums]:
    """The sums for each precision as it is folded, along full precision's trajectories.

    Args:
        full: the plan of full precision.
        advance: called with the number of sample steps, for the evaluations of each precision.
    """
    sampling = setting.bundle.manifest.sampling
    if setting.prompted is not None:
        sampling = sampling.without(setting.prompted.null)
    n, channels = min(SAMPLES, setting.num_samples), sampling.model.channels
    shape = (3, len(sampling), channels)
    files = {
        p: setting.work / setting.key("gap", setting.bundle.seal, str(full), str(p), str(n)) / "gap.npy"
        for p in precisions
    }
    kept = {p: load(file, shape, "float64") for p, file in files.items()}
    found: dict[Precision, Sums] = {p: np.asarray(sums) for p, sums in kept.items() if sums is not None}
    todo = [p for p in precisions if p not in found]
    if not todo:
        return found
    sums: dict[Precision, Sums] = {p: np.zeros(shape) for p in todo}
    with contextlib.ExitStack() as stack:

        def engine_of(precision: Precision) -> Engine:
            plan = Plan((precision,) * len(sampling))
            runtime = Runtime(setting.bundle, setting.backend, plan, device=setting.device)
            return stack.enter_context(runtime).engines[precision]

        reference = engine_of(full.steps[0])
        engines = {p: engine_of(p) for p in todo if p != full.steps[0]}
        rows: list[Array] = []

        def call(feeds: Feeds) -> Array:
            rows[:] = [reference(feeds)[EPSILON]]
            return rows[0]

        tapped = FakeEngine(call, reference.inputs)
        for first in range(0, n, setting.batch_size):
            indices = range(first, min(first + setting.batch_size, n))
            conditions = setting.conditions(indices)

            def measure(step: int, x: F64, epsilon: F64, conditions: dict[str, Array] = conditions) -> None:
                feeds, exact = sampling.feeds(x, step, conditions), _apart(rows[0])
                for precision in todo:
                    own = precision == full.steps[0]
                    gap = exact if own else _apart(engines[precision](feeds)[EPSILON])
                    parts = ((gap * gap), (gap * exact), (exact * exact))
                    sums[precision][:, step] += np.stack([part.sum((0, 2, 3)) for part in parts])
                    advance(len(x))

            sampling.sample(lambda step: tapped, conditions, indices, seed=setting.seed, on_step=measure)
    for precision, value in sums.items():
        store(files[precision], value)
    return found | sums


def _apart(epsilon: Array) -> F64:
    null, conditional = np.split(np.asarray(epsilon, np.float64), 2)
    return np.asarray(conditional - null)


def gap_of(candidate: Candidate, setting: Setting, sums: dict[Precision, Sums]) -> Gap:
    """The gap of a candidate: each step at its own precision, with its own gain."""
    replaced = candidate.replaced(setting.bundle, setting.backend)
    ratio, along = [], []
    for step, precision in enumerate(candidate.plan.steps):
        gg, gf, ff = sums[precision][:, step]
        gain = np.ones_like(gg)
        if replaced is not None and precision in replaced.corrections:
            folded = setting.bundle.correction(precision, BACKENDS[setting.backend].emission)
            gain = replaced.corrections[precision].after(folded).gain[step]
        whole = max(float(ff.sum()), np.finfo(np.float64).tiny)
        ratio.append(float(np.sqrt((gain**2 * gg).sum() / whole)))
        along.append(float((gain * gf).sum() / whole))
    return Gap(tuple(ratio), tuple(along))
