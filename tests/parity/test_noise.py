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
from ptqd_export.parity.noise import FEW, check_noise, max_standard_errors

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
