"""evaluate() on a real bundle: figures by hand, samples that are kept, other corrections."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from classifiers import write_classifier
from helpers import Built
from safetensors.numpy import save_file

from ptqd_export import run
from ptqd_export.core.backend import Emission
from ptqd_export.core.noise import Correction
from ptqd_export.core.plan import parse_plan
from ptqd_export.core.precision import Precision
from ptqd_export.errors import RecipeError
from ptqd_export.evaluate import SEED, Candidate, Report, evaluate, kept, markdown
from ptqd_export.evaluate.candidates import correct
from ptqd_export.evaluate.guidance import Gap
from ptqd_export.evaluate.metrics import psnr
from ptqd_export.runtime import Runtime, draw

N = 6


def plan(text: str) -> Candidate:
    return Candidate(parse_plan(text, 3))


@pytest.fixture(scope="module")
def work(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("work")


@pytest.fixture(scope="module")
def report(guided: Built, work: Path) -> Report:
    write_classifier(work / "c.onnx", (1, 8, 8))
    save_file({"features": np.random.default_rng(0).standard_normal((20, 4))}, work / "d.safetensors")
    return evaluate(
        guided.bundle,
        [plan("w8a8"), plan("w4a4*2,fp32")],
        work=work / "samples",
        num_samples=N,
        batch_size=4,
        classifier=work / "c.onnx",
        data=work / "d.safetensors",
        resamples=20,
    )


def test_figures_are_those_of_the_samples(guided: Built, report: Report) -> None:
    bundle = guided.bundle
    exact, x = (
        run(bundle, N, seed=SEED, batch_size=4, plan=plan(text).plan) for text in ("fp32", "w4a4*2,fp32")
    )
    values = psnr(x.astype(np.float32), exact.astype(np.float32))
    full, first, row = report.rows
    assert [full.name, first.name, row.name] == ["fp32*3", "w8a8*3", "w4a4*2 fp32*1"]
    assert report.reference == full.name and full.paired is None and full.to_reference is None
    assert row.paired is not None and row.paired.ssim is None  # 8x8 is smaller than its window
    assert row.paired.psnr.value == pytest.approx(values.mean())
    assert row.paired.psnr_median == pytest.approx(np.median(values))
    assert row.paired.psnr_p5 == pytest.approx(np.percentile(values, 5))
    away = (np.abs(x) > 1.5).any(axis=(1, 2, 3)).mean()
    assert row.runaway.value == away and row.largest == pytest.approx(np.abs(x).max())
    assert row.to_reference is not None and row.to_data is not None and row.to_data.kernel is not None
    assert full.to_data is not None and full.right_class is not None and full.same_class is None
    assert row.same_class is not None and 0 <= row.same_class.value <= 1
    bops = bundle.manifest.bops
    w4a4, fp32 = bops[Precision(4, 4)], bops[Precision(32, 32)]
    assert row.bops == pytest.approx((2 * w4a4 + fp32) / (3 * fp32)) and full.bops == 1
    assert first.paired is not None and first.paired.psnr.value > row.paired.psnr.value


def test_differences_are_between_the_rows(report: Report) -> None:
    full, first, row = report.rows
    found = {(d.name, d.to, d.metric): d.difference for d in report.differences}
    assert row.paired is not None and first.paired is not None
    assert found[row.name, first.name, "PSNR, dB"].value == pytest.approx(
        row.paired.psnr.value - first.paired.psnr.value
    )
    assert full.to_data is not None and row.to_data is not None
    assert found[row.name, full.name, "Frechet to data"].value == pytest.approx(
        row.to_data.frechet.value - full.to_data.frechet.value
    )
    assert (row.name, full.name, "PSNR, dB") not in found


def test_the_gap_is_that_of_both_branches(guided: Built, report: Report) -> None:
    """Of full precision 1 everywhere, also where a plan has full precision; of w4a4 by hand at step 0."""
    full, first, row = (r.gap for r in report.rows)
    assert full is not None and row is not None and first is not None
    np.testing.assert_allclose((full.ratio, full.along), 1)
    assert row.ratio[2] == pytest.approx(1) and abs(row.ratio[0] - 1) > 1e-4
    sampling = guided.bundle.manifest.sampling
    labels = sampling.model.labels_in_turn(range(N))
    conditions = sampling.model.conditions(labels, N)
    seen: dict[int, Any] = {}
    gaps = []
    for text in ("fp32", "w4a4"):
        with Runtime(guided.bundle, plan=plan(text).plan) as runtime:
            engine = next(iter(runtime.engines.values()))
            if not seen:
                sampling.sample(
                    lambda step, e=engine: e, conditions, range(N), seed=SEED,
                    on_step=lambda step, x, epsilon: seen.setdefault(step, x),
                )  # fmt: skip
            null, with_class = np.split(engine(sampling.feeds(seen[1], 1, conditions))["epsilon"], 2)
            gaps.append(with_class - null)
    f, g = gaps
    assert row.ratio[1] == pytest.approx(np.sqrt((g**2).sum() / (f**2).sum()), rel=1e-3)
    assert row.along[1] == pytest.approx((g * f).sum() / (f**2).sum(), rel=1e-3)


def test_a_gap_that_departs_gets_a_line() -> None:
    assert Gap((1.0, 0.96), (1.04, 1.0)).note("x") is None
    note = Gap((1.0, 1.01, 1.2), (0.9, 1.0, 0.99)).note("w4a4*3")
    assert note is not None and note.startswith("w4a4*3: the guidance gap departs by more than 5% at 2 of 3")
    assert "most at step 2: 1.20 of full precision's, 0.99 along it" in note


def test_samples_are_drawn_once(
    guided: Built, report: Report, work: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The same again draws nothing; more samples draw those; a damaged file and another seed draw anew."""
    drawn: list[range] = []

    def counting(bundle: Any, batches: Any, **options: Any) -> Any:
        for indices, x in draw(bundle, batches, **options):
            drawn.append(indices)
            yield indices, x

    monkeypatch.setattr(kept, "draw", counting)

    def again(**changes: Any) -> Report:
        drawn.clear()
        settings = {"num_samples": N, "batch_size": 4, "resamples": 0, **changes}
        return evaluate(guided.bundle, [plan("w8a8")], work=work / "samples", **settings)

    first = report.rows[1]
    assert first.paired is not None
    found = again().rows[1]
    assert drawn == [] and found.paired is not None
    assert found.paired.psnr.value == first.paired.psnr.value and found.gap == first.gap
    again(num_samples=4)
    assert drawn == []
    again(num_samples=N + 1)
    assert drawn == [range(N, N + 1)] * 2
    again(seed=1)
    assert drawn == [range(0, 4), range(4, N)] * 2
    for file in (work / "samples").rglob("000000-000004.npy"):
        file.write_bytes(file.read_bytes()[:-7])
    again(batch_size=16)
    assert drawn == [range(0, 4)] * 2


