"""How well predictions rank plans: seven plans and as many random ones, predicted and sampled.

    python benchmarks/plan_ranking.py [BUNDLE] [--samples 2048] [--random 7] [--write]

The bundle needs eta 0 and fp32, w8a8, w4a8 and w4a4. Each plan is sampled from the same noise as full
precision. The sampled error of the objective `paired` is the mean PSNR to full precision, not clamped; that
of `distribution` is the Frechet distance to the full-precision samples in the features of the reference
classifier. Predictions are compared with them by Spearman's rank correlation: with the weights that were used
before, which took an error at step i to reach x_0 scaled up by 1 / abar_prev, or to count by the noise that
is left in x; with every step's noise as it enters x (w = 1); and with the measured sensitivity of the bundle.
Samples are kept in benchmarks/out/plans/, under the hash of the bundle, and are not drawn again.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Mapping
from itertools import pairwise
from pathlib import Path

import numpy as np
from report import OUT, REFERENCE_BUNDLE, REFERENCE_MODEL, machine, table, write_section
from scipy.stats import spearmanr

from ptqd_export.bundle.bundle import Bundle
from ptqd_export.core.backend import ORT_CPU
from ptqd_export.core.plan import Plan, by_budget, by_snr, fixed, pareto_front
from ptqd_export.core.precision import FP32, Precision
from ptqd_export.core.schedule import NoiseSchedule
from ptqd_export.core.sensitivity import paired_error
from ptqd_export.evaluate.metrics import feature_stats, frechet_distance
from ptqd_export.runtime import run

NOISY = tuple(Precision.parse(text) for text in ("w8a8", "w4a8", "w4a4"))
OBJECTIVES = ("paired", "distribution")
Errors = Mapping[Precision, np.ndarray]
ONE_PIXEL_STEP_VAR = (2 / 255) ** 2 / 12
"""Variance of rounding to 8-bit pixels for data in [-1, 1]."""


def old_weights(schedule: NoiseSchedule, objective: str) -> np.ndarray:
    """The weights w_i that predicted badly, (T,): kept here to show it."""
    prev = schedule.alphas_cumprod_prev
    return 1 / prev if objective == "paired" else 1 / np.maximum(1 - prev, ONE_PIXEL_STEP_VAR)


def predictions(bundle: Bundle, objective: str) -> dict[str, Errors]:
    """Predicted errors (T,) per precision, by each kind of weights."""
    m, choice = bundle.manifest, bundle.manifest.choice
    errors = {p: np.array(choice.error[p]) for p in m.bops}
    found = {
        "1 / abar_prev, or 1 / (1 - abar_prev)": {
            p: old_weights(m.sampling.schedule, objective) * e for p, e in errors.items()
        },
        "w = 1": errors,
    }
    if choice.sensitivity is not None:
        found["measured sensitivity"] = choice.sensitivity.weigh(errors, objective)
    return found


def seven(bundle: Bundle) -> dict[str, Plan]:
    """The plans that the section "quality" was first made with: the paper's rule, budget plans of its bit
    operations by the old weights, and four by hand."""
    m, n = bundle.manifest, len(bundle.manifest.plan)
    bops = {p: float(m.bops[p]) for p in NOISY}
    snr = {p: np.array(m.choice.snr_q[p], np.float64) for p in NOISY}
    found = {"snr": by_snr(snr, bops, m.sampling.schedule)}
    for objective in OBJECTIVES:
        old = next(iter(predictions(bundle, objective).values()))
        front = pareto_front({p: old[p] for p in NOISY}, bops)
        found[f"budget, {objective}, old weights"] = by_budget(front, found["snr"].total(bops)).plan
    half = n // 2
    by_hand = {
        "w4a4 early": [f"w4a4*{half}", f"w8a8*{n - half}"],
        "w4a4 late": [f"w8a8*{half}", f"w4a4*{n - half}"],
        "fp32 early": ["fp32*3", f"w8a8*{n - 3}"],
        "fp32 late": [f"w8a8*{n - 3}", "fp32*3"],
    }
    return found | {f"by hand: {name}": fixed(runs, n) for name, runs in by_hand.items()}


def at_random(count: int, n_steps: int, seed: int = 0) -> dict[str, Plan]:
    """Plans of two to four runs."""
    rng, precisions = np.random.default_rng(seed), (FP32, *NOISY)
    found = {}
    for i in range(count):
        runs = int(rng.integers(2, 5))
        edges = [0, *sorted(rng.choice(np.arange(1, n_steps), runs - 1, replace=False)), n_steps]
        steps: list[Precision] = []
        for a, b in pairwise(edges):
            steps += [precisions[int(rng.integers(0, 4))]] * int(b - a)
        found[f"random {i + 1}"] = Plan(tuple(steps))
    return found


def draw(bundle: Bundle, plan: Plan, args: argparse.Namespace) -> np.ndarray:
    """Samples under a plan; drawn once."""
    folder = OUT / "plans" / bundle.seal[:16]
    folder.mkdir(parents=True, exist_ok=True)
    name = str(plan).replace(" ", "_").replace("*", "x")
    file = folder / f"{args.seed}-{args.samples}-{name}.npy"
    if not file.exists():
        print(f"sampling {plan}", file=sys.stderr)
        x = run(bundle, args.samples, seed=args.seed, plan=plan, backend=ORT_CPU, workers=args.workers)
        np.save(file, x)
    return np.asarray(np.load(file))


def rank_correlation(predicted: list[float], sampled: list[float]) -> float:
    return float(spearmanr(predicted, sampled).statistic)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("bundle", nargs="?", type=Path, default=REFERENCE_BUNDLE)
    parser.add_argument("--samples", type=int, default=2048)
    parser.add_argument("--random", type=int, default=7, help="random plans")
    parser.add_argument("--seed", type=int, default=5)
    parser.add_argument("--workers", type=int, default=2, help="processes of one thread each")
    parser.add_argument("--write", action="store_true", help="put the tables into docs/benchmarks.md")
    args = parser.parse_args()
    bundle = Bundle.open(args.bundle)
    sys.path.insert(0, str(REFERENCE_MODEL))
    from classifier import load_features

    features = load_features(REFERENCE_MODEL)

    def stats(x: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        return feature_stats(features(np.clip(x, -1, 1).astype(np.float32)))

    n = len(bundle.manifest.plan)
    full = draw(bundle, fixed(["fp32"], n), args)
    of_full = stats(full)
    plans = seven(bundle) | at_random(args.random, n)
    sampled: dict[str, list[float]] = {objective: [] for objective in OBJECTIVES}
    for plan in plans.values():
        x = draw(bundle, plan, args)
        sampled["paired"].append(float(-10 * np.log10(4 / paired_error(x, full)).mean()))
        sampled["distribution"].append(frechet_distance(*stats(x), *of_full))
    text = report(bundle, plans, sampled, args)
    print(text)
    if args.write:
        write_section("plan-ranking", text)


def report(
    bundle: Bundle, plans: Mapping[str, Plan], sampled: Mapping[str, list[float]], args: argparse.Namespace
) -> str:
    predicted = {
        objective: {
            name: [plan.error(errors) for plan in plans.values()]
            for name, errors in predictions(bundle, objective).items()
        }
        for objective in OBJECTIVES
    }
    weights = list(predicted["paired"])
    correlations = [
        [name, *(f"{rank_correlation(predicted[o][name], sampled[o]):.3f}" for o in OBJECTIVES)]
        for name in weights
    ]
    rows = [
        [
            label,
            str(plan),
            f"{-10 * np.log10(predicted['paired'][weights[-1]][i] / 4):.1f}",
            f"{-sampled['paired'][i]:.1f}",
            f"{predicted['distribution'][weights[-1]][i]:.2g}",
            f"{sampled['distribution'][i]:.3f}",
        ]
        for i, (label, plan) in enumerate(plans.items())
    ]
    sampling = bundle.manifest.sampling
    measured = bundle.manifest.choice.sensitivity
    how = "" if measured is None else f", sensitivity measured on {measured.samples} held-out trajectories"
    note = (
        f"{sampling.model.name}, {len(sampling)} steps, eta {sampling.schedule.eta:g}, guidance "
        f"{sampling.guidance_scale:g}; {args.samples} samples of seed {args.seed} per plan{how}. {machine()}."
    )
    columns = [f"predicted by {weights[-1]}, dB", "PSNR to fp32, dB", "predicted (distribution)",
               "Frechet distance to fp32's samples"]  # fmt: skip
    return "\n\n".join(
        [
            table(["weights", "paired: with PSNR", "distribution: with Frechet distance"], correlations),
            table(["plan", "precisions", *columns], rows),
            note,
        ]
    )


if __name__ == "__main__":
    main()
