"""Draw with the trained pipeline, judge what it draws, and write the figures into the model card.

    python calib/cifar10_text/evaluate.py --data cifar10.npz  # samples.png, and the figures in training.json
    python calib/cifar10_text/evaluate.py --card              # then: the figures of all .json files into
                                                              README.md

Sample i has class i modulo 10 and the prompt "a photo of a ..."; the grid has a row per class.
"""

from __future__ import annotations

import argparse
import json
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
from captions import PLAIN, caption
from classifier import Features, load_features
from data import CLASSES, load
from diffusers import DDIMScheduler, StableDiffusionPipeline

from ptqd_export.evaluate.metrics import feature_stats, frechet_distance
from ptqd_export.pictures import encode_png, image_grid

HERE = Path(__file__).parent
GUIDANCE = (1.0, 3.0, 7.5)
STEPS = (20, 50)
GRID_COLUMNS, GRID_GUIDANCE, GRID_STEPS = 12, 3.0, 50
BEGIN, END = "<!-- figures: begin, written by evaluate.py --card -->", "<!-- figures: end -->"


def open_pipeline(folder: Path) -> StableDiffusionPipeline:
    """The pipeline of `folder`, in float32, on the CPU."""
    pipeline = StableDiffusionPipeline.from_pretrained(
        folder, safety_checker=None, torch_dtype=torch.float32, local_files_only=True
    )
    assert isinstance(pipeline.scheduler, DDIMScheduler)
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def draw(
    pipeline: StableDiffusionPipeline, n: int, steps: int, guidance: float, seed: int, batch_size: int = 100
) -> np.ndarray:
    """Pixels uint8 (n, 3, 32, 32); sample i depends on `seed` and on i, not on n."""
    parts = []
    for start in range(0, n, batch_size):
        batch = range(start, min(n, start + batch_size))
        noise = [
            torch.randn(1, 4, 8, 8, generator=torch.Generator().manual_seed((seed << 32) + i)) for i in batch
        ]
        images = pipeline(
            [caption(i % len(CLASSES), PLAIN) for i in batch],
            latents=torch.cat(noise),
            num_inference_steps=steps,
            guidance_scale=guidance,
            output_type="np",
        ).images
        parts.append(np.rint(images * 255).astype(np.uint8).transpose(0, 3, 1, 2))
    return np.concatenate(parts)


def kernel_distance(a: np.ndarray, b: np.ndarray) -> float:
    """Unbiased squared maximum mean discrepancy of features (N, D) and (M, D) under the cubic kernel
    (x y / D + 1)^3, as in KID (Binkowski et al. 2018)."""

    def kernel(x: np.ndarray, y: np.ndarray) -> np.ndarray:
        return np.asarray((x @ y.T / x.shape[1] + 1) ** 3)

    def within(x: np.ndarray) -> float:
        k = kernel(x, x)
        return float((k.sum() - np.trace(k)) / (len(x) * (len(x) - 1)))

    return within(a) + within(b) - 2 * float(kernel(a, b).mean())


def judge(pixels: np.ndarray, extract: Features, test: np.ndarray) -> dict[str, float]:
    """Figures of pictures uint8 (N, 3, 32, 32), picture i of class i modulo 10; `test` are the features of
    the test images."""
    features = extract(pixels)
    agreement = extract.classes(features) == np.arange(len(pixels)) % len(CLASSES)
    return {
        "class_agreement": round(float(agreement.mean()), 4),
        "frechet_distance": round(frechet_distance(*feature_stats(features), *feature_stats(test)), 3),
        "kernel_distance": round(kernel_distance(features, test), 4),
    }