def test_a_stop_leaves_what_is_done(guided: Built, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def stopped(bundle: Any, batches: Any, **options: Any) -> Any:
        yield next(iter(draw(bundle, batches, **options)))
        raise KeyboardInterrupt

    settings: dict[str, Any] = {"work": tmp_path, "num_samples": 4, "batch_size": 2, "resamples": 0}
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(kept, "draw", stopped)
        evaluate(guided.bundle, [plan("w8a8")], **settings)
    assert [file.name for file in tmp_path.rglob("0*.npy")] == ["000000-000002.npy"]
    again = evaluate(guided.bundle, [plan("w8a8")], **settings)
    fresh = evaluate(guided.bundle, [plan("w8a8")], **{**settings, "work": tmp_path / "b"})
    assert again.rows == fresh.rows


def test_other_corrections(guided: Built, tmp_path: Path) -> None:
    """Each mode is another run; the folded one by hand is the bundle's own; none undoes what is folded."""
    bundle, p = guided.bundle, Precision(4, 8)
    modes = [Candidate(parse_plan("w4a8", 3), mode) for mode in ("none", "bias", "k", "both", "affine")]
    own = Candidate(parse_plan("w4a8", 3))
    by_hand = replace(own, recalibrate=bundle.manifest.recalibrate_variance)
    found: dict[str, Any] = {}
    report = evaluate(
        bundle, [own, by_hand, *modes], work=tmp_path, num_samples=3, resamples=0, drawn=found.update
    )
    assert [row.name for row in report.rows[1:]] == [c.name for c in (own, by_hand, *modes)]
    np.testing.assert_allclose(found[by_hand.name], found[own.name], atol=0.2)
    assert len({round(float(found[c.name].mean()), 6) for c in modes}) == len(modes)
    stats = bundle.stats(p, Emission.ORT_CPU)
    replaced = modes[0].replaced(bundle, "ort-cpu")
    assert replaced is not None
    with (
        Runtime(bundle, plan=own.plan, replaced=replaced) as raw,
        Runtime(bundle, plan=own.plan) as runtime,
    ):
        sampling = bundle.manifest.sampling
        conditions = sampling.model.conditions([0, 1], 2)
        x = np.random.default_rng(0).standard_normal((2, 1, 8, 8))
        folded = bundle.correction(p, Emission.ORT_CPU)
        for step in range(3):
            a = sampling.predict(raw.engines[p], x, step, conditions)
            b = sampling.predict(runtime.engines[p], x, step, conditions)
            undone = folded.gain[step][:, None, None] * a + folded.offset[step][:, None, None]
            np.testing.assert_allclose(undone, b, atol=1e-5)
    assert not np.array_equal(correct(stats, "both").gain, Correction.from_stats(stats, "none").gain)


def test_modes_are_the_parts_of_ptqd(guided: Built) -> None:
    stats = guided.bundle.stats(Precision(4, 8), Emission.ORT_CPU)
    both, bias, k, none = (correct(stats, mode) for mode in ("both", "bias", "k", "none"))
    np.testing.assert_array_equal(k.gain, both.gain)
    assert not k.offset.any() and (bias.gain == 1).all()
    # The mean of D is what is left without an offset.
    np.testing.assert_allclose(stats.corrected(bias).d, 0, atol=1e-9 * np.abs(stats.d).max())
    assert (bias.var == none.var).all() and (both.var == k.var).all() and (both.var != none.var).any()
    with pytest.raises(RecipeError, match="'gain' is not known"):
        correct(stats, "gain")  # type: ignore[arg-type]


def test_recalibration_on_and_off(guided: Built) -> None:
    """sigma' of the same tables as the bundle's own, or sigma."""
    bundle = guided.bundle
    own = parse_plan("w4a4*2,w8a8", 3)
    on, off = (Candidate(own, recalibrate=flag).replaced(bundle, "ort-cpu") for flag in (True, False))
    assert on is not None and off is not None and bundle.manifest.recalibrate_variance
    np.testing.assert_array_equal(on.sigmas, bundle.sigmas("ort-cpu", own))
    np.testing.assert_array_equal(off.sigmas, bundle.manifest.sampling.schedule.sigmas)
    assert (on.sigmas < off.sigmas).any()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"candidates": ["fp32"]}, r"nothing is compared with fp32\*3: give another plan"),
        ({"candidates": ["w8a8", "w8a8"]}, r"the plan w8a8\*3 was given twice"),
        ({"candidates": ["w6a6"]}, "the plan asks for w6a6, but the bundle holds"),
        ({"num_samples": 1}, "1 samples and 5 resamples: give at least 2"),
        ({"data": Path("x")}, "without the classifier that they are of"),
        ({"classifier": Path("nowhere.onnx")}, "nowhere.onnx does not exist"),
    ],
)
def test_refused_before_any_work(
    guided: Built, changes: dict[str, Any], message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(kept, "draw", None)
    settings = {"candidates": ["w8a8"], "num_samples": 4, "resamples": 5, **changes}
    candidates = [plan(text) for text in settings.pop("candidates")]
    with pytest.raises(RecipeError, match=message):
        evaluate(guided.bundle, candidates, work=tmp_path, **settings)
    assert list(tmp_path.iterdir()) == []


def test_data_of_another_classifier(guided: Built, report: Report, work: Path, tmp_path: Path) -> None:
    save_file({"features": np.zeros((5, 3))}, tmp_path / "d.safetensors")
    with pytest.raises(RecipeError, match=r"features of \(3,\) numbers, the classifier gives \(4,\)"):
        evaluate(
            guided.bundle,
            [plan("w8a8")],
            work=work / "samples",
            num_samples=N,
            classifier=work / "c.onnx",
            data=tmp_path / "d.safetensors",
        )


def test_the_text_has_every_row_and_note(report: Report) -> None:
    text = markdown(report)
    for row in report.rows:
        assert f"| {row.name} |" in text
    assert all(f"note: {note}" in text for note in report.notes) and "95% intervals" in text
    bare = replace(report, classifier=None, differences=(), resamples=0, notes=("n",))
    assert "Frechet" not in markdown(bare) and "intervals" not in markdown(bare)
