"""Evaluate plans of a bundle: paired samples, distances of sets, classes, runaway samples, guidance gap.

    report = evaluate(bundle, [Candidate(plan)], work=Path("work"))

All candidates share seeds and injected noise with the reference, so that samples compare by pairs.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np
import numpy.typing as npt

from .. import backends
from ..bundle.bundle import Bundle
from ..core.engine import Array
from ..core.pool import Connect
from ..core.precision import FP32
from ..errors import BundleError, RecipeError
from ..progress import progress
from ..runtime import Prompted, Runtime, usual_batch
from .candidates import Candidate, full_precision
from .features import Classifier, Data, Judged
from .guidance import SAMPLES, Gap, gap_of, gap_sums
from .kept import F32, Setting, draw_kept, missing_steps
from .metrics import SSIM_WINDOW, excursions, psnr, ssim
from .report import Difference, Distances, Paired, Report, Row
from .resampling import (
    Counts,
    Resampled,
    frechet_to,
    kernel_to_pair,
    kernel_to_set,
    mean_of,
    resample,
    share,
)

F64 = npt.NDArray[np.float64]
SEED = 2_310_059_657
"""Of evaluations: the README, the tests, the benchmarks and the default of every other command use others."""
NUM_SAMPLES, RESAMPLES, PART = 2048, 1000, 256
PSNR, SSIM, FRECHET, KERNEL = "PSNR, dB", "SSIM", "Frechet", "kernel"
TO_DATA = " to data"


@dataclass(frozen=True)
class _Measured:
    """A candidate's figures, by metric, before they become estimates."""

    candidate: Candidate
    values: Mapping[str, Resampled]
    psnr: F64 | None
    judged: Judged | None
    runaway: npt.NDArray[np.bool_]
    largest: float


def evaluate(
    bundle: Bundle | Path | str,
    candidates: Sequence[Candidate],
    *,
    work: Path,
    against: Candidate | None = None,
    num_samples: int = NUM_SAMPLES,
    seed: int = SEED,
    backend: str | None = None,
    batch_size: int | None = None,
    workers: int = 1,
    device: int = 0,
    tensors: Mapping[str, Array] | None = None,
    prompted: Prompted | None = None,
    asked: Sequence[int] | None = None,
    classifier: Path | None = None,
    data: Path | None = None,
    resamples: int = RESAMPLES,
    gaps: bool = True,
    connect: Connect | None = None,
    drawn: Callable[[Mapping[str, F64]], None] = lambda psnr: None,
) -> Report:
    """Sample every candidate and the reference, and compare them.

    Args:
        candidates: at least one, all different.
        work: folder that keeps the samples, and from which they are taken up; made if it is not there.
        against: the reference; None is full precision.
        num_samples: indices 0 to num_samples - 1 of `seed`, at least 2.
        backend: None is the best that works here.
        batch_size: samples at a time; None is as many as suit this machine's memory with a worker on each of
            its cores, so that the samples do not depend on how many there are.
        tensors: float conditions, one row per sample.
        prompted: prompts and their conditions; samples of a latent model are compared as pictures.
        asked: the classifier's class of each prompt, for models without class labels.
        classifier: an ONNX file, see `features.Classifier`; without it there are no distances and classes.
        data: a safetensors file, see `features.Data`.
        resamples: of the bootstrap; 0 gives no intervals.
        gaps: measure the guidance gap, where the model is guided.
        connect: opens the pool that samples, for a backend; in place of `workers`.
        drawn: called with the PSNR of each sample by candidate, (N,) each.
    Raises:
        PTQDError: as `run`; RecipeError for candidates or files that do not fit.
    """
    bundle = bundle if isinstance(bundle, Bundle) else Bundle.open(bundle)
    m = bundle.manifest
    reference = Candidate(full_precision(bundle)) if against is None else against
    candidates = [candidate for candidate in candidates if candidate != reference]
    _check(bundle, [reference, *candidates], num_samples, resamples, data, classifier)
    if asked is not None and len(asked) != (0 if prompted is None else len(prompted.prompts)):
        raise RecipeError(f"{len(asked)} classes were asked for: expected one for each prompt")
    labels = m.sampling.model.labels_in_turn(range(num_samples))
    if asked is not None:
        labels = [asked[i % len(asked)] for i in range(num_samples)]
    if tensors:
        m.sampling.model.conditions(None, num_samples, tensors)
    with contextlib.ExitStack() as stack:
        judge = None
        if classifier is not None:
            judge = stack.enter_context(contextlib.closing(Classifier(classifier, bundle.picture_shape)))
        known = None if data is None else Data.load(data)
        if backend is None:
            with Runtime(bundle, None, reference.plan, device=device) as runtime:
                backend = runtime.backend
        pool = None if connect is None else stack.enter_context(connect(backend))
        setting = Setting(
            bundle,
            backend,
            seed,
            num_samples,
            work,
            usual_batch(bundle, backend, backends.threads()) if batch_size is None else batch_size,
            tensors=tensors or {},
            workers=workers,
            device=device,
            prompted=prompted,
            pool=pool,
        )
        every = [reference, *candidates]
        found_gaps = _gaps(setting, every) if gaps and m.sampling.guided else None
        exact = _draw(setting, reference)
        counts = resample(num_samples, resamples)
        judged = None if judge is None else judge(exact)
        if judged is not None and known is not None and known.mean.shape != judged.features.shape[1:]:
            raise RecipeError(
                f"{data} holds features of {known.mean.shape} numbers, the classifier gives "
                f"{judged.features.shape[1:]}: take the statistics of this classifier"
            )
        found = [_measure(reference, exact, exact, judge, judged, known, counts)]
        for candidate in candidates:
            x = _draw(setting, candidate)
            found.append(_measure(candidate, x, exact, judge, judged, known, counts))
    drawn({one.candidate.name: one.psnr for one in found if one.psnr is not None})
    rows = tuple(
        _row(one, setting, found[0], labels, None if found_gaps is None else found_gaps[i])
        for i, one in enumerate(found)
    )
    return Report(
        model=m.sampling.model.name,
        bundle=bundle.seal,
        backend=backend,
        batch_size=setting.batch_size,
        steps=len(m.sampling),
        eta=m.sampling.schedule.eta,
        guidance_scale=m.sampling.guidance_scale,
        samples=num_samples,
        seed=seed,
        resamples=resamples,
        reference=reference.name,
        classifier=None if judge is None else judge.sha256,
        data=None if known is None else known.sha256,
        rows=rows,
        differences=tuple(_differences(found)),
        notes=tuple(_notes(setting, rows, judge is not None, known)),
    )


