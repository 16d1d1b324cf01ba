"""Plots for people, as PNG files: statistics per step, the Pareto front of plans, noise of single layers.

matplotlib is imported inside the functions. The same data gives the same bytes.
"""

from __future__ import annotations

import io
from collections.abc import Mapping, Sequence
from itertools import groupby
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt

from ..errors import PTQDError, RecipeError
from ..files import write_file

if TYPE_CHECKING:
    from matplotlib.figure import Figure

F64 = npt.NDArray[np.float64]


def plot_steps(
    path: Path,
    per_step: Mapping[str, Mapping[str, F64]],
    plan: Sequence[str],
    *,
    snr_forward: F64,
    sigmas: F64,
    title: str = "",
) -> None:
    """Draw four panels over the steps: SNR_Q and SNR_F, k, mean bias, and sigma with sigma'.

    Steps are in sampling order; 0 is the noisiest.

    Args:
        path: a .png file.
        per_step: by precision: any of "snr" (T,), "k" (T,), "bias" (T,) or (T, C), of which the mean over
            channels is drawn, and "sigma" (T,), the recalibrated standard deviation sigma'.
        plan: precision of each step (T,), drawn as a coloured band behind every panel.
        snr_forward: SNR_F = abar / (1 - abar), (T,).
        sigmas: standard deviation of the noise that the schedule injects, (T,).
    Raises:
        RecipeError: `path` is not a .png file, or a length differs from the plan's.
        PTQDError: matplotlib is not installed, or the file cannot be written.
    """
    n_steps = len(plan)
    rows = {
        name: {key: np.asarray(v, np.float64) for key, v in values.items()}
        for name, values in per_step.items()
    }
    for name, values in [*rows.items(), ("schedule", {"snr_forward": snr_forward, "sigmas": sigmas})]:
        for key, v in values.items():
            if len(v) != n_steps:
                raise RecipeError(
                    f"{key} of {name} has {len(v)} steps: expected {n_steps}, as many as the plan"
                )
    figure = _figure(8.0, 10.0, title)
    axes = figure.subplots(4, 1, sharex=True)
    names = [*rows, *sorted(set(plan) - set(rows))]
    colour = {name: f"C{i % 10}" for i, name in enumerate(names)}
    steps = np.arange(n_steps)

    for panel, (key, label) in zip(
        axes,
        [("snr", "SNR (power)"), ("k", "k"), ("bias", "mean bias"), ("sigma", "injected std")],
        strict=True,
    ):
        first = 0
        for name, group in groupby(plan):
            last = first + len(list(group))
            panel.axvspan(first - 0.5, last - 0.5, color=colour[name], alpha=0.12, linewidth=0)
            if key == "snr":
                panel.text(
                    (first + last - 1) / 2,
                    1.02,
                    name,
                    ha="center",
                    va="bottom",
                    color=colour[name],
                    transform=panel.get_xaxis_transform(),
                )
            first = last
        for name, values in rows.items():
            if key in values:
                line = values[key] if values[key].ndim == 1 else values[key].mean(1)
                line = np.where(np.isfinite(line), line, np.nan)
                panel.plot(
                    steps,
                    line,
                    color=colour[name],
                    marker=".",
                    label=f"{name} sigma'" if key == "sigma" else name,
                )
        if key == "snr":
            panel.plot(steps, snr_forward, color="black", linestyle="--", label="SNR_F")
            panel.set_yscale("log")
        elif key == "sigma":
            panel.plot(steps, sigmas, color="black", linestyle="--", label="sigma")
        else:
            panel.axhline(0.0, color="grey", linewidth=0.5)
        panel.set_ylabel(label)
        if panel.get_legend_handles_labels()[0]:
            panel.legend(fontsize="small", loc="best")
    axes[-1].set_xlabel("step (0 is the noisiest)")
    axes[-1].set_xlim(-0.5, n_steps - 0.5)
    axes[-1].locator_params(axis="x", integer=True)
    _save(figure, path)


