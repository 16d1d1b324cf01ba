"""Solvers, each written once as in its paper, and compiled into the one table that everything else knows.

The state x is what the network sees: x = alpha x_0 + sigma e, with alpha^2 = abar and sigma^2 = 1 - abar.
Solvers that are stated for x / alpha (Euler, Heun) are compiled into it. One evaluation of the network gives
y, its prediction of e, and from it

    x_0 = (x - sigma e) / alpha, clipped where the schedule clips

Where alpha is nothing (zero terminal SNR), e says nothing of x_0, and y is v = alpha e - sigma x_0 instead:
x_0 = alpha x - sigma y, e = alpha y + sigma x.

A solver makes the next state, and whatever it keeps for later, as sums of x_0, y, x, fresh noise z and what
it kept before, each times a number that is known in advance. So it is run here once, on such sums: vectors
over these terms (`SYMBOLS`). What comes out is the table. The semantics are those of diffusers 0.42.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Literal, Protocol

import numpy as np
import numpy.typing as npt

F64 = npt.NDArray[np.float64]
Solver = Literal[
    "ddim",
    "ddpm",
    "pndm",
    "dpmsolver++",
    "sde-dpmsolver++",
    "euler",
    "euler-ancestral",
    "heun",
    "unipc",
    "lcm",
]
Variant = Literal["", "fixed_small", "fixed_large", "plms", "prk", "midpoint", "heun", "bh1", "bh2"]
CLEAN, PREDICTION, STATE, NOISE, KEPT = range(5)
"""Columns of the table: x_0, y, x, z; then what was kept, one after the other."""
MAX_KEPT = 5
"""Most tensors that a solver keeps between evaluations: PNDM's Runge-Kutta steps."""
SYMBOLS: F64 = np.eye(KEPT + MAX_KEPT)
FEW_STEPS = 15
"""Below it, DPM-Solver++ lowers its order in the last steps (`Options.lower_order_final`)."""
ADAMS_BASHFORTH = (
    (1.0,),
    (3 / 2, -1 / 2),
    (23 / 12, -16 / 12, 5 / 12),
    (55 / 24, -59 / 24, 37 / 24, -9 / 24),
)
"""Weights of the last predictions, newest first, by their number."""
SIGMA_DATA = 0.5
"""Of the boundary condition of LCM (Luo et al. 2023, section 4.1)."""


@dataclass(frozen=True)
class Options:
    """Settings of a solver, named as in diffusers' scheduler configs.

    Attributes:
        variant: variance_type of ddpm, plms or prk (Runge-Kutta first) of pndm, solver_type of the others.
        order: solver_order.
        lower_order_final, euler_at_final: a lower order in the last steps.
        disable_corrector: steps that UniPC does not correct.
        predict_x0: UniPC's history is of x_0 and not of e.
        timestep_scaling: of LCM's boundary condition.
    """

    variant: Variant = ""
    order: int = 1
    lower_order_final: bool = True
    euler_at_final: bool = False
    disable_corrector: tuple[int, ...] = ()
    predict_x0: bool = True
    timestep_scaling: float = 10.0


class Inputs(Protocol):
    """What a solver is compiled from; see `NoiseSchedule`."""

    @property
    def solver(self) -> Solver: ...
    @property
    def timesteps(self) -> npt.NDArray[np.int64] | npt.NDArray[np.float32]: ...
    @property
    def alphas_cumprod(self) -> F64: ...
    @property
    def alphas_cumprod_from(self) -> F64: ...
    @property
    def alphas_cumprod_prev(self) -> F64: ...
    @property
    def eta(self) -> float: ...
    @property
    def prediction_type(self) -> str: ...
    @property
    def velocity(self) -> npt.NDArray[np.bool_]: ...
    @property
    def options(self) -> Options: ...


class Level:
    """A noise level: abar, alpha, sigma; `ratio` is sigma / alpha, `log_snr` is log(alpha / sigma)."""

    def __init__(self, abar: np.float64) -> None:
        self.abar, self.alpha, self.sigma = abar, np.sqrt(abar), np.sqrt(1 - abar)
        self.ratio = self.sigma / self.alpha
        self.log_snr = np.log(self.alpha) - np.log(self.sigma)


