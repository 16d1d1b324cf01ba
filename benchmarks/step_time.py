"""Time of one network evaluation: a bundle's engines beside what else a user could run. Interleaved medians.

    python benchmarks/step_time.py [BUNDLE] [--model calib/fashion_mnist] [--write]

Baselines, all from the same export: ONNX Runtime fp32 of the export as it is; fp32 with this package's
rewrites; onnxruntime's own `quantize_static` with its defaults (QDQ, all operators); PyTorch eager fp32. To
see whether it works: `--batch 1 --threads 1 --repeats 2`.
"""

from __future__ import annotations

import argparse
import json
import logging
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from report import REFERENCE_BUNDLE, REFERENCE_MODEL, machine, table, write_section

from ptqd_export.core.backend import OPENVINO, OPENVINO_FP32, ORT_CPU
from ptqd_export.core.engine import SAMPLE, STEP, TIMESTEP, Engine

BASELINE = "ORT fp32, as exported"
EXPORTED, STATIC, WEIGHTS = "exported.onnx", "static.onnx", "exported.safetensors"


def export_baselines(model: Path, folder: Path) -> None:
    """EXPORTED, and STATIC from quantize_static with its defaults on noise at all timesteps."""
    import onnxruntime.quantization as ortq

    from ptqd_export.calibrate import open_model
    from ptqd_export.export import export_fp, save
    from ptqd_export.recipe import Recipe

    network = open_model(Recipe.load(model))
    save({Path(EXPORTED).stem: export_fp(network.module, network.info)}, folder, WEIGHTS)
    rng = np.random.default_rng(0)

    class Reader(ortq.CalibrationDataReader):  # type: ignore[misc]
        def __init__(self) -> None:
            self.timesteps = iter(range(0, 1000, 100))

        def get_next(self) -> dict[str, np.ndarray] | None:
            t = next(self.timesteps, None)
            if t is None:
                return None
            x = rng.standard_normal((4, *network.info.sample_shape)).astype(np.float32)
            return {SAMPLE: x, TIMESTEP: np.full(4, t), **network.info.conditions(None, 4)}

    logging.disable(logging.WARNING)
    ortq.quantize_static(folder / EXPORTED, folder / STATIC, Reader())


def measure(
    path: Path, model: Path, folder: Path, batches: Sequence[int], threads: int, repeats: int
) -> dict[int, dict[str, float]]:
    """Seconds per evaluation by batch and engine."""
    import torch

    from ptqd_export.assemble.timing import time_engines
    from ptqd_export.backends import OrtEngine, available, open_engine, set_threads
    from ptqd_export.bundle.bundle import Bundle
    from ptqd_export.calibrate import TorchEngine, open_model
    from ptqd_export.recipe import Recipe

    set_threads(threads)
    torch.set_num_threads(threads)
    bundle = Bundle.open(path)
    m, sampling = bundle.manifest, bundle.manifest.sampling
    engines: dict[str, Engine] = {
        BASELINE: OrtEngine(folder / EXPORTED),
        "onnxruntime quantize_static, defaults": OrtEngine(folder / STATIC),
    }
    eager = {"PyTorch eager fp32": TorchEngine(open_model(Recipe.load(model)).module, sampling)}
    states = available()
    for precision in m.bops:
        name = "ORT fp32, rewritten" if precision.is_float else f"{precision}"
        engines[name] = OrtEngine(bundle.file(m.artifact(precision, ORT_CPU).file))
        for other in (OPENVINO, OPENVINO_FP32):
            if states[other] == "ok":
                engines[f"{precision}, {other}"] = open_engine(
                    other, bundle.file(m.artifact(precision, other).file)
                )
    step = len(sampling) // 2
    found, feeds_of = {}, {}
    for n in batches:
        feeds_of[n] = {
            SAMPLE: np.random.default_rng(n)
            .standard_normal((n, *sampling.model.sample_shape))
            .astype(np.float32),
            TIMESTEP: np.full(n, sampling.schedule.timesteps[step]),
            STEP: np.array([step]),
            **sampling.model.conditions(None, n),
        }
        found[n] = time_engines(engines, feeds_of[n], repeats=repeats)
    # Last and apart: torch's threads spin after a call, and would take the cores from what is timed next.
    for n, feeds in feeds_of.items():
        found[n] |= time_engines(eager, feeds, repeats=repeats)
    return found


def measure_apart(args: argparse.Namespace, folder: str, threads: int) -> dict[int, dict[str, float]]:
    """`measure` in a process of its own: ONNX Runtime's pool is set once."""
    command = [sys.executable, __file__, str(args.bundle), "--model", str(args.model), "--worker", folder]
    command += ["--threads", str(threads), "--repeats", str(args.repeats), "--batch", *map(str, args.batch)]
    out = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True).stdout
    return {int(batch): times for batch, times in json.loads(out.strip().splitlines()[-1]).items()}


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("bundle", nargs="?", type=Path, default=REFERENCE_BUNDLE)
    parser.add_argument("--model", type=Path, default=REFERENCE_MODEL)
    parser.add_argument("--batch", type=int, nargs="+", default=[1, 4, 16])
    parser.add_argument("--threads", type=int, nargs="+", default=[1, 2])
    parser.add_argument("--repeats", type=int, default=30)
    parser.add_argument("--write", action="store_true", help="put the table into docs/benchmarks.md")
    parser.add_argument("--worker", type=Path, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.worker:
        found = measure(args.bundle, args.model, args.worker, args.batch, args.threads[0], args.repeats)
        print(json.dumps(found))
        return
    columns = {}
    with tempfile.TemporaryDirectory() as folder:
        export_baselines(args.model, Path(folder))
        for threads in args.threads:
            columns |= {(n, threads): times for n, times in measure_apart(args, folder, threads).items()}
    calls = [f"batch {n}, {threads} thread{'s' * (threads > 1)}" for n, threads in columns]
    header = ["ms per evaluation (times faster than the first row)", *calls]
    rows = [
        [name, *(f"{c[name] * 1e3:.1f} ({c[BASELINE] / c[name]:.2f}x)" for c in columns.values())]
        for name in next(iter(columns.values()))
    ]
    text = f"{table(header, rows)}\n\n{machine()}; medians of {args.repeats} interleaved calls."
    print(text)
    if args.write:
        write_section("step-time", text)


if __name__ == "__main__":
    main()