def plot_pareto(
    path: Path,
    front: Sequence[tuple[float, float]],
    chosen: tuple[float, float] | None,
    *,
    uniform: Mapping[str, tuple[float, float]] | None = None,
    cost_label: str = "time per sample (ms)",
    error_label: str = "weighted error",
    title: str = "",
) -> None:
    """Draw the Pareto front of plans: cost against error.

    Args:
        path: a .png file.
        front: (cost, error) of each plan of the front, at least one, in any order.
        chosen: (cost, error) of the plan in use, or None.
        uniform: (cost, error) of the plans that use one precision throughout, by precision.
        cost_label: says what the cost is and its unit, such as time or bit operations.
    Raises:
        RecipeError: the front is empty, or `path` is not a .png file.
        PTQDError: matplotlib is not installed, or the file cannot be written.
    """
    if not front:
        raise RecipeError("the Pareto front is empty: give at least one plan")
    figure = _figure(6.4, 4.8, title)
    axes = figure.subplots()
    points = np.asarray(sorted(front), np.float64)
    axes.plot(
        points[:, 0], points[:, 1], color="C0", marker=".", drawstyle="steps-post", label="Pareto front"
    )
    for i, (name, (cost, error)) in enumerate((uniform or {}).items()):
        axes.plot(cost, error, color=f"C{(i + 1) % 10}", marker="s", linestyle="none", label=f"all {name}")
    if chosen is not None:
        axes.plot(*chosen, color="black", marker="*", markersize=14, linestyle="none", label="chosen")
    # Errors span decades, so the axis is logarithmic; a plan without error (all full precision) does not fit.
    errors = [
        *points[:, 1],
        *(error for _, error in (uniform or {}).values()),
        *([] if chosen is None else [chosen[1]]),
    ]
    if min(errors) > 0:
        axes.set_yscale("log")
    axes.set_xlabel(cost_label)
    axes.set_ylabel(error_label)
    axes.legend(fontsize="small")
    _save(figure, path)


def plot_evaluation(
    path: Path, psnr: Mapping[str, F64], gaps: Mapping[str, Sequence[float]], *, title: str = ""
) -> None:
    """Draw the PSNR of all pairs, sorted, and where the model is guided the guidance gap over the steps.

    Args:
        path: a .png file.
        psnr: by candidate, dB (N,).
        gaps: by candidate, ratio to full precision's (T,).
    Raises:
        RecipeError: `path` is not a .png file.
        PTQDError: matplotlib is not installed, or the file cannot be written.
    """
    figure = _figure(8.0, 8.0 if gaps else 4.5, title)
    panels = figure.subplots(2 if gaps else 1, 1, squeeze=False)[:, 0]
    for name, values in psnr.items():
        panels[0].plot(np.linspace(0, 100, len(values)), np.sort(values), label=name)
    panels[0].set_xlabel("pairs with a lower PSNR, %")
    panels[0].set_ylabel("PSNR (dB)")
    for name, ratio in gaps.items():
        panels[1].plot(np.arange(len(ratio)), ratio, marker=".", label=name)
    if gaps:
        panels[1].axhline(1.0, color="grey", linewidth=0.5)
        panels[1].set_xlabel("step (0 is the noisiest)")
        panels[1].set_ylabel("guidance gap / full precision's")
        panels[1].locator_params(axis="x", integer=True)
    for panel in panels:
        if panel.get_legend_handles_labels()[0]:
            panel.legend(fontsize="small", loc="best")
    _save(figure, path)


def plot_layers(
    path: Path, layers: Sequence[str], steps: Sequence[int], noise: F64, *, label: str, title: str = ""
) -> None:
    """Draw a map of layers and steps, in which colour is the logarithm of the noise.

    Where there is no noise, it is white.

    Args:
        path: a .png file.
        layers: labels of L layers, from the top.
        steps: S steps, from the left.
        noise: (L, S).
        label: says what the noise is.
    Raises:
        RecipeError: `path` is not a .png file, or the noise is not (L, S).
        PTQDError: matplotlib is not installed, or the file cannot be written.
    """
    if noise.shape != (len(layers), len(steps)):
        raise RecipeError(
            f"noise of shape {noise.shape}: expected a row for each of {len(layers)} layers, and a column "
            f"for each of {len(steps)} steps"
        )
    figure = _figure(8.0, min(2.0 + 0.16 * len(layers), 300.0), title)
    axes = figure.subplots()
    with np.errstate(divide="ignore", invalid="ignore"):
        decades = np.where(noise > 0, np.log10(noise), np.nan)
    image = axes.imshow(decades, aspect="auto", interpolation="nearest", cmap="viridis")
    axes.set_yticks(range(len(layers)), layers, fontsize=6, parse_math=False)
    axes.set_xticks(range(len(steps)), [str(step) for step in steps])
    axes.set_xlabel("step (0 is the noisiest)")
    figure.colorbar(image, ax=axes, label=f"log10 of {label}")
    _save(figure, path)


def _figure(width: float, height: float, title: str) -> Figure:
    """A new figure, size in inches, drawn by Agg without pyplot: it needs no global state and no display."""
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise PTQDError("plots need matplotlib, which is not installed: pip install matplotlib") from error
    figure = Figure(figsize=(width, height), dpi=120, layout="constrained")
    if title:
        figure.suptitle(title, parse_math=False)
    return figure


def _save(figure: Figure, path: Path) -> None:
    if path.suffix.lower() != ".png":
        raise RecipeError(f"cannot plot to {path}: give a file name that ends in .png")
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", metadata={"Software": None})
    write_file(path, buffer.getvalue())