def _check(
    bundle: Bundle,
    every: Sequence[Candidate],
    num_samples: int,
    resamples: int,
    data: Path | None,
    classifier: Path | None,
) -> None:
    """Refuse what does not fit before any work."""
    if len(every) < 2:
        raise RecipeError(f"nothing is compared with {every[0].name}: give another plan by --plan")
    if num_samples < 2 or resamples < 0:
        raise RecipeError(f"{num_samples} samples and {resamples} resamples: give at least 2, and at least 0")
    if data is not None and classifier is None:
        raise RecipeError("statistics of data were given without the classifier that they are of: give both")
    names = [candidate.name for candidate in every]
    twice = next((name for name in names if names.count(name) > 1), None)
    if twice is not None:
        raise RecipeError(f"the plan {twice} was given twice: leave one out")
    for candidate in every:
        bundle.manifest.check_plan(candidate.plan)


def _draw(setting: Setting, candidate: Candidate) -> F32:
    with progress(missing_steps(setting, candidate), f"sampling {candidate.name}", "step") as bar:
        return draw_kept(setting, candidate, lambda steps: (bar.update(steps), None)[1])


def _gaps(setting: Setting, every: Sequence[Candidate]) -> list[Gap] | None:
    """The guidance gap of every candidate; None where the bundle holds no full precision."""
    try:
        full = full_precision(setting.bundle)
    except RecipeError:
        return None
    precisions = tuple(dict.fromkeys(p for candidate in every for p in candidate.plan.precisions))
    n = min(SAMPLES, setting.num_samples) * len(setting.bundle.manifest.sampling) * len(precisions)
    with progress(n, "guidance gap", "step") as bar:
        sums = gap_sums(setting, full, precisions, lambda steps: (bar.update(steps), None)[1])
    return [gap_of(candidate, setting, sums) for candidate in every]


