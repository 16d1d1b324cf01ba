"""The fraction done of a build."""

from __future__ import annotations

from ptqd_export.backends.trt.progress import Progress


def test_progress() -> None:
    """Phases of one step each may follow one another: the fraction waits and never falls."""
    progress = Progress()
    progress.start("all", None, 2)
    seen = []
    for _ in range(2):
        progress.start("part", "all", 4)
        for step in range(4):
            progress.step("part", step)
            seen.append(progress.fraction)
        progress.finish("part")
    assert seen == [0.125, 0.25, 0.375, 0.5, 0.5, 0.5, 0.5, 0.5]
    progress.step("all", 0)
    progress.start("part", "all", 1)
    progress.step("part", 0)
    progress.step("unheard of", 0)
    assert progress.fraction == 1.0
