"""Quality of quantized sampling: per precision, correction and variance recalibration, and per plan, against full precision.

    python benchmarks/quality.py [--model calib/fashion_mnist] [--samples 256] [--seeds 0 1] [--write]

For eta 0 and eta 1 a bundle without correction is built into benchmarks/out/; every mode's tables are computed from its noise
statistics and applied in the sampler (a test shows that the folded graph does the same). All runs share seeds and injected noise
with the full-precision run, so PSNR compares pairs. Frechet distance is to the Fashion-MNIST test images in the features of the
reference classifier. Finished runs are kept in benchmarks/out/quality.jsonl and not run again. --write puts the tables into the README.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import sys
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
from report import ROOT, table, write_section

from ptqd_export.bundle import Bundle
from ptqd_export.engine import Engine
from ptqd_export.noise import MODES, Correction, Mode
from ptqd_export.plan import Plan, by_budget, by_snr, fixed, pareto_front, step_weights
from ptqd_export.precision import FP32, Precision
from ptqd_export.progress import progress
from ptqd_export.quant import Emission

OUT = ROOT / "benchmarks" / "out"
PRECISIONS = ("w8a8", "w4a8", "w4a4")


@dataclass(frozen=True)
class Job:
    """One configuration: a plan in text form, how it is corrected, which edge layers its engines have."""

    eta: float
    plan: str
    mode: Mode
    recalibrate: bool
    edges: str = "float"
    label: str = ""

    def key(self) -> str:
        return json.dumps(asdict(self), sort_keys=True)


def bundle_path(eta: float, edges: str) -> Path:
    return OUT / f"raw-eta{eta:g}-{edges}"


def build_raw(model: Path, eta: float, edges: str) -> None:
    """A bundle without correction: raw engines of every precision, and the statistics that tables are made from."""
    from ptqd_export.build import build
    from ptqd_export.recipe import Recipe

    path = bundle_path(eta, edges)
    if path.exists():
        return
    recipe = Recipe.load(model).override(
        sampler={"eta": eta},
        quantization={"precisions": ("fp32", *PRECISIONS), "correction": "none", "edge_layers": edges},
        plan={"rule": "fixed", "steps": ("w8a8",)},
    )
    print(f"building {path.name}", file=sys.stderr)
    build(recipe, path, say=lambda text: print(text, file=sys.stderr))


def tables(bundle: Bundle, plan: Plan, mode: Mode) -> Correction:
    """The rows of each step's precision."""
    n, c = len(plan), bundle.manifest.model.channels
    of = {}
    for p in plan.precisions:
        of[p] = Correction.identity(n, c) if p.is_float else Correction.from_stats(bundle.stats(p, Emission.ORT_CPU), mode)
    rows = [of[p] for p in plan.steps]
    return Correction(
        np.stack([r.gain[i] for i, r in enumerate(rows)]),
        np.stack([r.offset[i] for i, r in enumerate(rows)]),
        np.array([r.var[i] for i, r in enumerate(rows)]),
    )


def draw(job: Job, batch: range, seed: int) -> np.ndarray:
    """One batch of samples; engines stay open in the worker from one job to the next."""
    from ptqd_export.backends import open_engine, set_threads
    from ptqd_export.sampler import sample

    path = bundle_path(job.eta, job.edges)
    if not _bundles:
        set_threads(1)
    if path not in _bundles:
        _bundles[path] = Bundle.open(path, verify=False)
    bundle = _bundles[path]
    m = bundle.manifest
    plan = fixed(job.plan.split(), len(m.schedule))
    for p in plan.precisions:
        if (path, p) not in _engines:
            _engines[path, p] = open_engine("ort-cpu", bundle.file(m.artifact(p, "ort-cpu").file))
    correction = tables(bundle, plan, job.mode)
    labels = [m.model.labels[i % len(m.model.labels)] for i in batch]
    return sample(
        lambda i: _engines[path, plan.steps[i]],
        m.schedule,
        m.model,
        m.model.conditions(labels, len(batch)),
        batch,
        seed=seed,
        guidance_scale=m.guidance_scale,
        sigmas=m.schedule.recalibrated_sigmas(correction.var) if job.recalibrate else None,
        correction=correction,
    )


_bundles: dict[Path, Bundle] = {}
_engines: dict[tuple[Path, Precision], Engine] = {}


