"""What a bundle holds, for people: a row per step, plots, and a trial evaluation of every engine."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from .bundle import Bundle
from .engine import SAMPLE, STEP, TIMESTEP
from .errors import ParityError
from .evaluate.parity import summary
from .quant import Emission
from .runtime import check_probe


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
    """A row per step; bias is the RMS over channels; snr_q is None where there is no noise, as at full precision."""
    m = bundle.manifest
    sigmas, recalibrated, snr_f = m.schedule.sigmas, bundle.sigmas(m.backends[0]), m.schedule.snr
    rows = []
    for i, precision in enumerate(m.plan.steps):
        common = (i, int(m.schedule.timesteps[i]), str(precision))
        tail = (float(sigmas[i]), float(recalibrated[i]))
        if precision.is_float:
            rows.append(StepRow(*common, False, 0.0, 0.0, *tail, None, float(snr_f[i])))
            continue
        stats, correction = bundle.stats(precision, Emission.ORT_CPU), bundle.correction(precision, Emission.ORT_CPU)
        corrected = bool((correction.gain[i] != 1).any() or correction.offset[i].any())
        bias = float(np.sqrt((stats.bias[i] ** 2).mean()))
        snr_q = float(stats.snr[i]) if np.isfinite(stats.snr[i]) else None
        rows.append(StepRow(*common, corrected, float(stats.k[i]), bias, *tail, snr_q, float(snr_f[i])))
    return rows


def text(bundle: Bundle, rows: Sequence[StepRow]) -> str:
    """The bundle as a page of text."""
    m = bundle.manifest
    info = m.plan_info
    lines = [
        f"{m.model.name}: {'x'.join(map(str, m.model.sample_shape))}, "
        f"{f'{len(m.model.labels)} classes' if m.model.labels else 'no classes'}, {m.schedule.prediction_type} prediction",
        f"measured for: {m.solver}, {len(m.schedule)} steps, eta {m.schedule.eta:g}, guidance {m.guidance_scale:g}; "
        f"recalibrated variance {'on' if m.recalibrate_variance else 'off'}"
        + (" (eta 0 injects no noise: there is no variance to absorb)" if m.schedule.eta == 0 else ""),
        f"plan ({info['rule']}, {info['objective']} error, cost in {info['cost']}): {m.plan}",
        *(f"note: {note}" for note in info.get("notes", ())),
        f"bit operations: {info['bops'] / info['bops_fp32']:.3f} of fp32",
        "",
        f"{'engine':<12}{'emission':<11}{'ms/eval':>9}  lowering",
    ]
    lines += [f"{a.precision!s:<12}{a.emission:<11}{'-' if a.time_ms is None else f'{a.time_ms:.2f}':>9}  {a.lowering}" for a in m.artifacts]
    lines += ["", "parity with the simulation:"]
    lines += [f"  {name:<15}{summary(figures)}" for name, figures in m.parity.items()]
    lines += ["", f"{'step':>4}{'t':>6}  {'precision':<10}{'corr':<5}{'k':>9}{'bias':>10}{'sigma':>9}{'sigma_':>9}{'SNR_Q':>10}{'SNR_F':>10}"]
    lines += [
        f"{r.step:>4}{r.timestep:>6}  {r.precision:<10}{'yes' if r.corrected else 'no':<5}{r.k:>9.4f}{r.bias:>10.5f}{r.sigma:>9.4f}"
        f"{r.sigma_recalibrated:>9.4f}{'inf' if r.snr_q is None else f'{r.snr_q:.4g}':>10}{r.snr_f:>10.4g}"
        for r in rows
    ]
    return "\n".join(lines).replace("sigma_", "sigma'")


def plot_bundle(bundle: Bundle, path: Path) -> None:
    """`path`: figures per step; beside it `<name>-pareto.png`: the front that the plan was chosen from."""
    from .evaluate.plots import plot_pareto, plot_steps

    m = bundle.manifest
    figures: dict[str, dict[str, np.ndarray[tuple[int, ...], np.dtype[np.float64]]]] = {}
    for precision in m.bops:
        if not precision.is_float:
            stats, correction = bundle.stats(precision, Emission.ORT_CPU), bundle.correction(precision, Emission.ORT_CPU)
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


def verify_engines(bundle: Bundle) -> list[str]:
    """Evaluate every graph of the bundle once on ONNX Runtime, the portable ones too; their names, such as "w8a8.ort-cpu".

    Raises:
        ParityError: an engine returns NaN or a wrong shape, asks for an unknown input, or computes something else than where it was built.
        GraphError: a graph does not load.
        BackendUnavailable: ONNX Runtime is not installed.
    """
    from .backends import open_engine

    m = bundle.manifest
    for artifact in m.artifacts:
        with open_engine("ort-cpu", bundle.file(artifact.file)) as engine:
            unknown = set(engine.inputs) - {SAMPLE, TIMESTEP, STEP, *(spec.name for spec in m.model.inputs)}
            if unknown:
                raise ParityError(f"{artifact.file} asks for an input {min(unknown)!r} that the manifest does not know: rebuild the bundle")
            check_probe(bundle, artifact, engine)
    return [f"{artifact.precision}.{artifact.emission}" for artifact in m.artifacts]
