"""Ways to correct quantized predictions, in closed loop: by mode, gate, and where the noise is measured.

    python benchmarks/corrections.py [--bundle engines/fashion_mnist] [--samples 2048] [--write]

The engines are those of a bundle on ONNX Runtime's CPU provider. What is folded into their graphs is undone
exactly, and the tables of each row of the result are applied instead. They are fitted here, on trajectories
that no sample shares its noise with. Every run has the same starting noise as the full-precision run, so PSNR
compares pairs. Finished runs are kept in benchmarks/out/corrections.jsonl, under the hashes of what they ran,
and are not run again.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import numpy as np
from quality import fingerprint
from report import OUT, REFERENCE_BUNDLE, machine, table, write_section

from ptqd_export.backends import open_engine, set_threads
from ptqd_export.bundle.bundle import Bundle
from ptqd_export.calibrate import Batch, Trajectories, measure, measure_own
from ptqd_export.calibrate.trajectories import CALIBRATION_STREAM
from ptqd_export.core.backend import ORT_CPU, Emission
from ptqd_export.core.engine import EPSILON, SAMPLE, STEP, Engine, FakeEngine
from ptqd_export.core.gate import gate
from ptqd_export.core.noise import Correction, NoiseStats
from ptqd_export.core.precision import FP32, Precision
from ptqd_export.evaluate.metrics import excursions, psnr
from ptqd_export.progress import progress

BOOTSTRAPS = 2000


@dataclass(frozen=True)
class Held(Trajectories):
    """Trajectories in memory."""

    batches: tuple[Batch, ...] = ()

    def __iter__(self) -> Iterator[Batch]:
        return iter(self.batches)


@dataclass(frozen=True)
class Tables:
    """ec = gain eq + offset + sample_gain x_t, each (T, C)."""

    gain: np.ndarray
    offset: np.ndarray
    sample_gain: np.ndarray | float = 0.0


class Lab:
    """A bundle's engines, uncorrected, and the trajectories that corrections are fitted on."""

    def __init__(self, args: argparse.Namespace) -> None:
        self.args, self.bundle = args, Bundle.open(args.bundle)
        self.sampling = self.bundle.manifest.sampling
        if self.sampling.schedule.eta:
            raise SystemExit(f"{args.bundle} is built for eta {self.sampling.schedule.eta:g}: give one for 0")

    def conditions(self, indices: range) -> dict[str, np.ndarray]:
        model = self.sampling.model
        return model.conditions(model.labels_in_turn(indices), len(indices))

    def engine(self, precision: Precision, tables: Tables | None = None) -> Engine:
        """The engine of a precision, with these tables in place of those in its graph; by default none."""
        bundle = self.bundle
        engine = open_engine(ORT_CPU, bundle.file(bundle.manifest.artifact(precision, ORT_CPU).file))
        folded = bundle.correction(precision, Emission.ORT_CPU)
        ones = np.ones_like(folded.gain)
        wanted = tables or Tables(ones, 0 * ones)

        def run(feeds: dict[str, np.ndarray]) -> np.ndarray:
            def row(values: np.ndarray) -> np.ndarray:
                return values[int(feeds[STEP][0])][:, None, None]

            raw = (engine(feeds)[EPSILON].astype(np.float64) - row(folded.offset)) / row(folded.gain)
            return np.asarray(
                row(wanted.gain) * raw
                + row(wanted.offset)
                + row(wanted.sample_gain * ones) * feeds[SAMPLE].astype(np.float64)
            )

        return FakeEngine(run, engine.inputs)

    @cached_property
    def trajectories(self) -> Held:
        n, held_out, step = self.args.calibration, self.args.calibration // 2, self.args.batch_size
        parts = [
            range(start, min(start + step, part.stop))
            for part in (range(n), range(n, n + held_out))
            for start in range(part.start, part.stop, step)
        ]
        engine, batches = self.engine(FP32), []
        with progress(len(parts), "full-precision trajectories", "batch") as bar:
            for rows in parts:
                x, e = [], []
                self.sampling.sample(
                    lambda step: engine,
                    self.conditions(rows),
                    [CALIBRATION_STREAM + i for i in rows],
                    seed=0,
                    on_step=lambda i, x_t, epsilon, x=x, e=e: (x.append(x_t), e.append(epsilon)),
                )
                batches.append(Batch(rows, np.stack(x), np.stack(e), self.conditions(rows)))
                bar.update()
        return Held((), range(n), range(n, n + held_out), tuple(batches))

    def rows(self, p: Precision) -> dict[str, Callable[[], Tables]]:
        """What is compared: {name: its tables}."""
        ways: dict[str, Callable[[], Tables]] = {}
        for mode in ("none", "bias", "ptqd", "affine"):
            ways[mode] = lambda mode=mode: _of(Correction.from_stats(self.pooled(p), mode))
        ways["k alone"] = lambda: self._parts(p, k=True, bias=False)
        for mode in ("bias", "ptqd", "affine"):
            ways[f"{mode}, significant"] = lambda mode=mode: _of(gate(self.stats(p)[0], mode).correction)
        ways["ptqd, where it lowers the step's error"] = lambda: self._by_error(p)
        for level, name in ((None, "ptqd, own trajectory"), (0.05, "ptqd, own trajectory, significant")):
            ways[name] = lambda level=level: self._own(p, level)
        ways["ptqd and a term in x_t"] = lambda: self._with_x(p)
        return ways

    def stats(self, p: Precision) -> tuple[list[NoiseStats], list[NoiseStats]]:
        """Sums per trajectory: calibration, held out."""
        if p not in self._stats:
            found = measure(self.engine(p), self.sampling, self.trajectories, "all", f"noise of {p}")
            n = len(self.trajectories.calibration)
            self._stats[p] = found[:n], found[n:]
        return self._stats[p]

    @cached_property
    def _stats(self) -> dict[Precision, tuple[list[NoiseStats], list[NoiseStats]]]:
        return {}

    def pooled(self, p: Precision) -> NoiseStats:
        return NoiseStats.pool(self.stats(p)[0])

    def _parts(self, p: Precision, k: bool, bias: bool) -> Tables:
        every = np.ones(len(self.sampling), bool)
        return _of(Correction.of_parts(self.pooled(p), every & k, every & bias))

    def _by_error(self, p: Precision) -> Tables:
        """The former gate: a step keeps its correction where it lowers the squared error of that step on
        held-out trajectories, by more than a standard error."""
        found = Correction.from_stats(self.pooled(p), "ptqd")
        none = Correction.from_stats(self.pooled(p), "none")
        drops = [s.mse(none.gain, none.offset) - s.mse(found.gain, found.offset) for s in self.stats(p)[1]]
        kept = np.mean(drops, 0) > np.std(drops, 0, ddof=1) / np.sqrt(len(drops))
        return _of(found.at(kept, none))

    def _own(self, p: Precision, level: float | None) -> Tables:
        def correct(parts: list[NoiseStats]) -> Correction:
            return gate(parts, "ptqd", level=level).correction

        parts = measure_own(
            self.engine(p), self.engine(FP32), self.sampling, self.trajectories, 0, correct, what=f"own, {p}"
        )
        return _of(correct(parts))

    def _with_x(self, p: Precision) -> Tables:
        """D = k e + h x_t + mu by least squares, per step and channel; ec = (eq - mu - h x_t) / (1 + k)."""
        fit = [b for b in self.trajectories if b.indices.start in self.trajectories.calibration]
        engine, channels = self.engine(p), self.sampling.model.channels
        tables = np.zeros((3, len(self.sampling), channels))
        for i in range(len(self.sampling)):
            eq = np.concatenate([self.sampling.predict(engine, b.x[i], i, b.conditions) for b in fit])
            x, e = (np.concatenate([getattr(b, name)[i] for b in fit]) for name in ("x", "e"))
            for c in range(channels):
                columns = np.stack([e[:, c].ravel(), np.ones(e[:, c].size), x[:, c].ravel()], 1)
                k, mu, h = np.linalg.lstsq(columns, (eq - e)[:, c].ravel(), rcond=None)[0]
                tables[:, i, c] = np.array([1.0, -mu, -h]) / (1 + k)
        return Tables(*tables)

    def draw(self, engine: Engine, what: str) -> np.ndarray:
        n, size, parts = self.args.samples, self.args.batch_size, []
        with progress(n, what, "sample") as bar:
            for start in range(0, n, size):
                rows = range(start, min(start + size, n))
                parts.append(
                    self.sampling.sample(lambda i: engine, self.conditions(rows), rows, seed=self.args.seed)
                )
                bar.update(len(rows))
        return np.concatenate(parts)


