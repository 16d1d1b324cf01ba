"""Quality of quantized sampling: per precision, correction and variance recalibration, and per plan, against full precision.

    python benchmarks/quality.py [--model calib/fashion_mnist] [--samples 256] [--seeds 0 1] [--write]

For eta 0 and eta 1 the bundle that `build` makes by default is built into benchmarks/out/: its graphs carry the gated `ptqd` correction.
The other modes' tables are computed from the noise statistics in the bundle, and replace the folded one in the sampler: both are affine in
the guided prediction, so one is undone and the other applied exactly. All runs share seeds and injected noise with the full-precision run, so
PSNR compares pairs; calibration has noise of its own. Frechet distance is to the Fashion-MNIST test images in the features of the
reference classifier. Finished runs are kept in benchmarks/out/quality.jsonl, under the hashes of what they ran, and not run again.
--write puts the tables into the README.
"""

from __future__ import annotations

import argparse
import contextlib
import hashlib
import json
import multiprocessing
import sys
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
from report import ROOT, machine, table, write_section

from ptqd_export.bundle import Bundle
from ptqd_export.engine import Engine
from ptqd_export.errors import BundleError
from ptqd_export.noise import MODES, Correction
from ptqd_export.plan import Plan, by_budget, by_snr, fixed, pareto_front, step_weights
from ptqd_export.precision import FP32, Precision
from ptqd_export.progress import progress
from ptqd_export.quant import Emission

OUT = ROOT / "benchmarks" / "out"
PRECISIONS = ("w8a8", "w4a8", "w4a4")
DEFAULT = "ptqd, gated"
"""What `build` folds into its graphs if nothing else is asked for."""


@dataclass(frozen=True)
class Job:
    """One configuration: a plan in text form, how it is corrected, which edge layers its engines have."""

    eta: float
    plan: str
    mode: str
    recalibrate: bool
    edges: str = "float"
    label: str = ""

    def key(self) -> str:
        return json.dumps(asdict(self), sort_keys=True)


def bundle_path(eta: float, edges: str) -> Path:
    return OUT / f"eta{eta:g}-{edges}"


def build_bundle(model: Path, eta: float, edges: str) -> None:
    """The default bundle at this eta with every precision; built anew unless the one there is of the same recipe and weights."""
    from ptqd_export.build import build
    from ptqd_export.calibrate import open_model
    from ptqd_export.recipe import Recipe

    path = bundle_path(eta, edges)
    recipe = Recipe.load(model).override(
        sampler={"eta": eta}, quantization={"precisions": ("fp32", *PRECISIONS), "edge_layers": edges}, plan={"rule": "fixed", "steps": ("w8a8",)}
    )
    with contextlib.suppress(BundleError):  # there is none, or an old one
        m = Bundle.open(path).manifest
        if m.provenance["recipe"] == recipe.to_dict() and m.model.sha256 == open_model(recipe).info.sha256:
            return
    print(f"building {path.name}", file=sys.stderr)
    build(recipe, path, say=lambda text: print(text, file=sys.stderr))


def fingerprint(bundle: Bundle) -> str:
    """What the runs of a bundle depend on: its graphs, weights and tables."""
    files = {name: entry["sha256"] for name, entry in bundle.manifest.files.items() if name.endswith((".onnx", ".safetensors"))}
    return hashlib.sha256(json.dumps(files, sort_keys=True).encode()).hexdigest()[:16]


