"""Statistics of whole networks: two right executions agree, wrong ones do not, and few trajectories say
little."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest

from ptqd_export.core.engine import Array
from ptqd_export.core.figures import LayerFigures, QuantizedFigures
from ptqd_export.core.noise import Correction, NoiseStats
from ptqd_export.errors import ParityError
from ptqd_export.parity.judgement import HALF
from ptqd_export.parity.noise import FEW, MARGIN, STATISTICS, check_noise, margin, max_standard_errors

N, C, PIXELS = 16, 2, 400


def stats(
    rng: np.random.Generator, t: int, noise: float, bias: float = 0.0, e: list[Array] | None = None
) -> list[NoiseStats]:
    """N trajectories of t steps; the same e wherever the same list is given."""
    parts = []
    for n in range(N):
        total = NoiseStats.zeros(t, C)
        for step in range(t):
            x = rng.standard_normal((1, C, PIXELS)) if e is None else np.asarray(e[n * t + step], np.float64)
            total += NoiseStats.of_step(step, t, x, x + noise * rng.standard_normal(x.shape) + bias)
        parts.append(total)
    return parts


def test_noise_of_two_right_executions_agrees_and_of_a_wrong_one_does_not(rng: np.random.Generator) -> None:
    t = 5
    e: list[Array] = [rng.standard_normal((1, C, PIXELS)) for _ in range(N * t)]
    simulated = stats(rng, t, 0.1, e=e)
    good = check_noise("x", stats(rng, t, 0.1, e=e), simulated)
    assert good.limit_z is not None and max(good.largest_z.values()) < good.limit_z < 6
    for wrong, what in [
        (stats(rng, t, 0.12, e=e), "var|mse"),
        (stats(rng, t, 0.1, bias=0.02, e=e), "bias|mse"),
    ]:
        with pytest.raises(ParityError, match=what):
            check_noise("x", wrong, simulated)
    k = Correction(np.full((t, C), 1.02), np.zeros((t, C)), np.zeros(t))
    with pytest.raises(ParityError, match="k at step"):
        check_noise("x", [s.corrected(k) for s in stats(rng, t, 0.1, e=e)], simulated)


def test_steps_that_are_not_judged_count_for_nothing(rng: np.random.Generator) -> None:
    """Their sums are zero on both sides; a wrong one that is judged is named by its number in the run."""
    t, judged = 9, [0, 4, 8]
    e: list[Array] = [rng.standard_normal((1, C, PIXELS)) for _ in range(N * t)]
    simulated = [s.only(judged) for s in stats(rng, t, 0.1, e=e)]
    right = check_noise("x", [s.only(judged) for s in stats(rng, t, 0.1, e=e)], simulated)
    assert len(right.mse_ratio) == len(right.snr_q_corrected) == len(judged)
    assert all(0.9 < ratio < 1.1 for ratio in right.mse_ratio)
    noisier = [
        a.only([0, 8]) + b.only([4])
        for a, b in zip(stats(rng, t, 0.1, e=e), stats(rng, t, 0.2, e=e), strict=True)
    ]
    with pytest.raises(ParityError, match="at step 4 is"):
        check_noise("x", noisier, simulated)


def test_float16_in_between_is_let_pass_and_no_more(rng: np.random.Generator) -> None:
    """An error that is a function of e, the same in every trajectory, has next to no spread: rounding to
    float16 passes only where it is said."""
    t = 5
    e: list[Array] = [rng.standard_normal((1, C, PIXELS)) for _ in range(N * t)]

    def engine(error: Callable[[Array], Array]) -> list[NoiseStats]:
        seeded = np.random.default_rng(1)
        parts = []
        for n in range(N):
            total = NoiseStats.zeros(t, C)
            for step in range(t):
                x = np.asarray(e[n * t + step], np.float64)
                total += NoiseStats.of_step(step, t, x, x + 1e-3 * seeded.standard_normal(x.shape) + error(x))
            parts.append(total)
        return parts

    simulated = engine(lambda x: 0.0 * x)
    halved = engine(lambda x: HALF * np.abs(x))
    with pytest.raises(ParityError, match=r"bias|var|mse|k at"):
        check_noise("x", halved, simulated)
    figures = check_noise("x", halved, simulated, HALF)
    assert figures.limit_z is not None and max(figures.largest_z.values()) < figures.limit_z
    with pytest.raises(ParityError):
        check_noise("x", engine(lambda x: 20 * HALF * np.abs(x)), simulated, HALF)


def test_a_right_engine_rarely_fails(rng: np.random.Generator) -> None:
    """The limit holds its promise: no failure in 40 pairs of right executions, for each of four statistics
    over all steps."""
    t = 4
    for _ in range(40):
        e: list[Array] = [rng.standard_normal((1, C, 50)) for _ in range(N * t)]
        check_noise("x", stats(rng, t, 0.1, e=e), stats(rng, t, 0.1, e=e))


def same(
    rng: np.random.Generator, k: float, bias: float, noise: float, e: list[Array], t: int
) -> list[NoiseStats]:
    """N trajectories of t steps whose noise has a k and a bias to the last digit, and a given rest."""
    parts = []
    for n in range(N):
        total = NoiseStats.zeros(t, C)
        for step in range(t):
            x = np.asarray(e[n * t + step], np.float64)
            total += NoiseStats.of_step(step, t, x, x + k * x + bias + noise * rng.standard_normal(x.shape))
        parts.append(total)
    return parts


def test_what_makes_no_difference_is_none() -> None:
    """Noise that is small and the same in every trajectory: a right engine is 0.1 % of its k away, which is
    many standard errors, and a wrong one 10 % of its k or half of its bias."""
    rng, t = np.random.default_rng(0), 4
    e: list[Array] = [rng.standard_normal((1, C, PIXELS)) for _ in range(N * t)]

    def engine(k: float, bias: float) -> list[NoiseStats]:
        return same(np.random.default_rng(1), k, bias, 1e-6, e, t)

    simulated = engine(-0.0002715, 1e-4)
    right = check_noise("x", engine(-0.0002712, 1.001e-4), simulated)
    assert max(right.largest_z.values()) == 0.0
    for wrong, what in ((engine(-0.0002443, 1e-4), "k"), (engine(-0.0002715, 1.5e-4), "bias|mse")):
        with pytest.raises(ParityError, match=rf"({what}) at step \d is .* beyond what makes no difference"):
            check_noise("x", wrong, simulated)


@pytest.mark.parametrize(
    ("k", "bias", "noise"), [(0.0, 0.0, 0.1), (0.1, 0.0, 0.01), (0.0, 0.1, 0.01), (-0.05, 0.05, 0.05)]
)
def test_a_margin_moves_the_end_result_by_its_share(k: float, bias: float, noise: float) -> None:
    """At the end of t steps: what is random adds up as powers, what is systematic as amplitudes."""
    rng, t = np.random.default_rng(2), 8
    e: list[Array] = [rng.standard_normal((1, C, PIXELS)) for _ in range(N * t)]
    simulated = NoiseStats.pool(same(rng, k, bias, noise, e, t))
    found = {name: margin(name, simulated) for name in STATISTICS}
    assert {name: value.shape for name, value in found.items()} == {
        "k": (t,), "bias": (t, C), "var": (t,), "mse": (t,)
    }  # fmt: skip

    power = simulated.ee.mean(1) / simulated.count
    systematic = simulated.k**2 * power + (simulated.bias**2).mean(1)
    before = t * (found["mse"] / MARGIN - systematic) + t**2 * systematic
    more_k = t**2 * ((np.abs(simulated.k) + found["k"]) ** 2 - simulated.k**2) * power
    more_bias = t**2 * ((np.abs(simulated.bias) + found["bias"]) ** 2 - simulated.bias**2)
    np.testing.assert_allclose(more_k / before, MARGIN, rtol=1e-6)
    np.testing.assert_allclose(more_bias / before[:, None], MARGIN, rtol=1e-6)
    np.testing.assert_allclose(found["var"], MARGIN * simulated.var)
    np.testing.assert_allclose(found["mse"], MARGIN * (noise**2 + k**2 + bias**2), rtol=0.1)


def test_where_there_is_no_noise_there_is_no_margin() -> None:
    rng = np.random.default_rng(3)
    e: list[Array] = [rng.standard_normal((1, C, PIXELS)) for _ in range(N * 2)]
    exact = same(rng, 0.0, 0.0, 0.0, e, 2)
    assert all(np.abs(margin(name, NoiseStats.pool(exact))).max() == 0 for name in STATISTICS)
    silent = NoiseStats.zeros(2, C)
    assert all(np.isfinite(margin(name, silent)).all() for name in STATISTICS)
    with pytest.raises(ParityError):
        check_noise("x", same(rng, 1e-3, 0.0, 0.0, e, 2), exact)


@pytest.mark.parametrize("n", [2, FEW - 1, FEW])
def test_a_limit_of_few_trajectories_is_not_called_a_check(rng: np.random.Generator, n: int) -> None:
    """It still stops what is beyond it: that of two is more than a hundred times as wide as that of eight."""
    t = 5
    e: list[Array] = [rng.standard_normal((1, C, PIXELS)) for _ in range(N * t)]
    figures = check_noise("x", stats(rng, t, 0.1, e=e)[:n], stats(rng, t, 0.1, e=e)[:n])
    limit = max_standard_errors(n, t * (3 + C))
    assert max(figures.largest_z.values()) <= limit
    told = QuantizedFigures(0.0, LayerFigures(3, 100, 0.0, 0.0), figures).summary()
    if n < FEW:
        assert figures.limit_z is None and told.endswith("; noise not judged: too few held-out trajectories")
    else:
        assert figures.limit_z == pytest.approx(limit, abs=1e-3)
        assert told.endswith(f" standard errors (limit {limit:.1f})")
    assert max_standard_errors(2, t) > 100 * max_standard_errors(FEW, t) > 500
    k = Correction(np.full((t, C), 2.0), np.zeros((t, C)), np.zeros(t))
    if n > 2:
        with pytest.raises(ParityError, match=r"k at step \d is .* standard errors apart"):
            check_noise(
                "x", [s.corrected(k) for s in stats(rng, t, 0.1, e=e)[:n]], stats(rng, t, 0.1, e=e)[:n]
            )


def test_figures_per_step(rng: np.random.Generator) -> None:
    """The ratio of the errors, and the SNR that is left; none where there is no noise."""
    t = 2
    e: list[Array] = [rng.standard_normal((1, C, PIXELS)) for _ in range(N * t)]
    figures = check_noise("x", stats(rng, t, 0.1, e=e), stats(rng, t, 0.1, e=e))
    assert len(figures.mse_ratio) == t and all(0.9 < ratio < 1.1 for ratio in figures.mse_ratio)
    assert all(snr is not None and 90 < snr < 110 for snr in figures.snr_q_corrected)
    assert set(figures.largest_z) == {"k", "bias", "var", "mse"}
    exact = stats(rng, t, 0.0, e=e)
    assert check_noise("x", exact, exact).snr_q_corrected == (None, None)
