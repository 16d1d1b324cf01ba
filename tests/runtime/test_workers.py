"""run() from Python: paths as well as values, arguments checked as the command line checks them, batches and
workers."""

from __future__ import annotations

import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from helpers import Built

from ptqd_export import Runtime, run
from ptqd_export.core.plan import Plan, parse_plan
from ptqd_export.errors import BackendUnavailable, BundleError, PTQDError, RecipeError
from ptqd_export.runtime import workers


def test_paths_as_well_as_values(classes: Built) -> None:
    expected = run(classes.bundle, 2, seed=1)
    for bundle in (classes.path, str(classes.path)):
        np.testing.assert_array_equal(run(bundle, 2, seed=1), expected)
        with Runtime(bundle) as runtime:
            np.testing.assert_array_equal(runtime.sample(range(2), seed=1), expected)
            assert runtime.bundle.seal == classes.bundle.seal
    torch = [
        run(classes.path, 2, seed=1, backend="torch", model=m) for m in (classes.recipe, str(classes.recipe))
    ]
    np.testing.assert_array_equal(*torch)
    for nowhere in (classes.path / "nowhere", str(classes.path / "nowhere")):
        for opened in (run, Runtime):
            with pytest.raises(BundleError, match="nowhere is not a bundle"):
                opened(*((nowhere, 1) if opened is run else (nowhere,)))


@pytest.fixture
def untouched(monkeypatch: pytest.MonkeyPatch) -> None:
    """No engine is opened and no process started: what is refused is refused before any work."""

    def work(*arguments: object, **more: object) -> Any:
        raise AssertionError("work was begun")

    monkeypatch.setattr(workers, "Runtime", work)
    monkeypatch.setattr(workers, "ProcessPoolExecutor", work)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"num_samples": 0}, "num_samples is 0: give an integer of at least 1"),
        ({"num_samples": -3}, "num_samples is -3: give an integer of at least 1"),
        ({"num_samples": 2.0}, "num_samples is 2.0: give an integer"),
        ({"num_samples": True}, "num_samples is True: give an integer"),
        ({"batch_size": 0}, "batch_size is 0: give an integer of at least 1"),
        ({"workers": 0}, "workers is 0: give an integer of at least 1"),
        ({"workers": "2"}, "workers is '2': give an integer of at least 1"),
        ({"seed": -1}, r"seed is -1: give an integer from 0 to 2\^64 - 1"),
        ({"seed": 2**64}, "seed is 18446744073709551616: give an integer from 0"),
        ({"seed": 0.5}, "seed is 0.5: give an integer from 0"),
        ({"labels": [0, 1.5, 2]}, "class label 1.5 is not an integer: give class numbers"),
        ({"labels": ["0", "1", "2"]}, "class label '0' is not an integer"),
        ({"labels": [True, 1, 2]}, "class label True is not an integer"),
        ({"labels": [0, 1]}, "2 class labels for 3 samples: give one per sample"),
        ({"labels": [0, 1, 5]}, "class label 5 is out of range: classes has classes 0 to 4"),
        ({"labels": [0, 1, -1]}, "class label -1 is out of range"),
        ({"tensors": {"text": np.zeros((3, 2))}}, "has no tensor condition 'text': it takes class_labels"),
        ({"backend": "vulkan"}, "work was begun|backend 'vulkan' is not known"),
    ],
)
@pytest.mark.usefixtures("untouched")
def test_arguments_out_of_range(classes: Built, changes: dict[str, Any], message: str) -> None:
    """With workers and without: the same line."""
    for count in (1, 2):
        arguments = {"num_samples": 3, "workers": count, "batch_size": 1, **changes}
        with pytest.raises((RecipeError, AssertionError), match=message):
            run(classes.bundle, **arguments)


def test_arguments_in_range(classes: Built) -> None:
    """numpy's integers are integers; the largest seed is one."""
    x = run(classes.bundle, np.int64(2), list(np.arange(2)), seed=2**64 - 1, batch_size=np.int32(1))
    np.testing.assert_array_equal(x, run(classes.bundle, 2, seed=2**64 - 1, batch_size=1))
    with Runtime(classes.bundle) as runtime:
        for seed in (-1, 2**64, 1.0, "1", True):
            with pytest.raises(RecipeError, match=r"seed is .*: give an integer from 0"):
                runtime.sample([0], seed=seed)  # type: ignore[arg-type]
        with pytest.raises(RecipeError, match=r"class label 1.0 is not an integer"):
            runtime.sample([0], [1.0])  # type: ignore[list-item]


