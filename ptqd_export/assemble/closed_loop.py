"""Held-out trajectories sampled again under other plans, and compared with full precision at the end.

In closed loop each step starts from what the steps before it left, as in a run. Full precision is the
trajectories that calibration collected: nothing of it is computed again before the first step that differs.
"""

from __future__ import annotations

import contextlib
import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import numpy.typing as npt

from .. import backends
from ..calibrate import Network, TorchEngine, Trajectories
from ..calibrate.trajectories import CALIBRATION_STREAM, Batch
from ..core.engine import Engine
from ..core.plan import Plan
from ..core.precision import FP32, Precision
from ..core.sampling import NoiseSource, Sampling
from ..core.sensitivity import Sensitivity, paired_error, step_groups, texture_distance
from ..files import digest, writing_file
from ..progress import progress

F64 = npt.NDArray[np.float64]
TINY = 1e-30
"""Errors of equal samples are held at this."""


@dataclass(frozen=True)
class End:
    """How far samples ended from their full-precision twins.

    Attributes:
        paired: mean squared error of each sample, (N,).
        distribution: `texture_distance` of the two sets.
    """

    paired: F64
    distribution: float

    @property
    def error(self) -> float:
        """Geometric mean of `paired`, as a mean of decibels is.

        One sample of fifty runs away, in full precision too; it does not decide what so few samples say.
        """
        return float(np.exp(self._logarithms.mean()))

    @property
    def standard_error(self) -> float:
        """Of that mean, as a share of it; 0 for one sample."""
        logs = self._logarithms
        return float(logs.std(ddof=1) / np.sqrt(len(logs))) if len(logs) > 1 else 0.0

    @property
    def _logarithms(self) -> F64:
        return np.asarray(np.log(np.maximum(self.paired, TINY)), np.float64)


@dataclass
class ClosedLoop:
    """Samples held-out trajectories again.

    Attributes:
        sampling: as the trajectories were sampled.
        batches: full-precision trajectories, each as many as one call takes.
        seed: of their noise.
        engines: of every precision, and of full precision under FP32.
        sigmas: sigma' (T,) under a plan.
        advance: called after each step of a batch.
        evaluations: network evaluations of one sample so far.
    """

    sampling: Sampling
    batches: Sequence[Batch]
    seed: int
    engines: Mapping[Precision, Engine]
    sigmas: Callable[[Plan], F64]
    advance: Callable[[], object] = lambda: None
    evaluations: int = field(default=0, init=False)

    @property
    def samples(self) -> int:
        return sum(len(batch.indices) for batch in self.batches)

    def end(self, plan: Plan, first: int = 0) -> End:
        """What comes of a plan, which is full precision before the step `first`."""
        pairs = [self._sample(batch, plan, first) for batch in self.batches]
        x, reference = (np.concatenate(parts) for parts in zip(*pairs, strict=True))
        return End(paired_error(x, reference), texture_distance(x, reference))

    def _sample(self, batch: Batch, plan: Plan, first: int) -> tuple[F64, F64]:
        """x_0 of one batch under a plan, and in full precision."""
        sampling, sigmas = self.sampling, self.sigmas(plan)
        indices = [CALIBRATION_STREAM + i for i in batch.indices]
        source, other = (NoiseSource(self.seed, indices, sampling.model.sample_shape) for _ in range(2))
        state = sampling.replay(batch.x, batch.e, source, first)
        with np.errstate(over="ignore", invalid="ignore"):  # samples that run away are an error like others
            for step in range(first, len(sampling)):
                noise = source.draw() if sampling.draws(step) else None
                epsilon = sampling.predict(self.engines[plan.steps[step]], state.x, step, batch.conditions)
                state = sampling.advance(state, epsilon, step, float(sigmas[step]), noise)
                self.evaluations += len(indices)
                self.advance()
            return state.x, sampling.replay(batch.x, batch.e, other, len(sampling)).x


def held_out(trajectories: Trajectories, n: int, rows: int) -> list[Batch]:
    """The first n held-out trajectories, or all if there are fewer, at most `rows` in a batch."""
    found: list[Batch] = []
    left = n
    for batch in trajectories:
        if batch.indices.start not in trajectories.held_out:
            continue
        for start in range(0, min(len(batch.indices), left), rows):
            part = slice(start, min(start + rows, left))
            conditions = {name: value[part] for name, value in batch.conditions.items()}
            found.append(Batch(batch.indices[part], batch.x[:, part], batch.e[:, part], conditions))
        left -= min(left, len(batch.indices))
    return found


@contextlib.contextmanager
def closed_loop(
    sampling: Sampling,
    batches: Sequence[Batch],
    seed: int,
    files: Mapping[Precision, Path],
    backend: str,
    network: Network,
    sigmas: Callable[[Plan], F64],
) -> Iterator[ClosedLoop]:
    """A ClosedLoop on the engines of a backend; full precision is the torch network where none is built.

    Args:
        files: what the backend runs at each precision.
    """
    with contextlib.ExitStack() as opened:
        device = opened.enter_context(contextlib.closing(backends.open_device(backend)))
        engines: dict[Precision, Engine] = {
            p: opened.enter_context(backends.open_engine(backend, file, device)) for p, file in files.items()
        }
        if FP32 not in engines:
            engines[FP32] = opened.enter_context(TorchEngine(network.module, sampling))
        yield ClosedLoop(sampling, batches, seed, engines, sigmas)


def measure_sensitivity(
    loop: ClosedLoop,
    precisions: Sequence[Precision],
    n_groups: int,
    work: Path,
    keys: Mapping[Precision, str],
) -> Sensitivity:
    """Each group of steps at each precision, all other steps in full precision.

    It takes samples * precisions * steps * (groups + 1) / 2 evaluations: the steps before the group are the
    trajectories' own.

    Args:
        precisions: those that are not float.
        work: folder of intermediate results, from which those of a stopped build are reused.
        keys: of everything that decides the ends at a precision.
    """
    n = len(loop.sampling)
    groups = step_groups(n, n_groups)
    files = {
        (p, group): work / f"sensitivity-{digest(keys[p], str(group), str(loop.samples))[:16]}.json"
        for p in precisions
        for group in groups
    }
    known = {case: _load(file) for case, file in files.items()}
    steps = sum(n - group.start for (_, group), end in known.items() if end is None)
    with progress(steps * len(loop.batches), "sensitivity of step groups", "step") as bar:
        loop.advance = bar.update
        for (p, group), file in files.items():
            if known[p, group] is None:
                plan = Plan(tuple(p if step in group else FP32 for step in range(n)))
                end = loop.end(plan, group.start)
                known[p, group] = (end.error, end.distribution)
                with writing_file(file) as target:
                    target.write(json.dumps(known[p, group]).encode())
        loop.advance = lambda: None
    ends = {case: end for case, end in known.items() if end is not None}
    paired, distribution = (
        {p: tuple(ends[p, group][which] for group in groups) for p in precisions} for which in (0, 1)
    )
    evaluations = loop.samples * len(precisions) * sum(n - group.start for group in groups)
    return Sensitivity(tuple(map(len, groups)), loop.samples, evaluations, paired, distribution)


def _load(file: Path) -> tuple[float, float] | None:
    """The two errors of a group that a stopped build had measured."""
    try:
        paired, distribution = (float(value) for value in json.loads(file.read_bytes()))
    except (OSError, ValueError, TypeError):
        return None
    return paired, distribution
