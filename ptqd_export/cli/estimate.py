"""The text of build --dry-run."""

from __future__ import annotations

from collections.abc import Mapping

from ..core.estimate import Estimate, PrecisionEstimate
from ..core.precision import FLOAT_BITS, HALF_BITS


def estimate_text(e: Estimate) -> str:
    """An estimate for people."""
    evaluations = ", ".join(f"{count:,} {what}" for what, count in e.evaluations.items())
    return "\n".join(
        (
            f"{e.model}: {e.sampler}",
            f"{_count(e.parameters)} parameters, {_count(e.macs)} multiply-accumulates per evaluation",
            *(_precision(one, e.macs) for one in e.precisions),
            f"bundle: about {_total(e.bundle_bytes)}; finished engines come on top",
            f"memory: about {_total(e.memory_bytes)} at the peak; {_bytes(e.free_bytes)} are free here",
            f"evaluations: {sum(e.evaluations.values()):,}, for one sample each: {evaluations}",
            f"time: about {_time(e.seconds)}, an estimate: {_time(e.evaluation_seconds)} per evaluation "
            "by a second of measuring here, if nothing else runs",
            "nothing was written",
        )
    )


def _precision(one: PrecisionEstimate, macs: int) -> str:
    layers = ", ".join(f"{count} {bits}" for bits, count in one.layers.items())
    shares = one.bops / (macs * FLOAT_BITS**2), one.half_bops / (macs * FLOAT_BITS**2)
    what = "stay float" if one.precision.levels[-1].is_float else "get other bits"
    more = f"; some layers will {what}, by measured noise" if one.open else ""
    most = "at most " if one.open else ""
    return (
        f"{one.precision}: layers {layers}; {most}{shares[0]:.1%} of fp32's bit operations, {shares[1]:.1%} "
        f"with float parts of {HALF_BITS} bits{more}"
    )


def _total(parts: Mapping[str, int]) -> str:
    named = ", ".join(f"{what} {_bytes(size)}" for what, size in parts.items() if size)
    return f"{_bytes(sum(parts.values()))} ({named})"


def _bytes(n: int) -> str:
    return f"{n / 1e9:.1f} GB" if n >= 1e9 else f"{n / 1e6:.1f} MB"


def _count(n: int) -> str:
    for size, name in ((1e12, "trillion"), (1e9, "billion"), (1e6, "million")):
        if n >= size:
            return f"{n / size:.1f} {name}"
    return f"{n:,}"


def _time(seconds: float) -> str:
    for size, name in ((3600.0, "h"), (60.0, "min"), (1.0, "s")):
        if seconds >= 2 * size:
            return f"{seconds / size:.1f} {name}"
    return f"{1e3 * seconds:.1f} ms"
