"""Sample the trained reference model in full precision, judge the samples, and write the figures into the
model card.

    python calib/fashion_mnist/sample_grid.py             # samples.png and sampling.json; prints the figures
    python calib/fashion_mnist/sample_grid.py --card      # then: the figures of all .json files here into
                                                          README.md

The sampler's settings are those of `recipe.toml`. Sample i has class i modulo 10, so the grid has a column
per class.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from dataclasses import asdict
from pathlib import Path

import numpy as np
import torch
from classifier import load_features, load_reference
from data import CLASSES, DEBIAN_PATH, load

from ptqd_export.calibrate import TorchEngine, open_model
from ptqd_export.core.sampling import Sampling
from ptqd_export.evaluate.metrics import EXCURSION_MARGIN, excursions, feature_stats, frechet_distance
from ptqd_export.files import write_file
from ptqd_export.pictures import encode_png, image_grid, to_uint8
from ptqd_export.progress import progress
from ptqd_export.recipe import Recipe

HERE = Path(__file__).parent
GRID_ROWS = 8
BEGIN, END = "<!-- figures: begin, written by sample_grid.py --card -->", "<!-- figures: end -->"


def draw(recipe: Recipe, n: int, batch_size: int, seed: int) -> np.ndarray:
    """Samples 0 to n - 1 of `seed`, float64 (n, 1, 32, 32), not clamped."""
    network = open_model(recipe)
    sampling = Sampling.of(network.info, network.scheduler_config, **asdict(recipe.sampler))
    conditions = network.info.conditions(None, n)
    parts = []
    with TorchEngine(network.module, sampling) as engine, progress(n, "samples", "sample") as bar:
        for start in range(0, n, batch_size):
            batch = range(start, min(n, start + batch_size))
            feeds = {name: value[batch.start : batch.stop] for name, value in conditions.items()}
            parts.append(sampling.sample(lambda _: engine, feeds, batch, seed=seed))
            bar.update(len(batch))
    return np.concatenate(parts)


def judge(x: np.ndarray, data: Path, seed: int) -> dict[str, float]:
    """Figures of samples (N, 1, 32, 32), sample i of class i modulo 10, as the PNGs they become."""
    extract, reference = load_features(HERE), load_reference(HERE)

    def distance(pixels: np.ndarray) -> tuple[float, np.ndarray]:
        features = extract(pixels.astype(np.float32) / 127.5 - 1)
        return frechet_distance(*feature_stats(features), *reference), features

    found, features = distance(to_uint8(x))
    # What a perfect model would get with so few samples: as many training images, of the same classes in the
    # same order.
    images, labels = load(data)
    rng = np.random.default_rng(seed)
    of_class = [rng.permutation(np.flatnonzero(labels == c)) for c in range(len(CLASSES))]
    real, _ = distance(
        images[[of_class[i % len(CLASSES)][i // len(CLASSES)] for i in range(len(x))]][:, None]
    )
    away = excursions(x)
    return {
        "frechet_distance": round(found, 3),
        "frechet_distance_of_training_images": round(real, 3),
        "class_agreement": round(
            float((extract.classes(features) == np.arange(len(x)) % len(CLASSES)).mean()), 4
        ),
        "excursions": away.count,
        "largest_value": round(away.largest, 3),
    }


def card(folder: Path) -> str:
    """The figures section of the model card, from the .json files that exist in `folder`; those missing are
    named on stderr."""

    def read(name: str) -> dict | None:
        file = folder / name
        if not file.is_file():
            print(f"{file} does not exist: its figures are left out of the card", file=sys.stderr)
            return None
        return json.loads(file.read_text("utf-8"))

    rows: list[tuple[str, str]] = []
    if unet := read("unet/config.json"):
        channels, down = unet["block_out_channels"], unet["down_block_types"]
        sizes = [unet["sample_size"] >> i for i, kind in enumerate(down) if "Attn" in kind]
        rows += [
            ("Channels by level", ", ".join(map(str, channels))),
            (
                "Residual blocks per level",
                f"{unet['layers_per_block']} down, {unet['layers_per_block'] + 1} up",
            ),
            (
                "Self-attention at",
                ", ".join(f"{s}x{s}" for s in sizes)
                + f" and in the middle block, {unet['attention_head_dim']} channels per head",
            ),
            ("Class embeddings", f"{unet['num_class_embeds']}, the last one the null class"),
        ]
    if training := read("training.json"):
        losses = training["loss_per_100_steps"]
        tail = losses[-10:]
        rows += [
            ("Parameters", f"{training['parameters']:,}"),
            (
                "Optimizer steps",
                f"{training['steps']:,} of batch {training['batch_size']} ({training['epochs']} epochs)",
            ),
            (
                "Training time",
                f"{training['minutes']} minutes on {training['device']}, threads: {training['threads']}",
            ),
            (
                "Loss, mean of the last 1,000 steps",
                f"{sum(tail) / len(tail):.4f} (first 100 steps: {losses[0]:.4f})",
            ),
            (
                "Learning rate, EMA decay, seed",
                f"{training['lr']:g}, {training['ema']:g}, {training['seed']}",
            ),
        ]
    if sampling := read("sampling.json"):
        n = sampling["num_samples"]
        rows += [
            (
                "Sampler",
                f"{sampling['solver']}, {sampling['n_steps']} steps, eta {sampling['eta']:g}, guidance "
                f"{sampling['guidance_scale']:g}",
            ),
            (f"Frechet distance of {n:,} samples to the test images", f"{sampling['frechet_distance']:.3f}"),
            (f"The same of {n:,} training images", f"{sampling['frechet_distance_of_training_images']:.3f}"),
            (
                "Samples that the classifier puts into the class asked for",
                f"{sampling['class_agreement']:.1%}",
            ),
            (
                f"Samples with a value beyond {1 + EXCURSION_MARGIN:g} before clamping",
                f"{sampling['excursions']} (largest absolute value {sampling['largest_value']:g})",
            ),
        ]
    if classifier := read("classifier.json"):
        rows += [
            (
                "Classifier: test accuracy",
                f"{classifier['test_accuracy']:.2%} (training images: {classifier['train_accuracy']:.2%})",
            ),
            (
                "Classifier: parameters, epochs, time",
                f"{classifier['parameters']:,}, {classifier['epochs']}, {classifier['seconds']:.0f} s, "
                f"threads: {classifier['threads']}",
            ),
        ]
    return "\n".join(["| | |", "|---|---|", *(f"| {name} | {value} |" for name, value in rows)])


def write_card(folder: Path) -> None:
    """Replace the figures section of README.md.

    Raises:
        SystemExit: the markers are not there.
    """
    readme = folder / "README.md"
    text = readme.read_text("utf-8")
    if text.count(BEGIN) != 1 or text.count(END) != 1:
        raise SystemExit(
            f"{readme} must hold the lines {BEGIN!r} and {END!r} once each: put them where the figures belong"
        )
    before, _, rest = text.partition(BEGIN)
    _, _, after = rest.partition(END)
    write_file(readme, f"{before}{BEGIN}\n{card(folder)}\n{END}{after}".encode())


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", type=Path, default=HERE, help="folder with unet/ and scheduler/")
    parser.add_argument("--data", type=Path, default=DEBIAN_PATH, help="folder of the IDX files")
    parser.add_argument("--out", type=Path, default=HERE, help="folder for samples.png and sampling.json")
    parser.add_argument("--num-samples", type=int, default=500)
    parser.add_argument("--batch-size", type=int, default=50)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--threads", type=int, default=None, help="torch threads; all cores if not given")
    parser.add_argument(
        "--card", action="store_true", help="sample nothing: write the figures section of README.md"
    )
    args = parser.parse_args()
    if args.card:
        write_card(args.out)
        return
    if args.num_samples < GRID_ROWS * len(CLASSES):
        raise SystemExit(f"--num-samples {args.num_samples}: the grid alone needs {GRID_ROWS * len(CLASSES)}")
    if args.threads:
        torch.set_num_threads(args.threads)

    recipe = Recipe.load(HERE / "recipe.toml").override(model={"source": str(args.model.resolve())})
    s = recipe.sampler
    began = time.monotonic()
    x = draw(recipe, args.num_samples, args.batch_size, args.seed)
    figures = {
        "num_samples": args.num_samples,
        "solver": s.solver,
        "n_steps": s.n_steps,
        "eta": s.eta,
        "guidance_scale": s.guidance_scale,
        "seed": args.seed,
        **judge(x, args.data, args.seed),
        "seconds": round(time.monotonic() - began, 1),
    }
    args.out.mkdir(parents=True, exist_ok=True)
    grid = image_grid(x[: GRID_ROWS * len(CLASSES)], columns=len(CLASSES))
    write_file(args.out / "samples.png", encode_png(grid))
    write_file(args.out / "sampling.json", (json.dumps(figures, indent=1) + "\n").encode())
    print(json.dumps(figures))


if __name__ == "__main__":
    main()