def _of(correction: Correction) -> Tables:
    return Tables(correction.gain, correction.offset)


def run_all(lab: Lab) -> dict[tuple[str, str], dict]:
    """{(precision, row): result}; runs what is not in the log yet."""
    args, log = lab.args, OUT / "corrections.jsonl"
    setting = {
        "bundle": fingerprint(lab.bundle),
        **{name: getattr(args, name) for name in ("samples", "seed", "calibration")},
    }
    known = [json.loads(line) for line in log.read_text("utf-8").splitlines()] if log.exists() else []
    done = {tuple(entry["key"]): entry["result"] for entry in known if entry["setting"] == setting}
    truth = OUT / f"corrections-{setting['bundle']}-{args.samples}-{args.seed}.npy"
    if not truth.exists():
        np.save(truth, lab.draw(lab.engine(FP32), "full precision"))
    full = np.load(truth)
    for text in args.precision:
        p = Precision.parse(text)
        for name, tables in lab.rows(p).items():
            if (text, name) in done or (args.row and name not in args.row):
                continue
            x = lab.draw(lab.engine(p, tables()), f"{p}, {name}")
            away = excursions(x)
            result = {
                "psnr": [float(value) for value in psnr(x, full)],
                "share": away.share,
                "largest": away.largest,
            }
            done[text, name] = result
            entry = {"setting": setting, "key": [text, name], "result": result}
            with log.open("a", encoding="utf-8") as file:
                file.write(json.dumps(entry) + "\n")
    return done


