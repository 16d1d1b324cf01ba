"""What a bundle holds, for people: a row per step, and plots."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from .bundle import Bundle
from .evaluate.parity import summary
from .manifest import name_of
from .quant import BACKENDS, Emission


@dataclass(frozen=True)
class StepRow:
    """One denoising step under the bundle's plan; k, bias and snr_q are those measured before correction."""

    step: int
    timestep: int
    precision: str
    corrected: bool
    k: float
    bias: float
    sigma: float
    sigma_recalibrated: float
    snr_q: float | None
    snr_f: float


def per_step(bundle: Bundle) -> list[StepRow]:
    """A row per step, for the best backend that the bundle was built for.

    bias is the RMS over channels; snr_q is None where there is no noise, as at full precision.
    """
    m = bundle.manifest
    sigmas, recalibrated, snr_f = m.schedule.sigmas, bundle.sigmas(m.backends[0]), m.schedule.snr
    emission = BACKENDS[m.backends[0]]
    rows = []
    for i, precision in enumerate(m.plan.steps):
        common = (i, int(m.schedule.timesteps[i]), str(precision))
        tail = (float(sigmas[i]), float(recalibrated[i]))
        if precision.is_float:
            rows.append(StepRow(*common, False, 0.0, 0.0, *tail, None, float(snr_f[i])))
            continue
        stats, correction = bundle.stats(precision, emission), bundle.correction(precision, emission)
        corrected = bool((correction.gain[i] != 1).any() or correction.offset[i].any())
        bias = float(np.sqrt((stats.bias[i] ** 2).mean()))
        snr_q = float(stats.snr[i]) if np.isfinite(stats.snr[i]) else None
        rows.append(StepRow(*common, corrected, float(stats.k[i]), bias, *tail, snr_q, float(snr_f[i])))
    return rows


def text(bundle: Bundle, rows: Sequence[StepRow]) -> str:
    """The bundle as a page of text."""
    m = bundle.manifest
    info = m.plan_info
    cost = f"time on {info['timed_on']}" if info["cost"] == "time" and info["rule"] != "fixed" else info["cost"]
    lines = [
        f"{m.model.name}: {'x'.join(map(str, m.model.sample_shape))}, "
        f"{f'{len(m.model.labels)} classes' if m.model.labels else 'no classes'}, {m.schedule.prediction_type} prediction",
        f"measured for: {m.solver}, {len(m.schedule)} steps, eta {m.schedule.eta:g}, guidance {m.guidance_scale:g}; "
        f"recalibrated variance {'on' if m.recalibrate_variance else 'off'}"
        + (" (eta 0 injects no noise: there is no variance to absorb)" if m.schedule.eta == 0 else ""),
        f"plan ({info['rule']}, {info['objective']} error, cost in {cost}): {m.plan}",
        *(f"note: {note}" for note in info.get("notes", ())),
        f"bit operations: {info['bops'] / info['bops_fp32']:.3f} of fp32",
        "",
        f"{'engine':<12}{'backend':<14}{'ms/eval':>9}  lowering",
    ]
    lines += [f"{name_of(a.precision):<12}{a.backend:<14}{'-' if a.time_ms is None else f'{a.time_ms:.2f}':>9}  {a.lowering}" for a in m.artifacts]
    lines += _built(bundle)
    lines += ["", "parity with the simulation:"]
    lines += [f"  {name:<19}{summary(figures)}" for name, figures in m.parity.items()]
    lines += _noise(bundle)
    lines += ["", f"{'step':>4}{'t':>6}  {'precision':<10}{'corr':<5}{'k':>9}{'bias':>10}{'sigma':>9}{'sigma_':>9}{'SNR_Q':>10}{'SNR_F':>10}"]
    lines += [
        f"{r.step:>4}{r.timestep:>6}  {r.precision:<10}{'yes' if r.corrected else 'no':<5}{r.k:>9.4f}{r.bias:>10.5f}{r.sigma:>9.4f}"
        f"{r.sigma_recalibrated:>9.4f}{'inf' if r.snr_q is None else f'{r.snr_q:.4g}':>10}{r.snr_f:>10.4g}"
        for r in rows
    ]
    return "\n".join(lines).replace("sigma_", "sigma'")


def _noise(bundle: Bundle) -> list[str]:
    """SNR_Q before correction per precision and numerics, the mean over steps in dB; nothing at full precision."""
    lines = []
    for precision in bundle.manifest.bops:
        if not precision.is_float:
            numerics = dict.fromkeys(emission.numerics(precision) for emission in Emission)
            found = {str(e): float(np.mean(10 * np.log10(np.minimum(bundle.stats(precision, e).snr, 1e20)))) for e in numerics}
            lines.append(f"  {precision!s:<19}{', '.join(f'{name} {value:.1f}' for name, value in found.items())}")
    return ["", "SNR_Q before correction, dB (ort-cpu quantizes the outputs of convs as well, where it differs):", *lines] if lines else []


def _built(bundle: Bundle) -> list[str]:
    """How the finished engines were built, and which of the layers meant to run in 8 bits do; nothing where there are none."""
    built = [(a, a.build) for a in bundle.manifest.artifacts if a.build is not None]
    if not built:
        return []
    lines = ["", f"{'finished engine':<26}{'8-bit layers':>13}{'kernels':>9}{'build s':>9}{'MB':>8}{'peak MB':>9}  targets"]
    for a, build in built:
        size = int(bundle.manifest.files[a.file]["size"])
        lines.append(
            f"{name_of(a.precision)}.{a.backend}".ljust(26)
            + (f"{build.plan['taken']} of {build.plan['meant']}" if build.plan["meant"] else "-").rjust(13)
            + f"{build.plan['kernels']:>9}"
            f"{build.seconds:>9.1f}{size / 1e6:>8.1f}{build.peak_bytes / 1e6:>9.0f}  {', '.join(build.targets)}"
        )
        lines += [f"    {line}" for line in build.fell_back]
    return lines


def plot_bundle(bundle: Bundle, path: Path) -> None:
    """`path`: figures per step; beside it `<name>-pareto.png`: the front that the plan was chosen from."""
    from .evaluate.plots import plot_pareto, plot_steps

    m = bundle.manifest
    figures: dict[str, dict[str, np.ndarray[tuple[int, ...], np.dtype[np.float64]]]] = {}
    for precision in m.bops:
        if not precision.is_float:
            emission = BACKENDS[m.backends[0]]
            stats, correction = bundle.stats(precision, emission), bundle.correction(precision, emission)
            figures[str(precision)] = {
                "snr": stats.snr,
                "k": stats.k,
                "bias": stats.bias,
                "sigma": m.schedule.recalibrated_sigmas(correction.var) if m.recalibrate_variance else m.schedule.sigmas,
            }
    title = f"{m.model.name}: {m.plan}"
    plot_steps(path, figures, [str(p) for p in m.plan.steps], snr_forward=m.schedule.snr, sigmas=m.schedule.sigmas, title=title)
    info = m.plan_info
    if info["front"]:
        by_time = info["cost"] == "time"
        chosen = next(((f["cost"], f["error"]) for f in info["front"] if f["plan"] == str(m.plan)), None)
        scale = 1e3 if by_time else 1.0
        plot_pareto(
            path.with_name(f"{path.stem}-pareto{path.suffix}"),
            [(f["cost"] * scale, f["error"]) for f in info["front"]],
            None if chosen is None else (chosen[0] * scale, chosen[1]),
            cost_label="engine time of all steps (ms)" if by_time else "bit operations of all steps",
            error_label=f"weighted error ({info['objective']})",
            title=title,
        )