def evaluate(
    pipeline: StableDiffusionPipeline, folder: Path, data: Path, n: int, seed: int
) -> dict[str, Any]:
    """Figures of n samples at every guidance scale and number of steps, and of n training images."""
    extract = load_features(folder)
    test = extract(load(data, test=True)[0])
    images, labels = load(data)
    rng = np.random.default_rng(seed)
    of_class = [rng.permutation(np.flatnonzero(labels == c)) for c in range(len(CLASSES))]
    real = images[[of_class[i % len(CLASSES)][i // len(CLASSES)] for i in range(n)]]
    rows = []
    for steps in STEPS:
        for guidance in GUIDANCE:
            began = time.monotonic()
            pixels = draw(pipeline, n, steps, guidance, seed)
            row = {"steps": steps, "guidance": guidance, **judge(pixels, extract, test)}
            print(json.dumps({**row, "seconds": round(time.monotonic() - began, 1)}), flush=True)
            rows.append(row)
    return {
        "num_samples": n,
        "seed": seed,
        "samples": rows,
        "training_images": judge(real, extract, test),
    }


def card(folder: Path) -> str:
    """The figures section of the model card, from the .json files in `folder`."""

    def read(name: str) -> Any:
        return json.loads((folder / name).read_text("utf-8"))

    training, autoencoder, classifier = map(read, ("training.json", "autoencoder.json", "classifier.json"))
    unet, found = read("unet/config.json"), training["evaluation"]
    losses, counts = training["loss_per_100_steps"], training["parameters"]

    def effort(of: dict[str, Any]) -> str:
        machine = f"threads: {of['threads']}" if of["device"] == "cpu" else of["device"]
        return (
            f"{of['steps']:,} of batch {of['batch_size']} ({of['epochs']:g} epochs), "
            f"{of['minutes']:g} minutes, {machine}"
        )

    rows = [
        ("UNet: channels by level", ", ".join(map(str, unet["block_out_channels"]))),
        ("UNet, text encoder: parameters", f"{counts['unet']:,}, {counts['text_encoder']:,}"),
        ("UNet, text encoder: optimizer steps", effort(training)),
        ("Their loss, last 1,000 steps (first 100)", f"{np.mean(losses[-10:]):.4f} ({losses[0]:.4f})"),
        ("Learning rate, EMA decay, seed", f"{training['lr']:g}, {training['ema']:g}, {training['seed']}"),
        ("Autoencoder: parameters", f"{autoencoder['parameters']['autoencoder']:,}"),
        ("Autoencoder: optimizer steps", effort(autoencoder)),
        ("Autoencoder: PSNR of the test images", f"{autoencoder['test_psnr']:.2f} dB"),
        ("Classifier: parameters", f"{classifier['parameters']['classifier']:,}"),
        ("Classifier: optimizer steps", effort(classifier)),
        (
            "Classifier: test accuracy",
            f"{classifier['test_accuracy']:.2%} (training images: {classifier['train_accuracy']:.2%})",
        ),
    ]
    samples = [(f"guidance {row['guidance']:g}, {row['steps']} DDIM steps", row) for row in found["samples"]]
    samples.append(("as many training images", found["training_images"]))
    return "\n".join(
        [
            "| | |",
            "| --- | --- |",
            *(f"| {name} | {value} |" for name, value in rows),
            "",
            f"| {found['num_samples']} samples | class agreement | Frechet distance | kernel distance |",
            "| --- | --- | --- | --- |",
            *(
                f"| {name} | {row['class_agreement']:.1%} | {row['frechet_distance']:.2f} | "
                f"{row['kernel_distance']:.3f} |"
                for name, row in samples
            ),
        ]
    )


def write_card(folder: Path) -> None:
    """Replace the figures section of README.md.

    Raises:
        SystemExit: the markers are not there.
    """
    readme = folder / "README.md"
    text = readme.read_text("utf-8")
    if text.count(BEGIN) != 1 or text.count(END) != 1:
        raise SystemExit(f"{readme} must hold the lines {BEGIN!r} and {END!r} once each")
    before, _, rest = text.partition(BEGIN)
    _, _, after = rest.partition(END)
    readme.write_text(f"{before}{BEGIN}\n{card(folder)}\n{END}{after}", "utf-8")


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--data", type=Path, help="the .npz file of CIFAR-10")
    parser.add_argument(
        "--out", type=Path, default=HERE, help="folder of the trained models, and for figures"
    )
    parser.add_argument("--num-samples", type=int, default=500)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--grid", action="store_true", help="draw samples.png alone")
    parser.add_argument("--card", action="store_true", help="draw nothing: write the figures of README.md")
    args = parser.parse_args()
    if args.card:
        write_card(args.out)
        return
    torch.set_num_threads(args.threads)
    pipeline = open_pipeline(args.out)
    pixels = draw(pipeline, GRID_COLUMNS * len(CLASSES), GRID_STEPS, GRID_GUIDANCE, args.seed)
    by_class = pixels.reshape(GRID_COLUMNS, len(CLASSES), 3, 32, 32).swapaxes(0, 1).reshape(pixels.shape)
    grid = image_grid(by_class / 127.5 - 1, columns=GRID_COLUMNS)
    (args.out / "samples.png").write_bytes(encode_png(grid))
    if args.grid:
        return
    if args.data is None:
        parser.error("--data is needed to judge the samples")
    training = json.loads((args.out / "training.json").read_text("utf-8"))
    training["evaluation"] = evaluate(pipeline, args.out, args.data, args.num_samples, args.seed)
    (args.out / "training.json").write_text(json.dumps(training, indent=1) + "\n", "utf-8")


if __name__ == "__main__":
    main()
