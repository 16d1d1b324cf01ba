"""Timesteps and noise levels of every evaluation of a solver, as diffusers 0.42 spaces them."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from ..errors import ModelError, RecipeError
from ..typed import brief
from .solvers import Solver

F64 = npt.NDArray[np.float64]
DPM: tuple[Solver, ...] = ("dpmsolver++", "sde-dpmsolver++")
RHO = 7.0
"""Of Karras et al. 2022, eq. 5."""


class Grid(NamedTuple):
    """Of every evaluation, (T,): its timestep, and abar at it, and from and to which its update leads."""

    timesteps: npt.NDArray[Any]
    at: F64
    start: F64
    to: F64


class Spacing:
    """Spacing of the timesteps, by solver.

    Attributes:
        abar: alphas_cumprod of every train timestep.
        name: leading, trailing or linspace.
    """

    def __init__(
        self, config: Mapping[str, Any], solver: Solver, n_train: int, n_steps: int, abar: F64
    ) -> None:
        self.config, self.solver, self.n_train, self.n, self.abar = config, solver, n_train, n_steps, abar
        default = "leading" if solver in ("ddim", "ddpm", "pndm", "lcm") else "linspace"
        self.name = str(config.get("timestep_spacing", default))
        if self.name not in ("leading", "trailing", "linspace"):
            raise ModelError(
                f"the scheduler config says timestep_spacing {brief(self.name)}: expected leading, trailing "
                "or linspace"
            )

    def grid(self) -> Grid:
        """Noise levels of every evaluation."""
        grids: Mapping[str, Callable[[], Grid]] = {
            "ddim": self._ddim,
            "ddpm": self._ddpm,
            "pndm": self._pndm,
            "lcm": self._lcm,
            "heun": self._heun,
        }
        return grids.get(self.solver, self._sigmas)()

    def _spaced(self) -> npt.NDArray[Any]:
        """Timesteps, falling."""
        n, n_train = self.n, self.n_train
        if self.name == "trailing":
            return np.asarray(np.round(np.arange(n_train, 0, -n_train / n)) - 1)
        if self.name == "leading":
            return np.asarray(np.arange(n)[::-1] * (n_train // n) + int(self.config.get("steps_offset", 0)))
        return np.linspace(0, n_train - 1, n)[::-1]

    def _at(self, timesteps: npt.NDArray[Any], final: float) -> F64:
        """abar at integer timesteps; `final` below 0."""
        t = np.asarray(timesteps, np.int64)
        return np.asarray(np.where(t >= 0, self.abar[np.clip(t, 0, self.n_train - 1)], final))

    def _final(self, to_one: bool) -> float:
        return 1.0 if self.config.get("set_alpha_to_one", to_one) else float(self.abar[0])

    def _ddim(self) -> Grid:
        """The next level is that of t - n_train // n, also where the next timestep is another: so it is in
        diffusers."""
        t = np.round(self._spaced())
        at = self._at(t, 1.0)
        return Grid(t, at, at, self._at(t - self.n_train // self.n, self._final(True)))

    def _ddpm(self) -> Grid:
        t = np.round(self._spaced())
        at = self._at(t, 1.0)
        return Grid(t, at, at, np.append(at[1:], 1.0))

    def _lcm(self) -> Grid:
        original = int(self.config.get("original_inference_steps", 50))
        if not 1 <= original <= self.n_train:
            raise ModelError(
                f"the scheduler config says original_inference_steps {original}: expected 1 to {self.n_train}"
            )
        if self.n > original:
            raise RecipeError(
                f"n_steps is {self.n}: give 1 to {original}, the scheduler's original_inference_steps"
            )
        trained = (np.arange(1, original + 1) * (self.n_train // original) - 1)[::-1]
        t = trained[np.floor(np.linspace(0, original, self.n, endpoint=False)).astype(np.int64)]
        at = self._at(t, 1.0)
        return Grid(t, at, at, np.append(at[1:], 1.0))

    def _pndm(self) -> Grid:
        ratio, t = self.n_train // self.n, np.round(self._spaced())
        final = self._final(False)
        if self.config.get("skip_prk_steps"):
            t = np.concatenate([t[:1], t[1:2], t[1:]])
            start, to = t.copy(), t - ratio
            if len(t) > 1:  # the first step again, from its end
                start[1], to[1] = t[1] + ratio, t[1]
        elif self.n < 4:
            raise RecipeError(f"n_steps is {self.n}: PNDM starts with Runge-Kutta steps, give at least 4")
        else:
            half = ratio // 2
            points = np.repeat(t[:4][::-1], 2) + np.tile([0, half], 4)
            warm = np.repeat(points[:-1], 2)[1:-1][::-1]  # t0, t0 - half twice, t1; t1, ...
            start = np.concatenate([np.repeat(warm[::4], 4), t[3:]])
            to = np.concatenate([warm - np.tile([half, 0], 6), t[3:] - ratio])
            t = np.concatenate([warm, t[3:]])
        return Grid(t, self._at(t, 1.0), self._at(start, final), self._at(to, final))

    def _sigmas(self) -> Grid:
        """Of solvers over sigma / alpha, which may lie between train timesteps."""
        t, ratios, last = self._ratios()
        abar = 1 / (1 + np.append(ratios, last) ** 2)
        return Grid(t, abar[:-1], abar[:-1], abar[1:])

    def _heun(self) -> Grid:
        t, ratios, _ = self._ratios()
        abar = np.append(1 / (1 + ratios**2), 1.0)
        at = np.append(abar[0], np.repeat(abar[1:-1], 2))
        return Grid(np.append(t[0], np.repeat(t[1:], 2)), at, at, np.repeat(abar[1:], 2)[:-1])

    def _ratios(self) -> tuple[npt.NDArray[Any], F64, float]:
        """Timesteps, sigma / alpha at them, and at the end."""
        every = np.sqrt((1 - self.abar) / self.abar)
        multistep = self.solver in ("unipc", *DPM)
        t = self._multistep_timesteps() if multistep else np.asarray(self._spaced(), np.float32)
        ratios = np.interp(t, np.arange(len(every)), every)
        zero = (
            self.solver in ("euler-ancestral", "heun") or self.config.get("final_sigmas_type") != "sigma_min"
        )
        last = 0.0 if zero else float(every[0])
        if self.config.get("use_karras_sigmas") and self.solver != "euler-ancestral":
            ends = [every[-1], every[0]] if multistep else [ratios[0], ratios[-1]]
            if self.solver in ("euler", "unipc"):
                given = (self.config.get("sigma_max"), self.config.get("sigma_min"))
                ends = [end if own is None else float(own) for own, end in zip(given, ends, strict=True)]
            roots = [end ** (1 / RHO) for end in ends]
            ratios = (roots[0] + np.linspace(0, 1, self.n) * (roots[1] - roots[0])) ** RHO
            t = np.interp(np.log(np.maximum(ratios, 1e-10)), np.log(every), np.arange(len(every)))
            if multistep:
                cosine = self.solver != "unipc" and self.config.get("beta_schedule") == "squaredcos_cap_v2"
                t = np.floor(t) if cosine else np.round(t)
            if self.solver == "unipc" and not zero:
                last = float(ratios[-1])
        return t, ratios, last

    def _multistep_timesteps(self) -> npt.NDArray[Any]:
        n, end = self.n, self.n_train
        if self.solver in DPM:
            log_snr = np.log(np.sqrt(self.abar)) - np.log(np.sqrt(1 - self.abar))
            least = float(self.config.get("lambda_min_clipped", -math.inf))
            end -= int(np.searchsorted(log_snr[::-1], least))
        if self.name == "linspace":
            return np.linspace(0, end - 1, n + 1).round()[::-1][:-1]
        if self.name == "leading":
            t = np.arange(n + 1)[::-1][:-1] * (end // (n + 1))
            return np.asarray(t + int(self.config.get("steps_offset", 0)))
        return np.asarray(np.arange(end, 0, -self.n_train / n).round() - 1)