def plan_jobs(eta: float) -> list[Job]:
    """The snr plan, and budget plans of the same BOPs for both objectives, corrected as `ptqd`."""
    bundle = Bundle.open(bundle_path(eta, "float"))
    m, schedule = bundle.manifest, bundle.manifest.schedule
    precisions = [Precision.parse(p) for p in PRECISIONS]
    stats = {p: bundle.stats(p, Emission.ORT_CPU) for p in precisions}
    fit = {p: Correction.from_stats(s, "ptqd") for p, s in stats.items()}
    bops = {p: float(m.bops[p]) for p in precisions}
    chosen = {"snr": by_snr({p: stats[p].corrected(fit[p]).snr for p in precisions}, bops, schedule)}
    for objective in ("paired", "distribution"):
        weights = step_weights(schedule, objective)
        front = pareto_front({p: weights * stats[p].mse(fit[p].gain, fit[p].offset) for p in precisions}, bops)
        chosen[f"budget, {objective}"] = by_budget(front, chosen["snr"].total(bops)).plan
    n = len(schedule)
    half = n // 2
    chosen["by hand: w4a4 early"] = fixed([f"w4a4*{half}", f"w8a8*{n - half}"], n)
    chosen["by hand: w4a4 late"] = fixed([f"w8a8*{half}", f"w4a4*{n - half}"], n)
    return [Job(eta, str(plan), "ptqd", eta > 0, label=name) for name, plan in chosen.items()]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, default=ROOT / "calib/fashion_mnist")
    parser.add_argument("--samples", type=int, default=256, help="per seed")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1])
    parser.add_argument("--batch-size", type=int, default=16)
    parser.add_argument("--workers", type=int, default=2, help="processes of one thread each")
    parser.add_argument("--eta", type=float, nargs="+", default=[0.0, 1.0])
    parser.add_argument("--skip", nargs="+", default=[], choices=["modes", "plans", "edges"])
    parser.add_argument("--write", action="store_true", help="put the tables into README.md")
    args = parser.parse_args()
    OUT.mkdir(parents=True, exist_ok=True)
    jobs: list[Job] = []
    for eta in args.eta:
        build_raw(args.model, eta, "float")
        jobs.append(Job(eta, "fp32", "none", False))
        if "modes" not in args.skip:
            for p in PRECISIONS:
                for mode in MODES:
                    jobs += [Job(eta, p, mode, r) for r in ((False, True) if eta > 0 else (False,))]
        if "plans" not in args.skip:
            jobs += plan_jobs(eta)
    if "edges" not in args.skip:
        build_raw(args.model, 0.0, "w8a8")
        jobs += [Job(0.0, p, "ptqd", False, "w8a8") for p in PRECISIONS]
    results = run_all(jobs, args)
    text = report(jobs, results, args)
    print(text)
    if args.write:
        write_section("quality", text)