def report(lab: Lab, done: dict[tuple[str, str], dict]) -> str:
    rng, rows = np.random.default_rng(0), []
    for text in lab.args.precision:
        plain = np.array(done[text, "none"]["psnr"]) if (text, "none") in done else None
        for name in lab.rows(Precision.parse(text)):
            if (text, name) not in done:
                continue
            result = done[text, name]
            values = np.array(result["psnr"])
            gained = "-"
            if plain is not None and name != "none":
                change = values - plain
                means = rng.choice(change, (BOOTSTRAPS, len(change))).mean(1)
                low, high = np.quantile(means, (0.025, 0.975))
                gained = f"{change.mean():+.2f} ({low:+.2f} to {high:+.2f})"
            away = f"{result['share']:.1%} ({result['largest']:.1f})"
            rows.append([text, name, f"{values.mean():.2f}", f"{np.median(values):.2f}", gained, away])
    header = ["precision", "correction", "PSNR to fp32, dB", "median"]
    header += ["change to none, dB (95 % interval)", "samples beyond ±1.5 (largest value)"]
    args, sampling = lab.args, lab.sampling
    return (
        f"{table(header, rows)}\n\n{sampling.model.name}, {len(sampling)} steps, eta 0, guidance "
        f"{sampling.guidance_scale:g}; {args.samples} samples of seed {args.seed}, corrections fitted on "
        f"{args.calibration} trajectories. {machine('onnxruntime')}."
    )


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--bundle", type=Path, default=REFERENCE_BUNDLE)
    parser.add_argument("--precision", nargs="+", default=["w8a8", "w4a8", "w4a4"])
    parser.add_argument("--row", nargs="+", help="only these corrections")
    parser.add_argument("--samples", type=int, default=2048)
    parser.add_argument("--calibration", type=int, default=32, help="trajectories; half as many are held out")
    parser.add_argument("--seed", type=int, default=7)
    parser.add_argument("--batch-size", type=int, default=32)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--write", action="store_true", help="put the table into docs/benchmarks.md")
    args = parser.parse_args()
    OUT.mkdir(parents=True, exist_ok=True)
    set_threads(args.threads)
    lab = Lab(args)
    text = report(lab, run_all(lab))
    print(text)
    if args.write:
        write_section("corrections", text)


if __name__ == "__main__":
    main()
