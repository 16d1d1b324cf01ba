"""How weights are rounded: to the nearest, by GPTQ, by GPTQ on quantized inputs, by block reconstruction.

    python benchmarks/rounding.py [--n-steps 20] [--iterations 10000] [--samples 64] [--write]

All are computed by the portable simulation, from the same trajectories, ranges and scales. SNR_Q is that of
one step, averaged over the steps in dB, on held-out trajectories. PSNR is that of whole runs to full
precision with the same noise, without correction, and with gain and offset per step fitted on the
calibration trajectories (ungated). Finished configurations are kept in benchmarks/out/rounding.jsonl and are
not computed again; `--only` computes some of them, so that several processes can share the work. A
configuration that was stopped is taken up, and its seconds are then not known.
"""

from __future__ import annotations

import argparse
import json
import time
from dataclasses import asdict
from pathlib import Path

import numpy as np
from report import OUT, REFERENCE_MODEL, machine, table, write_section

from ptqd_export.calibrate import (
    Network,
    TorchEngine,
    Trajectories,
    collect,
    measure,
    observe,
    open_model,
    quantize,
    refine,
    set_threads,
    simulate,
)
from ptqd_export.core.backend import Emission
from ptqd_export.core.noise import Correction, NoiseStats
from ptqd_export.core.precision import Precision
from ptqd_export.core.sampling import Sampling
from ptqd_export.evaluate.metrics import psnr
from ptqd_export.files import empty_folder, work_folder
from ptqd_export.recipe import Recipe

ROUNDINGS = ("nearest", "gptq", "gptq-sequential", "adaround")
PRECISIONS = ("w4a8", "w4a4")
ORDER = [f"{precision}/{rounding}" for precision in PRECISIONS for rounding in ROUNDINGS]
HEADER = ("precision", "rounding", "SNR_Q, dB", "PSNR, dB", "PSNR corrected, dB", "s to quantize")
BATCH = 16


def samples(
    network: Network, sampling: Sampling, n: int, seed: int, net: object, correction: object
) -> object:
    """n samples (n, C, H, W) of a quantized network; of the full-precision one if it is None."""
    module = network.module if net is None else simulate(network, net, Emission.PORTABLE)
    labels = network.info.labels_in_turn(range(n))
    parts = []
    with TorchEngine(module, sampling, correction) as engine:
        for start in range(0, n, BATCH):
            batch = range(start, min(start + BATCH, n))
            own = None if labels is None else labels[batch.start : batch.stop]
            conditions = network.info.conditions(own, len(batch))
            parts.append(sampling.sample(lambda step: engine, conditions, batch, seed=seed))
    return np.concatenate(parts)


def figures(
    network: Network, sampling: Sampling, recipe: Recipe, paths: Trajectories, precision: Precision, args
) -> dict[str, float]:
    """The row of one configuration."""
    started = time.process_time()
    seen = observe(network, sampling, recipe, paths)
    start = quantize(network, seen, precision, recipe)
    with work_folder(OUT / f"rounding-{precision}-{recipe.quantization.rounding}") as work:
        codes, key = work / "codes", recipe.digest("sampler", "calibration")
        resumed = codes.exists()
        net = refine(network, sampling, start, paths, recipe, codes, key)
        empty_folder(work)
    seconds = 0.0 if resumed else time.process_time() - started
    size = recipe.calibration.size
    with TorchEngine(simulate(network, net, Emission.PORTABLE), sampling) as engine:
        parts = measure(engine, sampling, paths)
    correction = Correction.from_stats(NoiseStats.pool(parts[:size]), "ptqd")
    truth = samples(network, sampling, args.samples, args.seed, None, None)
    runs = [samples(network, sampling, args.samples, args.seed, net, c) for c in (None, correction)]
    plain, corrected = (float(np.mean(psnr(x, truth))) for x in runs)
    return {
        "snr": float(np.mean(10 * np.log10(NoiseStats.pool(parts[size:]).snr))),
        "plain": plain,
        "corrected": corrected,
        "seconds": seconds,
    }


def finished(log: Path, setting: dict[str, object]) -> dict[tuple[str, int], dict[str, float]]:
    """What was computed at a setting: {(precision/rounding, iterations of adaround): figures}."""
    entries = [json.loads(line) for line in log.read_text("utf-8").splitlines()] if log.exists() else []
    return {(e["name"], e["iterations"]): e["result"] for e in entries if e["setting"] == setting}


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", type=Path, default=REFERENCE_MODEL)
    parser.add_argument("--n-steps", type=int, default=20)
    parser.add_argument("--calib-size", type=int, default=32, help="trajectories; half as many are held out")
    parser.add_argument("--iterations", type=int, default=10_000, help="of adaround, per block")
    parser.add_argument("--samples", type=int, default=64)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--only", nargs="*", help="compute these alone, such as w4a8/gptq; or none")
    parser.add_argument("--write", action="store_true", help="put the table into docs/benchmarks.md")
    args = parser.parse_args()
    set_threads(1)
    OUT.mkdir(parents=True, exist_ok=True)
    size = args.calib_size
    recipe = Recipe.load(args.model).override(
        sampler={"n_steps": args.n_steps}, calibration={"size": size, "held_out": max(2, size // 2)}
    )
    network = open_model(recipe)
    sampling = Sampling.of(network.info, network.scheduler_config, **asdict(recipe.sampler))
    setting = {name: getattr(args, name) for name in ("n_steps", "calib_size", "samples", "seed")}
    setting["model"] = network.info.sha256
    log, paths = OUT / "rounding.jsonl", None
    for precision in PRECISIONS:
        for rounding in ROUNDINGS:
            name = f"{precision}/{rounding}"
            iterations = args.iterations if rounding == "adaround" else 0
            wanted = args.only is None or name in args.only
            if not wanted or (name, iterations) in finished(log, setting):
                continue
            if paths is None:
                folder = OUT / f"rounding-{network.info.sha256[:8]}-{args.n_steps}-{size}"
                paths = collect(network, sampling, recipe, folder)
            how = {"precisions": (precision,), "rounding": rounding, "iterations": max(1, iterations)}
            of = recipe.override(quantization=how)
            result = figures(network, sampling, of, paths, Precision.parse(precision), args)
            entry = {"setting": setting, "name": name, "iterations": iterations, "result": result}
            with log.open("a") as file:
                file.write(json.dumps(entry) + "\n")
    done = finished(log, setting)
    rows = []
    for name, iterations in sorted(done, key=lambda key: (ORDER.index(key[0]), key[1])):
        r = done[name, iterations]
        precision, rounding = name.split("/")
        label = f"{rounding}, {iterations} iterations" if iterations else rounding
        cells = (f"{r[key]:.1f}" for key in ("snr", "plain", "corrected"))
        rows.append([precision, label, *cells, f"{r['seconds']:.0f}" if r["seconds"] else "-"])
    n = f"{args.n_steps} steps, {size} calibration trajectories, {args.samples} samples of seed {args.seed}"
    text = (
        f"{table(HEADER, rows)}\n\n{network.info.name}, {n}; seconds are of one CPU core. {machine('torch')}."
    )
    print(text)
    if args.write:
        write_section("rounding", text)


if __name__ == "__main__":
    main()