class Run:
    """A run of a solver on sums of symbols.

    Attributes:
        n: evaluations.
        at, start, to: noise level at which evaluation k predicts, and from and to which its update leads.
        x, x0, z: the symbols.
    """

    def __init__(self, inputs: Inputs) -> None:
        self.inputs, self.options, self.n = inputs, inputs.options, len(inputs.timesteps)
        arrays = (inputs.alphas_cumprod, inputs.alphas_cumprod_from, inputs.alphas_cumprod_prev)
        self.at, self.start, self.to = ([Level(abar) for abar in array] for array in arrays)
        self.x, self.x0, self.z = SYMBOLS[STATE], SYMBOLS[CLEAN], SYMBOLS[NOISE]
        self._rows: list[F64] = []
        self._kept = 0

    def e(self, k: int) -> F64:
        """The prediction of e at evaluation k."""
        y, at = SYMBOLS[PREDICTION], self.at[k]
        return np.asarray(at.alpha * y + at.sigma * self.x) if self.inputs.velocity[k] else y

    def step(self, following: F64, *kept: F64) -> tuple[F64, ...]:
        """End an evaluation: its next state, and what is kept for the next one.

        Returns:
            the symbols by which the next evaluation has what was kept.
        """
        rows = np.zeros((1 + MAX_KEPT, KEPT + MAX_KEPT))
        rows[: 1 + len(kept)] = [following, *kept]
        self._rows.append(rows)
        self._kept = max(self._kept, len(kept))
        return tuple(SYMBOLS[KEPT : KEPT + len(kept)])

    def table(self) -> F64:
        rows: F64 = np.stack(self._rows)
        return rows[:, : 1 + self._kept, : KEPT + self._kept]


def compile_table(inputs: Inputs) -> F64:
    """The table of a solver, (T, 1 + S, 4 + S) for T evaluations and S tensors that it keeps.

    Row 0 is the next state, row 1 + i what is kept in place i; columns are x_0, y, x, z, and what was kept.
    Noise comes into the state alone. Inputs that no solver can have give values that are not finite.
    """
    with np.errstate(all="ignore"):
        run = Run(inputs)
        _SOLVERS[inputs.solver](run)
    return run.table()


def _ddim(run: Run) -> None:
    """Song et al. 2021, eq. 12 and 16. After clipping e stays what was predicted, as in diffusers."""
    for k, (at, to) in enumerate(zip(run.at, run.to, strict=True)):
        a, p = at.abar, to.abar
        sigma = run.inputs.eta * np.sqrt(np.maximum(0.0, (1 - p) / (1 - a) * (1 - a / p)))
        direction = np.sqrt(np.maximum(0.0, 1 - p - sigma**2))
        run.step(np.sqrt(p) * run.x0 + direction * run.e(k) + sigma * run.z)


def _ddpm(run: Run) -> None:
    """Ho et al. 2020, eq. 7: the posterior's mean; its variance (fixed_small), or beta (fixed_large)."""
    large = run.options.variant == "fixed_large"
    for k, (at, to) in enumerate(zip(run.at, run.to, strict=True)):
        a, p = at.abar, to.abar
        beta = 1 - a / p
        mean = np.sqrt(p) * beta / (1 - a) * run.x0 + np.sqrt(a / p) * (1 - p) / (1 - a) * run.x
        variance = beta if large else (1 - p) / (1 - a) * beta
        noise = np.sqrt(np.maximum(0.0, variance)) if run.inputs.timesteps[k] > 0 else 0.0
        run.step(mean + noise * run.z)


