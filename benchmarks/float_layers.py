"""What it gains to leave the noisiest layers in float (w8a8+), in fidelity and in time.

    python benchmarks/float_layers.py [--only MODEL ...] [--budget 1.15 1.5] [--samples 128] [--write]

Bundles of both trained models, with a w8a8+ for each `layer_budget`, are built into benchmarks/out/. Beside
them: w8a8 throughout, and w8a8 with a few steps in full precision, the other way to spend time on fidelity.
Rows of a model share noise, on a seed that nothing else uses. Engines of all rows take turns on one thread;
a plan's time is the mean over its steps, with both branches of guidance.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from architectures import kept_bundle
from report import OUT, REFERENCE_MODEL, TEXT_MODEL, machine, table, write_section

from ptqd_export.backends import set_threads
from ptqd_export.bundle.bundle import Bundle
from ptqd_export.core.backend import OPENVINO, OPENVINO_FP32, ORT_CPU
from ptqd_export.core.plan import Plan, parse_plan
from ptqd_export.core.precision import FP32, Precision
from ptqd_export.core.timing import feeds_to_time, time_rounds
from ptqd_export.evaluate import Candidate, evaluate
from ptqd_export.evaluate.report import show
from ptqd_export.recipe import Recipe
from ptqd_export.runtime import encode_prompts, open_artifact

BATCH = 4
W8A8, MIXED = Precision.parse("w8a8"), Precision.parse("w8a8+")
HEADER = ("model", "backend", "plan", "float layers", "their operations, %", "PSNR to fp32, dB", "time")


@dataclass(frozen=True)
class Model:
    """A trained model; `sampler` beside its recipe's, and what it is sampled for."""

    folder: Path
    sampler: Mapping[str, object] = field(default_factory=dict)
    prompts: bool = False

    def conditions(self, bundle: Bundle) -> dict[str, Any]:
        """Arguments of `evaluate`."""
        if not self.prompts:
            return {}
        sys.path.insert(0, str(self.folder))
        from captions import CLASSES, PLAIN, caption

        texts = [caption(label, PLAIN) for label in range(len(CLASSES))]
        return {"prompted": encode_prompts(bundle, texts), "asked": range(len(texts))}


MODELS = {"reference": Model(REFERENCE_MODEL), "text": Model(TEXT_MODEL, {"guidance_scale": 3.0}, True)}


def bundle_of(name: str, budget: float) -> Bundle:
    recipe = Recipe.load(MODELS[name].folder).override(
        sampler=dict(MODELS[name].sampler),
        quantization={"precisions": ("fp32", "w8a8", "w8a8+"), "layer_budget": budget},
        plan={"rule": "fixed", "steps": ("w8a8",), "sensitivity": "uniform"},
    )
    return kept_bundle(recipe, OUT / f"float-layers-{name}-{budget:g}")


def left_float(bundle: Bundle) -> tuple[str, str]:
    """How many of the layers that w8a8 quantizes are float at w8a8+, and their share of the operations, %."""
    m = bundle.manifest
    found = m.layer_sensitivity[MIXED]
    macs = dict(zip(found.layers, found.macs, strict=True))
    left = [name for name in m.layers[MIXED]["float"] if name in macs]
    share = sum(macs[name] for name in left) / sum(macs.values())
    return f"{len(left)} of {len(macs)}", f"{100 * share:.1f}"


def times(bundles: Mapping[float, Bundle], backend: str) -> dict[tuple[float, Precision], float]:
    """Seconds of an evaluation of BATCH samples by each bundle's engines, in turn; w8a8 and fp32 of one."""
    first = next(iter(bundles))
    wanted = {(first, FP32), (first, W8A8), *((budget, MIXED) for budget in bundles)}
    calls = {}
    for budget, precision in sorted(wanted, key=str):
        bundle = bundles[budget]
        engine = open_artifact(bundle, bundle.manifest.artifact(precision, backend), None)
        calls[budget, precision] = partial(engine, feeds_to_time(bundle.manifest.sampling, BATCH))
    return {key: float(np.median(seconds)) for key, seconds in time_rounds(calls, enough=60.0).items()}


def rows_of(name: str, backend: str, budgets: list[float], samples: int) -> list[list[str]]:
    bundles = {budget: bundle_of(name, budget) for budget in budgets}
    n = len(bundles[budgets[0]].manifest.sampling)
    taken = times(bundles, backend)
    rows = []
    for budget, bundle in bundles.items():
        texts = [f"w8a8*{n}", *(f"fp32*{k},w8a8*{n - k}" for k in (1, 2, 4))] if budget == budgets[0] else []
        plans: list[Plan] = [parse_plan(text, n) for text in (*texts, f"w8a8+*{n}")]
        report = evaluate(
            bundle,
            [Candidate(plan) for plan in plans],
            work=OUT / "float-layers-samples",
            backend=backend,
            num_samples=samples,
            workers=2,
            gaps=False,
            **MODELS[name].conditions(bundle),
        )
        for plan, row in zip(plans, report.rows[1:], strict=True):
            mixed = plan.steps[0] == MIXED
            each = [taken[budget if p == MIXED else budgets[0], p] for p in plan.steps]
            rows.append(
                [
                    bundle.manifest.sampling.model.name,
                    backend,
                    f"{row.plan}, layer_budget {budget:g}" if mixed else row.plan,
                    *(left_float(bundle) if mixed else ("-", "-")),
                    show(row.paired.psnr if row.paired else None, ".1f"),
                    f"{np.mean(each) / taken[budgets[0], W8A8]:.2f}",
                ]
            )
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--only", nargs="+", choices=list(MODELS), default=list(MODELS))
    parser.add_argument("--budget", type=float, nargs="+", default=[1.15, 1.5])
    parser.add_argument("--samples", type=int, default=128)
    parser.add_argument("--write", action="store_true", help="put the table into docs/benchmarks.md")
    args = parser.parse_args()
    OUT.mkdir(parents=True, exist_ok=True)
    set_threads(1)
    rows = [
        row
        for name in args.only
        for backend in (ORT_CPU, OPENVINO, OPENVINO_FP32)
        for row in rows_of(name, backend, args.budget, args.samples)
    ]
    text = f"{table(HEADER, rows)}\n\n{args.samples} samples, {machine('onnxruntime', 'openvino')}."
    print(text)
    if args.write:
        write_section("float-layers", text)


if __name__ == "__main__":
    main()
