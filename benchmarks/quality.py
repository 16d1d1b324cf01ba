"""Quality of quantized sampling, by precision, correction, variance recalibration and plan.

    python benchmarks/quality.py [--model calib/fashion_mnist] [--samples 256] [--seeds 0 1] [--write]

For eta 0 and eta 1 the bundle that `build` makes by default is built into benchmarks/out/: its graphs carry
the gated `ptqd` correction. The tables of the other modes are computed from the noise statistics in the
bundle, and replace the folded ones: both are affine in the prediction, so one is undone and the other
applied exactly. All runs share seeds and injected noise with the full-precision run, so PSNR compares
pairs; calibration has noise of its own. The Frechet distance is taken to the Fashion-MNIST test images in
the features of the reference classifier. Finished runs are kept in benchmarks/out/quality.jsonl, under the
hashes of what they ran, and are not run again.
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
from typing import get_args

import numpy as np
from report import OUT, REFERENCE_MODEL, machine, table, write_section

from ptqd_export.bundle.bundle import Bundle
from ptqd_export.core.backend import ORT_CPU, Emission
from ptqd_export.core.engine import EPSILON, Engine, FakeEngine
from ptqd_export.core.noise import Correction, Mode
from ptqd_export.core.plan import Plan, by_budget, by_snr, fixed, pareto_front
from ptqd_export.core.precision import FP32, Precision
from ptqd_export.core.sensitivity import Objective
from ptqd_export.errors import BundleError
from ptqd_export.progress import progress

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
    """The default bundle at this eta with every precision, built unless it is there."""
    from ptqd_export.assemble.assemble import build
    from ptqd_export.calibrate import open_model
    from ptqd_export.recipe import Recipe

    path = bundle_path(eta, edges)
    recipe = Recipe.load(model).override(
        sampler={"eta": eta},
        quantization={"precisions": ("fp32", *PRECISIONS), "edge_layers": edges},
        plan={"rule": "fixed", "steps": ("w8a8",)},
    )
    with contextlib.suppress(BundleError):  # there is none, or an old one
        m = Bundle.open(path).manifest
        if (
            m.provenance.recipe == recipe.to_dict()
            and m.sampling.model.sha256 == open_model(recipe).info.sha256
        ):
            return
    print(f"building {path.name}", file=sys.stderr)
    build(recipe, path, say=lambda text: print(text, file=sys.stderr))


def fingerprint(bundle: Bundle) -> str:
    """What the runs of a bundle depend on: its graphs, weights and tables."""
    files = {
        name: file.sha256
        for name, file in bundle.manifest.files.items()
        if name.endswith((".onnx", ".safetensors"))
    }
    return hashlib.sha256(json.dumps(files, sort_keys=True).encode()).hexdigest()[:16]


def tables(bundle: Bundle, plan: Plan, mode: str) -> Correction:
    """What to apply to the bundle's predictions so that they are corrected as `mode` says, (T, C)."""
    n, c = len(plan), bundle.manifest.sampling.model.channels
    of = {}
    for p in plan.precisions:
        folded = bundle.correction(p, Emission.ORT_CPU)
        if p.is_float or mode == DEFAULT:
            of[p] = Correction(np.ones((n, c)), np.zeros((n, c)), folded.var)
        else:
            wanted = Correction.from_stats(bundle.stats(p, Emission.ORT_CPU), mode)
            gain = wanted.gain / folded.gain
            of[p] = Correction(gain, wanted.offset - gain * folded.offset, wanted.var)
    rows = [of[p] for p in plan.steps]
    return Correction(
        np.stack([r.gain[i] for i, r in enumerate(rows)]),
        np.stack([r.offset[i] for i, r in enumerate(rows)]),
        np.array([r.var[i] for i, r in enumerate(rows)]),
    )


def corrected(engine: Engine, correction: Correction, step: int) -> Engine:
    """An engine with a correction of its own; it may stand before guidance, whose weights add up to 1."""
    gain, offset = (rows[step][:, None, None] for rows in (correction.gain, correction.offset))
    return FakeEngine(lambda feeds: gain * engine(feeds)[EPSILON].astype(np.float64) + offset, engine.inputs)


def draw(job: Job, batch: range, seed: int) -> np.ndarray:
    """One batch of samples; engines stay open in the worker from one job to the next."""
    from ptqd_export.backends import open_engine, set_threads

    path = bundle_path(job.eta, job.edges)
    if not _bundles:
        set_threads(1)
    if path not in _bundles:
        _bundles[path] = Bundle.open(path, verify=False)
    bundle = _bundles[path]
    m, sampling = bundle.manifest, bundle.manifest.sampling
    plan = fixed(job.plan.split(), len(sampling))
    for p in plan.precisions:
        if (path, p) not in _engines:
            _engines[path, p] = open_engine(ORT_CPU, bundle.file(m.artifact(p, ORT_CPU).file))
    correction = tables(bundle, plan, job.mode)
    labels = [sampling.model.labels[i % len(sampling.model.labels)] for i in batch]
    return sampling.sample(
        lambda step: corrected(_engines[path, plan.steps[step]], correction, step),
        sampling.model.conditions(labels, len(batch)),
        batch,
        seed=seed,
        sigmas=sampling.schedule.recalibrated_sigmas(correction.var) if job.recalibrate else None,
    )


_bundles: dict[Path, Bundle] = {}
_engines: dict[tuple[Path, Precision], Engine] = {}


