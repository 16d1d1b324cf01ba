"""What is evaluated: a plan, and for ablations another correction than the one in the bundle's graphs."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import numpy as np

from ..bundle.bundle import Bundle
from ..core.backend import BACKENDS
from ..core.noise import Correction, NoiseStats
from ..core.plan import Plan
from ..core.precision import Precision
from ..errors import RecipeError
from ..runtime import Replaced

Correcting = Literal["folded", "none", "bias", "k", "both", "affine"]
"""folded: what the build chose, gate included; the others at every step, from the bundle's statistics."""


@dataclass(frozen=True)
class Candidate:
    """What is sampled.

    Attributes:
        plan: over the bundle's precisions.
        correction: which one.
        recalibrate: whether the injected noise is reduced by the residual variance; None as the bundle says.
    """

    plan: Plan
    correction: Correcting = "folded"
    recalibrate: bool | None = None

    @property
    def name(self) -> str:
        more: list[str] = [] if self.correction == "folded" else [self.correction]
        if self.recalibrate is not None:
            more.append("sigma'" if self.recalibrate else "sigma")
        return ", ".join([str(self.plan), *more])

    def replaced(self, bundle: Bundle, backend: str) -> Replaced | None:
        """Tables in place of the bundle's; None where its own are meant.

        Raises:
            BundleError: the bundle has no statistics of a precision.
        """
        if self.correction == "folded" and self.recalibrate is None:
            return None
        m, emission = bundle.manifest, BACKENDS[backend].emission
        tables = {}
        for precision in self.plan.precisions:
            if not precision.is_float:
                folded = bundle.correction(precision, emission)
                stats = bundle.stats(precision, emission)
                tables[precision] = folded if self.correction == "folded" else correct(stats, self.correction)
        var = {precision: table.var for precision, table in tables.items()}
        recalibrate = m.recalibrate_variance if self.recalibrate is None else self.recalibrate
        return Replaced(tables, self.plan.sigmas(m.sampling.schedule, var, recalibrate))


def correct(stats: NoiseStats, mode: Correcting) -> Correction:
    """The correction of one mode at every step: bias is the mean of D alone, k the gain alone, both is PTQD.

    Raises:
        RecipeError: no such mode.
    """
    if mode == "affine":
        return Correction.from_stats(stats, mode)
    if mode not in ("none", "bias", "k", "both"):
        raise RecipeError(f"correction {mode!r} is not known: give folded, none, bias, k, both or affine")
    every = np.ones(len(stats.count), bool)
    return Correction.of_parts(stats, every & (mode in ("k", "both")), every & (mode in ("bias", "both")))


def full_precision(bundle: Bundle) -> Plan:
    """The plan of the bundle's most precise float at every step.

    Raises:
        RecipeError: it holds none.
    """
    floats: list[Precision] = [p for p in bundle.manifest.bops if p.is_float]
    if not floats:
        raise RecipeError(
            f"{bundle.path} holds no full precision to compare with: give --against, or rebuild with "
            "--precision fp32"
        )
    return Plan((max(floats),) * len(bundle.manifest.sampling))