def _pndm(run: Run) -> None:
    """Liu et al. 2022: PLMS (eq. 12), after a first step of two evaluations, or after three Runge-Kutta steps
    (eq. 13) of four each. As in diffusers, v-prediction is mixed as v and becomes e at the end."""
    is_v = run.inputs.prediction_type == "v_prediction"

    def output(k: int) -> F64:
        at = run.at[k]
        if not is_v or run.inputs.velocity[k]:
            return np.asarray(SYMBOLS[PREDICTION])
        return np.asarray((SYMBOLS[PREDICTION] - at.sigma * run.x) / at.alpha)

    def transfer(k: int, x: F64, mixed: F64) -> F64:
        """Eq. 11."""
        a, p = run.start[k].abar, run.to[k].abar
        e = run.start[k].alpha * mixed + run.start[k].sigma * x if is_v else mixed
        return np.asarray(np.sqrt(p / a) * x - (p - a) / (a * np.sqrt(1 - p) + np.sqrt(a * (1 - a) * p)) * e)

    ets: tuple[F64, ...] = ()
    runge_kutta = min(12, run.n) if run.options.variant == "prk" else 0
    for first in range(0, runge_kutta, 4):
        m = output(first)
        ets = (m, *ets)
        saved, mixed, *ets_kept = run.step(transfer(first, run.x, m), run.x, m / 6, *ets)
        for k in (first + 1, first + 2):
            m = output(k)
            saved, mixed, *ets_kept = run.step(transfer(k, saved, m), saved, mixed + m / 3, *ets_kept)
        ets = run.step(transfer(first + 3, saved, mixed + output(first + 3) / 6), *ets_kept)
    for k in range(runge_kutta, run.n):
        m = output(k)
        if k == 0:
            saved, *rest = run.step(transfer(k, run.x, m), run.x, m)
            ets = tuple(rest)
        elif k == 1 and not runge_kutta:
            ets = run.step(transfer(k, saved, (m + ets[0]) / 2), *ets)
        else:
            ets = (m, *ets)[:4]
            terms = [w * et for w, et in zip(ADAMS_BASHFORTH[len(ets) - 1], ets, strict=True)]
            ets = run.step(transfer(k, run.x, np.sum(terms, axis=0)), *ets[:3])


def _dpm(run: Run) -> None:
    """DPM-Solver++ (Lu et al. 2022b), multistep, of order 1 to 3; and its SDE form, which is noisy.

    2M is algorithm 2; the SDE's first order is eq. 16 of its appendix.
    """
    sde, heun = run.inputs.solver == "sde-dpmsolver++", run.options.variant == "heun"
    history: tuple[F64, ...] = ()
    for k, (s, t) in enumerate(zip(run.at, run.to, strict=True)):
        h = t.log_snr - s.log_snr
        order, n = min(run.options.order, k + 1), run.n
        few = run.options.lower_order_final and n < FEW_STEPS
        if k == n - 1 and (run.options.euler_at_final or few or t.sigma == 0):
            order = 1
        elif k == n - 2 and few:
            order = min(order, 2)
        history = (run.x0, *history)
        d1, d2 = np.zeros_like(run.x), np.zeros_like(run.x)
        if order > 1:
            r0 = (s.log_snr - run.at[k - 1].log_snr) / h
            d1 = (history[0] - history[1]) / r0
        if order > 2:
            r1 = (run.at[k - 1].log_snr - run.at[k - 2].log_snr) / h
            d11 = (history[1] - history[2]) / r1
            d1, d2 = d1 + r0 / (r0 + r1) * (d1 - d11), (d1 - d11) / (r0 + r1)
        # The SDE has 2 h where the ODE has h, and e^-h more on x.
        u = 2 * h if sde else h
        decay = -np.expm1(-u)
        following = t.sigma / s.sigma * (np.exp(-h) if sde else 1.0) * run.x + t.alpha * decay * run.x0
        if order > 1:
            following = following + t.alpha * (decay / 2 if order == 2 and not heun else 1 - decay / u) * d1
        if order > 2:
            # Series say + 0.5 for both; diffusers has - 0.5 in the SDE, and so has this.
            following = following + t.alpha * ((decay - u) / u**2 + (-0.5 if sde else 0.5)) * d2
        if sde:
            following = following + t.sigma * np.sqrt(decay) * run.z
        history = run.step(following, *history[: run.options.order - 1])


def _euler(run: Run) -> None:
    """Karras et al. 2022, algorithm 2 without churn, in x / alpha; the ancestral form adds what it took too
    much (Crowson's k-diffusion)."""
    ancestral = run.inputs.solver == "euler-ancestral"
    for k, (at, to) in enumerate(zip(run.at, run.to, strict=True)):
        s, t = at.ratio, to.ratio
        up = np.sqrt(np.maximum(0.0, t**2 * (s**2 - t**2) / s**2)) if ancestral else 0.0
        down = np.sqrt(np.maximum(0.0, t**2 - up**2)) if ancestral else t
        x = run.x / at.alpha
        slope = (x - run.x0) / s
        run.step(_scale(run, k) * (x + (down - s) * slope + up * run.z))


