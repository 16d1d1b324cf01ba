"""Train the classifier behind class agreement and the feature distances, on the CPU in some minutes.

    python calib/cifar10_text/train_classifier.py --data cifar10.npz --minutes 11

Writes `classifier.safetensors` (weights, float16), `reference_stats.safetensors` (mean and covariance of the
penultimate features over the 10,000 test images) and `classifier.json` (figures). What the last step left is
kept: the test images choose nothing.
"""

from __future__ import annotations

import json

import numpy as np
import torch
from classifier import FEATURES, REFERENCE, WEIGHTS, Classifier, load_features
from data import load
from loop import Loop, autocast, parse
from safetensors.numpy import save_file as save_arrays
from safetensors.torch import save_file as save_tensors


def main() -> None:
    args = parse(__doc__, steps=4000, batch_size=128, lr=4e-3)
    images, labels = load(args.data)
    pixels, truth = torch.from_numpy(images).to(args.device), torch.from_numpy(labels).to(args.device)
    model = Classifier().to(args.device, memory_format=torch.channels_last)
    loop = Loop("classifier", args, {"classifier": model}, len(pixels))
    classify = autocast(model, args.device, loop.pictures(pixels, loop.batch()))
    for _ in loop:
        index = loop.batch()
        logits = classify(loop.pictures(pixels, index))
        loop.descend(torch.nn.functional.cross_entropy(logits.float(), truth[index]))

    half = {
        key: value.half() if value.is_floating_point() else value for key, value in model.state_dict().items()
    }
    save_tensors({key: value.cpu().contiguous() for key, value in half.items()}, args.out / WEIGHTS)
    extract = load_features(args.out)  # judged as it will be used: from float16
    test_images, test_labels = load(args.data, test=True)
    features = extract(test_images)
    save_arrays(
        {"mean": features.mean(0), "covariance": np.cov(features, rowvar=False)}, args.out / REFERENCE
    )
    figures = {
        "test_accuracy": round(float((extract.classes(features) == test_labels).mean()), 4),
        "train_accuracy": round(float((extract.classes(extract(images)) == labels).mean()), 4),
        "features": FEATURES,
        **loop.figures(),
    }
    (args.out / "classifier.json").write_text(json.dumps(figures, indent=1) + "\n")
    print(json.dumps({key: figures[key] for key in ("test_accuracy", "train_accuracy", "minutes")}))


if __name__ == "__main__":
    main()