def plan_jobs(eta: float) -> list[Job]:
    """The snr plan, and budget plans of as many bit operations for both objectives.

    At eta 0 also plans by hand: few bits, or full precision, early or late.
    """
    m = Bundle.open(bundle_path(eta, "float")).manifest
    schedule, choice, n = m.sampling.schedule, m.choice, len(m.sampling)
    precisions = [Precision.parse(p) for p in PRECISIONS]
    bops = {p: float(m.bops[p]) for p in precisions}
    chosen = {"snr": by_snr({p: np.array(choice.snr_q[p], float) for p in precisions}, bops, schedule)}
    errors = {p: np.array(choice.error[p]) for p in precisions}
    for objective in get_args(Objective):
        weighed = errors if choice.sensitivity is None else choice.sensitivity.weigh(errors, objective)
        front = pareto_front(weighed, bops)
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
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", type=Path, default=REFERENCE_MODEL)
    parser.add_argument("--samples", type=int, default=256, help="per seed")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1])
    parser.add_argument("--batch-size", type=int, default=16)
    parser.add_argument("--workers", type=int, default=2, help="processes of one thread each")
    parser.add_argument("--eta", type=float, nargs="+", default=[0.0, 1.0])
    parser.add_argument("--skip", nargs="+", default=[], choices=["modes", "plans", "edges"])
    parser.add_argument("--write", action="store_true", help="put the tables into docs/benchmarks.md")
    args = parser.parse_args()
    OUT.mkdir(parents=True, exist_ok=True)
    jobs: list[Job] = []
    for eta in args.eta:
        build_bundle(args.model, eta, "float")
        jobs.append(Job(eta, "fp32", "none", False))
        if "modes" not in args.skip:
            for p in PRECISIONS:
                for mode in (*get_args(Mode), DEFAULT):
                    # The default recalibrates where there is a variance; the modes are shown both ways.
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
    from ptqd_export.pictures import to_uint8

    log = OUT / "quality.jsonl"
    prints = {(job.eta, job.edges): "" for job in jobs}
    prints = {key: fingerprint(Bundle.open(bundle_path(*key), verify=False)) for key in prints}

    def setting(job: Job) -> dict:
        of = {"bundle": prints[job.eta, job.edges], "fp32": prints[job.eta, "float"]}
        return {"samples": args.samples, "seeds": args.seeds, **of}

    known = [json.loads(line) for line in log.read_text().splitlines()] if log.exists() else []
    done = {}
    for job in jobs:
        for entry in known:
            if entry["key"] == job.key() and entry["setting"] == setting(job):
                done[job.key()] = entry["result"]
    features, reference = load_features(args.model), load_reference(args.model)
    truth: dict[float, np.ndarray] = {}
    todo = [job for job in jobs if job.key() not in done]
    shape = Bundle.open(bundle_path(jobs[0].eta, "float"), verify=False).manifest.sampling.model.sample_shape
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
                file = (
                    OUT
                    / f"fp32-{prints[job.eta, 'float']}-{args.samples}-{'-'.join(map(str, args.seeds))}.npy"
                )
                if not file.exists():
                    np.save(file, all_samples(Job(job.eta, "fp32", "none", False)))
                truth[job.eta] = np.load(file)
            fp = truth[job.eta]
            x = fp if job.plan == "fp32" else all_samples(job)
            pixels = to_uint8(x.reshape(-1, *shape)).reshape(x.shape).astype(np.float32) / 127.5 - 1
            away = excursions(x.reshape(-1, *shape))
            pairs = list(zip(x, fp, strict=True)) if job.plan != "fp32" else []
            result = {
                "psnr": [float(np.mean(psnr(a, b))) for a, b in pairs] or None,
                "ssim": [float(np.mean(ssim(a, b))) for a, b in pairs] or None,
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
        rows = []
        for j in (j for j in jobs if j.eta == eta and not j.label and j.edges == "float"):
            mode = "-" if j.plan == "fp32" else j.mode
            rows.append([j.plan, mode, "yes" if j.recalibrate else "no", *cells(results[j.key()])])
        parts.append(f"**eta {eta:g}**\n\n" + table(["precision", "correction", "sigma'", *columns], rows))
        plans = [j for j in jobs if j.eta == eta and j.label]
        if plans:
            m = Bundle.open(bundle_path(eta, "float"), verify=False).manifest
            n = len(m.sampling)
            share = {p: bops / m.bops[FP32] / n for p, bops in m.bops.items()}
            rows = [
                [j.label, j.plan, f"{fixed(j.plan.split(), n).total(share):.4f}", *cells(results[j.key()])]
                for j in plans
            ]
            title = f"**Plans, eta {eta:g}** (correction {DEFAULT})"
            parts.append(f"{title}\n\n" + table(["rule", "plan", "BOPs of fp32", *columns], rows))
    rows = []
    for j in (j for j in jobs if j.edges == "w8a8"):
        other = Job(j.eta, j.plan, j.mode, j.recalibrate)
        both = (("float", other), ("8 bits", j))
        rows += [[j.plan, name, *cells(results[job.key()])] for name, job in both if job.key() in results]
    if rows:
        title = f"**First and last conv** (eta 0, correction {DEFAULT})"
        parts.append(f"{title}\n\n" + table(["precision", "edge layers", *columns], rows))
    sampling = Bundle.open(bundle_path(args.eta[0], "float"), verify=False).manifest.sampling
    note = (
        f"{sampling.model.name}, {len(sampling)} steps, guidance {sampling.guidance_scale:g}; "
        f"{args.samples} samples for each of the seeds {', '.join(map(str, args.seeds))}; "
        f"± is half the range over seeds. {machine()}."
    )
    return "\n\n".join([*parts, note])


if __name__ == "__main__":
    main()
