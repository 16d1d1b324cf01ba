"""Quality of a quantized text-to-image model against its full precision, at several scales of guidance.

    python benchmarks/text_model.py [--samples 300] [--guidance 1 3 7.5] [--write]

A bundle of calib/cifar10_text for each scale is built into benchmarks/out/. Prompts are "a photo of a ...",
one class after the other; classes are those that the model's classifier names. Rows of a scale share noise
and prompts, on a seed that nothing else uses. Bundles and samples are kept, and a rerun takes them up.
"""

from __future__ import annotations

import argparse
import sys

from architectures import kept_bundle
from report import OUT, TEXT_MODEL, machine, table, write_section

from ptqd_export.bundle.bundle import Bundle
from ptqd_export.core.backend import ORT_CPU
from ptqd_export.core.plan import parse_plan
from ptqd_export.evaluate import Candidate, evaluate
from ptqd_export.evaluate.report import Row, show
from ptqd_export.recipe import Recipe
from ptqd_export.runtime import encode_prompts

PRECISIONS = ("fp32", "w8a8", "w4a8")
HEADER = (
    "guidance",
    "plan",
    "PSNR to fp32, dB",
    "median, 5th percentile",
    "class of fp32, %",
    "class of the prompt, %",
    "guidance gap to fp32's, RMS",
    "along it",
    "bit operations, %",
)


def plans(n: int) -> tuple[str, ...]:
    """The paper's order among them: fewer bits while the noise is large."""
    return "w8a8", "w4a8", f"w4a8*{n // 2},w8a8*{n - n // 2}"


def bundle_of(guidance: float) -> Bundle:
    """The bundle of a scale, built unless it is there."""
    recipe = Recipe.load(TEXT_MODEL).override(
        sampler={"guidance_scale": guidance},
        quantization={"precisions": PRECISIONS},
        plan={"rule": "fixed", "steps": ("w8a8",), "sensitivity": "uniform"},
    )
    return kept_bundle(recipe, OUT / f"text-{guidance:g}")


def cells(guidance: float, row: Row) -> list[str]:
    paired, gap = row.paired, row.gap
    return [
        f"{guidance:g}",
        row.plan,
        show(paired.psnr if paired else None, ".1f"),
        f"{paired.psnr_median:.1f}, {paired.psnr_p5:.1f}" if paired else "-",
        show(row.same_class, ".1f", 100),
        show(row.right_class, ".1f", 100),
        "-" if gap is None else f"{min(gap.ratio):.2f} to {max(gap.ratio):.2f}",
        "-" if gap is None else f"{min(gap.along):.2f} to {max(gap.along):.2f}",
        f"{100 * row.bops:.1f}",
    ]


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--samples", type=int, default=300)
    parser.add_argument("--guidance", type=float, nargs="+", default=[1.0, 3.0, 7.5])
    parser.add_argument("--workers", type=int, default=2, help="processes of one thread each")
    parser.add_argument("--write", action="store_true", help="put the table into docs/benchmarks.md")
    args = parser.parse_args()
    sys.path.insert(0, str(TEXT_MODEL))
    from captions import CLASSES, PLAIN, caption

    prompts = [caption(label, PLAIN) for label in range(len(CLASSES))]
    OUT.mkdir(parents=True, exist_ok=True)
    rows, note = [], ""
    for guidance in args.guidance:
        bundle = bundle_of(guidance)
        n = len(bundle.manifest.sampling)
        report = evaluate(
            bundle,
            [Candidate(parse_plan(text, n)) for text in plans(n)],
            work=OUT / "text-samples",
            backend=ORT_CPU,
            num_samples=args.samples,
            workers=args.workers,
            prompted=encode_prompts(bundle, prompts),
            asked=range(len(prompts)),
            classifier=TEXT_MODEL / "classifier.onnx",
        )
        rows += [cells(guidance, row) for row in report.rows]
        note = (
            f"{report.model}, {report.steps} steps, eta {report.eta:g}, {report.backend}; "
            f"{report.samples} samples of seed {report.seed}, 95 % intervals. {machine()}."
        )
    text = f"{table(HEADER, rows)}\n\n{note}"
    print(text)
    if args.write:
        write_section("text-model", text)


if __name__ == "__main__":
    main()