def test_an_unknown_backend(classes: Built) -> None:
    for opened in (
        lambda: run(classes.bundle, 1, backend="vulkan"),
        lambda: Runtime(classes.bundle, "vulkan"),
    ):
        with pytest.raises(PTQDError, match="backend 'vulkan' is not known: expected one of tensorrt"):
            opened()


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("w8a8*1", r"the plan has 1 steps, the bundle 3: give a precision for each, such as w8a8\*3"),
        ("", r"the plan has 0 steps, the bundle 3: give a precision for each, such as fp32\*3"),
        (
            "w8a8*2 w6a8*1",
            "the plan asks for w6a8, but the bundle holds fp32, w8a8, w4a8, w4a4: take those, or rebuild "
            "with --precision w6a8",
        ),
    ],
)
@pytest.mark.usefixtures("untouched")
def test_a_plan_that_is_not_over_the_bundle(classes: Built, text: str, message: str) -> None:
    plan = Plan.from_plain(text)
    for call in (
        lambda: run(classes.bundle, 2, plan=plan),
        lambda: run(classes.bundle, 2, plan=plan, workers=2, batch_size=1, backend="ort-cpu"),
        lambda: Runtime(classes.bundle, plan=plan),
    ):
        with pytest.raises(RecipeError, match=message):
            call()


def test_workers_take_the_plan(classes: Built) -> None:
    """Another than the bundle's own, and with it the engines and sigma' of that plan."""
    plan = parse_plan("w4a4*1,fp32*2", 3)
    alone = run(classes.bundle, 2, seed=1, plan=plan, batch_size=1)
    with Runtime(classes.bundle, plan=plan) as runtime:
        assert set(runtime.engines) == set(plan.precisions)
        by_hand = classes.bundle.manifest.sampling.sample(
            lambda step: runtime.engines[plan.steps[step]],
            classes.bundle.manifest.sampling.model.conditions([0, 1], 2),
            range(2),
            seed=1,
            sigmas=classes.bundle.sigmas("ort-cpu", plan),
        )
    np.testing.assert_allclose(alone, by_hand, atol=1e-5 * np.abs(alone).max())
    split = run(classes.bundle, 2, seed=1, plan=plan, batch_size=1, workers=2)
    np.testing.assert_allclose(split, alone, atol=1e-5 * np.abs(alone).max())
    assert np.abs(run(classes.bundle, 2, seed=1, batch_size=1) - alone).max() > 1e-3


def test_more_samples_than_memory(classes: Built) -> None:
    """Are found out at once, not after a list of all their batches."""
    started = time.monotonic()
    with pytest.raises(MemoryError):
        run(classes.bundle, 10**15, workers=2)
    assert time.monotonic() - started < 5


def test_the_runtime_is_told_before_anything_is_sampled(classes: Built) -> None:
    """That of this process, once: which backend it is, and why not a better one."""
    told: list[str] = []
    for count in (1, 2):
        told.clear()
        run(
            classes.bundle,
            4,
            batch_size=1,
            workers=count,
            opened=lambda runtime: told.append(f"opened {runtime.backend}"),
            advance=lambda steps: told.append("sampled"),
        )
        assert told[0] == "opened ort-cpu" and set(told[1:]) == {"sampled"}
    told.clear()
    run(
        classes.bundle,
        4,
        batch_size=2,
        workers=2,
        backend="ort-cpu",
        opened=lambda runtime: told.append("opened"),
    )
    assert told == []  # the workers have their own


def test_a_bundle_that_is_replaced_during_a_run(classes: Built, own: Built, tmp_path: Path) -> None:
    """A worker opens it later: another bundle by then is refused, not sampled from."""
    opened = replace(classes.bundle, path=own.path)
    with pytest.raises(
        BundleError, match="was replaced by another bundle during this run: run the command again"
    ):
        run(opened, 4, batch_size=1, workers=2, backend="ort-cpu")


def test_errors_of_workers_arrive_as_they_are(classes: Built, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(BundleError, match="give --model RECIPE_OR_MODEL"):
        run(classes.bundle, 4, batch_size=1, workers=2, backend="torch")
    with pytest.raises((BackendUnavailable, BundleError), match=r"no engines for backend|not installed"):
        run(classes.bundle, 4, batch_size=1, workers=2, backend="tensorrt")
