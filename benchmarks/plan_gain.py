"""What plans gain: time of whole runs and closeness to full precision, on each CPU backend that works here.

    python benchmarks/plan_gain.py [BUNDLE] [--plan PLAN ...] [--samples 128] [--batch 16] [--write]

Runs of all plans on all backends take turns, one thread each. Closeness is PSNR to the bundle's own full
precision on the same backend, from the same noise. A run beside the sum of its engine calls says what the
sampler, the noise and the switches cost.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
from pathlib import Path

from report import REFERENCE_BUNDLE, machine, table, write_section

from ptqd_export.bench import Settings, bench
from ptqd_export.bench.report import ratio
from ptqd_export.bundle.bundle import Bundle
from ptqd_export.core.backend import ORT_CPU
from ptqd_export.core.plan import Plan, parse_plan
from ptqd_export.evaluate import Candidate, evaluate
from ptqd_export.evaluate.report import show

BACKENDS = (ORT_CPU, "openvino")
HEADER = ("plan", "backend", "ms per sample", "times faster", "over its calls", "PSNR to fp32, dB")


def plans_of(bundle: Bundle) -> list[str]:
    """Full precision, w8a8, w8a8+, the bundle's plan, and w8a8 with full precision first or last."""
    n = len(bundle.manifest.sampling)
    return [
        "fp32",
        "w8a8",
        *(str(p) for p in bundle.manifest.bops if p.mixed and p.levels[-1].is_float),
        str(bundle.manifest.plan),
        f"fp32*2,w8a8*{n - 2}",
        f"w8a8*{n - 2},fp32*2",
        "w4a8",
    ]


def closeness(bundle: Bundle, backend: str, plans: list[Plan], samples: int) -> dict[str, str]:
    """PSNR with its interval, by plan."""
    with tempfile.TemporaryDirectory() as folder:
        report = evaluate(
            bundle,
            [Candidate(plan) for plan in plans],
            work=Path(folder),
            backend=backend,
            num_samples=samples,
            gaps=False,
        )
    return {row.plan: "-" if row.paired is None else show(row.paired.psnr, ".1f") for row in report.rows}


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("bundle", nargs="?", type=Path, default=REFERENCE_BUNDLE)
    parser.add_argument("--plan", nargs="+", help="instead of full precision, w8a8, w8a8+, w4a8 and mixtures")
    parser.add_argument("--samples", type=int, default=128)
    parser.add_argument("--batch", type=int, default=16)
    parser.add_argument("--runs", type=int, default=5)
    parser.add_argument("--write", action="store_true", help="put the table into docs/benchmarks.md")
    args = parser.parse_args()
    bundle = Bundle.open(args.bundle)
    n = len(bundle.manifest.sampling)
    plans = [*dict.fromkeys(parse_plan(text, n) for text in args.plan or plans_of(bundle))]
    settings = Settings(BACKENDS, args.batch, runs=args.runs, rounds=5, plans=tuple(plans))
    found = bench(bundle, settings, say=lambda text: print(text, file=sys.stderr))
    near = {
        name: closeness(bundle, name, plans, args.samples) for name in {run.backend for run in found.runs}
    }
    first, rows = found.runs[0], []
    for run in found.runs:
        faster = "1" if run is first else str(ratio(first.milliseconds, run.milliseconds))
        row = [run.plan, run.backend, f"{run.median / args.batch:.1f}", faster, f"{run.more:+.1%}"]
        rows.append([*row, near[run.backend][run.plan]])
    m = bundle.manifest.sampling
    text = (
        f"{table(HEADER, rows)}\n\n{m.model.name}, {m.summary}; batch {args.batch}, one thread, medians of "
        f"{args.runs} runs in turn; {args.samples} samples. {machine('onnxruntime', 'openvino')}."
    )
    print(text)
    if args.write:
        write_section("plan-gain", text)


if __name__ == "__main__":
    main()