def run_all(jobs: list[Job], args: argparse.Namespace) -> dict[str, dict]:
    """Run what is not in quality.jsonl yet; {key: result}."""
    sys.path.insert(0, str(args.model))
    from classifier import load_features, load_reference

    from ptqd_export.evaluate.metrics import excursions, feature_stats, frechet_distance, psnr, ssim
    from ptqd_export.images import to_uint8

    log = OUT / "quality.jsonl"
    setting = {"samples": args.samples, "seeds": args.seeds}
    done = {}
    if log.exists():
        for line in log.read_text().splitlines():
            entry = json.loads(line)
            if entry["setting"] == setting:
                done[entry["key"]] = entry["result"]
    features, reference = load_features(args.model), load_reference(args.model)
    truth: dict[float, np.ndarray] = {}
    todo = [job for job in jobs if job.key() not in done]
    shape = Bundle.open(bundle_path(jobs[0].eta, "float"), verify=False).manifest.model.sample_shape
    with (
        ProcessPoolExecutor(args.workers, multiprocessing.get_context("spawn")) as pool,
        progress(len(todo) * args.samples * len(args.seeds), "samples", "sample") as bar,
    ):

        def all_samples(job: Job) -> np.ndarray:
            x = np.empty((len(args.seeds), args.samples, *shape))
            futures = {
                pool.submit(draw, job, range(i, min(i + args.batch_size, args.samples)), seed): (row, i)
                for row, seed in enumerate(args.seeds)
                for i in range(0, args.samples, args.batch_size)
            }
            for future in as_completed(futures):
                row, i = futures[future]
                part = future.result()
                x[row, i : i + len(part)] = part
                bar.update(len(part))
            return x

        for job in todo:
            if job.eta not in truth:
                file = OUT / f"fp32-eta{job.eta:g}-{args.samples}-{'-'.join(map(str, args.seeds))}.npy"
                if not file.exists():
                    np.save(file, all_samples(Job(job.eta, "fp32", "none", False)))
                truth[job.eta] = np.load(file)
            fp = truth[job.eta]
            x = fp if job.plan == "fp32" else all_samples(job)
            pixels = to_uint8(x.reshape(-1, *shape)).reshape(x.shape).astype(np.float32) / 127.5 - 1
            away = excursions(x.reshape(-1, *shape))
            result = {
                "psnr": [float(np.mean(psnr(a, b))) for a, b in zip(x, fp, strict=True)] if job.plan != "fp32" else None,
                "ssim": [float(np.mean(ssim(a, b))) for a, b in zip(x, fp, strict=True)] if job.plan != "fp32" else None,
                "frechet": [frechet_distance(*feature_stats(features(p)), *reference) for p in pixels],
                "excursions": away.share,
                "largest": away.largest,
            }
            done[job.key()] = result
            with log.open("a") as file_:
                file_.write(json.dumps({"setting": setting, "key": job.key(), "result": result}) + "\n")
    return done


def spread(values: list[float], digits: int) -> str:
    """Mean and half the range over seeds."""
    return f"{np.mean(values):.{digits}f} ± {(max(values) - min(values)) / 2:.{digits}f}"


def cells(result: dict) -> list[str]:
    return [
        "-" if result["psnr"] is None else spread(result["psnr"], 1),
        "-" if result["ssim"] is None else spread(result["ssim"], 3),
        spread(result["frechet"], 2),
        f"{result['excursions']:.1%} ({result['largest']:.1f})",
    ]


def report(jobs: list[Job], results: dict[str, dict], args: argparse.Namespace) -> str:
    columns = ["PSNR to fp32, dB", "SSIM to fp32", "Frechet distance", "samples beyond ±1.5 (largest value)"]
    parts = []
    for eta in args.eta:
        chosen = [j for j in jobs if j.eta == eta and not j.label and j.edges == "float"]
        rows = [[j.plan, "-" if j.plan == "fp32" else j.mode, "yes" if j.recalibrate else "no", *cells(results[j.key()])] for j in chosen]
        parts.append(f"**eta {eta:g}**\n\n" + table(["precision", "correction", "sigma'", *columns], rows))
        plans = [j for j in jobs if j.eta == eta and j.label]
        if plans:
            m = Bundle.open(bundle_path(eta, "float"), verify=False).manifest
            fp = m.bops[FP32]
            share = [fixed(j.plan.split(), len(m.schedule)).total({p: v / fp / len(m.schedule) for p, v in m.bops.items()}) for j in plans]
            rows = [[j.label, j.plan, f"{s:.4f}", *cells(results[j.key()])] for j, s in zip(plans, share, strict=True)]
            parts.append(f"**Plans, eta {eta:g}** (correction ptqd)\n\n" + table(["rule", "plan", "BOPs of fp32", *columns], rows))
    edges = [j for j in jobs if j.edges == "w8a8"]
    if edges:
        rows = []
        for j in edges:
            other = Job(j.eta, j.plan, j.mode, j.recalibrate)
            rows += [[j.plan, name, *cells(results[job.key()])] for name, job in (("float", other), ("8 bits", j)) if job.key() in results]
        parts.append("**First and last conv** (eta 0, correction ptqd)\n\n" + table(["precision", "edge layers", *columns], rows))
    note = f"{args.samples} samples for each of the seeds {', '.join(map(str, args.seeds))}; ± is half the range over seeds. 20 steps, guidance 2."
    m = Bundle.open(bundle_path(args.eta[0], "float"), verify=False).manifest
    note = note.replace("20 steps, guidance 2", f"{len(m.schedule)} steps, guidance {m.guidance_scale:g}")
    return "\n\n".join([*parts, note])


if __name__ == "__main__":
    main()
