"""Calibration by a pool: workers open the model themselves; what they find comes back batch by batch.

Trajectories are of one batch each, and sums of one trajectory each, put together in the order of samples
(`core.noise`): so nothing depends on how many workers there are. A worker has one thread.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from importlib import metadata

import numpy as np

from ..core.backend import Emission
from ..core.engine import Array
from ..core.model import ModelInfo
from ..core.noise import NoiseStats
from ..core.pool import Pool, Results, check_versions
from ..core.quant import QuantizedNetwork
from ..core.sampling import F64, Sampling
from ..errors import ModelError
from ..progress import progress
from ..recipe import Recipe
from ..version import __version__
from .intake import open_source
from .measure import sums_of
from .network import Network
from .simulate import simulate
from .torch_engine import TorchEngine, set_threads
from .trajectories import F32, Batch, Trajectories, trace

PACKAGES = ("torch", "diffusers", "numpy")
"""That decide what a worker computes, besides this one."""


@dataclass(frozen=True)
class Workers:
    """A pool whose workers open the model of a recipe.

    Attributes:
        info: of the network as the build has it, with what stands for no condition.
        versions: of the packages where the build runs.
    """

    pool: Pool
    recipe: Recipe
    info: ModelInfo
    versions: Mapping[str, str]

    @classmethod
    def of(cls, pool: Pool, recipe: Recipe, info: ModelInfo) -> Workers:
        return cls(pool, recipe, info, _versions())

    def trajectories(
        self, sampling: Sampling, seed: int, batches: Iterator[tuple[range, Mapping[str, Array]]]
    ) -> Results:
        """Batches, each with its x_t and guided epsilon, float32 (T, B, C, H, W), as they are finished.

        Args:
            batches: indices of samples, and their conditions.
        Raises:
            PTQDError: as `trace`, or a worker has another model or other versions, or died.
        """
        make = partial(_tracer, self.recipe, self.info, self.versions, sampling, seed)
        return self.pool.map(make, batches)

    def sums(
        self,
        network: QuantizedNetwork,
        emission: Emission,
        sampling: Sampling,
        trajectories: Trajectories,
        what: str,
    ) -> list[NoiseStats]:
        """The sums of `measure` for the simulated network, per trajectory in sample order.

        Raises:
            PTQDError: as `measure`, or a worker has another model or other versions, or died.
        """
        make = partial(_measurer, self.recipe, self.info, self.versions, sampling, network, emission)
        plain = (b._replace(x=np.array(b.x), e=np.array(b.e)) for b in trajectories)
        found: dict[int, Sequence[NoiseStats]] = {}
        with (
            contextlib.closing(self.pool.map(make, plain)) as measured,
            progress(trajectories.n * len(sampling), what, "step") as bar,
        ):
            for batch, sums in measured:
                found[batch.indices.start] = sums
                bar.update(len(sums) * len(sampling))
        return [one for start in sorted(found) for one in found[start]]


def _versions() -> dict[str, str]:
    return {"ptqd-export": __version__, **{name: metadata.version(name) for name in PACKAGES}}


def _open(recipe: Recipe, info: ModelInfo, versions: Mapping[str, str]) -> Network:
    set_threads(1)
    check_versions(versions, _versions())
    network = open_source(recipe).network
    if network.info.sha256 != info.sha256:
        raise ModelError(
            f"the weights of {info.name} on this machine are not those of the build: copy them anew"
        )
    return replace(network, info=info)


def _tracer(
    recipe: Recipe, info: ModelInfo, versions: Mapping[str, str], sampling: Sampling, seed: int
) -> Callable[[tuple[range, Mapping[str, Array]]], tuple[F32, F32]]:
    network = _open(recipe, info, versions)
    engine = TorchEngine(network.module, sampling)

    def work(batch: tuple[range, Mapping[str, Array]]) -> tuple[F32, F32]:
        indices, conditions = batch
        x, e = (np.empty((len(sampling), len(indices), *info.sample_shape), np.float32) for _ in range(2))

        def keep(step: int, x_t: F64, epsilon: F64) -> None:
            x[step], e[step] = x_t, epsilon

        trace(engine, sampling, indices, conditions, seed, keep)
        return x, e

    return work


def _measurer(
    recipe: Recipe,
    info: ModelInfo,
    versions: Mapping[str, str],
    sampling: Sampling,
    quantized: QuantizedNetwork,
    emission: Emission,
) -> Callable[[Batch], list[NoiseStats]]:
    network = _open(recipe, info, versions)
    return partial(sums_of, TorchEngine(simulate(network, quantized, emission), sampling), sampling)
