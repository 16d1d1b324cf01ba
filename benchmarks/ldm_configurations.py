"""Full-size latent diffusion models by CompVis' definition against their import, with random weights.

Each configuration's checkpoint is written as CompVis writes it, read as a user's would be, and both are
computed in float32 on the same numbers.

python benchmarks/ldm_configurations.py [--only NAME] [--write]

The largest, Stable Diffusion 1, takes 8 GB of memory and 4 GB of disk.
"""

from __future__ import annotations

import argparse
import gc
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
from report import ROOT, Kept, machine, table, write_section

from ptqd_export.calibrate import open_source, set_threads
from ptqd_export.recipe import Recipe

sys.path.insert(0, str(ROOT / "tests" / "support"))
from ldm_models import CONFIGURATIONS, original, write

HEADER = (
    "configuration",
    "UNet",
    "first stage",
    "UNet, relative error",
    "decoder",
    "file",
    "seconds to open",
)
FIRST_STAGE_SIZE = 16
"""Height and width of the latents that are decoded."""


def distance(found: torch.Tensor, expected: torch.Tensor) -> float:
    """Relative L2 distance."""
    return float((found - expected).norm() / expected.norm())


def parameters(module: torch.nn.Module) -> float:
    """Millions of parameters."""
    return sum(p.numel() for p in module.parameters()) / 1e6


def measure(name: str, folder: Path) -> dict[str, Any]:
    """Write, read and compare one configuration."""
    config = CONFIGURATIONS[name]
    model = original(config)
    write(folder, config, model.state)
    params = config["model"]["params"]
    unet, size = params["unet_config"]["params"], params["image_size"]
    torch.manual_seed(1)
    x, t = torch.randn(1, unet["in_channels"], size, size), torch.tensor([801])
    z = torch.randn(1, unet["in_channels"], FIRST_STAGE_SIZE, FIRST_STAGE_SIZE)
    label, text = torch.tensor([7]), torch.randn(1, 77, unet.get("context_dim", 1))
    scale = float(model.state.get("scale_factor", params.get("scale_factor", 1.0)))
    inputs: dict[str, torch.Tensor] = {}
    context = None
    if model.table is not None:
        context, inputs["class_labels"] = model.table(label)[:, None], label
    elif "context_dim" in unet:
        context = inputs["encoder_hidden_states"] = text
    with torch.inference_mode():
        expected, decoded = model.unet(x, t, context), model.first_stage.decode(z / scale)
    sizes = parameters(model.unet), parameters(model.first_stage)
    del model
    gc.collect()
    started = time.monotonic()
    recipe = Recipe.from_dict({"model": {"checkpoint": "model.ckpt", "ldm_config": "config.yaml"}}, folder)
    source = open_source(recipe)
    seconds = time.monotonic() - started
    assert source.read_first_stage is not None
    first: Any = source.read_first_stage()
    with torch.inference_mode():
        pictures = first.decode(z / source.scaling_factor + source.shift_factor).sample
        errors = distance(source.network.module(x, t, **inputs), expected), distance(pictures, decoded)
    row = [
        name,
        f"{sizes[0]:.1f} M",
        f"{sizes[1]:.1f} M",
        f"{errors[0]:.1e}",
        f"{errors[1]:.1e}",
        f"{(folder / 'model.ckpt').stat().st_size / 1e9:.2f} GB",
        f"{seconds:.0f}",
    ]
    return {"row": row, "machine": machine("torch", "diffusers")}


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--only", choices=CONFIGURATIONS, help="measure this one, keep other figures")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--write", action="store_true", help="put the table into docs/models.md")
    options = parser.parse_args()
    set_threads(options.threads)
    kept = Kept("ldm-configurations")
    for name in [options.only] if options.only else CONFIGURATIONS:
        with tempfile.TemporaryDirectory() as folder:
            kept.keep(name, measure(name, Path(folder)))
        print(" ".join(kept[name]["row"]))
    rows = [kept[name]["row"] for name in CONFIGURATIONS if name in kept]
    text = f"{table(HEADER, rows)}\n\n{kept.machines()}; {options.threads} thread. Random weights, float32."
    print(text)
    if options.write:
        write_section("ldm-configurations", text)


if __name__ == "__main__":
    main()