def tables(bundle: Bundle, plan: Plan, mode: str) -> Correction:
    """What to apply to the bundle's guided predictions so that they are corrected as `mode` says; per step the rows of its precision."""
    n, c = len(plan), bundle.manifest.model.channels
    of = {}
    for p in plan.precisions:
        folded = bundle.correction(p, Emission.ORT_CPU)
        if p.is_float or mode == DEFAULT:
            of[p] = Correction(np.ones((n, c)), np.zeros((n, c)), folded.var)
        else:
            wanted = Correction.from_stats(bundle.stats(p, Emission.ORT_CPU), mode)
            of[p] = Correction(wanted.gain / folded.gain, wanted.offset - wanted.gain * folded.offset / folded.gain, wanted.var)
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
    """The snr plan and budget plans of the same BOPs for both objectives; at eta 0 also plans by hand: few bits, or full precision, early or late."""
    bundle = Bundle.open(bundle_path(eta, "float"))
    m, schedule = bundle.manifest, bundle.manifest.schedule
    n, info = len(schedule), m.plan_info
    precisions = [Precision.parse(p) for p in PRECISIONS]
    bops = {p: float(m.bops[p]) for p in precisions}
    chosen = {"snr": by_snr({p: np.array(info["snr_q"][str(p)]) for p in precisions}, bops, schedule)}
    # The manifest's errors are weighted for its own objective; the weights come off again.
    errors = {p: np.array(info["error"][str(p)]) / step_weights(schedule, info["objective"]) for p in precisions}
    for objective in ("paired", "distribution"):
        weights = step_weights(schedule, objective)
        front = pareto_front({p: weights * errors[p] for p in precisions}, bops)
        chosen[f"budget, {objective}, BOPs of snr's"] = by_budget(front, chosen["snr"].total(bops)).plan
    if eta == 0:
        half = n // 2
        by_hand = {
            "w4a4 early": [f"w4a4*{half}", f"w8a8*{n - half}"],
            "w4a4 late": [f"w8a8*{half}", f"w4a4*{n - half}"],
            "fp32 early": ["fp32*3", f"w8a8*{n - 3}"],
            "fp32 late": [f"w8a8*{n - 3}", "fp32*3"],
        }
        chosen |= {f"by hand: {name}": fixed(runs, n) for name, runs in by_hand.items()}
    return [Job(eta, str(plan), DEFAULT, eta > 0, label=name) for name, plan in chosen.items()]


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
        build_bundle(args.model, eta, "float")
        jobs.append(Job(eta, "fp32", "none", False))
        if "modes" not in args.skip:
            for p in PRECISIONS:
                for mode in (*MODES, DEFAULT):
                    # The default recalibrates where there is a variance to recalibrate; the modes are shown with and without.
                    recalibrate = (False,) if eta == 0 else (True,) if mode == DEFAULT else (False, True)
                    jobs += [Job(eta, p, mode, r) for r in recalibrate]
        if "plans" not in args.skip:
            jobs += plan_jobs(eta)
    if "edges" not in args.skip:
        build_bundle(args.model, 0.0, "w8a8")
        jobs += [Job(0.0, p, DEFAULT, False, "w8a8") for p in PRECISIONS]
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
    prints = {(job.eta, job.edges): "" for job in jobs}
    prints = {key: fingerprint(Bundle.open(bundle_path(*key), verify=False)) for key in prints}

    def setting(job: Job) -> dict:
        return {"samples": args.samples, "seeds": args.seeds, "bundle": prints[job.eta, job.edges], "fp32": prints[job.eta, "float"]}

    known = [json.loads(line) for line in log.read_text().splitlines()] if log.exists() else []
    done = {}
    for job in jobs:
        for entry in known:
            if entry["key"] == job.key() and entry["setting"] == setting(job):
                done[job.key()] = entry["result"]
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
                file = OUT / f"fp32-{prints[job.eta, 'float']}-{args.samples}-{'-'.join(map(str, args.seeds))}.npy"
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
                file_.write(json.dumps({"setting": setting(job), "key": job.key(), "result": result}) + "\n")
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
            parts.append(f"**Plans, eta {eta:g}** (correction {DEFAULT})\n\n" + table(["rule", "plan", "BOPs of fp32", *columns], rows))
    edges = [j for j in jobs if j.edges == "w8a8"]
    if edges:
        rows = []
        for j in edges:
            other = Job(j.eta, j.plan, j.mode, j.recalibrate)
            rows += [[j.plan, name, *cells(results[job.key()])] for name, job in (("float", other), ("8 bits", j)) if job.key() in results]
        parts.append(f"**First and last conv** (eta 0, correction {DEFAULT})\n\n" + table(["precision", "edge layers", *columns], rows))
    m = Bundle.open(bundle_path(args.eta[0], "float"), verify=False).manifest
    note = (
        f"{m.model.name}, {len(m.schedule)} steps, guidance {m.guidance_scale:g}; {args.samples} samples for each of the seeds "
        f"{', '.join(map(str, args.seeds))}; ± is half the range over seeds. {machine()}."
    )
    return "\n\n".join([*parts, note])


if __name__ == "__main__":
    main()
