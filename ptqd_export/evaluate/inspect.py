"""What a bundle holds, for people: one row per step, and plots."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path

import numpy as np
import numpy.typing as npt

from ..bundle.bundle import Bundle
from ..bundle.manifest import Choice
from ..bundle.pipeline import Decoder, TextEncoder
from ..core.backend import BACKENDS, Emission
from ..core.gate import Kept
from ..core.plan import Plan
from .layers import layer_lines, plot_sensitivities

MB = 1e6
SIGMA_PRIME = "sigma'"
WORDS: Mapping[Kept, str] = {
    "nothing": "nothing",
    "bias": "the bias alone",
    "k": "k alone",
    "both": "k and bias",
    "affine": "the affine map",
}
"""What a step kept of its correction."""


@dataclass(frozen=True)
class StepRow:
    """One denoising step under the bundle's plan.

    k, bias and snr_q were measured before correction, of which `kept` says what the step has.
    """

    step: int
    timestep: float
    precision: str
    kept: Kept
    k: float
    bias: float
    sigma: float
    sigma_recalibrated: float
    snr_q: float | None
    snr_f: float


def per_step(bundle: Bundle) -> list[StepRow]:
    """One row per step, for the best backend that the bundle was built for.

    bias is the RMS over channels; snr_q is None where there is no noise, as at full precision.
    """
    m, best = bundle.manifest, bundle.manifest.backends[0]
    schedule, emission = m.sampling.schedule, BACKENDS[best].emission
    sigmas, recalibrated, snr_f = schedule.sigmas, bundle.sigmas(best), schedule.snr
    rows = []
    for i, precision in enumerate(m.plan.steps):
        common = (i, schedule.timesteps[i].item(), str(precision))
        tail = (float(sigmas[i]), float(recalibrated[i]))
        if precision.is_float:
            rows.append(StepRow(*common, "nothing", 0.0, 0.0, *tail, None, float(snr_f[i])))
            continue
        stats = bundle.stats(precision, emission)
        kept = m.correction.steps[f"{precision}.{emission.numerics(precision)}"].kept[i]
        bias = float(np.sqrt((stats.bias[i] ** 2).mean()))
        snr_q = float(stats.snr[i]) if np.isfinite(stats.snr[i]) else None
        rows.append(StepRow(*common, kept, float(stats.k[i]), bias, *tail, snr_q, float(snr_f[i])))
    return rows


def text(bundle: Bundle, rows: Sequence[StepRow]) -> str:
    """The bundle as a page of text."""
    lines = [*_head(bundle), "", *_artifacts(bundle), *_engines(bundle), *_parity(bundle), *_noise(bundle)]
    lines += [*_corrections(bundle), "", *layer_lines(bundle.manifest)]
    return "\n".join([*lines, "", *_steps(rows)])


def _head(bundle: Bundle) -> list[str]:
    m, choice = bundle.manifest, bundle.manifest.choice
    model, schedule = m.sampling.model, m.sampling.schedule
    shape, classes = "x".join(map(str, model.sample_shape)), len(model.labels)
    injects = bool(schedule.sigmas.any())
    still = "" if injects else " (no noise is injected: there is no variance to absorb)"
    return [
        f"{model.name}: {shape}, {f'{classes} classes' if classes else 'no classes'}, "
        f"{schedule.prediction_type} prediction",
        f"measured for: {m.sampling.summary}; "
        f"recalibrated variance {'on' if m.recalibrate_variance else 'off'}{still}",
        *(f"{part.folder}: {_part(part)}" for part in m.pipeline.parts),
        *plan_lines(choice, m.plan),
        *(f"note: {note}" for note in choice.notes),
        *_sensitivity(choice),
    ]


def _part(part: TextEncoder | Decoder) -> str:
    if isinstance(part, TextEncoder):
        states = f"{part.tokens}x{part.width}" + ("" if part.pooled is None else f" and {part.pooled.width}")
        return f"prompts of up to {part.tokens - 2} tokens to {states}, {part.precision}"
    size = "x".join(map(str, part.picture_shape))
    return (
        f"{part.kind}, latents to pictures {size}, scaling factor {part.scaling_factor:g}, {part.precision}"
    )


KINDS = {"chosen": "this plan", "uniform": "one precision", "first-last": "first and last"}


def plan_lines(choice: Choice, plan: Plan) -> list[str]:
    """Lines on a plan, and its error beside that of its rivals, as predicted and as sampled."""
    by_time = choice.cost == "time"
    cost = f"time on {choice.timed_on}" if by_time and choice.rule not in ("fixed", "paper") else choice.cost
    unit, scale = ("ms", 1e3) if by_time else ("10^9 BOPs", 1e-9)
    lines = [
        f"plan ({choice.rule}, {choice.objective} error, cost in {cost}): {plan}",
        f"bit operations: {choice.bops_share:.3f} of fp32",
        f"  {'':<16}{unit:>12}{'predicted':>12}{'sampled':>12}",
    ]
    for r in choice.compared:
        sampled = "-" if r.sampled is None else f"{r.sampled:.3g}"
        factor = "" if r.standard_error is None else f" ± {r.standard_error:.0%}"
        row = f"  {KINDS[r.kind]:<16}{r.cost * scale:>12.4g}{r.predicted:>12.3g}{sampled:>12}{factor:<7}"
        lines.append(f"{row}  {r.plan}")
    return lines


def _sensitivity(choice: Choice) -> list[str]:
    """Lines on what noise in one group of steps comes to at the end of sampling."""
    found = choice.sensitivity
    if found is None:
        return []
    starts = np.cumsum([0, *found.groups])
    names = [f"{a}-{b - 1}" if b - a > 1 else f"{a}" for a, b in pairwise(starts.tolist())]
    title = f"error at the end ({choice.objective}) of steps at one precision, others at fp32, "
    title += f"{found.samples} samples, {found.evaluations} evaluations:"
    lines = ["", title, f"  {'steps':<16}" + "".join(f"{name:>10}" for name in names)]
    for p, errors in found.of(choice.objective).items():
        lines.append(f"  {p!s:<16}" + "".join(f"{error:>10.2g}" for error in errors))
    return lines


def _artifacts(bundle: Bundle) -> list[str]:
    lines = [f"{'engine':<12}{'backend':<14}{'ms/eval':>9}  lowering"]
    for a in bundle.manifest.artifacts:
        ms = "-" if a.time_ms is None else f"{a.time_ms:.2f}"
        taken = f"; {a.plan.taken} of {a.plan.meant} layers in 8 bits" if a.plan and a.plan.meant else ""
        lines.append(f"{a.precision!s:<12}{a.backend:<14}{ms:>9}  {a.lowering}{taken}")
        lines += [f"    {line}" for line in (a.plan.complaints() if a.plan else ())]
    return lines


def _engines(bundle: Bundle) -> list[str]:
    """Lines on the finished engines.

    They say how the engines were built, which of the layers meant to run in 8 bits do, and the memory of all
    engines together.
    """
    m = bundle.manifest
    built = [(engine, engine.build) for engine in m.engines if engine.build is not None]
    if not built:
        return []
    columns = f"{'8-bit layers':>13}{'kernels':>9}{'build s':>9}{'MB':>8}{'peak MB':>9}  targets"
    lines = ["", f"{'finished engine':<26}{columns}"]
    for engine, build in built:
        plan, size = build.plan, m.files[engine.file].size / MB
        taken = f"{plan.taken} of {plan.meant}" if plan.meant else "-"
        lines.append(
            f"{engine.name:<26}{taken:>13}{plan.kernels:>9}{build.seconds:>9.1f}{size:>8.1f}"
            f"{build.peak_bytes / MB:>9.0f}  {', '.join(build.targets)}"
        )
        lines += [f"    {line}" for line in (*plan.complaints(), *build.notes)]
    for name in m.backends:
        mine = [build for engine, build in built if engine.backend == name]
        if mine:
            lines.append(
                f"GPU memory on {name}: {_memory([(b.weight_bytes, b.scratch_bytes) for b in mine])}"
            )
    return lines


def _memory(engines: Sequence[tuple[int | None, int | None]]) -> str:
    """Memory of engines that are open together: all weights, and the largest scratch, which they share."""
    weights, scratch = (
        [size for size in column if size is not None] for column in zip(*engines, strict=True)
    )
    if len(weights) < len(engines) or len(scratch) < len(engines):
        return "not known: the library does not tell it of every engine"
    return (
        f"{sum(weights) / MB:.1f} MB of weights in {len(engines)} engines, {max(scratch) / MB:.1f} MB of "
        "shared scratch"
    )


def _parity(bundle: Bundle) -> list[str]:
    figures = bundle.manifest.parity
    return [
        "",
        "parity with the simulation:",
        *(f"  {name:<19}{found.summary()}" for name, found in figures.items()),
    ]


def _noise(bundle: Bundle) -> list[str]:
    """Lines on SNR_Q before correction, per precision and numerics: the mean over steps, in dB.

    There are none at full precision.
    """
    lines = []
    for precision in bundle.manifest.bops:
        if not precision.is_float:
            numerics = dict.fromkeys(emission.numerics(precision) for emission in Emission)
            snr = {str(e): np.clip(bundle.stats(precision, e).snr, 1e-20, 1e20) for e in numerics}
            values = ", ".join(
                f"{name} {float(np.mean(10 * np.log10(value))):.1f}" for name, value in snr.items()
            )
            lines.append(f"  {precision!s:<19}{values}")
    if not lines:
        return []
    title = (
        f"SNR_Q before correction, dB ({Emission.ORT_CPU} quantizes the outputs of convs as well, where "
        "it differs):"
    )
    return ["", title, *lines]


def _corrections(bundle: Bundle) -> list[str]:
    """Lines on what the gate kept per precision and numerics, and how significant k and bias are."""
    correction = bundle.manifest.correction
    if not correction.steps:
        return []
    limit = max(record.limit for record in correction.steps.values())
    why = f"k and bias kept where |z|, over their errors, is above {limit:.1f}" if limit else "not gated"
    lines = ["", f"correction {correction.mode} ({why}):"]
    for name, record in correction.steps.items():
        counts = Counter(record.kept)
        what = ", ".join(f"{WORDS[kept]} at {n}" for kept, n in counts.most_common())
        z = ", ".join(
            f"{part} {min(map(abs, values)):.1f} to {max(map(abs, values)):.1f}"
            for part, values in (("k", record.z_k), ("bias", record.z_bias))
        )
        lines.append(f"  {name:<19}{what} of {len(record.kept)} steps; |z|: {z}")
    return lines


def _decibels(snr: float | None) -> str:
    """Of a ratio of powers; None where there is no noise, 0 where there is nothing else."""
    if snr is None:
        return "inf"
    return f"{10 * math.log10(snr):.1f}" if snr > 0 else "-inf"


def _steps(rows: Sequence[StepRow]) -> list[str]:
    columns = f"{'k':>9}{'bias':>10}{'sigma':>9}{SIGMA_PRIME:>9}{'SNR_Q, dB':>11}{'SNR_F, dB':>11}"
    lines = [f"{'step':>4}{'t':>6}  {'precision':<10}{'corr':<7}{columns}"]
    for r in rows:
        snr_q, snr_f = _decibels(r.snr_q), _decibels(r.snr_f)
        lines.append(
            f"{r.step:>4}{r.timestep:>6.5g}  "
            f"{r.precision:<10}{'-' if r.kept == 'nothing' else r.kept:<7}{r.k:>9.4f}{r.bias:>10.5f}"
            f"{r.sigma:>9.4f}{r.sigma_recalibrated:>9.4f}{snr_q:>11}{snr_f:>11}"
        )
    return lines


def plot_bundle(bundle: Bundle, path: Path) -> None:
    """Draw the figures per step to `path`, and beside it what else there is.

    That is the front of plans from which the plan was chosen, to `<name>-pareto.png`, and the noise of single
    layers, to `<name>-layers-<precision>.png` for each mixed precision.
    """
    from .plots import plot_pareto, plot_steps

    m, choice = bundle.manifest, bundle.manifest.choice
    schedule, emission = m.sampling.schedule, BACKENDS[m.backends[0]].emission
    figures: dict[str, dict[str, npt.NDArray[np.float64]]] = {}
    for precision in m.bops:
        if not precision.is_float:
            stats, correction = bundle.stats(precision, emission), bundle.correction(precision, emission)
            recalibrated = schedule.recalibrated_sigmas(correction.var)
            figures[str(precision)] = {
                "snr": stats.snr,
                "k": stats.k,
                "bias": stats.bias,
                "sigma": recalibrated if m.recalibrate_variance else schedule.sigmas,
            }
    title = f"{m.sampling.model.name}: {m.plan}"
    steps = [str(precision) for precision in m.plan.steps]
    plot_steps(path, figures, steps, snr_forward=schedule.snr, sigmas=schedule.sigmas, title=title)
    plot_sensitivities(m, path)
    if choice.front:
        by_time = choice.cost == "time"
        scale = 1e3 if by_time else 1.0
        points = {point.plan: (point.cost * scale, point.error) for point in choice.front}
        plot_pareto(
            path.with_name(f"{path.stem}-pareto{path.suffix}"),
            list(points.values()),
            points.get(str(m.plan)),
            cost_label="engine time of all steps (ms)" if by_time else "bit operations of all steps",
            uniform={
                r.plan.partition("*")[0]: (r.cost * scale, r.predicted)
                for r in choice.compared
                if r.kind == "uniform"
            },
            error_label=f"predicted error ({choice.objective})",
            title=title,
        )
