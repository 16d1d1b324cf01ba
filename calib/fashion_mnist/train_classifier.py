"""Train the classifier behind the Frechet distance, on the CPU in a few minutes.

    python calib/fashion_mnist/train_classifier.py

Writes, beside this script, `classifier.safetensors` (weights), `reference_stats.safetensors` (mean and
covariance of the penultimate features over the 10,000 test images) and `classifier.json` (figures). The last
epoch is what is kept: the test images choose nothing. Same seed, thread count and torch version: same
weights.
"""

from __future__ import annotations

import argparse
import json
import time
from pathlib import Path

import numpy as np
import torch
from classifier import REFERENCE, WEIGHTS, Classifier, Features
from data import DEBIAN_PATH, load
from safetensors.numpy import save_file as save_arrays
from safetensors.torch import save_file as save_tensors
from tqdm import tqdm

HERE = Path(__file__).parent


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--data", type=Path, default=DEBIAN_PATH, help="folder of the IDX files")
    parser.add_argument("--out", type=Path, default=HERE)
    parser.add_argument("--epochs", type=int, default=6)
    parser.add_argument("--batch-size", type=int, default=128)
    parser.add_argument("--lr", type=float, default=4e-3, help="peak of the one-cycle schedule")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--threads", type=int, default=1)
    args = parser.parse_args()

    torch.set_num_threads(args.threads)
    torch.manual_seed(args.seed)
    images, labels = load(args.data)
    x_all = (torch.from_numpy(images).float() / 127.5 - 1)[:, None]
    y_all = torch.from_numpy(labels)
    model = Classifier().to(memory_format=torch.channels_last)
    steps = args.epochs * (len(x_all) // args.batch_size)
    optimizer = torch.optim.AdamW(model.parameters(), lr=args.lr, weight_decay=0.05)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, args.lr, total_steps=steps, pct_start=0.2)
    generator = torch.Generator().manual_seed(args.seed)
    began = time.monotonic()
    with tqdm(total=steps, desc="classifier", unit="step", disable=None) as bar:
        for _ in range(args.epochs):
            order = torch.randperm(len(x_all), generator=generator)
            for index in order[: steps // args.epochs * args.batch_size].split(args.batch_size):
                x, y = x_all[index], y_all[index]
                # No flips, no label smoothing: features that ignore mirroring, or collapse to one point per
                # class, would judge samples less.
                x = x.contiguous(memory_format=torch.channels_last)
                with torch.autocast("cpu", torch.bfloat16):
                    loss = torch.nn.functional.cross_entropy(model(x).float(), y)
                optimizer.zero_grad(set_to_none=True)
                loss.backward()
                optimizer.step()
                schedule.step()
                bar.set_postfix(loss=f"{loss.item():.3f}", refresh=False)
                bar.update()
    seconds = time.monotonic() - began

    model = model.to(memory_format=torch.contiguous_format)
    extract = Features(model)

    def evaluate(split: str) -> tuple[np.ndarray, float]:
        pixels, truth = load(args.data, split)
        found = extract((pixels.astype(np.float32) / 127.5 - 1)[:, None])
        return found, float((extract.classes(found) == truth).mean())

    features, accuracy = evaluate("t10k")
    _, train_accuracy = evaluate("train")
    save_tensors(model.state_dict(), args.out / WEIGHTS)
    save_arrays(
        {"mean": features.mean(0), "covariance": np.cov(features, rowvar=False)}, args.out / REFERENCE
    )
    figures = {
        "test_accuracy": round(accuracy, 4),
        "train_accuracy": round(train_accuracy, 4),
        "epochs": args.epochs,
        "steps": steps,
        "batch_size": args.batch_size,
        "lr": args.lr,
        "parameters": sum(p.numel() for p in model.parameters()),
        "seconds": round(seconds, 1),
        "threads": args.threads,
        "seed": args.seed,
        "torch": torch.__version__,
    }
    (args.out / "classifier.json").write_text(json.dumps(figures, indent=1) + "\n")
    print(json.dumps(figures))


if __name__ == "__main__":
    main()
