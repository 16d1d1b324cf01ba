"""The picture of the README: the same samples at several precisions, a column per class.

    python benchmarks/samples.py [BUNDLE] [--precisions fp32 w8a8 w4a8 w4a4+] [--seed 0]

All rows start from the same noise. Writes docs/samples.png; runs the bundle's own graphs on the CPU.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw, ImageFont
from report import REFERENCE_BUNDLE, REFERENCE_MODEL, ROOT

from ptqd_export.bundle.bundle import Bundle
from ptqd_export.core.backend import ORT_CPU
from ptqd_export.core.plan import Plan
from ptqd_export.core.precision import Precision
from ptqd_export.pictures import to_uint8
from ptqd_export.runtime.runtime import Runtime

SCALE = 2
GAP = 4
LEFT, TOP = 56, 24
"""Pixels for the names of the rows and columns."""
FONT_SIZE = 13
COLUMNS = 10


def draw(bundle: Bundle, precision: Precision, seed: int) -> np.ndarray:
    """Samples (COLUMNS, C, H, W) with one precision at every step, classes in turn."""
    plan = Plan((precision,) * len(bundle.manifest.plan))
    with Runtime(bundle, ORT_CPU, plan) as runtime:
        return runtime.sample(range(COLUMNS), seed=seed)


def picture(rows: dict[str, np.ndarray], columns: list[str]) -> Image.Image:
    """One picture of rows (N, C, H, W) of samples in [-1, 1], with names."""
    height, width = (SCALE * size for size in next(iter(rows.values())).shape[2:])
    size = (LEFT + len(columns) * (width + GAP), TOP + len(rows) * (height + GAP))
    found = Image.new("RGB", size, "white")
    pen, font = ImageDraw.Draw(found), ImageFont.load_default(FONT_SIZE)
    for i, name in enumerate(columns):
        pen.text((LEFT + i * (width + GAP) + width // 2, TOP // 2), name, "black", font, anchor="mm")
    for j, (name, samples) in enumerate(rows.items()):
        top = TOP + j * (height + GAP)
        pen.text((LEFT - 8, top + height // 2), name, "black", font, anchor="rm")
        for i, pixels in enumerate(np.moveaxis(to_uint8(samples), 1, -1)):
            one = Image.fromarray(pixels[..., 0] if pixels.shape[-1] == 1 else pixels)
            place = (LEFT + i * (width + GAP), top)
            found.paste(one.resize((width, height), Image.Resampling.NEAREST), place)
    return found


def class_names(bundle: Bundle) -> list[str]:
    """Of the reference model's classes; of another model's, their numbers."""
    labels = bundle.manifest.sampling.model.labels_in_turn(range(COLUMNS))
    if labels is None:
        return [str(i) for i in range(COLUMNS)]
    if bundle.manifest.sampling.model.name != REFERENCE_MODEL.name:
        return [str(label) for label in labels]
    names = ("T-shirt", "trouser", "pullover", "dress", "coat", "sandal", "shirt", "sneaker", "bag", "boot")
    return [names[label] for label in labels]


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("bundle", nargs="?", type=Path, default=REFERENCE_BUNDLE)
    parser.add_argument(
        "--precisions", nargs="+", type=Precision.parse, default=["fp32", "w8a8", "w4a8", "w4a4+"]
    )
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, default=ROOT / "docs" / "samples.png")
    options = parser.parse_args()
    bundle = Bundle.open(options.bundle)
    chosen = [p if isinstance(p, Precision) else Precision.parse(p) for p in options.precisions]
    rows = {str(precision): draw(bundle, precision, options.seed) for precision in chosen}
    picture(rows, class_names(bundle)).save(options.out, "PNG", optimize=True)
    print(f"{options.out}: {', '.join(rows)}")


if __name__ == "__main__":
    main()
