"""A bundle's pictures in other people's pipelines: diffusers, optimum-onnx, and optimum-intel with OpenVINO.

    python benchmarks/stock_pipelines.py BUNDLE [--model FOLDER] [--optimum PYTHON] [--openvino PYTHON]

Diffusers draws with the model itself, the folder that the bundle was built from. The others are tried in
environments of their own, whose interpreters are given: neither goes with the diffusers that builds bundles.
A pipeline starts from the noise that `ptqd-export run` starts from. Nothing else is shared: it has its own
tokenizer, guidance and scheduler. `--write` puts the table into docs/models.md.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import tempfile
from importlib.metadata import version
from pathlib import Path

import numpy as np
from report import Kept, table, write_section

from ptqd_export import Bundle, run
from ptqd_export.assemble.stock_folder import write_stock
from ptqd_export.core.backend import ORT_CPU, Emission
from ptqd_export.core.plan import Plan
from ptqd_export.core.precision import FP32, Precision
from ptqd_export.core.sampling import NoiseSource

HEADER = ("pipeline", "network", "PSNR to `ptqd-export run`, dB", "largest difference, of 255", "versions")
PROMPTS = ("a photo of a cat", "a photo of a dog")
OPEN = {
    "optimum": "from optimum.onnxruntime import ORTStableDiffusionPipeline as Stock\n"
    "pipe = Stock.from_pretrained(folder)\n",
    "openvino": "from optimum.intel import OVStableDiffusionPipeline as Stock\n"
    "pipe = Stock.from_pretrained(folder, from_onnx=True, ov_config={'INFERENCE_PRECISION_HINT': 'f32'})\n",
}
TITLES = {"optimum": "ORTStableDiffusionPipeline", "openvino": "OVStableDiffusionPipeline"}
PACKAGES = {
    "optimum": ("optimum-onnx", "diffusers", "transformers", "onnxruntime"),
    "openvino": ("optimum-intel", "diffusers", "transformers", "openvino"),
}
CHILD = """
import json, sys
from importlib.metadata import version
import numpy as np, torch
folder, noise, out, call, prompts, packages = json.loads(sys.argv[1])
{open}
latents = torch.from_numpy(np.load(noise))
pictures = pipe(prompt=prompts, latents=latents, output_type="np", **call).images
np.save(out, np.asarray(pictures))
print(json.dumps([f"{{name}} {{version(name)}}" for name in packages]))
"""
EMISSIONS = {"optimum": Emission.ORT_CPU, "openvino": Emission.PORTABLE}


def compare(bundle: Bundle, kind: str, python: Path, precision: Precision, folder: Path) -> list[str]:
    """A row of the table."""
    m = bundle.manifest
    stock = write_stock(bundle, folder / "pipeline", precision, EMISSIONS[kind])
    plan = Plan((precision,) * len(m.sampling))
    ours = run(bundle, len(PROMPTS), seed=0, prompts=PROMPTS, plan=plan, backend=ORT_CPU)
    noise = NoiseSource(0, range(len(PROMPTS)), m.sampling.model.sample_shape).draw()
    np.save(folder / "noise.npy", noise.astype(np.float32))
    request = [
        *(str(folder / name) for name in ("pipeline", "noise.npy", "theirs.npy")),
        dict(stock.call),
        PROMPTS,
        PACKAGES[kind],
    ]
    code = CHILD.format(open=OPEN[kind])
    done = subprocess.run([python, "-c", code, json.dumps(request)], capture_output=True, text=True)
    if done.returncode:
        raise SystemExit(f"{python} failed:\n{done.stderr[-2000:]}")
    versions = json.loads(done.stdout.splitlines()[-1])
    theirs = np.load(folder / "theirs.npy").transpose(0, 3, 1, 2)
    return _row(f"`{TITLES[kind]}`", f"{precision}, {EMISSIONS[kind]}", ours, theirs, versions)


def compare_model(bundle: Bundle, model: Path) -> list[str]:
    """The row of diffusers' own pipeline and the model itself, against full precision."""
    import torch
    from diffusers import StableDiffusionPipeline

    sampling = bundle.manifest.sampling
    plan = Plan((FP32,) * len(sampling))
    ours = run(bundle, len(PROMPTS), seed=0, prompts=PROMPTS, plan=plan, backend=ORT_CPU)
    noise = NoiseSource(0, range(len(PROMPTS)), sampling.model.sample_shape).draw()
    pipeline = StableDiffusionPipeline.from_pretrained(model, safety_checker=None, torch_dtype=torch.float32)
    pictures = pipeline(
        prompt=list(PROMPTS),
        latents=torch.from_numpy(noise.astype(np.float32)),
        num_inference_steps=len(sampling),
        guidance_scale=sampling.guidance_scale,
        output_type="np",
    ).images
    versions = [f"{name} {version(name)}" for name in ("diffusers", "transformers", "torch")]
    theirs = np.asarray(pictures).transpose(0, 3, 1, 2)
    return _row("`StableDiffusionPipeline`", "the model itself, fp32", ours, theirs, versions)


def _row(title: str, network: str, ours: np.ndarray, theirs: np.ndarray, versions: list[str]) -> list[str]:
    off = np.clip(ours / 2 + 0.5, 0, 1) - theirs
    psnr = -10 * np.log10(np.mean(off**2))
    return [title, network, f"{psnr:.1f}", f"{255 * np.abs(off).max():.2f}", ", ".join(versions)]


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("bundle", type=Path)
    parser.add_argument("--model", type=Path, help="what the bundle was built from")
    parser.add_argument("--optimum", type=Path, help="interpreter of an environment with optimum-onnx")
    parser.add_argument("--openvino", type=Path, help="interpreter of one with optimum-intel and openvino")
    parser.add_argument("--write", action="store_true", help="put the table into docs/models.md")
    options = parser.parse_args()
    bundle = Bundle.open(options.bundle)
    kept = Kept("stock-pipelines")
    if options.model is not None:
        kept.keep("diffusers", [compare_model(bundle, options.model)])
        print(" ".join(kept["diffusers"][0]), flush=True)
    for kind in OPEN:
        python = getattr(options, kind)
        if python is None:
            continue
        rows = []
        for precision in dict.fromkeys(graph.precision for graph in bundle.manifest.graphs):
            with tempfile.TemporaryDirectory() as folder:
                rows.append(compare(bundle, kind, python, precision, Path(folder)))
            print(" ".join(rows[-1]), flush=True)
        kept.keep(kind, rows)
    m = bundle.manifest
    text = (
        f"{table(HEADER, [row for kind in ('diffusers', *OPEN) for row in kept.get(kind, [])])}\n\n"
        f"{m.sampling.model.name}, {m.sampling.summary}; {len(PROMPTS)} prompts."
    )
    print(text)
    if options.write:
        write_section("stock-pipelines", text)


if __name__ == "__main__":
    main()