def _heun(run: Run) -> None:
    """Karras et al. 2022, algorithm 1 without churn, in x / alpha: each step but the last one is evaluated
    again at its end."""
    saved, slope = run.x, run.x
    for k, (at, to) in enumerate(zip(run.at, run.to, strict=True)):
        x = run.x / at.alpha
        here = (x - run.x0) / at.ratio
        if k % 2 == 0:
            following = x + (to.ratio - at.ratio) * here
            saved, slope = run.step(_scale(run, k) * following, run.x, here)
        else:
            before = run.at[k - 1]
            following = saved / before.alpha + (to.ratio - before.ratio) / 2 * (slope + here)
            run.step(_scale(run, k) * following)


def _scale(run: Run, k: int) -> np.float64:
    """From x / alpha to the state; the last one, which no network sees, stays x / alpha as in diffusers."""
    return run.to[k].alpha if k < run.n - 1 else np.float64(1.0)


def _unipc(run: Run) -> None:
    """UniPC (Zhao et al. 2023), algorithms 5 to 8: each evaluation first corrects the state that it was made
    at, then predicts the next one."""
    o = run.options
    history: tuple[F64, ...] = ()
    saved, order = run.x, 1
    for k in range(run.n):
        m = run.x0 if o.predict_x0 else run.e(k)
        x = run.x
        if k > 0 and k - 1 not in o.disable_corrector:
            x = _unipc_update(run, k - 1, run.at[k], saved, history, order, m)
        history = (m, *history)[: o.order]
        order = min(o.order, run.n - k, k + 1) if o.lower_order_final else min(o.order, k + 1)
        following = _unipc_update(run, k, run.to[k], x, history, order, None)
        saved, *rest = run.step(following, x, *history)
        history = tuple(rest)


def _unipc_update(
    run: Run, k: int, t: Level, x: F64, history: tuple[F64, ...], order: int, found: F64 | None
) -> F64:
    """UniP from evaluation k to t (eq. 3), or UniC where `found`, the prediction at t, is known (eq. 9).

    Args:
        history: predictions at evaluations k, k - 1, ...
    """
    o, s = run.options, run.at[k]
    h = t.log_snr - s.log_snr
    hh = -h if o.predict_x0 else h
    ratios = [(run.at[k - i].log_snr - s.log_snr) / h for i in range(1, order)]
    differences = [(history[i] - history[0]) / r for i, r in enumerate(ratios, 1)]
    if found is not None:
        differences.append(found - history[0])
    phi_1 = np.expm1(hh)
    scale = hh if o.variant == "bh1" else phi_1
    phi, factorial, b = phi_1 / hh - 1, 1, []
    for i in range(1, order + 1):
        b.append(phi * factorial / scale)
        factorial *= i + 1
        phi = phi / hh - 1 / factorial
    points = np.array([*ratios, 1.0])
    matrix = np.stack([points**i for i in range(order)])
    size = len(differences)
    if (found is None and order == 2) or (found is not None and order == 1):
        weights = np.array([0.5])
    else:
        weights = np.linalg.solve(matrix[:size, :size], np.array(b)[:size]) if size else np.zeros(0)
    inner, outer = (s.sigma, t.sigma) if o.predict_x0 else (s.alpha, t.alpha)
    other = t.alpha if o.predict_x0 else t.sigma
    result = outer / inner * x - other * phi_1 * history[0]
    for weight, difference in zip(weights, differences, strict=True):
        result = result - other * scale * weight * difference
    return np.asarray(result)


def _lcm(run: Run) -> None:
    """Luo et al. 2023, algorithm 3: the consistency function's x_0, made noisy again."""
    for k, to in enumerate(run.to):
        t = run.inputs.timesteps[k] * run.options.timestep_scaling
        skip, out = SIGMA_DATA**2 / (t**2 + SIGMA_DATA**2), t / np.sqrt(t**2 + SIGMA_DATA**2)
        run.step(to.alpha * (out * run.x0 + skip * run.x) + to.sigma * run.z)


_SOLVERS: Mapping[str, Callable[[Run], None]] = {
    "ddim": _ddim,
    "ddpm": _ddpm,
    "pndm": _pndm,
    "dpmsolver++": _dpm,
    "sde-dpmsolver++": _dpm,
    "euler": _euler,
    "euler-ancestral": _euler,
    "heun": _heun,
    "unipc": _unipc,
    "lcm": _lcm,
}
