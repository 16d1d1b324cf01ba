"""Time of one network evaluation: a bundle's engines beside what else a user could run. Interleaved medians.

    python benchmarks/step_time.py [--bundle engines/fashion_mnist] [--model calib/fashion_mnist] [--write]

Baselines, all from the same export: ONNX Runtime fp32 of the unrewritten export; fp32 with our rewrites; onnxruntime's own
`quantize_static` with its defaults (QDQ, all operators); PyTorch eager fp32. --write puts the table into the README.
"""

from __future__ import annotations

import argparse
import json
import logging
import subprocess
import sys
import tempfile
from pathlib import Path

import numpy as np
from report import ROOT, machine, table, write_section

BASELINE = "ORT fp32, as exported"


def export_baselines(model: Path, folder: Path) -> None:
    """`exported.onnx`, and `static.onnx` from quantize_static with its defaults on noise at all timesteps."""
    import onnxruntime.quantization as ortq

    from ptqd_export.calibrate import open_model
    from ptqd_export.export import export_fp, save
    from ptqd_export.recipe import Recipe

    network = open_model(Recipe.load(model))
    save({"exported": export_fp(network.module, network.info)}, folder)
    rng = np.random.default_rng(0)

    class Reader(ortq.CalibrationDataReader):  # type: ignore[misc]
        def __init__(self) -> None:
            self.timesteps = iter(range(0, 1000, 100))

        def get_next(self) -> dict[str, np.ndarray] | None:
            t = next(self.timesteps, None)
            if t is None:
                return None
            x = rng.standard_normal((4, *network.info.sample_shape)).astype(np.float32)
            return {"sample": x, "timestep": np.full(4, t), **network.info.conditions(None, 4)}

    logging.disable(logging.WARNING)
    ortq.quantize_static(folder / "exported.onnx", folder / "static.onnx", Reader())


def measure(bundle_path: Path, model: Path, folder: Path, batches: list[int], threads: int, repeats: int) -> dict[int, dict[str, float]]:
    """Seconds per evaluation by batch and engine."""
    import torch

    from ptqd_export.backends import OrtEngine, set_threads
    from ptqd_export.bundle import Bundle
    from ptqd_export.calibrate import TorchEngine, open_model
    from ptqd_export.recipe import Recipe
    from ptqd_export.timing import time_engines

    set_threads(threads)
    torch.set_num_threads(threads)
    bundle = Bundle.open(bundle_path)
    m = bundle.manifest
    engines: dict[str, object] = {
        BASELINE: OrtEngine(folder / "exported.onnx"),
        "onnxruntime quantize_static, defaults": OrtEngine(folder / "static.onnx"),
    }
    eager = {"PyTorch eager fp32": TorchEngine(open_model(Recipe.load(model)), m.schedule)}
    for precision in m.bops:
        name = "ORT fp32, rewritten" if precision.is_float else f"{precision}"
        engines[name] = OrtEngine(bundle.file(m.artifact(precision, "ort-cpu").file))
    found, feeds_of = {}, {}
    for n in batches:
        feeds = {
            "sample": np.random.default_rng(n).standard_normal((n, *m.model.sample_shape)).astype(np.float32),
            "timestep": np.full(n, m.schedule.timesteps[len(m.schedule) // 2]),
            "step": np.array([len(m.schedule) // 2]),
            **m.model.conditions(None, n),
        }
        feeds_of[n] = feeds
        found[n] = time_engines(engines, feeds, repeats=repeats)  # type: ignore[arg-type]
    # Last and apart: torch's OpenMP threads spin after a call and would take the cores from whatever is timed next.
    for n, feeds in feeds_of.items():
        found[n] |= time_engines(eager, feeds, repeats=repeats)
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--bundle", type=Path, default=ROOT / "engines/fashion_mnist")
    parser.add_argument("--model", type=Path, default=ROOT / "calib/fashion_mnist")
    parser.add_argument("--batch", type=int, nargs="+", default=[1, 4, 16])
    parser.add_argument("--threads", type=int, nargs="+", default=[1, 2])
    parser.add_argument("--repeats", type=int, default=30)
    parser.add_argument("--write", action="store_true", help="put the table into README.md")
    parser.add_argument("--worker", type=Path, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.worker:
        print(json.dumps(measure(args.bundle, args.model, args.worker, args.batch, args.threads[0], args.repeats)))
        return
    with tempfile.TemporaryDirectory() as tmp:
        export_baselines(args.model, Path(tmp))
        columns = {}
        for threads in args.threads:  # a process each: ONNX Runtime's pool is set once
            command = [sys.executable, __file__, "--worker", tmp, "--bundle", str(args.bundle), "--model", str(args.model), "--threads", str(threads)]
            command += ["--repeats", str(args.repeats), "--batch", *map(str, args.batch)]
            out = subprocess.run(command, capture_output=True, text=True, check=True).stdout
            for batch, times in json.loads(out.strip().splitlines()[-1]).items():
                columns[int(batch), threads] = times
    names = list(next(iter(columns.values())))
    header = ["ms per evaluation (times faster than the first row)", *(f"batch {b}, {t} thread{'s' * (t > 1)}" for b, t in columns)]
    rows = [[name, *(f"{c[name] * 1e3:.1f} ({c[BASELINE] / c[name]:.2f}x)" for c in columns.values())] for name in names]
    text = f"{table(header, rows)}\n\n{machine()}; medians of {args.repeats} interleaved calls."
    print(text)
    if args.write:
        write_section("step-time", text)


if __name__ == "__main__":
    main()