def _measure(
    candidate: Candidate,
    x: F32,
    exact: F32,
    judge: Classifier | None,
    reference: Judged | None,
    data: Data | None,
    counts: Counts,
) -> _Measured:
    values: dict[str, Resampled] = {}
    own = x is exact
    pairs = None if own else _in_parts(psnr, x, exact)
    if pairs is not None and np.isfinite(pairs).all():
        values[PSNR] = mean_of(pairs, counts)
        if min(x.shape[2:]) >= SSIM_WINDOW:
            values[SSIM] = mean_of(_in_parts(ssim, x, exact), counts)
    else:
        pairs = None
    judged = reference
    if judge is not None and reference is not None:
        judged = reference if own else judge(x)
        if not own:
            values[FRECHET] = frechet_to(reference.features, judged.features, counts)
            values[KERNEL] = kernel_to_pair(reference.features, judged.features, counts)
        if data is not None:
            values[FRECHET + TO_DATA] = frechet_to((data.mean, data.covariance), judged.features, counts)
            if data.features is not None:
                values[KERNEL + TO_DATA] = kernel_to_set(data.features, judged.features, counts)
    away = np.array([excursions(sample[None]).count > 0 for sample in x])
    return _Measured(candidate, values, pairs, judged, away, float(np.abs(x).max()))


def _in_parts(metric: Callable[[F32, F32], F64], x: F32, exact: F32) -> F64:
    """A metric of pairs, a few at a time, which takes less memory."""
    return np.concatenate([metric(x[i : i + PART], exact[i : i + PART]) for i in range(0, len(x), PART)])


def _row(
    one: _Measured, setting: Setting, reference: _Measured, labels: Sequence[int] | None, gap: Gap | None
) -> Row:
    m, plan, values = setting.bundle.manifest, one.candidate.plan, one.values

    def distances(where: str) -> Distances | None:
        if FRECHET + where not in values:
            return None
        kernel = values.get(KERNEL + where)
        return Distances(
            values[FRECHET + where].estimate(lowest=0.0), None if kernel is None else kernel.estimate()
        )

    paired = None
    if one.psnr is not None:
        structure = values.get(SSIM)
        paired = Paired(
            values[PSNR].estimate(),
            float(np.median(one.psnr)),
            float(np.percentile(one.psnr, 5)),
            None if structure is None else structure.estimate(),
        )
    same = right = None
    if one.judged is not None and one.judged.classes is not None:
        assert reference.judged is not None and reference.judged.classes is not None
        if one is not reference:
            same = share(one.judged.classes == reference.judged.classes)
        if labels is not None:
            right = share(one.judged.classes == np.array(labels))
    return Row(
        name=one.candidate.name,
        plan=str(plan),
        paired=paired,
        to_reference=distances(""),
        to_data=distances(TO_DATA),
        same_class=same,
        right_class=right,
        runaway=share(one.runaway),
        largest=one.largest,
        gap=gap,
        bops=plan.total({p: float(n) for p, n in m.bops.items()}) / (len(plan) * _full_bops(setting.bundle)),
        milliseconds=_milliseconds(setting, one.candidate),
    )


def _full_bops(bundle: Bundle) -> float:
    """Bit operations of an evaluation at full precision."""
    m = bundle.manifest
    return float(m.bops[FP32]) if FP32 in m.bops else m.choice.bops_fp32 / len(m.sampling)


def _milliseconds(setting: Setting, candidate: Candidate) -> float | None:
    """Of all evaluations of a run, by the times in the manifest; None where one of them was not measured."""
    times = []
    for precision in candidate.plan.steps:
        with contextlib.suppress(BundleError):
            time_ms = setting.bundle.manifest.artifact(precision, setting.backend).time_ms
            times += [] if time_ms is None else [time_ms]
    return float(sum(times)) if len(times) == len(candidate.plan) else None


def _differences(found: Sequence[_Measured]) -> list[Difference]:
    """Of every candidate to the first; of distances to data, of every candidate to the reference."""
    reference, first, *others = found

    def between(one: _Measured, to: _Measured) -> list[Difference]:
        return [
            Difference(one.candidate.name, to.candidate.name, metric, (value - to.values[metric]).estimate())
            for metric, value in one.values.items()
            if metric in to.values
        ]

    to_reference = partial(between, to=reference)
    return [d for one in (first, *others) for d in to_reference(one)] + [
        d for one in others for d in between(one, first)
    ]


def _notes(setting: Setting, rows: Sequence[Row], judged: bool, data: Data | None) -> list[str]:
    notes = [note for row in rows if row.gap is not None and (note := row.gap.note(row.name)) is not None]
    if not judged:
        notes.append(
            "without --classifier there are no Frechet and kernel distances, and no agreement of classes"
        )
    elif data is None:
        notes.append("without --data-stats there are no distances to data")
    elif data.features is None:
        notes.append("the statistics of data hold no features: there is no kernel distance to data")
    notes += [
        f"{row.name}: some samples equal the reference's: no PSNR" for row in rows[1:] if row.paired is None
    ]
    return notes
